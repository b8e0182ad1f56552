"""Notifications and what their user does with them; `store` says how they are kept."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import AsyncIterator, Iterable, Sequence
from typing import Any, Final

from cassandra.query import BoundStatement, PreparedStatement

from tidings.store.export import exported_item, exported_watermark
from tidings.store.port import (
    MISSED_CAP,
    UNREAD_CAP,
    DeliveredMark,
    InboxItem,
    InboxPage,
    InboxRow,
    MarkAllAs,
    PageQuery,
)
from tidings.wire.errors import RowsRefused
from tidings.wire.frames import MarkAs
from tidings.wire.position import Position

from .appending import Listed, write_rows
from .database import Database
from .encoding import (
    BEFORE_ALL,
    BEHIND_ALL,
    BUCKET_S,
    DAY_US,
    Clock,
    bucket_key,
    bucket_of,
    delivered_from_text,
    delivered_to_text,
    first_wins,
    left_s,
    pack,
    unpack,
)
from .express import Write, int4, int8
from .rows import Head, Row, in_order
from .statements import ARCHIVED, SEEN, UNREAD

__all__ = ["Inbox"]

_CHUNK: Final = 40
"""Statements of one batch: well below the size of which Cassandra warns."""
_ONE_BUCKET: Final = b"\0\0\0\1\0\0\0\4"
"""A set of one integer, which follows."""
_SCAN: Final = 2000
"""Rows that one page reads at most to find what fits; a short page for half of a request's time is better than none."""
_EXPORT: Final = 200
_LATE_US: Final = 30 * DAY_US
"""No log keeps a notification for longer before it is appended."""


