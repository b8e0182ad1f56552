"""What is done to each peer, and what of it becomes a figure.

Each of the loads has a server of its own, started anew: what was measured before leaves memory to spare and caches
that are warm. The figures' names are keys of `bench.peers.report.FIGURES`.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass
from typing import Any, Final

from bench.host import EVERYWHERE, BenchFailed, Cores, Worker, start_worker

from .servers import Load, Programs, Server, running

__all__ = ["WORKLOADS", "Plan", "Trial"]

_COLLECT_S: Final = 20.0
_RETURN_S: Final = 90.0
_TAIL_S: Final = 0.5
"""After the last notification came: acks, rows and what follows from them still cost CPU."""

Say = Callable[[str], None]


@dataclass(frozen=True, slots=True)
class Plan:
    """How large the comparison is."""

    devices: int = 5000
    clients: int = 1000
    """Devices of the loads in which connections break."""
    rates: tuple[int, ...] = (1000, 2000)
    """Personal notifications a second."""
    seconds: float = 10.0
    """Of each measured load of personal notifications."""
    broadcasts: int = 20
    broadcasts_per_s: float = 2.0
    stream_per_s: float = 5.0
    """Notifications a second to all, while connections break."""
    jitter_s: float = 60.0
    cut_min_s: float = 10.0
    """A connection's life under jitter is between this and `cut_max_s`."""
    cut_max_s: float = 20.0
    away_s: float = 2.0
    deploy_s: float = 20.0
    """Of the stream in the middle of which the server is restarted."""
    growth: tuple[int, ...] = (1000, 5000, 15_000)
    """Connected devices at which the growth is looked at."""
    simulated: tuple[int, ...] = (30_000, 50_000)
    """The growth goes on to so many devices, without sockets, where a peer's server can be told of such."""
    growth_rate: int = 500
    growth_s: float = 6.0
    size: int = 240
    """Bytes of a notification's body."""
    repeats: int = 3
    at_once: int = 64
    warm_up: int = 100
    """Devices that connect before memory is measured first."""
    warm_up_s: float = 2.0
    settle_s: float = 6.0
    """Rest before memory is read."""
    cores: Cores = EVERYWHERE


class Span:
    """From here to `end`: what the server's processes used meanwhile."""

    def __init__(self, server: Server) -> None:
        self._server = server
        self._cpu, self._idle, self._start = server.cpu(), server.idle(), time.monotonic()

    def end(self) -> tuple[dict[str, float], float]:
        """CPU seconds of each process, and per cent of the servers' core that somebody else had."""
        now, seconds = self._server.cpu(), time.monotonic() - self._start
        used = {name: now[name] - before for name, before in self._cpu.items() if name in now}
        busy = seconds - (self._server.idle() - self._idle)
        return used, 100 * max(0.0, busy - sum(used.values())) / seconds if self._server.pinned else 0.0


