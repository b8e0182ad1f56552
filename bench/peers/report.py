"""The comparison's figures: what they are called, the ratios that are the goals, the tables, and the plots."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from statistics import median
from typing import Any, Final, NamedTuple

__all__ = ["GOALS", "Goal", "Line", "goals_table", "lines", "losses", "plot", "summary", "table"]

Figures = Mapping[str, Mapping[str, Mapping[str, float]]]
"""By peer and by a figure's key: the ``median``, ``min`` and ``max`` of the repeats."""

OURS: Final = "tidings"
_RATE: Final = 2000


class Line(NamedTuple):
    """One line of the table."""

    key: str
    text: str
    unit: str
    digits: int = 0
    less_is_better: bool = True


class Goal(NamedTuple):
    """A figure of ours by a figure of a peer's is at most `most`; without a peer, our figure is at least `least`."""

    text: str
    ours: str
    key: str
    peer: str | None = None
    most: float = 0.0
    least: float = 0.0


GOALS: Final = (
    Goal("Memory a device, gateway by Centrifugo", OURS, "front_kb", "centrifugo", 0.4),
    Goal("Broadcast, CPU a delivery, all of ours by Centrifugo", OURS, "broadcast_us", "centrifugo", 0.5),
    Goal(
        "Personal at 2,000/s without the inbox agent, CPU, by Centrifugo with Redis",
        "tidings-no-inbox",
        f"personal_{_RATE}_us",
        "centrifugo-redis",
        0.8,
    ),
    Goal(
        "Personal at 2,000/s, CPU of all of ours, by Centrifugo with Redis",
        OURS,
        f"personal_{_RATE}_us",
        "centrifugo-redis",
        1.1,
    ),
    Goal("Jitter: replay p99, by Centrifugo", OURS, "jitter_replay_p99_ms", "centrifugo", 1.0),
    Goal("Jitter: received", OURS, "jitter_received_percent", least=100.0),
    Goal("Deploy: received", OURS, "deploy_received_percent", least=100.0),
    Goal("Deploy: devices back", OURS, "deploy_back_percent", least=100.0),
)


def lines(rates: Iterable[int], growth: Iterable[int]) -> Sequence[Line]:
    """Every figure of a run with these personal rates and these sizes."""
    found = [
        Line("front_kb", "Memory of an idle device, the process that it is connected to", "KB", 1),
        Line("all_kb", "Memory of an idle device, all processes", "KB", 1),
        Line("connects_per_s", "Connects", "/s", less_is_better=False),
        Line("connect_us", "CPU, all processes", "µs a connect"),
    ]
    for rate in rates:
        who = f"Personal at {rate:,}/s"
        found += [
            Line(f"personal_{rate}_us", f"{who}: CPU, all processes", "µs a delivery"),
            Line(f"personal_{rate}_p50_ms", f"{who}: publish to device, p50", "ms", 1),
            Line(f"personal_{rate}_p99_ms", f"{who}: publish to device, p99", "ms", 1),
            Line(f"personal_{rate}_received_percent", f"{who}: received", "%", 2, less_is_better=False),
        ]
    found += [
        Line("broadcast_us", "Broadcast: CPU, all processes", "µs a delivery", 1),
        Line("broadcast_last_ms", "Broadcast: publish to the last device, median", "ms"),
        Line("broadcast_received_percent", "Broadcast: received", "%", 2, less_is_better=False),
        Line("jitter_received_percent", "Jitter: received", "%", 2, less_is_better=False),
        Line("jitter_replay_p50_ms", "Jitter: dialling to what was missed, p50", "ms", 1),
        Line("jitter_replay_p99_ms", "Jitter: dialling to what was missed, p99", "ms", 1),
        Line("jitter_p99_ms", "Jitter: publish to a connected device, p99", "ms", 1),
        Line("jitter_us", "Jitter: CPU, all processes, reconnects included", "µs a delivery"),
        Line("deploy_received_percent", "Deploy: received, of all that was to be published", "%", 2, False),
        Line("deploy_back_percent", "Deploy: devices back", "%", 1, less_is_better=False),
        Line("deploy_last_s", "Deploy: until the last device was back", "s", 1),
        Line("storm_received_percent", "Storm: received", "%", 2, less_is_better=False),
        Line("storm_away_p99_s", "Storm: a device was away, p99", "s", 2),
        Line("storm_last_s", "Storm: until the last device was back", "s", 2),
    ]
    for size in growth:
        who = f"{size:,} devices"
        found += [
            Line(f"growth_kb@{size}", f"{who}: memory of a further one, all processes", "KB", 1),
            Line(f"growth_connects_per_s@{size}", f"{who}: connects", "/s", less_is_better=False),
            Line(f"growth_us@{size}", f"{who}: CPU, all processes", "µs a delivery"),
            Line(f"growth_p99_ms@{size}", f"{who}: publish to device, p99", "ms", 1),
            Line(f"growth_received_percent@{size}", f"{who}: received", "%", 2, less_is_better=False),
        ]
    return found


