"""The CQL store, on a real server."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from typing import Any

import pytest

from support.cql import empty_store, query
from tidings.store.cql import CqlStore, broadcasts, subscriptions
from tidings.store.cql.database import Database
from tidings.store.port import EndedSubscription, Subscription
from tidings.wire.errors import StoreUnavailable

pytest.register_assert_rewrite("conformance.store_suite")

from conformance.store_suite import ALICE, MOST, ZERO, StoreConformance, at, broadcast, ended, followers  # noqa: E402


class TestCql(StoreConformance):
    """The suite of all stores."""

    examples = 25
    steps = 25

    @pytest.fixture
    async def store(self, cql_url: str) -> AsyncIterator[CqlStore]:
        async with empty_store(cql_url) as store:
            yield store

    async def test_a_crowd_in_many_partitions(self, store: CqlStore, monkeypatch: pytest.MonkeyPatch) -> None:
        """A topic that grows gets partitions; who came before and after is listed, and can go."""
        monkeypatch.setattr(subscriptions, "_FULL", 5)
        monkeypatch.setattr(subscriptions, "_SAMPLE", 1)
        users = [f"user {number}" for number in range(300)]
        for first in range(0, 300, 20):
            await asyncio.gather(*(store.subscribe(user, ["crowd"], MOST, ZERO) for user in users[first : first + 20]))
        levels = await query(store._where, "SELECT topic, levels FROM topic_levels")
        assert [topic for topic, _ in levels] == ["crowd"]
        assert max(levels[0][1]) >= 2  # type: ignore[call-overload]
        assert await followers(store, "crowd", 7) == set(users)
        # Again, and now on a higher level: still one subscription.
        await asyncio.gather(*(store.subscribe(user, ["crowd"], MOST, ZERO) for user in users[:50]))
        await asyncio.gather(*(store.unsubscribe(user, ["crowd"], ZERO) for user in users[:100]))
        assert await followers(store, "crowd") == set(users[100:])

    async def test_subscriptions_without_a_beginning(self, store: CqlStore) -> None:
        """What was followed before there were broadcasts has every broadcast, and is ended as any other."""
        await store.subscribe(ALICE, ["a", "b", "c"], MOST, at(5))
        for topic in ("a", "b"):
            await query(store._where, "DELETE FROM subscription_starts WHERE user = %s AND topic = %s", ALICE, topic)
        wanted = [Subscription("a", ZERO), Subscription("b", ZERO), Subscription("c", at(5))]
        assert await store.subscriptions(ALICE, None, 9) == wanted
        await store.subscribe(ALICE, ["a"], MOST, at(6))
        await store.unsubscribe(ALICE, ["b"], at(7))
        assert await store.subscriptions(ALICE, None, 9) == [wanted[0], wanted[2]]
        assert await ended(store, ALICE) == [EndedSubscription("b", ZERO, at(7))]

    async def test_ended_while_it_is_read(self, store: CqlStore, monkeypatch: pytest.MonkeyPatch) -> None:
        """What somebody ends between two reads has no beginning any more: it is not taken for one of old."""
        await store.subscribe(ALICE, ["a", "b"], MOST, at(5))
        read = Database.read

        async def slowly(database: Database, statement: Any, *values: object) -> list[Any]:
            if statement is store._sql["starts"]:
                monkeypatch.setattr(Database, "read", read)
                await store.unsubscribe(ALICE, ["a"], at(6))
            return await read(database, statement, *values)

        monkeypatch.setattr(Database, "read", slowly)
        assert await store.subscriptions(ALICE, None, 9) == [Subscription("b", at(5))]
        assert await ended(store, ALICE) == [EndedSubscription("a", at(5), at(6))]

    async def test_ending_that_died(self, store: CqlStore, monkeypatch: pytest.MonkeyPatch) -> None:
        """Half-way through ending, what was the user's is kept; ending it again keeps what came meanwhile."""
        await store.subscribe(ALICE, ["a", "b"], MOST, at(5))

        async def dies(*arguments: object) -> None:
            raise StoreUnavailable("as the test wants it")

        with monkeypatch.context() as patch:
            patch.setattr(subscriptions.Subscribing, "_leave", dies)
            with pytest.raises(StoreUnavailable):
                await store.unsubscribe(ALICE, ["a", "b"], at(7))
        assert await ended(store, ALICE) == [EndedSubscription(topic, at(5), at(7)) for topic in ("a", "b")]
        await store.unsubscribe(ALICE, ["a"], at(9))
        await store.subscribe(ALICE, ["b"], MOST, at(11))
        assert await ended(store, ALICE) == [EndedSubscription("a", at(5), at(9)), EndedSubscription("b", at(5), at(7))]
        assert await store.subscriptions(ALICE, None, 9) == [Subscription("b", at(11))]
        await store.unsubscribe(ALICE, ["b"], at(12))
        assert await query(store._where, "SELECT topic FROM subscription_starts") == []

    async def test_blocks_that_are_not_there(self, store: CqlStore, monkeypatch: pytest.MonkeyPatch) -> None:
        """However far two broadcasts lie apart, a reader asks for the blocks of both and for the list."""
        rows = [broadcast("a", at(1, 7)), broadcast("a", at(2**50, 7)), broadcast("a", at(2**40, 9))]
        await store.append_broadcasts(rows)
        read, asked = Database.read, []

        async def counted(database: Database, statement: Any, *values: object) -> list[Any]:
            asked.append(statement)
            return await read(database, statement, *values)

        monkeypatch.setattr(Database, "read", counted)
        assert await store.broadcasts(ZERO, at(2**60, 9), 99) == rows
        assert len(asked) == 5
        assert await store.broadcasts(at(2, 7), at(900, 7), 99) == []
        assert len(asked) == 6
        assert await store.broadcasts(at(2**50, 7), at(2**50, 7), 99) == []
        assert len(asked) == 6
        assert await store.broadcasts(at(999, 7), at(1999, 7), 99) == []
        assert len(asked) == 7

    async def test_blocks_on_many_pages(self, store: CqlStore, monkeypatch: pytest.MonkeyPatch) -> None:
        """The list of blocks is read to its end."""
        monkeypatch.setattr(broadcasts, "_BLOCKS", 2)
        rows = [broadcast("a", at(number, 7)) for number in range(1, 9_000, 1000)]
        await store.append_broadcasts(rows)
        assert await store.broadcasts(ZERO, at(2**60, 9), 99) == rows
        assert await store.broadcasts(at(1, 7), at(7_500, 7), 99) == rows[1:8]
