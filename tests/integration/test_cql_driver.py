"""The CQL driver on our event loop: answers in pieces, in heaps and late, and a server that goes and comes back."""

from __future__ import annotations

import asyncio
import random
import secrets
import socket
import time
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager, suppress
from itertools import count
from types import SimpleNamespace, TracebackType
from typing import Any, Final, Self

import pytest
from cassandra.cluster import Session
from cassandra.connection import DefaultEndPoint
from cassandra.metadata import Murmur3Token, TokenMap
from cassandra.protocol import QueryMessage, ResultMessage
from hypothesis import given
from hypothesis import strategies as st

from support.clock import PATIENCE_S, SCALE, until
from support.command import taken_port
from support.proxy import Proxy
from tidings.store.cql import CqlStore, Where, parse_url
from tidings.store.cql.database import Database, StatementRefused
from tidings.store.cql.express import Express, Group, Write, int4, int8
from tidings.store.cql.reactor import LoopConnection, connection_class
from tidings.store.cql.statements import statements
from tidings.store.port import InboxRow
from tidings.wire.errors import StoreUnavailable
from tidings.wire.position import Position

STALL_S: Final = 1.0 * SCALE
"""Far above what a busy machine costs, and below the two seconds that the driver may wait for a connection."""
QUICK_S: Final = 0.3 * SCALE
"""A deadline of requests that are to miss it."""


