"""The Publisher: notifications into the log, each confirmed, any number under way.

::

    async with Publisher("nats://127.0.0.1:4222", source="shop") as publisher:
        receipt = await publisher.publish("alice", "order.sent", {"order": 17})
        async for receipt in publisher.publish_many(Event(user, "sale.began") for user in users):
            print(receipt.id, "is stored")

Any NATS client may publish without it: ``js.publish("notify.user.alice", body)`` with a CloudEvent as body. What
this adds is the id, the time, the message id that makes a retry the same notification, the escape, the retries and
the errors.

A publish costs a future, an entry under its reply subject, and its share of one write to NATS a loop turn: no
task and no timer, unless it waits.
"""

from __future__ import annotations

import asyncio
import inspect
import logging
from collections import deque
from collections.abc import AsyncGenerator, AsyncIterable, Awaitable, Callable, Iterable, Sequence
from datetime import datetime
from types import TracebackType
from typing import TYPE_CHECKING, Any, Final, NamedTuple, Self

from tidings.runtime.backoff import Backoff
from tidings.runtime.settings import Settings
from tidings.schema import Schemas
from tidings.stream.connection import Connection, Subscription, connect
from tidings.wire import subject
from tidings.wire.errors import PublishRefused, PublishUnconfirmed, StreamUnavailable, TidingsError
from tidings.wire.notification import build, check

from .attempt import Attempt, Event, Ready, Receipt, Verdict, read_answer

if TYPE_CHECKING:
    from tidings.telemetry.tracing import Span, Tracing

__all__ = ["Publisher"]

_ATTEMPT_S: Final = 2.0
"""How long a confirmation may take before the notification is sent again under the same id."""
_TO_USER: Final = "notify.user.{user}"
_TO_TOPIC: Final = "notify.topic.{topic}"
"""How spans name what is published to."""
_ELECTION_S: Final = 3.0
"""How long it may take until some server answers for a stream; after that there is none."""

log = logging.getLogger("tidings.publish")

Failed = Callable[[Event, TidingsError], Awaitable[None] | None]


class _Fed(NamedTuple):
    """An event of `publish_many`, with the id that it got, and what became of it so far."""

    event: Event
    attempt: Attempt | TidingsError


