"""Fixtures of tests of whole agents."""

from __future__ import annotations

from pathlib import Path

import pytest

from support.cql import empty_store


@pytest.fixture(params=["sqlite", "cql"])
def store_address(request: pytest.FixtureRequest, tmp_path: Path) -> str:
    """A store of either kind, which may hold what an earlier test left."""
    url = f"sqlite:///{tmp_path}/inbox.db" if request.param == "sqlite" else request.getfixturevalue("cql_url")
    assert isinstance(url, str)
    return url


@pytest.fixture
async def store_url(store_address: str) -> str:
    """An empty store of either kind."""
    if store_address.startswith("cql"):
        async with empty_store(store_address):
            pass
    return store_address
