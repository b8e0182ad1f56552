"""Kills, freezes and delays of the CQL server, and kills of agents on it: deliveries go on, and nothing is lost."""

from __future__ import annotations

import asyncio
import re
import socket
import threading
import time
from collections.abc import AsyncIterator, Callable, Iterable, Iterator
from contextlib import asynccontextmanager, contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any, Final, Self

import orjson
import pytest
from websockets.exceptions import WebSocketException
from websockets.sync.client import ClientConnection
from websockets.sync.client import connect as connect_websocket
from websockets.typing import Subprotocol

from support.cassandra import Cassandra
from support.clock import PATIENCE_S, SCALE, until
from support.cql import new_keyspace, query
from support.device import Device, Frame
from support.ledger import stored_ids
from support.mesh import KEY, PARTITIONS, Agent, Mesh, running_mesh
from tidings.identity import issue
from tidings.store.cql import parse_url, schema
from tidings.store.port import UNREAD_CAP
from tidings.wire import subject
from tidings.wire.errors import StoreUnavailable
from tidings.wire.frames import SUBPROTOCOL
from tidings.wire.position import Position

USERS: Final = [f"user{number}" for number in range(5)]
AGENTS_TIMEOUT_S: Final = 0.5 * SCALE
DELAY_S: Final = 2.0 * SCALE
LIVENESS_S: Final = 1.5 * SCALE
"""Far above what a busy machine costs, and below the two seconds that the driver may wait for a connection."""


@dataclass(slots=True)
class Site:
    """A mesh on a CQL server that the test may harm. The mesh's own store is patient, the agents' stores are not."""

    mesh: Mesh
    server: Cassandra
    keyspace: str

    def url(self, port: int | None = None) -> str:
        """The store as the agents are told of it, perhaps through a proxy."""
        return f"cql://127.0.0.1:{port or self.server.port}/{self.keyspace}?timeout_s={AGENTS_TIMEOUT_S}"

    async def gateway(self, port: int | None = None, **changed: Any) -> Agent:
        return await self.mesh.gateway(store_url=self.url(port), **changed)

    async def inbox(self, port: int | None = None, **changed: Any) -> Agent:
        return await self.mesh.inbox(store_url=self.url(port), **changed)


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Cassandra]:
    """A server of this module's own."""
    child = Cassandra(tmp_path_factory.mktemp("cassandra"))
    try:
        child.start()
        yield child
    finally:
        child.kill()


@pytest.fixture
async def site(server: Cassandra, tmp_path: Path) -> AsyncIterator[Site]:
    """A mesh on an empty keyspace; the test starts the agents that it needs."""
    server.start()
    url = await new_keyspace(server.contact_point)
    async with running_mesh(tmp_path, store_url=url) as mesh:
        try:
            yield Site(mesh, server, url.rpartition("/")[2].partition("?")[0])
        finally:
            # A test that failed half-way is no reason for the next one to fail.
            server.thaw()


# What all tests with a harmed server do


FAULTS: Final[dict[str, tuple[Callable[[Cassandra], None], Callable[[Cassandra], None]]]] = {
    "frozen": (Cassandra.freeze, Cassandra.thaw),
    "killed": (Cassandra.kill, Cassandra.start),
}


async def is_gone(server: Cassandra) -> None:
    """Wait until the server does not answer: a signal takes its time to reach all threads of a process."""
    async with asyncio.timeout(PATIENCE_S):
        while await asyncio.to_thread(server.answers, 0.25 * SCALE):
            await asyncio.sleep(0.01)


@asynccontextmanager
async def load(mesh: Mesh, users: Iterable[str]) -> AsyncIterator[None]:
    """Publish to each of these users without a pause for as long as the block lasts."""
    stop = asyncio.Event()

    async def publish(user: str) -> None:
        while not stop.is_set():
            await mesh.publish(user)
            with suppress(TimeoutError):
                async with asyncio.timeout(0.02):
                    await stop.wait()

    tasks = [asyncio.create_task(publish(user)) for user in users]
    try:
        yield
    finally:
        stop.set()
        await asyncio.gather(*tasks)


