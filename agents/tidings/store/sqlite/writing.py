"""Writing the inbox: functions of the writer's connection. Each is small, or one slice of something long."""

from __future__ import annotations

import sqlite3
import time
from collections.abc import Mapping, Sequence
from typing import Any, Final

from tidings.store.port import DeliveredMark, InboxRow, MarkAllAs
from tidings.wire.frames import MarkAs
from tidings.wire.position import Position

from .reading import watermarks

__all__ = [
    "REFUSED",
    "SLICE",
    "append",
    "append_values",
    "begin_erasing",
    "delivered",
    "erase",
    "expire",
    "expire_watermarks",
    "mark",
    "mark_all",
    "note_floors",
]

SLICE: Final = 2000
"""Rows that one transaction deletes at most: nobody else writes meanwhile."""

_NOT_ERASED: Final = """NOT EXISTS (SELECT 1 FROM watermarks
    WHERE user = ? AND as_ = 'erased' AND (incarnation, sequence) >= (?, ?))"""
_INTO: Final = "INSERT INTO inbox (user, incarnation, sequence, id, type, topic, stored_ns, body)"
_UNLESS_STORED: Final = """
    ON CONFLICT DO UPDATE SET id = excluded.id, type = excluded.type, topic = excluded.topic,
        stored_ns = excluded.stored_ns, body = excluded.body WHERE inbox.body IS NULL"""
_APPEND: Final = f"{_INTO} VALUES (?, ?, ?, ?, ?, ?, ?, ?) {_UNLESS_STORED}"
_APPEND_UNLESS_ERASED: Final = f"{_INTO} SELECT ?, ?, ?, ?, ?, ?, ?, ? WHERE {_NOT_ERASED} {_UNLESS_STORED}"
_ANY_ERASED: Final = "SELECT EXISTS (SELECT 1 FROM watermarks INDEXED BY watermarks_erased WHERE as_ = 'erased')"
_DELIVERED: Final = f"""
    INSERT INTO inbox (stored_ns, delivered_ms, delivered_device, delivered_attempts, user, incarnation, sequence)
    SELECT ?, ?, ?, ?, ?, ?, ? WHERE {_NOT_ERASED}
    ON CONFLICT DO UPDATE SET delivered_ms = excluded.delivered_ms, delivered_device = excluded.delivered_device,
        delivered_attempts = excluded.delivered_attempts
        WHERE inbox.delivered_ms IS NULL OR excluded.delivered_ms < inbox.delivered_ms"""
REFUSED: Final = (UnicodeEncodeError, OverflowError, sqlite3.DataError, sqlite3.IntegrityError)
"""What is wrong with a row itself, whenever it is stored."""

_MARK: Final = """
    INSERT INTO inbox (user, incarnation, sequence, stored_ns, seen, read, archived, kept)
    VALUES (?, ?, ?, ?, {}, ?) ON CONFLICT DO UPDATE SET {}"""
_MARKS: Final[dict[MarkAs, str]] = {
    "seen": _MARK.format("1, 0, 0", "seen = 1"),
    "read": _MARK.format("1, 1, 0", "seen = 1, read = 1, kept = 0"),
    "unread": _MARK.format("0, 0, 0", "read = 0, kept = excluded.kept WHERE inbox.archived = 0"),
    "archived": _MARK.format("1, 1, 1", "seen = 1, read = 1, archived = 1, kept = 0"),
}
_ALSO: Final[dict[MarkAllAs, tuple[MarkAllAs, ...]]] = {
    "seen": ("seen",),
    "read": ("seen", "read"),
    "archived": ("seen", "read", "archived"),
}
_RAISE: Final = """
    INSERT INTO watermarks (user, as_, incarnation, sequence, updated_ns) VALUES (?, ?, ?, ?, ?)
    ON CONFLICT DO UPDATE SET incarnation = excluded.incarnation, sequence = excluded.sequence,
        updated_ns = excluded.updated_ns
        WHERE (excluded.incarnation, excluded.sequence) > (watermarks.incarnation, watermarks.sequence)"""
_TAKE_BACK: Final = """
    UPDATE inbox INDEXED BY inbox_kept SET kept = 0
    WHERE user = ? AND (incarnation, sequence) <= (?, ?) AND kept = 1"""

