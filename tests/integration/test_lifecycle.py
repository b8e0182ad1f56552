"""Everything that is started and stopped, on a real nats-server: in every order, at every moment, nothing is left."""

from __future__ import annotations

import asyncio
import dataclasses
import gc
import os
import random
import signal
import threading
from collections import Counter
from collections.abc import AsyncIterator, Awaitable, Callable, Generator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any, Final

import aiohttp
import pytest

from support.clock import PATIENCE_S, SCALE, until
from support.command import processes_of, taken_port
from support.device import Device
from support.mesh import KEY, Mesh, running_mesh
from tidings.api.agent import Api
from tidings.client import Client
from tidings.dev.mesh import DevMesh
from tidings.fanout.agent import FanoutAgent
from tidings.gateway.agent import Gateway
from tidings.identity import issue
from tidings.inbox.agent import InboxAgent
from tidings.publish import Receipt
from tidings.publish.publisher import Publisher
from tidings.runtime.backoff import Backoff
from tidings.runtime.service import Service, State
from tidings.runtime.settings import Settings
from tidings.stream import topology
from tidings.stream.connection import Connection, connect
from tidings.stream.server import NatsServer
from tidings.wire.errors import (
    ConnectionLost,
    PublishUnconfirmed,
    SessionClosed,
    StartFailed,
    StreamUnavailable,
    TidingsError,
)
from tidings.wire.frames import SUBPROTOCOL

_SETTLE_S: Final = 1.0 * SCALE
"""What was closed is gone a few turns of the loop later; what is not gone by then was left behind."""


# What is left


def descriptors() -> Counter[str]:
    """What this process has open: sockets, pipes and the like by kind, files by path.

    The readers of a SQLite store open their connections when they are first needed, so its files are not counted.
    """
    found: Counter[str] = Counter()
    for entry in os.listdir("/proc/self/fd"):
        try:
            target = os.readlink(f"/proc/self/fd/{entry}")
        except FileNotFoundError:
            continue  # the one that lists them
        if "tidings.db" not in target:
            found[target if target.startswith("/") else target.partition(":")[0]] += 1
    return found


@asynccontextmanager
async def nothing_left(own: Connection | None = None) -> AsyncIterator[None]:
    """What the block starts is gone at its end: tasks, descriptors, the writers of stores, errors that nobody saw.

    `own` is the connection of the test, which has tasks of its own and may have had to connect again.
    """
    loop = asyncio.get_running_loop()
    complaints: list[Any] = []
    outer = loop.get_exception_handler()
    loop.set_exception_handler(lambda loop, context: complaints.append(context))
    tasks, open_before, writers_before = asyncio.all_tasks(), descriptors(), store_writers()

    def left() -> list[object]:
        mine = {asyncio.current_task()}
        if own is not None:
            mine |= {own._reading_task, own._ping_interval_task, own._flusher_task, own._reconnection_task}
        return [
            *(asyncio.all_tasks() - tasks - mine),
            *(descriptors() - open_before).items(),
            *(store_writers() - writers_before),
        ]

    try:
        yield
        if own is not None:
            await until(lambda: own.is_connected, "the test is connected again")
        try:
            await until(lambda: not left(), "nothing is left", _SETTLE_S)
        except AssertionError:
            raise AssertionError(f"left behind: {left()}") from None
        if outer is None:
            # A task or a transport that is dropped complains when it is collected. Once a test: it takes a while.
            gc.collect()
        assert complaints == []
    finally:
        loop.set_exception_handler(outer)


def store_writers() -> set[threading.Thread]:
    """An open SQLite store has one, and readers as it needs them."""
    return {thread for thread in threading.enumerate() if thread.name.startswith("sqlite-writer")}


async def sessions(mesh: Mesh) -> list[str]:
    """The consumers of sessions that nats-server has."""
    names: list[str] = []
    for number in range(mesh.settings.partitions):
        listed = await mesh.connection.api(f"CONSUMER.NAMES.{topology.notify_stream(number)}")
        names += [name for name in listed["consumers"] or [] if name != topology.INBOX]
    return names


# Where to interrupt


