"""The embedded store: one SQLite file, WAL, one writer with group commit, never on the event loop's thread.

Everything that waits when the writer is idle is written in one transaction, so that a commit, which waits for the disk
(``synchronous=FULL``: what was acknowledged survives a power cut), is shared by all who came meanwhile. Reads
have connections of their own and see the last commit. Several processes may share the file.
"""

from __future__ import annotations

import asyncio
import sqlite3
import threading
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, Final, TypeVar

import orjson

from tidings.wire.errors import StoreUnavailable
from tidings.wire.frames import Filter, MarkAs
from tidings.wire.position import Position

from .port import UNREAD_CAP, Claimed, Cursor, CursorUpdate, Holder, InboxItem, InboxPage, InboxRow
from .sqlite_schema import MIGRATIONS

__all__ = ["SqliteStore"]

Result = TypeVar("Result")
Operation = Callable[[sqlite3.Connection], Any]

_EXPIRE_SLICE: Final = 2000
_READERS: Final = 2
_LAST: Final = Position(2**62, 0)

_APPEND: Final = """
    INSERT INTO inbox (user, incarnation, sequence, id, type, topic, stored_ns, body) VALUES (?, ?, ?, ?, ?, ?, ?, ?)
    ON CONFLICT DO UPDATE SET id = excluded.id, type = excluded.type, topic = excluded.topic,
        stored_ns = excluded.stored_ns, body = excluded.body WHERE inbox.body IS NULL"""
_PAGE: Final = """
    SELECT incarnation, sequence, seen, read, archived, body FROM inbox {}
    WHERE user = ? AND (incarnation, sequence) < (?, ?) AND body IS NOT NULL AND {}
    ORDER BY incarnation DESC, sequence DESC LIMIT ?"""
_PAGES: Final[dict[Filter, str]] = {
    "all": _PAGE.format("", "archived = 0"),
    # Without a word the planner takes the primary key, and reads past all that does not fit.
    "unread": _PAGE.format("INDEXED BY inbox_unread", "read = 0 AND archived = 0"),
    "archived": _PAGE.format("INDEXED BY inbox_archived", "archived = 1"),
}
_RANGE: Final = """
    FROM inbox WHERE user = ? AND (incarnation, sequence) > (?, ?) AND (incarnation, sequence) <= (?, ?)
    AND body IS NOT NULL"""
_BETWEEN: Final = (
    f"SELECT incarnation, sequence, seen, read, archived, body {_RANGE} ORDER BY incarnation, sequence LIMIT ?"
)
_MISSED: Final = f"SELECT count(*) {_RANGE}"
_UNREAD: Final = f"""
    SELECT count(*) FROM (SELECT 1 FROM inbox INDEXED BY inbox_unread
    WHERE user = ? AND read = 0 AND archived = 0 AND body IS NOT NULL LIMIT {UNREAD_CAP})"""
_SETS: Final[dict[MarkAs, str]] = {
    "seen": "seen = 1",
    "read": "seen = 1, read = 1",
    "unread": "read = 0",
    "archived": "seen = 1, archived = 1",
}
_MARKS: Final = {
    as_: f"""INSERT INTO inbox (user, incarnation, sequence, stored_ns, seen, read, archived)
    VALUES (?, ?, ?, ?, ?, ?, ?) ON CONFLICT DO UPDATE SET {changes}"""
    for as_, changes in _SETS.items()
}
_FIRST_MARK: Final[dict[MarkAs, tuple[int, int, int]]] = {
    "seen": (1, 0, 0),
    "read": (1, 1, 0),
    "unread": (0, 0, 0),
    "archived": (1, 0, 1),
}
_UNMARKED: Final[dict[MarkAs, str]] = {"seen": "seen = 0", "read": "read = 0", "unread": "read = 1", "archived": "1"}
_MARK_ALL: Final = {
    as_: f"""UPDATE inbox SET {changes} WHERE user = ? AND (incarnation, sequence) <= (?, ?)
    AND archived = 0 AND body IS NOT NULL AND {_UNMARKED[as_]}"""
    for as_, changes in _SETS.items()
}
_SAVE: Final = """
    UPDATE cursors SET incarnation = ?, sequence = ?, acked = ?, attempts = ?, gateway = ?, session = ?
    WHERE user = ? AND device = ? AND gateway = ? AND session = ? AND (incarnation, sequence) <= (?, ?)"""
_CURSOR: Final = "incarnation, sequence, acked, attempts, gateway, session"

