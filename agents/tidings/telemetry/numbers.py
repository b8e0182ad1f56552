"""What is counted while messages flow, and read when somebody asks.

OpenTelemetry's own counters and histograms cost some 15 µs a call, a fifth of a whole delivery (ADR 0029). So the hot
path adds to plain numbers here, which is a tenth of a microsecond, and `Telemetry` shows them to OpenTelemetry when it
collects. All of it belongs to the event loop's thread.
"""

from __future__ import annotations

import time
from bisect import bisect_left
from collections.abc import Callable, Iterable, Iterator, Mapping
from itertools import product
from typing import Generic, NamedTuple, TypeVar

from .catalogue import LATENCY_S, OTHER, Instrument

__all__ = ["Bins", "Cell", "Counter", "Exemplar", "Histogram", "Numbers", "Observe", "Values"]

Values = tuple[str, ...]
"""One value for each label of an instrument, in their order."""

Observe = Callable[[], Iterable[tuple[Values, float]]]
"""What is looked up at collection."""


class Exemplar(NamedTuple):
    """One measurement of a sampled trace."""

    value: float
    at_ns: int
    trace_id: int
    span_id: int


class Cell:
    """One number that only grows."""

    __slots__ = ("value",)

    def __init__(self) -> None:
        self.value = 0


class Bins:
    """One histogram of latencies in seconds. A record costs a bisection and three additions."""

    __slots__ = ("counts", "exemplars", "total")

    def __init__(self) -> None:
        self.counts = [0] * (len(LATENCY_S) + 1)
        self.total = 0.0
        self.exemplars: dict[int, Exemplar] = {}
        """The last one of each bin."""

    def record(self, value: float, trace: tuple[int, int] | None = None, count: int = 1) -> None:
        """Count a latency, which so many had; `trace` are the ids of its trace and span, where it was sampled."""
        if value < 0:
            # The clocks of two machines.
            value = 0.0
        at = bisect_left(LATENCY_S, value)
        self.counts[at] += count
        self.total += value * count
        if trace is not None:
            self.exemplars[at] = Exemplar(value, time.time_ns(), *trace)


Member = TypeVar("Member", Cell, Bins)


class _Family(Generic[Member]):
    """The members of one instrument, one for each combination of label values."""

    def __init__(self, instrument: Instrument, make: Callable[[], Member]) -> None:
        self.instrument = instrument
        self._lists = tuple(instrument.labels.values())
        # All at once: a series that begins with its first event has no rate to begin with, and shows no zero.
        self.members: dict[Values, Member] = {values: make() for values in product(*self._lists)}

    def of(self, *values: str) -> Member:
        """The member with these label values; one that is not in its list counts as ``other`` where there is that."""
        found = self.members.get(values)
        if found is not None:
            return found
        return self.members[tuple(self._known(value, known) for value, known in zip(values, self._lists, strict=True))]

    def _known(self, value: str, known: tuple[str, ...]) -> str:
        if value in known:
            return value
        if OTHER in known:
            return OTHER
        raise ValueError(f"{self.instrument.name} has no label value {value!r}: it has {', '.join(known)}")


Counter = _Family[Cell]
Histogram = _Family[Bins]


class Numbers:
    """All instruments of a process; several agents in one share them."""

    def __init__(self) -> None:
        self.counters: dict[str, Counter] = {}
        self.histograms: dict[str, Histogram] = {}
        self.observed: dict[str, tuple[Instrument, list[Observe]]] = {}

    def counter(self, instrument: Instrument) -> Counter:
        found = self.counters.get(instrument.name)
        if found is None:
            found = self.counters[instrument.name] = _Family(instrument, Cell)
        return found

    def histogram(self, instrument: Instrument) -> Histogram:
        found = self.histograms.get(instrument.name)
        if found is None:
            found = self.histograms[instrument.name] = _Family(instrument, Bins)
        return found

    def observe(self, instrument: Instrument, observe: Observe) -> None:
        """Ask `observe` at each collection. What several agents of a process say of the same labels is added up."""
        self.observed.setdefault(instrument.name, (instrument, []))[1].append(observe)

    def read(self) -> Iterator[tuple[Instrument, Mapping[Values, float]]]:
        """Every counter and gauge, and what it is now."""
        for counter in self.counters.values():
            yield counter.instrument, {values: cell.value for values, cell in counter.members.items()}
        for instrument, observers in self.observed.values():
            sums: dict[Values, float] = {}
            for observe in observers:
                for values, value in observe():
                    sums[values] = sums.get(values, 0) + value
            yield instrument, sums
