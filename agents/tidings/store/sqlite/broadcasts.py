"""What was published to topics and is kept once, and up to where each user has it: functions of a connection."""

from __future__ import annotations

import sqlite3
from collections.abc import Sequence
from typing import Any, Final

from tidings.store.port import Broadcast
from tidings.wire.position import Position
from tidings.wire.topic import patterns_of

from .writing import REFUSED

__all__ = [
    "append",
    "append_values",
    "between",
    "bodies",
    "expire",
    "forget_synced",
    "note_synced",
    "of_pattern",
    "synced",
]

_SLICE: Final = 200
"""Broadcasts that one transaction deletes at most, each with up to eight references."""

_APPEND: Final = "INSERT INTO broadcasts VALUES (?, ?, ?, ?, ?, ?, ?) ON CONFLICT DO NOTHING"
_REFER: Final = "INSERT INTO broadcasts_to VALUES (?, ?, ?) ON CONFLICT DO NOTHING"
_COLUMNS: Final = "topic, at.incarnation, at.sequence, id, type, stored_ns"
_RANGE: Final = """(at.incarnation, at.sequence) > (?, ?) AND (at.incarnation, at.sequence) <= (?, ?)
    ORDER BY at.incarnation, at.sequence LIMIT ?"""
_BETWEEN: Final = f"SELECT {_COLUMNS}, body FROM broadcasts AS at WHERE {_RANGE}"
# CROSS JOIN: the references first, whose order it is.
_OF_PATTERN: Final = f"""SELECT {_COLUMNS}, x'' FROM broadcasts_to AS at
    CROSS JOIN broadcasts USING (incarnation, sequence) WHERE pattern = ? AND {_RANGE}"""
_BODY: Final = "SELECT body FROM broadcasts WHERE incarnation = ? AND sequence = ?"
_EXPIRED: Final = "SELECT incarnation, sequence, topic FROM broadcasts WHERE stored_ns < ? LIMIT ?"
_NOTE_SYNCED: Final = """
    INSERT INTO synced VALUES (?, ?, ?)
    ON CONFLICT DO UPDATE SET incarnation = excluded.incarnation, sequence = excluded.sequence
        WHERE (excluded.incarnation, excluded.sequence) > (synced.incarnation, synced.sequence)"""


def append(db: sqlite3.Connection, rows: Sequence[tuple[Any, ...]]) -> dict[int, str]:
    """Store broadcasts (`append_values`) but those that cannot be; returns why not, by index."""
    refused: dict[int, str] = {}
    try:
        db.executemany(_APPEND, rows)
    except REFUSED:
        # Where it stopped is not said. Storing some twice changes nothing.
        for index, row in enumerate(rows):
            try:
                db.execute(_APPEND, row)
            except REFUSED as error:
                refused[index] = f"its values cannot be stored: {error}"
    db.executemany(
        _REFER,
        [
            (pattern, *row[:2])
            for index, row in enumerate(rows)
            if index not in refused
            for pattern in patterns_of(row[2])
        ],
    )
    return refused


def append_values(rows: Sequence[Broadcast]) -> list[tuple[Any, ...]]:
    return [(*row.position, row.topic, row.id, row.type, row.stored_ns, row.body) for row in rows]


def between(db: sqlite3.Connection, after: Position, upto: Position, limit: int) -> list[Broadcast]:
    return [_broadcast(row) for row in db.execute(_BETWEEN, (*after, *upto, limit))]


def of_pattern(db: sqlite3.Connection, pattern: str, after: Position, upto: Position, limit: int) -> list[Broadcast]:
    return [_broadcast(row) for row in db.execute(_OF_PATTERN, (pattern, *after, *upto, limit))]


def bodies(db: sqlite3.Connection, positions: Sequence[Position]) -> dict[Position, bytes]:
    found = ((position, db.execute(_BODY, position).fetchone()) for position in positions)
    return {position: row[0] for position, row in found if row is not None}


def expire(db: sqlite3.Connection, before_ns: int) -> int:
    """One slice of the broadcasts stored before that time: how many are gone."""
    found = db.execute(_EXPIRED, (before_ns, _SLICE)).fetchall()
    db.executemany(
        "DELETE FROM broadcasts_to WHERE pattern = ? AND incarnation = ? AND sequence = ?",
        [(pattern, *at) for *at, topic in found for pattern in patterns_of(topic)],
    )
    db.executemany("DELETE FROM broadcasts WHERE incarnation = ? AND sequence = ?", [row[:2] for row in found])
    return len(found)


def synced(db: sqlite3.Connection, user: str) -> Position:
    row = db.execute("SELECT incarnation, sequence FROM synced WHERE user = ?", (user,)).fetchone()
    return Position(0, 0) if row is None else Position(*row)


def note_synced(db: sqlite3.Connection, user: str, upto: Position) -> None:
    db.execute(_NOTE_SYNCED, (user, *upto))


def forget_synced(db: sqlite3.Connection, user: str) -> None:
    db.execute("DELETE FROM synced WHERE user = ?", (user,))


def _broadcast(row: tuple[Any, ...]) -> Broadcast:
    topic, incarnation, sequence, *rest = row
    return Broadcast(topic, Position(incarnation, sequence), *rest)
