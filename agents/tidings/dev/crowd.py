"""Followers by the thousand, to see what one publish to a celebrity's topic costs.

The users ``crowd-1``, ``crowd-2`` … follow a topic in the store and have no devices: fan-out and inbox agents treat
them as everybody else.
"""

from __future__ import annotations

import asyncio
import re
from collections.abc import Sequence
from typing import Final, NamedTuple

from tidings.identity.rules import Entitlement
from tidings.runtime.settings import Settings
from tidings.store.port import Store
from tidings.wire.position import Position
from tidings.wire.topic import check_topic, patterns_of

__all__ = ["MAX_CROWD", "Crowd", "Gathered"]

MAX_CROWD: Final = 10_000
_IN_FLIGHT: Final = 64
_PAGE: Final = 512
_NOWHERE: Final = Position(0, 0)
"""They never look into their inboxes: it does not matter what of the topic's broadcasts is theirs."""
_MEMBER: Final = re.compile(r"crowd-[1-9][0-9]*")


class Gathered(NamedTuple):
    """A topic's followers, now."""

    followers: int
    """All who get a copy of what is published to the topic: those of subtrees too."""
    crowd: int
    added: int
    removed: int


class Crowd:
    """The synthetic users of one mesh. `store` is opened and closed by whoever made it."""

    def __init__(self, settings: Settings, store: Store) -> None:
        self._store = store
        self._most = settings.subscriptions_max
        self._entitlement = Entitlement(settings.subscribe_rules)
        self._one_at_a_time = asyncio.Lock()

    def may_follow(self, topic: str) -> bool:
        """If the mesh's rules let everybody follow it."""
        # What two may follow is nobody's own.
        return all(self._entitlement.may_subscribe(_name(number), topic) for number in (1, MAX_CROWD))

    async def gather(self, topic: str, size: int) -> Gathered:
        """Make the topic's crowd so large, or so small: repeated it changes nothing. Raises `BadTopic`."""
        check_topic(topic)
        wanted = {_name(number) for number in range(1, size + 1)}
        async with self._one_at_a_time:
            there = {user for user in await self._followers(topic) if _MEMBER.fullmatch(user)}
            added, removed = sorted(wanted - there), sorted(there - wanted)
            await self._change(topic, added, follow=True)
            await self._change(topic, removed, follow=False)
            everybody: set[str] = set()
            for pattern in patterns_of(topic):
                everybody |= await self._followers(pattern)
        return Gathered(len(everybody), size, len(added), len(removed))

    async def _followers(self, pattern: str) -> set[str]:
        found: set[str] = set()
        after: str | None = None
        while True:
            page = await self._store.subscribers(pattern, after, _PAGE)
            found.update(page.users)
            after = page.next
            if after is None:
                return found

    async def _change(self, topic: str, users: Sequence[str], *, follow: bool) -> None:
        for at in range(0, len(users), _IN_FLIGHT):
            await asyncio.gather(*(self._set(user, topic, follow) for user in users[at : at + _IN_FLIGHT]))

    async def _set(self, user: str, topic: str, follow: bool) -> None:
        if follow:
            await self._store.subscribe(user, (topic,), self._most, _NOWHERE)
        else:
            await self._store.unsubscribe(user, (topic,), _NOWHERE)


def _name(number: int) -> str:
    return f"crowd-{number}"
