"""``python -m bench.peers``: ours and what a user would pick instead, side by side. See ``bench/README.md``."""

from __future__ import annotations

import argparse
import asyncio
import dataclasses
import json
import os
import subprocess
import sys
import time
from collections import defaultdict
from collections.abc import Sequence
from contextlib import nullcontext
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any, Final

from bench import readme
from bench.host import BenchFailed, pick_cores
from bench.system import alone, machine, on_cores, raise_open_files, versions
from tidings.wire.errors import TidingsError

from . import report
from .servers import PEERS, Missing, Programs
from .workloads import WORKLOADS, Plan, run

_FILE: Final = Path("bench/peers.json")
_PLOT: Final = Path("bench/plots/peers.svg")
_BEGIN: Final = "<!-- peers: written by `python -m bench.peers --write` -->"
_END: Final = "<!-- end of peers -->"
_SPARE_FILES: Final = 500
_FAILED: Final = 2
_GROWING: Final = ("tidings", "centrifugo")
"""Whose growth is looked at, once: it takes minutes."""
_QUICK: Final[dict[str, Any]] = {
    "devices": 100,
    "clients": 40,
    "rates": (100,),
    "seconds": 1.0,
    "broadcasts": 3,
    "jitter_s": 4.0,
    "cut_min_s": 1.0,
    "cut_max_s": 2.0,
    "away_s": 0.5,
    "deploy_s": 4.0,
    "growth": (50, 100),
    "simulated": (150,),
    "growth_rate": 50,
    "growth_s": 1.0,
    "repeats": 1,
    "warm_up": 20,
    "warm_up_s": 0.3,
    "settle_s": 0.3,
}


def _names(known: Sequence[str]) -> Any:
    def read(text: str) -> list[str]:
        names = text.split(",")
        if unknown := [name for name in names if name not in known]:
            raise argparse.ArgumentTypeError(f"{unknown[0]!r} is none of {', '.join(known)}")
        return names

    return read


def _arguments() -> argparse.Namespace:
    plan, programs = Plan(), Programs()
    parser = argparse.ArgumentParser(prog="bench.peers", description="Tidings and its peers under the same loads.")
    parser.add_argument(
        "--peers", type=_names(list(PEERS)), help=f"which (default: all that are here): {', '.join(PEERS)}"
    )
    parser.add_argument("--workloads", type=_names(WORKLOADS), help=f"which (default: all): {', '.join(WORKLOADS)}")
    parser.add_argument("--quick", action="store_true", help="a smoke test: small and short, its figures mean nothing")
    parser.add_argument("--repeats", type=int, help=f"how often (default: {plan.repeats}); the growth is measured once")
    parser.add_argument("--devices", type=int, help=f"connected devices (default: {plan.devices})")
    parser.add_argument("--centrifugo", metavar="PATH", help="Centrifugo's binary")
    parser.add_argument("--redis", metavar="PATH", default=programs.redis, help=f"default: {programs.redis}")
    parser.add_argument("--node", metavar="PATH", default=programs.node, help=f"default: {programs.node}")
    parser.add_argument("--json", type=Path, default=_FILE, help=f"where the figures go (default: {_FILE})")
    parser.add_argument("--write", action="store_true", help=f"put tables into bench/README.md, draw {_PLOT}")
    return parser.parse_args()


def _say(text: str) -> None:
    print(f"{time.strftime('%H:%M:%S')} {text}", file=sys.stderr, flush=True)


async def _measure(args: argparse.Namespace, plan: Plan, programs: Programs) -> tuple[dict[str, Any], dict[str, str]]:
    """All workloads on all peers, one after the other, again and again: whatever drifts, drifts for all of them."""
    peers: list[str] = args.peers or list(PEERS)
    workloads = args.workloads or WORKLOADS
    runs: dict[str, list[dict[str, float]]] = {peer: [] for peer in peers}
    absent: dict[str, str] = {}
    for number in range(plan.repeats):
        found: defaultdict[str, dict[str, float]] = defaultdict(dict)
        for workload in workloads:
            for peer in peers:
                if peer in absent or (workload == "growth" and (number or peer not in _GROWING)):
                    continue
                _say(f"repeat {number + 1} of {plan.repeats}, {workload}: {peer}")
                try:
                    found[peer] |= await run(peer, workload, plan, programs, _say)
                except Missing as error:
                    if args.peers:
                        raise
                    absent[peer] = str(error)
                    _say(f"left out: {error}")
        for peer, figures in found.items():
            runs[peer].append(figures)
    return report.summary({peer: repeats for peer, repeats in runs.items() if repeats}), absent


