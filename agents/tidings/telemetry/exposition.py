"""What OpenTelemetry collected, as OpenMetrics 1.0 text: the format of Prometheus that has exemplars."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any, Final

from opentelemetry.sdk.metrics.export import Histogram, HistogramDataPoint, Metric, MetricsData, NumberDataPoint, Sum

__all__ = ["CONTENT_TYPE", "family", "render"]

CONTENT_TYPE: Final = "application/openmetrics-text; version=1.0.0; charset=utf-8"
_SUFFIXES: Final = {"s": "_seconds", "By": "_bytes"}


def family(metric: Metric) -> str:
    """The name of a metric's family."""
    return metric.name.replace(".", "_") + _SUFFIXES.get(metric.unit or "", "")


def render(data: MetricsData) -> str:
    """All metrics, to the ``# EOF``."""
    lines = [
        line
        for resource in data.resource_metrics
        for scope in resource.scope_metrics
        for metric in scope.metrics
        for line in _lines(metric)
    ]
    return "\n".join([*lines, "# EOF\n"])


def _lines(metric: Metric) -> Iterator[str]:
    name, data = family(metric), metric.data
    kind = "histogram" if isinstance(data, Histogram) else "counter" if isinstance(data, Sum) else "gauge"
    yield f"# TYPE {name} {kind}"
    if metric.unit in _SUFFIXES:
        yield f"# UNIT {name} {_SUFFIXES[metric.unit][1:]}"
    yield f"# HELP {name} {_escaped(metric.description or '')}"
    for point in data.data_points:
        if isinstance(point, HistogramDataPoint):
            yield from _histogram(name, point)
        elif isinstance(point, NumberDataPoint):
            suffix = "_total" if kind == "counter" else ""
            yield f"{name}{suffix}{_labels(point.attributes or {})} {point.value!r}"
        else:
            raise TypeError(f"{name} is of a kind that no instrument here has")


def _histogram(name: str, point: HistogramDataPoint) -> Iterator[str]:
    labels, count = dict(point.attributes or {}), 0
    bounds = (*(f"{bound:g}" for bound in point.explicit_bounds), "+Inf")
    exemplars: dict[int, Any] = {}
    for one in point.exemplars:
        at = next((i for i, bound in enumerate(point.explicit_bounds) if one.value <= bound), len(bounds) - 1)
        exemplars[at] = one
    for at, bound in enumerate(bounds):
        count += point.bucket_counts[at]
        line = f"{name}_bucket{_labels({**labels, 'le': bound})} {count}"
        if at in exemplars:
            one = exemplars[at]
            trace = f'trace_id="{one.trace_id:032x}",span_id="{one.span_id:016x}"'
            line += f" # {{{trace}}} {one.value:.6f} {one.time_unix_nano / 1e9:.3f}"
        yield line
    yield f"{name}_count{_labels(labels)} {count}"
    yield f"{name}_sum{_labels(labels)} {point.sum:.6f}"


def _labels(labels: Mapping[str, Any]) -> str:
    if not labels:
        return ""
    inner = ",".join(f'{key.replace(".", "_")}="{_escaped(str(value))}"' for key, value in labels.items())
    return f"{{{inner}}}"


def _escaped(text: str) -> str:
    return text.replace("\\", "\\\\").replace("\n", "\\n").replace('"', '\\"')
