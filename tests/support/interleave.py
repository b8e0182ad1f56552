"""Interleavings of the real gateway and inbox agents, one step at a time.

A loop without a clock, an in-memory log and store in which every await is a step of its own, the actors around
them, and a search through all orders of steps.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections import Counter, deque
from collections.abc import Callable, Hashable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from contextvars import Context
from dataclasses import dataclass, field
from functools import cache
from types import SimpleNamespace
from typing import Any, Final, NamedTuple

import orjson
import pytest

from tidings.gateway.authenticator import Authenticator
from tidings.gateway.door import Door
from tidings.gateway.hub import Hub
from tidings.gateway.keeper import Keeper
from tidings.gateway.opening import Opener
from tidings.gateway.requests import Requests
from tidings.identity import Device as DeviceToken
from tidings.identity.entitlement import TopicEntitlement
from tidings.inbox import agent as inbox_module
from tidings.inbox.agent import InboxAgent
from tidings.runtime.settings import Settings
from tidings.store.port import Claimed, Cursor, CursorUpdate, Holder, InboxItem, InboxRow, Lost, Subscription
from tidings.stream.topology import BROADCAST, Topology
from tidings.wire.errors import StoreUnavailable, StreamUnavailable
from tidings.wire.position import Position

INCARNATION: Final = 1
USER: Final = "alice"
DEVICE: Final = "phone"
TOKEN: Final = DeviceToken(USER, None, 2**40, None)
KEY: Final = "a-key-for-tests-and-nothing-else-0123456789"
FLOOR_INTERVAL_S: Final = 60.0

Step = Callable[[], object]


class SteppedLoop(asyncio.AbstractEventLoop):
    """Runs what is ready when it is told to, in order; time stands still until a timer is fired by hand."""

    def __init__(self) -> None:
        self.now = 1000.0
        self._timers: list[tuple[float, asyncio.TimerHandle]] = []
        self.errors: list[dict[str, Any]] = []
        self.tasks: list[asyncio.Task[Any]] = []
        self._ready: deque[asyncio.Handle] = deque()

    def run(self, action: Callable[[], object]) -> None:
        """Do `action`, then run until everything waits for something that is not there."""
        asyncio._set_running_loop(self)
        try:
            action()
            while self._ready:
                handle = self._ready.popleft()
                if not handle.cancelled():
                    handle._run()
        finally:
            asyncio._set_running_loop(None)

    def waiting(self) -> list[tuple[float, asyncio.TimerHandle]]:
        """The timers that may fire, with the delay that was asked for, oldest first."""
        self._timers = [(delay, timer) for delay, timer in self._timers if not timer.cancelled()]
        return self._timers

    def fire(self, timer: asyncio.TimerHandle, passed: float) -> None:
        """Let time pass, and this timer end."""
        self._timers = [entry for entry in self._timers if entry[1] is not timer]
        self.now += passed
        timer._run()

    def finish(self) -> None:
        """Cancel whatever is left."""
        self.run(lambda: [task.cancel() for task in self.tasks])

    # What asyncio asks of a loop

    def call_soon(self, callback: Any, *args: Any, context: Context | None = None) -> asyncio.Handle:
        handle = asyncio.Handle(callback, args, self, context)
        self._ready.append(handle)
        return handle

    def call_later(
        self, delay: float, callback: Any, *args: Any, context: Context | None = None
    ) -> asyncio.TimerHandle:
        return self.call_at(self.now + delay, callback, *args, context=context)

    def call_at(self, when: float, callback: Any, *args: Any, context: Context | None = None) -> asyncio.TimerHandle:
        timer = asyncio.TimerHandle(when, callback, args, self, context)
        self._timers.append((when - self.now, timer))
        return timer

    def time(self) -> float:
        return self.now

    def create_future(self) -> asyncio.Future[Any]:
        return asyncio.Future(loop=self)

    def create_task(self, coro: Any, **options: Any) -> asyncio.Task[Any]:
        task = asyncio.Task(coro, loop=self, **options)
        self.tasks.append(task)
        return task

    def get_debug(self) -> bool:
        return False

    def is_running(self) -> bool:
        return True

    def is_closed(self) -> bool:
        return False

    def call_exception_handler(self, context: dict[str, Any]) -> None:
        self.errors.append(context)

    def _timer_handle_cancelled(self, handle: asyncio.TimerHandle) -> None:
        """A cancelled timer is left out by `waiting`."""


@dataclass(frozen=True)
class Scene:
    """What there is, and how often each thing may happen."""

    messages: int
    published: int = 0
    """How many of them are in the log from the beginning."""
    stored: int = 0
    """How many of those the inbox has from the beginning."""
    heard: int = 0
    """The floor that the gateway has heard of from the beginning."""
    agents: int = 1
    announcements: int = 1
    """How often the floors may be announced; each agent does it once in any case."""
    others: frozenset[int] = frozenset()
    """Sequences that are another user's."""
    known: bool = True
    """The device was here before, with `cursor` and holes in `acked`; otherwise it is new."""
    cursor: int = 0
    acked: frozenset[int] = frozenset()
    window: int = 8
    cap: int = 1000
    batch: int = 2
    burst: bool = False
    """The durable delivers all that there is in one step."""
    connects: int = 1
    acks: bool = False
    leaves: int = 0
    writes: int = 0
    """How often the gateway may write its cursors."""
    crashes: int = 0
    """Of the gateway: the next one knows only what is stored."""
    deaths: int = 0
    """Of inbox agents; another one takes over at the next delivery."""
    late: int = 0
    """Writes that take so long that another agent is given the messages as well."""
    refusals: int = 0
    """Writes of the inbox that the store refuses, done or not."""
    outages: int = 0
    """Reads of the gateway that the store refuses."""
    repeats: int = 0
    """Redeliveries to the device."""
    lost_consumers: int = 0
    expiries: int = 0
    """Rows at or below the floor that retention deletes."""
    trims: int = 0
    """Messages at or below a floor that the gateway knows, which the log forgets while the device is away."""


