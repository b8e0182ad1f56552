"""What it costs devices that their gateway leaves: two gateways restarted one after the other, and one killed.

Devices come back as the SDKs do (`bench.returning`), to one of the gateways that a load balancer would choose: those
that are up and not draining. Notifications go to all of them meanwhile; what comes to one that is away waits for it,
so the latencies contain the absences.
"""

from __future__ import annotations

import asyncio
import time
from contextlib import suppress
from dataclasses import dataclass
from typing import Any, Final

from tidings.runtime.settings import Settings

from .host import EVERYWHERE, BenchFailed, Cores, Mesh, running_mesh
from .load import quantile
from .workloads import Counts, Say

__all__ = ["ExodusPlan", "LeavingPlan", "LeavingRepeat", "run_leaving"]

_ONE: Final = "gateway"
_TWO: Final = "gateway-2"
_BACK_S: Final = 120.0
_COLLECT_S: Final = 30.0
_LOOK_S: Final = 0.02
_SETTLE_S: Final = 90.0


@dataclass(frozen=True, slots=True)
class LeavingPlan:
    """How large a benchmark of leaving gateways is."""

    devices: int = 2000
    rate: int = 200
    """Notifications a second, all the time."""
    seconds: float = 40.0
    """Of the load beside the rolling restart, which should be over before."""
    storm_seconds: float = 20.0
    repeats: int = 2
    partitions: int = 64
    size: int = 240
    at_once: int = 64
    between_s: float = 2.0
    """Of calm before a gateway leaves, and after one has come back."""
    ack_wait_s: float = 10.0
    """A consumer that a killed gateway leaves behind with something unacknowledged ends by itself only some of these
    later, and is counted as owing it until then."""
    settle_s: float = 4.0
    cores: Cores = EVERYWHERE


@dataclass(frozen=True, slots=True)
class ExodusPlan(LeavingPlan):
    """More devices than the deadline lets leave at the usual pace."""

    devices: int = 5000
    seconds: float = 60.0
    storm_seconds: float = 30.0