class Interrupted:
    """Runs a coroutine, and calls `interrupt` in the turn after it began to wait for the `at`-th time."""

    def __init__(self, work: Awaitable[None], at: int, interrupt: Callable[[], object]) -> None:
        self._work = work
        self._at = at
        self._interrupt = interrupt
        self.waits = 0

    @property
    def came_so_far(self) -> bool:
        return self.waits >= self._at

    async def run(self) -> None:
        await self

    def __await__(self) -> Generator[Any, Any, None]:
        work: Any = self._work.__await__()
        error: BaseException | None = None
        while True:
            try:
                waits_for = next(work) if error is None else work.throw(error)
            except StopIteration:
                return
            error = None
            self.waits += 1
            if self.waits == self._at:
                asyncio.get_running_loop().call_soon(self._interrupt)
            try:
                yield waits_for
            except BaseException as thrown:  # noqa: BLE001 - whatever comes is for the coroutine to handle
                error = thrown


async def ended(*works: asyncio.Future[Any]) -> list[Any]:
    """Wait for the end of tasks; returns their results and errors."""
    async with asyncio.timeout(PATIENCE_S):
        return await asyncio.gather(*works, return_exceptions=True)


async def interrupt_start(service: Service, at: int, how: str) -> bool:
    """Start, and end that at one of its awaits; returns whether the start came so far."""
    interrupted = Interrupted(
        service._start(), at, lambda: starting.cancel() if how == "cancel" else stops.append(stop(service))
    )
    stops: list[asyncio.Task[None]] = []
    service._start = interrupted.run  # type: ignore[method-assign]
    starting = asyncio.create_task(service.start())
    (outcome,) = await ended(starting)
    if outcome is None:
        # It was through before the stop took hold, or a library made nothing of the cancel: the caller has it.
        assert service.state in (State.READY, State.STOPPED)
    else:
        assert isinstance(outcome, asyncio.CancelledError), repr(outcome)
        assert service.state is State.STOPPED
    assert await ended(*stops, stop(service)) == [None] * (len(stops) + 1)
    assert service.state is State.STOPPED
    return interrupted.came_so_far


def stop(service: Service) -> asyncio.Task[None]:
    return asyncio.create_task(service.stop())


# What there is to start

KINDS: Final = ["gateway", "inbox", "fanout", "api", "nats-server", "dev"]
FEWER: Final = {"dev": 8}
"""Of the awaits of a start, each so-and-so-many-th is tried; otherwise each."""


class Makers:
    """Makes services of each kind on one mesh; they share nothing but its nats-server and store."""

    def __init__(self, mesh: Mesh) -> None:
        self.mesh = mesh
        self.own = mesh.folder / "own"
        """Where the services that are no agents have their state."""

    def make(self, kind: str, **changed: Any) -> Service:
        settings = dataclasses.replace(self.mesh.settings, **changed)
        if kind == "gateway":
            return Gateway(settings, self.mesh.store)
        if kind == "inbox":
            return InboxAgent(settings, self.mesh.store)
        if kind == "fanout":
            return FanoutAgent(settings, self.mesh.store)
        if kind == "api":
            return Api(settings, self.mesh.store)
        if kind == "nats-server":
            return NatsServer(self.own, partitions=4)
        return DevMesh(Settings(port=0, api_port=0, drain_s=0.1, **changed), self.own, nats_port=0)

    def check_no_process(self) -> None:
        assert processes_of(self.own) == []
        assert processes_of(self.own / "nats.conf") == []
        assert processes_of(self.own / "nats" / "nats.conf") == []


@pytest.fixture
async def makers(mesh: Mesh) -> AsyncIterator[Makers]:
    """Services on a mesh; nothing is left of them at the end of the test."""
    made = Makers(mesh)
    # Names are looked up in threads of the loop's own.
    await asyncio.to_thread(int)
    async with nothing_left(mesh.connection):
        yield made
        made.check_no_process()


# In every order


async def test_stopped_before_it_starts(makers: Makers) -> None:
    """Stopping what never ran is fine, and it does not run any more."""
    for kind in KINDS:
        service = makers.make(kind)
        await service.drain()
        await service.stop()
        await service.stop()
        with pytest.raises(RuntimeError, match="was started before"):
            await service.start()


@pytest.mark.parametrize("kind", KINDS)
async def test_whole_life_with_everything_twice(makers: Makers, kind: str) -> None:
    """Started, drained and stopped twice each, at the same time and afterwards; then another takes its place."""
    for _ in range(2):
        service = makers.make(kind)
        async with nothing_left():
            starting = asyncio.create_task(service.start())
            await asyncio.sleep(0)
            with pytest.raises(RuntimeError):
                await service.start()
            await starting
            assert service.ready
            with pytest.raises(RuntimeError):
                await service.start()
            assert service.ready
            drains = [asyncio.create_task(service.drain()) for _ in range(2)]
            assert await ended(*drains) == [None, None]
            await service.drain()
            assert await ended(stop(service), stop(service)) == [None, None]
            makers.check_no_process()
            await service.stop()
            await service.drain()
            assert service.state is State.STOPPED
            with pytest.raises(RuntimeError):
                await service.start()