def _peer_versions(programs: Programs) -> dict[str, str]:
    """What the peers call themselves."""
    found: dict[str, str] = {}
    for name, command in (
        ("centrifugo", [programs.centrifugo, "version"]),
        ("redis", [programs.redis, "--version"]),
        ("node", [programs.node, "--version"]),
    ):
        if command[0] is not None:
            try:
                said = subprocess.run(command, capture_output=True, text=True, check=False).stdout
            except FileNotFoundError:
                continue
            found[name] = next((word for word in said.split() if word.strip("v=")[:1].isdigit()), said.strip())
    package = Path(__file__).parent / "socketio" / "node_modules" / "socket.io" / "package.json"
    if package.exists():
        found["socket.io"] = json.loads(package.read_text())["version"]
    try:
        found["python-socketio"] = version("python-socketio")
    except PackageNotFoundError:
        pass
    return found


def _markdown(result: dict[str, Any], plan: Plan) -> str:
    host, figures = result["machine"], result["figures"]
    wanted = report.lines(plan.rates, (*plan.growth, *plan.simulated))
    pinned = "servers on one core, load on the other" if plan.cores.servers else "not pinned to cores"
    left_out = "".join(f"\n\nNot measured: {peer} ({why})." for peer, why in result["absent"].items())
    lost = "\n".join(report.losses(figures, wanted)) or "Nowhere in this run."
    return (
        f"{result['date']}: {host['cpu']}, {host['cores']} cores, {host['memory_gb']} GB, Linux {host['kernel']}; "
        f"{', '.join(f'{name} {number}' for name, number in result['versions'].items())}. "
        f"{plan.devices:,} devices, {plan.clients:,} where connections break, {plan.size} bytes, "
        f"repeats: {plan.repeats}; {pinned}.{left_out}\n\n"
        f"{report.goals_table(figures)}\n\n![The figures as bars]({_PLOT.relative_to('bench')})\n\n"
        f"{report.table(figures, wanted)}\n\nWhere a peer is better than Tidings:\n\n{lost}"
    )


def _run() -> int:
    args = _arguments()
    programs = Programs(centrifugo=args.centrifugo, redis=args.redis, node=args.node)
    given = {name: value for name in ("repeats", "devices") if (value := getattr(args, name)) is not None}
    plan = Plan(**{**(_QUICK if args.quick else {}), **given}, cores=pick_cores(sorted(os.sched_getaffinity(0))))
    allowed = raise_open_files()
    most = max(plan.devices, *plan.growth)
    if most + _SPARE_FILES > allowed:
        raise BenchFailed(f"{most} devices need more open files than the {allowed} that are allowed here")
    turn = nullcontext() if args.quick else alone(lambda: _say("another benchmark runs here: waiting for its end"))
    with turn, on_cores(plan.cores.load):
        figures, absent = asyncio.run(_measure(args, plan, programs))
    result = {
        "date": time.strftime("%Y-%m-%d"),
        "machine": machine(),
        "versions": {**versions(), **_peer_versions(programs)},
        "settings": {**dataclasses.asdict(plan), "cores": str(plan.cores)},
        "absent": absent,
        "figures": figures,
    }
    args.json.write_text(json.dumps(result, indent=2, ensure_ascii=False) + "\n")
    text = _markdown(result, plan)
    print(text)
    if args.write:
        report.plot(figures, (*plan.growth, *plan.simulated), _PLOT)
        readme.write(text, _BEGIN, _END)
    return 0


def main() -> int:
    """0: done; 2: it could not be done."""
    try:
        return _run()
    except (BenchFailed, TidingsError, OSError) as error:
        _say(str(error))
        return _FAILED


if __name__ == "__main__":
    sys.exit(main())