class Log:
    """One partition's stream, with the inbox agents' durable and the sessions' consumers."""

    def __init__(self) -> None:
        self.messages: dict[int, tuple[str, bytes]] = {}
        self.first = 1
        self.last = 0
        self.durable_next = 1
        self.pending: dict[int, str | None] = {}
        """Delivered to an inbox agent and not acknowledged; None where the agent is gone."""
        self.delivered: Counter[int] = Counter()
        self.consumers: dict[str, Consumer] = {}

    def append(self, user: str) -> None:
        self.last += 1
        body = b'{"specversion":"1.0","id":"n%d","source":"s","type":"t"}' % self.last
        self.messages[self.last] = (user, body)

    @property
    def ack_floor(self) -> int:
        """As JetStream has it: below the lowest that is not acknowledged."""
        return min(self.pending, default=self.durable_next) - 1

    def inbox_next(self) -> int | None:
        """What the durable delivers next: what lost its agent, then what is new."""
        orphan = next((seq for seq, agent in sorted(self.pending.items()) if agent is None), None)
        if orphan is not None:
            return orphan
        return self.durable_next if self.durable_next <= self.last else None


@dataclass
class Consumer:
    """A session's consumer."""

    user: str
    next: int
    window: int
    epoch: Epoch
    credit: int = 0
    deliveries: int = 0
    unacked: dict[int, int] = field(default_factory=dict)


class Epoch:
    """One connection of the device, and what came on it."""

    open = True
    stalled = False
    heard = True
    pinged = False

    def __init__(self) -> None:
        self.welcome: dict[str, Any] | None = None
        self.session: Any = None
        self.items: list[int] = []
        self.unacked: list[int] = []
        self.most = 0
        """How many of them there were at most."""
        self.acked: set[int] = set()
        self.gaps: list[dict[str, Any]] = []
        self.noted = 0
        self.from_store: set[int] = set()
        self.from_log: set[int] = set()
        self.again: Counter[int] = Counter()
        """What may come again, and how often."""

    def congested(self) -> bool:
        return False

    def dismiss(self, reason: Any, farewell: bytes | None = None) -> None:
        self.open = False

    def send(self, payload: bytes) -> None:
        """A frame to the device."""
        if not self.open:
            return
        frame = orjson.loads(payload)
        if frame["t"] == "welcome":
            assert self.welcome is None
            self.welcome = frame
        elif frame["t"] == "gap":
            self.gaps.append(frame)
        elif frame["t"] == "n":
            for item in frame["items"]:
                sequence = Position.parse(item["pos"]).sequence
                self.items.append(sequence)
                if sequence not in self.unacked and sequence not in self.acked:
                    self.unacked.append(sequence)
            self.most = max(self.most, len(self.unacked))


@dataclass(eq=False)
class Call:
    """An await of a real part: done by one step, answered by another one."""

    process: str
    effect: Callable[[], Any]
    future: asyncio.Future[Any]
    done: bool = False
    result: Any = None
    error: Exception | None = None


class Wire:
    """The connection to NATS of one process."""

    is_connected = True
    gulp_s = 0.0

    def __init__(self, world: World, process: str) -> None:
        self._world = world
        self._process = process
        self.handlers: dict[str, Any] = {}

    async def listen(self, subject: str, handler: Any, queue: str = "") -> None:
        self.handlers[subject] = handler

    async def confirm(self, timeout_s: float = 10) -> None:
        """Nothing waits."""

    def send(self, subject: str, payload: bytes = b"", reply: str = "", header: bytes = b"") -> bool:
        self._world.sent(self._process, subject, payload, reply)
        return True

    def ack(self, reply: bytes, verdict: bytes = b"") -> None:
        self.ack_all([reply])

    def ack_all(self, replies: Iterable[bytes]) -> None:
        self._world.acked(self._process, list(replies))

    async def api(self, request: str, body: Any = None) -> Any:
        if BROADCAST in request.split("."):
            return {"ack_floor": {"stream_seq": 0}, "num_pending": 0, "num_ack_pending": 0}
        return await self._world.call(self._process, request.split(".")[0] + "." + request.split(".")[1], request, body)

    async def ask(self, subject: str, payload: bytes = b"", *, timeout_s: float | None = None) -> bytes:
        return await self._world.call(self._process, "ask")