def summary(runs: Mapping[str, Sequence[Mapping[str, float]]]) -> dict[str, dict[str, dict[str, float]]]:
    """The repeats of each peer, made one: a figure counts wherever a repeat has it."""
    found: dict[str, dict[str, dict[str, float]]] = {}
    for peer, repeats in runs.items():
        keys = dict.fromkeys(key for repeat in repeats for key in repeat)
        found[peer] = {}
        for key in keys:
            values = [repeat[key] for repeat in repeats if key in repeat]
            found[peer][key] = {
                "median": round(median(values), 3),
                "min": round(min(values), 3),
                "max": round(max(values), 3),
            }
    return found


def _median(figures: Figures, peer: str, key: str) -> float | None:
    found = figures.get(peer, {}).get(key)
    return None if found is None else found["median"]


def judged(goal: Goal, figures: Figures) -> tuple[float, bool] | None:
    """The ratio or the figure, and whether the goal is met; None where a part of it was not measured."""
    ours = _median(figures, goal.ours, goal.key)
    if goal.peer is None:
        return None if ours is None else (ours, ours >= goal.least)
    theirs = _median(figures, goal.peer, goal.key)
    if ours is None or not theirs:
        return None
    return ours / theirs, ours / theirs <= goal.most


def goals_table(figures: Figures) -> str:
    """The ratios, as a Markdown table."""
    rows = ["| ratio | here | goal |", "|---|---:|---|"]
    for goal in GOALS:
        found = judged(goal, figures)
        wanted = f"≤ {goal.most:g}" if goal.peer else f"≥ {goal.least:g} %"
        if found is None:
            rows.append(f"| {goal.text} | not measured | {wanted} |")
        else:
            value = f"{found[0]:.2f}" if goal.peer else f"{found[0]:.2f} %"
            rows.append(f"| {goal.text} | {value} | {wanted}: {'met' if found[1] else '**missed**'} |")
    return "\n".join(rows)


def table(figures: Figures, wanted: Sequence[Line]) -> str:
    """Medians of all peers, side by side, with what the repeats spread over, as a Markdown table."""
    peers = list(figures)
    rows = ["| what | unit | " + " | ".join(peers) + " |", "|---|---|" + "---:|" * len(peers)]
    for line in wanted:
        found = [figures[peer].get(line.key) for peer in peers]
        if any(cell is not None for cell in found):
            rows.append(f"| {line.text} | {line.unit} | {' | '.join(_cell(cell, line.digits) for cell in found)} |")
    return "\n".join(rows)


def _cell(cell: Mapping[str, float] | None, digits: int) -> str:
    if cell is None:
        return "–"
    middle, least, most = (f"{cell[name]:,.{digits}f}" for name in ("median", "min", "max"))
    return middle if least == most else f"{middle} ({least} to {most})"