class Inbox:
    """The inbox half of the store."""

    def __init__(self, database: Database, sql: dict[str, PreparedStatement], clock: Clock, retention_s: int) -> None:
        self._database = database
        self._sql = sql
        self._clock = clock
        self._retention_s = retention_s
        self._listed = Listed(clock)

    def _left_s(self, stored_ns: int) -> int:
        return left_s(self._retention_s, stored_ns, self._clock.now())

    # Writing

    async def append(self, rows: Sequence[InboxRow]) -> None:
        """Two statements a row, all at once; the first row of a user in a bucket costs a third."""
        listed: set[bytes] = set()
        refused = await write_rows(self._database, rows, lambda row: self._row_writes(row, listed))
        self._listed.remember(listed)
        if refused:
            raise RowsRefused(refused)

    def _row_writes(self, row: InboxRow, listed: set[bytes]) -> tuple[Write, ...]:
        """The writes of a row; a bucket that is not known to be listed is noted in `listed`."""
        left_s = self._left_s(row.stored_ns)
        if left_s <= 0:
            return ()
        user, packed, bucket = row.user.encode(), pack(row.position), int4(bucket_of(row.stored_ns))
        topic = None if row.topic is None else row.topic.encode()
        # A day before: whatever the user does with it is newer, whichever is written first.
        ttl, at = int4(left_s), int8(row.stored_ns // 1000 - DAY_US)
        stored = int8(row.stored_ns)
        key = bucket_key(user, bucket)
        writes = (
            Write(
                self._sql["append"],
                (user, bucket, packed, row.id.encode(), row.type.encode(), topic, stored, row.body, ttl, at),
                key,
            ),
            Write(self._sql["list"], (ttl, at, bucket, user, packed), user),
        )
        if key in listed or key in self._listed:
            return writes
        listed.add(key)
        # It outlives the last row of the bucket.
        longest = int4(self._retention_s + BUCKET_S)
        return (*writes, Write(self._sql["list_bucket"], (longest, at, _ONE_BUCKET + bucket, user), user))

    async def delivered(self, marks: Sequence[DeliveredMark]) -> None:
        writes = []
        for mark in marks:
            left_s = self._left_s(mark.stored_ns)
            if left_s > 0:
                user, bucket = mark.user.encode(), int4(bucket_of(mark.stored_ns))
                text = delivered_to_text(mark.delivered)
                at = int8(first_wins(mark.delivered.at_ms))
                values = int4(left_s), at, text, user, bucket, pack(mark.position)
                writes.append(Write(self._sql["delivered"], values, bucket_key(user, bucket)))
        await self._database.write_all(writes)

    # Marks

    async def mark(self, user: str, positions: Sequence[Position], as_: MarkAs) -> None:
        packed = [pack(position) for position in dict.fromkeys(positions)]
        if as_ == "unread":
            await self._mark_unread(user, packed)
            return
        now = self._clock.now()
        kind = ARCHIVED if as_ == "archived" else SEEN
        for at in range(0, len(packed), _CHUNK):
            some = packed[at : at + _CHUNK]
            batch = [self._sql["mark"].bind((user, kind, one, self._retention_s, now)) for one in some]
            if as_ != "seen":
                # Archived stays: it also wins against an `unread` of the same moment, which has not seen it.
                gone = now + DAY_US if as_ == "archived" else now
                batch.append(self._sql["unlist"].bind((gone, user, some)))
            await self._database.write(self._database.batch(batch))

    async def _mark_unread(self, user: str, packed: list[bytes]) -> None:
        head = await self._head(user)
        now = self._clock.now()
        for at in range(0, len(packed), _CHUNK):
            some = packed[at : at + _CHUNK]
            archived = {row[0] for row in await self._database.read(self._sql["archived"], user, some)}
            some = [one for one in some if one not in archived and one > head.archived_all]
            stored = {row.packed: row for row in await self._these(user, head.buckets, some)}
            batch = []
            for one in some:
                row = stored.get(one)
                ns = None if row is None else row.stored
                left_s = self._retention_s if ns is None else self._left_s(ns)
                bucket = None if ns is None else bucket_of(ns)
                if left_s > 0:
                    batch.append(self._sql["mark_unread"].bind((user, one, bucket, ns is None, left_s, now)))
            if batch:
                await self._database.write(self._database.batch(batch))

    async def mark_all(self, user: str, upto: Position, as_: MarkAllAs) -> None:
        head = await self._head(user)
        now, packed = self._clock.now(), pack(upto)
        sql, ttl = self._sql, self._retention_s
        batch: list[BoundStatement] = []
        if as_ == "archived":
            batch.append(sql["unmark_upto"].bind((now + DAY_US, user, UNREAD, packed)))
            batch.append(sql["unmark_upto"].bind((now, user, ARCHIVED, packed)))
        elif as_ == "read":
            batch.append(sql["unmark_upto"].bind((now, user, UNREAD, packed)))
        batch.append(sql["unmark_upto"].bind((now, user, SEEN, packed)))
        name, before = ("archived", head.archived_all) if as_ == "archived" else ("seen", head.seen_all)
        batch.append(sql[f"{name}_all"].bind((ttl, now, {packed}, user)))
        if before and before < packed:
            batch.append(sql[f"{name}_less"].bind((now, {before}, user)))
        await self._database.write(self._database.batch(batch))

    # Reading

    async def _head(self, user: str) -> Head:
        found = await self._database.read(self._sql["head"], user)
        if not found:
            return Head((), BEFORE_ALL, BEFORE_ALL)
        buckets, seen, archived = found[0]
        return Head(sorted(buckets or ()), max(seen or (BEFORE_ALL,)), max(archived or (BEFORE_ALL,)))

    def _rows(
        self, user: str, head: Head, low: bytes, high: bytes, *, newest_first: bool = False, chunk: int = _EXPORT
    ) -> AsyncIterator[Row]:
        statement = self._sql["newest" if newest_first else "oldest"]
        return in_order(
            self._database, statement, user, head.buckets, (low, high), newest_first=newest_first, chunk=chunk
        )

    async def _these(self, user: str, buckets: Iterable[int], packed: Sequence[bytes]) -> list[Row]:
        """The rows at these positions that are stored, in no order."""
        found: list[Row] = []
        for bucket in buckets:
            for at in range(0, len(packed), _CHUNK):
                some = packed[at : at + _CHUNK]
                found += map(Row._make, await self._database.read(self._sql["these"], user, bucket, some))
        return found

    async def _items(self, user: str, head: Head, rows: Sequence[Row]) -> list[InboxItem]:
        """Rows with their marks."""
        if not rows:
            return []
        low, high = min(rows).packed, max(rows).packed
        marks: dict[int, set[bytes]] = {UNREAD: set(), SEEN: set(), ARCHIVED: set()}
        for kind, packed in await self._database.read(self._sql["marks"], user, low, high):
            marks[kind].add(packed)
        delivered: dict[bytes, str] = {}
        for bucket in {bucket_of(row.stored) for row in rows}:
            delivered.update(await self._database.read(self._sql["deliveries"], user, bucket, low, high))
        items = []
        for row in rows:
            packed = row.packed
            archived = packed <= head.archived_all or packed in marks[ARCHIVED]
            read = archived or packed not in marks[UNREAD]
            seen = read or packed <= head.seen_all or packed in marks[SEEN]
            items.append(
                InboxItem(
                    unpack(packed),
                    seen,
                    read,
                    archived,
                    row.stored,
                    row.body,
                    delivered_from_text(delivered.get(packed)),
                )
            )
        return items

    async def page(self, user: str, query: PageQuery) -> InboxPage:
        head = await self._head(user)
        newest_first = query.after is None
        low = BEFORE_ALL if query.after is None else pack(query.after)
        high = BEHIND_ALL if query.before is None else pack(query.before)
        source: AsyncIterator[list[Row]]
        if query.filter == "unread":
            source = self._unread_chunks(user, head, low, high, query.limit + 1, newest_first)
        else:
            if query.filter == "all":
                low = max(low, head.archived_all)
            rows = self._rows(user, head, low, high, newest_first=newest_first, chunk=query.limit + 1)
            source = _chunks(rows, query.limit + 1)
        items: list[InboxItem] = []
        read, enough_at = 0, self._database.loop.time() + self._database.where.timeout_s / 2
        async for chunk in source:
            kept = [row for row in chunk if _fits(row, query)]
            wanted = query.filter == "archived"
            found = await self._items(user, head, kept)
            if query.filter != "unread":
                found = [item for item in found if item.archived == wanted]
            items += found
            read += len(chunk)
            if len(items) > query.limit:
                return InboxPage(items[: query.limit], items[query.limit - 1].position)
            if chunk and (read >= _SCAN or self._database.loop.time() > enough_at):
                return InboxPage(items, unpack(chunk[-1].packed))
        return InboxPage(items, None)

    async def _unread_chunks(
        self, user: str, head: Head, low: bytes, high: bytes, size: int, newest_first: bool
    ) -> AsyncIterator[list[Row]]:
        """What is unread, by its own list, then the rows of that."""
        statement = self._sql["unread" if newest_first else "unread_oldest"]
        low = max(low, head.archived_all)
        while True:
            listed = await self._database.read(statement, user, low, high, size)
            by_bucket: defaultdict[int, list[bytes]] = defaultdict(list)
            for packed, bucket, early in listed:
                for where in head.buckets if early or bucket is None else (bucket,):
                    by_bucket[where].append(packed)
            rows: list[Row] = []
            for bucket, packed_ones in by_bucket.items():
                rows += await self._these(user, (bucket,), packed_ones)
            yield sorted(rows, reverse=newest_first)
            if len(listed) < size:
                return
            low, high = (low, listed[-1][0]) if newest_first else (listed[-1][0], high)
            size = max(size, _EXPORT)

    async def between(self, user: str, after: Position, upto: Position, limit: int) -> list[InboxItem]:
        head = await self._head(user)
        rows: list[Row] = []
        async for row in self._rows(user, head, pack(after), pack(upto) + b"\0", chunk=limit):
            rows.append(row)
            if len(rows) == limit:
                break
        return await self._items(user, head, rows)

    async def missed(self, user: str, after: Position, upto: Position) -> int:
        head = await self._head(user)
        low, high, missed = pack(after), pack(upto) + b"\0", 0
        for bucket in reversed(head.buckets):
            left = MISSED_CAP - missed
            missed += len(await self._database.read(self._sql["positions"], user, bucket, low, high, left))
            if missed == MISSED_CAP:
                break
        return missed

    async def unread(self, user: str) -> int:
        listed = await self._database.read(self._sql["unread"], user, BEFORE_ALL, BEHIND_ALL, UNREAD_CAP)
        early = [packed for packed, _, is_early in listed if is_early]
        if not early:
            return len(listed)
        # Marked as unread before it was stored: it counts when it is. Rare, and so is a full list of them.
        head = await self._head(user)
        count = len(listed) - len(early) + len(await self._these(user, head.buckets, early))
        high = listed[-1][0]
        while count < UNREAD_CAP and len(listed) == UNREAD_CAP:
            listed = await self._database.read(self._sql["unread"], user, BEFORE_ALL, high, UNREAD_CAP)
            if not listed:
                break
            early = [packed for packed, _, is_early in listed if is_early]
            count += len(listed) - len(early) + len(await self._these(user, head.buckets, early))
            high = listed[-1][0]
        return min(count, UNREAD_CAP)

    # The right to one's data

    async def export(self, user: str) -> AsyncIterator[dict[str, Any]]:
        head = await self._head(user)
        for name, packed in (("seen", head.seen_all), ("archived", head.archived_all)):
            if packed:
                yield exported_watermark(name, unpack(packed))
        async for chunk in _chunks(self._rows(user, head, BEFORE_ALL, BEHIND_ALL), _EXPORT):
            for item in await self._items(user, head, chunk):
                yield exported_item(item)

    async def erase(self, user: str, upto: Position) -> int:
        head = await self._head(user)
        now, packed = self._clock.now(), pack(upto)
        # Buckets of late may not be listed yet: their first row may still be on its way here.
        late = range(bucket_of((now - _LATE_US) * 1000), bucket_of(now * 1000) + 1)
        buckets = sorted({*head.buckets, *late})
        gone = 0
        for bucket in buckets:
            gone += (await self._database.read(self._sql["count"], user, bucket, packed))[0][0]
            await self._database.write(self._sql["erase_rows"].bind((now, user, bucket, packed)))
            await self._database.write(self._sql["erase_deliveries"].bind((now, user, bucket, packed)))
        batch = [self._sql["unmark_upto"].bind((now + DAY_US, user, kind, packed)) for kind in (UNREAD, SEEN, ARCHIVED)]
        batch.append(self._sql["erase_watermarks"].bind((now, user)))
        # A bucket of late may still get rows above `upto`, whose listing would be older than this: it stays listed.
        old = [bucket for bucket in head.buckets if bucket < bucket_of((now - _LATE_US) * 1000)]
        empty = {bucket for bucket in old if not await self._has_rows(user, bucket, packed)}
        if empty:
            batch.append(self._sql["unlist_buckets"].bind((now, empty, user)))
        await self._database.write(self._database.batch(batch))
        return gone

    async def _has_rows(self, user: str, bucket: int, after: bytes) -> bool:
        return bool(await self._database.read(self._sql["oldest"], user, bucket, after, BEHIND_ALL, 1))


def _fits(row: Row, query: PageQuery) -> bool:
    return (query.type is None or row.type == query.type) and (query.topic is None or row.topic == query.topic)


async def _chunks(rows: AsyncIterator[Row], size: int) -> AsyncIterator[list[Row]]:
    chunk: list[Row] = []
    async for row in rows:
        chunk.append(row)
        if len(chunk) == size:
            yield chunk
            # Much does not fit: look further at a time.
            chunk, size = [], max(size, _EXPORT)
    if chunk:
        yield chunk
