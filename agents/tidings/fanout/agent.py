"""The fan-out agent.

Reads: ``TOPICS``, through the shared durable consumer ``fanout``; subscribers, from the store.
Writes: a personal copy for each subscriber to ``notify.user.<user>``, or, where they are many, one message to
``broadcast.<topic>``; before either, which of the two, to ``DECISIONS``; dead letters to ``DEAD``.
Acks when: every copy, or the broadcast, is durable in the log, or the body is durable as a dead letter.
Crash costs: nothing. What was not acknowledged is redelivered, here or to another fan-out agent, which finds the
decision made and does the same again under the same message ids. That adds nothing to what is there (within the log's
duplicate window).
"""

from __future__ import annotations

import asyncio
import secrets
from collections import deque
from collections.abc import AsyncGenerator
from contextlib import aclosing
from typing import TYPE_CHECKING, Final, Literal, NamedTuple

import orjson

from tidings.publish import Publisher
from tidings.runtime.backoff import Backoff
from tidings.runtime.service import Service
from tidings.runtime.settings import Settings
from tidings.schema import reader
from tidings.store.port import Store, SubscriberPage
from tidings.stream import consumers, once, topology
from tidings.stream.connection import Connection, connect
from tidings.stream.consumers import Delivery
from tidings.stream.topology import DECISIONS, FANOUT, TOPICS
from tidings.wire import subject
from tidings.wire.errors import (
    BadTopic,
    InvalidNotification,
    PublishRefused,
    PublishUnconfirmed,
    StoreUnavailable,
    StreamUnavailable,
)
from tidings.wire.notification import MAX_BODY_BYTES
from tidings.wire.topic import patterns_of

from .numbers import FanoutNumbers

if TYPE_CHECKING:
    from tidings.telemetry.telemetry import Telemetry
    from tidings.telemetry.tracing import Span

__all__ = ["FanoutAgent"]

_PULL_EXPIRES_NS: Final = 30_000_000_000
_PULL_AGAIN_S: Final = 1.0
_SLICE: Final = 128
"""Copies that a topic sends before others have their turn."""
_MOST_OF_ONE: Final = 32
"""Messages of one topic that wait here while half of the places are taken; further ones go back for a while, and leave
their places to other topics."""
_GIVEN_BACK_S: Final = 1.0
_TRACED: Final = 16
"""Of a traced message, copies that are traced: a span for each of a thousand would be what takes the time."""
_LAG_EVERY_S: Final = 5.0
_REMEMBERED: Final = 100_000
"""Users that are known to have their copy: who has subscribed twice over is sent one."""


_Plane = Literal["copies", "broadcast"]


class _Message(NamedTuple):
    """One message of a topic."""

    where: str
    body: bytes
    reply: bytes
    delivery: Delivery


