"""The `Store` on CQL.

A user's notifications are written once and read by position; what the user does with them is kept beside, in one
partition of some thirty bytes a notification. No write reads first where it is hot, and none needs a lock or an
agreement among nodes: write timestamps decide.

- What is appended is written with JetStream's storing time **less a day**. So a mark, whose timestamp is now, wins
  against the append of its row, whichever comes first, and however often the append is repeated; clocks may differ
  by hours.
- A row of kind *unread* is the truth about unread, by its presence. Reading deletes it, reading all deletes a range,
  and both also hold against an append that comes later. The badge counts at most a hundred of them.
- Archiving deletes it with a timestamp **of tomorrow**: an ``unread`` of another device in the same moment does not
  bring it back, and later ones look first.
- Marks of all are watermarks, kept as sets of which the highest counts.
- A device's state is one cell, written with timestamps that begin at its claim: a session that lost its device
  writes below its successor's timestamp, which changes nothing (a fencing token). Each write is read back, many
  devices a request, so that whoever lost a device learns it.
- A broadcast is written once, and without its body once a pattern; nothing of it is ever changed.

Costs at the server: a notification is one row of its body and one of thirty bytes; a badge one read; a page two or
three reads; a device one write a flush, and its share of a read.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, Final

from tidings.store.export import exported_cursor
from tidings.store.port import (
    Broadcast,
    Claimed,
    CursorUpdate,
    DeliveredMark,
    DeviceCursor,
    EndedSubscription,
    Holder,
    InboxItem,
    InboxPage,
    InboxRow,
    Lost,
    MarkAllAs,
    PageQuery,
    SubscriberPage,
    Subscription,
)
from tidings.wire.errors import StoreUnavailable
from tidings.wire.frames import MarkAs
from tidings.wire.position import Position

from . import schema
from .broadcasts import Broadcasts
from .database import Database, Where
from .devices import Devices
from .encoding import Clock, pack, unpack
from .inbox import Inbox
from .statements import statements
from .subscriptions import Subscribing

__all__ = ["CqlStore"]

_DAY_S: Final = 86_400


class CqlStore:
    """The `Store` port on ScyllaDB or Apache Cassandra. The schema is applied beforehand (`schema.apply`)."""

    def __init__(self, where: Where, *, retention_days: int = 90) -> None:
        self._where = where
        self._retention_s = retention_days * _DAY_S
        self._clock = Clock()
        self._database = Database(where)
        self._sql: dict[str, Any] = {}
        self._inbox = Inbox(self._database, self._sql, self._clock, self._retention_s)
        self._devices = Devices(self._database, self._sql, self._clock, self._retention_s)
        self._subscribing = Subscribing(self._database, self._sql, self._clock, self._retention_s)
        self._broadcasts = Broadcasts(self._database, self._sql, self._clock, self._retention_s)
        self._open = False
        self._closed = False
        self._busy = 0
        self._idle = asyncio.Event()
        self._closing: asyncio.Task[None] | None = None

    # Life

    async def open(self) -> None:
        if self._closed:
            raise self._is_closed()
        await self._database.connect()
        try:
            await schema.verify(self._database)
            self._sql.update(await self._database.prepare(statements(self._where.keyspace)))
        except BaseException:
            await self._database.close()
            raise
        self._open = True

    async def close(self) -> None:
        self._open, self._closed = False, True
        if self._closing is None:
            self._closing = asyncio.ensure_future(self._close())
        await asyncio.shield(self._closing)

    async def _close(self) -> None:
        if self._busy:
            await self._idle.wait()
        await self._database.close()

    def _is_closed(self) -> StoreUnavailable:
        return StoreUnavailable(f"the store {self._where} is closed")

    @contextmanager
    def _call(self) -> Iterator[None]:
        """One call of the port: closing waits for it."""
        if not self._open:
            raise self._is_closed()
        self._busy += 1
        try:
            yield
        finally:
            self._busy -= 1
            self._rest()

    def _rest(self) -> None:
        if not self._busy and self._closed:
            self._idle.set()

    # The port

    async def check(self) -> None:
        with self._call():
            now = self._clock.now()
            await self._database.write(self._sql["probe"].bind((now, now)))
            await self._database.read(self._sql["probed"])

    async def append(self, rows: Sequence[InboxRow]) -> None:
        with self._call():
            await self._inbox.append(rows)

    async def floors(self) -> dict[int, Position]:
        with self._call():
            found = await self._database.read(self._sql["floors"])
            return {part: unpack(floor) for part, floor in found}

    async def note_floors(self, floors: Mapping[int, Position]) -> None:
        with self._call():
            now, note = self._clock.now(), self._sql["note_floor"]
            await self._database.write(
                self._database.batch(note.bind((now, pack(floor), part)) for part, floor in floors.items())
            )

    async def page(self, user: str, query: PageQuery) -> InboxPage:
        with self._call():
            return await self._inbox.page(user, query)

    async def between(self, user: str, after: Position, upto: Position, limit: int) -> list[InboxItem]:
        with self._call():
            return await self._inbox.between(user, after, upto, limit)

    async def missed(self, user: str, after: Position, upto: Position) -> int:
        with self._call():
            return await self._inbox.missed(user, after, upto)

    async def unread(self, user: str) -> int:
        with self._call():
            return await self._inbox.unread(user)

    async def mark(self, user: str, positions: Sequence[Position], as_: MarkAs) -> None:
        with self._call():
            await self._inbox.mark(user, positions, as_)

    async def mark_all(self, user: str, upto: Position, as_: MarkAllAs) -> None:
        with self._call():
            await self._inbox.mark_all(user, upto, as_)

    async def delivered(self, marks: Sequence[DeliveredMark]) -> None:
        with self._call():
            await self._inbox.delivered(marks)

    async def claim(self, user: str, device: str, holder: Holder, floor: Position) -> Claimed:
        with self._call():
            return await self._devices.claim(user, device, holder, floor)

    async def save(self, updates: Sequence[CursorUpdate]) -> list[Lost]:
        with self._call():
            return await self._devices.save(updates)

    async def holders(self, user: str) -> list[Holder]:
        with self._call():
            return await self._devices.holders(user)

    async def devices(self, user: str) -> list[DeviceCursor]:
        with self._call():
            return await self._devices.devices(user)

    async def subscribe(self, user: str, topics: Sequence[str], most: int, since: Position) -> None:
        with self._call():
            await self._subscribing.add(user, topics, most, since)

    async def unsubscribe(self, user: str, topics: Sequence[str], until: Position) -> None:
        with self._call():
            await self._subscribing.remove(user, topics, until)

    async def subscriptions(self, user: str, after: str | None, limit: int) -> list[Subscription]:
        with self._call():
            return await self._subscribing.of_user(user, after, limit)

    async def ended_subscriptions(
        self, user: str, after: EndedSubscription | None, limit: int
    ) -> list[EndedSubscription]:
        with self._call():
            return await self._subscribing.ended_of_user(user, after, limit)

    async def subscribers(self, topic: str, after: str | None, limit: int) -> SubscriberPage:
        with self._call():
            return await self._subscribing.of_topic(topic, after, limit)

    async def append_broadcasts(self, rows: Sequence[Broadcast]) -> None:
        with self._call():
            await self._broadcasts.append(rows)

    async def broadcasts(self, after: Position, upto: Position, limit: int) -> list[Broadcast]:
        with self._call():
            return await self._broadcasts.between(after, upto, limit)

    async def broadcasts_to(self, pattern: str, after: Position, upto: Position, limit: int) -> list[Broadcast]:
        with self._call():
            return await self._broadcasts.of_pattern(pattern, after, upto, limit)

    async def broadcast_bodies(self, positions: Sequence[Position]) -> dict[Position, bytes]:
        with self._call():
            return await self._broadcasts.bodies(positions)

    async def synced(self, user: str) -> Position:
        with self._call():
            return await self._broadcasts.synced(user)

    async def note_synced(self, user: str, upto: Position) -> None:
        with self._call():
            await self._broadcasts.note_synced(user, upto)

    async def expire(self, before_ns: int) -> int:
        """Every row has its time to live."""
        with self._call():
            return 0

    async def export(self, user: str) -> AsyncIterator[dict[str, Any]]:
        with self._call():
            async for entry in self._inbox.export(user):
                yield entry
            for known in await self._devices.devices(user):
                yield exported_cursor(known)
            async for entry in self._subscribing.export(user):
                yield entry

    async def erase(self, user: str, upto: Position) -> int:
        with self._call():
            await self._devices.erase(user)
            await self._subscribing.erase(user)
            await self._broadcasts.erase(user)
            return await self._inbox.erase(user, upto)
