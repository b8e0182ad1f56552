"""What the log holds of one user: to show it, and to take it out."""

from __future__ import annotations

import base64
from collections.abc import AsyncIterator
from datetime import UTC, datetime
from typing import Any

from tidings.wire import subject
from tidings.wire.position import Position

from . import consumers, letters, topology
from .connection import ApiError, Connection
from .consumers import NOT_FOUND
from .letter import Filter, readable
from .topology import BROADCAST_PART, notify_stream

__all__ = ["broadcast_floor", "dead_of_user", "newest", "of_user", "purge", "purge_dead"]


async def _place(connection: Connection, user: str) -> tuple[int, int, str]:
    """The user's partition, its incarnation and the subject there."""
    found = await topology.discover(connection)
    token = subject.escape(user)
    partition = subject.partition(token, found.partitions)
    return partition, found.incarnations[partition], subject.part_user(token, partition)


async def newest(connection: Connection, user: str) -> Position:
    """Nothing that the log has for the user now lies above this position."""
    partition, incarnation, _ = await _place(connection, user)
    info = await connection.api(f"STREAM.INFO.{notify_stream(partition)}")
    return Position(incarnation, info["state"]["last_seq"])


async def broadcast_floor(connection: Connection) -> Position:
    """Up to where the broadcasts are in the store."""
    found = await topology.discover(connection)
    return Position(found.broadcast, await consumers.inbox_floor(connection, BROADCAST_PART))


async def _messages(connection: Connection, stream: str, where: str) -> AsyncIterator[dict[str, Any]]:
    """The messages of a stream on a subject, oldest first, one request each."""
    sequence = 0
    while True:
        try:
            found = await connection.api(f"STREAM.MSG.GET.{stream}", {"seq": sequence + 1, "next_by_subj": where})
        except ApiError as error:
            if error.status != NOT_FOUND:
                raise
            return
        message: dict[str, Any] = found["message"]
        sequence = message["seq"]
        yield message


async def of_user(connection: Connection, user: str) -> AsyncIterator[dict[str, Any]]:
    """The user's notifications in the log, as JSON-ready objects, and until when the log keeps each."""
    partition, incarnation, where = await _place(connection, user)
    stream = notify_stream(partition)
    max_age_s = (await connection.api(f"STREAM.INFO.{stream}"))["config"]["max_age"] / 1e9
    async for message in _messages(connection, stream, where):
        stored = datetime.fromisoformat(message["time"])
        until = datetime.fromtimestamp(stored.timestamp() + max_age_s, UTC)
        yield {
            "kind": "logged",
            "pos": str(Position(incarnation, message["seq"])),
            "stored": message["time"],
            "until": until.isoformat(timespec="seconds").replace("+00:00", "Z") if max_age_s else None,
            **readable(base64.b64decode(message.get("data", ""))),
        }


async def dead_of_user(connection: Connection, user: str) -> AsyncIterator[dict[str, Any]]:
    """The user's dead letters, as JSON-ready objects. Reads all dead letters."""
    async for letter in letters.each(connection, Filter(user=user)):
        yield {
            "kind": "dead",
            "stored": letter.stored,
            "headers": letter.headers,
            **readable(letter.body),
        }


async def purge(connection: Connection, user: str) -> int:
    """Delete the user's notifications from the log; returns how many."""
    partition, _, where = await _place(connection, user)
    answer = await connection.api(f"STREAM.PURGE.{notify_stream(partition)}", {"filter": where})
    purged: int = answer["purged"]
    return purged


async def purge_dead(connection: Connection, user: str) -> int:
    """Delete the dead letters that were the user's; returns how many. Reads all dead letters."""
    gone = 0
    async for letter in letters.each(connection, Filter(user=user)):
        gone += await letters.discard(connection, letter.sequence)
    return gone
