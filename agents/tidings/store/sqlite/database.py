"""A SQLite file without blocking the loop: one writer with group commit, and readers of their own.

Everything that waits when the writer is idle is written in one transaction, so that a commit, which waits for the disk
(``synchronous=FULL``: what was acknowledged survives a power cut), is shared by all who came meanwhile. Reads
have connections of their own and see the last commit. Several processes may share the file.
"""

from __future__ import annotations

import asyncio
import sqlite3
import threading
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, Final, TypeVar

from tidings.wire.errors import StoreUnavailable

from .schema import MIGRATIONS

__all__ = ["Database"]

Result = TypeVar("Result")
Operation = Callable[[sqlite3.Connection], Any]

_READERS: Final = 2

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


class Database:
    """Operations are functions of a connection; they run on other threads, each in a transaction."""

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

    async def write(self, operation: Callable[[sqlite3.Connection], Result]) -> Result:
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

    async def read(self, operation: Callable[[sqlite3.Connection], Result]) -> Result:
        """Run `operation` on one state of the database, however many statements it has."""
        self._admit(self._reading)
        self._reading += 1
        try:
            return await asyncio.get_running_loop().run_in_executor(self._read_pool, self._look, operation)
        except sqlite3.Error as error:
            raise self._unavailable(error) from error
        finally:
            self._reading -= 1

    def _look(self, operation: Callable[[sqlite3.Connection], Result]) -> Result:
        connection: sqlite3.Connection | None = getattr(self._local, "connection", None)
        if connection is None:
            connection = self._local.connection = self._connect()
            self._readers.append(connection)
            connection.execute("PRAGMA query_only = 1")
        connection.execute("BEGIN")
        try:
            return operation(connection)
        finally:
            # An error may have ended it already.
            if connection.in_transaction:
                connection.execute("ROLLBACK")
