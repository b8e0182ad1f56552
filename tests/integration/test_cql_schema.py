"""The CQL store's schema on a real server: applied once whoever dies, and rows that lie and expire as they should."""

from __future__ import annotations

import asyncio
import random
import secrets
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any, Final

import pytest

from support.clock import PATIENCE_S
from support.cql import query
from tidings.store.cql import CqlStore, Where, parse_url, schema
from tidings.store.cql.database import Database, StatementRefused, check_datacenter
from tidings.store.cql.encoding import BUCKET_NS, bucket_of, pack
from tidings.store.port import Broadcast, Delivered, DeliveredMark, InboxItem, InboxRow, PageQuery
from tidings.wire.errors import BadSettings, StoreUnavailable
from tidings.wire.position import Position

DAY_S: Final = 86_400
DAY_NS: Final = DAY_S * 1_000_000_000
FILES: Final = [migration.file for migration in schema.migrations()]
LOCAL: Final = "datacenter1:1"
"""The datacenter of Cassandra's SimpleSnitch."""

Sent = Callable[[Database, str], Awaitable[None]]


@pytest.fixture
async def where(cql_url: str) -> AsyncIterator[Where]:
    """A keyspace that is not there yet, and is gone afterwards."""
    server = parse_url(cql_url)
    made = server._replace(keyspace=f"tidings_{secrets.token_hex(6)}")
    yield made
    await query(server, f"DROP KEYSPACE IF EXISTS {made.keyspace}")


@asynccontextmanager
async def opened(where: Where, **settings: Any) -> AsyncIterator[CqlStore]:
    store = CqlStore(where, **settings)
    await store.open()
    try:
        yield store
    finally:
        await store.close()


async def replication(where: Where, cql_url: str) -> dict[str, str] | None:
    """What the server has of a keyspace; None where it has none."""
    text = "SELECT replication FROM system_schema.keyspaces WHERE keyspace_name = %s"
    found = await query(parse_url(cql_url), text, where.keyspace)
    return dict(found[0][0]) if found else None  # type: ignore[call-overload]


async def recorded(where: Where) -> list[tuple[object, ...]]:
    return await query(where, "SELECT version, file FROM schema_versions WHERE name = 'tidings'")


async def is_complete(where: Where) -> None:
    """The schema is there, each file of it is recorded once, nobody has the lock, and a store works on it."""
    assert await recorded(where) == [(number, file) for number, file in enumerate(FILES, 1)]
    # Of one who died when all was done the lock expires.
    async with asyncio.timeout(PATIENCE_S):
        while await query(where, "SELECT owner FROM schema_lock"):
            await asyncio.sleep(0.05)
    assert await schema.pending(where, LOCAL) == []
    async with opened(where) as store:
        await store.check()
        await store.append([row(1, time.time_ns())])
        assert [item.body for item in await everything(store)] == [b"1"]


def row(number: int, stored_ns: int) -> InboxRow:
    body = str(number).encode()
    return InboxRow("alice", Position(1, number), f"id{number}", "t", None, stored_ns, body)


async def everything(store: CqlStore) -> list[InboxItem]:
    return await store.between("alice", Position(0, 0), Position(9, 0), 1000)


@pytest.fixture
def sent(monkeypatch: pytest.MonkeyPatch) -> Callable[[Sent | None, Sent | None], None]:
    """Have something called before, or after, each statement of the schema."""
    real = Database.query

    def install(before: Sent | None = None, after: Sent | None = None) -> None:
        async def spied(self: Database, text: str, *values: object, timeout_s: float | None = None) -> list[Any]:
            if before is not None:
                await before(self, text)
            found = await real(self, text, *values, timeout_s=timeout_s)
            if after is not None:
                await after(self, text)
            return found

        monkeypatch.setattr(Database, "query", spied)

    return install


# Applying


async def test_applying_twice_is_applying_once(where: Where) -> None:
    """The first time makes the keyspace and applies all files, later ones find nothing to do and keep what is there."""
    assert await schema.apply(where, LOCAL) == FILES
    async with opened(where) as store:
        await store.append([row(7, time.time_ns())])
    for _ in range(2):
        assert await schema.pending(where, LOCAL) == []
        assert await schema.apply(where, "") == []
    async with opened(where) as store:
        assert [item.body for item in await everything(store)] == [b"7"]
    await is_complete_but_for_rows(where)


