"""What a fan-out agent counts, where telemetry is on."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable
from typing import Final

from tidings.store.guard import StoreCalls
from tidings.telemetry import catalogue
from tidings.telemetry.numbers import Numbers, Values

__all__ = ["FanoutNumbers"]

_S: Final = 1e-9


class FanoutNumbers:
    """Made by the agent. `held` says how many messages are under way in it."""

    def __init__(self, numbers: Numbers, held: Callable[[], int]) -> None:
        self.calls = StoreCalls(numbers)
        self.copies = numbers.counter(catalogue.COPIES).of()
        self.lag: int | None = None
        """Messages of ``TOPICS`` that are not acknowledged; None while nobody says."""
        self._messages = numbers.counter(catalogue.FANNED_OUT)
        self._latency = numbers.histogram(catalogue.FANOUT_LATENCY).of()
        self._dead = numbers.counter(catalogue.DEAD_LETTERS)
        numbers.observe(catalogue.HELD, lambda: [((), held())])
        numbers.observe(catalogue.STREAM_LAG, self._lag)

    def done(self, way: str, stored_ns: int) -> None:
        """All subscribers' copies, or the broadcast, are in the log."""
        self._messages.of(way).value += 1
        self._latency.record((time.time_ns() - stored_ns) * _S)

    def buried(self, reason: str) -> None:
        self._dead.of("fanout", reason).value += 1

    def _lag(self) -> Iterable[tuple[Values, float]]:
        return [] if self.lag is None else [(("fanout",), self.lag)]
