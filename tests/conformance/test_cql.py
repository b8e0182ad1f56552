"""The CQL store, on a real server."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator

import pytest

from support.cql import empty_store, query
from tidings.store.cql import CqlStore, subscriptions

pytest.register_assert_rewrite("conformance.store_suite")

from conformance.store_suite import MOST, StoreConformance, followers  # noqa: E402


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
            await asyncio.gather(*(store.subscribe(user, ["crowd"], MOST) for user in users[first : first + 20]))
        levels = await query(store._where, "SELECT topic, levels FROM topic_levels")
        assert [topic for topic, _ in levels] == ["crowd"]
        assert max(levels[0][1]) >= 2  # type: ignore[call-overload]
        assert await followers(store, "crowd", 7) == set(users)
        # Again, and now on a higher level: still one subscription.
        await asyncio.gather(*(store.subscribe(user, ["crowd"], MOST) for user in users[:50]))
        await asyncio.gather(*(store.unsubscribe(user, ["crowd"]) for user in users[:100]))
        assert await followers(store, "crowd") == set(users[100:])
