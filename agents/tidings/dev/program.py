"""What to type to get this command again."""

from __future__ import annotations

import shutil
import sys
from pathlib import Path

__all__ = ["program"]


def program() -> list[str]:
    """This command as another terminal finds it, where the virtual environment is perhaps not active."""
    beside = Path(sys.executable).with_name("tidings")
    on_path = shutil.which("tidings")
    if on_path is not None and Path(on_path).absolute() == beside:
        return ["tidings"]
    if not beside.exists():
        return [sys.executable, "-m", "tidings"]
    here = Path.cwd()
    return [str(beside.relative_to(here) if beside.is_relative_to(here) else beside)]