@pytest.mark.parametrize("kind", KINDS)
async def test_stop_without_drain(makers: Makers, kind: str) -> None:
    """A stop alone releases everything, also when whoever asked first gives up."""
    service = makers.make(kind)
    await service.start()
    first, second = stop(service), stop(service)
    await asyncio.sleep(0)
    first.cancel()
    assert await ended(second) == [None]
    assert service.state is State.STOPPED


@pytest.mark.parametrize("how", ["stop", "cancel"])
@pytest.mark.parametrize("kind", KINDS)
async def test_interrupted_at_every_await_of_its_start(makers: Makers, kind: str, how: str) -> None:
    """A start that is stopped or cancelled while it waits, for whatever, has released everything when that returns."""
    at = 1
    while True:
        async with nothing_left():
            came_so_far = await interrupt_start(makers.make(kind), at, how)
            makers.check_no_process()
        if not came_so_far:
            break
        at += FEWER.get(kind, 1)
    assert at > 3, "a start waits for several things"


async def test_server_stopped_while_it_is_started_again(makers: Makers) -> None:
    """A server that is stopped at any await of its second start leaves no process."""
    came_so_far, at = True, 0
    while came_so_far:
        at += 1
        async with nothing_left():
            came_so_far = await stop_restart(makers, at)
            makers.check_no_process()
    assert at > 3, "a start waits for several things"


async def stop_restart(makers: Makers, at: int) -> bool:
    """Stop a server at an await of its second start, or behind it; returns whether the start came so far."""
    server = makers.make("nats-server")
    assert isinstance(server, NatsServer)
    await server.start()
    due = asyncio.Event()
    again = Interrupted(server._launch(), at, due.set)

    async def launch() -> None:
        try:
            await again
        finally:
            due.set()

    server._launch = launch  # type: ignore[method-assign]
    server.kill()
    async with asyncio.timeout(PATIENCE_S):
        await due.wait()
    await server.stop()
    assert server.pid is None
    return again.came_so_far


# Failing at the start


async def test_agents_without_nats(makers: Makers) -> None:
    """An agent that finds no server says so, and leaves nothing."""
    with taken_port() as port:
        for kind in ("gateway", "inbox", "fanout", "api"):
            agent = makers.make(kind, nats_url=f"nats://127.0.0.1:{port}", request_timeout_s=0.2)
            with pytest.raises(StreamUnavailable):
                await agent.start()
            assert agent.state is State.STOPPED


async def test_agents_without_streams(makers: Makers) -> None:
    """An agent that finds no streams, when it is connected already, closes its connection."""
    empty = NatsServer(makers.own)
    await empty.start()
    for kind in ("gateway", "inbox", "fanout", "api"):
        async with nothing_left():
            agent = makers.make(kind, nats_url=empty.url)
            with pytest.raises(TidingsError):
                await agent.start()
            assert agent.state is State.STOPPED
    await empty.stop()


async def test_gateway_without_its_port(makers: Makers) -> None:
    """The port is the last thing that a gateway takes: what it has by then is released."""
    with taken_port() as port:
        gateway = makers.make("gateway", port=port)
        with pytest.raises(StartFailed, match=f":{port}"):
            await gateway.start()
    assert gateway.state is State.STOPPED


async def test_server_without_its_port(makers: Makers) -> None:
    """A child that ends by itself is reaped."""
    with taken_port() as port:
        server = NatsServer(makers.own, port=port)
        with pytest.raises(StartFailed, match="in use"):
            await server.start()
    assert server.pid is None


