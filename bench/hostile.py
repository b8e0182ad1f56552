"""What hostile clients cost the others: the same load without and with each kind of them, one after the other."""

from __future__ import annotations

from dataclasses import dataclass

from .host import Mesh, running_mesh
from .mallory import KINDS
from .workloads import TAIL_S, Plan, Repeat, Say, Span

__all__ = ["HostilePlan", "HostileRepeat", "run_hostile"]


@dataclass(frozen=True, slots=True)
class HostilePlan(Plan):
    """How large it is: `devices` good ones, `hostile` others of each kind."""

    devices: int = 1000
    rate: int = 500
    seconds: float = 8.0
    repeats: int = 1
    partitions: int = 16
    warm_up_s: float = 1.0
    settle_s: float = 2.0
    hostile: int = 100


class HostileRepeat(Repeat):
    """One mesh, and each kind of hostile client on it."""

    def __init__(self, plan: HostilePlan, mesh: Mesh, say: Say) -> None:
        super().__init__(plan, mesh, say)
        self._hostile = plan.hostile

    async def run(self) -> None:
        await self._warm_up()
        await self._welcomed(range(self._plan.devices))
        gang = await self._mesh.start_hostile()
        for kind in KINDS:
            without = await self._steady(f"{kind}_without")
            await gang.ask("attack", kind=kind, count=self._hostile)
            under_attack = await self._steady(kind)
            self.figures[f"{kind}_connections"] = (await gang.ask("stop"))["connections"]
            self.figures[f"{kind}_ratio"] = under_attack / without
        self.counts.unsettled += await self._mesh.unsettled()

    async def _steady(self, name: str) -> float:
        """The load, after a second that does not count; its p99 in milliseconds."""
        plan, users = self._plan, range(self._plan.devices)
        await self._publish(plan.rate, plan.warm_up_s, users)
        span = Span(self._mesh)
        report, got = await self._publish(plan.rate, plan.seconds, users)
        used, others = span.end()
        for figure in ("p50_ms", "p99_ms", "max_ms"):
            self.figures[f"{name}_{figure}"] = got[figure]
        seconds = report["seconds"] + TAIL_S
        self.figures[f"{name}_gateway_percent"] = 100 * used["gateway"] / seconds
        self.figures[f"{name}_others_percent"] = others
        self._say(
            f"{name}: p50 {got['p50_ms']:.1f} ms, p99 {got['p99_ms']:.1f} ms, {got['dropped']} dropped; "
            f"of the core the gateway had {self.figures[f'{name}_gateway_percent']:.0f} %, others {others:.0f} %"
        )
        return max(1e-3, float(got["p99_ms"]))


async def run_hostile(plan: HostilePlan, say: Say) -> HostileRepeat:
    """Make a mesh, run everything on it once, and take it down."""
    async with running_mesh(plan.partitions, plan.cores, devices=plan.devices) as mesh:
        repeat = HostileRepeat(plan, mesh, say)
        await repeat.run()
        return repeat
