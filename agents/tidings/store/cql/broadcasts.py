"""What was published to topics and is kept once, and up to where each user has it.

A broadcast lies with its body in a *block*: a thousand positions of one incarnation, so that a position says where it
is. Its references lie in buckets of time of each pattern, as a user's notifications do. Blocks are listed in one
partition, a row each, and a pattern's buckets in one row: with what is written first into them, and again in minutes,
so that the listing outlives what it lists.

A reader goes on in the block where it left off, and asks for the list of blocks only behind its end: neither what has
expired nor another incarnation makes it look into blocks that are not there.
"""

from __future__ import annotations

import asyncio
from collections import defaultdict
from collections.abc import Sequence
from typing import Final

from cassandra.query import PreparedStatement

from tidings.store.port import Broadcast
from tidings.wire.errors import RowsRefused
from tidings.wire.position import Position
from tidings.wire.topic import patterns_of

from .appending import Listed, write_rows
from .database import Database
from .encoding import BUCKET_S, Clock, block_of, bucket_key, bucket_of, left_s, pack, unpack
from .express import Write, int4, int8

__all__ = ["Broadcasts"]

_CHUNK: Final = 40
_BLOCKS: Final = 100
_ONE_BUCKET: Final = b"\0\0\0\1\0\0\0\4"
"""A set of one integer, which follows."""
_LONGER_S: Final = 3600
"""A block is listed for so long behind the retention: more than the time after which it is listed again."""
_DAY_S: Final = 86_400


class Broadcasts:
    """The broadcasts' part of the store."""

    def __init__(self, database: Database, sql: dict[str, PreparedStatement], clock: Clock, retention_s: int) -> None:
        self._database = database
        self._sql = sql
        self._clock = clock
        self._retention_s = retention_s
        self._listed = Listed(clock)
        """Blocks, and buckets by their partition key."""

    # Writing

    async def append(self, rows: Sequence[Broadcast]) -> None:
        """A statement for the row and for each of its patterns; the first of a block or a bucket costs another one."""
        listed: set[bytes] = set()
        refused = await write_rows(self._database, rows, lambda row: self._row_writes(row, listed))
        self._listed.remember(listed)
        if refused:
            raise RowsRefused(refused)

    def _row_writes(self, row: Broadcast, listed: set[bytes]) -> list[Write]:
        """The writes of a row; blocks and buckets that are not known to be listed are noted in `listed`."""
        ttl_s = left_s(self._retention_s, row.stored_ns, self._clock.now())
        if ttl_s <= 0:
            return []
        block, packed, bucket = block_of(row.position), pack(row.position), int4(bucket_of(row.stored_ns))
        common = row.topic.encode(), row.id.encode(), row.type.encode(), int8(row.stored_ns)
        ttl, at = int4(ttl_s), int8(row.stored_ns // 1000)
        writes = [Write(self._sql["broadcast"], (block, packed, *common, row.body, ttl, at), block)]
        if block not in listed and block not in self._listed:
            listed.add(block)
            longer = int4(self._retention_s + _LONGER_S)
            writes.append(Write(self._sql["list_block"], (block, longer, at), b"broadcast"))
        for pattern in patterns_of(row.topic):
            name = pattern.encode()
            key = bucket_key(name, bucket)
            writes.append(Write(self._sql["refer"], (name, bucket, packed, *common, ttl, at), key))
            if key not in listed and key not in self._listed:
                listed.add(key)
                longest = int4(self._retention_s + BUCKET_S)
                writes.append(Write(self._sql["list_pattern"], (longest, at, _ONE_BUCKET + bucket, name), name))
        return writes

    # Reading

    async def between(self, after: Position, upto: Position, limit: int) -> list[Broadcast]:
        low, high = pack(after), pack(upto)
        block, last = block_of(Position(after.incarnation, after.sequence + 1)), block_of(upto)
        if low >= high:
            return []
        found = await self._of_block(block, low, high, limit)
        while len(found) < limit and block < last:
            listed = await self._database.read(self._sql["blocks"], block, last, _BLOCKS)
            for (block,) in listed:
                found += await self._of_block(block, low, high, limit - len(found))
                if len(found) == limit:
                    break
            if len(listed) < _BLOCKS:
                break
        return found

    async def _of_block(self, block: bytes, low: bytes, high: bytes, limit: int) -> list[Broadcast]:
        rows = await self._database.read(self._sql["broadcasts"], block, low, high, limit)
        return [_broadcast(*row) for row in rows]

    async def of_pattern(self, pattern: str, after: Position, upto: Position, limit: int) -> list[Broadcast]:
        found = await self._database.read(self._sql["pattern"], pattern)
        if not found or not found[0][0]:
            return []
        values = pattern, sorted(found[0][0]), pack(after), pack(upto), limit
        return [_broadcast(*row) for row in await self._database.read(self._sql["references"], *values)]

    async def bodies(self, positions: Sequence[Position]) -> dict[Position, bytes]:
        by_block: defaultdict[bytes, list[bytes]] = defaultdict(list)
        for position in dict.fromkeys(positions):
            by_block[block_of(position)].append(pack(position))
        answers = await asyncio.gather(
            *(
                self._database.read(self._sql["bodies"], block, packed[at : at + _CHUNK])
                for block, packed in by_block.items()
                for at in range(0, len(packed), _CHUNK)
            )
        )
        return {unpack(packed): body for rows in answers for packed, body in rows}

    # Users

    async def synced(self, user: str) -> Position:
        found = await self._database.read(self._sql["synced"], user)
        return unpack(found[0][0]) if found else Position(0, 0)

    async def note_synced(self, user: str, upto: Position) -> None:
        if upto > await self.synced(user):
            # By the time at which it goes all that it covers is gone.
            values = user, pack(upto), self._retention_s + _DAY_S, self._clock.now()
            await self._database.write(self._sql["note_synced"].bind(values))

    async def erase(self, user: str) -> None:
        await self._database.write(self._sql["erase_synced"].bind((self._clock.now(), user)))


def _broadcast(packed: bytes, topic: str, id: str, type_: str, stored: int, body: bytes = b"") -> Broadcast:
    return Broadcast(topic, unpack(packed), id, type_, stored, body)
