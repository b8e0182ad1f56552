"""``python -m bench``: run the benchmark, print its table, keep its figures. See ``bench/README.md``."""

from __future__ import annotations

import argparse
import asyncio
import dataclasses
import json
import os
import sys
import time
from contextlib import nullcontext
from pathlib import Path
from typing import Any, Final

from tidings.wire.errors import TidingsError

from . import figures, profiler
from .host import BenchFailed, pick_cores, running_mesh
from .system import alone, machine, on_cores, raise_open_files, versions
from .workloads import Counts, Plan, Repeat, run_repeat

_RESULTS: Final = Path("bench/results.json")
_README: Final = Path(__file__).with_name("README.md")
_BEGIN: Final = "<!-- results: written by `python -m bench --write` -->"
_END: Final = "<!-- end of results -->"
_SPARE_FILES: Final = 500
_LOST: Final = 1
_FAILED: Final = 2
_QUICK: Final[dict[str, Any]] = {
    "devices": 200,
    "rate": 400,
    "seconds": 3.0,
    "repeats": 1,
    "partitions": 8,
    "warm_up": 20,
    "warm_up_s": 0.5,
    "settle_s": 1.0,
}


def _arguments() -> argparse.Namespace:
    plan = Plan()
    parser = argparse.ArgumentParser(prog="bench", description="What a device and a notification cost.")
    parser.add_argument("--quick", action="store_true", help="a smoke test: small and short, its figures mean nothing")
    parser.add_argument("--devices", type=int, help=f"connected devices (default: {plan.devices})")
    parser.add_argument("--rate", type=int, help=f"notifications a second at full load (default: {plan.rate})")
    parser.add_argument("--seconds", type=float, help=f"length of a measured load (default: {plan.seconds:g})")
    parser.add_argument("--repeats", type=int, help=f"how often, each on a new mesh (default: {plan.repeats})")
    parser.add_argument("--partitions", type=int, help=f"partitions of the mesh (default: {plan.partitions})")
    parser.add_argument("--size", type=int, help=f"bytes of a notification (default: {plan.size})")
    parser.add_argument(
        "--no-message-id", dest="message_id", action="store_false", default=None, help="publish without Nats-Msg-Id"
    )
    parser.add_argument("--unpinned", action="store_true", help="let the system choose the cores")
    parser.add_argument("--json", type=Path, default=_RESULTS, help=f"where figures go (default: {_RESULTS})")
    parser.add_argument("--write", action="store_true", help="put the table into bench/README.md")
    parser.add_argument("--profile", choices=("gateway", "inbox"), help="show where this agent's time goes instead")
    return parser.parse_args()


def _plan(args: argparse.Namespace) -> Plan:
    names = {field.name for field in dataclasses.fields(Plan)}
    given = {name: value for name, value in vars(args).items() if name in names and value is not None}
    if not args.unpinned:
        given["cores"] = pick_cores(sorted(os.sched_getaffinity(0)))
    plan = Plan(**{**(_QUICK if args.quick else {}), **given})
    allowed = raise_open_files()
    if plan.devices + _SPARE_FILES > allowed:
        raise BenchFailed(f"{plan.devices} devices need more open files than the {allowed} that are allowed here")
    return plan


def _say(text: str) -> None:
    print(f"{time.strftime('%H:%M:%S')} {text}", file=sys.stderr, flush=True)


async def _measure(plan: Plan) -> tuple[dict[str, Any], Counts]:
    runs, counts = [], Counts()
    for number in range(plan.repeats):
        _say(f"repeat {number + 1} of {plan.repeats}: {plan.devices} devices, {plan.rate} notifications a second")
        repeat = await run_repeat(plan, _say)
        runs.append(repeat.figures)
        counts.add(repeat.counts)
    return figures.summary(runs), counts


async def _profile(plan: Plan, agent: str) -> str:
    async with running_mesh(plan.partitions, plan.cores, profiled=agent, devices=plan.devices) as mesh:
        await Repeat(plan, mesh, _say).profile(agent)
        lines = profiler.read(mesh.profile_of(agent))
    return profiler.report(lines, int(plan.rate * (plan.seconds + plan.warm_up_s)))


def _settings(plan: Plan) -> dict[str, Any]:
    values = {field.name: getattr(plan, field.name) for field in dataclasses.fields(plan) if field.name != "cores"}
    return {**values, "cores": {"servers": sorted(plan.cores.servers), "load": sorted(plan.cores.load)}}


def _markdown(result: dict[str, Any]) -> str:
    host, used, plan, counts = (result[name] for name in ("machine", "versions", "settings", "counts"))
    pinned = "servers on one core, load on the other" if plan["cores"]["servers"] else "not pinned to cores"
    return (
        f"{result['date']}: {host['cpu']}, {host['cores']} cores, {host['memory_gb']} GB, Linux {host['kernel']}; "
        f"{', '.join(f'{name} {version}' for name, version in used.items())}. {plan['devices']:,} devices, "
        f"{plan['partitions']} partitions, {plan['rate']:,} notifications of {plan['size']} bytes a second for "
        f"{plan['seconds']:g} s at full load, repeats: {plan['repeats']}; {pinned}.\n\n"
        f"{figures.table(result['figures'])}\n\n"
        f"Published {counts['published']:,}, confirmed {counts['stored']:,}, received {counts['received']:,}; "
        f"lost {counts['lost']}, duplicates {counts['duplicates']}, to the wrong device {counts['misled']}, "
        f"not acknowledged or not in the inbox at the end {counts['unsettled']}, "
        f"connections dropped {counts['dropped']}."
    )


def _write(text: str) -> None:
    head, begin, rest = _README.read_text().partition(_BEGIN)
    _, end, tail = rest.partition(_END)
    if not begin or not end:
        raise BenchFailed(f"{_README.name} has lost its markers: {_BEGIN} and {_END}")
    _README.write_text(f"{head}{begin}\n\n{text}\n\n{end}{tail}")


def _run() -> int:
    args = _arguments()
    host = machine()
    plan = _plan(args)
    # The figures of a smoke test mean nothing, so it neither waits nor makes others wait.
    turn = nullcontext() if args.quick else alone(lambda: _say("another benchmark runs here: waiting for its end"))
    with turn, on_cores(plan.cores.load):
        if args.profile:
            print(asyncio.run(_profile(plan, args.profile)))
            return 0
        found, counts = asyncio.run(_measure(plan))
    result = {
        "date": time.strftime("%Y-%m-%d"),
        "machine": host,
        "versions": versions(),
        "settings": _settings(plan),
        "figures": found,
        "counts": dataclasses.asdict(counts),
        "whole": counts.whole,
    }
    args.json.write_text(json.dumps(result, indent=2, ensure_ascii=False) + "\n")
    text = _markdown(result)
    print(text)
    if args.write:
        _write(text)
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
