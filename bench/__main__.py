"""``python -m bench``: run the benchmark, print its table, keep its figures. See ``bench/README.md``."""

from __future__ import annotations

import argparse
import asyncio
import dataclasses
import json
import os
import sys
import time
from collections.abc import Awaitable, Callable, Sequence
from contextlib import nullcontext
from pathlib import Path
from typing import Any, Final, NamedTuple

from tidings.runtime.settings import Settings
from tidings.wire.errors import TidingsError

from . import figures, profiler, readme
from .figures import Figure
from .host import BenchFailed, pick_cores, running_mesh
from .hostile import HostilePlan, HostileRepeat, run_hostile
from .leaving import ExodusPlan, LeavingPlan, LeavingRepeat, run_leaving
from .system import alone, machine, on_cores, raise_open_files, versions
from .telemetry import TelemetryPlan, TelemetryRepeat, run_telemetry
from .topics import CrowdPlan, TopicPlan, TopicRepeat, run_topics
from .workloads import Counts, Plan, Repeat, Say, run_repeat

_SPARE_FILES: Final = 500
_LOST: Final = 1
_FAILED: Final = 2

AnyPlan = Plan | TopicPlan | LeavingPlan | HostilePlan


class _Suite(NamedTuple):
    """What is measured on one mesh, one load after the other."""

    plan: type[AnyPlan]
    quick: dict[str, Any]
    """Of the plan, for a smoke test."""
    figures: Sequence[Figure]
    run: Callable[[Any, Say], Awaitable[Repeat | TopicRepeat | LeavingRepeat | HostileRepeat | TelemetryRepeat]]
    file: Path
    """Where the figures go unless something else is said."""
    begin: str
    """Where the table begins in the README."""
    end: str


_QUICK_TOPICS: Final = {
    "devices": 100,
    "broadcasts": 4,
    "every_s": 0.25,
    "repeats": 1,
    "partitions": 8,
    "listeners": 10,
    "rate": 50,
    "ignored": 200,
    "copies": 50,
    "copied": 2,
    "singles": 2,
    "settle_s": 0.5,
}

_QUICK_LEAVING: Final = {
    "devices": 100,
    "rate": 50,
    "seconds": 8.0,
    "storm_seconds": 3.0,
    "between_s": 0.2,
    "ack_wait_s": 2.0,
    "repeats": 1,
    "partitions": 8,
    "settle_s": 0.2,
}

_SUITES: Final = {
    "personal": _Suite(
        Plan,
        {
            "devices": 200,
            "rate": 400,
            "seconds": 3.0,
            "repeats": 1,
            "partitions": 8,
            "warm_up": 20,
            "warm_up_s": 0.5,
            "settle_s": 1.0,
        },
        figures.PERSONAL,
        run_repeat,
        Path("bench/results.json"),
        "<!-- results: written by `python -m bench --write` -->",
        "<!-- end of results -->",
    ),
    "topics": _Suite(
        TopicPlan,
        _QUICK_TOPICS,
        figures.TOPICS,
        run_topics,
        Path("bench/topics.json"),
        "<!-- topics: written by `python -m bench --suite topics --write` -->",
        "<!-- end of topics -->",
    ),
    "crowd": _Suite(
        CrowdPlan,
        _QUICK_TOPICS,
        figures.TOPICS,
        run_topics,
        Path("bench/crowd.json"),
        "<!-- crowd: written by `python -m bench --suite crowd --write` -->",
        "<!-- end of crowd -->",
    ),
    "leaving": _Suite(
        LeavingPlan,
        _QUICK_LEAVING,
        figures.LEAVING,
        run_leaving,
        Path("bench/leaving.json"),
        "<!-- leaving: written by `python -m bench --suite leaving --write` -->",
        "<!-- end of leaving -->",
    ),
    "exodus": _Suite(
        ExodusPlan,
        _QUICK_LEAVING,
        figures.LEAVING,
        run_leaving,
        Path("bench/exodus.json"),
        "<!-- exodus: written by `python -m bench --suite exodus --write` -->",
        "<!-- end of exodus -->",
    ),
    "hostile": _Suite(
        HostilePlan,
        {
            "devices": 50,
            "rate": 100,
            "seconds": 0.5,
            "partitions": 8,
            "warm_up": 5,
            "warm_up_s": 0.3,
            "settle_s": 0.5,
            "hostile": 10,
        },
        figures.HOSTILE,
        run_hostile,
        Path("bench/hostile.json"),
        "<!-- hostile: written by `python -m bench --suite hostile --write` -->",
        "<!-- end of hostile -->",
    ),
    "telemetry": _Suite(
        TelemetryPlan,
        {
            "devices": 50,
            "rate": 200,
            "seconds": 0.5,
            "repeats": 1,
            "partitions": 8,
            "warm_up": 5,
            "warm_up_s": 0.3,
            "pairs": 2,
        },
        figures.TELEMETRY,
        run_telemetry,
        Path("bench/telemetry.json"),
        "<!-- telemetry: written by `python -m bench --suite telemetry --write` -->",
        "<!-- end of telemetry -->",
    ),
}


