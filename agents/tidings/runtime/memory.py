"""How much memory this process has, and giving back what it does not use."""

from __future__ import annotations

import ctypes
import os
from pathlib import Path
from typing import Final

__all__ = ["give_back", "resident_bytes"]

_STATM: Final = Path("/proc/self/statm")
_PAGE: Final = os.sysconf("SC_PAGE_SIZE")


def resident_bytes() -> int | None:
    """The resident set of this process, as the kernel counts it; None where it does not say (not Linux)."""
    try:
        return int(_STATM.read_text().split()[1]) * _PAGE
    except OSError:
        return None


def give_back() -> None:
    """Have the C library return what is free in its heap, where it can (glibc). Takes some milliseconds."""
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None)
    if trim is not None:
        trim(0)
