"""What topics cost: a broadcast to all devices of a gateway, one that nobody there follows, copies to each subscriber.

A broadcast is measured twice, without an ack and with one for each, because a device may acknowledge many at once. What
the kernel takes for a write alone is measured beside it, in the same run (`bench.bare`).
"""

from __future__ import annotations

import asyncio
import signal
import time
from dataclasses import dataclass
from datetime import datetime
from statistics import median
from typing import Any, Final, NamedTuple

from tidings.runtime.settings import Settings
from tidings.stream.topology import DECISIONS, notify_stream
from tidings.wire import frames, subject
from tidings.wire.notification import build

from .host import EVERYWHERE, BenchFailed, Cores, Followers, Mesh, Worker, running_mesh
from .publisher import user_of
from .waiting import until
from .workloads import TAIL_S, Counts, Say, Span

__all__ = ["CrowdPlan", "TopicPlan", "TopicRepeat", "run_topics"]

_ALL: Final = "bench.all"
"""What every device follows."""
_NOBODYS: Final = "bench.nobodys"
_COPIED: Final = "bench.copied"
_SINGLE: Final = "bench.single"
_COLLECT_S: Final = 30.0
_PROFILE_S: Final = 10.0
_STORE_S: Final = 30.0
_LOOK_S: Final = 0.25
_WARM_UP: Final = 3


@dataclass(frozen=True, slots=True)
class TopicPlan:
    """How large a benchmark of topics is."""

    devices: int = 5000
    """All of them on one gateway, and following one topic."""
    broadcasts: int = 20
    """Of each load; fewer than a window takes, because some loads acknowledge none before the end."""
    every_s: float = 0.5
    repeats: int = 3
    partitions: int = 64
    size: int = 240
    """Bytes of a notification's body."""
    at_once: int = 64
    """Connections under way at a time."""
    listeners: int = 100
    """Further devices, of a load client of their own, that get personal notifications and no broadcasts."""
    rate: int = 200
    """Personal notifications a second."""
    ignored: int = 4000
    """Broadcasts to a topic that nobody follows; a fourth as many to topics of which each is a new one."""
    ignored_rate: int = 1000
    copies: int = 1000
    """Subscribers who get a copy each; none of them is connected."""
    copied: int = 10
    """Messages to them."""
    singles: int = 20
    """Messages to the topic with one subscriber, one after the other; ten times as many for the CPU."""
    single_rate: int = 100
    settle_s: float = 4.0
    cores: Cores = EVERYWHERE

    def followers(self) -> Followers:
        """Who follows what. A topic with few devices has absent subscribers too: as many as a broadcast needs."""
        absent = Settings().fanout_write_max + 1 - self.devices
        return {
            _ALL: [*map(user_of, range(self.devices)), *(f"absent-{number}" for number in range(absent))],
            _COPIED: [f"copied-{number}" for number in range(self.copies)],
            _SINGLE: ["single"],
        }


@dataclass(frozen=True, slots=True)
class CrowdPlan(TopicPlan):
    """As many devices as one gateway is meant for."""

    devices: int = 15_000
    broadcasts: int = 10
    every_s: float = 2.0
    repeats: int = 2


class _Log(NamedTuple):
    """What the streams say of themselves: times are Unix nanoseconds by the server's clock, which is ours too."""

    copies: int
    """Messages in all NOTIFY streams."""
    last_copy_ns: int
    decision_ns: int


