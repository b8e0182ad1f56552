"""What the users of a gateway follow, as far as broadcasts go: read when a session is opened and when it changes.

Whoever changes a subscription has every gateway that holds a device of the user read it again before the answer is
given (`Follows.changed`). From the moment in which a gateway is asked until it has read, the user's lanes are held:
what came behind the question is handed out by the answer, also where the gateway stood still and nobody waited for it.
One that was cut off from NATS, and may have missed being asked, holds all lanes until it is back and has read again.
"""

from __future__ import annotations

import asyncio
import logging
import sys
from dataclasses import replace
from typing import TYPE_CHECKING, Final
from weakref import WeakValueDictionary

from tidings.runtime.backoff import Backoff
from tidings.store.port import Cursor
from tidings.stream import gateways
from tidings.wire.errors import StoreUnavailable
from tidings.wire.position import Position

from .lane import Lane

if TYPE_CHECKING:
    from .hub import Hub
    from .session import Session

__all__ = ["Follows"]

_PAGE: Final = 500
_AT_ONCE: Final = 32

log = logging.getLogger("tidings.gateway")


class Follows:
    """Gives sessions their lanes, and lanes the topics that their user follows."""

    def __init__(self, hub: Hub) -> None:
        self._hub = hub
        self._locks: WeakValueDictionary[str, asyncio.Lock] = WeakValueDictionary()
        """Each for as long as somebody has it or waits for it."""
        self._held: dict[str, int] = {}
        """How many readings of a user's subscriptions the user's lanes wait for."""
        self._cut_off = False

    def _alone(self, user: str) -> asyncio.Lock:
        """One reading of a user's subscriptions after the other: what is applied last was read last."""
        return self._locks.setdefault(user, asyncio.Lock())

    async def _read(self, user: str) -> dict[str, Position]:
        found: dict[str, Position] = {}
        after: str | None = None
        while some := await self._hub.store.subscriptions(user, after, _PAGE):
            # Many users of a gateway follow the same: one text for all of them.
            found.update((sys.intern(topic), since) for topic, since in some)
            after = some[-1].topic
            if len(some) < _PAGE:
                break
        return found

    async def open(self, session: Session, cursor: Cursor) -> None:
        """Give a session that is being opened its lane, if its user follows anything. Raises `StoreUnavailable`."""
        async with self._alone(session.user):
            follows = await self._read(session.user)
            if not session.has_ended():
                session.place = cursor
                self._apply(session, follows)

    async def reload(self, user: str) -> None:
        """Read a user's subscriptions again, for all sessions of the user here. Raises `StoreUnavailable`."""
        if user not in self._hub.users:
            return
        async with self._alone(user):
            follows = await self._read(user)
            for session in self._hub.users.get(user, ()):
                # Without a place it has not read them yet, and will.
                if session.place is not None:
                    if session.lane is None and follows:
                        # Not from now on: the user was told that it is in force, if this gateway was away meanwhile.
                        begin = max(session.place.floor, min(follows.values()))
                        session.place = replace(session.place, floor=begin)
                    self._apply(session, follows)

    def _apply(self, session: Session, follows: dict[str, Position]) -> None:
        lane, feed = session.lane, self._hub.feed
        if lane is not None:
            feed.refollow(lane, follows)
        elif follows:
            assert session.place is not None
            session.lane = lane = Lane(session, session.place, session.window.size, follows)
            feed.add(lane)
            lane.catch_up()

    async def changed(self, user: str) -> None:
        """A user's subscriptions have changed: bring that into force wherever they are.

        Raises `StoreUnavailable` and `StreamUnavailable` when that may have failed; what is stored stands.
        """
        await self.reload(user)
        hub = self._hub
        elsewhere = {holder.gateway for holder in await hub.store.holders(user)} - {hub.gateway}
        await gateways.reload(hub.connection, elsewhere, user)

    def asked(self, user: str, reply: str) -> None:
        """Another gateway changed what a user follows."""
        # At once: what was read from NATS together with this may be handed out before any task begins.
        self._hold(user)
        self._hub.spawn(self._answer(user, reply))

    async def _answer(self, user: str, reply: str) -> None:
        await self._catch(user)
        if reply:
            self._hub.connection.send(reply, b"ok")

    def cut_off(self) -> None:
        """The connection is broken: whoever changes something cannot ask here."""
        self._cut_off = True
        for lane in self._hub.feed.lanes:
            lane.leave()

    async def reload_all(self) -> None:
        """After a break of the connection: no lane goes on before its user's subscriptions were read."""
        turns = asyncio.Semaphore(_AT_ONCE)

        async def one(user: str) -> None:
            async with turns:
                await self._catch(user)

        users = list(self._hub.users)
        for user in users:
            self._hold(user)
        self._cut_off = False
        await asyncio.gather(*map(one, users))

    async def _catch(self, user: str) -> None:
        """Read what a user follows, however long that takes. The user's lanes, which were held for it, go on."""
        backoff = Backoff(0.1, 5.0)
        while True:
            try:
                await self.reload(user)
                break
            except StoreUnavailable as error:
                log.warning("broadcasts of %r wait: what the user follows cannot be read: %s", user, error)
                await asyncio.sleep(backoff.next())
        self._held[user] -= 1
        if not self._held[user]:
            del self._held[user]
            for lane in self._lanes(user):
                lane.catch_up()

    def holds(self, user: str) -> bool:
        """If the user's lanes are to hand nothing out: it is not known what the user follows."""
        return self._cut_off or user in self._held

    def _hold(self, user: str) -> None:
        self._held[user] = self._held.get(user, 0) + 1
        for lane in self._lanes(user):
            lane.leave()
            lane.wake()

    def _lanes(self, user: str) -> list[Lane]:
        return [session.lane for session in self._hub.users.get(user, ()) if session.lane is not None]