async def is_delivered(mesh: Mesh, user: str, device: Device) -> None:
    """Publish one more, and wait until the device has it and JetStream has the device's ack of it."""
    (id,) = await mesh.publish(user)
    await device.expect(id)
    position = Position.parse(next(item["pos"] for item in device.items if item["n"]["id"] == id))
    stream = f"NOTIFY_{subject.partition(subject.escape(user), PARTITIONS)}"
    names = (await mesh.connection.api(f"CONSUMER.NAMES.{stream}"))["consumers"]
    (name,) = (name for name in names if name.startswith(f"{device.welcome['session']}-"))
    async with asyncio.timeout(PATIENCE_S):
        while (await consumer(mesh, stream, name))["ack_floor"]["stream_seq"] < position.sequence:
            await asyncio.sleep(0.01)


async def consumer(mesh: Mesh, stream: str, name: str = "inbox") -> dict[str, Any]:
    return await mesh.connection.api(f"CONSUMER.INFO.{stream}.{name}")


async def ask_all(device: Device) -> list[Frame]:
    """The answers to one request of each kind."""
    marked = {"as": "read", "pos": [device.items[0]["pos"]]}
    return [await device.ask("inbox"), await device.ask("mark", **marked), await device.ask("count")]


async def is_refused(device: Device) -> None:
    """The device's requests are answered, and the answer is that the store is not there."""
    assert [(answer["t"], answer.get("code")) for answer in await ask_all(device)] == [
        ("error", "store_unavailable")
    ] * 3


async def is_answered(device: Device) -> None:
    """Wait until the device's requests work."""
    async with asyncio.timeout(PATIENCE_S):
        while (await device.ask("count"))["t"] != "ok":
            await asyncio.sleep(0.05)
        while {answer["t"] for answer in await ask_all(device)} != {"ok"}:
            await asyncio.sleep(0.05)


async def said_often(agent: Agent, pattern: str, times: int) -> None:
    """Wait until the agent has said it that often from now on."""
    start = len(agent.output)

    def done() -> bool:
        return sum(re.search(pattern, line) is not None for line in agent.output[start:]) >= times

    await until(done, f"{agent.kind} says {pattern!r} {times} times more")


async def store_is_back(mesh: Mesh) -> None:
    """Wait until the test's own store has found the server again."""
    async with asyncio.timeout(PATIENCE_S):
        while True:
            try:
                await mesh.store.check()
                return
            except StoreUnavailable:
                await asyncio.sleep(0.05)


async def cursor(mesh: Mesh, user: str) -> str | None:
    """The floor that the store has for the user's phone."""
    found = [entry["floor"] async for entry in mesh.store.export(user) if entry["kind"] == "cursor"]
    return found[0] if found else None


async def until_cursor(mesh: Mesh, user: str, floor: str) -> None:
    async with asyncio.timeout(PATIENCE_S):
        while await cursor(mesh, user) != floor:
            await asyncio.sleep(0.05)


async def nothing_is_lost(mesh: Mesh, devices: dict[str, Device]) -> None:
    """All that was accepted is at its device and once in its inbox, and the devices' cursors are written."""
    for user, device in devices.items():
        await device.expect(*mesh.ledger.accepted[user])
        mesh.ledger.check_device(user, "phone", device.ids)
        assert device.close_code is None
    await all_is_stored(mesh)
    for user, device in devices.items():
        await until_cursor(mesh, user, str(max(Position.parse(item["pos"]) for item in device.items)))


async def all_is_stored(mesh: Mesh) -> None:
    await store_is_back(mesh)
    for user, ids in mesh.ledger.accepted.items():
        await mesh.stored(user, *ids)
    await mesh.ledger.check_store(mesh.store)


# The server


