"""Work that comes in floods, a little of it at a time.

Thousands of connections that come at once would all be shaken hands with in one turn of the event loop, which then
takes seconds: nobody gets a notification meanwhile, and answers of the store that have long come are taken for lost,
because their time is over when the loop looks at them. Nor may they follow each other so closely that the loop never
rests: a store in threads of this process would wait for Python's lock.
"""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import Callable
from typing import Final

__all__ = ["Pace"]

_TICK_S: Final = 0.002


class Pace:
    """Lets as many through a tick of two milliseconds as `most` says in it, in the order of asking."""

    def __init__(self, most: Callable[[], int]) -> None:
        self._most = most
        self._passed = 0
        self._waiting: deque[asyncio.Future[None]] = deque()
        self._ticking = False

    def __len__(self) -> int:
        """How many wait."""
        return len(self._waiting)

    async def turn(self) -> None:
        """Return at once, or in a later tick."""
        loop = asyncio.get_running_loop()
        if not self._ticking:
            self._ticking = True
            loop.call_later(_TICK_S, self._tick)
        if not self._waiting and self._passed < self._most():
            self._passed += 1
            return
        turn = loop.create_future()
        self._waiting.append(turn)
        await turn

    def _tick(self) -> None:
        self._passed, most = 0, self._most()
        while self._waiting and self._passed < most:
            turn = self._waiting.popleft()
            # Who was cancelled meanwhile has no use for it.
            if not turn.done():
                turn.set_result(None)
                self._passed += 1
        self._ticking = bool(self._passed or self._waiting)
        if self._ticking:
            asyncio.get_running_loop().call_later(_TICK_S, self._tick)
