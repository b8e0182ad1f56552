"""The devices' cursors, and who has each device: functions of a connection."""

from __future__ import annotations

import sqlite3
from collections.abc import Sequence
from typing import Any, Final

import orjson

from tidings.store.cursors import cursor_members, cursor_of
from tidings.store.port import ANONYMOUS, DEVICES_CAP, Claimed, Cursor, CursorUpdate, DeviceCursor, Holder, Lost
from tidings.wire.position import Position

__all__ = ["claim", "devices", "holders", "save", "save_values"]

_SAVE: Final = """
    UPDATE cursors SET incarnation = ?, sequence = ?, acked = ?, attempts = ?, broadcast = ?, gateway = ?,
        session = ?
    WHERE user = ? AND device = ? AND gateway = ? AND session = ? AND (incarnation, sequence) <= (?, ?)"""
# Those worth keeping come first.
_FORGET: Final = f"""
    DELETE FROM cursors WHERE user = ?1 AND device IN (
        SELECT device FROM cursors WHERE user = ?1 AND device != ?2
        ORDER BY gateway IS NULL, device GLOB '{ANONYMOUS}*', incarnation DESC, sequence DESC
        LIMIT -1 OFFSET {DEVICES_CAP - 1})"""
_CURSOR: Final = "incarnation, sequence, acked, attempts, gateway, session, broadcast"


def claim(db: sqlite3.Connection, user: str, device: str, holder: Holder, floor: Position) -> Claimed:
    row = db.execute(f"SELECT {_CURSOR} FROM cursors WHERE user = ? AND device = ?", (user, device)).fetchone()
    if row is None:
        db.execute(
            "INSERT INTO cursors (user, device, incarnation, sequence, gateway, session) VALUES (?, ?, ?, ?, ?, ?)",
            (user, device, *floor, *holder),
        )
        db.execute(_FORGET, (user, device))
        return Claimed(Cursor(floor), True, None)
    db.execute("UPDATE cursors SET gateway = ?, session = ? WHERE user = ? AND device = ?", (*holder, user, device))
    return Claimed(_cursor(row), False, _holder(row))


def save(db: sqlite3.Connection, updates: Sequence[CursorUpdate], values: Sequence[tuple[object, ...]]) -> list[Lost]:
    """`values` are `save_values` of the updates."""
    db.execute("SAVEPOINT all_at_once")
    if db.executemany(_SAVE, values).rowcount == len(updates):
        db.execute("RELEASE all_at_once")
        return []
    # Rare: some lost their device, or a floor would have moved back. One by one.
    db.execute("ROLLBACK TO all_at_once")
    db.execute("RELEASE all_at_once")
    lost = [update for update in updates if not _save_one(db, update)]
    return [Lost(update.holder, _holder(_row(db, update))) for update in lost]


def holders(db: sqlite3.Connection, user: str) -> list[Holder]:
    query = "SELECT gateway, session FROM cursors WHERE user = ? AND gateway IS NOT NULL"
    return [Holder(*row) for row in db.execute(query, (user,))]


def devices(db: sqlite3.Connection, user: str) -> list[DeviceCursor]:
    rows = db.execute(f"SELECT {_CURSOR}, device FROM cursors WHERE user = ?", (user,))
    return [DeviceCursor(row[7], _cursor(row), _holder(row)) for row in rows]


def _row(db: sqlite3.Connection, update: CursorUpdate) -> tuple[Any, ...] | None:
    query = f"SELECT {_CURSOR} FROM cursors WHERE user = ? AND device = ?"
    row: tuple[Any, ...] | None = db.execute(query, (update.user, update.device)).fetchone()
    return row


def _holder(row: tuple[Any, ...] | None) -> Holder | None:
    return None if row is None or row[4] is None else Holder(row[4], row[5])


def _cursor(row: tuple[Any, ...]) -> Cursor:
    return Cursor(
        Position(row[0], row[1]),
        frozenset(Position(*pair) for pair in orjson.loads(row[2])),
        {Position(incarnation, sequence): count for incarnation, sequence, count in orjson.loads(row[3])},
        None if row[6] is None else cursor_of(orjson.loads(row[6])),
    )


def save_values(update: CursorUpdate) -> tuple[object, ...]:
    floor, cursor = update.cursor.floor, update.cursor
    # tuple(): a named tuple is no JSON for orjson.
    acked = orjson.dumps([tuple(position) for position in sorted(cursor.acked)]) if cursor.acked else b"[]"
    attempts = orjson.dumps([(*at, count) for at, count in cursor.attempts.items()]) if cursor.attempts else b"[]"
    broadcast = None if cursor.broadcast is None else orjson.dumps(cursor_members(cursor.broadcast)).decode()
    holder = (None, None) if update.release else update.holder
    return (
        *floor, acked.decode(), attempts.decode(), broadcast, *holder,
        update.user, update.device, *update.holder, *floor,
    )  # fmt: skip


def _save_one(db: sqlite3.Connection, update: CursorUpdate) -> bool:
    """Write one cursor where its holder still has the device; a floor never moves back."""
    row = _row(db, update)
    if row is None or _holder(row) != update.holder:
        return False
    floor = max(Position(row[0], row[1]), update.cursor.floor)
    acked = frozenset(position for position in update.cursor.acked if position > floor)
    attempts = {position: count for position, count in update.cursor.attempts.items() if position > floor}
    db.execute(_SAVE, save_values(update._replace(cursor=Cursor(floor, acked, attempts, update.cursor.broadcast))))
    return True
