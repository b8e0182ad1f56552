"""The SQLite store against the suite of all stores, and what is its own: file, threads, transactions, processes."""

from __future__ import annotations

import asyncio
import os
import re
import signal
import sqlite3
import sys
import tempfile
import threading
import time
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import asynccontextmanager, closing, contextmanager
from pathlib import Path
from typing import Any, Final

import pytest

from support.clock import PATIENCE_S, until
from tidings.store.factory import open_store_url
from tidings.store.port import (
    Claimed,
    Cursor,
    CursorUpdate,
    EndedSubscription,
    Holder,
    InboxPage,
    Lost,
    PageQuery,
    Store,
    Subscription,
)
from tidings.store.sqlite import SqliteStore
from tidings.store.sqlite.schema import MIGRATIONS
from tidings.wire.errors import BadSettings, RowsRefused, StoreUnavailable
from tidings.wire.position import Position

pytest.register_assert_rewrite("conformance.store_suite")

from conformance.store_suite import (  # noqa: E402
    ALICE,
    BOB,
    MOST,
    NEWEST,
    NOW_NS,
    ONE,
    TWO,
    TYPES,
    ZERO,
    StoreConformance,
    at,
    broadcast,
    broadcasts,
    broadcasts_to,
    delivered,
    ended,
    everything,
    exported,
    first,
    first_page,
    follow,
    letters,
    listed,
    marks,
    reference,
    rows,
)

NOBODY: Final = 65534
WAL: Final = "PRAGMA journal_mode = WAL"


class TestSqlite(StoreConformance):
    """All that every store promises."""

    examples = 150

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
        assert await store.claim(ALICE, "phone", TWO, at(0)) == Claimed(cursor, False, ONE)


@pytest.mark.parametrize(
    "wrong",
    [
        {"stored_ns": None},
        {"stored_ns": 2**70},
        {"position": Position(1, 2**63)},
        {"user": "\ud800"},
        {"id": "\udfff"},
    ],
    ids=["no-time", "late", "high", "user", "id"],
)
async def test_rows_refused(file: Path, wrong: Any) -> None:
    """A row that cannot be is refused alone, whatever is wrong with it, also in a database that erased somebody."""
    async with opened(file) as store:
        for number in (10, 20):
            refused = rows(ALICE, number)[0]._replace(**wrong)
            calls = store.append([refused, *rows(ALICE, number + 1)]), store.append(rows(ALICE, number + 2))
            outcomes = await asyncio.gather(*calls, return_exceptions=True)
            assert isinstance(outcomes[0], RowsRefused)
            assert set(outcomes[0].reasons) == {0}
            assert outcomes[1] is None
            await store.erase(BOB, at(1))
        assert set(await marks(store, ALICE)) == {11, 12, 21, 22}


async def test_one_that_fails(file: Path) -> None:
    """A write that cannot be fails alone: those that shared its transaction are stored, nothing of it is."""
    async with opened(file) as store:
        wrong = [delivered(ALICE, at(50), 1), delivered(ALICE, Position(1, 2**70), 1)]
        writes = [store.append(rows(ALICE, number)) for number in range(1, 10)]
        claim = store.claim(ALICE, "phone", ONE, at(7))
        outcomes = await asyncio.gather(*writes, store.delivered(wrong), claim, return_exceptions=True)
        assert outcomes[:9] == [None] * 9
        assert isinstance(outcomes[9], OverflowError)
        assert outcomes[10] == Claimed(Cursor(at(7)), True, None)
        await store.append(rows(ALICE, 50))
        assert (await everything(store, ALICE))[-1].delivered is None
        assert set(await marks(store, ALICE)) == {*range(1, 10), 50}
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


async def test_erase_lets_others_write(file: Path, spy: Spy) -> None:
    """Erasing goes slice by slice, and what comes between two of them to be erased is not stored any more."""
    async with opened(file) as store:
        await store.append(rows(BOB, *range(1, 12_001)))
        spy.statements.clear()
        erase = asyncio.create_task(store.erase(BOB, at(12_001)))
        await until(lambda: any(text.startswith("DELETE FROM inbox") for text in spy.statements), "the first slice")
        await store.append(rows(BOB, 0, 12_001, 12_002))
        assert not erase.done()
        assert await erase == 12_000
        assert await marks(store, BOB) == {12_002: ""}
    slices = "\n".join(spy.statements).split("BEGIN IMMEDIATE")[1:]
    assert max(text.count("DELETE FROM inbox") for text in slices) <= 5000


