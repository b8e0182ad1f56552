"""Reading the inbox: functions of a connection whose transaction sees one state of it.

What was marked all at once is a watermark, not a column of each row: a row is read when its own mark says so, or when
it lies at or below the watermark and was not *kept*, that is: explicitly marked as unread afterwards.
"""

from __future__ import annotations

import sqlite3
from collections.abc import Iterator
from typing import Any, Final, NamedTuple

from tidings.store.port import MISSED_CAP, UNREAD_CAP, Delivered, InboxItem, InboxPage, PageQuery
from tidings.wire.position import Position

__all__ = ["LAST", "NOWHERE", "Watermarks", "between", "floors", "missed", "page", "unread", "watermarks"]

NOWHERE: Final = Position(0, 0)
LAST: Final = Position(2**62, 0)
"""Above every position."""

_REACH: Final = 5000
"""Rows that a page reads at most to find what fits."""

_COLUMNS: Final = """incarnation, sequence, seen, read, archived, kept, stored_ns, body,
    delivered_ms, delivered_device, delivered_attempts"""
_RANGE: Final = """user = :user AND (incarnation, sequence) > (:low_incarnation, :low_sequence)
    AND (incarnation, sequence) <= (:high_incarnation, :high_sequence)"""


class Watermarks(NamedTuple):
    """Up to where all is marked: seen at least as far as read, read at least as far as archived."""

    seen: Position = NOWHERE
    read: Position = NOWHERE
    archived: Position = NOWHERE
    erased: Position = NOWHERE


class _Source(NamedTuple):
    """Rows that an index gives in order of positions. Without a word the planner takes the primary key."""

    by: str
    has: str
    """The condition of the index."""
    fits: str = "1"
    """What else a row has to be."""

    def within(self, order: str) -> str:
        return f"""FROM inbox {self.by and f"INDEXED BY {self.by}"} WHERE {_RANGE} AND {self.has}
        ORDER BY incarnation {order}, sequence {order}"""

    def rows(self, order: str) -> str:
        # The inner query bounds what is read to find what the outer one asks for.
        return f"""SELECT {_COLUMNS} FROM (SELECT {_COLUMNS}, type, topic {self.within(order)} LIMIT :reach)
        WHERE body IS NOT NULL AND {self.fits} AND (:type IS NULL OR type = :type)
        AND (:topic IS NULL OR topic = :topic) LIMIT :count"""

    def end_of_reach(self, order: str) -> str:
        return f"SELECT incarnation, sequence {self.within(order)} LIMIT 1 OFFSET :reach - 1"

    def counted(self) -> str:
        return (
            f"SELECT count(*) FROM (SELECT 1 FROM inbox INDEXED BY {self.by} WHERE {_RANGE} AND {self.has} "
            f"AND {self.fits} LIMIT {UNREAD_CAP})"
        )


_LISTED: Final = _Source("", "1", "archived = 0")
_UNREAD: Final = _Source("inbox_unread", "read = 0 AND archived = 0 AND body IS NOT NULL")
_KEPT: Final = _Source("inbox_kept", "kept = 1", "body IS NOT NULL")
_ARCHIVED: Final = _Source("inbox_archived", "archived = 1 AND body IS NOT NULL")
_ALL_ARCHIVED: Final = _Source("", "1")

_WATERMARKS: Final = "SELECT as_, incarnation, sequence FROM watermarks WHERE user = ?"
_BETWEEN: Final = f"""SELECT {_COLUMNS} FROM inbox WHERE {_RANGE} AND body IS NOT NULL
    ORDER BY incarnation, sequence LIMIT :count"""
_MISSED: Final = f"SELECT count(*) FROM (SELECT 1 FROM inbox WHERE {_RANGE} AND body IS NOT NULL LIMIT {MISSED_CAP})"


def watermarks(db: sqlite3.Connection, user: str) -> Watermarks:
    return Watermarks(**{as_: Position(*at) for as_, *at in db.execute(_WATERMARKS, (user,))})


def page(db: sqlite3.Connection, user: str, query: PageQuery) -> InboxPage:
    marks = watermarks(db, user)
    newest_first = query.after is None
    order = "DESC" if newest_first else "ASC"
    low, high = query.after or NOWHERE, _below(query.before) if query.before else LAST
    sources = sorted(_sources(query, marks, low, high), key=lambda part: part[1], reverse=newest_first)
    items: list[InboxItem] = []
    for source, part_low, part_high in sources:
        values = _bounds(user, part_low, part_high) | {
            "type": query.type,
            "topic": query.topic,
            "count": query.limit + 1 - len(items),
            "reach": max(_REACH, query.limit + 1),
        }
        items += [_item(row, marks) for row in db.execute(source.rows(order), values)]
        if len(items) > query.limit:
            return InboxPage(items[: query.limit], items[query.limit - 1].position)
        reached = db.execute(source.end_of_reach(order), values).fetchone()
        if reached is not None:
            return InboxPage(items, Position(*reached))
    return InboxPage(items, None)


def _sources(
    query: PageQuery, marks: Watermarks, low: Position, high: Position
) -> Iterator[tuple[_Source, Position, Position]]:
    """Where the rows of a page are: each with a range, its low end exclusive; the ranges do not meet."""
    if query.filter == "all":
        yield _LISTED, max(low, marks.archived), high
    elif query.filter == "unread":
        yield _UNREAD, max(low, marks.read), high
        yield _KEPT, low, min(high, marks.read)
    else:
        yield _ARCHIVED, max(low, marks.archived), high
        yield _ALL_ARCHIVED, low, min(high, marks.archived)


def floors(db: sqlite3.Connection) -> dict[int, Position]:
    return {part: Position(*at) for part, *at in db.execute("SELECT part, incarnation, sequence FROM floors")}


def between(db: sqlite3.Connection, user: str, after: Position, upto: Position, limit: int) -> list[InboxItem]:
    marks = watermarks(db, user)
    return [_item(row, marks) for row in db.execute(_BETWEEN, _bounds(user, after, upto) | {"count": limit})]


def missed(db: sqlite3.Connection, user: str, after: Position, upto: Position) -> int:
    count: int = db.execute(_MISSED, _bounds(user, after, upto)).fetchone()[0]
    return count


def unread(db: sqlite3.Connection, user: str) -> int:
    upto = watermarks(db, user).read
    count: int = db.execute(_UNREAD.counted(), _bounds(user, upto, LAST)).fetchone()[0]
    if upto != NOWHERE:
        count += db.execute(_KEPT.counted(), _bounds(user, NOWHERE, upto)).fetchone()[0]
    return min(count, UNREAD_CAP)


def _below(position: Position) -> Position:
    """The highest that is strictly older; not itself a row's position where the sequence was 0."""
    return Position(position.incarnation, position.sequence - 1)


def _bounds(user: str, low: Position, high: Position) -> dict[str, Any]:
    return {
        "user": user,
        "low_incarnation": low.incarnation,
        "low_sequence": low.sequence,
        "high_incarnation": high.incarnation,
        "high_sequence": high.sequence,
    }


def _item(row: tuple[Any, ...], marks: Watermarks) -> InboxItem:
    position = Position(row[0], row[1])
    seen = bool(row[2]) or position <= marks.seen
    read = bool(row[3]) or (position <= marks.read and not row[5])
    archived = bool(row[4]) or position <= marks.archived
    delivered = None if row[8] is None else Delivered(row[8], row[9], row[10])
    return InboxItem(position, seen, read, archived, row[6], row[7], delivered)