def losses(figures: Figures, wanted: Sequence[Line]) -> list[str]:
    """Where a peer's median is better than ours, the best one each."""
    said: list[str] = []
    for line in wanted:
        ours = _median(figures, OURS, line.key)
        others = {
            peer: value
            for peer in figures
            if not peer.startswith(OURS) and (value := _median(figures, peer, line.key)) is not None
        }
        if ours is None or not others:
            continue
        best = (min if line.less_is_better else max)(others, key=lambda peer: others[peer])
        if (others[best] < ours) if line.less_is_better else (others[best] > ours):
            said.append(
                f"- {line.text}: {ours:,.{line.digits}f} against {others[best]:,.{line.digits}f} {line.unit} ({best})"
            )
    return said


def plot(figures: Figures, growth: Sequence[int], file: Path) -> None:
    """Draw the figures that matter most: what a device and a delivery cost, by process, and how it grows."""
    import matplotlib as mpl
    from matplotlib.figure import Figure

    # The same figures make the same file.
    mpl.rcParams["svg.hashsalt"] = "tidings"
    canvas = Figure(figsize=(12, 10), layout="constrained")
    axes = canvas.subplots(3, 2).flat
    peers = list(figures)
    memory, broadcast, personal, replay, grown, late = axes
    _bars(memory, figures, "KB a device, idle: where it is connected, and the rest", [
        ("connected to", {peer: _median(figures, peer, "front_kb") or 0.0 for peer in peers}),
        ("rest", {
            peer: (_median(figures, peer, "all_kb") or 0.0) - (_median(figures, peer, "front_kb") or 0.0)
            for peer in peers
        }),
    ])  # fmt: skip
    _bars(broadcast, figures, "Broadcast: µs of CPU a delivery", _by_process(figures, "broadcast_us"))
    _bars(
        personal,
        figures,
        f"Personal at {_RATE:,}/s: µs of CPU a delivery",
        _by_process(figures, f"personal_{_RATE}_us"),
    )
    _bars(replay, figures, "Jitter: ms from dialling to what was missed, p99", [
        ("p99", {peer: _median(figures, peer, "jitter_replay_p99_ms") or 0.0 for peer in peers}),
    ])  # fmt: skip
    for peer in peers:
        for axis, key in ((grown, "growth_kb"), (late, "growth_p99_ms")):
            points = [
                (size, value) for size in growth if (value := _median(figures, peer, f"{key}@{size}")) is not None
            ]
            if points:
                axis.plot(*zip(*points, strict=True), marker="o", label=peer)
    for axis, title in ((grown, "KB of a further device, by devices"), (late, "ms to a device, p99, by devices")):
        axis.set_title(title, fontsize=10)
        axis.set_xscale("log")
        axis.set_ylim(bottom=0)
        if axis.lines:
            axis.legend(fontsize=8)
    file.parent.mkdir(exist_ok=True)
    canvas.savefig(file, format="svg", metadata={"Date": None})


def _by_process(figures: Figures, key: str) -> list[tuple[str, dict[str, float]]]:
    names = dict.fromkeys(
        name.partition(":")[2] for found in figures.values() for name in found if name.startswith(f"{key}:")
    )
    return [(name, {peer: _median(figures, peer, f"{key}:{name}") or 0.0 for peer in figures}) for name in names]


def _bars(axis: Any, figures: Figures, title: str, parts: Sequence[tuple[str, Mapping[str, float]]]) -> None:
    peers = list(figures)
    left = dict.fromkeys(peers, 0.0)
    for name, values in parts:
        axis.barh(peers, [values[peer] for peer in peers], left=[left[peer] for peer in peers], label=name)
        left = {peer: left[peer] + values[peer] for peer in peers}
    axis.invert_yaxis()
    axis.set_title(title, fontsize=10)
    if len(parts) > 1:
        axis.legend(fontsize=7)