_DAMAGED: Final = "it is damaged or no SQLite file; move it away to begin with an empty one"
_RIGHTS: Final = "the agent must be allowed to write the file and its folder"
_HINTS: Final = {
    sqlite3.SQLITE_NOTADB: _DAMAGED,
    sqlite3.SQLITE_CORRUPT: _DAMAGED,
    sqlite3.SQLITE_CANTOPEN: _RIGHTS,
    sqlite3.SQLITE_READONLY: _RIGHTS,
}


class _Waiting:
    """A write that waits for its commit."""

    __slots__ = ("committed", "error", "future", "operation", "result")

    def __init__(self, operation: Operation, future: asyncio.Future[Any]) -> None:
        self.operation = operation
        self.future = future
        self.result: Any = None
        self.error: BaseException | None = None
        self.committed = False


class SqliteStore:
    """The `Store` port on a SQLite file; the folder is made when it is missing."""

    def __init__(self, path: str | Path, *, busy_timeout_s: float = 5.0, pending_limit: int = 10_000) -> None:
        # Readers connect later, perhaps from another working directory.
        self._path = Path(path).absolute()
        self._busy_timeout_s = busy_timeout_s
        self._pending_limit = pending_limit
        self._pending: list[_Waiting] = []
        self._committing: asyncio.Future[None] | None = None
        self._writer: sqlite3.Connection | None = None
        self._write_pool = ThreadPoolExecutor(1, "sqlite-writer")
        self._read_pool = ThreadPoolExecutor(_READERS, "sqlite-reader")
        self._local = threading.local()
        self._readers: list[sqlite3.Connection] = []
        self._reading = 0
        self._open = False
        self._closed = False
        self._life = asyncio.Lock()

    # Life

    async def open(self) -> None:
        async with self._life:
            if self._closed:
                raise StoreUnavailable(f"the store {self._path} is closed")
            try:
                await asyncio.get_running_loop().run_in_executor(self._write_pool, self._prepare)
            except (sqlite3.Error, OSError) as error:
                raise self._unavailable(error) from error
            self._open = True

    async def close(self) -> None:
        async with self._life:
            self._open, self._closed = False, True
            while self._committing is not None:
                await asyncio.shield(self._committing)
            await asyncio.to_thread(self._let_go)

    def _let_go(self) -> None:
        """Not on the loop: reads may still run, and the last connection writes the log back into the file."""
        self._read_pool.shutdown()
        self._write_pool.shutdown()
        while self._readers:
            self._readers.pop().close()
        if self._writer is not None:
            self._writer.close()
            self._writer = None

    def _prepare(self) -> None:
        self._path.parent.mkdir(parents=True, exist_ok=True)
        connection = self._connect()
        try:
            self._migrate(connection)
        except BaseException:
            connection.close()
            raise
        self._writer = connection

    def _migrate(self, connection: sqlite3.Connection) -> None:
        self._change_to_wal(connection)
        connection.execute("PRAGMA synchronous = FULL")
        # Hot pages are copied into the database once in 40 MB of log instead of once in 4: a fifth of a row's cost.
        connection.execute("PRAGMA wal_autocheckpoint = 10000")
        connection.execute("PRAGMA cache_size = -65536")
        connection.execute("BEGIN IMMEDIATE")
        version = connection.execute("PRAGMA user_version").fetchone()[0]
        if version > len(MIGRATIONS):
            raise StoreUnavailable(
                f"{self._path} has schema {version} and this version of Tidings knows {len(MIGRATIONS)}: update Tidings"
            )
        for script in MIGRATIONS[version:]:
            for statement in script.split(";\n"):
                if statement.strip():
                    connection.execute(statement)
        connection.execute(f"PRAGMA user_version = {len(MIGRATIONS)}")
        connection.execute("COMMIT")

    def _change_to_wal(self, connection: sqlite3.Connection) -> None:
        """SQLite does not wait for this lock itself: agents that start together on a new file would fail."""
        deadline = time.monotonic() + self._busy_timeout_s
        while True:
            try:
                connection.execute("PRAGMA journal_mode = WAL")
                return
            except sqlite3.OperationalError as error:
                if error.sqlite_errorcode & 0xFF != sqlite3.SQLITE_BUSY or time.monotonic() >= deadline:
                    raise
            time.sleep(0.01)

    def _connect(self) -> sqlite3.Connection:
        # A connection is closed by another thread than the one that used it; never used by two at a time.
        return sqlite3.connect(
            self._path,
            timeout=self._busy_timeout_s,
            isolation_level=None,
            check_same_thread=False,
            cached_statements=64,
        )

    def _unavailable(self, error: sqlite3.Error | OSError) -> StoreUnavailable:
        # SQLite's extended codes have the primary one in their lowest byte.
        code = getattr(error, "sqlite_errorcode", 0) & 0xFF
        hint = _RIGHTS if isinstance(error, OSError) else _HINTS.get(code)
        return StoreUnavailable(f"the store {self._path} does not work: {error}{f': {hint}' if hint else ''}")

    def _admit(self, waiting: int) -> None:
        if not self._open:
            raise StoreUnavailable(f"the store {self._path} is closed")
        if waiting >= self._pending_limit:
            raise StoreUnavailable(f"{waiting} operations wait for {self._path}: it does not keep up")

    # Writing: group commit

    async def _write(self, operation: Callable[[sqlite3.Connection], Result]) -> Result:
        """Run `operation` in the next transaction; returns when it is durable."""
        self._admit(len(self._pending))
        loop = asyncio.get_running_loop()
        waiting = _Waiting(operation, loop.create_future())
        self._pending.append(waiting)
        if self._committing is None:
            self._committing = loop.create_future()
            loop.call_soon(self._begin)
        result: Result = await waiting.future
        return result

    def _begin(self) -> None:
        batch, self._pending = self._pending, []
        done = asyncio.get_running_loop().run_in_executor(self._write_pool, self._commit, batch)
        done.add_done_callback(lambda done: self._committed(batch, done))

    def _commit(self, batch: list[_Waiting]) -> None:
        """In the writer's thread: all in one transaction, or, where an operation fails, each in its own."""
        if not self._transact(batch) and len(batch) > 1:
            for waiting in batch:
                self._transact([waiting])

    def _transact(self, batch: list[_Waiting]) -> bool:
        """False when an operation failed, whose error is with it; raises when the file takes no transaction.

        A file that is locked or full is so for all who wait: they fail together, not each after its own timeout.
        """
        assert self._writer is not None
        self._writer.execute("BEGIN IMMEDIATE")
        running: _Waiting | None = None
        try:
            for running in batch:
                running.result = running.operation(self._writer)
            running = None
            self._writer.execute("COMMIT")
        except Exception as error:
            if self._writer.in_transaction:
                self._writer.execute("ROLLBACK")
            if running is None:
                raise
            running.error = error
            return False
        for waiting in batch:
            waiting.committed = True
        return True

    def _committed(self, batch: list[_Waiting], done: asyncio.Future[None]) -> None:
        broken = done.exception()
        for waiting in batch:
            if waiting.future.done():
                continue
            error = waiting.error or broken
            if waiting.committed:
                waiting.future.set_result(waiting.result)
            elif error is None:
                waiting.future.set_exception(StoreUnavailable(f"the store {self._path} did not write it"))
            elif isinstance(error, sqlite3.Error):
                unavailable = self._unavailable(error)
                unavailable.__cause__ = error
                waiting.future.set_exception(unavailable)
            else:
                waiting.future.set_exception(error)
        if self._pending:
            self._begin()
        elif self._committing is not None:
            self._committing.set_result(None)
            self._committing = None

    # Reading

    async def _read(self, query: str, *parameters: object) -> list[Any]:
        self._admit(self._reading)
        self._reading += 1
        try:
            return await asyncio.get_running_loop().run_in_executor(self._read_pool, self._fetch, query, parameters)
        except sqlite3.Error as error:
            raise self._unavailable(error) from error
        finally:
            self._reading -= 1

    def _fetch(self, query: str, parameters: tuple[object, ...]) -> list[Any]:
        connection: sqlite3.Connection | None = getattr(self._local, "connection", None)
        if connection is None:
            connection = self._local.connection = self._connect()
            self._readers.append(connection)
            connection.execute("PRAGMA query_only = 1")
        return connection.execute(query, parameters).fetchall()

    # The port

    async def check(self) -> None:
        await self._write(lambda db: db.execute("UPDATE probe SET checks = checks + 1"))
        await self._read("SELECT checks FROM probe")

    async def append(self, rows: Sequence[InboxRow]) -> None:
        values = [(row.user, *row.position, row.id, row.type, row.topic, row.stored_ns, row.body) for row in rows]
        await self._write(lambda db: db.executemany(_APPEND, values))

    async def page(self, user: str, *, before: Position | None, limit: int, filter: Filter) -> InboxPage:
        rows = await self._read(_PAGES[filter], user, *(before or _LAST), limit + 1)
        items = [_item(row) for row in rows[:limit]]
        return InboxPage(items, items[-1].position if len(rows) > limit else None)

    async def between(self, user: str, after: Position, upto: Position, limit: int) -> list[InboxItem]:
        return [_item(row) for row in await self._read(_BETWEEN, user, *after, *upto, limit)]

    async def missed(self, user: str, after: Position, upto: Position) -> int:
        count: int = (await self._read(_MISSED, user, *after, *upto))[0][0]
        return count

    async def unread(self, user: str) -> int:
        count: int = (await self._read(_UNREAD, user))[0][0]
        return count

    async def mark(self, user: str, positions: Sequence[Position], as_: MarkAs) -> None:
        now, first = time.time_ns(), _FIRST_MARK[as_]
        values = [(user, *position, now, *first) for position in positions]
        await self._write(lambda db: db.executemany(_MARKS[as_], values))

    async def mark_all(self, user: str, upto: Position, as_: MarkAs) -> None:
        await self._write(lambda db: db.execute(_MARK_ALL[as_], (user, *upto)))

    async def claim(self, user: str, device: str, holder: Holder, floor: Position) -> Claimed:
        def operation(db: sqlite3.Connection) -> Claimed:
            query = f"SELECT {_CURSOR} FROM cursors WHERE user = ? AND device = ?"
            row = db.execute(query, (user, device)).fetchone()
            if row is None:
                db.execute(
                    "INSERT INTO cursors (user, device, incarnation, sequence, gateway, session) "
                    "VALUES (?, ?, ?, ?, ?, ?)",
                    (user, device, *floor, *holder),
                )
                return Claimed(Cursor(floor), True, None)
            db.execute(
                "UPDATE cursors SET gateway = ?, session = ? WHERE user = ? AND device = ?", (*holder, user, device)
            )
            return Claimed(_cursor(row), False, Holder(row[4], row[5]) if row[4] is not None else None)

        return await self._write(operation)

    async def save(self, updates: Sequence[CursorUpdate]) -> list[Holder]:
        values = [_save_values(update) for update in updates]

        def operation(db: sqlite3.Connection) -> list[Holder]:
            db.execute("SAVEPOINT all_at_once")
            if db.executemany(_SAVE, values).rowcount == len(updates):
                db.execute("RELEASE all_at_once")
                return []
            # Rare: some lost their device, or a floor would have moved back. One by one.
            db.execute("ROLLBACK TO all_at_once")
            db.execute("RELEASE all_at_once")
            return [update.holder for update in updates if not _save_one(db, update)]

        return await self._write(operation)

    async def holders(self, user: str) -> list[Holder]:
        query = "SELECT gateway, session FROM cursors WHERE user = ? AND gateway IS NOT NULL"
        return [Holder(*row) for row in await self._read(query, user)]

    async def expire(self, before_ns: int) -> int:
        def operation(db: sqlite3.Connection) -> int:
            keys = db.execute(
                "SELECT user, incarnation, sequence FROM inbox WHERE stored_ns < ? LIMIT ?", (before_ns, _EXPIRE_SLICE)
            ).fetchall()
            db.executemany("DELETE FROM inbox WHERE user = ? AND incarnation = ? AND sequence = ?", keys)
            return len(keys)

        gone = 0
        while slice_ := await self._write(operation):
            gone += slice_
        return gone