def _arguments() -> argparse.Namespace:
    plan, topics = Plan(), TopicPlan()
    parser = argparse.ArgumentParser(prog="bench", description="What a device, a notification and a broadcast cost.")
    parser.add_argument("--suite", choices=_SUITES, default="personal", help="what is measured (default: personal)")
    parser.add_argument("--quick", action="store_true", help="a smoke test: small and short, its figures mean nothing")
    parser.add_argument("--devices", type=int, help=f"connected devices (default: {plan.devices})")
    parser.add_argument("--repeats", type=int, help=f"how often, each on a new mesh (default: {plan.repeats})")
    parser.add_argument("--partitions", type=int, help=f"partitions of the mesh (default: {plan.partitions})")
    parser.add_argument("--size", type=int, help=f"bytes of a notification (default: {plan.size})")
    parser.add_argument(
        "--rate",
        type=int,
        help=f"personal notifications a second (default: at full load {plan.rate}, beside broadcasts {topics.rate})",
    )
    parser.add_argument("--unpinned", action="store_true", help="let the system choose the cores")
    parser.add_argument("--json", type=Path, help="where figures go (default: the suite's own file in bench/)")
    parser.add_argument("--write", action="store_true", help="put the table into bench/README.md")
    parser.add_argument(
        "--profile", choices=("gateway", "inbox", "fanout"), help="show where this agent's time goes instead"
    )
    personal = parser.add_argument_group("personal")
    personal.add_argument("--seconds", type=float, help=f"length of a measured load (default: {plan.seconds:g})")
    personal.add_argument(
        "--no-message-id", dest="message_id", action="store_false", default=None, help="publish without Nats-Msg-Id"
    )
    hostile = parser.add_argument_group("hostile")
    hostile.add_argument("--hostile", type=int, help=f"hostile clients of each kind (default: {HostilePlan().hostile})")
    group = parser.add_argument_group("topics")
    group.add_argument("--broadcasts", type=int, help=f"broadcasts of each load (default: {topics.broadcasts})")
    group.add_argument("--every-s", type=float, help=f"seconds between two (default: {topics.every_s:g})")
    group.add_argument("--copies", type=int, help=f"subscribers who get a copy each (default: {topics.copies})")
    args = parser.parse_args()
    if args.profile and args.suite in ("leaving", "exodus", "telemetry"):
        parser.error("no one agent lives through this suite: profile another one")
    if args.profile == "fanout" and args.suite == "personal":
        parser.error("the personal suite has no fan-out agent: --suite topics")
    return args


def _plan(args: argparse.Namespace) -> AnyPlan:
    suite = _SUITES[args.suite]
    names = {field.name for field in dataclasses.fields(suite.plan)}
    given = {name: value for name, value in vars(args).items() if name in names and value is not None}
    if not args.unpinned:
        given["cores"] = pick_cores(sorted(os.sched_getaffinity(0)))
    plan = suite.plan(**{**(suite.quick if args.quick else {}), **given})
    allowed = raise_open_files()
    if plan.devices + _SPARE_FILES > allowed:
        raise BenchFailed(f"{plan.devices} devices need more open files than the {allowed} that are allowed here")
    if isinstance(plan, TopicPlan) and plan.broadcasts > Settings().window:
        raise BenchFailed(f"{plan.broadcasts} broadcasts do not fit a window of {Settings().window} unacknowledged")
    return plan


def _say(text: str) -> None:
    print(f"{time.strftime('%H:%M:%S')} {text}", file=sys.stderr, flush=True)


async def _measure(suite: _Suite, plan: AnyPlan) -> tuple[dict[str, Any], Counts]:
    runs, counts = [], Counts()
    for number in range(plan.repeats):
        _say(f"repeat {number + 1} of {plan.repeats}: {plan.devices} devices")
        repeat = await suite.run(plan, _say)
        runs.append(repeat.figures)
        counts.add(repeat.counts)
    return figures.summary(runs, suite.figures), counts


