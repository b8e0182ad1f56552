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
from collections.abc import AsyncIterator, Coroutine, Iterable, Mapping, Sequence
from time import perf_counter
from typing import Any, Final, TypeVar

from tidings.runtime.backoff import Backoff
from tidings.telemetry import catalogue
from tidings.telemetry.numbers import Numbers, Values
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

__all__ = ["GuardedStore", "StoreCalls"]

_FAILURES: Final = 3
_COOL_DOWN_S: Final = (0.5, 10.0)

Result = TypeVar("Result")

log = logging.getLogger("tidings.store")


class StoreCalls:
    """How long the calls to a store take."""

    def __init__(self, numbers: Numbers) -> None:
        self._latency = numbers.histogram(catalogue.STORE_LATENCY)
        self._failures = numbers.counter(catalogue.STORE_FAILURES)

    async def timed(self, operation: str, work: Coroutine[Any, Any, Result]) -> Result:
        """The result of a call, which is counted under its name."""
        began = perf_counter()
        try:
            result = await work
        except (StoreUnavailable, asyncio.CancelledError):
            self._failures.of(operation).value += 1
            raise
        self._latency.of(operation).record(perf_counter() - began)
        return result


class GuardedStore:
    """The `Store` port around another store, which whoever made it opens and closes."""

    def __init__(self, store: Store, timeout_s: float, numbers: Numbers | None = None) -> None:
        self._store = store
        self._calls = None if numbers is None else StoreCalls(numbers)
        if numbers is not None:
            self._refused = numbers.counter(catalogue.STORE_REFUSALS).of()
            numbers.observe(catalogue.BREAKER, self._breaker)
        self._timeout_s = timeout_s
        self._failures = 0
        self._backoff = Backoff(*_COOL_DOWN_S)
        self._closed_until = 0.0
        self._trying = False

    # The breaker

    def _breaker(self) -> Iterable[tuple[Values, float]]:
        now = asyncio.get_running_loop().time()
        state = "closed"
        if self._failures >= _FAILURES:
            state = "open" if now < self._closed_until and not self._trying else "half_open"
        return [((one,), int(one == state)) for one in catalogue.BREAKER.labels["state"]]

    async def _call(self, operation: str, work: Coroutine[Any, Any, Result]) -> Result:
        loop = asyncio.get_running_loop()
        if self._failures >= _FAILURES and (self._trying or loop.time() < self._closed_until):
            work.close()
            if self._calls is not None:
                self._refused.value += 1
            raise StoreUnavailable("the store did not answer a moment ago: it is asked again soon")
        trying = self._trying = self._failures >= _FAILURES
        try:
            async with asyncio.timeout(self._timeout_s):
                result = await (work if self._calls is None else self._calls.timed(operation, work))
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

    async def _observed(self, operation: str, work: Coroutine[Any, Any, Result]) -> Result:
        """Not refused, but it tells how the store is."""
        try:
            result = await (work if self._calls is None else self._calls.timed(operation, work))
        except StoreUnavailable:
            self._failed()
            raise
        self._worked()
        return result

    # The port: refused while the breaker is open

    async def page(self, user: str, query: PageQuery) -> InboxPage:
        return await self._call("page", self._store.page(user, query))

    async def between(self, user: str, after: Position, upto: Position, limit: int) -> list[InboxItem]:
        return await self._call("between", self._store.between(user, after, upto, limit))

    async def missed(self, user: str, after: Position, upto: Position) -> int:
        return await self._call("missed", self._store.missed(user, after, upto))

    async def unread(self, user: str) -> int:
        return await self._call("unread", self._store.unread(user))

    async def mark(self, user: str, positions: Sequence[Position], as_: MarkAs) -> None:
        await self._call("mark", self._store.mark(user, positions, as_))

    async def mark_all(self, user: str, upto: Position, as_: MarkAllAs) -> None:
        await self._call("mark_all", self._store.mark_all(user, upto, as_))

    async def claim(self, user: str, device: str, holder: Holder, floor: Position) -> Claimed:
        return await self._call("claim", self._store.claim(user, device, holder, floor))

    async def holders(self, user: str) -> list[Holder]:
        return await self._call("holders", self._store.holders(user))

    async def devices(self, user: str) -> list[DeviceCursor]:
        return await self._call("devices", self._store.devices(user))

    async def subscribe(self, user: str, topics: Sequence[str], most: int, since: Position) -> None:
        await self._call("subscribe", self._store.subscribe(user, topics, most, since))

    async def unsubscribe(self, user: str, topics: Sequence[str], until: Position) -> None:
        await self._call("unsubscribe", self._store.unsubscribe(user, topics, until))

    async def subscriptions(self, user: str, after: str | None, limit: int) -> list[Subscription]:
        return await self._call("subscriptions", self._store.subscriptions(user, after, limit))

    async def ended_subscriptions(
        self, user: str, after: EndedSubscription | None, limit: int
    ) -> list[EndedSubscription]:
        return await self._call("ended_subscriptions", self._store.ended_subscriptions(user, after, limit))

    async def subscribers(self, topic: str, after: str | None, limit: int) -> SubscriberPage:
        return await self._call("subscribers", self._store.subscribers(topic, after, limit))

    async def broadcasts(self, after: Position, upto: Position, limit: int) -> list[Broadcast]:
        return await self._call("broadcasts", self._store.broadcasts(after, upto, limit))

    async def broadcasts_to(self, pattern: str, after: Position, upto: Position, limit: int) -> list[Broadcast]:
        return await self._call("broadcasts_to", self._store.broadcasts_to(pattern, after, upto, limit))

    async def broadcast_bodies(self, positions: Sequence[Position]) -> dict[Position, bytes]:
        return await self._call("broadcast_bodies", self._store.broadcast_bodies(positions))

    async def synced(self, user: str) -> Position:
        return await self._call("synced", self._store.synced(user))

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
        await self._observed("append", self._store.append(rows))

    async def append_broadcasts(self, rows: Sequence[Broadcast]) -> None:
        await self._observed("append_broadcasts", self._store.append_broadcasts(rows))

    async def note_synced(self, user: str, upto: Position) -> None:
        await self._observed("note_synced", self._store.note_synced(user, upto))

    async def floors(self) -> dict[int, Position]:
        return await self._observed("floors", self._store.floors())

    async def note_floors(self, floors: Mapping[int, Position]) -> None:
        await self._observed("note_floors", self._store.note_floors(floors))

    async def save(self, updates: Sequence[CursorUpdate]) -> list[Lost]:
        return await self._observed("save", self._store.save(updates))

    async def delivered(self, marks: Sequence[DeliveredMark]) -> None:
        await self._observed("delivered", self._store.delivered(marks))

    async def expire(self, before_ns: int) -> int:
        return await self._store.expire(before_ns)

    def export(self, user: str) -> AsyncIterator[dict[str, Any]]:
        return self._store.export(user)

    async def erase(self, user: str, upto: Position) -> int:
        return await self._store.erase(user, upto)