def _item(row: tuple[Any, ...]) -> InboxItem:
    return InboxItem(Position(row[0], row[1]), bool(row[2]), bool(row[3]), bool(row[4]), row[5])


def _cursor(row: tuple[Any, ...]) -> Cursor:
    return Cursor(
        Position(row[0], row[1]),
        frozenset(Position(*pair) for pair in orjson.loads(row[2])),
        {Position(incarnation, sequence): count for incarnation, sequence, count in orjson.loads(row[3])},
    )


def _save_values(update: CursorUpdate) -> tuple[object, ...]:
    floor, cursor = update.cursor.floor, update.cursor
    # tuple(): a named tuple is no JSON for orjson.
    acked = orjson.dumps([tuple(position) for position in sorted(cursor.acked)]) if cursor.acked else b"[]"
    attempts = orjson.dumps([(*at, count) for at, count in cursor.attempts.items()]) if cursor.attempts else b"[]"
    holder = (None, None) if update.release else update.holder
    return (
        *floor, acked.decode(), attempts.decode(), *holder, update.user, update.device, *update.holder, *floor
    )  # fmt: skip


def _save_one(db: sqlite3.Connection, update: CursorUpdate) -> bool:
    """Write one cursor where its holder still has the device; a floor never moves back."""
    who = (update.user, update.device, *update.holder)
    row = db.execute(
        "SELECT incarnation, sequence FROM cursors WHERE user = ? AND device = ? AND gateway = ? AND session = ?", who
    ).fetchone()
    if row is None:
        return False
    floor = max(Position(*row), update.cursor.floor)
    acked = frozenset(position for position in update.cursor.acked if position > floor)
    attempts = {position: count for position, count in update.cursor.attempts.items() if position > floor}
    db.execute(_SAVE, _save_values(update._replace(cursor=Cursor(floor, acked, attempts))))
    return True
