"""A user's whole inbox: the personal notifications, and the broadcasts of the topics that the user followed.

A broadcast is stored once, however many follow its topic. It comes into somebody's inbox when that somebody looks: all
that lies between the last look and the inbox floor is then noted as references, position and topic without the body,
beside the user's own notifications, under a key of their own. So marks, counts, filters and pages are those of any
notification, and whoever never looks costs nothing. Noting twice is noting once.

Pages of the two are merged by the time at which JetStream stored each; where a page ends is a pair of positions.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import AsyncIterator, Callable, Iterable, Iterator, Sequence
from typing import Any, Final, NamedTuple

import orjson

from tidings.wire.errors import RowsRefused
from tidings.wire.frames import MarkAs, Row
from tidings.wire.position import BROADCAST, PERSONAL, Place, Plane, Position
from tidings.wire.topic import patterns_of

from .port import (
    UNREAD_CAP,
    Broadcast,
    EndedSubscription,
    InboxItem,
    InboxPage,
    InboxRow,
    MarkAllAs,
    PageQuery,
    Store,
)

__all__ = ["Page", "UserInbox", "broadcast_key"]

_BATCH: Final = 500
_NEAR: Final = 2000
"""Broadcasts of all topics that are read to find a user's; beyond, each of the user's topics is asked."""
_AT_ONCE: Final = 16
_LOOK: Final = 200
_NOWHERE: Final = Position(0, 0)

log = logging.getLogger("tidings.store")


def broadcast_key(user: str) -> str:
    """Whom the references of a user's broadcasts are stored under; no user id has a NUL."""
    return user + "\0b"


class Page(NamedTuple):
    """Items with their planes; `next` continues, None at the end."""

    items: Sequence[tuple[Plane, InboxItem]]
    next: Place | None

    def rows(self) -> Iterator[Row]:
        """As `tidings.wire.frames` writes them."""
        for plane, item in self.items:
            yield item.position.text(plane), item.seen, item.read, item.archived, item.delivered, item.body


