"""The SQLite store against the suite of all stores, and what is its own: file, threads, transactions, processes."""

from __future__ import annotations

import asyncio
import os
import signal
import sqlite3
import sys
import tempfile
import threading
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import asynccontextmanager, closing, contextmanager
from pathlib import Path
from typing import Any, Final

import pytest

from support.clock import PATIENCE_S, until
from tidings.store.factory import open_store_url
from tidings.store.port import Cursor, CursorUpdate, Holder, InboxRow, Store
from tidings.store.sqlite import SqliteStore
from tidings.store.sqlite_schema import MIGRATIONS
from tidings.wire.errors import BadSettings, StoreUnavailable

pytest.register_assert_rewrite("conformance.store_suite")

from conformance.store_suite import (  # noqa: E402
    ALICE,
    BOB,
    NEWEST,
    ONE,
    TWO,
    StoreConformance,
    at,
    first_page,
    marks,
    rows,
)

NOBODY: Final = 65534
WAL: Final = "PRAGMA journal_mode = WAL"


class TestSqlite(StoreConformance):
    """All that every store promises."""

    @pytest.fixture
    async def store(self, file: Path) -> AsyncIterator[Store]:
        async with opened(file) as store:
            yield store


@pytest.fixture
def file(tmp_path: Path) -> Path:
    return tmp_path / "tidings.db"


@asynccontextmanager
async def opened(file: Path, **options: Any) -> AsyncIterator[SqliteStore]:
    store = SqliteStore(file, **options)
    try:
        await store.open()
        yield store
    finally:
        await store.close()


@contextmanager
def connected(file: Path) -> Iterator[sqlite3.Connection]:
    """Another program's connection to the file."""
    with closing(sqlite3.connect(file, isolation_level=None)) as db:
        yield db


class Spy:
    """What the store asks of SQLite, and on which threads. `before` stops it at statements that begin like that."""

    def __init__(self) -> None:
        self.statements: list[str] = []
        self.threads: set[int] = set()
        self.connections: list[sqlite3.Connection] = []
        self.open = 0
        self.before: dict[str, Callable[[], object]] = {}


@pytest.fixture
def spy(monkeypatch: pytest.MonkeyPatch) -> Spy:
    spy = Spy()
    connect = sqlite3.connect

    class Connection(sqlite3.Connection):
        def execute(self, sql: str, *parameters: Any) -> sqlite3.Cursor:
            stop = spy.before.get(sql.split()[0])
            if stop is not None:
                stop()
            return super().execute(sql, *parameters)

        def close(self) -> None:
            spy.threads.add(threading.get_ident())
            spy.open -= 1
            super().close()

    def note(statement: str) -> None:
        spy.statements.append(statement)
        spy.threads.add(threading.get_ident())

    def spied(*arguments: Any, **options: Any) -> sqlite3.Connection:
        connection = connect(*arguments, factory=Connection, **options)
        spy.threads.add(threading.get_ident())
        spy.open += 1
        spy.connections.append(connection)
        connection.set_trace_callback(note)
        return connection

    monkeypatch.setattr(sqlite3, "connect", spied)
    return spy


async def failures(*calls: Any) -> list[BaseException]:
    """What each call raised; a call that did not is a failure of the test."""
    outcomes = await asyncio.gather(*calls, return_exceptions=True)
    assert all(isinstance(outcome, BaseException) for outcome in outcomes), outcomes
    return [outcome for outcome in outcomes if isinstance(outcome, BaseException)]


def content_of(folder: Path) -> list[str]:
    return os.listdir(folder)


def size_of(file: Path) -> int:
    return file.stat().st_size


def overwrite(file: Path, offset: int, content: bytes) -> None:
    with os.fdopen(os.open(file, os.O_WRONLY | os.O_CREAT), "wb") as target:
        target.seek(offset)
        target.write(content)


# Threads, transactions, durability


async def test_never_on_the_loops_thread(file: Path, spy: Spy) -> None:
    """Connecting, every statement and closing happen on other threads: each may wait for the disk."""
    async with opened(file) as store:
        await store.append(rows(ALICE, 1))
        await asyncio.gather(*(store.unread(ALICE) for _ in range(8)))
        await store.check()
    assert spy.threads
    assert threading.get_ident() not in spy.threads