@pytest.mark.parametrize("fault", FAULTS)
async def test_server_gone_under_load(site: Site, fault: str) -> None:
    """Deliveries do without the server, requests are refused at once, and all is made up for when it is back."""
    mesh, (harm, mend) = site.mesh, FAULTS[fault]
    gateway, inbox = await site.gateway(), await site.inbox()
    devices = {user: await mesh.online(gateway, user) for user in USERS}
    async with load(mesh, USERS):
        await until(lambda: all(len(device.items) > 10 for device in devices.values()), "a flow")
        for device in devices.values():
            await is_answered(device)
        harm(site.server)
        await is_gone(site.server)
        for user, device in devices.items():
            await is_delivered(mesh, user, device)
            await is_refused(device)
        await asyncio.gather(said_often(inbox, "rows wait", 3), said_often(gateway, "cursors wait", 3))
        for user, device in devices.items():
            await is_delivered(mesh, user, device)
        await is_refused(devices[USERS[0]])
        await asyncio.to_thread(mend, site.server)
        for user, device in devices.items():
            await is_answered(device)
            await is_delivered(mesh, user, device)
    await nothing_is_lost(mesh, devices)


async def test_slow_server_is_a_server_that_is_down(site: Site) -> None:
    """A server that takes longer than it may is down for clients, and the inbox agent takes in no more than it must."""
    mesh, batch = site.mesh, 8
    async with Wire(site.server.port) as wire:
        gateway, inbox = await site.gateway(wire.port), await site.inbox(wire.port, inbox_batch=batch)
        devices = {user: await mesh.online(gateway, user) for user in USERS}
        await asyncio.gather(*(mesh.publish(user, 5) for user in USERS))
        for device in devices.values():
            await device.expect(*mesh.ledger.accepted[device.welcome["user"]])
        await all_is_stored(mesh)
        wire.delay_s = DELAY_S
        await asyncio.gather(*(mesh.publish(user, 200) for user in USERS))
        for user, device in devices.items():
            await is_delivered(mesh, user, device)
            await is_refused(device)
        await said_often(inbox, "rows wait", 2)
        taken = [(await consumer(mesh, f"NOTIFY_{number}"))["num_ack_pending"] for number in range(PARTITIONS)]
        # Four batches that wait, one that is written, and a last pull of a batch for each partition.
        assert sum(taken) <= (4 + 1 + PARTITIONS) * batch, taken
        wire.delay_s = 0
        for user, device in devices.items():
            await is_answered(device)
            await is_delivered(mesh, user, device)
        await nothing_is_lost(mesh, devices)


@pytest.mark.parametrize("how", ["refused", "stopped"])
async def test_server_refuses_at_connect(site: Site, how: str) -> None:
    """A device that comes while the server refuses is served blind, and repaired when the server is back."""
    mesh = site.mesh
    async with Wire(site.server.port) as wire:
        gateway = await site.gateway(wire.port, overlap_s=0, linger_s=0)
        await site.inbox(wire.port)
        phone = await mesh.online(gateway, "alice")
        await phone.expect(*await mesh.publish("alice", 3))
        last = phone.items[-1]["pos"]
        await phone.leave()
        await until_cursor(mesh, "alice", last)
        await mesh.stored("alice", *await mesh.publish("alice", 3))
        if how == "refused":
            wire.refuse()
        else:
            site.server.stop()
        unstored = await mesh.publish("alice", 3)
        await phone.connect()
        assert phone.welcome["t"] == "welcome"
        assert (phone.welcome["pos"], phone.welcome["unread"]) == (None, None)
        await phone.expect_frame("gap", missed=None)
        assert not set(unstored) & set(phone.ids)
        await is_delivered(mesh, "alice", phone)
        await is_refused(phone)
        assert phone.close_code is None
        if how == "refused":
            await wire.accept()
        else:
            await asyncio.to_thread(site.server.start)
        assert await phone.closed() == 1012
        assert (await phone.expect_frame("bye"))["reconnect"] is True
        await phone.connect()
        assert phone.welcome["pos"] == last
        await is_answered(phone)
        await nothing_is_lost(mesh, {"alice": phone})
        assert (await phone.ask("count"))["unread"] == len(mesh.ledger.accepted["alice"]) - 1 < UNREAD_CAP