class Line:
    """A TCP proxy to the server whose answers can be withheld, and which can be cut, with or without a way back."""

    def __init__(self, target: int) -> None:
        self.answers = asyncio.Event()
        """While it is not set what the server says is kept here, in order."""
        self.answers.set()
        self.asked = 0
        """Bytes that came from the client."""
        self._target = target
        self._server: asyncio.Server | None = None
        self._tasks: set[asyncio.Task[None]] = set()
        self._writers: list[asyncio.StreamWriter] = []
        self._socket = self._bound(0)
        self.port: int = self._socket.getsockname()[1]

    @staticmethod
    def _bound(port: int) -> socket.socket:
        """Whoever connects is refused, and nobody else gets the port."""
        made = socket.socket()
        made.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        made.bind(("127.0.0.1", port))
        made.setblocking(False)
        return made

    async def accept(self) -> None:
        self._server = await asyncio.start_server(self._accept, sock=self._socket)

    def refuse(self) -> None:
        """Take no more connections until `accept`."""
        assert self._server is not None
        self._server.close()
        self._socket = self._bound(self.port)

    def cut(self) -> None:
        """Reset all connections; what was kept here is lost."""
        for writer in self._writers:
            writer.transport.abort()
        self._writers.clear()
        for task in tuple(self._tasks):
            task.cancel()

    async def _accept(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        up_reader, up_writer = await asyncio.open_connection("127.0.0.1", self._target)
        self._writers += [writer, up_writer]
        for work in (self._ask(reader, up_writer), self._answer(up_reader, writer)):
            task = asyncio.create_task(work)
            self._tasks.add(task)
            task.add_done_callback(self._tasks.discard)

    async def _ask(self, source: asyncio.StreamReader, sink: asyncio.StreamWriter) -> None:
        with suppress(ConnectionError):
            while data := await source.read(65_536):
                self.asked += len(data)
                sink.write(data)
        sink.close()

    async def _answer(self, source: asyncio.StreamReader, sink: asyncio.StreamWriter) -> None:
        with suppress(ConnectionError):
            while data := await source.read(65_536):
                await self.answers.wait()
                sink.write(data)
        sink.close()

    async def __aenter__(self) -> Self:
        await self.accept()
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._server is not None:
            self._server.close()
        self._socket.close()
        tasks = tuple(self._tasks)
        self.cut()
        await asyncio.gather(*tasks, return_exceptions=True)


class Ticker:
    """Measures how long the event loop stood still at most."""

    def __init__(self) -> None:
        self.worst_s = 0.0
        self._last = 0.0

    async def _tick(self) -> None:
        while True:
            await asyncio.sleep(0.005)
            self._note()

    def _note(self) -> None:
        now = asyncio.get_running_loop().time()
        self.worst_s, self._last = max(self.worst_s, now - self._last), now

    async def __aenter__(self) -> Self:
        self._last = asyncio.get_running_loop().time()
        self._task = asyncio.create_task(self._tick())
        return self

    async def __aexit__(self, *_: object) -> None:
        self._note()
        self._task.cancel()


class Client:
    """A connected database with its statements, and the devices of a user of its own."""

    def __init__(self, where: Where) -> None:
        self.database = Database(where)
        self.sql: dict[str, Any] = {}
        self.user = f"user-{secrets.token_hex(8)}"
        self._written = 1_700_000_000_000_000

    @property
    def connections(self) -> list[LoopConnection]:
        pools = tuple(self.database.session._pools.values())
        return [connection for pool in pools for connection in tuple(pool._connections.values())]

    @property
    def in_flight(self) -> int:
        return sum(connection.in_flight for connection in self.connections)

    def write(self, device: str, state: bytes, user: str | None = None) -> Write:
        self._written += 1
        key = (self.user if user is None else user).encode()
        return Write(self.sql["save"], (int4(3600), int8(self._written), state, key, device.encode()), key)

    def some(self, count: int, name: str = "") -> list[Write]:
        return [self.write(f"{name}{number}", f"{name}{number}".encode()) for number in range(count)]

    async def state(self, device: str) -> bytes | None:
        found = await self.database.read(self.sql["cursor"], self.user, device)
        return found[0][0] if found else None

    async def has(self, count: int, name: str = "") -> None:
        """What `some` writes is there."""
        devices = [f"{name}{number}" for number in range(count)]
        assert await asyncio.gather(*map(self.state, devices)) == [device.encode() for device in devices]

    async def works(self) -> None:
        """Wait until the server has been found again."""
        async with asyncio.timeout(PATIENCE_S):
            while True:
                try:
                    await self.state("any")
                    return
                except StoreUnavailable:
                    await asyncio.sleep(0.02)

    async def is_at_rest(self) -> None:
        """Every stream id is free, and free once."""
        # The driver's own heartbeat may be under way.
        await until(lambda: self.in_flight == 0, "no request is under way")
        for connection in self.connections:
            assert not connection._express
            ids = list(connection.request_ids)
            assert len(ids) == len(set(ids)) == connection.highest_request_id + 1
        assert self.database.under_way._value == self.database.where.in_flight


@asynccontextmanager
async def connected(where: Where) -> AsyncIterator[Client]:
    client = Client(where)
    await client.database.connect()
    await client.database.query(f"USE {where.keyspace}")
    try:
        client.sql = await client.database.prepare(statements(where.keyspace))
        yield client
    finally:
        await client.database.close()


@pytest.fixture
def where(cql_url: str) -> Where:
    return parse_url(cql_url)


@pytest.fixture
async def line(where: Where) -> AsyncIterator[Line]:
    async with Line(where.port) as line:
        yield line


@pytest.fixture
async def client(where: Where) -> AsyncIterator[Client]:
    async with connected(where) as client:
        yield client


@pytest.fixture
async def far(where: Where, line: Line) -> AsyncIterator[Client]:
    """A patient client behind the line."""
    async with connected(where._replace(port=line.port)) as client:
        yield client


@pytest.fixture
async def hasty(where: Where, line: Line) -> AsyncIterator[Client]:
    """A client behind the line that soon gives up."""
    async with connected(where._replace(port=line.port, timeout_s=QUICK_S, in_flight=64)) as client:
        yield client


# What we know of the driver


async def test_what_is_not_public(client: Client) -> None:
    """The attributes of the driver that are not public, and that `express`, `reactor` and `database` rely on."""
    session = client.database.session
    assert isinstance(session, Session)
    assert isinstance(session._pools, dict)
    ((host, pool),) = session._pools.items()
    assert host is pool.host
    assert pool.is_shutdown is False
    assert callable(pool.return_connection)
    assert isinstance(pool._connections, dict)
    ((shard, connection),) = pool._connections.items()
    # Cassandra has no shards: with ScyllaDB this is a number, and `sharding_info` says which.
    sharding = host.sharding_info
    assert (shard in (None, 0)) if sharding is None else callable(sharding.shard_id_from_token)
    assert isinstance(connection, LoopConnection)
    assert not connection.is_closed
    assert not connection.is_defunct
    assert connection.max_request_id == 2**15 - 1
    with connection.lock:
        free = len(connection.request_ids)
        stream = connection.get_request_id()
        assert isinstance(stream, int)
        assert len(connection.request_ids) == free - 1
        connection.request_ids.append(stream)
    assert isinstance(connection.in_flight, int)
    assert connection.orphaned_request_ids == set()
    assert isinstance(connection.msg_received, bool)
    ring = session.cluster.metadata.token_map
    assert ring.ring
    assert isinstance(ring.tokens_to_hosts_by_ks, dict)


async def test_writes_go_where_their_replicas_are(client: Client) -> None:
    """On a real server the connection of a key is one of its pool's, and the map of replicas is the driver's."""
    express = client.database._express
    assert express._route(b"key") in client.connections
    metadata = client.database.session.cluster.metadata
    for number in range(20):
        key = f"key{number}".encode()
        token = Murmur3Token.from_key(key)
        expected = metadata.token_map.get_replicas(client.database.where.keyspace, token)
        assert set(express._replicas_for(token.value)) == set(expected)


@given(
    st.lists(st.integers(-(2**63), 2**63 - 1), min_size=1, max_size=12, unique=True),
    st.lists(st.integers(-(2**63), 2**63 - 1), max_size=12),
    st.integers(1, 3),
)
def test_replicas_are_the_driver_s(ring: list[int], tokens: list[int], copies: int) -> None:
    """On a ring of many tokens each key goes to the replicas that the driver would choose, the edges included."""
    points = [Murmur3Token(token) for token in sorted(ring)]
    map_ = TokenMap(Murmur3Token, {}, points, None)
    owners = [f"host{number}" for number in range(len(points))]
    map_.tokens_to_hosts_by_ks["k"] = {
        point: [*dict.fromkeys((owners * 2)[at : at + copies])] for at, point in enumerate(points)
    }
    metadata = SimpleNamespace(token_map=map_)
    express = Express(SimpleNamespace(cluster=SimpleNamespace(metadata=metadata)), "k")
    for token in (*tokens, *ring):
        expected = map_.get_replicas("k", Murmur3Token(token))
        turns = [tuple(express._replicas_for(token)) for _ in range(len(expected))]
        assert all(set(turn) == set(expected) and len(turn) == len(expected) for turn in turns)
        assert len({turn[0] for turn in turns}) == len(expected), "each replica has its turn"


# Many at once


async def test_right_answers_to_many_at_once(client: Client) -> None:
    """Express groups, the driver's writes and reads on one connection: each gets its own answer."""
    chance = random.Random(3)
    sizes = [chance.choice((0, 1, 900, 1023, 1024, 1025, 70_000)) for _ in range(150)]

    async def one(number: int, size: int) -> None:
        states = {f"{number}-{part}": f"{number}-{part}:".encode() + b"x" * size for part in range(4)}
        writes = [client.write(device, state) for device, state in states.items()]
        if number % 3:
            await client.database.write_all(writes)
        else:
            await asyncio.gather(*(client.database.write(Express.bound(write)) for write in writes))
        for device, state in states.items():
            assert await client.state(device) == state
        assert await client.state(f"{number}-none") is None
        text = "SELECT state FROM cursors WHERE user = %s AND device = %s"
        assert (await client.database.query(text, client.user, f"{number}-2"))[0][0] == states[f"{number}-2"]

    async with asyncio.timeout(2 * PATIENCE_S):
        await asyncio.gather(*(one(number, size) for number, size in enumerate(sizes)))
    await client.is_at_rest()


async def test_more_writes_than_may_be_under_way(where: Where) -> None:
    """A long list of writes is sent in groups, and nothing of it is forgotten."""
    async with connected(where._replace(in_flight=16)) as client:
        await client.database.write_all(client.some(16 * 5 + 3))
        await client.has(16 * 5 + 3)
        await client.database.write_all([])
        await client.is_at_rest()


# Frames in pieces


def frame(stream: int, opcode: int, body: bytes) -> bytes:
    return b"\x84\0" + stream.to_bytes(2, "big", signed=True) + bytes((opcode,)) + len(body).to_bytes(4, "big") + body


def void(stream: int) -> bytes:
    return frame(stream, 0x08, int4(1))


def error(stream: int, code: int, text: bytes = b"no") -> bytes:
    return frame(stream, 0x00, int4(code) + len(text).to_bytes(2, "big") + text)


class Loose:
    """A connection whose other end is the test."""

    def __init__(self, connection: Any, peer: socket.socket, lost: list[LoopConnection]) -> None:
        self.connection = connection
        self.peer = peer
        self.lost = lost
        self.answered: list[Any] = []

    def driver_asks(self) -> int:
        """The stream of a request of the driver's."""
        connection = self.connection
        with connection.lock:
            connection.in_flight += 1
            stream: int = connection.get_request_id()
        connection.send_msg(QueryMessage("SELECT", 1), stream, self._note)
        return stream

    def _note(self, response: Any) -> None:
        # As a pool does when it is given its connection back.
        self.connection.in_flight -= 1
        self.answered.append(response)

    def group(self, count: int, more: int = 0) -> tuple[Group, list[Write], list[int]]:
        """A group with so many writes under way here, and more elsewhere."""
        group = Group(count + more, asyncio.get_running_loop().create_future())
        writes: list[Write] = [Write(None, (), bytes((number,))) for number in range(count)]  # type: ignore[arg-type]
        streams = [self.connection.reserve(group, write) for write in writes]
        return group, writes, streams


@pytest.fixture
async def loose() -> AsyncIterator[Loose]:
    ours, peer = socket.socketpair()
    lost: list[LoopConnection] = []
    base = connection_class(asyncio.get_running_loop(), lost.append)

    def connect(self: Any) -> None:
        self._socket = SocketPair(ours)

    made = type("Connection", (base,), {"_connect_socket": connect})
    connection = made(DefaultEndPoint("127.0.0.1", 1), protocol_version=4, compression=False)
    await until(lambda: connection._transport is not None, "the connection is attached")
    yield Loose(connection, peer, lost)
    connection.close()
    await until(lambda: connection._transport.is_closing(), "the connection is closed")
    # The transport lets its socket go one turn later.
    await asyncio.sleep(0)
    peer.close()


class SocketPair(socket.socket):
    """A local socket that may be told what a TCP socket is told."""

    def __init__(self, given: socket.socket) -> None:
        super().__init__(given.family, given.type, given.proto, given.detach())

    def setsockopt(self, *_: Any) -> None:
        pass


def conversation(loose: Loose) -> tuple[list[bytes], Callable[[], None]]:
    """Answers of all kinds that a connection waits for, and what is to be true when they have come."""
    before = loose.connection.in_flight
    loose.answered.clear()
    asks = [loose.driver_asks() for _ in range(2)]
    group, writes, streams = loose.group(4)
    given_up, _, (late,) = loose.group(1)
    loose.connection.give_up(given_up)
    event = frame(-1, 0x0C, b"\0\x0dSTATUS_CHANGE\0\2UP\4\x7f\0\0\1" + int4(9042))
    frames = [
        *(void(streams[2]), void(asks[1]), void(streams[0]), event, error(streams[3], 0x2500), void(late)),
        *(frame(asks[0], 0x08, int4(3) + b"\0\1k"), void(streams[1])),
    ]

    def check() -> None:
        assert group.future.done()
        assert group.left == 0
        assert group.failed == [writes[3]]
        assert not given_up.future.done()
        assert [response.kind for response in loose.answered] == [1, 3]
        assert all(isinstance(response, ResultMessage) for response in loose.answered)
        assert loose.connection.in_flight == before
        assert not loose.connection._express
        ids = list(loose.connection.request_ids)
        assert len(ids) == len(set(ids))
        assert not loose.connection.is_closed

    return frames, check


async def test_answers_split_at_every_byte(loose: Loose) -> None:
    """Wherever the network cuts what the server says in two, it is understood."""
    length = len(b"".join(conversation(loose)[0]))
    loose.connection._express.clear()
    for at in range(length + 1):
        frames, check = conversation(loose)
        data = b"".join(frames)
        for part in (data[:at], data[at:]):
            if part:
                loose.connection.received(part)
        check()


async def test_answers_in_pieces_of_any_size(loose: Loose) -> None:
    """From byte by byte up to all of them in one segment."""
    size, length = 1, 2
    while size <= length:
        frames, check = conversation(loose)
        data = b"".join(frames)
        length = len(data)
        for at in range(0, length, size):
            loose.connection.received(data[at : at + size])
        check()
        size += 1


async def test_a_connection_that_ends_between_two_answers(loose: Loose) -> None:
    """An answer behind the one that ended the connection counts no write a second time."""
    ask = loose.driver_asks()
    group, writes, streams = loose.group(2, more=1)
    loose.connection.received(error(ask, 0x000A, b"you speak in riddles") + void(streams[0]) + void(streams[1]))
    assert loose.connection.is_closed
    assert loose.lost == [loose.connection]
    assert group.left == 1
    assert not group.future.done()
    # Neither was answered before the end; the driver writes both again.
    assert group.failed == writes


@pytest.mark.parametrize("how", ["close", "defunct", "peer"])
async def test_a_connection_that_ends_with_writes_under_way(loose: Loose, how: str) -> None:
    """They are settled as failed, once; the database hears of the connection, and nothing more is taken on it."""
    group, writes, _ = loose.group(3)
    if how == "peer":
        loose.peer.shutdown(socket.SHUT_RDWR)
        await until(lambda: loose.connection.is_closed, "the connection is closed")
    elif how == "close":
        await asyncio.to_thread(loose.connection.close)
    else:
        await asyncio.to_thread(loose.connection.defunct, OSError("gone"))
    await until(group.future.done, "the group is over")
    assert group.failed == writes
    assert group.left == 0
    assert loose.lost == [loose.connection]
    assert loose.connection.reserve(group, writes[0]) is None


async def test_a_connection_with_no_stream_left(loose: Loose) -> None:
    """What finds no free stream id is for the driver, and one that comes free is used."""
    connection = loose.connection
    connection.max_request_id = connection.orphaned_threshold = connection.in_flight + 2
    group, writes, streams = loose.group(3)
    assert [stream is None for stream in streams] == [False, False, True]
    connection.received(void(streams[0]))
    assert connection.reserve(group, writes[2]) is not None


async def test_answers_from_the_real_server_in_pieces(where: Where, monkeypatch: pytest.MonkeyPatch) -> None:
    """The same with what a real server says, handshake and rows included."""
    real, sizes = LoopConnection.received, random.Random(5)

    def received(self: LoopConnection, data: bytes) -> None:
        while data:
            size = sizes.choice((1, 2, 3, 5, 8, 9, 10, 13, 100, 100_000))
            real(self, data[:size])
            data = data[size:]

    monkeypatch.setattr(LoopConnection, "received", received)
    async with connected(where) as client:
        for name in ("a", "b", "c"):
            await client.database.write_all(client.some(30, name))
            await client.has(30, name)
        await client.is_at_rest()


# Errors


@pytest.fixture
def driven(monkeypatch: pytest.MonkeyPatch) -> list[Write]:
    """The writes that the driver got."""
    real = Database._insist
    seen: list[Write] = []

    async def insist(self: Database, write: Write) -> None:
        seen.append(write)
        await real(self, write)

    monkeypatch.setattr(Database, "_insist", insist)
    return seen


async def test_a_statement_that_the_server_forgot(client: Client, driven: list[Write]) -> None:
    """Prepared anew by the driver, which writes what was answered with an error; the next ones need it no more."""
    database = client.database
    table = f"forgotten_{secrets.token_hex(4)}"
    await database.query(f"CREATE TABLE {table} (name text PRIMARY KEY, value int)", timeout_s=PATIENCE_S)
    statement = (await database.prepare({"one": f"INSERT INTO {table} (name, value) VALUES (?, ?)"}))["one"]

    async def write(first: int, count: int) -> None:
        keys = {f"k{number}".encode(): number for number in range(first, first + count)}
        await database.write_all([Write(statement, (key, int4(number)), key) for key, number in keys.items()])

    try:
        await write(0, 10)
        assert driven == []
        # A server forgets the statements of a table that is changed.
        await database.query(f"ALTER TABLE {table} ADD more int", timeout_s=PATIENCE_S)
        await write(10, 10)
        assert 0 < len(driven) <= 10
        driven.clear()
        await write(20, 10)
        assert driven == []
        rows = await database.query(f"SELECT name, value FROM {table}")
        assert sorted(rows) == sorted((f"k{number}", number) for number in range(30))
    finally:
        await database.query(f"DROP TABLE {table}", timeout_s=PATIENCE_S)
    await client.is_at_rest()


async def test_a_write_that_the_server_refuses(client: Client, driven: list[Write]) -> None:
    """The one is refused by a sentence of the server's, and all others of its group are durable."""
    bad = client.write("bad", b"x", user="u" * 70_000)
    with pytest.raises(StatementRefused, match="65535"):
        await client.database.write_all([*client.some(20), bad, *client.some(20, "b")])
    assert len(driven) == 1
    await client.has(20)
    await client.has(20, "b")
    await client.is_at_rest()


@pytest.mark.parametrize("text", ["SELECT nonsense", "SELEKT", "CREATE KEYSPACE k WITH replication = {'class': 'X'}"])
async def test_a_query_that_the_server_refuses(client: Client, text: str) -> None:
    """Whatever words the server has for it, it is one kind of error."""
    with pytest.raises(StatementRefused):
        await client.database.query(text)
    if text.startswith("SEL"):
        with pytest.raises(StatementRefused):
            await client.database.prepare({"bad": text})
    await client.is_at_rest()


# A server that goes


async def test_cut_in_the_middle_of_a_group(far: Client, line: Line) -> None:
    """The group fails within its time, and the next one works on the new connection."""
    await far.works()
    await far.is_at_rest()
    line.answers.clear()
    asked = line.asked
    async with asyncio.timeout(PATIENCE_S):
        task = asyncio.create_task(far.database.write_all(far.some(200)))
        await until(lambda: line.asked > asked, "the server has got some")
        line.refuse()
        line.cut()
        with pytest.raises(StoreUnavailable):
            await task
    line.answers.set()
    await line.accept()
    await far.works()
    await far.database.write_all(far.some(200, "b"))
    await far.has(200, "b")
    await far.database.write_all(far.some(200))
    await far.has(200)
    await far.is_at_rest()


async def test_late_answers(hasty: Client, line: Line) -> None:
    """A group that is not confirmed in time fails, and its stream ids are free when the answers come after all."""
    await hasty.is_at_rest()
    for round_ in range(3):
        line.answers.clear()
        async with asyncio.timeout(PATIENCE_S):
            with pytest.raises(StoreUnavailable, match="did not confirm 20 of 20 writes in time"):
                await hasty.database.write_all(hasty.some(20, f"late{round_}-"))
            with pytest.raises(StoreUnavailable):
                await hasty.state("late0")
        assert hasty.in_flight >= 20
        line.answers.set()
        await hasty.is_at_rest()
        await hasty.database.write_all(hasty.some(20, f"good{round_}-"))
        await hasty.has(20, f"good{round_}-")
        # The server had got them.
        await hasty.has(20, f"late{round_}-")


class HangingNode:
    """A node beside the real one that takes every write and answers none: its pool, and the pool's one connection."""

    is_shutdown = False
    is_closed = False
    in_flight, max_request_id = 0, 1

    def __init__(self) -> None:
        self._connections = {None: self}
        self.host = "hanging"
        self.taken: list[Write] = []

    def reserve(self, group: Group, write: Write) -> int | None:
        self.taken.append(write)
        return len(self.taken)

    def push(self, data: bytes) -> None:
        pass

    def give_up(self, group: Group) -> list[Write]:
        return self.taken


async def test_a_node_that_hangs(hasty: Client, monkeypatch: pytest.MonkeyPatch) -> None:
    """What one node of several takes and does not confirm is written through the others."""
    node = HangingNode()
    route, turn = Express._route, count()

    def every_second(express: Express, key: bytes) -> object:
        return node if next(turn) % 2 else route(express, key)

    monkeypatch.setattr(Express, "_route", every_second)
    monkeypatch.setitem(hasty.database.session._pools, "hanging", node)
    writes = hasty.some(40, "hang-")
    async with asyncio.timeout(PATIENCE_S):
        await hasty.database.write_all(writes)
    assert len(node.taken) == 20
    await hasty.has(40, "hang-")


async def test_a_caller_who_leaves(far: Client, line: Line) -> None:
    """A group, a write and a read whose callers are cancelled leave nothing behind."""
    await far.is_at_rest()
    line.answers.clear()
    asked = line.asked
    tasks = [
        asyncio.create_task(far.database.write_all(far.some(20))),
        asyncio.create_task(far.database.write(Express.bound(far.write("one", b"1")))),
        asyncio.create_task(far.state("any")),
    ]
    await until(lambda: line.asked > asked and far.in_flight >= 22, "they are under way")
    for task in tasks:
        task.cancel()
    results = await asyncio.gather(*tasks, return_exceptions=True)
    assert all(isinstance(result, asyncio.CancelledError) for result in results)
    line.answers.set()
    await far.is_at_rest()
    await far.has(20)


async def test_silent_server(where: Where) -> None:
    """A server that swallows everything costs each request its deadline, not more, and the loop turns."""
    async with Proxy(where.port) as proxy:
        async with connected(where._replace(port=proxy.port, timeout_s=QUICK_S)) as client:
            proxy.go_silent()
            async with Ticker() as ticker, asyncio.timeout(PATIENCE_S):
                for _ in range(3):
                    results = await asyncio.gather(
                        client.state("any"),
                        client.database.write_all(client.some(50)),
                        client.database.query("SELECT key FROM system.local"),
                        return_exceptions=True,
                    )
                    assert {type(result) for result in results} == {StoreUnavailable}, results
            assert ticker.worst_s < STALL_S
        assert client.database.under_way._value == client.database.where.in_flight


async def test_silent_server_with_all_stream_ids(where: Where, line: Line, monkeypatch: pytest.MonkeyPatch) -> None:
    """Requests that were given up and never answered use up a connection's ids: that stops no event loop."""
    monkeypatch.setattr(LoopConnection, "max_in_flight", 256)
    async with connected(where._replace(port=line.port, timeout_s=QUICK_S, in_flight=64)) as client:
        line.answers.clear()
        async with Ticker() as ticker:
            for _ in range(5):
                with pytest.raises(StoreUnavailable):
                    await client.database.write_all(client.some(64))
                # Once is enough to be seen, and the rest would take as long each.
                assert ticker.worst_s < STALL_S
                with pytest.raises(StoreUnavailable):
                    await client.state("any")
        assert ticker.worst_s < STALL_S
        line.answers.set()
        await client.works()
        await client.database.write_all(client.some(64))
        await client.has(64)


@pytest.mark.parametrize("noticed", [True, False])
@pytest.mark.parametrize("kind", ["read", "write", "group"])
async def test_idle_connection_dies(far: Client, line: Line, kind: str, noticed: bool) -> None:
    """A request right after the server went fails quickly, and nothing else in the process waits for it."""
    await far.works()
    connections = far.connections
    line.refuse()
    line.cut()
    if noticed:
        await until(lambda: all(connection.is_closed for connection in connections), "the end is noticed")
    async with Ticker() as ticker, asyncio.timeout(PATIENCE_S):
        for _ in range(3):
            requests = {
                "read": lambda: far.state("any"),
                "write": lambda: far.database.write(Express.bound(far.write("one", b"1"))),
                "group": lambda: far.database.write_all(far.some(20)),
            }
            with pytest.raises(StoreUnavailable):
                await requests[kind]()
    assert ticker.worst_s < STALL_S
    async with Ticker() as ticker:
        await line.accept()
        await far.works()
    assert ticker.worst_s < STALL_S
    await far.database.write_all(far.some(20))
    await far.has(20)
    await far.is_at_rest()


# The end


def row(user: str, number: int) -> InboxRow:
    return InboxRow(user, Position(1, number), f"id{number}", "t", None, 1_700_000_000_000_000_000, b"{}")


async def test_closing_a_store_finishes_what_was_accepted(where: Where, line: Line) -> None:
    """Rows whose append was under way are durable; what comes later is refused by a sentence."""
    user = f"user-{secrets.token_hex(8)}"
    store = CqlStore(where._replace(port=line.port))
    await store.open()
    rows = [row(user, number)._replace(stored_ns=time.time_ns()) for number in range(1, 51)]
    line.answers.clear()
    asked = line.asked
    append = asyncio.create_task(store.append(rows))
    await until(lambda: line.asked > asked, "the rows are under way")
    closes = [asyncio.create_task(store.close()) for _ in range(2)]
    await until(lambda: store._closed, "the store is about to close")
    with pytest.raises(StoreUnavailable, match="is closed"):
        await store.unread(user)
    assert not append.done()
    line.answers.set()
    await append
    await asyncio.gather(*closes)
    with pytest.raises(StoreUnavailable, match="is closed"):
        await store.append(rows)
    async with connected(where) as client:
        assert len(await client.database.read(client.sql["unread"], user, b"", b"\xff" * 15, 100)) == 50


async def test_closing_a_database_with_requests_under_way(far: Client, line: Line) -> None:
    """Whoever waits for a silent server hears at once that it is over."""
    line.answers.clear()
    asked = line.asked
    tasks = [
        asyncio.create_task(far.database.write_all(far.some(20))),
        asyncio.create_task(far.database.write(Express.bound(far.write("one", b"1")))),
        asyncio.create_task(far.state("any")),
    ]
    await until(lambda: line.asked > asked and far.in_flight >= 22, "they are under way")
    async with Ticker() as ticker, asyncio.timeout(PATIENCE_S):
        await far.database.close()
        results = await asyncio.gather(*tasks, return_exceptions=True)
    assert {type(result) for result in results} == {StoreUnavailable}, results
    assert ticker.worst_s < STALL_S
    await far.database.close()


# Opening


async def does_not_open(where: Where, *sentences: str) -> None:
    """Opening fails with a sentence that says where, and the loop turns meanwhile; closing it is fine."""
    store = CqlStore(where)
    async with Ticker() as ticker, asyncio.timeout(PATIENCE_S):
        with pytest.raises(StoreUnavailable) as caught:
            await store.open()
        await store.close()
    for sentence in (str(where), *sentences):
        assert sentence in str(caught.value)
    assert ticker.worst_s < STALL_S


async def test_nothing_is_there(where: Where) -> None:
    """Nobody listens on the port."""
    with taken_port() as port:
        free = port
    await does_not_open(where._replace(port=free), "does not answer", "Connection refused")


@pytest.mark.parametrize("says", [b"HTTP/1.1 400 Bad Request\r\n\r\n", b"", None])
async def test_something_else_is_there(where: Where, says: bytes | None) -> None:
    """Somebody listens who speaks another language, who hangs up, or who says nothing."""

    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await reader.read(1)
        if says is not None:
            writer.write(says)
            writer.close()
        else:
            await reader.read()
            writer.close()

    server = await asyncio.start_server(serve, "127.0.0.1", 0)
    async with server:
        port = server.sockets[0].getsockname()[1]
        await does_not_open(where._replace(port=port, timeout_s=QUICK_S), "does not answer")


async def test_no_such_keyspace(where: Where) -> None:
    """The keyspace is not there: the sentence has its name."""
    missing = f"missing_{secrets.token_hex(4)}"
    await does_not_open(where._replace(keyspace=missing), missing)


async def test_no_such_datacenter(where: Where) -> None:
    """No node is in the datacenter of the settings: nobody is asked, and the sentence says so."""
    await does_not_open(where._replace(datacenter="nowhere"))


async def test_no_such_host(where: Where) -> None:
    """A name that nobody knows."""
    await does_not_open(where._replace(hosts=["nobody.invalid"]), "nobody.invalid")


async def test_one_of_the_hosts_is_there(where: Where) -> None:
    """A store opens where one of its hosts answers."""
    async with connected(where._replace(hosts=["127.0.0.2", *where.hosts])) as client:
        await client.works()
