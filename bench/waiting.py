"""Waiting for what gives no sign of itself: a file, a counter."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable

__all__ = ["until"]


async def until(condition: Callable[[], object], patience_s: float, every_s: float = 0.02) -> bool:
    """Look again and again until `condition` holds or the patience is over; whether it holds."""
    end = time.monotonic() + patience_s
    while not condition():
        if time.monotonic() > end:
            return False
        await asyncio.sleep(every_s)
    return True
