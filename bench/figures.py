"""The figures: what each is called, its unit, its goal, and how the repeats become one."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from statistics import median
from typing import Any, Final, NamedTuple

__all__ = ["FIGURES", "Figure", "summary", "table"]


class Figure(NamedTuple):
    """One line of the table."""

    key: str
    text: str
    unit: str
    digits: int = 0
    most: float | None = None
    """The goal: the median is at most this."""


def _connects(kind: str, text: str) -> Iterable[Figure]:
    yield Figure(f"{kind}_per_s", f"{text}: connects", "/s")
    yield Figure(f"{kind}_gateway_us", f"{text}: CPU of the gateway", "µs a connect")
    yield Figure(f"{kind}_nats_us", f"{text}: CPU of nats-server", "µs a connect")
    yield Figure(f"{kind}_inbox_us", f"{text}: CPU of the inbox agent", "µs a connect")
    yield Figure(f"{kind}_p99_ms", f"{text}: from TCP to welcome, p99, 64 under way at a time", "ms")


def _load(kind: str, text: str, *, gateway: float | None, total: float | None, p99: float | None) -> Iterable[Figure]:
    yield Figure(f"{kind}_gateway_us", f"{text}: CPU of the gateway", "µs a notification", 0, gateway)
    yield Figure(f"{kind}_nats_us", f"{text}: CPU of nats-server", "µs a notification")
    yield Figure(f"{kind}_inbox_us", f"{text}: CPU of the inbox agent", "µs a notification")
    yield Figure(f"{kind}_all_us", f"{text}: CPU of all three", "µs a notification", 0, total)
    yield Figure(f"{kind}_p50_ms", f"{text}: publish to device, p50", "ms", 1)
    yield Figure(f"{kind}_p99_ms", f"{text}: publish to device, p99", "ms", 1, p99)
    yield Figure(f"{kind}_max_ms", f"{text}: publish to device, slowest", "ms", 1)


FIGURES: Final[tuple[Figure, ...]] = (
    Figure("gateway_kb_per_device", "Memory of a connected, idle device in the gateway", "KB", 1, 18.0),
    Figure("nats_kb_per_device", "Memory of a connected, idle device in nats-server", "KB", 1),
    Figure("gateway_kb_per_device_after_load", "The same in the gateway, after the loads below", "KB", 1),
    Figure("idle_gateway_percent", "CPU of the gateway, all devices idle", "% of a core", 1),
    Figure("idle_nats_percent", "CPU of nats-server, all devices idle", "% of a core", 1),
    Figure("idle_inbox_percent", "CPU of the inbox agent, all devices idle", "% of a core", 1),
    *_connects("cold", "First-ever devices"),
    *_connects("known", "Known devices, session ended"),
    *_connects("takeover", "Devices back within the linger"),
    *_load("full", "Full load", gateway=100.0, total=400.0, p99=None),
    *_load("half", "Half load", gateway=None, total=None, p99=20.0),
    Figure("full_others_percent", "Full load: what others had of the servers' core", "% of a core", 1),
    Figure("half_others_percent", "Half load: what others had of the servers' core", "% of a core", 1),
    Figure("full_client_us", "Full load: CPU of the load client", "µs a notification"),
    Figure("full_publisher_us", "Full load: CPU of the publisher", "µs a notification"),
    Figure("full_publisher_late_ms", "Full load: latest that the publisher was", "ms", 1),
)


def summary(runs: Sequence[Mapping[str, float]]) -> dict[str, Any]:
    """Every figure over all repeats, with its unit and, where there is one, its goal."""
    figures: dict[str, Any] = {}
    for figure in FIGURES:
        values = [run[figure.key] for run in runs]
        middle = median(values)
        figures[figure.key] = {
            "text": figure.text,
            "unit": figure.unit,
            "median": round(middle, 3),
            "min": round(min(values), 3),
            "max": round(max(values), 3),
            "goal": figure.most,
            "met": None if figure.most is None else middle <= figure.most,
        }
    return figures


def table(figures: Mapping[str, Any]) -> str:
    """The figures as a Markdown table."""
    lines = ["| what | median | min to max | unit | goal |", "|---|---:|---:|---|---|"]
    for figure in FIGURES:
        found = figures[figure.key]
        middle, least, most = (f"{found[name]:,.{figure.digits}f}" for name in ("median", "min", "max"))
        goal = "" if found["goal"] is None else f"≤ {found['goal']:g}: {'met' if found['met'] else '**missed**'}"
        lines.append(f"| {figure.text} | {middle} | {least} to {most} | {figure.unit} | {goal} |")
    return "\n".join(lines)