# Expiry


async def test_expire(file: Path) -> None:
    """Rows stored before that time go, marked or not, of all users; the rest stays; a second time finds none."""
    async with opened(file) as store:
        await store.append(rows(ALICE, 1, 2, stored_ns=1000) + rows(BOB, 1, stored_ns=1999))
        await store.append(rows(ALICE, 3, stored_ns=2000))
        await store.mark(ALICE, [at(1)], "archived")
        assert await store.expire(2000) == 3
        assert await marks(store, ALICE) == {3: ""}
        assert await store.unread(BOB) == 0
        assert await store.expire(2000) == 0


async def test_expired_marks_that_waited(file: Path) -> None:
    """Marks whose notification never came age from when they were made."""
    async with opened(file) as store:
        await store.mark(ALICE, [at(1)], "read")
        assert await store.expire(NOW_NS) == 0
        assert await store.expire(time.time_ns() + 1) == 1
        await store.append(rows(ALICE, 1))
        assert await marks(store, ALICE) == {1: ""}


async def test_expired_delivery_that_waited(file: Path) -> None:
    """A delivery ages as its notification does."""
    async with opened(file) as store:
        await store.delivered([delivered(ALICE, at(1), 1)])
        assert await store.expire(NOW_NS) == 0
        assert await store.expire(NOW_NS + 1) == 1


async def test_expired_watermarks(file: Path) -> None:
    """A mark of all, or of erasing, goes when it is old and no row lies below it: no row changes its marks."""
    async with opened(file) as store:
        await store.mark_all(ALICE, at(1), "archived")
        await store.mark_all(BOB, at(9), "read")
        await store.erase("carol", at(1))
        later = time.time_ns() + 1
        await store.append(rows(ALICE, 2, 3, stored_ns=later) + rows(BOB, 9, 10, stored_ns=later))
        assert await store.expire(NOW_NS) == 0
        assert watermarks(file) == ["alice@example.org"] * 3 + ["bob"] * 2 + ["carol"]
        assert await store.expire(later) == 0
        assert watermarks(file) == ["bob"] * 2
        assert await marks(store, ALICE) == {2: "", 3: ""}
        assert await marks(store, BOB) == {9: "sr", 10: ""}


def watermarks(file: Path) -> list[str]:
    """Whose watermarks are kept."""
    with connected(file) as db:
        return [user for (user,) in db.execute("SELECT user FROM watermarks ORDER BY user")]


async def test_expired_broadcasts(file: Path) -> None:
    """Those stored before that time go with their references, however many, and are counted; the rest stays."""
    old = [broadcast("a.b.c", at(number), stored_ns=number) for number in range(1, 500)]
    new = [broadcast("a.b", at(number), stored_ns=500) for number in range(500, 503)]
    async with opened(file) as store:
        await store.append_broadcasts(old + new)
        await store.append(rows(ALICE, 1, stored_ns=499))
        assert await store.expire(500) == 500
        assert await broadcasts(store) == new
        assert await broadcasts_to(store, "a.>") == list(map(reference, new))
        assert await store.broadcast_bodies([at(499), at(500)]) == {at(500): new[0].body}
        assert await store.expire(500) == 0
        assert await store.expire(501) == 3
    with connected(file) as db:
        assert db.execute("SELECT count(*) FROM broadcasts_to").fetchone() == (0,)


async def test_expired_ends_of_subscriptions(file: Path) -> None:
    """They age from when they ended, the last end counts, and none of what is followed goes."""
    async with opened(file) as store:
        await store.subscribe(ALICE, ["a", "b", "c"], MOST, at(1))
        await store.unsubscribe(ALICE, ["a", "b"], at(2))
        assert await store.expire(NOW_NS) == 0
        between = time.time_ns()
        await store.subscribe(ALICE, ["b"], MOST, at(1))
        await store.unsubscribe(ALICE, ["b"], at(3))
        assert len(await ended(store, ALICE)) == 2
        assert await store.expire(between) == 0
        assert await ended(store, ALICE) == [EndedSubscription("b", at(1), at(3))]
        assert await store.expire(time.time_ns() + 1) == 0
        assert await ended(store, ALICE) == []
        assert await store.subscriptions(ALICE, None, 9) == [Subscription("c", at(1))]


