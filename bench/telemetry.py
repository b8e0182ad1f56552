"""What telemetry costs: the same load on a mesh without and on one with it, in turn, so that whatever else the machine
does meets both.

On means all of it: metrics scraped, and metrics and spans sent by OTLP, with every hundredth notification traced.
"""

from __future__ import annotations

import asyncio
import re
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass
from statistics import median
from typing import Final

import aiohttp
from aiohttp import web

from .host import Mesh, running_mesh
from .workloads import TAIL_S, Counts, Plan, Repeat, Say, Span

__all__ = ["TelemetryPlan", "TelemetryRepeat", "run_telemetry"]

_SCRAPE_S: Final = 15.0
"""As Prometheus does where nothing else is said; metrics are sent by OTLP as often."""
_AGENTS: Final = ("gateway", "inbox")


@dataclass(frozen=True, slots=True)
class TelemetryPlan(Plan):
    """How large it is: `pairs` loads on each of the two meshes, one after the other."""

    devices: int = 1000
    rate: int = 1500
    seconds: float = 3.0
    repeats: int = 1
    partitions: int = 16
    warm_up_s: float = 1.0
    settle_s: float = 1.0
    pairs: int = 24
    traced_every: int = 100


class TelemetryRepeat:
    """Two meshes, and the pairs of loads."""

    def __init__(self, plan: TelemetryPlan, meshes: dict[str, Mesh], say: Say) -> None:
        self._plan = plan
        self._say = say
        self._meshes = meshes
        self._loads = {name: _Load(plan, mesh, say) for name, mesh in meshes.items()}
        self.figures: dict[str, float] = {}

    @property
    def counts(self) -> Counts:
        """Of both."""
        both = Counts()
        for load in self._loads.values():
            both.add(load.counts)
        return both

    async def run(self) -> None:
        for load in self._loads.values():
            await load.prepare()
        costs: dict[str, list[dict[str, float]]] = {name: [] for name in self._loads}
        for number in range(self._plan.pairs):
            # Each is as often the second one as the first.
            for name in list(self._loads)[:: 1 if number % 2 else -1]:
                costs[name].append(await self._loads[name].measure())
            last = {name: found[-1] for name, found in costs.items()}
            self._say(f"pair {number + 1}: gateway {last['off']['gateway']:.1f} µs off, {last['on']['gateway']:.1f} on")
        for load in self._loads.values():
            await load.settle()
        for what in (*_AGENTS, "both"):
            pairs = list(zip(costs["off"], costs["on"], strict=True))
            self.figures[f"{what}_off_us"] = median(off[what] for off, _ in pairs)
            self.figures[f"{what}_on_us"] = median(on[what] for _, on in pairs)
            self.figures[f"{what}_ratio"] = median(on[what] / off[what] for off, on in pairs)


class _Load(Repeat):
    """The load on one of the two."""

    async def prepare(self) -> None:
        await self._warm_up()
        await self._welcomed(range(self._plan.devices))

    async def measure(self) -> dict[str, float]:
        """CPU of each agent, and of both, in µs a delivery."""
        plan, users = self._plan, range(self._plan.devices)
        await self._publish(plan.rate, plan.warm_up_s, users)
        span = Span(self._mesh)
        report, _ = await self._publish(plan.rate, plan.seconds, users)
        await asyncio.sleep(TAIL_S)
        used, _ = span.end()
        cost = {name: 1e6 * used[name] / max(1, report["stored"]) for name in _AGENTS}
        return {**cost, "both": sum(cost.values())}

    async def settle(self) -> None:
        self.counts.unsettled += await self._mesh.unsettled()


@asynccontextmanager
async def _collector() -> AsyncIterator[str]:
    """Takes what is sent by OTLP, and forgets it; its address."""

    async def take(request: web.Request) -> web.Response:
        await request.read()
        return web.Response()

    app = web.Application()
    app.router.add_post("/v1/{kind}", take)
    runner = web.AppRunner(app, access_log=None)
    await runner.setup()
    try:
        await web.TCPSite(runner, "127.0.0.1", 0).start()
        yield f"http://127.0.0.1:{runner.addresses[0][1]}"
    finally:
        await runner.cleanup()


async def _scrape(mesh: Mesh) -> None:
    """As Prometheus does, for as long as it is not cancelled."""
    found = [re.search(r"metrics are at (\S+)", mesh.log_of(name)) for name in _AGENTS]
    async with aiohttp.ClientSession(raise_for_status=True) as http:
        while True:
            for address in found:
                assert address is not None, "an agent serves no metrics"
                async with http.get(f"http://{address[1]}") as answer:
                    await answer.read()
            await asyncio.sleep(_SCRAPE_S)


async def run_telemetry(plan: TelemetryPlan, say: Say) -> TelemetryRepeat:
    """Make both meshes, load them in turn, and take them down."""
    async with _collector() as collector:
        on = {"telemetry": "on", "metrics_port": 0, "otlp_endpoint": collector}
        async with (
            running_mesh(plan.partitions, plan.cores, devices=plan.devices) as without,
            running_mesh(plan.partitions, plan.cores, devices=plan.devices, **on) as watched,
        ):
            scraping = asyncio.ensure_future(_scrape(watched))
            try:
                repeat = TelemetryRepeat(plan, {"off": without, "on": watched}, say)
                await repeat.run()
            finally:
                scraping.cancel()
                await asyncio.wait([scraping])
            return repeat
