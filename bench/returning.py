"""Devices that come back by themselves, as the SDKs do: after the time that a `bye` gave, else after a random pause
that doubles; or, to make a storm, at once.
"""

from __future__ import annotations

import asyncio
import random
import time
from array import array
from collections.abc import Callable, Coroutine
from typing import Any, Final, NamedTuple

__all__ = ["Attempt", "Returning"]

_FIRST_S: Final = 0.5
_MOST_S: Final = 15.0


class Attempt(NamedTuple):
    """How one connect went."""

    welcome: bool
    after_s: float | None
    """When the gateway wants the device back, if it said so."""


class Returning:
    """Watches connections end, and connects again with `attempt` (by a device's number) until there is a welcome."""

    def __init__(self, attempt: Callable[[int], Coroutine[Any, Any, Attempt]]) -> None:
        self._attempt = attempt
        self._tasks: set[asyncio.Task[None]] = set()
        self.at_once = False
        """Whether a device whose connection broke without a word comes back without a pause."""
        self._began = time.monotonic()
        self._reset()

    def _reset(self) -> None:
        self.away = array("d")
        """Seconds from the end of a connection to the next welcome."""
        self.last = 0.0
        self.attempts = self.refused = self.failed = 0

    def begin(self, at_once: bool) -> None:
        """From here on is counted."""
        self.at_once, self._began = at_once, time.monotonic()
        self._reset()

    @property
    def absent(self) -> int:
        """How many are on their way back."""
        return len(self._tasks)

    def gone(self, number: int, after_s: float | None) -> None:
        """This device's connection ended."""
        task = asyncio.ensure_future(self._come_back(number, after_s))
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    async def _come_back(self, number: int, after_s: float | None) -> None:
        left, failures = time.monotonic(), 0
        while True:
            if after_s is None:
                pause = 0.0 if self.at_once and not failures else min(_MOST_S, _FIRST_S * 2 ** min(failures, 8))
                after_s = random.uniform(0, pause)
                failures += 1
            await asyncio.sleep(after_s)
            self.attempts += 1
            welcome, after_s = await self._attempt(number)
            if welcome:
                break
            self.refused += after_s is not None
            self.failed += after_s is None
        now = time.monotonic()
        self.away.append(now - left)
        self.last = max(self.last, now - self._began)

    def report(self) -> dict[str, Any]:
        """What came of it so far."""
        return {
            "returned": len(self.away),
            "absent": self.absent,
            "away_s": list(self.away),
            "last_s": self.last,
            "attempts": self.attempts,
            "refused": self.refused,
            "failed": self.failed,
        }
