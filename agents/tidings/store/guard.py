"""A store whose users do not wait for it when it is down: a deadline for each call, and a circuit breaker.

::

    closed --(failures in a row)--> open --(cool-down)--> half open --(one call succeeds)--> closed
                                      ^------------------(it fails)------'

While it is open every call fails at once, so that a store that is down or slow costs a gateway no memory and its
clients no wait. Writes that their caller repeats until they succeed (`append`, `append_broadcasts`, `note_floors`,
`note_synced`, `save`, `delivered`) are not refused: they tell whether the store is back, and have their own way of
waiting.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import AsyncIterator, Coroutine, Mapping, Sequence
from typing import Any, Final, TypeVar

from tidings.runtime.backoff import Backoff
from tidings.wire.errors import StoreUnavailable
from tidings.wire.frames import MarkAs
from tidings.wire.position import Position

from .port import (
    Broadcast,
    Claimed,
    CursorUpdate,
    DeliveredMark,
    DeviceCursor,
    EndedSubscription,
    Holder,
    InboxItem,
    InboxPage,
    InboxRow,
    Lost,
    MarkAllAs,
    PageQuery,
    Store,
    SubscriberPage,
    Subscription,
)

__all__ = ["GuardedStore"]

_FAILURES: Final = 3
_COOL_DOWN_S: Final = (0.5, 10.0)

Result = TypeVar("Result")

log = logging.getLogger("tidings.store")


class GuardedStore:
    """The `Store` port around another store, which whoever made it opens and closes."""

    def __init__(self, store: Store, timeout_s: float) -> None:
        self._store = store
        self._timeout_s = timeout_s
        self._failures = 0
        self._backoff = Backoff(*_COOL_DOWN_S)
        self._closed_until = 0.0
        self._trying = False

    # The breaker

    async def _call(self, work: Coroutine[Any, Any, Result]) -> Result:
        loop = asyncio.get_running_loop()
        if self._failures >= _FAILURES and (self._trying or loop.time() < self._closed_until):
            work.close()
            raise StoreUnavailable("the store did not answer a moment ago: it is asked again soon")
        trying = self._trying = self._failures >= _FAILURES
        try:
            async with asyncio.timeout(self._timeout_s):
                result = await work
        except TimeoutError:
            self._failed()
            raise StoreUnavailable(f"the store did not answer within {self._timeout_s:g} s") from None
        except StoreUnavailable:
            self._failed()
            raise
        finally:
            if trying:
                self._trying = False
        self._worked()
        return result

    def _failed(self) -> None:
        self._failures += 1
        now = asyncio.get_running_loop().time()
        if self._failures == _FAILURES:
            log.warning("the store fails: what needs it is refused until it answers")
        # However many fail together, it is one failure of the store.
        if self._failures >= _FAILURES and now >= self._closed_until:
            self._closed_until = now + self._backoff.next()

    def _worked(self) -> None:
        if self._failures >= _FAILURES:
            log.warning("the store answers again")
        self._failures = 0
        self._closed_until = 0.0
        self._backoff.reset()

    async def _observed(self, work: Coroutine[Any, Any, Result]) -> Result:
        """Not refused, but it tells how the store is."""
        try:
            result = await work
        except StoreUnavailable:
            self._failed()
            raise
        self._worked()
        return result

    # The port: refused while the breaker is open

    async def page(self, user: str, query: PageQuery) -> InboxPage:
        return await self._call(self._store.page(user, query))

    async def between(self, user: str, after: Position, upto: Position, limit: int) -> list[InboxItem]:
        return await self._call(self._store.between(user, after, upto, limit))

    async def missed(self, user: str, after: Position, upto: Position) -> int:
        return await self._call(self._store.missed(user, after, upto))

    async def unread(self, user: str) -> int:
        return await self._call(self._store.unread(user))

    async def mark(self, user: str, positions: Sequence[Position], as_: MarkAs) -> None:
        await self._call(self._store.mark(user, positions, as_))

    async def mark_all(self, user: str, upto: Position, as_: MarkAllAs) -> None:
        await self._call(self._store.mark_all(user, upto, as_))

    async def claim(self, user: str, device: str, holder: Holder, floor: Position) -> Claimed:
        return await self._call(self._store.claim(user, device, holder, floor))

    async def holders(self, user: str) -> list[Holder]:
        return await self._call(self._store.holders(user))

    async def devices(self, user: str) -> list[DeviceCursor]:
        return await self._call(self._store.devices(user))

    async def subscribe(self, user: str, topics: Sequence[str], most: int, since: Position) -> None:
        await self._call(self._store.subscribe(user, topics, most, since))

    async def unsubscribe(self, user: str, topics: Sequence[str], until: Position) -> None:
        await self._call(self._store.unsubscribe(user, topics, until))

    async def subscriptions(self, user: str, after: str | None, limit: int) -> list[Subscription]:
        return await self._call(self._store.subscriptions(user, after, limit))

    async def ended_subscriptions(
        self, user: str, after: EndedSubscription | None, limit: int
    ) -> list[EndedSubscription]:
        return await self._call(self._store.ended_subscriptions(user, after, limit))

    async def subscribers(self, topic: str, after: str | None, limit: int) -> SubscriberPage:
        return await self._call(self._store.subscribers(topic, after, limit))

    async def broadcasts(self, after: Position, upto: Position, limit: int) -> list[Broadcast]:
        return await self._call(self._store.broadcasts(after, upto, limit))

    async def broadcasts_to(self, pattern: str, after: Position, upto: Position, limit: int) -> list[Broadcast]:
        return await self._call(self._store.broadcasts_to(pattern, after, upto, limit))

    async def broadcast_bodies(self, positions: Sequence[Position]) -> dict[Position, bytes]:
        return await self._call(self._store.broadcast_bodies(positions))

    async def synced(self, user: str) -> Position:
        return await self._call(self._store.synced(user))

    # The port: passed on

    async def open(self) -> None:
        await self._store.open()

    async def close(self) -> None:
        await self._store.close()

    async def check(self) -> None:
        try:
            async with asyncio.timeout(self._timeout_s):
                await self._store.check()
        except TimeoutError:
            raise StoreUnavailable(f"the store did not answer within {self._timeout_s:g} s") from None
        self._worked()

    async def append(self, rows: Sequence[InboxRow]) -> None:
        await self._observed(self._store.append(rows))

    async def append_broadcasts(self, rows: Sequence[Broadcast]) -> None:
        await self._observed(self._store.append_broadcasts(rows))

    async def note_synced(self, user: str, upto: Position) -> None:
        await self._observed(self._store.note_synced(user, upto))

    async def floors(self) -> dict[int, Position]:
        return await self._observed(self._store.floors())

    async def note_floors(self, floors: Mapping[int, Position]) -> None:
        await self._observed(self._store.note_floors(floors))

    async def save(self, updates: Sequence[CursorUpdate]) -> list[Lost]:
        return await self._observed(self._store.save(updates))

    async def delivered(self, marks: Sequence[DeliveredMark]) -> None:
        await self._observed(self._store.delivered(marks))

    async def expire(self, before_ns: int) -> int:
        return await self._store.expire(before_ns)

    def export(self, user: str) -> AsyncIterator[dict[str, Any]]:
        return self._store.export(user)

    async def erase(self, user: str, upto: Position) -> int:
        return await self._store.erase(user, upto)