class Pause:
    """Holds the thread that runs into it until `go_on`, which only a free loop can say in time."""

    def __init__(self) -> None:
        self.reached = threading.Event()
        self.go_on = threading.Event()
        self.in_time: bool | None = None

    def __call__(self) -> None:
        self.reached.set()
        self.in_time = self.go_on.wait(PATIENCE_S)


async def test_close_leaves_the_loop_free(file: Path, spy: Spy) -> None:
    """A read that takes long delays `close`, not the loop, and gets its answer."""
    async with opened(file) as store:
        pause = spy.before["SELECT"] = Pause()
        unread = asyncio.create_task(store.unread(ALICE))
        await until(pause.reached.is_set, "the read begins")
        close = asyncio.create_task(store.close())
        # From the loop, once `close` waits for the read: a loop that waits itself would never come to it.
        asyncio.get_running_loop().call_later(0.02, pause.go_on.set)
        await close
        assert await unread == 0
    assert pause.in_time


async def test_close_behind_a_commit(file: Path, spy: Spy) -> None:
    """What waits behind a transaction that is under way was accepted as well: it is written before the end."""
    async with opened(file) as store:
        pause = spy.before["COMMIT"] = Pause()
        first = asyncio.create_task(store.append(rows(ALICE, 1)))
        await until(pause.reached.is_set, "the first transaction commits")
        second = asyncio.create_task(store.append(rows(ALICE, 2)))
        close = asyncio.create_task(store.close())
        asyncio.get_running_loop().call_soon(pause.go_on.set)
        async with asyncio.timeout(PATIENCE_S):
            await asyncio.gather(first, second, close)
    async with opened(file) as store:
        assert set(await marks(store, ALICE)) == {1, 2}


async def test_close_lets_go_of_everything(file: Path, spy: Spy) -> None:
    """No connection is left open, also where a reader connects while the store closes; the log is written back."""
    async with opened(file) as store:
        await store.append(rows(ALICE, 1))
        reads = [asyncio.create_task(store.unread(ALICE)) for _ in range(20)]
        await asyncio.gather(asyncio.create_task(store.close()), *reads)
    assert spy.open == 0
    assert content_of(file.parent) == [file.name]


async def test_group_commit(file: Path, spy: Spy) -> None:
    """All that waits is one transaction: a hundred writers wait for the disk once."""
    async with opened(file) as store:
        before = spy.statements.count("COMMIT")
        await asyncio.gather(*(store.append(rows(f"user-{number}", 1)) for number in range(100)))
        assert spy.statements.count("COMMIT") - before == 1


async def test_durable(file: Path, spy: Spy) -> None:
    """WAL, and the log is on the disk before a commit returns."""
    async with opened(file):
        modes = [spy.connections[0].execute(f"PRAGMA {name}").fetchone()[0] for name in ("journal_mode", "synchronous")]
        assert modes == ["wal", 2]


async def test_killed_after_append(file: Path) -> None:
    """kill -9 the moment that `append` returned: the row is there, and the file opens as if nothing had been."""
    script = """
import asyncio, sys
from tidings.store.port import InboxRow
from tidings.store.sqlite import SqliteStore
from tidings.wire.position import Position
async def main():
    store = SqliteStore(sys.argv[1])
    await store.open()
    await store.append([InboxRow(sys.argv[2], Position(1, 1), "id", "type", None, 1, b"body")])
    print("stored", flush=True)
    await asyncio.Event().wait()
asyncio.run(main())
"""
    child = await asyncio.create_subprocess_exec(
        sys.executable, "-c", script, str(file), ALICE, stdout=asyncio.subprocess.PIPE
    )
    try:
        assert child.stdout is not None
        assert await asyncio.wait_for(child.stdout.readline(), PATIENCE_S) == b"stored\n"
    finally:
        child.send_signal(signal.SIGKILL)
        await child.wait()
    async with opened(file) as store:
        assert await marks(store, ALICE) == {1: ""}


