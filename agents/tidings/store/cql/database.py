"""The driver's session as coroutines: prepared statements, bounded requests, one kind of error.

Every statement that goes through here carries its own write timestamp or only reads: repeating it changes nothing, so
the driver may retry it on another node, and ask a second node where the first is slow to read.
"""

from __future__ import annotations

import asyncio
import logging
import re
import threading
from collections.abc import Collection, Iterable, Mapping, Sequence
from typing import Any, Final, NamedTuple

from cassandra import ConsistencyLevel, DriverException, RequestValidationException
from cassandra.auth import PlainTextAuthProvider
from cassandra.cluster import EXEC_PROFILE_DEFAULT, Cluster, ExecutionProfile, NoHostAvailable, ResponseFuture, Session
from cassandra.connection import ConnectionException
from cassandra.policies import (
    ConstantSpeculativeExecutionPolicy,
    DCAwareRoundRobinPolicy,
    ExponentialReconnectionPolicy,
    RoundRobinPolicy,
    TokenAwarePolicy,
)
from cassandra.protocol import ErrorMessage
from cassandra.protocol import RequestValidationException as ValidationMessage
from cassandra.query import BatchStatement, BatchType, BoundStatement, PreparedStatement, tuple_factory

from tidings.runtime.tls import ClientTls
from tidings.wire.errors import StoreUnavailable

from .express import Express, Group, Write
from .reactor import LoopConnection, connection_class

__all__ = ["Database", "StatementRefused", "Tls", "Where", "check_datacenter"]

_PATIENT: Final = "patient"
"""An execution profile: further nodes are asked when one takes long."""

_SPECULATE_AFTER_S: Final = 0.2
_PROTOCOL: Final = 4
"""The newest that ScyllaDB and Cassandra share."""

_TLS_NAMES: Final = (
    "the option ca of store_url",
    "the option certificate of store_url",
    "the option key of store_url",
)
_TOO_LARGE: Final = re.compile(r"too large|longer than maximum|larger than the maximum", re.IGNORECASE)
_ERRORS: Final = (DriverException, NoHostAvailable, ErrorMessage, ConnectionException, OSError)
"""All that the driver raises of a request; it has no common base for them."""

log = logging.getLogger("tidings.store")


class StatementRefused(StoreUnavailable):
    """The server says no: its schema, its grants or its limits. For whoever asked that is a store that does not work.

    `too_large` says that it is the statement's own values: they will never be taken.
    """

    def __init__(self, message: str) -> None:
        super().__init__(message)
        self.too_large = _TOO_LARGE.search(message) is not None


class Tls(NamedTuple):
    """What the nodes are checked against, as paths of PEM files; see `url`."""

    ca: str = ""
    certificate: str = ""
    key: str = ""
    name: str | None = None


class Where(NamedTuple):
    """Where a CQL store is, and how it is asked."""

    hosts: Sequence[str]
    port: int
    keyspace: str
    username: str | None = None
    password: str | None = None
    datacenter: str | None = None
    """The datacenter of these agents; None for the only one."""
    timeout_s: float = 2.0
    in_flight: int = 1024
    """Most requests under way; further ones wait."""
    tls: Tls | None = None
    """None for connections in the clear."""

    def __str__(self) -> str:
        return f"cql://{','.join(self.hosts)}:{self.port}/{self.keyspace}"


def check_datacenter(where: Where, known: Collection[str]) -> None:
    """Raise `StoreUnavailable` unless the agents know which of the cluster's datacenters is theirs.

    A device that moved between agents in two datacenters would be read, at LOCAL_QUORUM, before it was written there.
    """
    names = ", ".join(sorted(known))
    if where.datacenter is None and len(known) > 1:
        raise StoreUnavailable(f"the store {where} is in the datacenters {names}: add ?datacenter= to its URL")
    if where.datacenter is not None and where.datacenter not in known:
        raise StoreUnavailable(f"the store {where} has no datacenter {where.datacenter}: it is in {names}")


