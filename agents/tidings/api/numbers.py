"""What an api agent counts, where telemetry is on."""

from __future__ import annotations

from collections.abc import Sequence

from tidings.publish import PublishRefused, Receipt
from tidings.runtime.porch import Porch
from tidings.telemetry import catalogue
from tidings.telemetry.numbers import Numbers
from tidings.wire.errors import TidingsError

__all__ = ["ApiNumbers"]


class ApiNumbers:
    """Made by the agent; the application tells it of each answer."""

    def __init__(self, numbers: Numbers) -> None:
        self._numbers = numbers
        self._requests = numbers.histogram(catalogue.REQUESTS)
        self._published = numbers.counter(catalogue.PUBLISHED)

    def watch(self, porch: Porch) -> None:
        self._numbers.observe(catalogue.TURNED_AWAY, lambda: [((), porch.turned_away)])

    def answered(self, method: str, route: str, status: int, seconds: float) -> None:
        self._requests.of(method, catalogue.status_class(status)).record(seconds)

    def published(self, outcomes: Sequence[Receipt | TidingsError]) -> None:
        for outcome in outcomes:
            self._published.of(_outcome(outcome)).value += 1


def _outcome(outcome: Receipt | TidingsError) -> str:
    if isinstance(outcome, Receipt):
        return "duplicate" if outcome.duplicate else "stored"
    return "refused" if isinstance(outcome, PublishRefused) else "unconfirmed"
