"""What is done to the system under test, and what of it becomes a figure.

One repeat is one mesh, made anew: a process that was measured before has memory to spare and caches that are warm.
"""

from __future__ import annotations

import asyncio
import signal
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Final

from .host import EVERYWHERE, BenchFailed, Cores, Mesh, running_mesh
from .waiting import until

__all__ = ["TAIL_S", "Counts", "Plan", "Repeat", "Say", "Span", "run_repeat"]

_COLLECT_S: Final = 15.0
_DISTURBED_PERCENT: Final = 5.0
TAIL_S: Final = 0.5
"""After the last notification came: its ack, its row and what follows from them still cost CPU."""
_SHORT: Final = {"nats-server": "nats", "gateway": "gateway", "inbox": "inbox", "fanout": "fanout"}
_PROFILE_S: Final = 10.0

Say = Callable[[str], None]


@dataclass(frozen=True, slots=True)
class Plan:
    """How large a benchmark is."""

    devices: int = 5000
    rate: int = 2000
    """Notifications a second at full load; half load is half of it."""
    seconds: float = 20.0
    """Of each measured load."""
    repeats: int = 3
    partitions: int = 64
    size: int = 240
    """Bytes of a notification's body."""
    message_id: bool = True
    traced_every: int = 0
    """Of so many notifications one is traced; 0 for none."""
    at_once: int = 64
    """Connections under way at a time."""
    warm_up: int = 100
    """Devices that connect before anything is measured, so that code and pools are loaded."""
    warm_up_s: float = 3.0
    """Unmeasured load before each measured one."""
    settle_s: float = 8.0
    """Rest before memory is read: more than two rounds of cursor writes."""
    cores: Cores = EVERYWHERE


@dataclass(slots=True)
class Counts:
    """Summed over all loads of all repeats, warm-ups included."""

    published: int = 0
    stored: int = 0
    """Confirmed by JetStream."""
    received: int = 0
    lost: int = 0
    """Stored, and never at the device."""
    duplicates: int = 0
    misled: int = 0
    """At another device than the one they were for."""
    unsettled: int = 0
    """At the end not acknowledged to the server, by a device or by the inbox agent."""
    dropped: int = 0
    """Connections that ended although nobody wanted it."""

    def add(self, other: Counts) -> None:
        for name in self.__slots__:
            setattr(self, name, getattr(self, name) + getattr(other, name))

    @property
    def whole(self) -> bool:
        """Nothing was lost."""
        return not (self.lost or self.misled or self.unsettled)


class Span:
    """From here to `end`: what the servers used meanwhile."""

    def __init__(self, mesh: Mesh) -> None:
        self._mesh = mesh
        self._cpu, self._idle, self._start = mesh.cpu(), mesh.idle(), time.monotonic()

    def end(self) -> tuple[dict[str, float], float]:
        """CPU seconds of each server; and the share of their core that somebody else had, in per cent."""
        now, idle, seconds = self._mesh.cpu(), self._mesh.idle() - self._idle, time.monotonic() - self._start
        used = {_SHORT[name]: now[name] - self._cpu[name] for name in self._mesh.servers}
        others = max(0.0, seconds - idle - sum(used.values())) if self._mesh.pinned else 0.0
        return used, 100 * others / seconds