class Shelf:
    """The store, as one process sees it."""

    def __init__(self, world: World, process: str) -> None:
        self._world = world
        self._process = process

    async def _call(self, name: str, *arguments: Any) -> Any:
        return await self._world.call(self._process, name, *arguments)

    async def append(self, rows: Sequence[InboxRow]) -> None:
        await self._call("append", rows)

    async def claim(self, user: str, device: str, holder: Holder, floor: Position) -> Claimed:
        return await self._call("claim", holder, floor)

    async def save(self, updates: Sequence[CursorUpdate]) -> list[Lost]:
        return await self._call("save", updates)

    async def missed(self, user: str, after: Position, upto: Position) -> int:
        return await self._call("missed", after.sequence, upto.sequence)

    async def between(self, user: str, after: Position, upto: Position, limit: int) -> list[InboxItem]:
        return await self._call("between", after.sequence, upto.sequence, limit, self._world.epochs[-1])

    async def unread(self, user: str) -> int:
        return 0

    async def floors(self) -> dict[int, Position]:
        """The log never loses its end here."""
        return {}

    async def subscriptions(self, user: str, after: str | None, limit: int) -> list[Subscription]:
        """The user follows nothing, and there are no broadcasts: they are another matter."""
        return []

    async def note_floors(self, floors: Mapping[int, Position]) -> None:
        """Nobody reads them."""

    async def expire(self, before_ns: int) -> int:
        return 0


