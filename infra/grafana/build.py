"""The Grafana dashboard as code: ``python infra/grafana/build.py`` writes ``dashboard.json`` beside it.

Import that file into Grafana, or put it where provisioning finds it; it asks for a Prometheus data source. A test holds
the file against this module, and every query against what real agents say at ``/metrics``.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, Final, NamedTuple

__all__ = ["DASHBOARD", "dashboard"]

DASHBOARD: Final = Path(__file__).with_name("dashboard.json")
_SOURCE: Final = {"type": "prometheus", "uid": "${source}"}
_ACROSS: Final = 24


class Panel(NamedTuple):
    """One graph: its queries by legend, in a unit of Grafana's."""

    title: str
    unit: str
    queries: dict[str, str]
    exemplars: bool = False


def _rate(metric: str, by: str) -> str:
    return f"sum by ({by}) (rate({metric}[$__rate_interval]))"


def _quantiles(metric: str, labels: str = "") -> dict[str, str]:
    inner = f"sum by (le) (rate({metric}_bucket{labels}[$__rate_interval]))"
    return {f"p{q * 100:g}": f"histogram_quantile({q}, {inner})" for q in (0.5, 0.99)}


ROWS: Final[dict[str, tuple[Panel, ...]]] = {
    "Objectives": (
        Panel(
            "Availability: budget burnt, times (99.95 %)",
            "none",
            {w: f"tidings:availability_errors:ratio_rate{w} / 0.0005" for w in ("5m", "1h", "6h")},
        ),
        Panel(
            "Latency: budget burnt, times (99 % within 200 ms)",
            "none",
            {w: f"tidings:latency_errors:ratio_rate{w} / 0.01" for w in ("5m", "1h", "6h")},
        ),
        Panel("Publish to socket", "s", _quantiles("tidings_gateway_socket_latency_seconds"), exemplars=True),
        Panel("Publish to acknowledgement", "s", _quantiles("tidings_gateway_ack_latency_seconds"), exemplars=True),
    ),
    "Deliveries": (
        Panel("Deliveries a second", "ops", {"{{plane}}": _rate("tidings_gateway_deliveries_total", "plane")}),
        Panel("Acknowledgements a second", "ops", {"{{plane}}": _rate("tidings_gateway_acks_total", "plane")}),
        Panel(
            "Attempts and redeliveries a second",
            "ops",
            {
                "attempts {{plane}}": _rate("tidings_gateway_attempts_total", "plane"),
                "redeliveries {{plane}}": _rate("tidings_gateway_redeliveries_total", "plane"),
            },
        ),
        Panel(
            "Dead letters a second",
            "ops",
            {"{{agent}} {{reason}}": _rate("tidings_dead_letters_total", "agent, reason")},
        ),
    ),
    "Sessions": (
        Panel("Sessions", "none", {"{{state}}": "sum by (state) (tidings_gateway_sessions)"}),
        Panel("Windows", "none", {"{{fill}}": "sum by (fill) (tidings_gateway_windows)"}),
        Panel("Under way", "none", {"notifications": "sum(tidings_gateway_under_way)"}),
        Panel("Catch-ups a second", "ops", {"{{way}}": _rate("tidings_gateway_catch_ups_total", "way")}),
        Panel("Gaps a second", "ops", {"{{plane}}": _rate("tidings_gateway_gaps_total", "plane")}),
        Panel("Closes a second", "ops", {"{{code}} by {{by}}": _rate("tidings_gateway_closes_total", "code, by")}),
        Panel(
            "Consumers made a second", "ops", {"{{cause}}": _rate("tidings_gateway_consumer_creations_total", "cause")}
        ),
        Panel(
            "Strangers turned away a second",
            "ops",
            {"{{instance}}": _rate("tidings_strangers_turned_away_total", "instance")},
        ),
    ),
    "Inbox and fan-out": (
        Panel("Stream lag", "none", {"{{consumer}}": "max by (consumer) (tidings_stream_lag)"}),
        Panel("Written to the inbox a second", "ops", {"{{plane}}": _rate("tidings_inbox_stored_total", "plane")}),
        Panel("Publish to inbox", "s", _quantiles("tidings_inbox_latency_seconds")),
        Panel("Publish to the last copy", "s", _quantiles("tidings_fanout_latency_seconds")),
        Panel(
            "Topic messages and copies a second",
            "ops",
            {
                "{{way}}": _rate("tidings_fanout_messages_total", "way"),
                "copies stored": "sum(rate(tidings_fanout_copies_total[$__rate_interval]))",
            },
        ),
        Panel("Topic messages under way", "none", {"{{instance}}": "sum by (instance) (tidings_fanout_held)"}),
    ),
    "HTTP api": (
        Panel(
            "Requests a second",
            "ops",
            {"{{method}} {{status}}": _rate("tidings_api_request_duration_seconds_count", "method, status")},
        ),
        Panel("Duration of requests", "s", _quantiles("tidings_api_request_duration_seconds")),
        Panel("Published a second", "ops", {"{{outcome}}": _rate("tidings_api_published_total", "outcome")}),
    ),
    "Store, NATS, processes": (
        Panel(
            "Store: p99 by operation",
            "s",
            {
                "{{operation}}": "histogram_quantile(0.99, sum by (le, operation) "
                "(rate(tidings_store_latency_seconds_bucket[$__rate_interval])))"
            },
        ),
        Panel(
            "Store: failures and refusals a second",
            "ops",
            {
                "{{operation}}": _rate("tidings_store_failures_total", "operation"),
                "refused": "sum(rate(tidings_store_refusals_total[$__rate_interval]))",
            },
        ),
        Panel("Store: breakers", "none", {"{{state}}": "sum by (state) (tidings_store_breaker)"}),
        Panel(
            "NATS",
            "none",
            {
                "connected {{instance}}": "min by (instance) (tidings_nats_connected)",
                "reconnects a second {{instance}}": _rate("tidings_nats_reconnects_total", "instance"),
            },
        ),
        Panel("CPU", "percentunit", {"{{instance}}": _rate("process_cpu_time_seconds_total", "instance")}),
        Panel("Memory", "bytes", {"{{instance}}": "sum by (instance) (process_memory_usage_bytes)"}),
    ),
}