class FanoutAgent(Service):
    """One fan-out process; any number of them share the work. `store` is opened and closed by whoever made it.

    Messages of a topic are copied in their order, and topics side by side: each sends some copies in its turn, so that
    one with a million subscribers does not hold up the others. Memory is bounded by the messages (``fanout_batch``) and
    copies (``fanout_in_flight``) under way. A topic that would fill more than half of it has its messages given
    back, which then come later than they should; and of two agents either may be quicker.
    """

    name = "fanout"

    def __init__(self, settings: Settings, store: Store, *, telemetry: Telemetry | None = None) -> None:
        super().__init__()
        self._telemetry = telemetry
        self._numbers = None if telemetry is None else FanoutNumbers(telemetry.numbers, lambda: self._held)
        self._tracing = None if telemetry is None else telemetry.tracing
        self._settings = settings
        self._store = store
        self._read = reader(settings)
        self._id = secrets.token_hex(4)
        self._connection: Connection
        self._publisher: Publisher
        self._waiting: dict[str, deque[_Message]] = {}
        """By topic, in the order of the stream; the first of each is being copied."""
        self._held = 0
        self._turns = asyncio.Semaphore(max(1, settings.fanout_in_flight // _SLICE))
        self._pulls = 0
        self._pull_left = 0

    async def _start(self) -> None:
        self._connection = connection = await connect(self._settings, "tidings-fanout", found=self._reconnected)
        await topology.check_topics(connection)
        self._publisher = Publisher(connection, timeout_s=self._settings.fanout_ack_wait_s / 2)
        await self._publisher.open()
        await connection.listen(subject.fanout_pull(self._id, "*"), self._receive)
        await connection.confirm()
        for loop in (self._pull_where_none, self._keep):
            self.spawn(loop())
        if self._telemetry is not None and self._numbers is not None:
            self._telemetry.watch_connection(connection)
            self.spawn(self._learn_lag(self._numbers))
        self.log.info("fan-out agent %s reads %s", self._id, TOPICS)

    async def _stop(self) -> None:
        if hasattr(self, "_publisher"):
            await self._publisher.close()
        if hasattr(self, "_connection"):
            await self._connection.finish()

    async def _reconnected(self) -> None:
        """No pull survives a broken connection; what it had under way is redelivered."""
        self._pull()

    async def _learn_lag(self, numbers: FanoutNumbers) -> None:
        """How much of ``TOPICS`` waits for fan-out agents, for the metrics."""
        while True:
            try:
                numbers.lag = (await consumers.shared_progress(self._connection, TOPICS, FANOUT)).lag
            except StreamUnavailable as error:
                numbers.lag = None
                self.log.debug("the lag of topics is not known: %s", error)
            await asyncio.sleep(_LAG_EVERY_S)

    # Messages in

    def _pull(self) -> None:
        """Ask for as many messages as there is room for."""
        room = self._settings.fanout_batch - self._held
        if room <= 0:
            self._pull_left = 0
            return
        self._pulls += 1
        self._pull_left = room
        consumers.pull(
            self._connection,
            TOPICS,
            FANOUT,
            subject.fanout_pull(self._id, self._pulls),
            batch=room,
            expires_ns=_PULL_EXPIRES_NS,
        )

    async def _pull_where_none(self) -> None:
        """A pull that was refused (no consumer yet, a leader that moves) is tried again."""
        while True:
            if self._pull_left <= 0:
                self._pull()
            await asyncio.sleep(_PULL_AGAIN_S)

    async def _keep(self) -> None:
        """Tell JetStream of what takes its time that it is under way."""
        while True:
            await asyncio.sleep(self._settings.fanout_ack_wait_s / 3)
            for messages in self._waiting.values():
                for message in messages:
                    self._connection.ack(message.reply, b"+WPI")

    def _receive(self, where: bytes, reply: bytes, header: bytes | None, body: bytes) -> None:
        if not reply:
            self._pull_ended(where, header)
            return
        self._pull_left -= 1
        message = _Message(subject.readable(where), body, reply, consumers.parse_reply(reply))
        waiting = self._waiting.get(message.where)
        if waiting is None:
            waiting = self._waiting[message.where] = deque()
            self.spawn(self._work(message.where, waiting))
        elif len(waiting) >= _MOST_OF_ONE and 2 * self._held >= self._settings.fanout_batch:
            consumers.nak(self._connection, reply, min(message.delivery.delivered, 4) * _GIVEN_BACK_S)
            self._pull_if_room()
            return
        waiting.append(message)
        self._held += 1
        self._pull_if_room()

    def _pull_if_room(self) -> None:
        if self._pull_left <= 0 and 8 * self._held <= 7 * self._settings.fanout_batch:
            self._pull()

    def _pull_ended(self, where: bytes, header: bytes | None) -> None:
        """A pull expired, or the consumer did not answer."""
        if header is None or int(where.rpartition(b".")[2]) != self._pulls:
            return
        status, description = consumers.status_of(header)
        self._pull_left = 0
        if status == 408:
            self._pull()
        else:
            self.log.debug("a pull ended: %d %s", status, description.decode())

    # Copies out

    async def _work(self, where: str, waiting: deque[_Message]) -> None:
        """Copy a topic's messages, one after the other, until none waits."""
        try:
            while waiting:
                if await self._fan_out(waiting[0]):
                    self._connection.ack(waiting[0].reply)
                waiting.popleft()
                self._held -= 1
                self._pull_if_room()
        finally:
            del self._waiting[where]

    async def _fan_out(self, message: _Message) -> bool:
        """`_bring`, in a span of the message's trace if it has one."""
        parent = None if self._tracing is None else self._tracing.sampled(message.body)
        if self._tracing is None or parent is None:
            return await self._bring(message, None)
        span = self._tracing.start(
            "fan-out notify.topic.{topic}", "process", parent=parent, template="notify.topic.{topic}", group=FANOUT
        )
        with self._tracing.within(span):
            done = await self._bring(message, span)
        self._tracing.end(span, None if done else "dead_letter")
        return done

    async def _bring(self, message: _Message, span: Span | None) -> bool:
        """Bring one message to all subscribers, however long it takes; False when it is a dead letter instead."""
        try:
            topic = subject.topic_of(message.where)
            envelope = self._read(message.body)
        except (BadTopic, InvalidNotification) as error:
            await self._bury(message, error.code, str(error))
            return False
        body = message.body if envelope.topic == topic else _with_topic(message.body, topic)
        async with aclosing(self._crowd(topic)) as crowd:
            users: list[str] = []
            async for some in crowd:
                users += some
                if len(users) > self._settings.fanout_write_max:
                    break
            if not users:
                self._done(message, "nobody")
                return True
            many = len(users) > self._settings.fanout_write_max
            plane = await self._decide(message, "broadcast" if many else "copies")
            if plane == "broadcast":
                if span is not None and self._tracing is not None:
                    body = self._tracing.handed_on(body, span)
                await self._broadcast(message, topic, body)
                self._done(message, "broadcast")
                return True
            if span is not None and self._tracing is not None:
                traced, users = users[:_TRACED], users[_TRACED:]
                await asyncio.gather(*(self._copy_traced(span, user, envelope.id, body) for user in traced))
                body = self._tracing.handed_on(body, span, sampled=False)
            await self._copy_all(users, envelope.id, body)
            async for some in crowd:
                await self._copy_all(some, envelope.id, body)
        self._done(message, "copies")
        return True

    def _done(self, message: _Message, way: str) -> None:
        if self._numbers is not None:
            self._numbers.done(way, message.delivery.stored_ns)

    async def _copy_traced(self, span: Span, user: str, id: str, body: bytes) -> None:
        """One becomes many: a copy has a trace of its own, with a link to the message that it is of."""
        assert self._tracing is not None
        where = "notify.user.{user}"
        links = [span.get_span_context()]
        copy = self._tracing.start(f"publish {where}", "send", links=links, template=where, message__id=id)
        await self._copy([user], id, self._tracing.handed_on(body, copy))
        self._tracing.end(copy)

    async def _crowd(self, topic: str) -> AsyncGenerator[list[str], None]:
        """All subscribers of the topic itself and of each subtree that it lies in, page by page."""
        served: set[str] = set()
        for pattern in patterns_of(topic):
            after: str | None = None
            while True:
                page = await self._subscribers(pattern, after)
                users = [user for user in dict.fromkeys(page.users) if user not in served]
                if len(served) < _REMEMBERED:
                    served.update(users)
                yield users
                after = page.next
                if after is None:
                    break

    async def _decide(self, message: _Message, plane: _Plane) -> _Plane:
        """How the message goes out: what is noted here first holds for every agent and every attempt."""
        id = f"{message.delivery.stream_sequence}.{message.delivery.stored_ns}"
        backoff = Backoff(0.1, 5.0)
        while True:
            try:
                held = await once.first(self._connection, DECISIONS, subject.DECIDED, id, plane.encode())
            except StreamUnavailable as error:
                await self._wait(backoff, f"a decision waits: {error}")
            else:
                return "broadcast" if held == b"broadcast" else "copies"

    async def _broadcast(self, message: _Message, topic: str, body: bytes) -> None:
        """Have the log store the one message, however often it takes."""
        headers = {"Nats-Msg-Id": f"{message.delivery.stream_sequence}.{message.delivery.stored_ns}"}
        backoff = Backoff(0.1, 5.0)
        while True:
            try:
                await self._connection.store(subject.broadcast(topic), body, headers)
                return
            except StreamUnavailable as error:
                await self._wait(backoff, f"a broadcast to {topic} waits: {error}")

    async def _wait(self, backoff: Backoff, problem: str) -> None:
        delay = backoff.next()
        self.log.warning("%.1f s: %s", delay, problem)
        await asyncio.sleep(delay)

    async def _subscribers(self, pattern: str, after: str | None) -> SubscriberPage:
        backoff = Backoff(0.1, 5.0)
        while True:
            try:
                work = self._store.subscribers(pattern, after, 4 * _SLICE)
                return await (work if self._numbers is None else self._numbers.calls.timed("subscribers", work))
            except StoreUnavailable as error:
                await self._wait(backoff, f"{self._held} topic messages wait for the store: {error}")

    async def _copy_all(self, users: list[str], id: str, body: bytes) -> None:
        for at in range(0, len(users), _SLICE):
            await self._copy(users[at : at + _SLICE], id, body)

    async def _copy(self, users: list[str], id: str, body: bytes) -> None:
        """Have the log store these copies, however often it takes."""
        backoff = Backoff(0.1, 5.0)
        while True:
            async with self._turns:
                try:
                    await self._publisher.publish_copies(users, id, body)
                    if self._numbers is not None:
                        self._numbers.copies.value += len(users)
                    return
                except (PublishUnconfirmed, PublishRefused, StreamUnavailable) as error:
                    problem = error
            await self._wait(backoff, f"{len(users)} copies of {id} wait for the log: {problem}")

    async def _bury(self, message: _Message, reason: str, detail: str) -> None:
        """Make a dead letter of what is no notification; unacknowledged until that is durable."""
        delivery = message.delivery
        self.log.warning("message %d on %s is a dead letter: %s", delivery.stream_sequence, message.where, detail)
        try:
            await consumers.bury(
                self._connection,
                "topic",
                message.body,
                key=f"invalid.{TOPICS}.{delivery.stored_ns}.{delivery.stream_sequence}",
                reason=reason,
                detail=detail,
                origin_subject=message.where,
                stream=TOPICS,
                sequence=delivery.stream_sequence,
                attempts=delivery.delivered,
            )
        except StreamUnavailable as error:
            self.log.warning("the dead letter waits for its redelivery: %s", error)
        else:
            if self._numbers is not None:
                self._numbers.buried(reason)
            self._connection.ack(message.reply, b"+TERM")


def _with_topic(body: bytes, topic: str) -> bytes:
    """The event with its topic, by which the inbox finds it; as it came where it has no room for that."""
    event = orjson.loads(body)
    event["topic"] = topic
    named = orjson.dumps(event)
    return named if len(named) <= MAX_BODY_BYTES else body