async def is_complete_but_for_rows(where: Where) -> None:
    assert await recorded(where) == [(number, file) for number, file in enumerate(FILES, 1)]
    assert await query(where, "SELECT owner FROM schema_lock") == []


async def test_pending_before_anything(where: Where) -> None:
    """What is to be applied to a keyspace that is not there is everything, and asking makes nothing."""
    assert await schema.pending(where, LOCAL) == FILES
    assert await schema.pending(where, LOCAL) == FILES
    with pytest.raises(StoreUnavailable):
        await CqlStore(where).open()


@pytest.mark.parametrize("count", [2, 5])
async def test_applying_at_once(where: Where, count: int, sent: Any) -> None:
    """Of agents that come together one applies each file, and the others wait for it."""
    made: list[str] = []

    async def note(database: Database, text: str) -> None:
        if text.startswith("CREATE TABLE IF NOT EXISTS inbox "):
            made.append(text)

    sent(before=note)
    applied = await asyncio.gather(*(schema.apply(where, LOCAL) for _ in range(count)))
    assert sorted(applied) == [[]] * (count - 1) + [FILES]
    assert len(made) == 1
    await is_complete(where)


async def test_a_keyspace_that_the_node_lists_before_it_knows_it(where: Where, sent: Any) -> None:
    """Who comes while another one makes the keyspace waits until it can be used."""
    refusals = 2

    async def refuse(database: Database, text: str) -> None:
        nonlocal refusals
        if text == f"USE {where.keyspace}" and refusals:
            refusals -= 1
            raise StatementRefused(f"Keyspace '{where.keyspace}' does not exist")

    sent(before=refuse)
    assert await schema.apply(where, LOCAL) == FILES
    assert refusals == 0


class Died(StoreUnavailable):
    """What a test's applier dies of."""