# Plans, and what a long history costs


def plan(file: Path, statement: str) -> str:
    with connected(file) as db:
        return "\n".join(step[3] for step in db.execute(f"EXPLAIN QUERY PLAN {statement}"))


async def test_plans(file: Path, spy: Spy) -> None:
    """Every statement of a user's inbox finds its rows by an index, in order: no scan and no sorting."""
    range_ = "user=? AND (incarnation,sequence)>(?,?) AND (incarnation,sequence)<(?,?)"
    rows_, unread, kept = (f"PRIMARY KEY ({range_})", f"INDEX inbox_unread ({range_})", f"INDEX inbox_kept ({range_})")
    archived = f"INDEX inbox_archived ({range_})"
    async with opened(file) as store:
        await store.append(rows(ALICE, *range(1, 9)))
        await store.mark_all(ALICE, at(2), "archived")
        await store.mark_all(ALICE, at(4), "read")
        for call, by in (
            (lambda: store.page(ALICE, PageQuery(9)), {rows_}),
            (lambda: store.page(ALICE, PageQuery(9, after=at(1), type=TYPES[0], topic="news")), {rows_}),
            (lambda: store.page(ALICE, PageQuery(9, before=at(9), filter="unread")), {unread, kept}),
            (lambda: store.page(ALICE, PageQuery(9, after=at(0), filter="unread")), {unread, kept}),
            (lambda: store.page(ALICE, PageQuery(9, before=at(9), filter="archived")), {archived, rows_}),
            (lambda: store.page(ALICE, PageQuery(9, after=at(0), filter="archived")), {archived, rows_}),
            (lambda: store.between(ALICE, at(0), NEWEST, 9), {rows_}),
            (lambda: store.missed(ALICE, at(0), NEWEST), {rows_}),
            (lambda: store.unread(ALICE), {unread, kept}),
            (lambda: store.mark_all(ALICE, at(2), "read"), {"INDEX inbox_kept (user=? AND (incarnation"}),
            (lambda: store.holders(ALICE), {"PRIMARY KEY (user=?)"}),
            (lambda: exported(store, ALICE), {rows_, "PRIMARY KEY (user=?)"}),
            (lambda: store.broadcasts(at(0), NEWEST, 9), {"PRIMARY KEY ((incarnation,sequence)>(?,?) AND"}),
            (
                lambda: store.broadcasts_to("a.>", at(0), NEWEST, 9),
                {"SEARCH at USING PRIMARY KEY (pattern=? AND (incarnation,sequence)>(?,?) AND"},
            ),
            (lambda: store.subscriptions(ALICE, "a", 9), {"PRIMARY KEY (user=? AND topic>?)"}),
            (lambda: store.ended_subscriptions(ALICE, None, 9), {"PRIMARY KEY (user=? AND (topic,since_incarnation"}),
            (
                lambda: store.expire(1),
                {"INDEX inbox_age", "INDEX watermarks_age", "INDEX broadcasts_age", "INDEX ended_subscriptions_age"},
            ),
            (lambda: store.erase(ALICE, at(1)), {"PRIMARY KEY (user=? AND (incarnation,sequence)<(?,?))"}),
        ):
            spy.statements.clear()
            await call()
            asked = [text for text in spy.statements if text.split()[0] in ("SELECT", "UPDATE", "DELETE")]
            found = [plan(file, statement) for statement in asked]
            for index in by:
                assert any(index in each for each in found), (index, asked, found)
            for statement, each in zip(asked, found, strict=True):
                assert "TEMP B-TREE" not in each, (statement, each)
                assert not re.search(
                    r"^SCAN (inbox|watermarks|old|at|broadcasts|ended|subscriptions)", each, re.MULTILINE
                ), (statement, each)
                # The range, not only the user: a history may be long.
                assert not re.search(r"inbox USING .*\(user=\?\)$", each, re.MULTILINE) or "LIMIT 1)" in statement, each