async def test_reopened(file: Path) -> None:
    """Rows, marks, marks that wait, and cursors outlive the store."""
    cursor = Cursor(at(3), frozenset({at(5)}), {at(4): 2})
    async with opened(file) as store:
        await store.append(rows(ALICE, 1))
        await store.mark(ALICE, [at(1), at(2)], "read")
        await store.claim(ALICE, "phone", ONE, at(1))
        await store.save([CursorUpdate(ALICE, "phone", ONE, cursor, False)])
    async with opened(file) as store:
        await store.append(rows(ALICE, 2))
        assert await marks(store, ALICE) == {1: "sr", 2: "sr"}
        assert await store.claim(ALICE, "phone", TWO, at(0)) == (cursor, False, ONE)


@pytest.mark.parametrize(
    ("stored_ns", "raised"), [(None, StoreUnavailable), (2**70, OverflowError)], ids=["constraint", "overflow"]
)
async def test_one_that_fails(file: Path, stored_ns: Any, raised: type[Exception]) -> None:
    """A write that cannot be is refused alone: those that shared its transaction are stored, nothing of it is."""
    async with opened(file) as store:
        wrong = [*rows(ALICE, 50), InboxRow(ALICE, at(51), "id", "type", None, stored_ns, b"")]
        writes = [store.append(rows(ALICE, number)) for number in range(1, 10)]
        claim = store.claim(ALICE, "phone", ONE, at(7))
        outcomes = await asyncio.gather(*writes, store.append(wrong), claim, return_exceptions=True)
        assert outcomes[:9] == [None] * 9
        assert isinstance(outcomes[9], raised)
        assert outcomes[10] == (Cursor(at(7)), True, None)
        assert set(await marks(store, ALICE)) == set(range(1, 10))
        with pytest.raises(raised):
            await store.append(wrong)
        await store.check()


async def test_bounded(file: Path) -> None:
    """More writes or reads than may wait are refused at once, and the rest is done."""
    async with opened(file, pending_limit=5) as store:
        for calls in (
            [store.append(rows(ALICE, number)) for number in range(20)],
            [store.unread(ALICE) for _ in range(20)],
        ):
            outcomes = await asyncio.gather(*calls, return_exceptions=True)
            refused = [outcome for outcome in outcomes if isinstance(outcome, BaseException)]
            assert len(refused) == 15
            assert all(isinstance(error, StoreUnavailable) and str(file) in str(error) for error in refused)
        assert set(await marks(store, ALICE)) == set(range(5))
        await store.append(rows(ALICE, 99))


async def test_expire_lets_others_write(file: Path, spy: Spy) -> None:
    """Expiry of a long history goes slice by slice: whoever comes meanwhile waits for one, not for its end."""
    async with opened(file) as store:
        await store.append(rows(BOB, *range(12_000), stored_ns=1))
        spy.statements.clear()
        assert await store.expire(2) == 12_000
    slices = "\n".join(spy.statements).split("BEGIN IMMEDIATE")[1:]
    assert max(text.count("DELETE FROM inbox") for text in slices) <= 5000


# Plans


def plan(file: Path, statement: str) -> str:
    with connected(file) as db:
        return "\n".join(step[3] for step in db.execute(f"EXPLAIN QUERY PLAN {statement}"))


async def test_plans(file: Path, spy: Spy) -> None:
    """Every statement of a user's inbox finds its rows by an index, in order: no scan and no sorting."""
    async with opened(file) as store:
        await store.append(rows(ALICE, 1, 2))
        spy.statements.clear()
        await store.page(ALICE, before=None, limit=9, filter="all")
        await store.page(ALICE, before=at(2), limit=9, filter="unread")
        await store.page(ALICE, before=at(2), limit=9, filter="archived")
        await store.between(ALICE, at(0), NEWEST, 9)
        await store.missed(ALICE, at(0), NEWEST)
        await store.unread(ALICE)
        await store.mark_all(ALICE, at(2), "read")
        await store.holders(ALICE)
        await store.expire(1)
    asked = [text for text in spy.statements if text.split()[0] in ("SELECT", "UPDATE")]
    by = ["PRIMARY KEY", "inbox_unread", "inbox_archived", "PRIMARY KEY", "PRIMARY KEY", "inbox_unread"]
    by += ["user=?", "PRIMARY KEY", "inbox_age"]
    assert len(asked) == len(by), asked
    for statement, index in zip(asked, by, strict=True):
        found = plan(file, statement)
        assert index in found, (statement, found)
        assert "TEMP B-TREE" not in found, (statement, found)
        assert not any(step.startswith("SCAN inbox") for step in found.splitlines()), (statement, found)