async def test_a_table_is_missing(site: Site) -> None:
    """A schema that somebody broke is a store that is down: nothing becomes a dead letter, and mended it goes on."""
    mesh, where = site.mesh, parse_url(site.url())._replace(timeout_s=20)
    gateway, inbox = await site.gateway(), await site.inbox()
    device = await mesh.online(gateway, "alice")
    before = await mesh.publish("alice", 2)
    await mesh.stored("alice", *before)
    await query(where, "DROP TABLE inbox")
    meanwhile = await mesh.publish("alice", 20)
    await device.expect(*meanwhile)
    await said_often(inbox, "rows wait .* for the store", 2)
    assert await mesh.dead_letters() == []
    (again,) = (text for text in schema.migrations()[0].statements if "EXISTS inbox (" in text)
    await query(where, again)
    await mesh.stored("alice", *meanwhile)
    assert await mesh.dead_letters() == []


@pytest.mark.parametrize("fault", FAULTS)
async def test_event_loop_is_never_blocked(site: Site, fault: str) -> None:
    """A gateway answers pings while its server goes, is away and comes back, whatever else is asked of it then."""
    mesh, (harm, mend) = site.mesh, FAULTS[fault]
    gateway, inbox = await site.gateway(linger_s=0), await site.inbox()
    devices = {user: await mesh.online(gateway, user) for user in USERS}
    async with load(mesh, USERS):
        await until(lambda: all(len(device.items) > 10 for device in devices.values()), "a flow")
        with Pulse(gateway) as pulse:
            harm(site.server)
            await is_gone(site.server)
            async with asyncio.TaskGroup() as group:
                for device in devices.values():
                    group.create_task(is_refused(device))
                group.create_task(said_often(inbox, "rows wait", 3))
                group.create_task(said_often(gateway, "cursors wait", 3))
                newcomers = [group.create_task(mesh.online(gateway, f"late{number}")) for number in range(10)]
            assert {newcomer.result().welcome["pos"] for newcomer in newcomers} == {None}
            # In a thread: a server that starts takes seconds, and the load goes on.
            await asyncio.to_thread(mend, site.server)
            for newcomer in newcomers:
                assert await newcomer.result().closed() == 1012
                await newcomer.result().connect()
            for device in devices.values():
                await is_answered(device)
            pulse.goes_on()
    await nothing_is_lost(mesh, devices)
    said = f"the slowest of {pulse.count} pongs took {pulse.worst_s:.3f} s"
    print(said)
    assert pulse.worst_s < LIVENESS_S, said


async def test_clients_that_do_not_wait_for_the_store(site: Site) -> None:
    """Clients that are gone before the store has answered for them, after a hello or a request, harm nobody."""
    mesh = site.mesh
    gateway, _ = await site.gateway(heartbeat_s=0.5, linger_s=0), await site.inbox()
    bob = await mesh.online(gateway, "bob")
    hasty = [await mesh.online(gateway, user) for user in USERS]
    site.server.freeze()
    await is_gone(site.server)
    refused = asyncio.create_task(said_often(gateway, "a request of session .* was not answered", len(hasty)))
    blind = asyncio.create_task(said_often(gateway, "starts without its cursor", 1))
    for device, leave in zip(hasty, [Device.cut, Device.leave] * len(hasty), strict=False):
        await device.send({"t": "inbox", "ref": 1})
        await leave(device)
    with Pulse.connection(gateway, "carol"):
        pass
    await asyncio.gather(refused, blind)
    await is_delivered(mesh, "bob", bob)
    site.server.thaw()
    await is_answered(bob)
    await asyncio.gather(*(device.connect() for device in hasty))
    for user, device in zip(USERS, hasty, strict=True):
        await is_delivered(mesh, user, device)
    await nothing_is_lost(mesh, {"bob": bob, **dict(zip(USERS, hasty, strict=True))})


# The agents