@pytest.mark.parametrize("step", ["connect", "apply", "open_store", "inbox", "publisher", "gateway", "note"])
async def test_mesh_fails_at_a_step(makers: Makers, step: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whichever part of a development mesh fails to start, those before it are stopped and the folder is free."""

    async def fail(*arguments: Any, **options: Any) -> None:
        raise StartFailed(f"no {step}")

    def fail_at_once(*arguments: Any) -> None:
        raise StartFailed(f"no {step}")

    mesh = makers.make("dev")
    assert isinstance(mesh, DevMesh)
    with monkeypatch.context() as patch:
        match step:
            case "connect":
                patch.setattr("tidings.dev.mesh.connect", fail)
            case "apply":
                patch.setattr(mesh, "_apply", fail)
            case "open_store":
                patch.setattr(mesh, "_open_store", fail)
            case "inbox":
                patch.setattr(InboxAgent, "_start", fail)
            case "publisher":
                patch.setattr(Publisher, "open", fail)
            case "gateway":
                patch.setattr(Gateway, "_listen", fail)
            case "note":
                patch.setattr(mesh.folder, "note_running", fail_at_once)
        async with nothing_left():
            with pytest.raises(StartFailed, match=f"no {step}"):
                await mesh.start()
            makers.check_no_process()
    # Its lock is free for the next one, which starts where this one ended.
    after = makers.make("dev")
    assert isinstance(after, DevMesh)
    after.folder.open()
    after.folder.close()


# Failing later


@pytest.mark.parametrize("kind", KINDS)
async def test_dead_task_fails_the_service(makers: Makers, kind: str, caplog: pytest.LogCaptureFixture) -> None:
    """Whoever watches a service is told of the error that killed one of its tasks; stopping it works as ever."""

    async def die() -> None:
        raise ZeroDivisionError("on purpose")

    service = makers.make(kind)
    await service.start()
    watcher = asyncio.create_task(service.failed())
    service.spawn(die())
    (error,) = await ended(watcher)
    assert isinstance(error, ZeroDivisionError)
    assert "a background task died" in caplog.text
    await service.stop()


@pytest.mark.parametrize("part", ["_nats", "_inbox", "_gateway"])
async def test_dead_part_fails_the_mesh(makers: Makers, part: str) -> None:
    """A development mesh fails with any of its parts."""

    async def die() -> None:
        raise ZeroDivisionError("on purpose")

    mesh = makers.make("dev")
    await mesh.start()
    getattr(mesh, part).spawn(die())
    (error,) = await ended(asyncio.create_task(mesh.failed()))
    assert isinstance(error, ZeroDivisionError)
    await mesh.stop()


async def test_store_with_a_bug_fails_the_inbox_agent(makers: Makers, monkeypatch: pytest.MonkeyPatch) -> None:
    """An error that no agent expects ends its writer, and thereby the agent; nothing is acknowledged."""

    async def fail(rows: Any) -> None:
        raise ZeroDivisionError("a bug")

    agent = makers.make("inbox")
    with monkeypatch.context() as patch:
        patch.setattr(makers.mesh.store, "append", fail)
        await agent.start()
        await makers.mesh.publish("alice")
        (error,) = await ended(asyncio.create_task(agent.failed()))
        assert isinstance(error, ZeroDivisionError)
        await agent.stop()
    waiting = [
        (await makers.mesh.connection.api(f"CONSUMER.INFO.{topology.notify_stream(number)}.{topology.INBOX}"))
        for number in range(makers.mesh.settings.partitions)
    ]
    assert sum(info["num_ack_pending"] for info in waiting) == 1


# At work


@asynccontextmanager
async def at_work(makers: Makers, **changed: Any) -> AsyncIterator[tuple[Gateway, InboxAgent, list[Device]]]:
    """A gateway with devices that have acknowledged something, and an inbox agent; the block stops them."""
    mesh = makers.mesh
    gateway, inbox = makers.make("gateway", **changed), makers.make("inbox")
    assert isinstance(gateway, Gateway)
    assert isinstance(inbox, InboxAgent)
    await asyncio.gather(gateway.start(), inbox.start())
    users = [f"user{number}" for number in range(5)]
    devices = [device_of(gateway, user) for user in users]
    try:
        for user, device in zip(users, devices, strict=True):
            await device.connect()
            await device.expect(*await mesh.publish(user, 2))
        yield gateway, inbox, devices
    finally:
        await asyncio.gather(*(device.close() for device in devices))
        await asyncio.gather(gateway.stop(), inbox.stop())


def device_of(gateway: Gateway, user: str) -> Device:
    return Device(f"http://127.0.0.1:{gateway.port}/v1/ws", issue(KEY, user, "phone"))


async def no_sessions(mesh: Mesh) -> None:
    """Wait until nats-server has done what the goodbye of a gateway asked for."""
    async with asyncio.timeout(PATIENCE_S):
        while await sessions(mesh):
            await mesh.connection.flush()


@pytest.mark.parametrize("how", ["stop", "drain, stop", "stop during drain"])
async def test_gateway_at_work_leaves_in_peace(makers: Makers, how: str) -> None:
    """Its devices are told to come back, its sessions' consumers are deleted, and their cursors are stored."""
    async with at_work(makers, drain_s=0.3) as (gateway, _, devices):
        assert len(await sessions(makers.mesh)) == len(devices)
        draining = asyncio.create_task(gateway.drain()) if "drain" in how else None
        if draining is not None and how == "stop during drain":
            await devices[0].until(lambda: any(device.close_code for device in devices), "the drain has begun")
            assert not draining.done()
        elif draining is not None:
            await draining
        await gateway.stop()
        await no_sessions(makers.mesh)
        for device in devices:
            assert await device.closed() == 1012
        if draining is not None:
            assert await ended(draining) == [None]
        other = makers.make("gateway")
        assert isinstance(other, Gateway)
        await other.start()
        for number, device in enumerate(devices):
            device.url = f"http://127.0.0.1:{other.port}/v1/ws"
            await device.connect()
            await device.expect(*await makers.mesh.publish(f"user{number}"))
            # What was acknowledged before the stop does not come again.
            makers.mesh.ledger.check_device(f"user{number}", "phone", device.ids, most_copies=1)
        await asyncio.gather(*(device.close() for device in devices))
        await other.stop()
        await no_sessions(makers.mesh)


@pytest.mark.parametrize("how", ["drain", "stop"])
async def test_clients_that_do_not_answer_are_waited_for_together(makers: Makers, how: str) -> None:
    """However many clients leave a goodbye unanswered, a drain or stop waits for them but once, and they are cut."""
    count = 12
    gateway = makers.make("gateway", drain_s=0.5)
    assert isinstance(gateway, Gateway)
    await gateway.start()
    async with aiohttp.ClientSession() as http:
        clients = []
        for number in range(count):
            url = f"http://127.0.0.1:{gateway.port}/v1/ws"
            clients.append(await http.ws_connect(url, protocols=(SUBPROTOCOL,)))
            await clients[-1].send_json({"t": "hello", "token": issue(KEY, f"user{number}", "phone")})
            # aiohttp's client answers a close only when it is read, and from here on nobody reads.
            assert (await clients[-1].receive_json())["t"] == "welcome"
        sockets = [session.socket for session in gateway.hub.by_id.values()]
        # One after the other they would take two seconds each.
        async with asyncio.timeout(count):
            await (gateway.drain() if how == "drain" else gateway.stop())
        for client in clients:
            # One that nobody gave back complains when it is collected, in the middle of some other test.
            client._response.close()
        endings = [socket._ending for socket in sockets if socket is not None]
        assert [ending is not None and ending.done() for ending in endings] == [True] * count
        await gateway.stop()


@pytest.mark.parametrize("moment", ["it is away", "it comes back during the goodbye", "it is found"])
@pytest.mark.parametrize("kind", ["gateway", "inbox", "fanout", "api"])
async def test_agent_stopped_while_nats_is_down(makers: Makers, kind: str, moment: str) -> None:
    """An agent that cannot say goodbye stops all the same, and does not begin anew when the server comes back."""
    nats = makers.mesh.nats
    agent: Any = makers.make(kind)
    await agent.start()
    connection = agent._connection
    found = connection._reconnected_cb
    stopping: list[asyncio.Task[None]] = []

    async def stop_and_go_on() -> None:
        stopping.append(stop(agent))
        await found()

    if moment == "it is found":
        connection._reconnected_cb = stop_and_go_on
        nats.kill()
        await until(lambda: stopping, "the connection is back")
    elif moment == "it is away":
        nats.kill()
        await until(lambda: not connection.is_connected, "the loss is noticed")
        stopping.append(stop(agent))
    else:
        assert nats.pid is not None
        # A server that is frozen does not answer the goodbye, which then waits for it.
        os.kill(nats.pid, signal.SIGSTOP)
        stopping.append(stop(agent))
        await until(lambda: not agent._tasks, "the background tasks have ended")
        nats.kill()
    assert await ended(*stopping) == [None]


@pytest.mark.parametrize("kind", ["gateway", "dev"])
async def test_stop_with_a_connection_that_says_no_hello(
    makers: Makers, kind: str, caplog: pytest.LogCaptureFixture
) -> None:
    """A WebSocket that is open and waits for its first frame is closed like any other, and delays nothing."""
    service: Any = makers.make(kind)
    await service.start()
    url = service.http_url if kind == "dev" else f"http://127.0.0.1:{service.port}"
    async with aiohttp.ClientSession() as http:
        async with http.ws_connect(f"{url}/v1/ws", protocols=(SUBPROTOCOL,)) as socket:
            closing = asyncio.create_task(read_to_the_end(socket))
            await service.drain()
            await service.stop()
            assert await ended(closing) == [1012]
    assert "left behind" not in caplog.text


async def read_to_the_end(socket: aiohttp.ClientWebSocketResponse) -> int | None:
    async for _ in socket:
        pass
    return socket.close_code


# What is no service, and is opened and closed all the same


async def interrupt(open: Awaitable[Any], at: int) -> bool:
    """Cancel what opens something at one of its awaits; returns whether it came so far."""
    interrupted = Interrupted(open, at, lambda: opening.cancel())
    opening = asyncio.create_task(interrupted.run())
    await ended(opening)
    return interrupted.came_so_far


async def test_connecting_is_cancelled_at_every_await(makers: Makers) -> None:
    """A connection to NATS that its maker did not wait for is closed."""
    at, came_so_far = 1, True
    while came_so_far:
        made: list[Connection] = []

        async def make(made: list[Connection] = made) -> None:
            made.append(await connect(makers.mesh.settings, "test"))

        async with nothing_left():
            came_so_far = await interrupt(make(), at)
            for connection in made:
                await connection.finish()
                await connection.finish()
        at += 1
    assert at > 2


async def test_connection_is_closed_in_every_order(makers: Makers) -> None:
    """Finished twice, at the same time, after a close, and while nobody is there."""
    first = await connect(makers.mesh.settings, "test")
    assert await ended(*(asyncio.create_task(first.finish()) for _ in range(2))) == [None, None]
    await first.finish()
    second = await connect(makers.mesh.settings, "test")
    await second.close()
    await second.finish()
    third = await connect(makers.mesh.settings, "test")
    makers.mesh.nats.kill()
    await until(lambda: not third.is_connected, "the loss is noticed")
    await third.finish()
    assert third.is_closed


async def test_connection_is_closed_on_a_server_that_goes(makers: Makers, monkeypatch: pytest.MonkeyPatch) -> None:
    """A server that goes while the last bytes are written to it ends a close like any other."""
    connection = await connect(makers.mesh.settings, "test")
    transport: Any = connection._transport

    async def gone() -> None:
        raise ConnectionResetError("Connection lost")

    monkeypatch.setattr(transport, "drain", gone)
    connection.send("test.last", b"")
    await connection.close()
    assert connection.is_closed
    assert transport._io_writer.transport.is_closing()


async def test_publisher_in_every_order(makers: Makers) -> None:
    """Closed before it is opened, twice, at the same time, with publishes under way, and over a given connection."""
    settings, own = makers.mesh.settings, makers.mesh.connection
    await Publisher(settings).close()
    for given in (settings, own):
        handlers = len(own.handlers)
        publisher = Publisher(given)
        await publisher.open()
        assert not (await publisher.publish("alice", "test.made")).duplicate
        under_way = [asyncio.create_task(publisher.publish("alice", "test.made")) for _ in range(20)]
        await asyncio.sleep(0)
        closes = [asyncio.create_task(publisher.close()) for _ in range(2)]
        assert await ended(*closes) == [None, None]
        await publisher.close()
        # What waits for a confirmation is told at once, not when its time is up.
        async with asyncio.timeout(_SETTLE_S):
            await asyncio.wait(under_way)
        for outcome in await ended(*under_way):
            assert isinstance(outcome, Receipt | PublishUnconfirmed), outcome
        with pytest.raises(StreamUnavailable, match="not open"):
            await publisher.publish("alice", "test.made")
        assert len(own.handlers) == handlers
        assert own.is_connected
    with taken_port() as port:
        nobody = Publisher(Settings(nats_url=f"nats://127.0.0.1:{port}", request_timeout_s=0.2))
        with pytest.raises(StreamUnavailable):
            await nobody.open()
        await nobody.close()


async def test_publisher_that_cannot_listen(makers: Makers, monkeypatch: pytest.MonkeyPatch) -> None:
    """A publisher that has connected and gets no further closes its connection."""

    async def refuse(*_: object) -> None:
        raise ConnectionError("lost")

    monkeypatch.setattr(Connection, "listen", refuse)
    async with nothing_left():
        with pytest.raises(ConnectionError):
            await Publisher(makers.mesh.settings).open()


async def test_publisher_is_cancelled_at_every_await(makers: Makers) -> None:
    """An `async with` that is cancelled on its way in leaves nothing, although its way out is never called."""
    at, came_so_far = 1, True
    while came_so_far:

        async def publish() -> None:
            async with Publisher(makers.mesh.settings) as publisher:
                await publisher.publish("alice", "test.made")

        async with nothing_left():
            came_so_far = await interrupt(publish(), at)
        at += 1
    assert at > 3


@asynccontextmanager
async def gateway_for_clients(makers: Makers) -> AsyncIterator[str]:
    gateway = makers.make("gateway", linger_s=0)
    assert isinstance(gateway, Gateway)
    await gateway.start()
    try:
        yield f"ws://127.0.0.1:{gateway.port}"
    finally:
        await gateway.stop()


def client_of(url: str, key: str = KEY) -> Client:
    return Client(url, issue(key, "alice", "phone"), backoff=Backoff(0.01, 0.02))


async def test_client_in_every_order(makers: Makers) -> None:
    """Closed before it is opened, twice, at the same time, while its loop waits, and refused by the gateway."""
    async with gateway_for_clients(makers) as url:
        early = client_of(url)
        await early.close()
        with pytest.raises(RuntimeError):
            await early.open()
        client = client_of(url)
        await client.open()
        with pytest.raises(RuntimeError):
            await client.open()
        heard: list[str] = []

        async def listen() -> None:
            async for notification in client:
                heard.append(notification.id)

        listening = asyncio.create_task(listen())
        (id,) = await makers.mesh.publish("alice")
        await until(lambda: heard == [id], "the notification has come")
        closes = [asyncio.create_task(client.close()) for _ in range(2)]
        assert await ended(closes[0]) == [None]
        assert all(task.done() for task in client._tasks)
        assert await ended(*closes, listening) == [None, None, None]
        await client.close()
        refused = client_of(url, key=KEY[::-1])
        with pytest.raises(SessionClosed):
            await refused.open()
        await refused.close()
        await no_sessions(makers.mesh)


async def interrupt_client(client: Client, at: int, how: str) -> bool:
    """Use a client, and end that at one of its awaits; returns whether it came so far."""
    closes: list[asyncio.Task[None]] = []

    async def use() -> None:
        async with client:
            await client.count()
            await client.inbox()

    def end() -> None:
        if how == "close":
            closes.append(asyncio.create_task(client.close()))
        else:
            using.cancel()

    interrupted = Interrupted(use(), at, end)
    using = asyncio.create_task(interrupted.run())
    (outcome,) = await ended(using)
    assert outcome is None or isinstance(outcome, asyncio.CancelledError | ConnectionLost), repr(outcome)
    assert await ended(*closes) == [None] * len(closes)
    return interrupted.came_so_far


async def test_client_is_cancelled_or_closed_at_every_await(makers: Makers) -> None:
    """A client that is cancelled on its way in or at work, or closed in the meantime, leaves nothing."""

    async with gateway_for_clients(makers) as url:
        for how in ("cancel", "close"):
            at, came_so_far = 1, True
            while came_so_far:
                async with nothing_left():
                    came_so_far = await interrupt_client(client_of(url), at, how)
                at += 1
            assert at > 4


async def test_client_is_closed_at_every_turn_of_its_loop(makers: Makers) -> None:
    """However far its connection has come, a close in the middle ends it."""
    async with gateway_for_clients(makers) as url:
        for turns in range(0, 60, 3):
            client = client_of(url)
            opening = asyncio.create_task(client.open())
            for _ in range(turns):
                await asyncio.sleep(0)
            await client.close()
            await ended(opening)


# Many lives


ROUNDS: Final = 20
USERS: Final = 3


class Lives:
    """Agents come and go on one mesh while a publisher publishes; what it was confirmed is in the ledger."""

    def __init__(self, mesh: Mesh, seed: int) -> None:
        self.mesh = mesh
        self.makers = Makers(mesh)
        self.random = random.Random(seed)
        self.devices = [Device("", issue(KEY, f"user{number}", "phone")) for number in range(USERS)]
        self.interrupted = 0

    async def one_life(self, number: int, publisher: Publisher, *, kill: bool) -> None:
        """A gateway, an inbox agent, some work; both are stopped wherever that stands after so many awaits."""
        gateway, inbox = self.makers.make("gateway"), self.makers.make("inbox")
        assert isinstance(gateway, Gateway)
        stopped: list[asyncio.Future[Any]] = []
        begun = asyncio.Event()
        ids = [f"r{number}n{count}" for count in range(6)]
        publishing = asyncio.create_task(self._publish(publisher, ids))

        def end() -> None:
            if kill:
                self.mesh.nats.kill()
            # A device that is welcome stays connected; one that is on its way in leaves.
            working.cancel()
            stopped.extend((stop(gateway), stop(inbox)))
            begun.set()

        work = Interrupted(self._work(gateway, inbox, ids), self.random.randrange(1, 24), end)
        working = asyncio.create_task(work.run())
        ends = asyncio.create_task(begun.wait())
        async with asyncio.timeout(PATIENCE_S):
            await asyncio.wait([working, ends], return_when=asyncio.FIRST_COMPLETED)
        self.interrupted += work.came_so_far
        if not work.came_so_far:
            end()
        assert await ended(*stopped) == [None, None]
        await asyncio.gather(*(device.close() for device in self.devices))
        ends.cancel()
        await ended(working, ends)
        assert await ended(publishing) == [None]

    async def _work(self, gateway: Gateway, inbox: Service, ids: list[str]) -> None:
        # One after the other, so that each of their awaits is one to be interrupted at.
        await gateway.start()
        await inbox.start()
        for device in self.devices:
            device.url = f"http://127.0.0.1:{gateway.port}/v1/ws"
            await device.connect()
        for device, id in zip(self.devices, ids, strict=False):
            await device.expect(id)

    async def _publish(self, publisher: Publisher, ids: list[str]) -> None:
        for number, id in enumerate(ids):
            user = f"user{number % USERS}"
            await publisher.publish(user, "test.made", id=id)
            self.mesh.ledger.accept(user, id)

    async def everything_arrives(self) -> None:
        """A last gateway and inbox agent deliver what is due; the ledger is even."""
        gateway, inbox = self.makers.make("gateway"), self.makers.make("inbox")
        assert isinstance(gateway, Gateway)
        await asyncio.gather(gateway.start(), inbox.start())
        accepted = self.mesh.ledger.accepted
        try:
            for number, device in enumerate(self.devices):
                device.url = f"http://127.0.0.1:{gateway.port}/v1/ws"
                await device.connect()
                await device.expect(*accepted[f"user{number}"])
                self.mesh.ledger.check_device(f"user{number}", "phone", device.ids)
                await self.mesh.stored(f"user{number}", *accepted[f"user{number}"])
            await self.mesh.ledger.check_store(self.mesh.store)
        finally:
            await asyncio.gather(*(device.close() for device in self.devices))
            await gateway.stop()
            await inbox.stop()


async def test_many_lives(tmp_path: Path) -> None:
    """Agents stopped at random moments of their lives, nats-server killed in some: nothing is left, nothing is lost."""
    # What an agent had in its hands when it was stopped comes back after these waits.
    async with running_mesh(tmp_path, inbox_ack_wait_s=1.0, linger_s=0.5) as mesh:
        lives = Lives(mesh, seed=1)
        async with nothing_left(mesh.connection):
            # A device is known from its first connection on, and gets all from then.
            await first_visit(lives)
            async with Publisher(mesh.settings) as publisher:
                for number in range(ROUNDS):
                    kill = number % 7 == 3
                    await lives.one_life(number, publisher, kill=kill)
                    if kill:
                        async with asyncio.timeout(PATIENCE_S):
                            await mesh.nats.answering()
                        await until(lambda: mesh.connection.is_connected, "the test is connected again")
            assert lives.interrupted > ROUNDS / 2, "most lives are cut short"
            assert sum(map(len, mesh.ledger.accepted.values())) == 6 * ROUNDS
            await lives.everything_arrives()


async def first_visit(lives: Lives) -> None:
    gateway = lives.makers.make("gateway")
    assert isinstance(gateway, Gateway)
    await gateway.start()
    for device in lives.devices:
        device.url = f"http://127.0.0.1:{gateway.port}/v1/ws"
        await device.connect()
        await device.close()
    await gateway.stop()