class _One:
    """One request, its rows and its future."""

    __slots__ = ("_database", "future")

    def __init__(self, database: Database, future: asyncio.Future[list[Any]]) -> None:
        self._database = database
        self.future = future

    def done(self, rows: list[Any] | None) -> None:
        self._end(rows, None)

    def failed(self, error: Exception) -> None:
        self._end(None, error)

    def _end(self, rows: list[Any] | None, error: Exception | None) -> None:
        database = self._database
        if threading.get_ident() != database.thread:
            database.loop.call_soon_threadsafe(self._end, rows, error)
            return
        database.under_way.release()
        if self.future.done():
            return
        if error is None:
            self.future.set_result(rows or [])
        else:
            self.future.set_exception(error)


class Database:
    """A connected session. Not to be used before `connect` and after `close`."""

    def __init__(self, where: Where) -> None:
        self.where = where
        self.loop: asyncio.AbstractEventLoop
        self.thread = 0
        self.under_way: asyncio.Semaphore
        self._cluster: Any = None
        self._session: Any = None
        self._express: Express
        self._tls: ClientTls | None = None

    # Life

    async def connect(self) -> None:
        """Connect to the nodes that answer; raises `StoreUnavailable` when none does."""
        self.loop = asyncio.get_running_loop()
        self.thread = threading.get_ident()
        self.under_way = asyncio.Semaphore(self.where.in_flight)
        self._tls = None if self.where.tls is None else ClientTls(*self.where.tls[:3], names=_TLS_NAMES)
        reactor = connection_class(self.loop, self._lost, self._tls, self.where.tls and self.where.tls.name)
        try:
            await asyncio.to_thread(self._connect, reactor)
            check_datacenter(self.where, {host.datacenter for host in self._cluster.metadata.all_hosts()})
            self._express = Express(self._session, self.where.keyspace)
        except BaseException as error:
            await self.close()
            if isinstance(error, _ERRORS):
                raise self.failure(error) from error
            raise

    def _connect(self, reactor: type) -> None:
        where = self.where
        near = DCAwareRoundRobinPolicy(where.datacenter) if where.datacenter else RoundRobinPolicy()
        common: dict[str, Any] = {
            "load_balancing_policy": TokenAwarePolicy(near),
            "consistency_level": ConsistencyLevel.LOCAL_QUORUM,
            "serial_consistency_level": ConsistencyLevel.LOCAL_SERIAL,
            "request_timeout": where.timeout_s,
            "row_factory": tuple_factory,
        }
        speculation = ConstantSpeculativeExecutionPolicy(_SPECULATE_AFTER_S, 2)
        self._cluster = Cluster(
            list(where.hosts),
            port=where.port,
            auth_provider=PlainTextAuthProvider(where.username, where.password or "") if where.username else None,
            connection_class=reactor,
            # The driver's choice of port depends on whether there is one (ScyllaDB has another for TLS).
            ssl_context=None if self._tls is None else self._tls.context(),
            protocol_version=_PROTOCOL,
            execution_profiles={
                EXEC_PROFILE_DEFAULT: ExecutionProfile(**common),
                _PATIENT: ExecutionProfile(**common, speculative_execution_policy=speculation),
            },
            reconnection_policy=ExponentialReconnectionPolicy(0.2, 5.0),
            connect_timeout=max(2.0, where.timeout_s),
            control_connection_timeout=max(2.0, where.timeout_s),
            idle_heartbeat_interval=10,
            compression=False,
        )
        self._session = self._cluster.connect()
        self._session.default_fetch_size = None

    def _lost(self, connection: LoopConnection) -> None:
        """Tell the driver at once: its next request on a lost connection would wait for another, and stop the loop."""
        for pool in () if self._session is None else tuple(self._session._pools.values()):
            if connection in pool._connections.values() and not pool.is_shutdown:
                pool.return_connection(connection, stream_was_orphaned=True)

    async def close(self) -> None:
        cluster, self._cluster, self._session = self._cluster, None, None
        if cluster is not None:
            await asyncio.to_thread(cluster.shutdown)

    def failure(self, error: BaseException) -> StoreUnavailable:
        """What one of the driver's errors means."""
        if isinstance(error, RequestValidationException | ValidationMessage):
            return StatementRefused(str(error))
        if isinstance(error, NoHostAvailable):
            # The driver puts a mapping there, or a list of addresses.
            by_host = error.errors if isinstance(error.errors, Mapping) else {}
            causes = "; ".join(f"{host}: {cause}" for host, cause in by_host.items()) or str(error)
            return StoreUnavailable(f"the store {self.where} does not answer: {causes}")
        return StoreUnavailable(f"the store {self.where} does not work: {error}")

    @property
    def session(self) -> Session:
        if self._session is None:
            raise StoreUnavailable(f"the store {self.where} is closed")
        return self._session

    # Statements

    async def prepare(self, statements: Mapping[str, str]) -> dict[str, PreparedStatement]:
        """Prepare by name; all of them may be repeated."""

        def prepare() -> dict[str, PreparedStatement]:
            session = self.session
            return {name: session.prepare(text) for name, text in statements.items()}

        try:
            prepared = await asyncio.to_thread(prepare)
        except _ERRORS as error:
            raise self.failure(error) from error
        for statement in prepared.values():
            statement.is_idempotent = True
        return prepared

    async def read(self, statement: PreparedStatement, *values: object) -> list[Any]:
        """The rows as tuples."""
        return await self._run(statement.bind(values), _PATIENT)

    async def write(self, statement: BoundStatement | BatchStatement) -> None:
        """One statement, or one batch of one partition."""
        await self._run(statement, EXEC_PROFILE_DEFAULT)

    async def query(self, text: str, *values: object, timeout_s: float | None = None) -> list[Any]:
        """A statement that is not prepared: the schema's."""
        await self.under_way.acquire()
        answer = _One(self, self.loop.create_future())
        options = {} if timeout_s is None else {"timeout": timeout_s}
        return await self._sent(answer, lambda: self.session.execute_async(text, values or None, **options))

    async def _run(self, statement: BoundStatement | BatchStatement, profile: object) -> list[Any]:
        await self.under_way.acquire()
        answer = _One(self, self.loop.create_future())
        return await self._sent(answer, lambda: self.session.execute_async(statement, execution_profile=profile))

    def _check_room(self) -> None:
        """Raise where the driver would wait for a free stream id, in the event loop's thread."""
        for pool in tuple(self.session._pools.values()):
            connections = tuple(pool._connections.values())
            if (
                connections
                and not pool.is_shutdown
                and all(one.is_closed or one.in_flight >= one.max_request_id for one in connections)
            ):
                raise StoreUnavailable(f"the store {self.where} does not answer: {pool.host} has all its places taken")

    async def _sent(self, answer: _One, send: Any) -> list[Any]:
        try:
            self._check_room()
            request: ResponseFuture = send()
        except BaseException:
            self.under_way.release()
            raise
        request.add_callbacks(answer.done, answer.failed)
        try:
            return await answer.future
        except _ERRORS as error:
            raise self.failure(error) from error

    async def write_all(self, writes: Sequence[Write]) -> None:
        """Send all, `Where.in_flight` at a time; returns when all are durable, raises when one is not."""
        size = self.where.in_flight
        for at in range(0, len(writes), size):
            await self._write_some(writes[at : at + size])

    async def _write_some(self, writes: Sequence[Write]) -> None:
        pools = tuple(pool for pool in self.session._pools.values() if not pool.is_shutdown)
        group = Group(len(writes), self.loop.create_future())
        for write in writes:
            self._express.send(write, group)
        try:
            async with asyncio.timeout(self.where.timeout_s / (2 if len(pools) > 1 else 1)):
                await group.future
        except TimeoutError:
            left = [
                write
                for pool in pools
                for connection in tuple(pool._connections.values())
                for write in connection.give_up(group)
            ]
            if len(pools) < 2:
                missing = f"{len(left)} of {len(writes)} writes"
                raise StoreUnavailable(f"the store {self.where} did not confirm {missing} in time") from None
            group.failed += left
        await asyncio.gather(*(self._insist(write) for write in group.failed))

    async def _insist(self, write: Write) -> None:
        """By the driver, which asks further nodes where the first hangs: one more than a quorum may."""
        await self._run(self._express.bound(write), _PATIENT)

    @staticmethod
    def batch(statements: Iterable[BoundStatement]) -> BatchStatement:
        """Statements of one partition, which the server applies as one."""
        made = BatchStatement(BatchType.UNLOGGED)
        made.is_idempotent = True
        for statement in statements:
            made.add(statement)
        return made
