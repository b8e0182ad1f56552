"""Copies or broadcast, decided once: every order of steps of two fan-out agents, with every death and a lost answer.

The agents are the real ones, as far as one message goes; log and store are in memory, and each request to them is
a step. What an agent does between two requests nobody else can see.
"""

from __future__ import annotations

import asyncio
from collections import Counter
from collections.abc import Callable, Coroutine, Generator, Sequence
from contextlib import suppress
from types import SimpleNamespace
from typing import Any, Final

import pytest

from support.mesh import QUICK
from tidings.fanout.agent import FanoutAgent, _Message
from tidings.runtime.settings import Settings
from tidings.store.port import SubscriberPage
from tidings.stream.consumers import Delivery
from tidings.stream.topology import DECISIONS
from tidings.wire import subject
from tidings.wire.errors import StreamUnavailable
from tidings.wire.notification import build

LIMIT: Final = 2
PAGE: Final = 2
DELIVERIES: Final = 3
_, BODY = build(type="post.made", data=None, id="x")


class Request:
    """Awaited by an agent until a step does it."""

    def __init__(self, effect: Callable[[], Any], *, to_log: bool = True) -> None:
        self.effect = effect
        self.may_fail = to_log

    def __await__(self) -> Generator[Request, Any, Any]:
        return (yield self)


class Worker:
    """One agent at work on the message: a coroutine and what it waits for."""

    def __init__(self, world: World, name: str) -> None:
        self.world, self.name = world, name
        self.seen: list[object] = []
        self.request: Request | None = None
        settings = Settings(**{**QUICK, "fanout_write_max": LIMIT})
        self.agent: Any = FanoutAgent(settings, world.store())
        self.agent._connection = SimpleNamespace(store=world.publish, api=world.get)
        self.agent._publisher = SimpleNamespace(publish_copies=world.copy)
        self.agent._wait = self._wait
        self._work: Coroutine[Any, Any, None] = self._deliver()
        self._resume(None)

    async def _deliver(self) -> None:
        delivery = Delivery(b"TOPICS", b"fanout", 1, 7, 1, 1_700_000_000_000_000_000)
        if await self.agent._fan_out(_Message("notify.topic.t", BODY, b"reply", delivery)):
            await Request(self.world.ack, to_log=False)

    async def _wait(self, backoff: object, problem: str) -> None:
        """At once."""

    def _resume(self, result: Any, error: Exception | None = None) -> None:
        try:
            self.request = self._work.throw(error) if error is not None else self._work.send(result)
        except StopIteration:
            self.request = None

    def step(self, *, done: bool = True, answered: bool = True) -> None:
        assert self.request is not None
        result = self.request.effect() if done else None
        self.seen.append((repr(result), answered))
        self._resume(result, None if answered else StreamUnavailable("no answer"))

    def die(self) -> None:
        if self.request is not None:
            self.request = None
            with suppress(asyncio.CancelledError):
                self._work.throw(asyncio.CancelledError())


