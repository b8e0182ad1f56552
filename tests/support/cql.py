"""A keyspace of a test run's own on the real CQL server, with the schema applied."""

from __future__ import annotations

import asyncio
import secrets
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

from tidings.store.cql import CqlStore, Where, parse_url, schema
from tidings.store.cql.database import Database

TABLES = (
    "inbox",
    "inbox_state",
    "inbox_floors",
    "deliveries",
    "cursors",
    "subscriptions",
    "subscribers",
    "topic_levels",
    "subscription_starts",
    "ended_subscriptions",
    "broadcasts",
    "broadcast_blocks",
    "broadcasts_to",
    "pattern_buckets",
    "synced",
)


async def new_keyspace(address: str) -> str:
    """The URL of a keyspace that nobody else uses; `address` is host:port."""
    url = f"cql://{address}/tidings_{secrets.token_hex(4)}?timeout_s=10"
    await schema.apply(parse_url(url), "simple:1", development=True)
    return url


async def query(where: Where, text: str, *values: object) -> list[tuple[object, ...]]:
    """One statement, unprepared, on a connection of its own."""
    database = Database(where)
    await database.connect()
    try:
        await database.query(f"USE {where.keyspace}")
        return await database.query(text, *values, timeout_s=20)
    finally:
        await database.close()


@asynccontextmanager
async def empty_store(url: str) -> AsyncIterator[CqlStore]:
    """An open store on a keyspace that holds nothing."""
    where = parse_url(url)
    database = Database(where)
    await database.connect()
    try:
        await database.query(f"USE {where.keyspace}")
        await asyncio.gather(*(database.query(f"TRUNCATE {table}", timeout_s=20) for table in TABLES))
    finally:
        await database.close()
    store = CqlStore(where)
    await store.open()
    try:
        yield store
    finally:
        await store.close()
