"""What agents said at two moments, and what follows from the difference: rates, shares and quantiles."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Final, NamedTuple

from prometheus_client.openmetrics.parser import text_string_to_metric_families

from tidings.telemetry.catalogue import Instrument, Kind

__all__ = ["Reading", "Scrape", "Span", "read"]

_INFINITE: Final = float("inf")
Series = tuple[str, frozenset[tuple[str, str]]]


class Scrape(NamedTuple):
    """All samples of an agent at a moment."""

    at_s: float
    """By a clock that only goes forward."""
    samples: Mapping[Series, float]


def read(text: str, at_s: float) -> Scrape:
    """Samples of OpenMetrics text. Raises `ValueError` for what is none."""
    return Scrape(
        at_s,
        {
            (sample.name, frozenset(sample.labels.items())): float(sample.value)
            for family in text_string_to_metric_families(text)  # type: ignore[no-untyped-call]
            for sample in family.samples
        },
    )


class Span(NamedTuple):
    """An agent between two scrapes; the first one has no earlier one, and no rates."""

    now: Scrape
    before: Scrape | None

    def has(self, instrument: Instrument) -> bool:
        """Whether the agent has this metric at all."""
        return any(name.startswith(instrument.prometheus) for name, _ in self.now.samples)

    def grown(self, name: str, labels: Mapping[str, str]) -> Iterable[tuple[frozenset[tuple[str, str]], float]]:
        """Of each series of a counter: by how much it grew. One that fell began anew, from 0."""
        if self.before is None:
            return
        for series in _matching(self.now, name, labels):
            value, earlier = self.now.samples[series], self.before.samples.get(series, 0.0)
            yield series[1], value - earlier if value >= earlier else value


def _matching(scrape: Scrape, name: str, labels: Mapping[str, str]) -> list[Series]:
    wanted = labels.items()
    return [series for series in scrape.samples if series[0] == name and wanted <= dict(series[1]).items()]


class Reading:
    """Several agents, taken together."""

    def __init__(self, spans: Iterable[Span]) -> None:
        self._spans = list(spans)

    def has(self, instrument: Instrument) -> bool:
        return any(span.has(instrument) for span in self._spans)

    def value(self, instrument: Instrument, **labels: str) -> float:
        """The sum of a gauge, or of a counter since its agents began."""
        name = instrument.prometheus + ("_total" if instrument.kind is Kind.COUNTER else "")
        return sum(span.now.samples[one] for span in self._spans for one in _matching(span.now, name, labels))

    def rate(self, instrument: Instrument, **labels: str) -> float | None:
        """A counter's growth a second, or that of a histogram's count; None before there are two scrapes."""
        name = instrument.prometheus + ("_total" if instrument.kind is Kind.COUNTER else "_count")
        known = [span for span in self._spans if span.before is not None]
        if not known:
            return None
        return sum(
            sum(grown for _, grown in span.grown(name, labels)) / (span.now.at_s - span.before.at_s)
            for span in known
            if span.before is not None
        )

    def rates(self, instrument: Instrument, label: str) -> dict[str, float]:
        """A counter's growth a second by the values of a label, those that grew."""
        found: dict[str, float] = {}
        for span in self._spans:
            if span.before is not None:
                for labels, grown in span.grown(f"{instrument.prometheus}_total", {}):
                    if grown:
                        value = dict(labels)[label]
                        found[value] = found.get(value, 0.0) + grown / (span.now.at_s - span.before.at_s)
        return found

    def quantile(self, share: float, instrument: Instrument, **labels: str) -> float | None:
        """Of what a histogram took between the scrapes, as Prometheus's ``histogram_quantile``; None of nothing.

        It lies in a bin, and is taken to lie as far in it as the share demands. In the last bin, which has no end, it
        is the last bound.
        """
        bins: dict[float, float] = {}
        for span in self._spans:
            for found, grown in span.grown(f"{instrument.prometheus}_bucket", labels):
                bound = float(dict(found)["le"])
                bins[bound] = bins.get(bound, 0.0) + grown
        wanted = share * bins.get(_INFINITE, 0.0)
        if not wanted:
            return None
        lower = below = 0.0
        for bound in sorted(bins):
            if bins[bound] >= wanted:
                if bound == _INFINITE:
                    break
                return lower + (bound - lower) * (wanted - below) / (bins[bound] - below)
            lower, below = bound, bins[bound]
        return lower
