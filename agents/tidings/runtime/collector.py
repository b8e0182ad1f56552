"""The garbage collector of an agent's process, told not to look at everything again and again.

A full collection walks every object of every session: 50 µs a session, 0.8 s for 15,000, with the event loop
standing still. It finds nothing there: sessions and their connections hold no cycles, and are freed by reference
count when they end (``tests/integration/test_gateway_garbage.py``). Young objects are still collected, so that the
cycles that exceptions and libraries make do not pile up.
"""

from __future__ import annotations

import gc
from typing import Final

__all__ = ["relax"]

_YOUNG: Final = 5_000
_MIDDLE: Final = 10
_OLD: Final = 1_000


def relax() -> None:
    """For the start of a process: what is loaded stays, and full collections become very rare."""
    gc.collect()
    gc.freeze()
    gc.set_threshold(_YOUNG, _MIDDLE, _OLD)
