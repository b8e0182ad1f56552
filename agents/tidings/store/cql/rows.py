"""A user's notifications in the order of positions, out of their buckets."""

from __future__ import annotations

from collections import deque
from collections.abc import AsyncIterator, Sequence
from typing import Any, Final, NamedTuple

from cassandra.query import PreparedStatement

from .database import Database

__all__ = ["Head", "Row", "in_order"]

_CHUNK: Final = 200


class Head(NamedTuple):
    """What is to be known of a user before any row is read."""

    buckets: Sequence[int]
    """Those that may hold notifications, ascending."""
    seen_all: bytes
    """Packed watermarks, empty where there is none."""
    archived_all: bytes


class Row(NamedTuple):
    """A row of ``inbox``."""

    packed: bytes
    stored: int
    body: bytes
    type: str
    topic: str | None


class _Bucket:
    """The rows of one bucket, a chunk at a time."""

    def __init__(
        self,
        database: Database,
        statement: PreparedStatement,
        key: tuple[str, int],
        bounds: tuple[bytes, bytes],
        chunk: int,
        newest_first: bool,
    ) -> None:
        self._database = database
        self._statement = statement
        self._key = key
        self._low, self._high = bounds
        self._chunk = chunk
        self._newest_first = newest_first
        self._more = True
        self.rows: deque[Row] = deque()

    async def fill(self) -> bool:
        """Have a row at hand; False at the end."""
        while not self.rows and self._more:
            found: list[Any] = await self._database.read(
                self._statement, *self._key, self._low, self._high, self._chunk
            )
            self.rows.extend(map(Row._make, found))
            self._more = len(found) == self._chunk
            if self._more and self._newest_first:
                self._high = found[-1][0]
            elif self._more:
                self._low = found[-1][0]
            self._chunk = _CHUNK
        return bool(self.rows)


async def in_order(
    database: Database,
    statement: PreparedStatement,
    user: str,
    buckets: Sequence[int],
    bounds: tuple[bytes, bytes],
    *,
    newest_first: bool,
    chunk: int,
) -> AsyncIterator[Row]:
    """Rows strictly between the bounds. `statement` is the one that reads a bucket in this direction.

    Positions follow the time of storing, by which buckets are cut, except around a change of the stream's leader
    whose clock differs: two neighbours are read at a time and merged.
    """
    waiting = deque(
        _Bucket(database, statement, (user, bucket), bounds, chunk, newest_first)
        for bucket in (reversed(buckets) if newest_first else buckets)
    )
    active: list[_Bucket] = []
    choose = max if newest_first else min
    while True:
        active = [bucket for bucket in active if await bucket.fill()]
        while len(active) < 2 and waiting:
            bucket = waiting.popleft()
            if await bucket.fill():
                active.append(bucket)
        if not active:
            return
        yield choose(active, key=lambda bucket: bucket.rows[0].packed).rows.popleft()
