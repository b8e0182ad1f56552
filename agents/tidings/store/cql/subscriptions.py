"""Who follows what, by user and by topic.

A topic's subscribers lie on *levels* of 1, 16, 256 and 4096 partitions. A subscription is written to the highest level
that the topic has, where a hash of the user names the partition; the topic gets its next level when one of its
partitions has grown to some thousands. Nothing is ever moved: who came earlier stays on the lower level. So no
partition exceeds some ten thousand rows (the last level's: from forty million subscribers on), and a topic of a few is
one read. A subscription that is ended is deleted on all of them.

Of the two tables the user's is written first, and last: what `subscriptions` shows is in force, and what is in force,
or may be, is found by `erase`. All writes of a call have timestamps of its moment: of two calls at once the later one
wins in both tables.

Where a subscription begins is kept beside it: written before it, deleted after it. So a subscription in force without a
beginning was ended while it was read, or comes from a version that kept none: it is looked at once more.
"""

from __future__ import annotations

import asyncio
import logging
import zlib
from collections.abc import AsyncIterator, Mapping, Sequence
from typing import Any, Final

from cassandra.query import PreparedStatement

from tidings.store.export import exported_ended, exported_subscription
from tidings.store.port import EndedSubscription, SubscriberPage, Subscription
from tidings.wire.errors import TooManySubscriptions
from tidings.wire.position import Position

from .database import Database
from .encoding import BEFORE_ALL, Clock, pack, unpack

__all__ = ["Subscribing"]

_SHARDS: Final = (1, 16, 256, 4096)
_FULL: Final = 5000
"""Rows of a partition from which its topic gets another level."""
_SAMPLE: Final = 16
"""One user of so many looks how full the partition is."""
_CHUNK: Final = 100
_ALL: Final = 1000
_NOWHERE: Final = Position(0, 0)

log = logging.getLogger("tidings.store")


class Subscribing:
    """The subscriptions' part of the store."""

    def __init__(self, database: Database, sql: dict[str, PreparedStatement], clock: Clock, retention_s: int) -> None:
        self._database = database
        self._sql = sql
        self._clock = clock
        self._retention_s = retention_s

    # By user

    async def add(self, user: str, topics: Sequence[str], most: int, since: Position) -> None:
        known = await self._known(user, topics, most)
        now = self._clock.now()
        # Reserved for what is written at the end: no other call of this process has it.
        done = self._clock.now()
        for at in range(0, len(topics), _CHUNK):
            some = topics[at : at + _CHUNK]
            begin, follow = self._sql["begin"], self._sql["follow"]
            # Also of those that are there: somebody may be ending them, whose writes are older.
            starts = [(one, pack(known.get(one, since))) for one in some]
            await self._database.write(self._database.batch(begin.bind((user, *start, done)) for start in starts))
            await self._database.write(self._database.batch(follow.bind((user, one, False, now)) for one in some))
            await asyncio.gather(*(self._join(user, one, now) for one in some))
            await self._database.write(self._database.batch(follow.bind((user, one, True, done)) for one in some))

    async def remove(self, user: str, topics: Sequence[str], until: Position) -> None:
        for at in range(0, len(topics), _CHUNK):
            some = topics[at : at + _CHUNK]
            rows = await self._database.read(self._sql["follows"], user, some)
            starts = dict(await self._database.read(self._sql["starts_of"], user, some))
            end, now = self._sql["end"], self._clock.now()
            # First of all, and also of what a call that died half-way has left: it is repeated, or was.
            ended = [
                end.bind((user, topic, pack(since), pack(until), self._retention_s, now))
                for (topic, since), is_on in await self._with_starts(user, rows, starts)
                if (is_on or topic in starts) and since < until
            ]
            if ended:
                await self._database.write(self._database.batch(ended))
        await self._remove(user, topics)

    async def _remove(self, user: str, topics: Sequence[str]) -> None:
        now = self._clock.now()
        done = self._clock.now()
        for at in range(0, len(topics), _CHUNK):
            some = topics[at : at + _CHUNK]
            off = self._sql["follow"]
            await self._database.write(self._database.batch(off.bind((user, one, False, now)) for one in some))
            await asyncio.gather(*(self._leave(user, one, now) for one in some))
            for gone in (self._sql["unfollow"], self._sql["forget_start"]):
                await self._database.write(self._database.batch(gone.bind((done, user, one)) for one in some))

    async def _known(self, user: str, topics: Sequence[str], most: int) -> dict[str, Position]:
        """Where the user's subscriptions began; raises `TooManySubscriptions` where there is no room for more."""
        known: set[str] = set()
        began: dict[str, Position] = {}
        async for (topic, since), is_on in self._followed(user):
            known.add(topic)
            if is_on:
                began[topic] = since
        if len(known.union(topics)) > max(most, len(known)):
            raise TooManySubscriptions(f"{user!r} would have more than {most} subscriptions: end some first")
        return began

    async def _followed(self, user: str, after: str = "") -> AsyncIterator[tuple[Subscription, bool]]:
        """The user's subscriptions, and if they are in force."""
        while True:
            found = await self._database.read(self._sql["followed"], user, after, _ALL)
            if found:
                starts = await self._database.read(self._sql["starts"], user, after, found[-1][0])
                for one in await self._with_starts(user, found, dict(starts)):
                    yield one
            if len(found) < _ALL:
                return
            after = found[-1][0]

    async def _with_starts(
        self, user: str, rows: Sequence[tuple[str, bool | None]], starts: Mapping[str, bytes]
    ) -> list[tuple[Subscription, bool]]:
        """Rows with their beginnings, which were read after them."""
        unknown = [topic for topic, is_on in rows if is_on and topic not in starts]
        on = {topic for topic, is_on in rows if is_on}
        for at in range(0, len(unknown), _CHUNK):
            some = unknown[at : at + _CHUNK]
            still = {topic for topic, is_on in await self._database.read(self._sql["follows"], user, some) if is_on}
            on -= set(some) - still
        return [
            (Subscription(topic, unpack(starts[topic]) if topic in starts else _NOWHERE), topic in on)
            for topic, _ in rows
        ]

    async def of_user(self, user: str, after: str | None, limit: int) -> list[Subscription]:
        found: list[Subscription] = []
        async for subscription, is_on in self._followed(user, after or ""):
            if is_on:
                found.append(subscription)
            if len(found) == limit:
                break
        return found

    async def ended_of_user(self, user: str, after: EndedSubscription | None, limit: int) -> list[EndedSubscription]:
        behind = ("", BEFORE_ALL) if after is None else (after.topic, pack(after.since))
        found = await self._database.read(self._sql["ended"], user, *behind, limit)
        return [EndedSubscription(topic, unpack(since), unpack(until)) for topic, since, until in found]

    async def export(self, user: str) -> AsyncIterator[dict[str, Any]]:
        async for subscription, _ in self._followed(user):
            yield exported_subscription(subscription)
        last: EndedSubscription | None = None
        while ended := await self.ended_of_user(user, last, _ALL):
            for last in ended:
                yield exported_ended(last)

    async def erase(self, user: str) -> None:
        await self._remove(user, [subscription.topic async for subscription, _ in self._followed(user)])
        for name in ("erase_starts", "erase_ended"):
            await self._database.write(self._sql[name].bind((self._clock.now(), user)))

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
