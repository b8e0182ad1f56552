"""Who follows what, by user and by topic.

A topic's subscribers lie on *levels* of 1, 16, 256 and 4096 partitions. A subscription is written to the highest level
that the topic has, where a hash of the user names the partition; the topic gets its next level when one of its
partitions has grown to some thousands. Nothing is ever moved: who came earlier stays on the lower level. So no
partition exceeds some ten thousand rows (the last level's: from forty million subscribers on), and a topic of a few is
one read. A subscription that is ended is deleted on all of them.

Of the two tables the user's is written first, and last: what `subscriptions` shows is in force, and what is in force,
or may be, is found by `erase`. All writes of a call have timestamps of its moment: of two calls at once the later one
wins in both tables.
"""

from __future__ import annotations

import asyncio
import logging
import zlib
from collections.abc import AsyncIterator, Sequence
from typing import Any, Final

from cassandra.query import PreparedStatement

from tidings.store.export import exported_subscription
from tidings.store.port import SubscriberPage
from tidings.wire.errors import TooManySubscriptions

from .database import Database
from .encoding import Clock

__all__ = ["Subscribing"]

_SHARDS: Final = (1, 16, 256, 4096)
_FULL: Final = 5000
"""Rows of a partition from which its topic gets another level."""
_SAMPLE: Final = 16
"""One user of so many looks how full the partition is."""
_CHUNK: Final = 100
_ALL: Final = 1000

log = logging.getLogger("tidings.store")


class Subscribing:
    """The subscriptions' part of the store."""

    def __init__(self, database: Database, sql: dict[str, PreparedStatement], clock: Clock) -> None:
        self._database = database
        self._sql = sql
        self._clock = clock

    # By user

    async def add(self, user: str, topics: Sequence[str], most: int) -> None:
        await self._check_room(user, topics, most)
        now = self._clock.now()
        # Reserved for what is written at the end: no other call of this process has it.
        done = self._clock.now()
        for at in range(0, len(topics), _CHUNK):
            some = topics[at : at + _CHUNK]
            follow = self._sql["follow"]
            await self._database.write(self._database.batch(follow.bind((user, one, False, now)) for one in some))
            await asyncio.gather(*(self._join(user, one, now) for one in some))
            await self._database.write(self._database.batch(follow.bind((user, one, True, done)) for one in some))

    async def remove(self, user: str, topics: Sequence[str]) -> None:
        now = self._clock.now()
        done = self._clock.now()
        for at in range(0, len(topics), _CHUNK):
            some = topics[at : at + _CHUNK]
            off = self._sql["follow"]
            await self._database.write(self._database.batch(off.bind((user, one, False, now)) for one in some))
            await asyncio.gather(*(self._leave(user, one, now) for one in some))
            gone = self._sql["unfollow"]
            await self._database.write(self._database.batch(gone.bind((done, user, one)) for one in some))

    async def _check_room(self, user: str, topics: Sequence[str], most: int) -> None:
        known: set[str] = set()
        async for topic, _ in self._followed(user):
            known.add(topic)
        if len(known.union(topics)) > max(most, len(known)):
            raise TooManySubscriptions(f"{user!r} would have more than {most} subscriptions: end some first")

    async def _followed(self, user: str, after: str = "") -> AsyncIterator[tuple[str, bool | None]]:
        while True:
            found = await self._database.read(self._sql["followed"], user, after, _ALL)
            for topic, is_on in found:
                yield topic, is_on
            if len(found) < _ALL:
                return
            after = found[-1][0]

    async def of_user(self, user: str, after: str | None, limit: int) -> list[str]:
        found: list[str] = []
        async for topic, is_on in self._followed(user, after or ""):
            if is_on:
                found.append(topic)
            if len(found) == limit:
                break
        return found

    async def export(self, user: str) -> AsyncIterator[dict[str, Any]]:
        async for topic, _ in self._followed(user):
            yield exported_subscription(topic)

    async def erase(self, user: str) -> None:
        await self.remove(user, [topic async for topic, _ in self._followed(user)])

    # By topic

    async def _levels(self, topic: str) -> int:
        found = await self._database.read(self._sql["levels"], topic)
        return max(found[0][0]) if found and found[0][0] else 0

    async def _join(self, user: str, topic: str, now: int) -> None:
        level = await self._levels(topic)
        digest = zlib.crc32(user.encode())
        shard = digest % _SHARDS[level]
        await self._database.write(self._sql["join"].bind((topic, level, shard, user, now)))
        if digest // _SHARDS[-1] % _SAMPLE == 0 and level + 1 < len(_SHARDS):
            count = (await self._database.read(self._sql["crowd"], topic, level, shard))[0][0]
            if count >= _FULL:
                log.info("%r has some %d subscribers: it gets %d partitions more", topic, count, _SHARDS[level + 1])
                await self._database.write(self._sql["add_level"].bind((now, {level + 1}, topic)))

    async def _leave(self, user: str, topic: str, now: int) -> None:
        digest = zlib.crc32(user.encode())
        # And on the next one: somebody who subscribes at this moment may have seen it come.
        for level in range(min(await self._levels(topic) + 2, len(_SHARDS))):
            values = now, topic, level, digest % _SHARDS[level], user
            await self._database.write(self._sql["leave"].bind(values))

    async def of_topic(self, topic: str, after: str | None, limit: int) -> SubscriberPage:
        """`after` is level, shard and user."""
        level, shard, user = _place(after)
        found = await self._database.read(self._sql["members"], topic, level, shard, user, limit)
        users = [row[0] for row in found]
        if len(users) == limit:
            return SubscriberPage(users, f"{level} {shard} {users[-1]}")
        if shard + 1 < _SHARDS[level]:
            return SubscriberPage(users, f"{level} {shard + 1} ")
        if level < await self._levels(topic):
            return SubscriberPage(users, f"{level + 1} 0 ")
        return SubscriberPage(users, None)


def _place(after: str | None) -> tuple[int, int, str]:
    if after is None:
        return 0, 0, ""
    level, shard, user = after.split(" ", 2)
    return int(level), int(shard), user