class Publisher:
    """Publishes to users. Safe to use from many tasks at a time.

    `nats` is a connection (which stays open), settings, or the address of a server. `timeout_s` bounds one
    publish with all its retries. With `schemas`, what the schema of its type forbids is refused before anything is
    sent (`SchemaViolation`, an `InvalidNotification`). With `tracing` (`tidings.telemetry.tracing.Tracing()` is that of
    the application's own OpenTelemetry; needs tidings[otel]) each sampled publish is a span, and the event has its
    ``traceparent``; one that the event has already stays, and is what the span belongs to.
    """

    def __init__(
        self,
        nats: Connection | Settings | str,
        *,
        source: str = "tidings",
        timeout_s: float = 30.0,
        schemas: Schemas | None = None,
        tracing: Tracing | None = None,
    ) -> None:
        self._tracing = tracing
        self._given = nats
        self._schemas = schemas
        self._source = source
        self._timeout_s = timeout_s
        self._connection: Connection | None = None
        self._inbox = ""
        self._waiting: dict[bytes, Attempt] = {}
        self._number = 0
        self._listening: Subscription | None = None

    async def open(self) -> None:
        """Connect; raises `StreamUnavailable` when nobody is there, `BadSettings` for credentials that are none."""
        if isinstance(self._given, Connection):
            self._connection = self._given
        else:
            settings = Settings(nats_url=self._given) if isinstance(self._given, str) else self._given
            self._connection = await connect(settings, "tidings-publisher")
        # Under the connection's own prefix: nothing else may be open to it.
        self._inbox = f"{self._connection.new_inbox()}."
        self._connection.forbidden_handlers.add(self._forbidden)
        try:
            self._listening = await self._connection.listen(f"{self._inbox}*", self._answered)
        except BaseException:
            await self.close()
            raise

    async def close(self) -> None:
        """Let go. What is under way raises `PublishUnconfirmed`. Closing twice is fine."""
        connection, self._connection = self._connection, None
        listening, self._listening = self._listening, None
        for attempt in self._waiting.values():
            attempt.settle(Verdict.closed())
        if connection is None:
            return
        connection.forbidden_handlers.discard(self._forbidden)
        if connection is not self._given:
            await connection.finish()
        elif listening is not None:
            connection.handlers.pop(b"%d" % listening._id, None)
            if not connection.is_closed:
                await listening.unsubscribe()

    async def __aenter__(self) -> Self:
        await self.open()
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        await self.close()

    async def publish(
        self,
        user: str,
        type: str,
        data: Any = None,
        *,
        id: str | None = None,
        time: datetime | None = None,
        topic: str | None = None,
        **attributes: Any,
    ) -> Receipt:
        """Publish to a user; returns when the log has it, durably.

        `attributes` are CloudEvents extension attributes (``collapsekey``, ``priority`` …). Raises `BadSubject` or
        `InvalidNotification` before anything is sent, `PublishRefused` when the log says no for good, and
        `PublishUnconfirmed` when nobody confirmed within `timeout_s`: then publish again with the same id.
        """
        where = subject.notify_user(user)
        built = self._build(_TO_USER, type=type, data=data, id=id, time=time, topic=topic, **attributes)
        return await self._confirmed(self._begin(where, *built))

    async def publish_topic(
        self,
        topic: str,
        type: str,
        data: Any = None,
        *,
        id: str | None = None,
        time: datetime | None = None,
        **attributes: Any,
    ) -> Receipt:
        """Publish to everybody who has subscribed to the topic; otherwise like `publish`. Raises `BadTopic` too."""
        where = subject.notify_topic(topic)
        built = self._build(_TO_TOPIC, type=type, data=data, id=id, time=time, topic=topic, **attributes)
        return await self._confirmed(self._begin(where, *built))

    async def publish_body(self, user: str, body: bytes) -> Receipt:
        """Publish a CloudEvent that is ready; otherwise like `publish`."""
        where = subject.notify_user(user)
        envelope = check(body) if self._schemas is None else self._schemas.check(body)
        return await self._confirmed(self._begin(where, envelope.id, body))

    async def publish_copies(self, users: Sequence[str], id: str, body: bytes) -> None:
        """Publish one ready CloudEvent, whose id is given, to many users at once.

        Returns when the log has all copies. When some were not confirmed it raises the first one's error, with all
        others settled: repeated, it adds nothing to those that are there.
        """
        for outcome in await self.publish_ready([Ready(subject.notify_user(user), id, body) for user in users]):
            if isinstance(outcome, TidingsError):
                raise outcome

    async def publish_ready(self, messages: Sequence[Ready]) -> list[Receipt | TidingsError]:
        """Publish messages that are ready, all at once; returns what became of each, in their order.

        An error is one that `publish` raises for it. The caller bounds how many are under way.
        """
        attempts = [self._begin(*message) for message in messages]
        outcomes: list[Receipt | TidingsError] = []
        try:
            for attempt in attempts:
                try:
                    outcomes.append(await self._confirmed(attempt))
                except TidingsError as error:
                    outcomes.append(error)
        finally:
            for attempt in attempts:
                self._waiting.pop(attempt.key, None)
        return outcomes

    async def publish_many(
        self,
        events: Iterable[Event | tuple[Any, ...]] | AsyncIterable[Event | tuple[Any, ...]],
        *,
        in_flight: int = 256,
        on_error: Failed | None = None,
    ) -> AsyncGenerator[Receipt, None]:
        """Publish in a pipeline; yields receipts in the order of `events`, at most `in_flight` unconfirmed.

        `events` are of `Event`, or tuples of its members: ``(user, type, data)``. One that fails goes to `on_error`,
        in its turn and with its id, and the rest goes on. Without `on_error` its error is raised in its turn, with
        a note that names it; what is under way behind it is then given up, stored or not.
        """
        if in_flight < 1:
            raise ValueError(f"in_flight is {in_flight}: it must be at least 1")
        under_way: deque[_Fed] = deque()
        room = asyncio.Semaphore(in_flight)
        news = asyncio.Event()
        feeder = asyncio.create_task(self._feed(events, under_way, room, news))
        number = 0
        try:
            while True:
                while not under_way:
                    if feeder.done():
                        feeder.result()
                        return
                    news.clear()
                    await news.wait()
                event, attempt = under_way[0]
                receipt = None
                try:
                    if isinstance(attempt, TidingsError):
                        raise attempt
                    receipt = await self._confirmed(attempt)
                except TidingsError as error:
                    if on_error is None:
                        error.add_note(f"in publish_many: event {number}, to {event.user!r}, id {event.id!r}")
                        raise
                    told = on_error(event, error)
                    if inspect.isawaitable(told):
                        await told
                under_way.popleft()
                room.release()
                number += 1
                if receipt is not None:
                    yield receipt
        finally:
            feeder.cancel()
            # Whatever it failed of came out above, or nobody asks any more.
            await asyncio.gather(feeder, return_exceptions=True)
            for _, attempt in under_way:
                if isinstance(attempt, Attempt):
                    self._waiting.pop(attempt.key, None)

    async def _feed(
        self,
        events: Iterable[Event | tuple[Any, ...]] | AsyncIterable[Event | tuple[Any, ...]],
        under_way: deque[_Fed],
        room: asyncio.Semaphore,
        news: asyncio.Event,
    ) -> None:
        """Send each event as soon as there is room for it, while the receipts of those before are waited for."""
        try:
            if isinstance(events, AsyncIterable):
                async for event in events:
                    await room.acquire()
                    under_way.append(self._begin_event(Event(*event)))
                    news.set()
            else:
                for event in events:
                    await room.acquire()
                    under_way.append(self._begin_event(Event(*event)))
                    news.set()
        finally:
            news.set()

    def _begin_event(self, event: Event) -> _Fed:
        """Send an event; its mistakes are kept for its turn."""
        try:
            where = subject.notify_user(event.user)
            id, body, span = self._build(
                _TO_USER, type=event.type, data=event.data, id=event.id, time=event.time, **event.attributes
            )
            attempt = self._begin(where, id, body, span)
        except TidingsError as error:
            return _Fed(event, error)
        return _Fed(event if event.id == id else event._replace(id=id), attempt)

    # One publish

    def _build(self, template: str, **event: Any) -> tuple[str, bytes, Span | None]:
        span: Span | None = None
        if self._tracing is not None:
            given = event.get("traceparent")
            span = self._tracing.publish(template, given=given)
            if span is not None and given is None:
                event["traceparent"] = self._tracing.traceparent(span)
        try:
            id, body = build(source=self._source, **event)
            if self._schemas is not None:
                self._schemas.check(body)
        except TidingsError as error:
            if self._tracing is not None:
                self._tracing.end(span, error)
            raise
        return id, body, span

    def _begin(self, where: str, id: str, body: bytes, span: Span | None = None) -> Attempt:
        """Send once, without waiting; `_confirmed` sees to the rest. Whatever begins here must end there."""
        if self._connection is None:
            raise StreamUnavailable("the publisher is not open: use `async with`")
        self._number += 1
        attempt = Attempt(where, id, body, f"{self._inbox}{self._number}")
        attempt.span = span
        self._waiting[attempt.key] = attempt
        self._send(attempt)
        return attempt

    def _send(self, attempt: Attempt) -> None:
        """Every attempt has the same reply subject: a late answer to an earlier one is as good."""
        loop = asyncio.get_running_loop()
        attempt.sent(loop.create_future(), loop.time())
        if self._connection is None:
            attempt.settle(Verdict.closed())
        elif not self._connection.send(attempt.where, attempt.body, attempt.reply, attempt.header):
            attempt.settle(Verdict.temporary("there is no connection to NATS"))

    def _answered(self, where: bytes, reply: bytes, header: bytes | None, payload: bytes) -> None:
        attempt = self._waiting.get(where)
        if attempt is None:
            return
        verdict = read_answer(header, payload)
        if verdict is None:
            log.warning(
                "somebody else than JetStream answers on %s: is it meant to be subscribed there?", attempt.where
            )
        else:
            attempt.settle(verdict)

    def _forbidden(self) -> None:
        """End what the server does not let these credentials publish: nobody else answers it."""
        connection = self._connection
        if connection is None:
            return
        refused = [attempt for attempt in self._waiting.values() if connection.may_not_publish(attempt.where)]
        # The server's word has no case: of two subjects that differ in nothing else it is not known which it means.
        if len({attempt.where for attempt in refused}) == 1:
            for attempt in refused:
                attempt.settle(Verdict.forbidden(attempt))

    async def _confirmed(self, attempt: Attempt) -> Receipt:
        """Wait for the log's word, and send again until there is one."""
        clock = asyncio.get_running_loop().time
        deadline = attempt.began + self._timeout_s
        backoff: Backoff | None = None
        problem: BaseException | None = None
        try:
            while True:
                verdict = await attempt.verdict(min(attempt.last_sent + _ATTEMPT_S, deadline))
                if verdict.stream is not None:
                    return Receipt(attempt.id, verdict.stream, verdict.seq, verdict.duplicate)
                no_stream = verdict.unheard and attempt.last_sent - attempt.began > _ELECTION_S
                if verdict.final or no_stream:
                    raise PublishRefused(f"the log refuses {attempt.id}: {verdict.problem}")
                backoff = backoff or Backoff(0.05, 2.0)
                # From when it was sent: one that was waited for long enough, in a pipeline too, goes again at once.
                next_time = max(clock(), attempt.last_sent + backoff.next())
                if verdict.is_closed or next_time >= deadline:
                    raise PublishUnconfirmed(
                        f"{attempt.id} was not confirmed within {clock() - attempt.began:.1f} s "
                        f"({verdict.problem}): publish it again with the same id"
                    )
                await asyncio.sleep(next_time - clock())
                self._send(attempt)
        except BaseException as error:
            problem = error
            raise
        finally:
            self._waiting.pop(attempt.key, None)
            if attempt.span is not None and self._tracing is not None:
                self._tracing.end(attempt.span, problem, messaging__message__id=attempt.id)
