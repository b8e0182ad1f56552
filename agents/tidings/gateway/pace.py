"""Work that comes in floods, some of it a turn of the event loop.

Thousands of connections that come at once would all be shaken hands with in one turn, which then takes seconds: nobody
gets a notification meanwhile, and answers of the store that have long come are taken for lost, because their time is
over when the loop looks at them.
"""

from __future__ import annotations

import asyncio
from collections import deque

__all__ = ["Pace"]


class Pace:
    """Lets `most` through a turn of the loop, in the order of asking."""

    def __init__(self, most: int) -> None:
        self._most = most
        self._passed = 0
        self._waiting: deque[asyncio.Future[None]] = deque()
        self._counting = False

    async def turn(self) -> None:
        """Return in this turn, or in a later one."""
        loop = asyncio.get_running_loop()
        if not self._counting:
            self._counting = True
            loop.call_soon(self._next)
        if self._passed < self._most and not self._waiting:
            self._passed += 1
            return
        turn = loop.create_future()
        self._waiting.append(turn)
        await turn

    def _next(self) -> None:
        self._passed = 0
        while self._waiting and self._passed < self._most:
            turn = self._waiting.popleft()
            # Who was cancelled meanwhile has no use for it.
            if not turn.done():
                turn.set_result(None)
                self._passed += 1
        self._counting = bool(self._passed)
        if self._counting:
            asyncio.get_running_loop().call_soon(self._next)