@pytest.mark.parametrize("how", ["dies before it", "dies after it", "fails once"])
async def test_dying_half_way_costs_nothing(where: Where, how: str, sent: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """One applier after the other gets one statement further, and the last one finishes the work."""
    monkeypatch.setattr(schema, "_LOCK_S", 1)
    step, last = 0, ""

    async def die(database: Database, text: str) -> None:
        nonlocal step, last
        # Trying again to get the lock is one step.
        step -= text != last
        last = text
        if step == 0 or (step < 0 and how != "fails once"):
            raise Died("half-way")

    sent(**{"after" if how == "dies after it" else "before": die})
    for steps in range(1, 100):
        step, last = steps, ""
        try:
            applied = await schema.apply(where, LOCAL)
            break
        except StoreUnavailable:
            # Of its end, or of the lock that it held for too long.
            pass
    assert steps > sum(len(migration.statements) for migration in schema.migrations())
    assert applied == FILES[len(FILES) - len(applied) :]
    sent()
    await is_complete(where)


async def test_the_lock_of_the_dead_expires(where: Where, sent: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whoever comes while a dead one has the lock waits for it to expire, and then works."""
    monkeypatch.setattr(schema, "_LOCK_S", 2)
    dead, tries = True, 0

    async def watch(database: Database, text: str) -> None:
        nonlocal tries
        tries += "IF NOT EXISTS USING TTL" in text
        if dead and tries and "IF NOT EXISTS USING TTL" not in text:
            raise Died("with the lock")

    sent(before=watch)
    with pytest.raises(Died):
        await schema.apply(where, LOCAL)
    ((ttl,),) = await query_past(where, sent, "SELECT TTL(owner) FROM schema_lock")
    assert 0 < ttl <= 2
    dead, tries = False, 0
    sent(before=watch)
    assert await schema.apply(where, LOCAL) == FILES
    assert tries > 1
    await is_complete(where)


async def query_past(where: Where, sent: Any, text: str) -> Any:
    """A statement that no applier sends."""
    sent()
    return await query(where, text)


async def test_a_lock_that_does_not_end(where: Where, monkeypatch: pytest.MonkeyPatch) -> None:
    """Nobody waits for ever: a sentence says that somebody else is at it, and whose lock it is stays so."""
    await schema.apply(where, LOCAL)
    await query(where, "DELETE FROM schema_versions WHERE name = 'tidings'")
    await query(where, "INSERT INTO schema_lock (name, owner) VALUES ('tidings', 'another') IF NOT EXISTS")
    monkeypatch.setattr(schema, "_LOCK_S", 1)
    with pytest.raises(StoreUnavailable, match="somebody else applies a schema to cql://"):
        await schema.apply(where, LOCAL)
    assert await query(where, "SELECT owner FROM schema_lock") == [("another",)]
    assert await recorded(where) == []


async def test_a_lost_lock_is_not_released(where: Where, sent: Any) -> None:
    """An applier whose lock expired under its hands stops, and leaves the next one's alone."""
    taken = False

    async def take(database: Database, text: str) -> None:
        nonlocal taken
        if text.startswith("CREATE TABLE IF NOT EXISTS probe") and not taken:
            taken = True
            await database.query("UPDATE schema_lock SET owner = 'another' WHERE name = 'tidings' IF EXISTS")

    sent(before=take)
    with pytest.raises(StoreUnavailable, match=r"lock on the schema of .* was lost: try again"):
        await schema.apply(where, LOCAL)
    assert taken
    assert await query(where, "SELECT owner FROM schema_lock") == [("another",)]


# Versions


async def test_older_schema(where: Where) -> None:
    """An agent does not start on a schema that lacks something: the sentence says what to run."""
    await schema.apply(where, LOCAL)
    await query(where, "DELETE FROM schema_versions WHERE name = 'tidings'")
    await refuses(where, rf"has schema 0 and this version of Tidings needs {len(FILES)}: run `tidings topology apply`")
    assert await schema.apply(where, "") == FILES
    await is_complete(where)


async def test_keyspace_without_schema(where: Where, cql_url: str) -> None:
    """A keyspace that an operator made is one of schema 0: agents refuse it, and applying keeps its copies."""
    copies = "{'class': 'NetworkTopologyStrategy', 'datacenter1': 1}"
    await query(parse_url(cql_url), f"CREATE KEYSPACE {where.keyspace} WITH replication = {copies}")
    before = await replication(where, cql_url)
    await refuses(where, r"has schema 0 and .* run `tidings topology apply`")
    assert await schema.apply(where, "") == FILES
    assert await replication(where, cql_url) == before
    await is_complete(where)


async def test_newer_schema(where: Where) -> None:
    """An agent does not start on a schema that it does not know, and applying its own leaves that alone."""
    await schema.apply(where, LOCAL)
    newer = len(FILES) + 1
    await query(where, f"INSERT INTO schema_versions (name, version, file) VALUES ('tidings', {newer}, 'new.cql')")
    await refuses(where, rf"has schema {newer} and this version of Tidings knows {len(FILES)}: update Tidings")
    assert await schema.apply(where, "") == []
    assert (newer, "new.cql") in await recorded(where)


async def refuses(where: Where, sentence: str) -> None:
    """The store does not open; it says why, and where."""
    store = CqlStore(where)
    with pytest.raises(StoreUnavailable, match=sentence) as caught:
        await store.open()
    assert str(where) in str(caught.value)
    await store.close()


# Files


def test_files_are_numbered() -> None:
    """The files of ``schemas/cql`` are numbered without a gap, and each statement may be repeated."""
    folder = Path(__file__).parents[2] / "schemas" / "cql"
    assert sorted(path.name for path in folder.iterdir()) == FILES
    assert [int(file[:4]) for file in FILES] == list(range(1, len(FILES) + 1))
    for migration in schema.migrations():
        assert migration.statements
        for statement in migration.statements:
            assert "IF NOT EXISTS" in statement, statement
            assert "--" not in statement, "a comment inside of a statement may hold a semicolon"


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder of files in the place of the real one, beginning with a copy of that."""
    made = tmp_path / "schema"
    made.mkdir()
    for migration in schema.migrations():
        (made / migration.file).write_text(";\n".join(migration.statements))
    monkeypatch.setattr(schema.resources, "files", lambda package: tmp_path)
    return made


def test_what_is_in_a_file(folder: Path) -> None:
    """Comments and blank statements are left out, and so are files that are no part of the schema."""
    number = len(FILES) + 1
    text = "-- one; two\nCREATE TABLE a (b int);\n\n-- three\nCREATE TABLE c\n  (d int)\n;\n;\n"
    (folder / f"{number:04}_more.cql").write_text(text)
    (folder / "README.md").write_text("no;")
    (folder / f"{number:04}_more.cql.orig").write_text("no;")
    last = schema.migrations()[-1]
    assert last == (number, f"{number:04}_more.cql", ("CREATE TABLE a (b int)", "CREATE TABLE c\n  (d int)"))


@pytest.mark.parametrize("name", [f"{len(FILES):04}_twice.cql", f"{len(FILES) + 2:04}_gap.cql", "0000_first.cql"])
def test_a_file_with_a_wrong_number(folder: Path, name: str) -> None:
    """A number that is missing or there twice is found before anything is applied."""
    (folder / name).write_text("CREATE TABLE a (b int)")
    with pytest.raises(AssertionError):
        schema.migrations()


async def test_only_what_is_new_is_applied(where: Where, folder: Path, sent: Any) -> None:
    """A new version of Tidings applies its new files, in order, and not the old ones again."""
    await schema.apply(where, LOCAL)
    names = [f"{len(FILES) + 1:04}_one.cql", f"{len(FILES) + 2:04}_two.cql"]
    (folder / names[1]).write_text("CREATE TABLE IF NOT EXISTS more (a int PRIMARY KEY, b int)")
    (folder / names[0]).write_text("DROP TABLE IF EXISTS more")
    texts: list[str] = []

    async def note(database: Database, text: str) -> None:
        texts.append(text)

    await refuses(where, rf"has schema {len(FILES)} and this version of Tidings needs {len(FILES) + 2}")
    assert await schema.pending(where, LOCAL) == names
    sent(before=note)
    assert await schema.apply(where, LOCAL) == names
    assert not any("EXISTS inbox" in text for text in texts)
    assert await query(where, "SELECT b FROM more") == []
    assert await recorded(where) == [(number, file) for number, file in enumerate([*FILES, *names], 1)]


async def test_a_statement_that_the_server_refuses(where: Where, folder: Path) -> None:
    """A file that this server does not take is named by the server's words, and is not recorded."""
    await schema.apply(where, LOCAL)
    (folder / f"{len(FILES) + 1:04}_bad.cql").write_text("CREATE TABLE IF NOT EXISTS more (a nonsense PRIMARY KEY)")
    with pytest.raises(StoreUnavailable, match=r"nonsense"):
        await schema.apply(where, LOCAL)
    assert await query(where, "SELECT owner FROM schema_lock") == []
    assert len(await recorded(where)) == len(FILES)


# Copies


async def test_copies_of_each_datacenter(where: Where, cql_url: str) -> None:
    """The keyspace is made with the copies that the setting says; to change them later is an operator's work."""
    await schema.apply(where, LOCAL)
    expected = {"class": "org.apache.cassandra.locator.NetworkTopologyStrategy", "datacenter1": "1"}
    assert await replication(where, cql_url) == expected
    with pytest.raises(BadSettings, match=r"has datacenter1:1 and cql_replication is datacenter1:2.*ALTER KEYSPACE"):
        await schema.apply(where, "datacenter1:2")
    with pytest.raises(BadSettings, match="has datacenter1:1"):
        await schema.pending(where, "datacenter1:2")
    assert await replication(where, cql_url) == expected
    for same in (LOCAL, ""):
        assert await schema.apply(where, same) == []
        assert await schema.pending(where, same) == []
    async with opened(where._replace(datacenter="datacenter1")) as store:
        await store.check()


async def test_simple_copies_in_development(where: Where, cql_url: str) -> None:
    """A keyspace on one's own machine needs no datacenter."""
    await schema.apply(where, "simple:1", development=True)
    expected = {"class": "org.apache.cassandra.locator.SimpleStrategy", "replication_factor": "1"}
    assert await replication(where, cql_url) == expected
    assert await schema.apply(where, "simple:1", development=True) == []
    for refused in (schema.apply(where, LOCAL), schema.apply(where, ""), schema.pending(where, LOCAL)):
        with pytest.raises(BadSettings, match=r"SimpleStrategy, which knows no datacenters.*ALTER KEYSPACE"):
            await refused


def test_which_datacenter(where: Where) -> None:
    """Agents in one of several datacenters are told which; of one alone they need not be."""
    check_datacenter(where, {"dc1"})
    check_datacenter(where._replace(datacenter="dc2"), {"dc1", "dc2"})
    with pytest.raises(StoreUnavailable, match=r"datacenters dc1, dc2: add [?]datacenter="):
        check_datacenter(where, {"dc2", "dc1"})
    with pytest.raises(StoreUnavailable, match="has no datacenter dc3: it is in dc1, dc2"):
        check_datacenter(where._replace(datacenter="dc3"), {"dc2", "dc1"})


@pytest.mark.parametrize(
    ("text", "sentence"),
    [("", "cql_replication is not set"), ("simple:1", "for development"), ("datacenter1", "give each datacenter")],
)
async def test_copies_that_are_refused(where: Where, cql_url: str, text: str, sentence: str) -> None:
    """Without a good setting no keyspace is made."""
    with pytest.raises(BadSettings, match=sentence):
        await schema.apply(where, text)
    assert await replication(where, cql_url) is None


async def test_a_datacenter_that_is_not_there(where: Where, cql_url: str) -> None:
    """The server's word about a datacenter that it does not know reaches the operator, and no keyspace is made."""
    with pytest.raises(StoreUnavailable, match="nowhere"):
        await schema.apply(where, "nowhere:1")
    assert await replication(where, cql_url) is None


# Rows


async def test_rows_expire(where: Where) -> None:
    """A row lives for the retention from the time at which it was stored, and what is past it is not written."""
    await schema.apply(where, LOCAL)
    now, days = time.time_ns(), 3
    ages = {1: 0, 2: DAY_S, 3: 3 * DAY_S - 600, 4: 3 * DAY_S + 1, 5: 40 * DAY_S}
    async with opened(where, retention_days=days) as store:
        rows = [row(number, now - age * 1_000_000_000) for number, age in ages.items()]
        await store.append(rows)
        delivered = Delivered(now // 1_000_000, "phone", 1)
        await store.delivered([DeliveredMark("alice", one.position, one.stored_ns, delivered) for one in rows])
        assert [item.body for item in await everything(store)] == [b"1", b"2", b"3"]
        assert await store.unread("alice") == 3
    expected = {pack(Position(1, number)): days * DAY_S - age for number, age in ages.items() if number <= 3}
    for text in (
        "SELECT position, TTL(body) FROM inbox",
        "SELECT position, TTL(stored) FROM inbox",
        "SELECT position, TTL(delivered) FROM deliveries",
        "SELECT position, TTL(bucket) FROM inbox_state WHERE kind = 1 ALLOW FILTERING",
    ):
        found: dict[Any, Any] = dict(await query(where, text))  # type: ignore[arg-type]
        assert found.keys() == expected.keys(), text
        for position, ttl in found.items():
            assert expected[position] - PATIENCE_S <= ttl <= expected[position], text


async def test_broadcasts_expire(where: Where) -> None:
    """A broadcast and its references live for the retention from when it was stored, and are listed for longer."""
    await schema.apply(where, LOCAL)
    now, days = time.time_ns(), 3
    ages = {1: 0, 2: DAY_S, 3: 3 * DAY_S - 600, 4: 3 * DAY_S + 1, 5: 40 * DAY_S}
    async with opened(where, retention_days=days) as store:
        await store.append_broadcasts(
            [
                Broadcast("a.b", Position(1, number), f"id-{number}", "t", now - age * 1_000_000_000, b"%d" % number)
                for number, age in ages.items()
            ]
        )
        found = await store.broadcasts(Position(0, 0), Position(1, 9), 9)
        assert [one.body for one in found] == [b"1", b"2", b"3"]
        await store.subscribe("alice", ["a"], 9, Position(1, 1))
        await store.unsubscribe("alice", ["a"], Position(1, 2))
        await store.note_synced("alice", Position(1, 3))
    expected = {pack(Position(1, number)): days * DAY_S - age for number, age in ages.items() if number <= 3}
    for text in (
        "SELECT position, TTL(body) FROM broadcasts",
        "SELECT position, TTL(topic) FROM broadcasts_to WHERE pattern = 'a.>' ALLOW FILTERING",
        "SELECT position, TTL(stored) FROM broadcasts_to WHERE pattern = 'a.b' ALLOW FILTERING",
    ):
        left: dict[Any, Any] = dict(await query(where, text))  # type: ignore[arg-type]
        assert left.keys() == expected.keys(), text
        for position, ttl in left.items():
            assert expected[position] - PATIENCE_S <= ttl <= expected[position], text
    ((ended,),) = await query(where, "SELECT TTL(until) FROM ended_subscriptions")
    assert days * DAY_S - PATIENCE_S <= ended <= days * DAY_S  # type: ignore[operator]
    ((synced,),) = await query(where, "SELECT TTL(upto) FROM synced")
    assert synced > days * DAY_S  # type: ignore[operator]


async def test_two_times_are_two_partitions(where: Where) -> None:
    """What was stored in two buckets of time lies in two partitions, and is read as one order."""
    await schema.apply(where, LOCAL)
    now = time.time_ns()
    old = now - 2 * BUCKET_NS
    async with opened(where) as store:
        await store.append([row(number, old if number <= 5 else now) for number in range(1, 11)])
        assert [item.position.sequence for item in await everything(store)] == [*range(1, 11)]
        assert await store.missed("alice", Position(1, 3), Position(1, 8)) == 5
        assert await sequences(store, PageQuery(limit=4)) == [*range(10, 0, -1)]
    partitions = await query(where, "SELECT DISTINCT user, bucket FROM inbox")
    assert sorted(partitions) == [("alice", bucket_of(old)), ("alice", bucket_of(now))]  # type: ignore[type-var]


async def sequences(store: CqlStore, asked: PageQuery) -> list[int]:
    """Page after page to the end."""
    found: list[int] = []
    while True:
        page = await store.page("alice", asked)
        assert len(page.items) <= asked.limit
        found += [item.position.sequence for item in page.items]
        if page.next is None:
            return found
        asked = asked._replace(**{"before" if asked.after is None else "after": page.next})


@pytest.mark.parametrize("around", ["alternate", "swapped", "shuffled"])
async def test_neighbours_around_a_bucket_s_edge(where: Where, around: str) -> None:
    """Where times and positions disagree at the edge of a bucket, pages have the order of positions, without loss."""
    await schema.apply(where, LOCAL)
    count, second = 40, 1_000_000_000
    edge = bucket_of(time.time_ns() - DAY_NS) * BUCKET_NS
    places = list(range(count))
    if around == "alternate":
        places[10:30] = [place for pair in zip(range(20, 30), range(10, 20), strict=True) for place in pair]
    elif around == "swapped":
        places[10:30] = [*range(20, 30), *range(10, 20)]
    else:
        random.Random(7).shuffle(places)
    rows = [row(number + 1, edge + (place - count // 2) * second) for number, place in enumerate(places)]
    buckets = [bucket_of(one.stored_ns) for one in rows]
    assert len(set(buckets)) == 2
    assert buckets != sorted(buckets)
    async with opened(where) as store:
        await store.append(rows)
        ascending = [*range(1, count + 1)]
        assert [item.position.sequence for item in await everything(store)] == ascending
        assert [int(entry["id"][2:]) async for entry in exported(store)] in ([], ascending)
        for limit in (1, 3, 19, 100):
            for kind in ("all", "unread"):
                asked = PageQuery(limit=limit, filter=kind)  # type: ignore[arg-type]
                assert await sequences(store, asked) == ascending[::-1], (limit, kind)
                assert await sequences(store, asked._replace(after=Position(0, 0))) == ascending, (limit, kind)
        for low, high in ((5, 35), (12, 13), (19, 21)):
            found = await store.between("alice", Position(1, low), Position(1, high), 1000)
            assert [item.position.sequence for item in found] == [*range(low + 1, high + 1)]
            assert await store.missed("alice", Position(1, low), Position(1, high)) == high - low


async def exported(store: CqlStore) -> AsyncIterator[dict[str, Any]]:
    async for entry in store.export("alice"):
        if entry["kind"] == "notification" and "id" in entry:
            yield entry
