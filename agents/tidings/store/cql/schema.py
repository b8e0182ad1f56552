"""The schema: files of ``schemas/cql``, applied in the order of their numbers, once.

Who applies takes a lock that expires; whoever comes meanwhile waits and finds the work done. Each file is recorded
when all of its statements are, and every statement may be repeated, so that dying half-way costs nothing.
"""

from __future__ import annotations

import asyncio
import re
import secrets
from importlib import resources
from pathlib import Path
from typing import Final, NamedTuple

from tidings.wire.errors import BadSettings, StoreUnavailable

from .database import Database, StatementRefused, Where

__all__ = ["Migration", "apply", "migrations", "parse_replication", "pending", "verify"]

_LOCK_S: Final = 60
_DDL_TIMEOUT_S: Final = 30.0
_SETTLE_S: Final = 10.0
_NAME: Final = re.compile(r"(\d{4})_[a-z0-9_]+\.cql")
_WORD: Final = re.compile(r"[A-Za-z][A-Za-z0-9_]{0,47}")

_TABLE: Final = (
    "CREATE TABLE IF NOT EXISTS schema_versions (name text, version int, file text, PRIMARY KEY (name, version))"
)
_LOCK_TABLE: Final = "CREATE TABLE IF NOT EXISTS schema_lock (name text PRIMARY KEY, owner text)"


class Migration(NamedTuple):
    """One file; brings a keyspace from version `number` - 1 to `number`."""

    number: int
    file: str
    statements: tuple[str, ...]


def migrations() -> list[Migration]:
    """All that this version of Tidings knows, in order."""
    packaged = resources.files("tidings.store.cql") / "schema"
    # In a checkout the files are at their own place.
    folder = packaged if packaged.is_dir() else Path(__file__).parents[4] / "schemas" / "cql"
    found = []
    for entry in folder.iterdir():
        if match := _NAME.fullmatch(entry.name):
            text = "\n".join(line for line in entry.read_text().splitlines() if not line.startswith("--"))
            statements = tuple(part.strip() for part in text.split(";") if part.strip())
            found.append(Migration(int(match[1]), entry.name, statements))
    found.sort()
    assert [migration.number for migration in found] == list(range(1, len(found) + 1)), found
    return found


def parse_replication(text: str, *, development: bool) -> str:
    """``dc1:3`` or ``dc1:3,dc2:3`` (a datacenter and its copies) as CQL; ``simple:1`` in development only."""
    parts = [part.strip().partition(":") for part in text.split(",")]
    if not text:
        raise BadSettings(
            "cql_replication is not set, and the keyspace is to be made: give each datacenter its copies, such as dc1:3"
        )
    wrong = BadSettings(f"cql_replication is {text!r}: give each datacenter its copies, such as dc1:3 or dc1:3,dc2:3")
    factors = {}
    for name, _, copies in parts:
        if not _WORD.fullmatch(name) or not copies.isdecimal() or not 1 <= int(copies) <= 9:
            raise wrong
        factors[name] = int(copies)
    if "simple" in factors:
        if len(factors) > 1:
            raise wrong
        if not development:
            raise BadSettings(
                "cql_replication is simple: that knows no datacenters and is for development; "
                "name yours, such as dc1:3 (`nodetool status` shows it)"
            )
        return f"{{'class': 'SimpleStrategy', 'replication_factor': {factors['simple']}}}"
    listed = ", ".join(f"'{name}': {copies}" for name, copies in factors.items())
    return f"{{'class': 'NetworkTopologyStrategy', {listed}}}"


async def _version(database: Database, keyspace: str) -> int:
    """0 where there is none."""
    known = await database.query(
        "SELECT table_name FROM system_schema.tables WHERE keyspace_name = %s AND table_name = 'schema_versions'",
        keyspace,
    )
    if not known:
        return 0
    try:
        found = await database.query(f"SELECT version FROM {keyspace}.schema_versions WHERE name = 'tidings'")
    except StatementRefused:
        # Somebody else is making it: the node lists a table a moment before it knows it.
        return 0
    return max((row[0] for row in found), default=0)


async def verify(database: Database) -> None:
    """Raises `StoreUnavailable` where the schema is not the one that this version of Tidings needs."""
    known, found = len(migrations()), await _version(database, database.where.keyspace)
    if found < known:
        raise StoreUnavailable(
            f"the store {database.where} has schema {found} and this version of Tidings needs {known}: "
            "run `tidings topology apply`"
        )
    if found > known:
        raise StoreUnavailable(
            f"the store {database.where} has schema {found} and this version of Tidings knows {known}: update Tidings"
        )