class World:
    """The message, who follows its topic, and what was done with it."""

    def __init__(self, joining: Sequence[str], leaving: Sequence[str], deaths: int, losses: int) -> None:
        self.followers = {"a", "b"}
        self.joining, self.leaving = list(joining), list(leaving)
        self.deaths, self.losses = deaths, losses
        self.decisions: list[bytes] = []
        self.broadcasts = 0
        self.copies: Counter[str] = Counter()
        self.is_acked = False
        self.delivered = 0
        self.workers: list[Worker] = []

    # What an agent asks for

    def store(self) -> Any:
        async def subscribers(pattern: str, after: str | None, limit: int) -> SubscriberPage:
            def page() -> SubscriberPage:
                users = sorted(user for user in self.followers if pattern == "t" and user > (after or ""))
                return SubscriberPage(users[:PAGE], users[PAGE - 1] if len(users) > PAGE else None)

            return await Request(page, to_log=False)

        return SimpleNamespace(subscribers=subscribers)

    async def publish(self, where: str, body: bytes, headers: dict[str, str]) -> Any:
        """One message id each: the second is a duplicate of the first."""

        def decided() -> dict[str, Any]:
            self.decisions.append(body)
            return {"seq": 1} if len(self.decisions) == 1 else {"seq": 1, "duplicate": True}

        def broadcast() -> dict[str, Any]:
            self.broadcasts = 1
            return {"seq": 1}

        assert headers["Nats-Msg-Id"] == "7.1700000000000000000"
        return await Request(decided if where == subject.DECIDED else broadcast)

    async def get(self, request: str, body: dict[str, int]) -> Any:
        assert (request, body) == (f"STREAM.MSG.GET.{DECISIONS}", {"seq": 1})
        data = {b"copies": "Y29waWVz", b"broadcast": "YnJvYWRjYXN0"}
        return await Request(lambda: {"message": {"data": data[self.decisions[0]]}})

    async def copy(self, users: list[str], id: str, body: bytes) -> None:
        def stored() -> None:
            for user in users:
                self.copies[user] = 1

        await Request(stored)

    def ack(self) -> None:
        self.is_acked = True

    # Steps

    def options(self) -> dict[str, Callable[[], object]]:
        """What may happen next, by a name that says what."""
        found: dict[str, Callable[[], object]] = {}
        if self.joining:
            found["join"] = lambda: self.followers.add(self.joining.pop(0))
        if self.leaving:
            found["leave"] = lambda: self.followers.discard(self.leaving.pop(0))
        working = [worker for worker in self.workers if worker.request is not None]
        if not self.is_acked and self.delivered < DELIVERIES and len(working) < 2:
            found["deliver"] = self._deliver
        for worker in working:
            found[worker.name] = worker.step
            if self.losses and worker.request is not None and worker.request.may_fail:
                found[f"{worker.name} unanswered"] = lambda worker=worker: self._lose(worker, done=True)
                found[f"{worker.name} unsent"] = lambda worker=worker: self._lose(worker, done=False)
            if self.deaths:
                found[f"{worker.name} dies"] = lambda worker=worker: self._kill(worker)
        return found

    def _deliver(self) -> None:
        self.delivered += 1
        self.workers.append(Worker(self, f"agent{self.delivered}"))

    def _lose(self, worker: Worker, *, done: bool) -> None:
        self.losses -= 1
        worker.step(done=done, answered=False)

    def _kill(self, worker: Worker) -> None:
        self.deaths -= 1
        worker.die()

    def fingerprint(self) -> object:
        workers = tuple((tuple(worker.seen), worker.request is None) for worker in self.workers)
        outcome = (tuple(self.decisions[:1]), bool(self.decisions), self.broadcasts, tuple(sorted(self.copies)))
        members = (tuple(sorted(self.followers)), len(self.joining), len(self.leaving))
        return (outcome, members, self.deaths, self.losses, self.is_acked, self.delivered, workers)

    def finish(self) -> None:
        """JetStream delivers it again until it is acknowledged; what is under way comes to its end."""
        while any(worker.request is not None for worker in self.workers) or not self.is_acked:
            working = next((worker for worker in self.workers if worker.request is not None), None)
            if working is None:
                self._deliver()
            else:
                working.step()

    def check(self, stayed: set[str]) -> None:
        """Who followed all the time has it once, nobody has it twice."""
        assert self.is_acked
        for user in {*stayed, *self.copies}:
            times = self.copies[user] + self.broadcasts
            assert times == 1, f"{user} has it {times} times"

    def close(self) -> None:
        for worker in self.workers:
            worker.die()


def explore(make: Callable[[], World], stayed: set[str]) -> tuple[int, Counter[str]]:
    """Take every order of steps; returns how many states there were, and how often each plane was the end."""
    known: set[object] = set()
    ends: Counter[str] = Counter()
    waiting: list[tuple[str, ...]] = [()]
    while waiting:
        steps = waiting.pop()
        world = make()
        try:
            for name in steps:
                world.options()[name]()
            state = world.fingerprint()
            if state in known:
                continue
            known.add(state)
            waiting += [(*steps, name) for name in world.options()]
            world.finish()
            world.check(stayed)
            ends["broadcast" if world.broadcasts else "copies"] += 1
        except AssertionError as error:
            error.add_note("after: " + ", ".join(steps))
            raise
        finally:
            world.close()
    return len(known), ends


SCENES: Final[dict[str, tuple[list[str], list[str], int, int]]] = {
    "promoted, a death": (["c"], [], 1, 0),
    "promoted, an answer lost": (["c"], [], 0, 1),
    "demoted, a death": (["c"], ["c"], 1, 0),
    "promoted twice over, two deaths": (["c", "d"], [], 2, 0),
}


@pytest.mark.parametrize("name", SCENES)
def test_every_order_of_steps(name: str) -> None:
    """Whatever the order: one plane, and everybody once."""
    scene = SCENES[name]
    states, ends = explore(lambda: World(*scene), {"a", "b"})
    assert states > 1000
    # Both happen, or the scene shows nothing.
    assert min(ends["copies"], ends["broadcast"]) > 100
