"""The figures: what each is called, its unit, its goal, and how the repeats become one."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from statistics import median
from typing import Any, Final, NamedTuple

from .mallory import KINDS

__all__ = ["HOSTILE", "LEAVING", "PERSONAL", "TELEMETRY", "TOPICS", "Figure", "summary", "table"]


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


PERSONAL: Final[tuple[Figure, ...]] = (
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


TOPICS: Final[tuple[Figure, ...]] = (
    Figure("broadcast_gateway_us", "Broadcast, not acknowledged: CPU of the gateway", "µs a delivery", 1, 14.0),
    Figure("bare_us", "A bare write of the same frame to as many sockets", "µs a write", 1),
    # What 14 µs are of the 9.2 that a bare write takes where the goal was set: the ratio travels between machines.
    Figure("broadcast_ratio", "A delivery by the bare write", "times", 2, 1.52),
    Figure("broadcast_last_p50_ms", "Broadcast, not acknowledged: publish to the last device, median", "ms"),
    Figure("broadcast_last_max_ms", "Broadcast, not acknowledged: publish to the last device, slowest", "ms"),
    Figure("upto_gateway_us", "All of these acknowledged at once: CPU of the gateway", "µs a device", 1),
    Figure("acked_gateway_us", "Broadcast, each acknowledged at once: CPU of the gateway", "µs a delivery", 1),
    Figure("acked_last_p50_ms", "Broadcast, each acknowledged at once: publish to the last device, median", "ms"),
    Figure("acked_last_max_ms", "Broadcast, each acknowledged at once: publish to the last device, slowest", "ms"),
    Figure("before_p50_ms", "Personal notifications without broadcasts: publish to device, p50", "ms", 1),
    Figure("during_p50_ms", "Personal notifications during broadcasts: publish to device, p50", "ms", 1),
    Figure("before_p99_ms", "Personal notifications without broadcasts: publish to device, p99", "ms", 1),
    Figure("during_p99_ms", "Personal notifications during broadcasts: publish to device, p99", "ms", 1),
    Figure("irrelevant_gateway_us", "A broadcast that nobody here follows: CPU of the gateway", "µs a broadcast"),
    Figure("fresh_gateway_us", "The same, the first one to its topic", "µs a broadcast"),
    Figure("copies_p50_ms", "Copies to all subscribers: publish to the last one stored, median", "ms", 0, 150.0),
    Figure("copies_max_ms", "Copies to all subscribers: publish to the last one stored, slowest", "ms"),
    Figure("copies_fanout_us", "Copies to all subscribers: CPU of the fan-out agent", "µs a copy"),
    Figure("copies_nats_us", "Copies to all subscribers: CPU of nats-server", "µs a copy"),
    Figure("copies_inbox_us", "Copies to all subscribers: CPU of the inbox agent", "µs a copy"),
    Figure("single_p50_ms", "One subscriber: publish to the copy stored, median", "ms", 2),
    Figure("single_decision_ms", "One subscriber: of that after the decision was stored, median", "ms", 2),
    Figure("single_fanout_us", "One subscriber: CPU of the fan-out agent", "µs a message"),
    Figure("broadcast_client_us", "Broadcast, not acknowledged: CPU of the load client", "µs a delivery", 1),
    Figure("acked_client_us", "Broadcast, each acknowledged at once: CPU of the load client", "µs a delivery", 1),
    Figure("broadcast_others_percent", "Broadcast: what others had of the servers' core", "% of a core", 1),
)


def _returns(kind: str, text: str) -> Iterable[Figure]:
    yield Figure(f"{kind}_away_p50_s", f"{text}: a device was away, p50", "s", 2)
    yield Figure(f"{kind}_away_p99_s", f"{text}: a device was away, p99", "s", 2)
    yield Figure(f"{kind}_away_max_s", f"{text}: a device was away, longest", "s", 2)
    yield Figure(f"{kind}_last_s", f"{text}: until the last device was back", "s", 1)
    yield Figure(f"{kind}_refused", f"{text}: told to come later (4503)", "connects")
    yield Figure(f"{kind}_failed", f"{text}: failed without a word", "connects")
    yield Figure(f"{kind}_p50_ms", f"{text}: publish to device, absences included, p50", "ms", 1)
    yield Figure(f"{kind}_p99_ms", f"{text}: publish to device, absences included, p99", "ms")
    yield Figure(f"{kind}_copies", f"{text}: came twice", "notifications")
    yield Figure(f"{kind}_api_requests", f"{text}: most requests waiting at JetStream's API", "requests")


LEAVING: Final[tuple[Figure, ...]] = (
    *_returns("rolling", "Two gateways restarted, one after the other"),
    *_returns("storm", "A gateway killed, all at once to another one"),
)


def _hostile(kind: str, who: str) -> Iterable[Figure]:
    yield Figure(f"{kind}_without_p50_ms", "Nobody hostile: publish to device, p50", "ms", 1)
    yield Figure(f"{kind}_p50_ms", f"Beside those {who}: p50", "ms", 1)
    yield Figure(f"{kind}_without_p99_ms", "Nobody hostile: publish to device, p99", "ms", 1)
    yield Figure(f"{kind}_p99_ms", f"Beside those {who}: p99", "ms", 1)
    yield Figure(f"{kind}_ratio", "The p99 with them by the p99 without", "times", 2)
    yield Figure(f"{kind}_without_gateway_percent", "Nobody hostile: CPU of the gateway", "% of a core")
    yield Figure(f"{kind}_gateway_percent", f"Beside those {who}: CPU of the gateway", "% of a core")
    yield Figure(f"{kind}_others_percent", "What others had of the servers' core meanwhile", "% of a core")
    yield Figure(f"{kind}_connections", "Connections that they made", "connections")


HOSTILE: Final[tuple[Figure, ...]] = tuple(figure for kind in KINDS for figure in _hostile(kind, KINDS[kind]))


def _telemetry(kind: str, who: str, most: float | None = None) -> Iterable[Figure]:
    yield Figure(f"{kind}_off_us", f"CPU of {who}, telemetry off", "µs a delivery", 1)
    yield Figure(f"{kind}_on_us", f"CPU of {who}, telemetry on", "µs a delivery", 1)
    yield Figure(f"{kind}_ratio", f"CPU of {who}, on by off", "times", 3, most)


TELEMETRY: Final[tuple[Figure, ...]] = (
    *_telemetry("gateway", "the gateway"),
    *_telemetry("inbox", "the inbox agent"),
    *_telemetry("both", "both", 1.05),
)


def summary(runs: Sequence[Mapping[str, float]], wanted: Sequence[Figure]) -> dict[str, Any]:
    """Every figure over all repeats, with its unit and, where there is one, its goal."""
    figures: dict[str, Any] = {}
    for figure in wanted:
        values = [run[figure.key] for run in runs]
        middle = median(values)
        figures[figure.key] = {
            "text": figure.text,
            "unit": figure.unit,
            "digits": figure.digits,
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
    for found in figures.values():
        middle, least, most = (f"{found[name]:,.{found['digits']}f}" for name in ("median", "min", "max"))
        goal = "" if found["goal"] is None else f"≤ {found['goal']:g}: {'met' if found['met'] else '**missed**'}"
        lines.append(f"| {found['text']} | {middle} | {least} to {most} | {found['unit']} | {goal} |")
    return "\n".join(lines)
