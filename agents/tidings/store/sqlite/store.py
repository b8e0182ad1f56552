"""The `Store` on a SQLite file: each method is one or a few operations of its database."""

from __future__ import annotations

from collections.abc import AsyncIterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Final

from tidings.store.export import (
    exported_cursor,
    exported_ended,
    exported_item,
    exported_subscription,
    exported_watermark,
)
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
from tidings.wire.errors import RowsRefused, TooManySubscriptions
from tidings.wire.frames import MarkAs
from tidings.wire.position import Position

from . import broadcasts, cursors, reading, subscriptions, writing
from .database import Database

__all__ = ["SqliteStore"]

_EXPORT: Final = 200
"""Notifications in memory while a user's are exported."""


class SqliteStore:
    """The `Store` port on a SQLite file; the folder is made when it is missing."""

    def __init__(self, path: str | Path, *, busy_timeout_s: float = 5.0, pending_limit: int = 10_000) -> None:
        self._database = Database(path, busy_timeout_s=busy_timeout_s, pending_limit=pending_limit)

    async def open(self) -> None:
        await self._database.open()

    async def close(self) -> None:
        await self._database.close()

    async def check(self) -> None:
        await self._database.write(lambda db: db.execute("UPDATE probe SET checks = checks + 1"))
        await self._database.read(lambda db: db.execute("SELECT checks FROM probe").fetchall())

    # The inbox

    async def append(self, rows: Sequence[InboxRow]) -> None:
        values = writing.append_values(rows)
        refused = await self._database.write(lambda db: writing.append(db, values))
        if refused:
            raise RowsRefused(refused)

    async def floors(self) -> dict[int, Position]:
        return await self._database.read(reading.floors)

    async def note_floors(self, floors: Mapping[int, Position]) -> None:
        await self._database.write(lambda db: writing.note_floors(db, floors))

    async def page(self, user: str, query: PageQuery) -> InboxPage:
        return await self._database.read(lambda db: reading.page(db, user, query))

    async def between(self, user: str, after: Position, upto: Position, limit: int) -> list[InboxItem]:
        return await self._database.read(lambda db: reading.between(db, user, after, upto, limit))

    async def missed(self, user: str, after: Position, upto: Position) -> int:
        return await self._database.read(lambda db: reading.missed(db, user, after, upto))

    async def unread(self, user: str) -> int:
        return await self._database.read(lambda db: reading.unread(db, user))

    async def mark(self, user: str, positions: Sequence[Position], as_: MarkAs) -> None:
        await self._database.write(lambda db: writing.mark(db, user, positions, as_))

    async def mark_all(self, user: str, upto: Position, as_: MarkAllAs) -> None:
        await self._database.write(lambda db: writing.mark_all(db, user, upto, as_))

    async def delivered(self, marks: Sequence[DeliveredMark]) -> None:
        await self._database.write(lambda db: writing.delivered(db, marks))

    # Devices

    async def claim(self, user: str, device: str, holder: Holder, floor: Position) -> Claimed:
        return await self._database.write(lambda db: cursors.claim(db, user, device, holder, floor))

    async def save(self, updates: Sequence[CursorUpdate]) -> list[Lost]:
        values = [cursors.save_values(update) for update in updates]
        return await self._database.write(lambda db: cursors.save(db, updates, values))

    async def holders(self, user: str) -> list[Holder]:
        return await self._database.read(lambda db: cursors.holders(db, user))

    async def devices(self, user: str) -> list[DeviceCursor]:
        return await self._database.read(lambda db: cursors.devices(db, user))

    # Subscriptions

    async def subscribe(self, user: str, topics: Sequence[str], most: int, since: Position) -> None:
        if not await self._database.write(lambda db: subscriptions.add(db, user, topics, most, since)):
            raise TooManySubscriptions(f"{user!r} would have more than {most} subscriptions: end some first")

    async def unsubscribe(self, user: str, topics: Sequence[str], until: Position) -> None:
        await self._database.write(lambda db: subscriptions.remove(db, user, topics, until))

    async def subscriptions(self, user: str, after: str | None, limit: int) -> list[Subscription]:
        return await self._database.read(lambda db: subscriptions.of_user(db, user, after, limit))

    async def ended_subscriptions(
        self, user: str, after: EndedSubscription | None, limit: int
    ) -> list[EndedSubscription]:
        return await self._database.read(lambda db: subscriptions.ended_of_user(db, user, after, limit))

    async def subscribers(self, topic: str, after: str | None, limit: int) -> SubscriberPage:
        return await self._database.read(lambda db: subscriptions.of_topic(db, topic, after, limit))

    # Broadcasts

    async def append_broadcasts(self, rows: Sequence[Broadcast]) -> None:
        values = broadcasts.append_values(rows)
        refused = await self._database.write(lambda db: broadcasts.append(db, values))
        if refused:
            raise RowsRefused(refused)

    async def broadcasts(self, after: Position, upto: Position, limit: int) -> list[Broadcast]:
        return await self._database.read(lambda db: broadcasts.between(db, after, upto, limit))

    async def broadcasts_to(self, pattern: str, after: Position, upto: Position, limit: int) -> list[Broadcast]:
        return await self._database.read(lambda db: broadcasts.of_pattern(db, pattern, after, upto, limit))

    async def broadcast_bodies(self, positions: Sequence[Position]) -> dict[Position, bytes]:
        return await self._database.read(lambda db: broadcasts.bodies(db, positions))

    async def synced(self, user: str) -> Position:
        return await self._database.read(lambda db: broadcasts.synced(db, user))

    async def note_synced(self, user: str, upto: Position) -> None:
        await self._database.write(lambda db: broadcasts.note_synced(db, user, upto))

    # What is to go, and what is kept of a user

    async def expire(self, before_ns: int) -> int:
        gone = 0
        while slice_ := await self._database.write(lambda db: writing.expire(db, before_ns)):
            gone += slice_
        while slice_ := await self._database.write(lambda db: broadcasts.expire(db, before_ns)):
            gone += slice_
        while await self._database.write(lambda db: writing.expire_watermarks(db, before_ns)):
            pass
        while await self._database.write(lambda db: subscriptions.expire(db, before_ns, writing.SLICE)):
            pass
        return gone

    async def export(self, user: str) -> AsyncIterator[dict[str, Any]]:
        upto = await self._database.read(lambda db: reading.watermarks(db, user))
        for as_ in ("seen", "read", "archived"):
            if (at := getattr(upto, as_)) != reading.NOWHERE:
                yield exported_watermark(as_, at)
        after = reading.NOWHERE
        while items := await self.between(user, after, reading.LAST, _EXPORT):
            for item in items:
                yield exported_item(item)
            after = items[-1].position
        for known in await self.devices(user):
            yield exported_cursor(known)
        topic: str | None = None
        while followed := await self.subscriptions(user, topic, _EXPORT):
            for subscription in followed:
                yield exported_subscription(subscription)
            topic = followed[-1].topic
        last: EndedSubscription | None = None
        while ended := await self.ended_subscriptions(user, last, _EXPORT):
            for last in ended:
                yield exported_ended(last)

    async def erase(self, user: str, upto: Position) -> int:
        await self._database.write(lambda db: subscriptions.remove_all(db, user))
        await self._database.write(lambda db: broadcasts.forget_synced(db, user))
        await self._database.write(lambda db: writing.begin_erasing(db, user, upto))
        gone, slice_ = 0, writing.SLICE
        while slice_ == writing.SLICE:
            slice_, notifications = await self._database.write(lambda db: writing.erase(db, user, upto))
            gone += notifications
        return gone
