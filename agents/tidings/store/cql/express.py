"""Prepared writes by the thousand, without the driver's bookkeeping for each.

The driver makes a future, an event, a timer, a query plan and two decoded messages of a request: about 180 µs of CPU,
which for two writes a notification is more than everything else of the inbox agent. Here a write is the bytes of one
EXECUTE frame (native protocol version 4, section 4.1.6) on one of the driver's own connections: to a replica of its
partition, on ScyllaDB to the shard of it, under a stream id of the driver's. What is answered by plain success is done.
Whatever else is answered, the driver gets the statement and does what it does: prepares it anew, retries it on
another node, or fails. All writes here may be repeated.

Of the driver it reads what is not public, `Session._pools` and `HostConnection._connections`: held by
`tests/integration/test_cql_driver.py`.
"""

from __future__ import annotations

import asyncio
from bisect import bisect_left
from collections.abc import Sequence
from itertools import count
from struct import Struct
from typing import Any, Final, NamedTuple, Protocol

from cassandra import ConsistencyLevel
from cassandra.murmur3 import murmur3
from cassandra.query import BoundStatement, PreparedStatement

__all__ = ["Carrier", "Express", "Group", "Write", "int4", "int8"]

_EXECUTE: Final = 0x0A
_VALUES_SKIP_METADATA: Final = 0x03
_HEADER: Final = Struct(">BBhBi")
_INT4: Final = Struct(">i")
_INT8: Final = Struct(">q")
_SHORT: Final = Struct(">H")
_NULL: Final = b"\xff\xff\xff\xff"
_LENGTHS: Final = tuple(map(_INT4.pack, range(1024)))

int4 = _INT4.pack
int8 = _INT8.pack


class Write(NamedTuple):
    """One prepared write: its values as the protocol has them, and its partition key as the partitioner hashes it."""

    statement: PreparedStatement
    values: Sequence[bytes | None]
    key: bytes


class Group:
    """Writes that are waited for together."""

    __slots__ = ("failed", "future", "left")

    def __init__(self, size: int, future: asyncio.Future[None]) -> None:
        self.left = size
        self.future = future
        self.failed: list[Write] = []
        """Not done, or not known to be: for the driver."""

    def settle(self, write: Write | None) -> None:
        """One of them is over; it failed where it is given."""
        if write is not None:
            self.failed.append(write)
        self.left -= 1
        if not self.left and not self.future.done():
            self.future.set_result(None)


class Carrier(Protocol):
    """A connection of the driver that takes such writes: `reactor.LoopConnection`."""

    is_closed: bool

    def reserve(self, group: Group, write: Write) -> int | None:
        """A stream id for a write that is about to be pushed; None when there is none."""

    def push(self, data: bytes) -> None:
        """Send a frame."""


class Express:
    """The sending half; a `Carrier` settles what it reserved."""

    def __init__(self, session: Any, keyspace: str) -> None:
        self._session = session
        self._metadata = session.cluster.metadata
        self._keyspace = keyspace
        self._prefixes: dict[bytes, bytes] = {}
        self._turn = count()
        self._replicas_of: Any = None
        self._ring: list[int] = []
        self._replicas: list[list[Any]] = []

    def send(self, write: Write, group: Group) -> None:
        """Send a write; it is settled at once where no connection takes it."""
        connection = self._route(write.key)
        stream = None if connection is None else connection.reserve(group, write)
        if connection is None or stream is None:
            group.settle(write)
            return
        connection.push(self._frame(stream, write))

    def _frame(self, stream: int, write: Write) -> bytes:
        statement = write.statement
        prefix = self._prefixes.get(statement.query_id)
        if prefix is None:
            prefix = self._prefixes[statement.query_id] = b"".join(
                (
                    _SHORT.pack(len(statement.query_id)),
                    statement.query_id,
                    _SHORT.pack(ConsistencyLevel.LOCAL_QUORUM),
                    bytes((_VALUES_SKIP_METADATA,)),
                    _SHORT.pack(len(write.values)),
                )
            )
        parts = [b"", prefix]
        for value in write.values:
            if value is None:
                parts.append(_NULL)
            else:
                size = len(value)
                parts.append(_LENGTHS[size] if size < 1024 else _INT4.pack(size))
                parts.append(value)
        parts[0] = _HEADER.pack(4, 0, stream, _EXECUTE, sum(map(len, parts)))
        return b"".join(parts)

    # Where to

    def _route(self, key: bytes) -> Carrier | None:
        """A connection to a replica, round and round among them; any open one where none has it."""
        token = murmur3(key)
        for host in self._replicas_for(token):
            pool = self._session._pools.get(host)
            if pool is not None and not pool.is_shutdown:
                connection = self._of_shard(pool, token)
                if connection is not None:
                    return connection
        for pool in tuple(self._session._pools.values()):
            for connection in tuple(pool._connections.values()):
                if not connection.is_closed:
                    return connection  # type: ignore[no-any-return]
        return None

    def _of_shard(self, pool: Any, token: int) -> Carrier | None:
        sharding = pool.host.sharding_info
        connections = pool._connections
        connection = connections.get(None if sharding is None else sharding.shard_id_from_token(token))
        if connection is None or connection.is_closed:
            connection = next((other for other in tuple(connections.values()) if not other.is_closed), None)
        return connection  # type: ignore[no-any-return]

    def _replicas_for(self, token: int) -> Sequence[Any]:
        ring = self._metadata.token_map
        replicas_of = None if ring is None else ring.tokens_to_hosts_by_ks.get(self._keyspace)
        if not replicas_of:
            return ()
        if replicas_of is not self._replicas_of:
            # The cluster has changed: the driver makes a new map.
            self._replicas_of = replicas_of
            self._ring = [one.value for one in ring.ring]
            self._replicas = [list(replicas_of[one]) for one in ring.ring]
        hosts = self._replicas[bisect_left(self._ring, token) % len(self._ring)]
        if len(hosts) > 1:
            first = next(self._turn) % len(hosts)
            return hosts[first:] + hosts[:first]
        return hosts

    # What it does not do

    @staticmethod
    def bound(write: Write) -> BoundStatement:
        """The same for the driver."""
        bound = BoundStatement(write.statement)
        bound.values = list(write.values)
        bound.is_idempotent = True
        return bound