async def test_badge_of_a_long_history(file: Path, spy: Spy) -> None:
    """What the badge and the unread page cost does not grow with what is read: SQLite's own steps are counted."""
    steps: dict[int, int] = {}
    counted = 0

    def step() -> None:
        nonlocal counted
        counted += 1

    async with opened(file) as store:
        total = 0
        for length in (500, 20_000):
            await store.append(rows(ALICE, *range(total, length)))
            total = length
            await store.mark_all(ALICE, at(length - 1), "read")
            await store.append(rows(ALICE, 10**6, 10**6 + 1))
            await asyncio.gather(*(store.holders(ALICE) for _ in range(8)))
            for connection in spy.connections:
                connection.set_progress_handler(step, 10)
            counted = 0
            assert await store.unread(ALICE) == 2
            assert len((await first_page(store, ALICE, "unread")).items) == 2
            steps[length] = counted
            for connection in spy.connections:
                connection.set_progress_handler(None, 0)
    assert steps[20_000] <= steps[500] + 5, steps


# Several processes


async def test_two_processes(file: Path) -> None:
    """What one store wrote the other sees at once; a device that moves to the other is lost to the first."""
    async with opened(file) as first, opened(file) as second:
        await first.append(rows(ALICE, 1))
        await second.mark(ALICE, [at(1)], "read")
        assert await marks(first, ALICE) == {1: "sr"}
        await first.claim(ALICE, "phone", ONE, at(1))
        assert (await second.claim(ALICE, "phone", TWO, at(9))).previous == ONE
        late = CursorUpdate(ALICE, "phone", ONE, Cursor(at(5)), True)
        assert await first.save([late]) == [ONE]
        assert await first.holders(ALICE) == [TWO]


async def test_two_processes_at_once(file: Path) -> None:
    """Writers and claims of two stores at the same time: nothing is lost, and one claim is the first."""
    async with opened(file) as first, opened(file) as second:
        stores = [first, second] * 20
        holders = [Holder(f"gateway-{number}", "s") for number in range(len(stores))]
        claims = await asyncio.gather(
            *(store.claim(ALICE, "phone", holder, at(1)) for store, holder in zip(stores, holders, strict=True))
        )
        await asyncio.gather(*(store.append(rows(ALICE, number)) for number, store in enumerate(stores)))
        assert [claim.first for claim in claims].count(True) == 1
        before = [claim.previous for claim in claims if claim.previous is not None]
        assert sorted(before + await first.holders(ALICE)) == sorted(holders)
        assert len(await marks(second, ALICE)) == len(stores)


async def test_opened_at_once(file: Path) -> None:
    """Agents that start together on a new file all open it."""
    stores = [SqliteStore(file) for _ in range(8)]
    try:
        await asyncio.gather(*(store.open() for store in stores))
        await asyncio.gather(*(store.check() for store in stores))
    finally:
        for store in stores:
            await store.close()


async def test_locked_by_another(file: Path, spy: Spy) -> None:
    """A file that stays locked: all who wait are told after one wait, not each after its own; reads go on."""
    async with opened(file, busy_timeout_s=0.05) as store:
        await store.append(rows(ALICE, 1))
        with connected(file) as other:
            other.execute("BEGIN IMMEDIATE")
            spy.statements.clear()
            errors = await failures(*(store.append(rows(ALICE, number)) for number in range(2, 60)))
            assert {type(error) for error in errors} == {StoreUnavailable}
            assert "locked" in str(errors[0])
            assert isinstance(errors[0].__cause__, sqlite3.OperationalError)
            assert spy.statements.count("BEGIN IMMEDIATE") <= 1
            assert await marks(store, ALICE) == {1: ""}
            with pytest.raises(StoreUnavailable):
                await store.check()
            other.execute("ROLLBACK")
        await store.append(rows(ALICE, 2))
        assert await marks(store, ALICE) == {1: "", 2: ""}


