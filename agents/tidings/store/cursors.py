"""A cursor as members of a JSON object, alike for all stores."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from tidings.wire.position import Position

from .port import Cursor

__all__ = ["cursor_members", "cursor_of"]


def cursor_members(cursor: Cursor) -> dict[str, Any]:
    """``floor``, and of ``acked``, ``attempts`` and ``broadcast`` those that there are; a position is a pair."""
    members: dict[str, Any] = {"floor": tuple(cursor.floor)}
    if cursor.acked:
        members["acked"] = [tuple(position) for position in sorted(cursor.acked)]
    if cursor.attempts:
        members["attempts"] = [(*position, count) for position, count in cursor.attempts.items()]
    if cursor.broadcast is not None:
        members["broadcast"] = cursor_members(cursor.broadcast)
    return members


def cursor_of(members: Mapping[str, Any]) -> Cursor:
    """The cursor again; other members are passed over."""
    broadcast = members.get("broadcast")
    return Cursor(
        Position(*members["floor"]),
        frozenset(Position(*pair) for pair in members.get("acked", ())),
        {Position(incarnation, sequence): count for incarnation, sequence, count in members.get("attempts", ())},
        None if broadcast is None else cursor_of(broadcast),
    )
