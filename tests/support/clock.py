"""Time in tests: one constant scales every limit, so that a slow machine needs one change."""

from __future__ import annotations

import asyncio
import os
from collections.abc import Callable
from typing import Final

SCALE: Final = float(os.environ.get("TIDINGS_TEST_SCALE", "1"))
PATIENCE_S: Final = 20 * SCALE
"""How long a test waits for what must happen before it fails: no figure of the product."""


async def until(condition: Callable[[], object], what: str, patience_s: float = PATIENCE_S) -> None:
    """Wait until `condition` holds; for states that have no event to wait for."""
    try:
        async with asyncio.timeout(patience_s):
            while not condition():
                await asyncio.sleep(0.01)
    except TimeoutError:
        raise AssertionError(f"not within {patience_s:g} s: {what}") from None