async def apply(where: Where, replication: str, *, development: bool = False) -> list[str]:
    """Make the keyspace and bring its schema up to date; returns the files that were applied.

    `replication` (see `parse_replication`) is for a new keyspace. One that exists keeps what it has, and has to have
    what the setting says: nobody but an operator knows when its nodes can be repaired.
    """
    database = Database(where)
    await database.connect()
    try:
        keyspace = where.keyspace
        if not await _has_copies(database, replication, development=development):
            replicas = parse_replication(replication, development=development)
            await _change(database, f"CREATE KEYSPACE IF NOT EXISTS {keyspace} WITH replication = {replicas}")
        elif await _version(database, keyspace) >= len(migrations()):
            return []
        await _when_known(database, f"USE {keyspace}")
        await _when_known(database, _LOCK_TABLE)
        owner = secrets.token_hex(8)
        await _lock(database, keyspace, owner)
        try:
            return await _apply(database, keyspace, owner)
        finally:
            await database.query(f"DELETE FROM {keyspace}.schema_lock WHERE name = 'tidings' IF owner = %s", owner)
    finally:
        await database.close()


async def pending(where: Where, replication: str) -> list[str]:
    """The files that `apply` would apply; raises `BadSettings` where that would."""
    database = Database(where)
    await database.connect()
    try:
        if not await _has_copies(database, replication, development=False):
            parse_replication(replication, development=False)
        return [migration.file for migration in migrations()[await _version(database, where.keyspace) :]]
    finally:
        await database.close()


async def _has_copies(database: Database, replication: str, *, development: bool) -> bool:
    """If the keyspace exists. Raises `BadSettings` where its copies are not the ones that the setting says."""
    query = "SELECT replication FROM system_schema.keyspaces WHERE keyspace_name = %s"
    found = await database.query(query, database.where.keyspace)
    if not found:
        return False
    if development:
        return True
    options = dict(found[0][0])
    strategy = options.pop("class").rpartition(".")[2]
    change = f"ALTER KEYSPACE {database.where.keyspace} WITH replication = "
    if strategy == "SimpleStrategy":
        raise BadSettings(
            f"the store {database.where} has SimpleStrategy, which knows no datacenters and is for development: "
            f"{change}{{'class': 'NetworkTopologyStrategy', 'dc1': 3}}, then repair it"
        )
    has = sorted(f"{name}:{copies}" for name, copies in options.items())
    wanted = parse_replication(replication, development=False) if replication else ""
    if wanted and sorted(part.strip() for part in replication.split(",")) != has:
        raise BadSettings(
            f"the store {database.where} has {','.join(has)} and cql_replication is {replication}: set it to what is "
            f"there, or {change}{wanted}, and repair it"
        )
    return True


async def _change(database: Database, statement: str) -> None:
    try:
        await database.query(statement, timeout_s=_DDL_TIMEOUT_S)
    except StatementRefused as error:
        raise StoreUnavailable(f"the store {database.where} refuses its schema: {error}") from error


async def _when_known(database: Database, statement: str) -> None:
    """A keyspace that somebody else is making is in the server's tables a moment before it can be used."""
    deadline = database.loop.time() + _SETTLE_S
    while True:
        try:
            await database.query(statement, timeout_s=_DDL_TIMEOUT_S)
            return
        except StatementRefused as error:
            if database.loop.time() > deadline:
                raise StoreUnavailable(f"the store {database.where} refuses its schema: {error}") from error
        await asyncio.sleep(0.1)


async def _lock(database: Database, keyspace: str, owner: str) -> None:
    """Wait for whoever applies now; one who died is waited for until the lock expires."""
    deadline = database.loop.time() + 2 * _LOCK_S
    while True:
        insert = (
            f"INSERT INTO {keyspace}.schema_lock (name, owner) VALUES ('tidings', %s) IF NOT EXISTS USING TTL {_LOCK_S}"
        )
        if (await database.query(insert, owner, timeout_s=_DDL_TIMEOUT_S))[0][0]:
            return
        if database.loop.time() > deadline:
            raise StoreUnavailable(f"somebody else applies a schema to {database.where} and does not end: try again")
        await asyncio.sleep(0.2)


async def _apply(database: Database, keyspace: str, owner: str) -> list[str]:
    await _change(database, _TABLE)
    applied = []
    version = await _version(database, keyspace)
    for migration in migrations()[version:]:
        for statement in migration.statements:
            # A statement takes up to half as long as the lock is held.
            renew = (
                f"UPDATE {keyspace}.schema_lock USING TTL {_LOCK_S} SET owner = %s WHERE name = 'tidings' IF owner = %s"
            )
            if not (await database.query(renew, owner, owner, timeout_s=_DDL_TIMEOUT_S))[0][0]:
                raise StoreUnavailable(f"the lock on the schema of {database.where} was lost: try again")
            await _change(database, statement)
        await database.query(
            f"INSERT INTO {keyspace}.schema_versions (name, version, file) VALUES ('tidings', %s, %s)",
            migration.number,
            migration.file,
        )
        applied.append(migration.file)
    return applied