class Repeat:
    """One mesh through all workloads."""

    def __init__(self, plan: Plan, mesh: Mesh, say: Say) -> None:
        self._plan = plan
        self._mesh = mesh
        self._say = say
        self.figures: dict[str, float] = {}
        self.counts = Counts()

    async def run(self) -> None:
        plan = self._plan
        await self._warm_up()
        before = await self._rest()
        await self._connect("cold")
        after = await self._rest()
        for name in ("gateway", "nats-server"):
            self.figures[f"{_SHORT[name]}_kb_per_device"] = (after[name] - before[name]) / plan.devices
        await self._idle()
        await self._load("full", plan.rate)
        await self._load("half", plan.rate / 2)
        loaded = await self._rest()
        self.figures["gateway_kb_per_device_after_load"] = (loaded["gateway"] - before["gateway"]) / plan.devices
        await self._leave(goodbye=True)
        await self._connect("known")
        await self._leave(goodbye=False)
        await self._connect("takeover")

    async def profile(self, name: str) -> int:
        """Full load with the profiler on; returns how many notifications."""
        plan = self._plan
        await self._warm_up()
        await self._connect("cold")
        await self._rest()
        await self._load("full", plan.rate)
        self._mesh.tell(name, signal.SIGUSR1)
        await self._load("profiled", plan.rate)
        self._mesh.tell(name, signal.SIGUSR2)
        await until(self._mesh.profile_of(name).exists, _PROFILE_S)
        return int(plan.rate * (plan.seconds + plan.warm_up_s))

    async def _warm_up(self) -> None:
        """Devices past those that are measured, which come and go, and a little load in between."""
        plan = self._plan
        users = range(plan.devices, plan.devices + plan.warm_up)
        await self._welcomed(users)
        await self._publish(plan.rate, plan.warm_up_s, users)
        await self._mesh.load.ask("leave", first=users.start, count=len(users), at_once=plan.at_once, goodbye=True)

    async def _rest(self) -> dict[str, int]:
        """Let everything come to rest; memory then, in KB."""
        await asyncio.sleep(self._plan.settle_s)
        return {name: used.pss for name, used in self._mesh.memory().items()}

    async def _idle(self) -> None:
        """CPU of devices that only are there, in per cent of a core."""
        span = Span(self._mesh)
        await asyncio.sleep(self._plan.settle_s)
        used, _ = span.end()
        for name, value in used.items():
            self.figures[f"idle_{name}_percent"] = 100 * value / self._plan.settle_s

    async def _connect(self, kind: str) -> None:
        """All devices, `at_once` of them under way at a time."""
        span = Span(self._mesh)
        answer = await self._welcomed(range(self._plan.devices))
        # Taken at once: writing the cursors comes later and costs little a device.
        used, self.figures[f"{kind}_others_percent"] = span.end()
        count = self._plan.devices
        self.figures[f"{kind}_per_s"] = count / answer["seconds"]
        for name, value in used.items():
            self.figures[f"{kind}_{name}_us"] = 1e6 * value / count
        self.figures[f"{kind}_p99_ms"] = answer["p99_ms"]
        self._say(f"{kind}: {self.figures[f'{kind}_per_s']:.0f} connects a second, {_listed(used, count)} µs each")

    async def _welcomed(self, users: range) -> dict[str, Any]:
        answer = await self._mesh.load.ask("connect", first=users.start, count=len(users), at_once=self._plan.at_once)
        if answer["connected"] != len(users):
            raise BenchFailed(
                f"{len(users) - answer['connected']} of {len(users)} devices could not connect: "
                f"{'; '.join(answer['problems'])}"
            )
        return answer

    async def _leave(self, *, goodbye: bool) -> None:
        plan = self._plan
        await self._mesh.load.ask("leave", first=0, count=plan.devices, at_once=plan.at_once, goodbye=goodbye)
        await asyncio.sleep(plan.settle_s / 2)

    async def _load(self, kind: str, rate: float) -> None:
        """Notifications to all devices at a steady rate; CPU from the first publish to the last trace of it."""
        plan, users = self._plan, range(self._plan.devices)
        _, warm = await self._publish(rate, plan.warm_up_s, users)
        span = Span(self._mesh)
        report, got = await self._publish(rate, plan.seconds, users)
        await asyncio.sleep(TAIL_S)
        used, others = span.end()
        self.figures[f"{kind}_others_percent"] = others
        count = max(1, report["stored"])
        self.counts.unsettled += await self._mesh.unsettled()
        each = {name: 1e6 * value / count for name, value in used.items()}
        for name, value in each.items():
            self.figures[f"{kind}_{name}_us"] = value
        self.figures[f"{kind}_all_us"] = sum(each.values())
        self.figures[f"{kind}_rate"] = report["published"] / report["seconds"]
        for name in ("p50_ms", "p99_ms", "max_ms"):
            self.figures[f"{kind}_{name}"] = got[name]
        self.figures[f"{kind}_client_us"] = 1e6 * (got["cpu_s"] - warm["cpu_s"]) / count
        self.figures[f"{kind}_publisher_us"] = 1e6 * report["cpu_s"] / count
        self.figures[f"{kind}_publisher_late_ms"] = report["late_ms"]
        self._say(
            f"{kind}: {self.figures[f'{kind}_rate']:.0f} a second, {_listed(used, count)} µs each, "
            f"p50 {got['p50_ms']:.1f} ms, p99 {got['p99_ms']:.1f} ms, {got['lost']} lost"
        )
        if others > _DISTURBED_PERCENT:
            self._say(f"others used {others:.0f} % of the servers' core meanwhile: latencies are too high")

    async def _publish(self, rate: float, seconds: float, users: range) -> tuple[dict[str, Any], dict[str, Any]]:
        """Publish, wait until all has come, and enter it in the counts; the two reports."""
        plan = self._plan
        report = await self._mesh.publish(
            count=max(1, int(rate * seconds)),
            rate=rate,
            users=users,
            size=plan.size,
            message_id=plan.message_id,
            traced_every=plan.traced_every,
        )
        if report["refused"]:
            self._say(f"{report['refused']} were refused, the first with {report['first_refusal']}")
        got = await self._mesh.load.ask("collect", not_stored=report["not_stored"], timeout_s=_COLLECT_S)
        self.counts.add(
            Counts(
                published=report["published"],
                stored=report["stored"],
                received=got["received"],
                lost=got["lost"],
                duplicates=got["duplicates"],
                misled=got["misled"],
                dropped=got["dropped"],
            )
        )
        return report, got


def _listed(used: dict[str, float], count: int) -> str:
    return ", ".join(f"{name} {1e6 * value / count:.0f}" for name, value in used.items())


async def run_repeat(plan: Plan, say: Say) -> Repeat:
    """Make a mesh, run everything on it once, and take it down."""
    async with running_mesh(plan.partitions, plan.cores, devices=plan.devices) as mesh:
        repeat = Repeat(plan, mesh, say)
        await repeat.run()
        return repeat