class Steps:
    """Counts SQLite's own steps, by ten."""

    def __init__(self, spy: Spy) -> None:
        self._spy = spy
        self._counted = 0

    async def of(self, store: Store, call: Any) -> int:
        def step() -> None:
            self._counted += 1

        # The writer and both readers: a reader connects with the first that it reads.
        while len(self._spy.connections) < 3:
            await asyncio.gather(*(store.holders(BOB) for _ in range(8)))
        self._counted = 0
        for connection in self._spy.connections:
            connection.set_progress_handler(step, 10)
        await call
        for connection in self._spy.connections:
            connection.set_progress_handler(None, 0)
        return self._counted


async def test_cost_of_a_long_history(file: Path, spy: Spy) -> None:
    """What the badge, a page and a mark of all cost does not grow with what is read or archived."""
    steps = Steps(spy)
    counted: dict[int, list[int]] = {}
    async with opened(file) as store:
        await store.mark_all(ALICE, at(0), "archived")
        total = 0
        for length in (500, 20_000):
            await store.append(rows(ALICE, *range(total, length)))
            total = length
            calls = [
                lambda: store.unread(ALICE),
                lambda: store.mark_all(ALICE, at(total // 2), "archived"),  # noqa: B023
                lambda: store.mark_all(ALICE, at(total - 1), "read"),  # noqa: B023
                lambda: store.mark(ALICE, [at(total - 7), at(total - 9)], "unread"),  # noqa: B023
                lambda: store.append(rows(ALICE, 10**6, 10**6 + 1)),
                lambda: store.unread(ALICE),
                lambda: first_page(store, ALICE, "unread"),
                lambda: store.page(ALICE, PageQuery(50, after=at(0), filter="unread")),
                lambda: first_page(store, ALICE, "archived"),
                lambda: store.page(ALICE, PageQuery(50, after=at(0))),
            ]
            counted[length] = [await steps.of(store, call()) for call in calls]
            assert await store.unread(ALICE) == 4
            assert await listed(store, ALICE, PageQuery(9, filter="unread")) == [10**6 + 1, 10**6, total - 7, total - 9]
            await store.mark_all(ALICE, at(total - 1), "read")
    for small, large in zip(counted[500], counted[20_000], strict=True):
        assert large <= small + 5, counted


async def test_marking_all_is_a_small_write(file: Path, spy: Spy) -> None:
    """However many rows are marked, what is written is the watermark, and rows that were unread again."""
    async with opened(file) as store:
        await store.append(rows(ALICE, *range(20_000)))
        await store.mark_all(ALICE, at(19_000), "read")
        await store.mark(ALICE, [at(5), at(6)], "unread")
        before = spy.connections[0].total_changes
        await store.mark_all(ALICE, at(19_999), "read")
        await store.mark_all(ALICE, at(19_999), "archived")
        assert spy.connections[0].total_changes - before <= 5 + 2
        assert await store.unread(ALICE) == 0


@pytest.mark.parametrize(
    "query",
    [
        PageQuery(9, type="org.example.none"),
        PageQuery(9, topic="none", filter="unread"),
        PageQuery(9, type="org.example.none", after=at(0)),
        PageQuery(9, type="org.example.none", filter="archived"),
    ],
    ids=["type", "topic", "after", "archived"],
)
async def test_page_that_finds_little(file: Path, spy: Spy, query: PageQuery) -> None:
    """A page reads so much and no more of a long history; then it is short, and `next` goes on."""
    steps = Steps(spy)
    async with opened(file) as store:
        await store.append(rows(ALICE, *range(1, 16_001)))
        if query.filter == "archived":
            await store.mark_all(ALICE, at(16_000), "archived")
        assert await follow(store, ALICE, query) == [[]] * 4
        page = await store.page(ALICE, query)
        assert page == InboxPage([], at(5000 if query.after else 11_001))
        assert 0 < await steps.of(store, store.page(ALICE, query)) < 30_000


async def test_page_behind_much_that_is_archived(file: Path) -> None:
    """What does not fit is passed over in short pages, and nothing of what fits is left out."""
    async with opened(file) as store:
        await store.append(rows(ALICE, *range(1, 12_001)))
        for start in range(10, 12_000, 1000):
            await store.mark(ALICE, [at(number) for number in range(start, min(start + 1000, 12_000))], "archived")
        assert await listed(store, ALICE, PageQuery(50)) == [12_000, *range(9, 0, -1)]
        assert await listed(store, ALICE, PageQuery(50, after=at(3))) == [*range(4, 10), 12_000]
        await store.mark(ALICE, [at(number) for number in range(5, 10)], "read")
        assert await listed(store, ALICE, PageQuery(50, filter="unread")) == [12_000, 4, 3, 2, 1]


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
        assert await first.save([late]) == [Lost(ONE, TWO)]
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
    # Not those of the schema: it opens.
    with connected(file) as db:
        (root,) = db.execute("SELECT rootpage FROM sqlite_schema WHERE name = 'inbox'").fetchone()
    overwrite(file, (root - 1) * 4096, b"\xff" * 4096)
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
        patch.setattr("tidings.store.sqlite.database.MIGRATIONS", (*MIGRATIONS, "CREATE TABLE later (a);\nNONSENSE;"))
        await refused(file)
    with connected(file) as db:
        assert db.execute("SELECT name FROM sqlite_schema WHERE name = 'later'").fetchall() == []
    async with opened(file) as store:
        assert await marks(store, ALICE) == {1: ""}


async def test_migration_from_the_first_version(file: Path) -> None:
    """A file of the first version keeps rows, marks, marks that wait and cursors; what was archived is read now."""
    with connected(file) as db:
        db.executescript(MIGRATIONS[0] + "PRAGMA user_version = 1;")
        for number, *marked in ((1, 0, 0, 0), (2, 1, 0, 0), (3, 1, 1, 0), (4, 1, 0, 1), (5, 1, 1, 1)):
            user, position, id_, type_, topic, stored_ns, body = rows(ALICE, number)[0]
            db.execute(
                "INSERT INTO inbox VALUES (?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?)",
                (user, *position, id_, type_, topic, stored_ns, *marked, body),
            )
        for number, archived in ((6, 0), (7, 1)):
            db.execute(
                "INSERT INTO inbox (user, incarnation, sequence, stored_ns, seen, archived) VALUES (?, ?, ?, ?, 1, ?)",
                (ALICE, *at(number), NOW_NS, archived),
            )
        db.execute(
            "INSERT INTO cursors VALUES (?, 'phone', ?, ?, ?, ?, ?, ?)",
            (ALICE, *at(3), f"[[{at(5).incarnation}, 5]]", f"[[{at(4).incarnation}, 4, 2]]", *ONE),
        )
    async with opened(file) as store:
        assert await store.unread(ALICE) == 2
        await store.append(rows(ALICE, 6, 7))
        expected = {1: "", 2: "s", 3: "sr", 4: "sra", 5: "sra", 6: "s", 7: "sra"}
        assert await marks(store, ALICE) == expected
        bodies = [item.body for item in await everything(store, ALICE)]
        assert bodies == [each.body for each in rows(ALICE, *range(1, 8))]
        cursor = Cursor(at(3), frozenset({at(5)}), {at(4): 2})
        assert await store.claim(ALICE, "phone", TWO, at(0)) == Claimed(cursor, False, ONE)
        await store.mark_all(ALICE, at(2), "read")
        await store.mark(ALICE, [at(1), at(4)], "unread")
        await store.delivered([delivered(ALICE, at(1), 1)])
    async with opened(file) as store:
        found = [(letters(item), item.delivered) for item in await everything(store, ALICE)]
        assert found[:4] == [("s", first(1)), ("sr", None), ("sr", None), ("sra", None)]


async def test_migration_of_subscriptions(file: Path) -> None:
    """What was followed before there were broadcasts has every broadcast, and is ended as any other."""
    with connected(file) as db:
        for script in MIGRATIONS[:4]:
            db.executescript(script)
        db.execute("PRAGMA user_version = 4")
        db.executemany("INSERT INTO subscriptions VALUES (?, ?)", [(ALICE, "a"), (ALICE, "b")])
    async with opened(file) as store:
        await store.subscribe(ALICE, ["a"], MOST, at(5))
        assert await store.subscriptions(ALICE, None, 9) == [Subscription("a", ZERO), Subscription("b", ZERO)]
        await store.unsubscribe(ALICE, ["b"], at(7))
        assert await ended(store, ALICE) == [EndedSubscription("b", ZERO, at(7))]


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