class UserInbox:
    """The inbox of every user, out of a store. `floor` tells up to where the broadcasts are in the store."""

    def __init__(self, store: Store, floor: Callable[[], Position]) -> None:
        self._store = store
        self._floor = floor

    # What a user's inbox has

    async def page(self, user: str, query: PageQuery, before: Place | None, after: Place | None) -> Page:
        """A page as `Store.page` has it, of both planes; `query` has the other conditions."""
        await self._sync(user)
        oldest_first, bounds = after is not None, before or after or Place(None, None)
        bounds = await self._completed(user, bounds, oldest_first)
        pages = await asyncio.gather(
            self._page(user, query, bounds.personal, oldest_first),
            self._page(broadcast_key(user), query, bounds.broadcast, oldest_first),
        )
        items, counts = _merged(pages, query.limit, oldest_first)
        ends = (_end(page, n, at, oldest_first) for page, n, at in zip(pages, counts, bounds, strict=True))
        next_ = Place(*ends)
        more = any(n < len(page.items) or page.next is not None for page, n in zip(pages, counts, strict=True))
        bodies = await self._bodies(item for plane, item in items if plane == BROADCAST)
        whole = [
            (plane, item._replace(body=bodies[item.position]) if plane == BROADCAST else item)
            for plane, item in items
            if plane == PERSONAL or item.position in bodies
        ]
        return Page(whole, next_ if more else None)

    async def _page(self, key: str, query: PageQuery, bound: Position | None, oldest_first: bool) -> InboxPage:
        side = query._replace(after=bound or _NOWHERE) if oldest_first else query._replace(before=bound)
        return await self._store.page(key, side)

    async def _completed(self, user: str, bounds: Place, oldest_first: bool) -> Place:
        """Both sides of a place of which only one is given: by the time of the notification there."""
        keys = user, broadcast_key(user)
        given = [at is not None for at in bounds]
        if all(given) or not any(given):
            return bounds
        known = given.index(True)
        at = bounds[known]
        assert at is not None
        just_before = Position(at.incarnation, at.sequence - 1)
        found = await self._store.between(keys[known], just_before, at, 1)
        if not found:
            return bounds
        other = await self._at_time(keys[1 - known], found[0].stored_ns, oldest_first)
        return Place(*((at, other) if known == 0 else (other, at)))

    async def _at_time(self, key: str, stored_ns: int, oldest_first: bool) -> Position | None:
        """The bound in a plane that excludes what is newer than a time (or what is not)."""
        bound: Position | None = None
        while True:
            page = await self._store.page(key, PageQuery(_LOOK, before=bound))
            for item in page.items:
                if item.stored_ns <= stored_ns:
                    return item.position if oldest_first else bound
                bound = item.position
            if page.next is None:
                return None if oldest_first else bound
            bound = page.next

    async def unread(self, user: str) -> int:
        """As `Store.unread`."""
        await self._sync(user)
        counts = await asyncio.gather(self._store.unread(user), self._store.unread(broadcast_key(user)))
        return min(UNREAD_CAP, sum(counts))

    async def mark(self, user: str, positions: Iterable[tuple[Plane, Position]], as_: MarkAs) -> None:
        """As `Store.mark`."""
        by_plane: dict[Plane, list[Position]] = {PERSONAL: [], BROADCAST: []}
        for plane, position in positions:
            by_plane[plane].append(position)
        if by_plane[PERSONAL]:
            await self._store.mark(user, by_plane[PERSONAL], as_)
        if by_plane[BROADCAST]:
            await self._store.mark(broadcast_key(user), by_plane[BROADCAST], as_)

    async def mark_all(self, user: str, upto: Place, as_: MarkAllAs) -> None:
        """As `Store.mark_all`."""
        if upto.personal is not None:
            await self._store.mark_all(user, upto.personal, as_)
        if upto.broadcast is not None:
            await self._store.mark_all(broadcast_key(user), upto.broadcast, as_)

    async def export(self, user: str) -> AsyncIterator[dict[str, Any]]:
        """As `Store.export`, with the broadcasts."""
        await self._sync(user)
        async for entry in self._store.export(user):
            yield entry
        async for entry in self._store.export(broadcast_key(user)):
            for member in ("pos", "upto"):
                if member in entry:
                    at = Position.parse(entry[member])
                    entry[member] = at.text(BROADCAST)
                    if entry["kind"] == "notification":
                        bodies = await self._store.broadcast_bodies([at])
                        entry.pop("base64", None)
                        entry["notification"] = orjson.loads(bodies[at]) if at in bodies else None
            yield entry

    async def erase(self, user: str, upto: Place) -> int:
        """As `Store.erase`. The broadcasts themselves are nobody's own, and stay."""
        gone = 0
        if upto.personal is not None:
            gone += await self._store.erase(user, upto.personal)
        if upto.broadcast is not None:
            gone += await self._store.erase(broadcast_key(user), upto.broadcast)
        return gone

    # Catching up

    async def missed_broadcasts(self, user: str, after: Position, upto: Position) -> int:
        """As `Store.missed`, of the broadcasts."""
        await self._sync(user)
        return await self._store.missed(broadcast_key(user), after, upto)

    async def broadcasts_between(
        self, user: str, after: Position, upto: Position, limit: int
    ) -> tuple[list[InboxItem], Position]:
        """As `Store.between`, of the broadcasts; and up to where these are all. A body that has expired is left out."""
        items = await self._store.between(broadcast_key(user), after, upto, limit)
        bodies = await self._bodies(items)
        found = [item._replace(body=bodies[item.position]) for item in items if item.position in bodies]
        return found, items[-1].position if len(items) == limit else upto

    async def _bodies(self, items: Iterable[InboxItem]) -> dict[Position, bytes]:
        positions = [item.position for item in items]
        return await self._store.broadcast_bodies(positions) if positions else {}

    # Looking

    async def _sync(self, user: str) -> None:
        """Note the broadcasts that have come since the last look."""
        upto = self._floor()
        if not upto.sequence:
            return
        synced = await self._store.synced(user)
        if synced >= upto:
            return
        followed = await self._followed(user)
        if not followed:
            return
        if synced.incarnation == upto.incarnation and upto.sequence - synced.sequence <= _NEAR:
            await self._note_near(user, followed, synced, upto)
        else:
            await self._note_far(user, followed, synced, upto)
        await self._store.note_synced(user, upto)

    async def _followed(self, user: str) -> list[EndedSubscription]:
        """Which topics, and within which positions."""
        found: list[EndedSubscription] = []
        after: str | None = None
        while some := await self._store.subscriptions(user, after, _BATCH):
            found += [EndedSubscription(topic, since, self._floor()) for topic, since in some]
            after = some[-1].topic
            if len(some) < _BATCH:
                break
        ended: EndedSubscription | None = None
        while past := await self._store.ended_subscriptions(user, ended, _BATCH):
            found += past
            ended = past[-1]
            if len(past) < _BATCH:
                break
        return found

    async def _note_near(
        self, user: str, followed: Sequence[EndedSubscription], synced: Position, upto: Position
    ) -> None:
        within: dict[str, list[EndedSubscription]] = {}
        for one in followed:
            within.setdefault(one.topic, []).append(one)
        after = synced
        while some := await self._store.broadcasts(after, upto, _BATCH):
            await self._note(
                user,
                [
                    broadcast
                    for broadcast in some
                    if any(
                        one.since < broadcast.position <= one.until
                        for pattern in patterns_of(broadcast.topic)
                        for one in within.get(pattern, ())
                    )
                ],
            )
            after = some[-1].position
            if len(some) < _BATCH:
                break

    async def _note_far(
        self, user: str, followed: Sequence[EndedSubscription], synced: Position, upto: Position
    ) -> None:
        turns = asyncio.Semaphore(_AT_ONCE)

        async def note(one: EndedSubscription) -> None:
            after, until = max(synced, one.since), min(upto, one.until)
            while after < until:
                async with turns:
                    some = await self._store.broadcasts_to(one.topic, after, until, _BATCH)
                    await self._note(user, some)
                if len(some) < _BATCH:
                    break
                after = some[-1].position

        for at in range(0, len(followed), _BATCH):
            await asyncio.gather(*map(note, followed[at : at + _BATCH]))

    async def _note(self, user: str, broadcasts: Sequence[Broadcast]) -> None:
        key = broadcast_key(user)
        rows = [InboxRow(key, one.position, one.id, one.type, one.topic, one.stored_ns, b"") for one in broadcasts]
        if not rows:
            return
        try:
            await self._store.append(rows)
        except RowsRefused as error:
            log.warning("%d broadcasts do not come into the inbox of %r: %s", len(error.reasons), user, error)


