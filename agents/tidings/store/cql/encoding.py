"""What the columns hold: positions as bytes, cursors as JSON, and the timestamps that order the writes."""

from __future__ import annotations

import time
from typing import Final, NamedTuple

import orjson

from tidings.store.cursors import cursor_members, cursor_of
from tidings.store.port import Cursor, Delivered, Holder
from tidings.wire.position import Position

__all__ = [
    "BEFORE_ALL",
    "BEHIND_ALL",
    "BLOCK",
    "BUCKET_S",
    "DAY_US",
    "Clock",
    "DeviceState",
    "block_of",
    "bucket_key",
    "bucket_of",
    "delivered_from_text",
    "delivered_to_text",
    "first_wins",
    "left_s",
    "pack",
    "unpack",
]

DAY_US: Final = 86_400_000_000
BUCKET_S: Final = 10 * 86_400
BUCKET_NS: Final = BUCKET_S * 1_000_000_000
BLOCK: Final = 1000
"""Broadcasts of one partition: sixteen megabytes at most."""
_FIRST_WINS_US: Final = 3_000_000_000_000_000

BEFORE_ALL: Final = b""
BEHIND_ALL: Final = b"\xff" * 15
"""Above every packed position, and no position itself."""


def pack(position: Position) -> bytes:
    """Fourteen bytes that compare as positions do; raises OverflowError for what is none."""
    if position.sequence >> 64:
        raise OverflowError(f"{position.sequence} is no sequence of a stream")
    return (position.incarnation << 64 | position.sequence).to_bytes(14, "big")


def unpack(packed: bytes) -> Position:
    return Position(int.from_bytes(packed[:6], "big"), int.from_bytes(packed[6:], "big"))


def bucket_of(stored_ns: int) -> int:
    """The bucket of what JetStream stored then: the same message is always in the same one."""
    return stored_ns // BUCKET_NS


def left_s(retention_s: int, stored_ns: int, now_us: int) -> int:
    """How long what was stored then is kept from now on, in seconds."""
    return retention_s - max(0, (now_us - stored_ns // 1000) // 1_000_000)


def block_of(position: Position) -> bytes:
    """The block of a broadcast; blocks compare as the positions in them do."""
    return pack(Position(position.incarnation, position.sequence // BLOCK))


def bucket_key(user: bytes, bucket: bytes) -> bytes:
    """The key of a bucket's partition as it is hashed: each part has its length before it and a 0 behind."""
    return b"%b%b\0\0\4%b\0" % (len(user).to_bytes(2, "big"), user, bucket)


class Clock:
    """Unix microseconds that never repeat and never go back, within one process."""

    def __init__(self) -> None:
        self._last = 0

    def now(self) -> int:
        self._last = max(time.time_ns() // 1000, self._last + 1)
        return self._last


def first_wins(at_ms: int) -> int:
    """A write timestamp that is the higher the earlier `at_ms` is: of several writes the earliest stays.

    It lies in the past (ScyllaDB refuses timestamps of the future), and above 0 until 2065.
    """
    return _FIRST_WINS_US - at_ms * 1000


def delivered_to_text(delivered: Delivered) -> bytes:
    return orjson.dumps(tuple(delivered))


def delivered_from_text(text: str | None) -> Delivered | None:
    return None if text is None else Delivered(*orjson.loads(text))


class DeviceState(NamedTuple):
    """The one cell of a device: its cursor, who has it, and the timestamp of this write."""

    cursor: Cursor
    holder: Holder | None
    written_us: int

    def dump(self) -> bytes:
        members = cursor_members(self.cursor) | {"written": self.written_us}
        if self.holder is not None:
            members["holder"] = tuple(self.holder)
        return orjson.dumps(members)

    @classmethod
    def load(cls, text: bytes) -> DeviceState:
        members = orjson.loads(text)
        holder = members.get("holder")
        return cls(cursor_of(members), None if holder is None else Holder(*holder), members["written"])
