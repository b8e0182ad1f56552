"""The inbox agent's other half: broadcasts, each stored once.

Reads: ``BROADCAST``, through the shared durable consumer ``inbox``.
Writes: broadcasts to the store; dead letters to ``DEAD``.
Acks when: the broadcast is durable in the store, or the body is durable as a dead letter.
Crash costs: nothing, as with the personal plane.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable, Coroutine
from typing import TYPE_CHECKING, Any, Final

from tidings.runtime.backoff import Backoff
from tidings.store.port import Broadcast, Store
from tidings.stream import consumers
from tidings.stream.connection import Connection
from tidings.stream.topology import BROADCAST, INBOX
from tidings.wire import subject
from tidings.wire.errors import BadTopic, InvalidNotification, RowsRefused, StoreUnavailable, StreamUnavailable
from tidings.wire.notification import check
from tidings.wire.position import Position

if TYPE_CHECKING:
    from .numbers import InboxNumbers

__all__ = ["BroadcastWriter"]

_BATCH: Final = 64
"""Broadcasts that are under way, and one write to the store."""
_PULL_EXPIRES_NS: Final = 30_000_000_000

log = logging.getLogger("tidings.inbox")


class BroadcastWriter:
    """Stores what comes, batch after batch: while one is being stored the next is not asked for."""

    def __init__(
        self,
        agent: str,
        connection: Connection,
        store: Store,
        incarnation: Callable[[], int],
        spawn: Callable[[Coroutine[Any, Any, None]], asyncio.Task[None]],
        numbers: InboxNumbers | None,
    ) -> None:
        self._numbers = numbers
        self._agent = agent
        self._connection = connection
        self._store = store
        self._incarnation = incarnation
        self._spawn = spawn
        self._rows: list[Broadcast] = []
        self._replies: list[bytes] = []
        self._pulls = 0
        self._pull_left = 0
        self._writing = False

    async def listen(self) -> None:
        await self._connection.listen(subject.broadcast_pull(self._agent, "*"), self._receive)

    def pull(self) -> None:
        """Ask for the next ones; what was asked for before counts no longer."""
        if self._writing:
            # When it is done it asks.
            self._pull_left = 0
            return
        self._pulls += 1
        self._pull_left = _BATCH
        where = subject.broadcast_pull(self._agent, self._pulls)
        consumers.pull(self._connection, BROADCAST, INBOX, where, batch=_BATCH, expires_ns=_PULL_EXPIRES_NS)

    def pull_where_none(self) -> None:
        """A pull that was refused is tried again."""
        if self._pull_left <= 0:
            self.pull()

    def _receive(self, where: bytes, reply: bytes, header: bytes | None, body: bytes) -> None:
        if not reply:
            if header is not None and int(where.rpartition(b".")[2]) == self._pulls:
                self._pull_left = 0
                if consumers.status_of(header)[0] == 408:
                    self.pull()
            return
        self._pull_left -= 1
        delivery = consumers.parse_reply(reply)
        try:
            topic = subject.topic_of(subject.readable(where))
            envelope = check(body)
        except (BadTopic, InvalidNotification) as error:
            self._spawn(self._bury(subject.readable(where), body, reply, error.code, str(error)))
            return
        at = Position(self._incarnation(), delivery.stream_sequence)
        self._rows.append(Broadcast(topic, at, envelope.id, envelope.type, delivery.stored_ns, body))
        self._replies.append(reply)
        if not self._writing:
            self._writing = True
            self._spawn(self._write())

    async def _write(self) -> None:
        """Store what has come together, and what comes meanwhile."""
        try:
            while self._rows:
                rows, self._rows = self._rows, []
                replies, self._replies = self._replies, []
                refused = await self._stored(rows)
                for index, reason in refused.items():
                    where = subject.broadcast(rows[index].topic)
                    await self._bury(where, rows[index].body, replies[index], RowsRefused.code, reason)
                self._connection.ack_all([reply for index, reply in enumerate(replies) if index not in refused])
        finally:
            self._writing = False
        self.pull_where_none()

    async def _stored(self, rows: list[Broadcast]) -> dict[int, str]:
        """Store rows durably, however long it takes; returns the reasons of those that cannot be, by index."""
        backoff = Backoff(0.1, 5.0)
        while True:
            try:
                if self._numbers is None:
                    await self._store.append_broadcasts(rows)
                else:
                    await self._numbers.calls.timed("append_broadcasts", self._store.append_broadcasts(rows))
                    self._numbers.stored("broadcast", [row.stored_ns for row in rows])
            except RowsRefused as error:
                return dict(error.reasons)
            except StoreUnavailable as error:
                delay = backoff.next()
                log.warning("%d broadcasts wait %.1f s for the store: %s", len(rows), delay, error)
                await asyncio.sleep(delay)
            else:
                return {}

    async def _bury(self, where: str, body: bytes, reply: bytes, reason: str, detail: str) -> None:
        """Make a dead letter of what is no notification; unacknowledged until that is durable."""
        delivery = consumers.parse_reply(reply)
        log.warning("message %d on %s is a dead letter: %s", delivery.stream_sequence, where, detail)
        try:
            await consumers.bury(
                self._connection,
                "broadcast",
                body,
                key=f"invalid.{BROADCAST}.{delivery.stored_ns}.{delivery.stream_sequence}",
                reason=reason,
                detail=detail,
                origin_subject=where,
                stream=BROADCAST,
                sequence=delivery.stream_sequence,
                attempts=delivery.delivered,
            )
        except StreamUnavailable as error:
            log.warning("the dead letter waits for its redelivery: %s", error)
        else:
            if self._numbers is not None:
                self._numbers.buried(reason)
            self._connection.ack(reply, b"+TERM")