class World:
    """The actors of a scene. `options` are the steps that are possible; nothing happens between two of them."""

    current: World

    def __init__(self, scene: Scene) -> None:
        World.current = self
        self.scene = scene
        self.loop = SteppedLoop()
        self.log = Log()
        self.rows: dict[int, bytes] = {}
        self.deleted: set[int] = set()
        self.cursor: Cursor | None = None
        self.holder: Holder | None = None
        self.calls: dict[str, Call] = {}
        self.in_flight: dict[str, tuple[str, Any]] = {}
        """Acknowledgements of inbox agents and announcements, by label."""
        self.past: dict[str, int] = {}
        """A digest of all that each process has seen, in order."""
        self.used: Counter[str] = Counter()
        self.epochs: list[Epoch] = []
        self.agents: dict[str, Any] = {}
        self.mistakes: list[str] = []
        """Errors that were logged: what is contained is a mistake all the same."""
        self.draining = False
        self.overtaken = False
        """A cursor was written too late: somebody has the device already, and what was acknowledged may come again."""
        self._numbers: Counter[str] = Counter()
        self._joining: asyncio.Task[Any] | None = None
        self._flushing: asyncio.Task[Any] | None = None
        self.settings = _settings(scene)
        for _ in range(scene.published):
            self._publish()
        for sequence in range(1, scene.stored + 1):
            self.rows[sequence] = self.log.messages[sequence][1]
            self.log.durable_next = sequence + 1
        if scene.known:
            acked = frozenset(_at(sequence) for sequence in scene.acked)
            self.cursor = Cursor(_at(scene.cursor), acked)
        self.loop.run(self._begin)

    def _begin(self) -> None:
        self._start_gateway()
        self.hub.floors.raise_to(0, self.scene.heard)
        for number in range(self.scene.agents):
            self._start_agent(f"agent{number}")

    def _start_gateway(self) -> None:
        self.gateway = f"gateway{self.used['crash']}"
        self.tasks: list[asyncio.Task[Any]] = []

        def spawn(work: Any) -> asyncio.Task[Any]:
            self.tasks.append(self.loop.create_task(work))
            return self.tasks[-1]

        wire: Any = Wire(self, self.gateway)
        store: Any = Shelf(self, self.gateway)
        self.hub = Hub(self.settings, store, wire, Topology(1, (INCARNATION,), INCARNATION), spawn)
        opener = Opener(self.hub)
        self.keeper = Keeper(self.hub, opener)
        nobody: Any = None  # connections and tokens are looked at before a device joins
        authenticator = Authenticator(self.hub, nobody)
        self.door = Door(self.hub, opener, nobody, authenticator, Requests(self.hub, TopicEntitlement(self.settings)))
        spawn(self.keeper.mend())

    def _start_agent(self, process: str) -> None:
        store: Any = Shelf(self, process)
        agent = InboxAgent(self.settings, store)
        self.starting = Wire(self, process)
        self.agents[process] = SimpleNamespace(agent=agent, wire=self.starting, credit=0, deliveries=0, alive=True)
        self.loop.create_task(agent.start())

    # Awaits

    async def call(self, process: str, name: str, *arguments: Any) -> Any:
        """One await of a real part."""
        self._numbers[process] += 1
        label = f"{process}.{name}#{self._numbers[process]}"
        method = getattr(self, "_" + name.lower().replace(".", "_"))
        call = Call(process, lambda: method(*arguments), self.loop.create_future())
        self.calls[label] = call
        return await call.future

    def _do(self, call: Call, refusal: Exception | None = None, *, done: bool = True) -> None:
        call.done = True
        if done:
            try:
                call.result = call.effect()
            except (StoreUnavailable, StreamUnavailable) as error:
                call.error = error
        if refusal is not None:
            call.error = refusal

    def _answer(self, label: str) -> None:
        call = self.calls.pop(label)
        self._saw(call.process, label, _plain(call.result), call.error is None)
        if call.future.cancelled():
            return
        if call.error is not None:
            call.future.set_exception(call.error)
        else:
            call.future.set_result(call.result)

    def _saw(self, process: str, *what: Hashable) -> None:
        self.past[process] = hash((self.past.get(process), what))

    # The store

    def _append(self, rows: Sequence[InboxRow]) -> None:
        for row in rows:
            self.rows.setdefault(row.position.sequence, row.body)

    def _claim(self, holder: Holder, floor: Position) -> Claimed:
        previous, self.holder = self.holder, holder
        first, self.cursor = self.cursor is None, self.cursor or Cursor(floor)
        return Claimed(self.cursor, first, previous)

    def _save(self, updates: Sequence[CursorUpdate]) -> list[Lost]:
        lost = []
        for update in updates:
            if update.holder != self.holder:
                lost.append(Lost(update.holder, self.holder))
                self.overtaken = True
                continue
            assert self.cursor is not None
            if update.cursor.floor >= self.cursor.floor:
                self.cursor = update.cursor
            if update.release:
                self.holder = None
        return lost

    def _mine(self, after: int, upto: int) -> list[int]:
        return [n for n in sorted(self.rows) if after < n <= upto and self.log.messages[n][0] == USER]

    def _missed(self, after: int, upto: int) -> int:
        return len(self._mine(after, upto))

    def _between(self, after: int, upto: int, limit: int, epoch: Epoch) -> list[InboxItem]:
        found = self._mine(after, upto)[:limit]
        epoch.from_store.update(found)
        return [InboxItem(_at(n), False, False, False, n, self.rows[n]) for n in found]

    # The log

    def _publish(self) -> None:
        self.used["publish"] += 1
        self.log.append("bob" if self.used["publish"] in self.scene.others else USER)

    def _consumer_create(self, request: str, body: Any) -> dict[str, Any]:
        config, log = body["config"], self.log
        user = config["filter_subject"].rpartition(".")[2]
        start = max(log.first, min(config.get("opt_start_seq", 1), log.last + 1))
        log.consumers[config["durable_name"]] = Consumer(user, start, config["max_ack_pending"], self.epochs[-1])
        return {"delivered": {"stream_seq": start - 1}}

    def _consumer_info(self, request: str, body: Any) -> dict[str, Any]:
        return {
            "ack_floor": {"stream_seq": self.log.ack_floor},
            "delivered": {"stream_seq": self.log.durable_next - 1},
            "num_pending": self.log.last - self.log.durable_next + 1,
            "num_ack_pending": len(self.log.pending),
        }

    def _stream_info(self, request: str, body: Any) -> dict[str, Any]:
        return {"state": {"last_seq": self.log.last}}

    def _ask(self) -> bytes:
        raise StreamUnavailable("the gateway is gone")

    def sent(self, process: str, subject: str, payload: bytes, reply: str) -> None:
        """A message without an answer."""
        words = subject.split(".")
        if subject == "inbox.floor":
            self._numbers[f"floor of {process}"] += 1
            self.in_flight[f"floor {process}#{self._numbers[f'floor of {process}']}"] = (process, payload)
            self.used["announcements"] += 1
            for name, other in self.agents.items():
                if other.alive and subject in other.wire.handlers:
                    self._saw(name, "floor")
                    other.wire.handlers[subject](subject.encode(), b"", None, payload)
        elif BROADCAST in words:
            return
        elif "NEXT" in words and words[-1] == "inbox":
            self.agents[process].credit = orjson.loads(payload)["batch"]
        elif "NEXT" in words:
            consumer = self.log.consumers.get(words[-1])
            if consumer is not None:
                consumer.credit += orjson.loads(payload)["batch"]
            else:
                status = b"NATS/1.0 503\r\n\r\n"
                self.loop.call_soon(self.hub.on_pull_reply, reply.encode(), b"", status, b"")
        elif "DELETE" in words:
            self.log.consumers.pop(words[-1], None)

    def acked(self, process: str, replies: list[bytes]) -> None:
        """Acknowledgements: a session's count at once, an inbox agent's are on their way."""
        if process in self.agents:
            sequences = tuple(int(reply.split(b".")[5]) for reply in replies)
            self._numbers[f"acks of {process}"] += 1
            self.in_flight[f"acks {process}#{self._numbers[f'acks of {process}']}"] = (process, sequences)
            return
        for reply in replies:
            words = reply.split(b".")
            consumer = self.log.consumers.get(words[3].decode())
            if consumer is not None:
                consumer.unacked.pop(int(words[5]), None)

    # Steps

    def options(self) -> dict[str, Step]:
        """The steps that are possible now, by a name that is the same in each run."""
        scene, options = self.scene, {}
        if self.used["publish"] < scene.messages:
            options["publish"] = self._publish
        for label, call in self.calls.items():
            if call.done:
                options[f"{label} answers"] = lambda label=label: self._answer(label)
            else:
                options[f"{label} is done"] = lambda call=call: self._do(call)
                options |= self._refusals(label, call)
        options |= self._arrivals()
        for process, state in self.agents.items():
            if state.alive:
                options |= self._agent_options(process, state)
        for number, (delay, timer) in enumerate(self.loop.waiting()):
            # Between the two are the announcements; what waits for longer waits for ever.
            if delay < FLOOR_INTERVAL_S or (delay < 2 * FLOOR_INTERVAL_S and self._left("announcements")):
                options[f"timer {number}"] = lambda timer=timer: self.loop.fire(timer, 2 * FLOOR_INTERVAL_S)
        options |= self._log_options()
        options |= self._device_options()
        return options

    def _refusals(self, label: str, call: Call) -> dict[str, Step]:
        name, refused = label.partition(".")[2], StoreUnavailable("as the test wants it")
        if name.startswith("append") and self._left("refusals"):
            return {
                f"{label} is refused": self._using("refusals", lambda: self._do(call, refused, done=False)),
                f"{label} is done and refused": self._using("refusals", lambda: self._do(call, refused)),
            }
        if name.startswith(("claim", "missed", "between")) and self._left("outages"):
            return {f"{label} is refused": self._using("outages", lambda: self._do(call, refused, done=False))}
        return {}

    def _left(self, what: str) -> bool:
        return not self.draining and self.used[what] < getattr(self.scene, what)

    def _using(self, what: str, action: Step) -> Step:
        def step() -> None:
            self.used[what] += 1
            action()

        return step

    def _arrivals(self) -> dict[str, Step]:
        options: dict[str, Step] = {}
        first: set[str] = set()
        for label, (process, _) in self.in_flight.items():
            if label.startswith("floor"):
                # In any order: an old one may come last, or so late that it is as good as lost.
                options[f"{label} is heard"] = lambda label=label: self._heard(label)
            elif process not in first:
                first.add(process)
                options[f"{label} arrive"] = lambda label=label: self._settle(label)
        return options

    def _heard(self, label: str) -> None:
        payload = self.in_flight.pop(label)[1]
        self._saw(self.gateway, "floor", tuple(orjson.loads(payload)["floors"]))
        self.hub.floors.heard(b"inbox.floor", b"", None, payload)

    def _settle(self, label: str) -> None:
        for sequence in self.in_flight.pop(label)[1]:
            self.log.pending.pop(sequence, None)

    def _agent_options(self, process: str, state: Any) -> dict[str, Step]:
        options: dict[str, Step] = {}
        if state.credit and self.log.inbox_next() is not None:
            options[f"{process} receives"] = lambda: self._to_agent(process, state)
        mine = [sequence for sequence, agent in self.log.pending.items() if agent == process]
        if self._left("deaths"):
            options[f"{process} dies"] = self._using("deaths", lambda: self._kill(process, state))
        if mine and self._left("late"):
            options[f"{process} is late"] = self._using("late", lambda: self._orphan(process))
        return options

    def _to_agent(self, process: str, state: Any) -> None:
        log = self.log
        sequence = log.inbox_next()
        assert sequence is not None
        log.durable_next = max(log.durable_next, sequence + 1)
        log.pending[sequence] = process
        log.delivered[sequence] += 1
        state.credit -= 1
        state.deliveries += 1
        user, body = log.messages[sequence]
        where = f"part.0.user.{user}".encode()
        times = log.delivered[sequence], sequence, state.deliveries, sequence
        reply = b"$JS.ACK.NOTIFY_0.inbox.%d.%d.%d.%d.0" % times
        self._saw(process, times)
        state.agent._receive(where, reply, None, body)
        if self.scene.burst and state.credit and log.inbox_next() is not None:
            self._to_agent(process, state)

    def _orphan(self, process: str) -> None:
        for sequence, agent in self.log.pending.items():
            if agent == process:
                self.log.pending[sequence] = None

    def _kill(self, process: str, state: Any) -> None:
        state.alive = False
        for task in list(state.agent._tasks):
            task.cancel()
        for label in [label for label, call in self.calls.items() if call.process == process]:
            del self.calls[label]
        for label in [label for label, (sender, _) in self.in_flight.items() if sender == process]:
            if label.startswith("acks"):
                del self.in_flight[label]
        self._orphan(process)
        self.used["agents"] += 1
        self._start_agent(f"agent{self.scene.agents - 1 + self.used['agents']}")

    def _log_options(self) -> dict[str, Step]:
        options: dict[str, Step] = {}
        for number, (name, consumer) in enumerate(self.log.consumers.items()):
            if consumer.credit and name.encode() in self.hub.by_consumer:
                sequence = self._next_of(consumer)
                if sequence is not None and len(consumer.unacked) < consumer.window:
                    options[f"consumer {number} delivers"] = lambda n=name, s=sequence: self._deliver(n, s)
                if consumer.unacked and self._left("repeats"):
                    again = self._using("repeats", lambda n=name, c=consumer: self._repeat(n, c))
                    options[f"consumer {number} repeats"] = again
            if self._left("lost_consumers") and name.encode() in self.hub.by_consumer:
                options[f"consumer {number} is lost"] = self._using("lost_consumers", lambda n=name: self._lose(n))
        if self._left("expiries") and (old := [n for n in self.rows if n <= self.log.ack_floor]):
            options["a row expires"] = self._using("expiries", lambda: self._expire(min(old)))
        away = not self.epochs or not self.epochs[-1].open
        if self._left("trims") and away and self.log.first <= min(self.hub.floors[0].sequence, self.log.last):
            options["the log forgets"] = self._using("trims", self._trim)
        return options

    def _next_of(self, consumer: Consumer) -> int | None:
        mine = (n for n in range(max(consumer.next, self.log.first), self.log.last + 1))
        return next((n for n in mine if self.log.messages[n][0] == consumer.user), None)

    def _deliver(self, name: str, sequence: int) -> None:
        consumer = self.log.consumers[name]
        consumer.next = max(consumer.next, sequence + 1)
        consumer.credit -= 1
        consumer.deliveries += 1
        consumer.unacked[sequence] = times = consumer.unacked.get(sequence, 0) + 1
        consumer.epoch.from_log.add(sequence)
        user, body = self.log.messages[sequence]
        numbers = times, sequence, consumer.deliveries, sequence
        self._saw(self.gateway, numbers)
        reply = b"$JS.ACK.NOTIFY_0.%b.%d.%d.%d.%d.0" % (name.encode(), *numbers)
        self.hub.on_pull_reply(f"part.0.user.{user}".encode(), reply, None, body)

    def _repeat(self, name: str, consumer: Consumer) -> None:
        sequence = min(consumer.unacked)
        consumer.epoch.again[sequence] += 1
        self.loop.now += 2 * self.settings.ack_wait_s
        self._deliver(name, sequence)

    def _lose(self, name: str) -> None:
        consumer = self.log.consumers.pop(name)
        session = self.hub.by_consumer[name.encode()]
        # What it had delivered and was not acknowledged comes once more, when the time for an ack is over.
        consumer.epoch.again.update(consumer.unacked.keys())
        self.hub.lost(session)

    def _expire(self, sequence: int) -> None:
        del self.rows[sequence]
        self.deleted.add(sequence)

    def _trim(self) -> None:
        self.log.first += 1

    # The device

    def _device_options(self) -> dict[str, Step]:
        options: dict[str, Step] = {}
        epoch = self.epochs[-1] if self.epochs else None
        if epoch is None or not epoch.open:
            if self.draining or self.used["connect"] < self.scene.connects:
                options["connect"] = self._connect
        elif epoch.welcome is not None:
            if self.draining or self.scene.acks:
                for sequence in epoch.unacked:
                    options[f"device acks {sequence}"] = lambda n=sequence: self._ack(n)
                if len(epoch.gaps) > epoch.noted and epoch.gaps[-1]["pos"] is not None:
                    options["device notes the gap"] = self._note
            if self._left("leaves"):
                options["device leaves"] = self._using("leaves", self._leave)
            if epoch.session.blind and not self._left("outages"):
                options["device is sent away"] = self._send_away
        idle = self._flushing is None or self._flushing.done()
        if idle and self._left("writes") and (self.hub.moved or self.hub.released):
            options["cursors are written"] = self._using("writes", self._flush)
        if self._left("crashes"):
            options["the gateway crashes"] = self._using("crashes", self._crash)
        return options

    def _connect(self) -> None:
        self.used["connect"] += 1
        self._saw(self.gateway, "connect")
        epoch = Epoch()
        self.epochs.append(epoch)

        async def join() -> None:
            socket: Any = epoch
            epoch.session = await self.door._join(socket, TOKEN, DEVICE, self.scene.window, None)

        self._joining = self.loop.create_task(join())

    def _ack(self, sequence: int) -> None:
        epoch = self.epochs[-1]
        epoch.unacked.remove(sequence)
        epoch.acked.add(sequence)
        self._saw(self.gateway, "ack", sequence)
        epoch.session.acknowledge([str(_at(sequence))])

    def _note(self) -> None:
        epoch = self.epochs[-1]
        epoch.noted = len(epoch.gaps)
        self._saw(self.gateway, "noted")
        epoch.session.acknowledge([epoch.gaps[-1]["pos"]])

    def _leave(self) -> None:
        epoch = self.epochs[-1]
        epoch.open = False
        self._saw(self.gateway, "left")
        self.hub.detach(epoch.session, epoch, linger=False)  # type: ignore[arg-type]

    def _send_away(self) -> None:
        """The store is back: a session that began without it begins anew."""
        self.used["connect"] -= 1
        self._leave()

    def _flush(self) -> None:
        self._saw(self.gateway, "flush")
        self._flushing = self.loop.create_task(self.keeper.flush())

    def _crash(self) -> None:
        for task in (*self.tasks, self._joining, self._flushing):
            if task is not None:
                task.cancel()
        for label in [label for label, call in self.calls.items() if call.process == self.gateway]:
            del self.calls[label]
        for epoch in self.epochs:
            epoch.open = False
        self._start_gateway()
        # As a gateway does when it starts.
        self.hub.floors.raise_to(0, self.log.ack_floor)

    def step(self, name: str) -> None:
        """Take a step, and let everything come to rest."""
        self.loop.run(self.options()[name])
        errors = [context for context in self.loop.errors if "exception" in context]
        assert not errors, errors

    def drain(self) -> None:
        """Go on, with nothing going wrong any more, until the device has all that it can get."""
        self.draining = True
        for _ in range(10_000):
            options = self.options()
            if not options:
                return
            self.loop.run(next(iter(options.values())))
        raise AssertionError(f"no end: {list(self.options())}")

    def close(self) -> None:
        """Let go of everything."""
        self.loop.finish()

    # Judgement

    def fingerprint(self) -> Hashable:
        """All that the future depends on: what each process has seen, and what lies between them."""
        log = self.log
        return (
            tuple(sorted(self.past.items())),
            tuple(sorted(self.used.items())),
            (log.first, log.last, log.durable_next, tuple(sorted(log.pending.items()))),
            tuple((c.next, c.credit, tuple(sorted(c.unacked.items()))) for c in log.consumers.values()),
            tuple(self.rows),
            (str(self.cursor), self.holder is None, self.overtaken, tuple(sorted(self.deleted))),
            tuple((label, call.done, _plain(call.result)) for label, call in sorted(self.calls.items())),
            tuple(sorted((label, content) for label, (_, content) in _floors_only(self.in_flight).items())),
            tuple((tuple(e.items), tuple(e.unacked), len(e.gaps), tuple(sorted(e.from_store))) for e in self.epochs),
        )

    def check(self) -> None:
        """What the catch-up promises, of every connection and of all of them together."""
        assert not self.mistakes, self.mistakes
        tasks = [*self.loop.tasks]
        broken = [task for task in tasks if task.done() and not task.cancelled() and task.exception() is not None]
        assert not broken, broken
        got: set[int] = set()
        acked: set[int] = set()
        announced: list[tuple[int, int]] = []
        for epoch in self.epochs:
            self._check_epoch(epoch)
            if not (self.overtaken or self._forgetful() or self.used["crashes"] or self.used["outages"]):
                assert not acked.intersection(epoch.items), f"acknowledged before: {epoch.items}"
            acked |= epoch.acked
            last = epoch is self.epochs[-1]
            # Only the device's ack ends it: what came on an earlier connection and was not acknowledged comes again.
            got.update(epoch.items if last else epoch.acked)
            for gap in epoch.gaps:
                if gap["pos"] is not None and (last or epoch.noted):
                    low, high = self._since(epoch), Position.parse(gap["pos"]).sequence
                    hers = {n for n, (user, _) in self.log.messages.items() if user == USER and low < n <= high}
                    assert max(self.scene.cap + 1, len(hers - self.deleted)) <= gap["missed"] <= len(hers)
                    announced.append((low, high))
        welcomes = [epoch for epoch in self.epochs if epoch.welcome is not None and not self._blind(epoch)]
        begin = self.scene.cursor if self.scene.known else self._since(welcomes[0])
        had = self.scene.acked if self.scene.known else frozenset()
        for sequence, (user, _) in self.log.messages.items():
            excused = (
                user != USER
                or sequence <= begin
                or sequence in had
                or sequence in self.deleted
                or any(low < sequence <= high for low, high in announced)
            )
            assert excused or sequence in got, f"{sequence} is lost: {[epoch.items for epoch in self.epochs]}"

    def _since(self, epoch: Epoch) -> int:
        assert epoch.welcome is not None
        return Position.parse(epoch.welcome["pos"]).sequence

    def _blind(self, epoch: Epoch) -> bool:
        return epoch.welcome is None or epoch.welcome["pos"] is None or epoch.session.blind

    def _forgetful(self) -> bool:
        """While a gap is not noted, the acknowledgements past four windows are forgotten: copies, as it is promised."""
        return 4 * self.scene.window < self.scene.messages and any(epoch.gaps for epoch in self.epochs)

    def _check_epoch(self, epoch: Epoch) -> None:
        if epoch.welcome is None:
            return
        first = list(dict.fromkeys(epoch.items))
        assert first == sorted(first), f"out of order: {epoch.items}"
        assert epoch.most <= self.scene.window, f"{epoch.most} in a window of {self.scene.window}"
        copies = Counter(epoch.items)
        assert all(count <= 1 + epoch.again[n] for n, count in copies.items()), f"copies: {epoch.items}"
        assert all(self.log.messages[n][0] == USER for n in epoch.items), f"not hers: {epoch.items}"
        if not self._blind(epoch):
            both = epoch.from_store & epoch.from_log
            assert not both, f"read from the inbox and from the stream: {both}"
            assert not epoch.from_log or min(epoch.from_log) > self._since(epoch), f"read in vain: {epoch.from_log}"
            assert self._forgetful() or not self.scene.acked.intersection(epoch.items), f"had before: {epoch.items}"