async def _profile(plan: Plan | TopicPlan, agent: str) -> str:
    followers = plan.followers() if isinstance(plan, TopicPlan) else {}
    async with running_mesh(
        plan.partitions, plan.cores, profiled=agent, devices=plan.devices, followers=followers
    ) as mesh:
        if isinstance(plan, TopicPlan):
            deliveries = await TopicRepeat(plan, mesh, _say).profile(agent)
        else:
            deliveries = await Repeat(plan, mesh, _say).profile(agent)
        lines = profiler.read(mesh.profile_of(agent))
    return profiler.report(lines, deliveries)


def _settings(plan: AnyPlan) -> dict[str, Any]:
    values = {field.name: getattr(plan, field.name) for field in dataclasses.fields(plan) if field.name != "cores"}
    return {**values, "cores": {"servers": sorted(plan.cores.servers), "load": sorted(plan.cores.load)}}


def _loads(plan: AnyPlan) -> str:
    if isinstance(plan, LeavingPlan):
        return f"{plan.rate:,} notifications of {plan.size} bytes a second all the time"
    if isinstance(plan, HostilePlan):
        return (
            f"{plan.rate:,} notifications a second for {plan.seconds:g} s a load; {plan.hostile} hostile clients a kind"
        )
    if isinstance(plan, TelemetryPlan):
        return (
            f"{plan.rate:,} notifications of {plan.size} bytes a second, one of {plan.traced_every} traced, "
            f"{plan.pairs} pairs of loads of {plan.seconds:g} s"
        )
    if isinstance(plan, TopicPlan):
        return (
            f"{plan.broadcasts} broadcasts of {plan.size} bytes a load, {1 / plan.every_s:g} a second; "
            f"{plan.rate:,} personal notifications a second beside them; {plan.copies:,} copies"
        )
    return f"{plan.rate:,} notifications of {plan.size} bytes a second for {plan.seconds:g} s at full load"


def _markdown(result: dict[str, Any], plan: AnyPlan) -> str:
    host, used, counts = (result[name] for name in ("machine", "versions", "counts"))
    pinned = "servers on one core, load on the other" if plan.cores.servers else "not pinned to cores"
    return (
        f"{result['date']}: {host['cpu']}, {host['cores']} cores, {host['memory_gb']} GB, Linux {host['kernel']}; "
        f"{', '.join(f'{name} {version}' for name, version in used.items())}. {plan.devices:,} devices, "
        f"{plan.partitions} partitions, {_loads(plan)}, repeats: {plan.repeats}; {pinned}.\n\n"
        f"{figures.table(result['figures'])}\n\n"
        f"Published {counts['published']:,}, confirmed {counts['stored']:,}, received {counts['received']:,}; "
        f"lost {counts['lost']}, duplicates {counts['duplicates']}, to the wrong device {counts['misled']}, "
        f"not acknowledged or not in the inbox at the end {counts['unsettled']}, "
        f"connections dropped {counts['dropped']}."
    )


def _run() -> int:
    args = _arguments()
    host = machine()
    suite, plan = _SUITES[args.suite], _plan(args)
    # The figures of a smoke test mean nothing, so it neither waits nor makes others wait.
    turn = nullcontext() if args.quick else alone(lambda: _say("another benchmark runs here: waiting for its end"))
    with turn, on_cores(plan.cores.load):
        if args.profile:
            assert not isinstance(plan, LeavingPlan)
            print(asyncio.run(_profile(plan, args.profile)))
            return 0
        found, counts = asyncio.run(_measure(suite, plan))
    result = {
        "date": time.strftime("%Y-%m-%d"),
        "machine": host,
        "versions": versions(),
        "settings": _settings(plan),
        "figures": found,
        "counts": dataclasses.asdict(counts),
        "whole": counts.whole,
    }
    (args.json or suite.file).write_text(json.dumps(result, indent=2, ensure_ascii=False) + "\n")
    text = _markdown(result, plan)
    print(text)
    if args.write:
        readme.write(text, suite.begin, suite.end)
    if not counts.whole:
        _say(f"notifications were lost: {dataclasses.asdict(counts)}")
    return 0 if counts.whole else _LOST


def main() -> int:
    """0: done; 1: done, and notifications were lost; 2: it could not be done."""
    try:
        return _run()
    except (BenchFailed, TidingsError, OSError) as error:
        _say(str(error))
        return _FAILED


if __name__ == "__main__":
    sys.exit(main())
