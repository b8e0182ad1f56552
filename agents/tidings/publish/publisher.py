"""The Publisher: notifications into the log, each confirmed, any number under way.

::

    async with Publisher("nats://127.0.0.1:4222", source="shop") as publisher:
        receipt = await publisher.publish("alice", "order.sent", {"order": 17})

Any NATS client may publish without it: ``js.publish("notify.user.alice", body)`` with a CloudEvent as body. What
this adds is the id, the time, the message id that makes a retry the same notification, the escape, the retries and
the errors.
"""

from __future__ import annotations

import asyncio
import secrets
from collections import deque
from collections.abc import AsyncIterable, AsyncIterator, Iterable
from datetime import datetime
from types import TracebackType
from typing import Any, Final, NamedTuple, Self
from urllib.parse import quote

import orjson

from tidings.runtime.backoff import Backoff
from tidings.runtime.settings import Settings
from tidings.stream.connection import Connection, connect
from tidings.stream.consumers import status_of
from tidings.wire import subject
from tidings.wire.errors import PublishRefused, PublishUnconfirmed
from tidings.wire.notification import build, check

__all__ = ["Event", "Publisher", "Receipt"]

_ATTEMPT_S: Final = 2.0
_TEMPORARY: Final = 503
_HINTS: Final = {
    10054: "the notification is larger than the log takes: send a reference instead of the content",
    10077: "the log is full: raise stream_max_bytes, or find out why notifications come so fast",
}


class Receipt(NamedTuple):
    """The log has it, durably."""

    id: str
    stream: str
    seq: int
    duplicate: bool
    """It was there already: this was a retry."""


class Event(NamedTuple):
    """One notification of `Publisher.publish_many`."""

    user: str
    type: str
    data: Any = None
    id: str | None = None


class Publisher:
    """Publishes to users. Safe to use from many tasks at a time; a publish costs one future and a share of a write.

    `nats` is a connection (which stays open), settings, or the address of a server. `timeout_s` bounds one
    publish with all its retries.
    """

    def __init__(self, nats: Connection | Settings | str, *, source: str = "tidings", timeout_s: float = 30.0) -> None:
        self._given = nats
        self._source = source
        self._timeout_s = timeout_s
        self._connection: Connection | None = nats if isinstance(nats, Connection) else None
        self._inbox = f"_INBOX.{secrets.token_hex(11)}"
        self._waiting: dict[bytes, asyncio.Future[dict[str, Any]]] = {}
        self._number = 0
        self._listening: Any = None

    async def open(self) -> None:
        """Connect; raises `StreamUnavailable` when nobody is there."""
        if self._connection is None:
            given = Settings(nats_url=self._given) if isinstance(self._given, str) else self._given
            assert isinstance(given, Settings)
            self._connection = await connect(given, "tidings-publisher")
        self._listening = await self._connection.listen(f"{self._inbox}.*", self._answered)

    async def close(self) -> None:
        """Let go; what is under way is not waited for. Closing twice is fine."""
        connection, self._connection = self._connection, None
        if connection is not None and connection is not self._given:
            await connection.finish()
        elif connection is not None and self._listening is not None:
            connection.handlers.pop(b"%d" % self._listening._id, None)
            await self._listening.unsubscribe()
        self._listening = None

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
        **attributes: Any,
    ) -> Receipt:
        """Publish to a user; returns when the log has it, durably.

        `attributes` are CloudEvents extension attributes (``collapsekey``, ``priority`` …). Raises `BadSubject` or
        `InvalidNotification` before anything is sent, `PublishRefused` when the log says no for good, and
        `PublishUnconfirmed` when nobody confirmed within `timeout_s`: then publish again with the same id.
        """
        where = subject.notify_user(user)
        id, body = build(type=type, data=data, source=self._source, id=id, time=time, **attributes)
        return await self._store(where, id, body)

    async def publish_body(self, user: str, body: bytes) -> Receipt:
        """Publish a CloudEvent that is ready; otherwise like `publish`."""
        where = subject.notify_user(user)
        return await self._store(where, check(body).id, body)

    async def publish_many(
        self, events: Iterable[Event] | AsyncIterable[Event], *, in_flight: int = 256
    ) -> AsyncIterator[Receipt]:
        """Publish in a pipeline; yields receipts in the order of `events`, at most `in_flight` unconfirmed.

        An event that fails raises its error where its receipt would be; those behind it are given up unconfirmed.
        """
        under_way: deque[asyncio.Task[Receipt]] = deque()
        try:
            async for event in _each(events):
                under_way.append(asyncio.ensure_future(self.publish(event.user, event.type, event.data, id=event.id)))
                if len(under_way) >= in_flight:
                    yield await under_way.popleft()
            while under_way:
                yield await under_way.popleft()
        finally:
            for task in under_way:
                task.cancel()
            await asyncio.gather(*under_way, return_exceptions=True)

    async def _store(self, where: str, id: str, body: bytes) -> Receipt:
        backoff = Backoff(0.05, 2.0)
        problem = "nobody answered"
        header = _header(where, id)
        try:
            async with asyncio.timeout(self._timeout_s):
                while True:
                    answer = await self._attempt(where, header, body)
                    error = answer.get("error")
                    if error is None:
                        duplicate = bool(answer.get("duplicate"))
                        return Receipt(id, answer["stream"], answer["seq"], duplicate)
                    problem = str(error.get("description", "no reason given"))
                    if error.get("code") != _TEMPORARY:
                        hint = _HINTS.get(error.get("err_code", 0), "")
                        raise PublishRefused(f"the log refuses {id}: {problem}" + (f"; {hint}" if hint else ""))
                    await asyncio.sleep(backoff.next())
        except TimeoutError:
            raise PublishUnconfirmed(
                f"{id} was not confirmed within {self._timeout_s:g} s ({problem}): publish it again with the same id"
            ) from None

    async def _attempt(self, where: str, header: bytes, body: bytes) -> dict[str, Any]:
        """Send once and wait for the confirmation; no answer is an answer with a temporary error."""
        if self._connection is None:
            raise PublishRefused("the publisher is closed")
        self._number += 1
        key = b"%b.%d" % (self._inbox.encode(), self._number)
        future = self._waiting[key] = asyncio.get_running_loop().create_future()
        try:
            if not self._connection.send(where, body, key.decode(), header):
                return {"error": {"code": _TEMPORARY, "description": "no connection to NATS"}}
            async with asyncio.timeout(_ATTEMPT_S):
                answer: dict[str, Any] = await future
                return answer
        except TimeoutError:
            return {"error": {"code": _TEMPORARY, "description": "no confirmation came"}}
        finally:
            del self._waiting[key]

    def _answered(self, where: bytes, reply: bytes, header: bytes | None, payload: bytes) -> None:
        future = self._waiting.get(where)
        if future is None or future.done():
            return
        if header is not None and not payload:
            status, _ = status_of(header)
            hint = "no stream stores this subject: is the topology applied and the mapping in force?"
            future.set_result({"error": {"code": status, "description": hint}})
        else:
            future.set_result(orjson.loads(payload))


def _header(where: str, id: str) -> bytes:
    """The message id names user and notification: users share a partition's stream, and may share an event's id."""
    token = where.rpartition(".")[2]
    return b"NATS/1.0\r\nNats-Msg-Id: %b/%b\r\n\r\n" % (token.encode(), quote(id, safe="").encode())


async def _each(events: Iterable[Event] | AsyncIterable[Event]) -> AsyncIterator[Event]:
    if isinstance(events, AsyncIterable):
        async for event in events:
            yield event
    else:
        for event in events:
            yield event