class TopicRepeat:
    """One mesh through all loads of topics."""

    def __init__(self, plan: TopicPlan, mesh: Mesh, say: Say) -> None:
        self._plan = plan
        self._mesh = mesh
        self._say = say
        self._sent = 0
        self.figures: dict[str, float] = {}
        self.counts = Counts()

    async def run(self) -> None:
        plan = self._plan
        # Before anybody is connected: a server with idle consumers has work of its own.
        await self._copies()
        await self._singles()
        await self._connect(self._mesh.load, range(plan.devices))
        writer = await self._bare()
        await asyncio.sleep(plan.settle_s)
        await self._broadcast("warm", _WARM_UP, acking=True)
        bare = [await self._bare_us(writer)]
        await self._broadcast("broadcast", plan.broadcasts, acking=False)
        await self._acknowledge()
        await self._broadcast("acked", plan.broadcasts, acking=True)
        bare.append(await self._bare_us(writer))
        self.figures["bare_us"] = sum(bare) / len(bare)
        self.figures["broadcast_ratio"] = self.figures["broadcast_gateway_us"] / self.figures["bare_us"]
        self._say(f"a bare write: {bare[0]:.1f} µs before and {bare[1]:.1f} after")
        await self._personal()
        await self._ignored("irrelevant", subject.broadcast(_NOBODYS), plan.ignored, plan.ignored_rate)
        await self._ignored("fresh", f"{subject.broadcast(_NOBODYS)}.*", plan.ignored // 4, plan.ignored_rate / 4)
        self.counts.unsettled += await self._mesh.unsettled()

    async def profile(self, name: str) -> int:
        """The load that shows most of this agent with the profiler on; returns how many deliveries or copies."""
        plan = self._plan
        if name == "fanout":
            self._mesh.tell(name, signal.SIGUSR1)
            await self._copies()
        else:
            await self._connect(self._mesh.load, range(plan.devices))
            await asyncio.sleep(plan.settle_s)
            await self._broadcast("warm", _WARM_UP, acking=True)
            self._mesh.tell(name, signal.SIGUSR1)
            await self._broadcast("acked", plan.broadcasts, acking=True)
        self._mesh.tell(name, signal.SIGUSR2)
        await until(self._mesh.profile_of(name).exists, _PROFILE_S)
        return plan.copied * plan.copies if name == "fanout" else plan.broadcasts * plan.devices

    async def _connect(self, load: Worker, users: range) -> None:
        answer = await load.ask("connect", first=users.start, count=len(users), at_once=self._plan.at_once)
        if answer["connected"] != len(users):
            raise BenchFailed(
                f"{len(users) - answer['connected']} of {len(users)} devices could not connect: "
                f"{'; '.join(answer['problems'])}"
            )

    # The yardstick

    async def _bare(self) -> Worker:
        """As many sockets as devices, with somebody at the other end who reads."""
        writer = await self._mesh.start_bare()
        port = (await writer.ask("open"))["port"]
        reader = await self._mesh.start_load()
        await reader.ask("listen", port=port, count=self._plan.devices)
        return writer

    async def _bare_us(self, writer: Worker) -> float:
        plan = self._plan
        frame = frames.notifications([frames.notification_item("b19ab5f1c3a8.12", 1, b"x" * plan.size)])
        answer = await writer.ask("write", size=len(frame), rounds=plan.broadcasts, every_s=plan.every_s)
        written: float = answer["us"]
        return written

    # Broadcasts

    async def _broadcast(self, kind: str, count: int, *, acking: bool) -> None:
        """Through the fan-out agent to all devices; CPU from the first publish to the last trace of it."""
        plan = self._plan
        # A load client that has just told us its CPU time has nothing else to do.
        before = await self._mesh.load.ask("acknowledge")
        span = Span(self._mesh)
        report, got = await self._publish_shared(count, acking=acking)
        await asyncio.sleep(TAIL_S)
        used, others = span.end()
        deliveries = max(1, got["received"])
        for name, value in used.items():
            self.figures[f"{kind}_{name}_us"] = 1e6 * value / deliveries
        self.figures[f"{kind}_client_us"] = 1e6 * (got["cpu_s"] - before["cpu_s"]) / deliveries
        self.figures[f"{kind}_others_percent"] = others
        last_ms = got["last_ms"] or [0.0]
        self.figures[f"{kind}_last_p50_ms"], self.figures[f"{kind}_last_max_ms"] = median(last_ms), max(last_ms)
        self._say(
            f"{kind}: {count} to {plan.devices}, {1e6 * used['gateway'] / deliveries:.1f} µs a delivery, last device "
            f"after {median(last_ms):.0f} ms (at most {max(last_ms):.0f}), {got['lost']} lost, "
            f"{got['repeated']} repeated"
        )
        if report["late_ms"] > 1000 * plan.every_s:
            self._say(f"the publisher was {report['late_ms']:.0f} ms late: broadcasts came two at a time")

    async def _publish_shared(self, count: int, *, acking: bool) -> tuple[dict[str, Any], dict[str, Any]]:
        plan = self._plan
        report = await self._mesh.publish_to(
            subject.notify_topic(_ALL),
            count=count,
            rate=1 / plan.every_s,
            size=plan.size,
            devices=plan.devices,
            acking=acking,
        )
        got = await self._mesh.load.ask("collect_shared", not_stored=report["not_stored"], timeout_s=_COLLECT_S)
        self._count(report, got, plan.devices)
        return report, got

    async def _acknowledge(self) -> None:
        """Every device acknowledges all that it got, at once."""
        span = Span(self._mesh)
        answer = await self._mesh.load.ask("acknowledge")
        await asyncio.sleep(2 * TAIL_S)
        used, _ = span.end()
        self.figures["upto_gateway_us"] = 1e6 * used["gateway"] / max(1, answer["told"])

    async def _personal(self) -> None:
        """A slow stream to devices that get no broadcast: alone, then with broadcasts beside it."""
        plan = self._plan
        listeners, users = await self._mesh.start_load(), range(plan.devices, plan.devices + plan.listeners)
        await self._connect(listeners, users)
        await asyncio.sleep(plan.settle_s)
        await self._listen(listeners, users, "before")
        async with asyncio.TaskGroup() as both:
            both.create_task(self._publish_shared(plan.broadcasts, acking=True))
            await self._listen(listeners, users, "during")

    async def _listen(self, listeners: Worker, users: range, kind: str) -> None:
        plan = self._plan
        count = max(1, int(plan.broadcasts * plan.every_s * plan.rate))
        report = await self._mesh.publish(
            count=count, rate=plan.rate, users=users, size=plan.size, message_id=True, to=listeners
        )
        got = await listeners.ask("collect", not_stored=report["not_stored"], timeout_s=_COLLECT_S)
        self._count(report, got, 1)
        for name in ("p50_ms", "p99_ms"):
            self.figures[f"{kind}_{name}"] = got[name]
        self._say(f"personal, {kind}: p50 {got['p50_ms']:.1f} ms, p99 {got['p99_ms']:.1f}, slowest {got['max_ms']:.1f}")

    async def _ignored(self, kind: str, where: str, count: int, rate: float) -> None:
        """Straight into the stream: the gateway reads it, and has nobody to give it to."""
        span = Span(self._mesh)
        report = await self._mesh.publish_to(
            where, count=count, rate=rate, size=self._plan.size, devices=0, acking=True
        )
        await asyncio.sleep(TAIL_S)
        used, _ = span.end()
        got = await self._mesh.load.ask("collect_shared", not_stored=report["not_stored"], timeout_s=_COLLECT_S)
        self._count(report, got, 0)
        self.figures[f"{kind}_gateway_us"] = 1e6 * used["gateway"] / max(1, report["stored"])
        self._say(f"{kind}: {self.figures[f'{kind}_gateway_us']:.0f} µs each")

    def _count(self, report: dict[str, Any], got: dict[str, Any], devices: int) -> None:
        """`devices`: to how many each of what was published goes."""
        if report["refused"]:
            self._say(f"{report['refused']} were refused, the first with {report['first_refusal']}")
        self.counts.add(
            Counts(
                published=report["published"] * devices,
                stored=report["stored"] * devices,
                received=got["received"],
                lost=got["lost"],
                duplicates=got["duplicates"],
                misled=got["misled"],
                dropped=got["dropped"],
            )
        )

    # Copies

    async def _copies(self) -> None:
        """A message for each subscriber, to nobody who is connected."""
        plan = self._plan
        # What a process does for the first time is not measured.
        await self._copied(_COPIED, plan.copies)
        span = Span(self._mesh)
        took = [(await self._copied(_COPIED, plan.copies))[0] for _ in range(plan.copied)]
        used, _ = span.end()
        for name, value in used.items():
            self.figures[f"copies_{name}_us"] = 1e6 * value / (plan.copied * plan.copies)
        self.figures["copies_p50_ms"], self.figures["copies_max_ms"] = median(took), max(took)
        self._say(
            f"{plan.copies} copies: {median(took):.0f} ms (at most {max(took):.0f}), fan-out "
            f"{self.figures['copies_fanout_us']:.0f} µs a copy, nats-server {self.figures['copies_nats_us']:.0f}"
        )

    async def _singles(self) -> None:
        """What is there with the first copy already: the decision, and the way through the agent."""
        plan = self._plan
        took = [await self._copied(_SINGLE, 1) for _ in range(plan.singles)]
        self.figures["single_p50_ms"] = median(whole for whole, _ in took)
        self.figures["single_decision_ms"] = median(decided for _, decided in took)
        count, before = 10 * plan.singles, await self._log()
        span = Span(self._mesh)
        await self._mesh.publish_to(
            subject.notify_topic(_SINGLE), count=count, rate=plan.single_rate, size=plan.size, devices=0, acking=True
        )
        await self._stored(before.copies + count)
        used, _ = span.end()
        for name, value in used.items():
            self.figures[f"single_{name}_us"] = 1e6 * value / count
        self._say(
            f"one subscriber: {self.figures['single_p50_ms']:.2f} ms, of that after the decision "
            f"{self.figures['single_decision_ms']:.2f}; fan-out {self.figures['single_fanout_us']:.0f} µs a message"
        )

    async def _copied(self, topic: str, copies: int) -> tuple[float, float]:
        """Publish one message; ms until its last copy was stored, and from its decision to that."""
        self._sent += 1
        before = await self._log()
        data = {"number": self._sent, "fill": "x" * self._plan.size}
        id, body = build(type="bench.made", data=data, id=f"copied-{self._sent}", topic=topic)
        began = time.time_ns()
        await self._mesh.connection.store(subject.notify_topic(topic), body, {"Nats-Msg-Id": id})
        log = await self._stored(before.copies + copies)
        return (log.last_copy_ns - began) / 1e6, (log.last_copy_ns - log.decision_ns) / 1e6

    async def _stored(self, copies: int) -> _Log:
        """Wait until so many are in the log, looking rarely: whoever asks costs the server something."""
        deadline = time.monotonic() + _STORE_S
        while time.monotonic() < deadline:
            await asyncio.sleep(_LOOK_S)
            log = await self._log()
            if log.copies >= copies:
                return log
        raise BenchFailed(f"{copies - log.copies} copies were not stored within {_STORE_S:g} s")

    async def _log(self) -> _Log:
        states: dict[str, Any] = {}
        total = 1
        while len(states) < total:
            answer = await self._mesh.connection.api("STREAM.LIST", {"offset": len(states)})
            states.update((info["config"]["name"], info["state"]) for info in answer["streams"])
            total = answer["total"]
        personal = [states[notify_stream(number)] for number in range(self._plan.partitions)]
        return _Log(
            sum(state["messages"] for state in personal),
            max(_ns(state["last_ts"]) for state in personal),
            _ns(states[DECISIONS]["last_ts"]),
        )


def _ns(text: str) -> int:
    """RFC 3339 with up to nine digits of a second, which `datetime` does not read."""
    whole, _, fraction = text.removesuffix("Z").partition(".")
    return int(datetime.fromisoformat(f"{whole}+00:00").timestamp()) * 1_000_000_000 + int(fraction.ljust(9, "0"))


async def run_topics(plan: TopicPlan, say: Say) -> TopicRepeat:
    """Make a mesh, run everything on it once, and take it down."""
    followers = plan.followers()
    async with running_mesh(plan.partitions, plan.cores, devices=plan.devices, followers=followers) as mesh:
        repeat = TopicRepeat(plan, mesh, say)
        await repeat.run()
        return repeat