class Trial:
    """One server with one load client."""

    def __init__(self, plan: Plan, server: Server, fleet: Worker, say: Say) -> None:
        self.plan = plan
        self.server = server
        self.fleet = fleet
        self._say = say
        self.figures: dict[str, float] = {}
        self._runs = 0

    # What workloads have in common

    async def connect(self, first: int, count: int, *, shared: bool) -> dict[str, Any]:
        """Connect devices; all of them, or the benchmark cannot go on."""
        answer = await self.fleet.ask("connect", first=first, count=count, at_once=self.plan.at_once, shared=shared)
        if answer["connected"] != count:
            raise BenchFailed(f"{count - answer['connected']} of {count} could not connect: {answer['problems']}")
        return answer

    async def rest(self) -> dict[str, int]:
        """Let everything come to rest; memory then, in KB."""
        await asyncio.sleep(self.plan.settle_s)
        return self.server.kilobytes()

    async def expect(self, count: int, *, everybody: int) -> int:
        """Tell the fleet what is going to come; `everybody`: each notification to so many devices."""
        self._runs += 1
        await self.fleet.ask("expect", run=self._runs, count=count, devices=everybody)
        return self._runs

    async def publish(self, count: int, rate: float, devices: int, *, shared: bool) -> dict[str, Any]:
        """Publish, and wait until all has come; what came, and what the publisher says."""
        run = await self.expect(count, everybody=devices if shared else 0)
        report = await self.server.publish(Load(run, count, rate, devices, self.plan.size, shared))
        return report | await self.fleet.ask("collect", not_stored=report["not_stored"], timeout_s=_COLLECT_S)

    def took(self, kind: str, used: dict[str, float], deliveries: int, others: float) -> None:
        """Enter CPU a delivery, of each process and of all."""
        for name, seconds in used.items():
            self.figures[f"{kind}_us:{name}"] = 1e6 * seconds / max(1, deliveries)
        self.figures[f"{kind}_us"] = 1e6 * sum(used.values()) / max(1, deliveries)
        self.figures[f"{kind}_others_percent"] = others

    def came(self, kind: str, got: dict[str, Any]) -> None:
        """Enter what was received of what the server took."""
        self.figures[f"{kind}_received_percent"] = 100 * got["received"] / max(1, got["due"])
        self.figures[f"{kind}_twice"] = got["duplicates"]

    # Workloads

    async def steady(self) -> None:
        """Memory of idle devices, personal notifications, broadcasts."""
        plan, front = self.plan, self.server.front
        await self.connect(0, plan.warm_up, shared=False)
        await self.publish(max(1, int(plan.rates[0] * plan.warm_up_s)), plan.rates[0], plan.warm_up, shared=False)
        before = await self.rest()
        span = Span(self.server)
        answer = await self.connect(plan.warm_up, plan.devices - plan.warm_up, shared=False)
        used, _ = span.end()
        after = await self.rest()
        fresh = plan.devices - plan.warm_up
        self.figures["front_kb"] = (after[front] - before[front]) / fresh
        self.figures["all_kb"] = (sum(after.values()) - sum(before.values())) / fresh
        self.figures["connects_per_s"] = fresh / answer["seconds"]
        self.figures["connect_us"] = 1e6 * sum(used.values()) / fresh
        for rate in plan.rates:
            kind = f"personal_{rate}"
            await self.publish(int(rate * plan.warm_up_s), rate, plan.devices, shared=False)
            span = Span(self.server)
            got = await self.publish(int(rate * plan.seconds), rate, plan.devices, shared=False)
            await asyncio.sleep(_TAIL_S)
            self.took(kind, *_swapped(span, got["received"]))
            self.came(kind, got)
            self.figures[f"{kind}_p50_ms"], self.figures[f"{kind}_p99_ms"] = got["p50_ms"], got["p99_ms"]
            self._say(f"{kind}: {self.figures[f'{kind}_us']:.0f} µs each, p99 {got['p99_ms']:.1f} ms")
        await self.fleet.ask("leave")
        await self.connect(0, plan.devices, shared=True)
        await self.publish(3, plan.broadcasts_per_s, plan.devices, shared=True)
        span = Span(self.server)
        got = await self.publish(plan.broadcasts, plan.broadcasts_per_s, plan.devices, shared=True)
        await asyncio.sleep(_TAIL_S)
        self.took("broadcast", *_swapped(span, got["received"]))
        self.came("broadcast", got)
        self.figures["broadcast_last_ms"] = got["last_p50_ms"]
        self._say(
            f"broadcast: {self.figures['broadcast_us']:.1f} µs a delivery, last after {got['last_p50_ms']:.0f} ms"
        )

    async def jitter(self) -> None:
        """Every connection is cut again and again, under a steady stream to all."""
        plan = self.plan
        await self.connect(0, plan.clients, shared=True)
        await self.fleet.ask("come_back")
        await self.fleet.ask("jitter", least_s=plan.cut_min_s, most_s=plan.cut_max_s, away_s=plan.away_s)
        count = max(1, int(plan.jitter_s * plan.stream_per_s))
        run = await self.expect(count, everybody=plan.clients)
        span = Span(self.server)
        report = await self.server.publish(Load(run, count, plan.stream_per_s, plan.clients, plan.size, True))
        await self.fleet.ask("calm")
        await self.fleet.ask("returned", timeout_s=_RETURN_S)
        got = await self.fleet.ask("collect", not_stored=report["not_stored"], timeout_s=_COLLECT_S)
        self.took("jitter", *_swapped(span, got["received"]))
        self.came("jitter", got)
        # Who has no recovery replays nothing, in no time.
        for name in ("replay_p50_ms", "replay_p99_ms", "p99_ms") if got["replayed"] else ("p99_ms",):
            self.figures[f"jitter_{name}"] = got[name]
        self.figures["jitter_replayed"] = got["replayed"]
        self._say(
            f"jitter: {self.figures['jitter_received_percent']:.2f} % received, {got['replayed']} of it replayed, "
            f"p50 {got['replay_p50_ms']:.0f}, p99 {got['replay_p99_ms']:.0f} ms"
        )

    async def deploy(self) -> None:
        """The server is restarted in the middle of a steady stream to all."""
        plan = self.plan
        await self.connect(0, plan.clients, shared=True)
        await self.fleet.ask("come_back")
        count = max(1, int(plan.deploy_s * plan.stream_per_s))
        run = await self.expect(count, everybody=plan.clients)
        load = Load(run, count, plan.stream_per_s, plan.clients, plan.size, True)
        publishing = asyncio.ensure_future(self.server.publish(load))
        await asyncio.sleep(plan.deploy_s / 4)
        await self.fleet.ask("come_back")
        await self.server.restart()
        report = await publishing
        back = await self.fleet.ask("returned", timeout_s=_RETURN_S)
        got = await self.fleet.ask("collect", not_stored=report["not_stored"], timeout_s=_COLLECT_S)
        # What the publisher could not get rid of while the server was away is lost too: it was to be delivered.
        due = count * plan.clients
        self.figures["deploy_received_percent"] = 100 * got["received"] / due
        self.figures["deploy_twice"] = got["duplicates"]
        self.figures["deploy_back_percent"] = 100 * back["connected"] / plan.clients
        self.figures["deploy_away_p99_s"] = back["away_p99_s"]
        self.figures["deploy_last_s"] = back["last_s"]
        self._say(f"deploy: {self.figures['deploy_received_percent']:.2f} % received, last back {back['last_s']:.1f} s")

    async def storm(self) -> None:
        """All connections are cut, and all devices dial again at once, under a steady stream to all."""
        plan = self.plan
        await self.connect(0, plan.devices, shared=True)
        await self.fleet.ask("come_back")
        count = max(1, int(plan.deploy_s * plan.stream_per_s / 5))
        run = await self.expect(count, everybody=plan.devices)
        load = Load(run, count, plan.stream_per_s / 5, plan.devices, plan.size, True)
        publishing = asyncio.ensure_future(self.server.publish(load))
        await asyncio.sleep(plan.deploy_s / 4)
        await self.fleet.ask("cut_all")
        back = await self.fleet.ask("returned", timeout_s=_RETURN_S)
        report = await publishing
        got = await self.fleet.ask("collect", not_stored=report["not_stored"], timeout_s=_COLLECT_S)
        self.came("storm", got)
        self.figures["storm_back_percent"] = 100 * back["connected"] / plan.devices
        self.figures["storm_away_p99_s"] = back["away_p99_s"]
        self.figures["storm_last_s"] = back["last_s"]
        self._say(f"storm: {self.figures['storm_received_percent']:.2f} % received, last back {back['last_s']:.1f} s")

    async def growth(self) -> None:
        """More and more devices: memory of each further one, and how long a personal notification takes."""
        plan, connected = self.plan, 0
        before = await self.rest()
        for size in plan.growth:
            answer = await self.connect(connected, size - connected, shared=False)
            self.figures[f"growth_connects_per_s@{size}"] = (size - connected) / answer["seconds"]
            before = await self._grown(size, size - connected, before, size)
            connected = size
        real = connected
        for size in plan.simulated:
            if not await self.server.simulate(connected, size - connected):
                break
            before = await self._grown(size, size - connected, before, real)
            connected = size

    async def _grown(self, size: int, fresh: int, before: dict[str, int], real: int) -> dict[str, int]:
        """Measure at this size, with notifications to the `real` devices; the memory then."""
        plan = self.plan
        after = await self.rest()
        grown = sum(after.values()) - sum(before.values())
        self.figures[f"growth_kb@{size}"] = grown / fresh
        span = Span(self.server)
        got = await self.publish(max(1, int(plan.growth_rate * plan.growth_s)), plan.growth_rate, real, shared=False)
        await asyncio.sleep(_TAIL_S)
        used, _ = span.end()
        self.figures[f"growth_us@{size}"] = 1e6 * sum(used.values()) / max(1, got["received"])
        self.figures[f"growth_p99_ms@{size}"] = got["p99_ms"]
        self.figures[f"growth_received_percent@{size}"] = 100 * got["received"] / max(1, got["due"])
        self._say(f"{size} devices: {grown / fresh:.1f} KB each, p99 {got['p99_ms']:.1f} ms")
        return after


def _swapped(span: Span, deliveries: int) -> tuple[dict[str, float], int, float]:
    used, others = span.end()
    return used, deliveries, others


WORKLOADS: Final = ("steady", "jitter", "deploy", "storm", "growth")


@asynccontextmanager
async def trial(name: str, workload: str, plan: Plan, programs: Programs, say: Say) -> AsyncIterator[Trial]:
    """A peer that was just started, and a fleet for it."""
    most = max(plan.growth) if workload == "growth" else plan.devices
    async with running(name, programs, plan.cores, most) as server:
        fleet = await start_worker("peers.fleet", plan.cores.load)
        try:
            await fleet.ask("setup", port=server.port, dialect=server.dialect, key=server.key)
            yield Trial(plan, server, fleet, say)
        finally:
            await fleet.stop()


async def run(name: str, workload: str, plan: Plan, programs: Programs, say: Say) -> dict[str, float]:
    """One workload on one peer, once; its figures."""
    async with trial(name, workload, plan, programs, say) as made:
        await getattr(made, workload)()
        return made.figures