async def test_opened_while_another_writes(file: Path, spy: Spy) -> None:
    """SQLite itself does not wait for the lock that the change to WAL needs: the store does."""
    with connected(file) as other:
        other.execute("CREATE TABLE somebody (a)")
        other.execute("BEGIN IMMEDIATE")
        store = SqliteStore(file)
        opening = asyncio.create_task(store.open())
        try:
            await until(lambda: spy.statements.count(WAL) > 1 or opening.done(), "the change to WAL is tried again")
            other.execute("COMMIT")
            await opening
            await store.check()
        finally:
            await store.close()


async def test_locked_at_the_start(file: Path) -> None:
    """A file that stays locked is refused after the timeout."""
    with connected(file) as other:
        other.execute("BEGIN EXCLUSIVE")
        store = SqliteStore(file, busy_timeout_s=0.05)
        with pytest.raises(StoreUnavailable, match="locked"):
            await asyncio.wait_for(store.open(), PATIENCE_S)
    await store.close()


# Files that are not as they should be


async def refused(file: Path) -> str:
    """The sentence with which a store refuses to open; closing it afterwards is fine."""
    store = SqliteStore(file)
    try:
        with pytest.raises(StoreUnavailable) as caught:
            await store.open()
        with pytest.raises(StoreUnavailable):
            await store.check()
    finally:
        await store.close()
    assert str(file) in str(caught.value)
    return str(caught.value)


async def test_missing_folder(tmp_path: Path) -> None:
    """The folders of the path are made."""
    async with opened(tmp_path / "one" / "two" / "tidings.db") as store:
        await store.check()


async def test_no_database(file: Path, spy: Spy) -> None:
    """A file of something else: what it is and what to do; it stays as it is, and no connection to it is left."""
    overwrite(file, 0, b"garbage" * 1000)
    sentence = await refused(file)
    assert "damaged" in sentence
    assert "move it away" in sentence
    assert sorted(content_of(file.parent)) == [file.name]
    assert size_of(file) == 7000
    assert spy.open == 0


async def test_damaged(file: Path) -> None:
    """A database whose pages were overwritten: what reads them says so and what to do."""
    async with opened(file) as store:
        await store.append(rows(ALICE, *range(500)))
    # The first page holds the schema: it opens.
    overwrite(file, 4096, b"\xff" * (size_of(file) - 4096))
    async with opened(file) as store:
        with pytest.raises(StoreUnavailable, match="move it away") as caught:
            await first_page(store, ALICE)
        assert isinstance(caught.value.__cause__, sqlite3.DatabaseError)


async def test_newer_schema(file: Path, spy: Spy) -> None:
    """A file that a later version wrote is not touched."""
    with connected(file) as db:
        db.execute("PRAGMA user_version = 99")
    assert "update Tidings" in await refused(file)
    assert spy.open == 0
    with connected(file) as db:
        assert db.execute("PRAGMA user_version").fetchone() == (99,)