def _merged(
    pages: Sequence[InboxPage], limit: int, oldest_first: bool
) -> tuple[list[tuple[Plane, InboxItem]], list[int]]:
    """The first of both by time, and how many of each. A page that may go on ends the merge where it ends."""
    planes: tuple[Plane, Plane] = (PERSONAL, BROADCAST)
    counts = [0, 0]
    items: list[tuple[Plane, InboxItem]] = []
    while len(items) < limit:
        left = [page.items[n] if n < len(page.items) else None for page, n in zip(pages, counts, strict=True)]
        if any(item is None and page.next is not None for item, page in zip(left, pages, strict=True)):
            break
        ahead = [(item.stored_ns, which) for which, item in enumerate(left) if item is not None]
        if not ahead:
            break
        _, which = min(ahead) if oldest_first else max(ahead)
        chosen = left[which]
        assert chosen is not None
        items.append((planes[which], chosen))
        counts[which] += 1
    return items, counts


def _end(page: InboxPage, taken: int, bound: Position | None, oldest_first: bool) -> Position | None:
    """Where a plane goes on behind a merged page."""
    if taken == len(page.items):
        if page.next is not None:
            return page.next
        if not oldest_first:
            # Nothing is older; what comes from now on belongs to no later page.
            return _NOWHERE
    return page.items[taken - 1].position if taken else bound