@cache
def _settings(scene: Scene) -> Settings:
    return Settings(
        token_key=KEY,
        # Thousands of agents are made: none is to compile schemas.
        schema_check="off",
        partitions=1,
        window=scene.window,
        catchup_cap=scene.cap,
        linger_s=0,
        delivery_marks="off",
        inbox_batch=scene.batch,
        inbox_delay_ms=0,
        floor_interval_s=FLOOR_INTERVAL_S,
        max_deliver=1000,
    )


def _at(sequence: int) -> Position:
    return Position(INCARNATION, sequence)


def _plain(result: Any) -> Hashable:
    """A result without the names that are drawn anew in each run."""
    if isinstance(result, Claimed):
        return str(result.cursor), result.first, result.previous is None
    if isinstance(result, list):
        return tuple(item.position if isinstance(item, InboxItem) else "holder" for item in result)
    if isinstance(result, dict):
        return str(result)
    return result


def _floors_only(in_flight: dict[str, tuple[str, Any]]) -> dict[str, tuple[str, Any]]:
    """What is in flight, without the announcing agents' names."""
    return {
        label: (process, tuple(orjson.loads(content)["floors"]) if isinstance(content, bytes) else content)
        for label, (process, content) in in_flight.items()
    }


class _Mistakes(logging.Handler):
    def emit(self, record: logging.LogRecord) -> None:
        World.current.mistakes.append(self.format(record))