_DELETE: Final = "DELETE FROM inbox WHERE user = ? AND incarnation = ? AND sequence = ?"
_EXPIRED: Final = "SELECT user, incarnation, sequence FROM inbox WHERE stored_ns < ? LIMIT ?"
_ERASED: Final = """
    SELECT user, incarnation, sequence, body IS NOT NULL FROM inbox
    WHERE user = ? AND (incarnation, sequence) <= (?, ?) LIMIT ?"""
# As long as a row lies below one it is of use, however old it is itself.
_EXPIRE_WATERMARKS: Final = """
    DELETE FROM watermarks WHERE (user, as_) IN (SELECT user, as_ FROM watermarks AS old WHERE updated_ns < ?
    AND coalesce((incarnation, sequence) < (SELECT incarnation, sequence FROM inbox WHERE user = old.user
        ORDER BY incarnation, sequence LIMIT 1), 1) LIMIT ?)"""


def append(db: sqlite3.Connection, rows: Sequence[tuple[Any, ...]]) -> dict[int, str]:
    """Store rows (`append_values`) but those that cannot be; returns why not, by index."""
    statement = _APPEND
    # To ask for each row costs a quarter of storing it, and few databases ever have to.
    if db.execute(_ANY_ERASED).fetchone()[0]:
        statement = _APPEND_UNLESS_ERASED
        rows = [(*row, *row[:3]) for row in rows]
    try:
        db.executemany(statement, rows)
    except REFUSED:
        # Where it stopped is not said. Storing some twice changes nothing.
        return {index: why for index, row in enumerate(rows) if (why := _append_one(db, statement, row)) is not None}
    return {}


def append_values(rows: Sequence[InboxRow]) -> list[tuple[Any, ...]]:
    return [(row.user, *row.position, row.id, row.type, row.topic, row.stored_ns, row.body) for row in rows]


def _append_one(db: sqlite3.Connection, statement: str, row: tuple[Any, ...]) -> str | None:
    try:
        db.execute(statement, row)
    except REFUSED as error:
        return f"its values cannot be stored: {error}"
    return None


def delivered(db: sqlite3.Connection, marks: Sequence[DeliveredMark]) -> None:
    db.executemany(
        _DELIVERED,
        [(stored_ns, *first, user, *at, user, *at) for user, at, stored_ns, first in marks],
    )


def note_floors(db: sqlite3.Connection, floors: Mapping[int, Position]) -> None:
    db.executemany("INSERT OR REPLACE INTO floors VALUES (?, ?, ?)", [(part, *at) for part, at in floors.items()])


def mark(db: sqlite3.Connection, user: str, positions: Sequence[Position], as_: MarkAs) -> None:
    upto = watermarks(db, user)
    stays = max(upto.erased, upto.archived) if as_ == "unread" else upto.erased
    now = time.time_ns()
    db.executemany(
        _MARKS[as_],
        [(user, *at, now, as_ == "unread" and at <= upto.read) for at in positions if at > stays],
    )


def mark_all(db: sqlite3.Connection, user: str, upto: Position, as_: MarkAllAs) -> None:
    now = time.time_ns()
    db.executemany(_RAISE, [(user, each, *upto, now) for each in _ALSO[as_]])
    if as_ != "seen":
        db.execute(_TAKE_BACK, (user, *upto))


def begin_erasing(db: sqlite3.Connection, user: str, upto: Position) -> None:
    """First of all, so that what is appended meanwhile stays away as well."""
    db.execute("DELETE FROM watermarks WHERE user = ? AND as_ <> 'erased'", (user,))
    db.execute(_RAISE, (user, "erased", *upto, time.time_ns()))
    db.execute("DELETE FROM cursors WHERE user = ?", (user,))


def erase(db: sqlite3.Connection, user: str, upto: Position) -> tuple[int, int]:
    """One slice: how many rows are gone, and how many of them were notifications."""
    found = db.execute(_ERASED, (user, *upto, SLICE)).fetchall()
    db.executemany(_DELETE, [row[:3] for row in found])
    return len(found), sum(row[3] for row in found)


def expire(db: sqlite3.Connection, before_ns: int) -> int:
    """One slice: how many rows are gone."""
    keys = db.execute(_EXPIRED, (before_ns, SLICE)).fetchall()
    db.executemany(_DELETE, keys)
    return len(keys)


def expire_watermarks(db: sqlite3.Connection, before_ns: int) -> int:
    """One slice: how many watermarks are gone."""
    return db.execute(_EXPIRE_WATERMARKS, (before_ns, SLICE)).rowcount