async def test_migration_that_fails(file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """It leaves the schema and the rows as they were; the version before still opens the file."""
    async with opened(file) as store:
        await store.append(rows(ALICE, 1))
    with monkeypatch.context() as patch:
        patch.setattr("tidings.store.sqlite.MIGRATIONS", (*MIGRATIONS, "CREATE TABLE later (a);\nNONSENSE;"))
        await refused(file)
    with connected(file) as db:
        assert db.execute("SELECT name FROM sqlite_schema WHERE name = 'later'").fetchall() == []
    async with opened(file) as store:
        assert await marks(store, ALICE) == {1: ""}


@contextmanager
def ordinary_rights(folder: Path) -> Iterator[None]:
    """`folder` and all in it may only be read. Root may write everywhere, and is nobody for the moment."""
    for path in folder.iterdir():
        path.chmod(0o444)
    folder.chmod(0o555)
    root = os.geteuid() == 0
    if root:
        os.seteuid(NOBODY)
    try:
        yield
    finally:
        if root:
            os.seteuid(0)
        folder.chmod(0o755)


@pytest.fixture
def public_folder() -> Iterator[Path]:
    """A folder that everybody may reach: pytest's own are closed to other users."""
    with tempfile.TemporaryDirectory() as name:
        Path(name).chmod(0o755)
        yield Path(name)


@pytest.mark.parametrize("name", ["tidings.db", "below/tidings.db"])
async def test_read_only_folder(public_folder: Path, name: str) -> None:
    """Neither a new file nor a new folder can be made: the sentence asks for the rights."""
    with ordinary_rights(public_folder):
        sentence = await refused(public_folder / name)
    assert "write" in sentence
    assert content_of(public_folder) == []


async def test_read_only_file(public_folder: Path) -> None:
    """A database that may only be read is refused at the start, not at the first write."""
    async with opened(public_folder / "tidings.db"):
        pass
    with ordinary_rights(public_folder):
        assert "write" in await refused(public_folder / "tidings.db")


async def test_folder_is_a_file(file: Path) -> None:
    """A path through a file, and a path that is a folder."""
    overwrite(file, 0, b"")
    assert "write" in await refused(file / "below.db")
    assert "write" in await refused(file.parent)


async def test_life_out_of_order(file: Path) -> None:
    """Closed before it was opened: nothing is made, and it stays closed."""
    store = SqliteStore(file)
    await store.close()
    with pytest.raises(StoreUnavailable):
        await store.open()
    assert content_of(file.parent) == []


async def test_relative_path(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A relative path is the folder's in which the store was made, for readers that connect later as well."""
    monkeypatch.chdir(tmp_path)
    async with opened(Path("tidings.db")) as store:
        await store.append(rows(ALICE, 1))
        monkeypatch.chdir("/")
        assert await store.unread(ALICE) == 1


async def test_cancelled_open(file: Path, spy: Spy) -> None:
    """An `open` that was given up leaves nothing behind once the store is closed."""
    store = SqliteStore(file)
    opening = asyncio.create_task(store.open())
    asyncio.get_running_loop().call_soon(opening.cancel)
    with pytest.raises(asyncio.CancelledError):
        await opening
    await store.close()
    assert spy.open == 0


# URLs


@pytest.mark.parametrize(
    ("url", "path"),
    [
        ("sqlite:///tidings.db", "tidings.db"),
        ("sqlite:///data/tidings.db", "data/tidings.db"),
        ("sqlite:////var/lib/tidings.db", "/var/lib/tidings.db"),
        ("sqlite:///with%20blank%23and%3Fsigns.db", "with blank#and?signs.db"),
    ],
)
async def test_url(url: str, path: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Three slashes are relative, four absolute; what a URL gives a meaning is escaped."""
    monkeypatch.chdir(tmp_path)
    store = open_store_url(url.replace("/var/lib", str(tmp_path)))
    assert isinstance(store, SqliteStore)
    await store.open()
    await store.close()
    assert (tmp_path / path.removeprefix("/var/lib/")).is_file()


@pytest.mark.parametrize(
    "url",
    [
        "",
        "tidings.db",
        "/var/lib/tidings.db",
        "sqlite:tidings.db",
        "sqlite://tidings.db",
        "sqlite://host/tidings.db",
        "sqlite:///",
        "sqlite:////",
        "sqlite:///folder/",
        "sqlite:///:memory:",
        "sqlite:///tidings.db?mode=ro",
        "sqlite:///tidings#1.db",
        "sqlite:///tidings%00.db",
        "sqlite://[",
        "postgresql://host/tidings",
    ],
)
def test_no_url_of_ours(url: str) -> None:
    """Anything else is refused with what was given and what is allowed; no part of a URL is passed over."""
    with pytest.raises(BadSettings) as caught:
        open_store_url(url)
    assert repr(url) in str(caught.value)
    assert "sqlite:///" in str(caught.value)