@contextmanager
def stepped_agents() -> Iterator[None]:
    """Let inbox agents connect to the world that is being made, and have its time; keep the errors that are logged."""

    async def connect(settings: Settings, name: str, **callbacks: Any) -> Wire:
        return World.current.starting

    async def discover(connection: Wire) -> Topology:
        return Topology(1, (INCARNATION,), INCARNATION)

    async def renew(connection: Wire, known: Mapping[int, Position]) -> Topology:
        return Topology(1, (INCARNATION,), INCARNATION)

    clock = SimpleNamespace(monotonic=lambda: World.current.loop.time(), time_ns=time.time_ns)
    logger, handler = logging.getLogger("tidings"), _Mistakes(logging.ERROR)
    level = logger.level
    logger.addHandler(handler)
    logger.setLevel(logging.ERROR)
    try:
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(inbox_module, "connect", connect)
            patch.setattr(inbox_module, "topology", SimpleNamespace(discover=discover, renew=renew))
            patch.setattr(inbox_module, "time", clock)
            yield
    finally:
        logger.setLevel(level)
        logger.removeHandler(handler)


class Explored(NamedTuple):
    interleavings: int
    """Orders of steps from the beginning to an end, counted one by one."""
    states: int
    """Different states that they go through; each step of each state was taken."""
    ends: int
    """Different last states, each of them checked."""


