"""Who may start a session now, and when the others are to come back.

A start costs a claim in the store and a consumer at JetStream. `consumer_starts` of them are under way at a time;
behind them as many wait as get their turn within `start_wait_s`. Everybody else is told at once when to come back: what
is promised to a device is a slot of its own on a virtual clock, one after the other at the rate at which starts end
(the virtual scheduling of the generic cell rate algorithm, ITU-T I.371, annex A). So all of a storm come back evenly
spread, each once, as fast as they can be served.

The rate is the best of the last seconds during which somebody waited all the time, and half of it again. Rather too
high than too low: a device that comes too early waits; one that is told too late is away for nothing.
"""

from __future__ import annotations

import asyncio
import random
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from typing import Final

__all__ = ["Admission"]

_MOST_WAITING: Final = 2048
"""However fast they are served: each costs some 16 KB while it waits."""
_ASSUMED_PER_S: Final = 500.0
"""Until it is measured."""
_SLOWEST_PER_S: Final = 100.0
"""While nothing can be started, as without JetStream, nobody waits for ever."""
_WINDOW_S: Final = 0.5
_FORGETS: Final = 0.7
"""What is left of the rate after a window in which less was measured."""
_HOPE: Final = 1.5
"""Those who come back are promised so much more than was measured among those who had to be sent away."""
_LONGEST_S: Final = 30.0
_JITTER: Final = 0.1


class Admission:
    """The starts of one gateway. `now` is the loop's clock, in seconds."""

    def __init__(self, at_once: int, wait_s: float, now: Callable[[], float]) -> None:
        self._turns = asyncio.Semaphore(at_once)
        self._at_once = at_once
        self._wait_s = wait_s
        self._now = now
        self._promised = 0.0
        """The last slot that was given away."""
        self._window_began: float | None = None
        """Since when somebody has been waiting without a pause, or the last full window ended."""
        self._ended = 0
        self._measured = False
        self.waiting = 0
        """How many wait for their turn."""
        self.per_s = _ASSUMED_PER_S
        """Starts a second, as measured while there was a queue."""

    @property
    def soon(self) -> int:
        """How many are started within `wait_s`, as it looks now."""
        return min(_MOST_WAITING, max(self._at_once, int(self.per_s * self._wait_s)))

    @property
    def full(self) -> bool:
        """Whoever came now would have to wait for too long."""
        return self.waiting >= self.soon

    @property
    def busy(self) -> bool:
        """Enough wait that there is always one for a turn that is free."""
        return self.waiting >= self._at_once

    @asynccontextmanager
    async def turn(self) -> AsyncIterator[None]:
        """Wait for a turn, in the order of asking, and have it until the block ends."""
        self.waiting += 1
        try:
            await self._turns.acquire()
        finally:
            self.waiting -= 1
        try:
            yield
        finally:
            self._turns.release()
            self._count()

    def _count(self) -> None:
        now = self._now()
        if not self.waiting:
            # What is measured without a queue is how many came.
            self._window_began = None
            return
        if self._window_began is None:
            self._window_began, self._ended = now, 0
            return
        self._ended += 1
        took = now - self._window_began
        if took >= _WINDOW_S:
            least = self.per_s * _FORGETS if self._measured else 0.0
            self.per_s = max(self._ended / took, least, _SLOWEST_PER_S)
            self._measured = True
            self._window_began, self._ended = now, 0

    def come_back_ms(self) -> int:
        """Promise a turn to somebody who cannot wait for it here; milliseconds from now, a little at random."""
        now, step = self._now(), 1 / (_HOPE * self.per_s)
        self._promised = max(self._promised, now + self.waiting * step) + step
        after = self._promised - now
        if after > _LONGEST_S:
            # Many more than can be promised anything: half of the longest to all of it.
            self._promised = now + _LONGEST_S
            return int(1000 * random.uniform(_LONGEST_S / 2, _LONGEST_S))
        return int(1000 * after * random.uniform(1, 1 + _JITTER))