def dashboard() -> dict[str, Any]:
    """The dashboard, as Grafana reads it."""
    panels: list[dict[str, Any]] = []
    y = 0
    for row, graphs in ROWS.items():
        place = {"x": 0, "y": y, "w": _ACROSS, "h": 1}
        panels.append({"id": len(panels) + 1, "type": "row", "title": row, "gridPos": place, "panels": []})
        y += 1
        for number, graph in enumerate(graphs):
            place = {"x": 8 * (number % 3), "y": y + 8 * (number // 3), "w": 8, "h": 8}
            panels.append(_panel(len(panels) + 1, graph, place))
        y += 8 * -(-len(graphs) // 3)
    source = {"name": "source", "label": "Prometheus", "type": "datasource", "query": "prometheus"}
    return {
        "uid": "tidings",
        "title": "Tidings",
        "schemaVersion": 39,
        "editable": False,
        "time": {"from": "now-1h", "to": "now"},
        "refresh": "30s",
        "templating": {"list": [source]},
        "panels": panels,
    }


def _panel(number: int, panel: Panel, place: dict[str, int]) -> dict[str, Any]:
    return {
        "id": number,
        "type": "timeseries",
        "title": panel.title,
        "gridPos": place,
        "datasource": _SOURCE,
        "fieldConfig": {"defaults": {"unit": panel.unit, "min": 0}, "overrides": []},
        "targets": [
            {"refId": chr(65 + at), "expr": query, "legendFormat": legend, "exemplar": panel.exemplars}
            for at, (legend, query) in enumerate(panel.queries.items())
        ],
    }


if __name__ == "__main__":
    DASHBOARD.write_text(json.dumps(dashboard(), indent=2) + "\n")