class _Frame:
    __slots__ = ("names", "next", "state", "total")

    def __init__(self, state: int, names: list[str]) -> None:
        self.state, self.names, self.next, self.total = state, names, 0, 0


def explore(make: Callable[[], World]) -> Explored:
    """Take every order of steps. Orders that lead to the same state are continued once and counted each."""
    known: dict[int, int] = {}
    ends = 0
    stack: list[_Frame] = []
    while True:
        world = make()
        try:
            for frame in stack:
                world.step(frame.names[frame.next])
            while True:
                state = hash(world.fingerprint())
                if (count := known.get(state)) is not None:
                    break
                names = list(world.options())
                if not names:
                    _check(world, stack)
                    known[state] = count = 1
                    ends += 1
                    break
                stack.append(_Frame(state, names))
                world.step(names[0])
        finally:
            world.close()
        while stack:
            frame = stack[-1]
            frame.total += count
            frame.next += 1
            if frame.next < len(frame.names):
                break
            known[frame.state] = count = frame.total
            stack.pop()
        if not stack:
            return Explored(count, len(known), ends)


def _check(world: World, stack: list[_Frame]) -> None:
    try:
        world.check()
    except AssertionError as error:
        error.add_note("after: " + ", ".join(frame.names[frame.next] for frame in stack))
        raise
