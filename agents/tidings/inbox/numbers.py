"""What an inbox agent counts, where telemetry is on."""

from __future__ import annotations

import time
from collections.abc import Iterable, Sequence
from typing import Final

from tidings.store.guard import StoreCalls
from tidings.telemetry import catalogue
from tidings.telemetry.numbers import Numbers, Values

__all__ = ["InboxNumbers"]

_S: Final = 1e-9
_CURRENT_S: Final = 60.0
"""So long what an agent learned of the lag is told. Of several agents one asks, at a time."""


class InboxNumbers:
    """Made by the agent; both its halves tell it what happened."""

    def __init__(self, numbers: Numbers) -> None:
        self.calls = StoreCalls(numbers)
        self._stored = numbers.counter(catalogue.STORED)
        self._latency = numbers.histogram(catalogue.INBOX_LATENCY).of()
        self._dead = numbers.counter(catalogue.DEAD_LETTERS)
        self._lags: dict[str, int] = {}
        self._learned = 0.0
        numbers.observe(catalogue.STREAM_LAG, self._lag)

    def stored(self, plane: str, stored_ns: Sequence[int]) -> None:
        """Rows are durable in the store; the log had them at these times."""
        now_ns = time.time_ns()
        self._stored.of(plane).value += len(stored_ns)
        for at_ns in stored_ns:
            self._latency.record((now_ns - at_ns) * _S)

    def buried(self, reason: str) -> None:
        self._dead.of("inbox", reason).value += 1

    def learned(self, personal: int, broadcasts: int) -> None:
        """How many messages of the log are not acknowledged."""
        self._lags = {"inbox": personal, "broadcasts": broadcasts}
        self._learned = time.monotonic()

    def _lag(self) -> Iterable[tuple[Values, float]]:
        if time.monotonic() - self._learned > _CURRENT_S:
            return []
        return [((consumer,), lag) for consumer, lag in self._lags.items()]