async def test_inbox_agent_killed_while_it_writes(site: Site) -> None:
    """kill -9 between store and ack, and in the middle of writes: another agent takes over, and each is stored once."""
    mesh = site.mesh
    stuck = await mesh.stuck_inbox()
    await mesh.publish("alice", 5)
    await stuck.said(r"stored \d+ rows")
    assert await stored_ids(mesh.store, "alice")
    await stuck.kill_agent()
    async with Wire(site.server.port) as wire:
        first = await site.inbox(wire.port, inbox_batch=8)
        # Slow enough for a write to be under way at any time, and quick enough to be confirmed.
        wire.delay_s = AGENTS_TIMEOUT_S / 5
        await asyncio.gather(*(mesh.publish(user, 50) for user in USERS))
        streams = [f"NOTIFY_{number}" for number in range(PARTITIONS)]
        async with asyncio.timeout(PATIENCE_S):
            while sum([(await consumer(mesh, stream))["num_pending"] for stream in streams]) > 150:
                await asyncio.sleep(0.01)
        await first.kill_agent()
        assert sum([(await consumer(mesh, stream))["num_ack_pending"] for stream in streams]) > 5
    for stream in streams:
        config = (await consumer(mesh, stream))["config"]
        body = {"stream_name": stream, "config": {**config, "ack_wait": 500_000_000}, "action": "update"}
        await mesh.connection.api(f"CONSUMER.CREATE.{stream}.inbox", body)
    await site.inbox()
    await asyncio.gather(*(mesh.publish(user, 10) for user in USERS))
    await all_is_stored(mesh)


async def test_gateway_killed_and_another_takes_over(site: Site) -> None:
    """kill -9 of a gateway: what was not acknowledged comes again on another one, what was does not."""
    mesh = site.mesh
    one, two, _ = await site.gateway(ack_wait_s=30), await site.gateway(ack_wait_s=30), await site.inbox()
    others = {user: await mesh.online(two, user) for user in USERS}
    alice = await mesh.online(one, "alice", auto_ack=False)
    sent = await mesh.publish("alice", 10)
    await alice.expect(*sent)
    await alice.ack(*(item["pos"] for item in alice.items[:4]), alice.items[7]["pos"])
    floor = alice.items[3]["pos"]
    await until_cursor(mesh, "alice", floor)
    async with load(mesh, USERS):
        await one.kill_agent()
        first = list(alice.items)
        alice.items.clear()
        alice.auto_ack = True
        alice.url = two.url
        await alice.connect()
        assert alice.welcome["pos"] == floor
        expected = [*sent[4:7], *sent[8:], *await mesh.publish("alice", 2)]
        await alice.expect(*expected)
        assert alice.ids == expected
        assert [item["try"] for item in alice.items] == [2] * 5 + [1] * 2
        alice.items[:0] = first
    await nothing_is_lost(mesh, {**others, "alice": alice})


async def test_two_gateways_claim_a_device_at_once(site: Site) -> None:
    """Of two connections of one device that come together, on two gateways, one is left standing."""
    mesh = site.mesh
    one, two, _ = await site.gateway(), await site.gateway(), await site.inbox()
    got: list[str] = []
    for _ in range(8):
        pair = [await mesh.device(gateway, "alice") for gateway in (one, two)]
        await asyncio.gather(*(device.connect() for device in pair))
        await until(lambda pair=pair: sum(d.close_code is None for d in pair) == 1, "one is left")
        (standing,) = (device for device in pair if device.close_code is None)
        (loser,) = (device for device in pair if device.close_code is not None)
        assert loser.close_code == 4409
        await standing.expect(*await mesh.publish("alice", 3))
        assert standing.close_code is None
        got += [*loser.ids, *standing.ids]
        await standing.leave()
    mesh.ledger.check_device("alice", "phone", got)
    await all_is_stored(mesh)


# Helpers of this suite


