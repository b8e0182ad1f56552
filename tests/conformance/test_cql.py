"""The CQL store, on a real server."""

from __future__ import annotations

from collections.abc import AsyncIterator

import pytest

from support.cql import empty_store
from tidings.store.cql import CqlStore

pytest.register_assert_rewrite("conformance.store_suite")

from conformance.store_suite import StoreConformance  # noqa: E402


class TestCql(StoreConformance):
    """The suite of all stores."""

    examples = 25
    steps = 25

    @pytest.fixture
    async def store(self, cql_url: str) -> AsyncIterator[CqlStore]:
        async with empty_store(cql_url) as store:
            yield store