class LeavingRepeat:
    """One mesh through a rolling restart and a reconnect storm."""

    def __init__(self, plan: LeavingPlan, mesh: Mesh, say: Say) -> None:
        self._plan = plan
        self._mesh = mesh
        self._say = say
        self._ports: dict[str, int] = {}
        self.figures: dict[str, float] = {}
        self.counts = Counts()

    async def run(self) -> None:
        plan, mesh = self._plan, self._mesh
        self._ports = {_ONE: mesh.port, _TWO: await mesh.start_gateway(_TWO)}
        await self._balance(_ONE, _TWO)
        await self._connect()
        await self._during("rolling", plan.seconds, self._roll)
        # All of them on one, which dies.
        await self._balance(_ONE)
        await mesh.stop_agent(_TWO)
        self._warned()
        await self._all_back()
        self._ports[_TWO] = await mesh.start_gateway(_TWO)
        await self._balance(_TWO)
        await self._during("storm", plan.storm_seconds, self._kill)
        await mesh.load.ask("leave", first=0, count=plan.devices, at_once=plan.at_once, goodbye=True)

    async def _balance(self, *names: str) -> None:
        await self._mesh.load.ask("move", ports=[self._ports[name] for name in names])

    async def _connect(self) -> None:
        plan = self._plan
        answer = await self._mesh.load.ask("connect", first=0, count=plan.devices, at_once=plan.at_once)
        if answer["connected"] != plan.devices:
            raise BenchFailed(f"{plan.devices - answer['connected']} devices could not connect: {answer['problems']}")
        await asyncio.sleep(plan.settle_s)

    async def _roll(self) -> None:
        """Each gateway is stopped as an operator does it, and started again; then the next one."""
        for name, other in ((_ONE, _TWO), (_TWO, _ONE)):
            await self._balance(other)
            began = time.monotonic()
            await self._mesh.stop_agent(name)
            self._say(f"{name} has left in {time.monotonic() - began:.1f} s")
            self._ports[name] = await self._mesh.start_gateway(name)
            await self._balance(name, other)
            await asyncio.sleep(self._plan.between_s)

    async def _kill(self) -> None:
        await self._mesh.kill_agent(_ONE)

    async def _all_back(self) -> dict[str, Any]:
        got = await self._mesh.load.ask("returned", timeout_s=_BACK_S)
        if got["absent"]:
            self._say(f"{got['absent']} devices are not back after {_BACK_S:g} s")
        return got

    async def _during(self, kind: str, seconds: float, event: Any) -> None:
        """The event under load: what was published came, who left came back."""
        plan, mesh = self._plan, self._mesh
        load = asyncio.ensure_future(
            mesh.publish(
                count=int(plan.rate * seconds), rate=plan.rate, users=range(plan.devices), size=plan.size,
                message_id=True,
            )
        )  # fmt: skip
        await asyncio.sleep(self._plan.between_s)
        queue = asyncio.ensure_future(self._watch_queue(f"{kind}_api_requests"))
        await mesh.load.ask("come_back", at_once=kind == "storm")
        await event()
        back = await self._all_back()
        queue.cancel()
        with suppress(asyncio.CancelledError):
            await queue
        if load.done():
            self._say(f"{kind}: the load was over first: --seconds more")
        report = await load
        got = await mesh.load.ask("collect", not_stored=report["not_stored"], timeout_s=_COLLECT_S)
        self._enter(kind, report, got, back)
        self.counts.unsettled += await mesh.unsettled(_SETTLE_S)

    def _warned(self) -> None:
        for name in self._mesh.servers[1:]:
            lines = [line for line in self._mesh.log_of(name).splitlines() if " WARNING " in line or " ERROR " in line]
            if lines:
                self._say(f"{name} warned {len(lines)} times, such as: {lines[0]}")

    async def _watch_queue(self, name: str) -> None:
        self.figures[name] = 0
        while True:
            self.figures[name] = max(self.figures[name], await self._mesh.api_requests())
            await asyncio.sleep(_LOOK_S)

    def _enter(self, kind: str, report: dict[str, Any], got: dict[str, Any], back: dict[str, Any]) -> None:
        self.counts.add(
            Counts(
                published=report["published"],
                stored=report["stored"],
                received=got["received"],
                lost=got["lost"],
                duplicates=got["duplicates"],
                misled=got["misled"],
                dropped=self._plan.devices - back["connected"],
            )
        )
        figures, away = self.figures, back["away_s"]
        for name, share in (("p50", 0.5), ("p99", 0.99), ("max", 1.0)):
            figures[f"{kind}_away_{name}_s"] = quantile(away, share)
        figures[f"{kind}_last_s"] = back["last_s"]
        figures[f"{kind}_p50_ms"], figures[f"{kind}_p99_ms"] = got["p50_ms"], got["p99_ms"]
        figures[f"{kind}_refused"], figures[f"{kind}_failed"] = back["refused"], back["failed"]
        figures[f"{kind}_copies"] = got["duplicates"]
        self._say(
            f"{kind}: {back['returned']} returns, away p50 {figures[f'{kind}_away_p50_s']:.2f} s, "
            f"p99 {figures[f'{kind}_away_p99_s']:.2f} s, slowest {figures[f'{kind}_away_max_s']:.2f} s, "
            f"{back['refused']} refused, {back['failed']} failed; the last after {back['last_s']:.1f} s; "
            f"latency p50 {got['p50_ms']:.1f} ms, p99 {got['p99_ms']:.0f} ms; lost {got['lost']}, "
            f"copies {got['duplicates']}; API requests at most {figures[f'{kind}_api_requests']:.0f}"
        )
        self._warned()


async def run_leaving(plan: LeavingPlan, say: Say) -> LeavingRepeat:
    """Make a mesh, run everything on it once, and take it down."""
    async with running_mesh(
        plan.partitions,
        plan.cores,
        devices=plan.devices,
        drain_s=Settings().drain_s,
        # What a killed gateway leaves behind must be gone when it is asked who is owed what.
        consumer_idle_s=10,
        ack_wait_s=plan.ack_wait_s,
    ) as mesh:
        repeat = LeavingRepeat(plan, mesh, say)
        await repeat.run()
        return repeat