class Wire:
    """A TCP proxy to the server that can be made slow, and that can refuse connections on its port."""

    def __init__(self, target_port: int) -> None:
        self.delay_s = 0.0
        """How long what the client sends is held back from now on."""
        self._target = target_port
        self._tasks: set[asyncio.Task[None]] = set()
        self._writers: list[asyncio.StreamWriter] = []
        self._server: asyncio.Server | None = None
        self._socket = _bound(0)
        self.port: int = self._socket.getsockname()[1]

    async def accept(self) -> None:
        self._server = await asyncio.start_server(self._accept, sock=self._socket)

    def refuse(self) -> None:
        """Drop all connections, and take no more until `accept`; the port stays ours."""
        assert self._server is not None
        self._server.close()
        self._socket = _bound(self.port)
        self._drop()

    def _drop(self) -> None:
        for writer in self._writers:
            writer.transport.abort()
        self._writers.clear()

    async def _accept(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self._writers.append(writer)
        try:
            up_reader, up_writer = await asyncio.open_connection("127.0.0.1", self._target)
        except ConnectionError:
            writer.transport.abort()
            return
        self._writers.append(up_writer)
        held: asyncio.Queue[tuple[float, bytes]] = asyncio.Queue()
        for work in (self._hold(reader, held), self._release(held, up_writer), self._forward(up_reader, writer)):
            task = asyncio.create_task(work)
            self._tasks.add(task)
            task.add_done_callback(self._tasks.discard)

    async def _hold(self, source: asyncio.StreamReader, held: asyncio.Queue[tuple[float, bytes]]) -> None:
        data = b"?"
        while data:
            try:
                data = await source.read(65_536)
            except ConnectionError:
                # From now on every read raises it, and at once.
                data = b""
            held.put_nowait((time.monotonic() + self.delay_s, data))

    async def _release(self, held: asyncio.Queue[tuple[float, bytes]], sink: asyncio.StreamWriter) -> None:
        data = b"?"
        while data:
            due, data = await held.get()
            await asyncio.sleep(max(0.0, due - time.monotonic()))
            sink.write(data)
        sink.close()

    async def _forward(self, source: asyncio.StreamReader, sink: asyncio.StreamWriter) -> None:
        with suppress(ConnectionError):
            while data := await source.read(65_536):
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
        for task in tuple(self._tasks):
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)
        self._drop()


def _bound(port: int) -> socket.socket:
    """A socket that has a port and does not listen: whoever connects is refused, and nobody else gets the port."""
    made = socket.socket()
    made.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    made.bind(("127.0.0.1", port))
    made.setblocking(False)
    return made


class Pulse:
    """Asks a gateway `ping` again and again, in a thread of its own: the test's event loop may be busy."""

    def __init__(self, gateway: Agent) -> None:
        self.worst_s = 0.0
        self._gateway = gateway
        self.count = 0
        self._stop = threading.Event()
        self._ready = threading.Event()
        self._error: Exception | None = None
        self._thread = threading.Thread(target=self._run, daemon=True)

    def _run(self) -> None:
        try:
            self._ask()
        except (OSError, AssertionError, WebSocketException) as error:
            self._error = error
        finally:
            self._ready.set()

    @staticmethod
    @contextmanager
    def connection(gateway: Agent, user: str) -> Iterator[ClientConnection]:
        """A connection that has said hello, and does not wait for a goodbye."""
        url, protocols = gateway.url.replace("http:", "ws:"), [Subprotocol(SUBPROTOCOL)]
        hello = {"t": "hello", "token": issue(KEY, user, "phone")}
        with connect_websocket(url, subprotocols=protocols, ping_interval=None, close_timeout=0.1) as connection:
            connection.send(orjson.dumps(hello).decode())
            yield connection

    def _ask(self) -> None:
        with self.connection(self._gateway, "pulse") as connection:
            assert orjson.loads(connection.recv(PATIENCE_S))["t"] == "welcome"
            self._ready.set()
            while not self._stop.wait(0.01):
                self.count += 1
                asked = time.monotonic()
                connection.send(orjson.dumps({"t": "ping", "ref": self.count}).decode())
                while orjson.loads(connection.recv(PATIENCE_S)) != {"t": "pong", "ref": self.count}:
                    pass
                self.worst_s = max(self.worst_s, time.monotonic() - asked)

    def goes_on(self) -> None:
        """The gateway has not closed the connection."""
        assert self._error is None, self._error
        assert self._thread.is_alive()

    def __enter__(self) -> Self:
        self._thread.start()
        assert self._ready.wait(PATIENCE_S)
        self.goes_on()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._stop.set()
        self._thread.join(2 * PATIENCE_S)
