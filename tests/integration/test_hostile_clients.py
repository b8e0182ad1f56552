"""Hostile clients: each way to take more than one's share ends with its code, and costs nobody else anything."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import AsyncExitStack
from typing import Any

import pytest
from websockets.asyncio.client import connect

from support.clock import PATIENCE_S, until
from support.device import Device
from support.mesh import KEY, Mesh
from support.rawclient import PING, PONG, TEXT, UPGRADE, RawClient, frame
from tidings.gateway import keeper
from tidings.gateway.agent import Gateway
from tidings.identity import issue
from tidings.runtime.settings import Settings

Start = Callable[..., Awaitable[Gateway]]
LIMITS = {"client_frames_per_s": 1.0, "client_frames_burst": 100, "client_bytes_per_s": 1000}


@pytest.fixture
async def start(mesh: Mesh) -> AsyncIterator[Start]:
    """Starts gateways in this process, with changed settings."""
    async with AsyncExitStack() as stack:

        async def started(**changed: Any) -> Gateway:
            values = {name: getattr(mesh.settings, name) for name in Settings.__slots__}
            gateway = Gateway(Settings(**{**values, "linger_s": 0.0, **changed}), mesh.store)
            await gateway.start()
            stack.push_async_callback(gateway.stop)
            return gateway

        yield started


def device(gateway: Gateway, user: str, name: str | None = "d", **options: Any) -> Device:
    return Device(f"http://127.0.0.1:{gateway.port}/v1/ws", issue(KEY, user), device=name, **options)


FLOODS = {
    "pings": frame(b"", PING) * 200,
    "pongs nobody asked for": frame(b"", PONG) * 200,
    "ping frames": frame('{"t":"ping"}') * 200,
    "requests": frame('{"t":"count","ref":1}') * 200,
    "pages": frame('{"t":"inbox","ref":1,"limit":200}') * 40,
    "acks that name nothing": frame('{"t":"ack","pos":["u1.1"]}') * 200,
    "long acks that name nothing": frame(json.dumps({"t": "ack", "pos": ["u1.1"] * 1000})) * 3,
    "empty acks": frame('{"t":"ack","pos":[]}') * 200,
    "acks up to nothing": frame('{"t":"ack","upto":"u1.1"}') * 200,
    "mistakes": frame('{"t":"dance","ref":1}') * 200,
}


async def test_too_many_frames(start: Start) -> None:
    """Past the burst and the grace the connection ends with 4429, and the farewell says when to come back."""
    gateway = await start(**LIMITS)

    async def flooded(name: str, flood: bytes) -> None:
        async with RawClient(gateway.port) as mallory:
            assert (await mallory.hello(issue(KEY, name), device="d"))["t"] == "welcome"
            mallory.send(flood)
            assert await mallory.ended() == 4429, name
        assert mallory.frames[-2]["code"] == "too_many_requests", name
        assert mallory.frames[-1]["t"] == "bye", name
        assert mallory.frames[-1]["reconnect"] is True

    await asyncio.gather(*(flooded(name, flood) for name, flood in FLOODS.items()))
    await until(lambda: not len(gateway.hub), "no session is left")


async def test_the_limit_is_the_users(start: Start) -> None:
    """A new connection, of whichever device, is no new account; what is owed is named, and others owe nothing."""
    gateway = await start(**LIMITS)
    async with RawClient(gateway.port) as mallory, RawClient(gateway.port) as again, RawClient(gateway.port) as other:
        await mallory.hello(issue(KEY, "mallory"), device="d")
        mallory.send(FLOODS["ping frames"])
        assert await mallory.ended() == 4429
        assert (await again.hello(issue(KEY, "mallory"), device="e"))["code"] == "too_many_requests"
        bye = await again.until("bye")
        assert 1000 <= bye["after_ms"] <= 40_000
        assert await again.ended() == 4429
        assert (await other.hello(issue(KEY, "alice"), device="d"))["t"] == "welcome"


async def test_acknowledging_is_free(start: Start, mesh: Mesh) -> None:
    """Who acknowledges what it was sent, one by one, is never too much: the gateway decides how many there are."""
    gateway = await start(**{**LIMITS, "client_frames_burst": 20, "client_bytes_per_s": 100_000})
    alice = device(gateway, "alice")
    await alice.connect()
    ids = await mesh.publish("alice", 200)
    await alice.expect(*ids)
    assert (await alice.ask("count"))["t"] == "ok"
    assert sum(item["try"] for item in alice.items) == len(ids)
    await alice.close()


async def test_requests_are_refused_before_the_end(start: Start) -> None:
    """Somewhat beyond the burst a request is answered with its code, and the connection stays."""
    gateway = await start(client_frames_per_s=50, client_frames_burst=100)
    async with RawClient(gateway.port) as client:
        await client.hello(issue(KEY, "alice"), device="d")
        client.send(frame('{"t":"ping"}') * 89 + frame('{"t":"mark","ref":"m","as":"read","pos":[]}') * 20)
        assert (await client.until("error"))["code"] == "too_many_requests"
        assert client.close_code is None


@pytest.mark.parametrize("size", [100, 60_000])
async def test_too_many_bytes(start: Start, size: int) -> None:
    """Bytes have a limit of their own, in many small frames and in a few large ones."""
    gateway = await start(client_bytes_per_s=100, client_bytes_burst=100_000, client_frames_burst=100_000)
    async with RawClient(gateway.port) as mallory:
        await mallory.hello(issue(KEY, "mallory"), device="d")
        mallory.send(frame(json.dumps({"t": "ping", "pad": "x" * size})) * (1 + 150_000 // size))
        assert await mallory.ended() == 4429


async def test_a_frame_in_pieces(start: Start) -> None:
    """A frame that comes byte by byte counts by its pieces: 1-byte writes wake the gateway as often as frames do."""
    gateway = await start(**LIMITS)
    async with RawClient(gateway.port) as mallory:
        await mallory.hello(issue(KEY, "mallory"), device="d")
        for byte in frame(json.dumps({"t": "ping", "pad": "x" * 400})):
            mallory.send(bytes((byte,)))
            # What the gateway has not read yet comes to it in one piece.
            await asyncio.sleep(0.001)
        assert await mallory.ended() == 4429


async def test_fragments_without_end(start: Start) -> None:
    """A message that never ends is as long as a frame may be, and no longer."""
    gateway = await start(frame_max_bytes=4096)
    async with RawClient(gateway.port) as mallory:
        await mallory.hello(issue(KEY, "mallory"), device="d")
        mallory.send(frame(b"x" * 1000, TEXT, final=False) + frame(b"x" * 1000, 0, final=False) * 10)
        assert await mallory.ended() == 4413


async def test_compressed_frames(start: Start) -> None:
    """No compression is offered, so a frame that claims one breaks the protocol: nothing is ever inflated."""
    gateway = await start()
    async with RawClient(gateway.port) as mallory:
        await mallory.hello(issue(KEY, "mallory"), device="d")
        mallory.send(frame(b"\x00" * 100, TEXT, reserved=4))
        assert await mallory.ended() == 4400


async def test_a_flood_is_left_in_the_kernel(start: Start) -> None:
    """Who goes on after the end is not read: the flood waits in its own buffers."""
    gateway = await start(**LIMITS, client_bytes_burst=100_000)
    async with RawClient(gateway.port) as mallory:
        await mallory.hello(issue(KEY, "mallory"), device="d")
        mallory.send(frame('{"t":"ping"}') * 2_000_000)
        await mallory.until("bye")
        assert mallory.unsent > 10_000_000
        assert await mallory.ended() == 4429


async def test_slow_handshakes(start: Start) -> None:
    """A request that does not come to its end, and a connection that says nothing, end in the time of a hello."""
    gateway = await start(hello_timeout_s=0.3)
    async with RawClient(gateway.port) as silent, RawClient(gateway.port) as slow, RawClient(gateway.port) as half:
        slow.send(UPGRADE[:40])
        await half.upgrade()
        half.send(frame('{"t":"hello"}')[:5])
        assert await silent.answered() == b""
        assert await slow.answered() == b""
        assert await half.ended() == 4408


@pytest.mark.parametrize(
    "request_",
    [
        UPGRADE.replace(b"Host: gateway", b"Host: " + b"x" * 20_000),
        UPGRADE.replace(b"/v1/ws", b"/v1/ws?" + b"x" * 20_000),
        UPGRADE.replace(b"Host: gateway", b"\r\n".join(b"X-%d: y" % number for number in range(500))),
        b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03",
    ],
    ids=["long header", "long path", "many headers", "a TLS hello"],
)
async def test_large_handshakes(start: Start, request_: bytes, caplog: pytest.LogCaptureFixture) -> None:
    """What is no request of a sane size is answered with 400 and closed, and fills no log with tracebacks."""
    gateway = await start()
    async with RawClient(gateway.port) as mallory:
        mallory.send(request_ + b"\r\n\r\n")
        status, _, _ = (await mallory.answered()).partition(b"\r\n")
    assert b" 400 " in status
    assert [record for record in caplog.records if record.levelname == "ERROR"] == []


async def test_strangers_keep_nobody_out(start: Start, monkeypatch: pytest.MonkeyPatch) -> None:
    """Above the limit of silent connections the oldest goes, and who says hello is welcome."""
    monkeypatch.setattr("tidings.runtime.porch._FAIR_S", 0.0)
    gateway = await start(strangers_max=10)
    async with AsyncExitStack() as stack:
        silent = [await stack.enter_async_context(RawClient(gateway.port)) for _ in range(15)]
        for client in silent[5:8]:
            await client.upgrade()
        for number in range(3):
            alice = await stack.enter_async_context(RawClient(gateway.port))
            assert (await alice.hello(issue(KEY, f"alice-{number}")))["t"] == "welcome"
        assert [await client.answered() for client in silent[:5]] == [b""] * 5


async def test_too_many_strangers_at_once(start: Start) -> None:
    """Where all have come within a second, the newest is asked to come back: 503, before any upgrade."""
    gateway = await start(strangers_max=10)
    async with AsyncExitStack() as stack:
        clients = [await stack.enter_async_context(RawClient(gateway.port)) for _ in range(11)]
        answer = await clients[-1].answered()
        assert answer.startswith(b"HTTP/1.1 503 ")
        assert b"Retry-After: " in answer


async def test_devices_of_a_user(start: Start) -> None:
    """One device too many is refused with its code; one that only lingers makes room, the longest gone first."""
    gateway = await start(devices_max=3, linger_s=30)
    devices = [device(gateway, "alice", f"phone-{number}") for number in range(3)]
    for one in devices:
        await one.connect()
    late = device(gateway, "alice", "phone-3")
    await late.connect()
    assert await late.closed() == 4430
    assert (await late.expect_frame("bye"))["after_ms"] >= 30_000
    for one in (devices[1], devices[0]):
        await one.cut()
        await until(lambda: sum(s.socket is not None for s in gateway.hub.by_id.values()) < 3, "a device is gone")
    await until(lambda: len(gateway.hub.lingering) == 2, "two devices linger")
    assert (await late.connect())["t"] == "welcome"
    assert sorted(session.device for session in gateway.hub.by_id.values()) == ["phone-0", "phone-2", "phone-3"]
    for one in (*devices, late):
        await one.close()


async def test_no_memory_from_the_start(start: Start) -> None:
    """What the kernel says of the process is what counts: with a limit below it nobody is let in."""
    gateway = await start(memory_max_bytes=1_000_000)
    async with RawClient(gateway.port) as client:
        assert (await client.hello(issue(KEY, "alice")))["code"] == "overloaded"
        assert await client.ended() == 4503


async def test_memory_has_an_end(start: Start, mesh: Mesh, monkeypatch: pytest.MonkeyPatch) -> None:
    """With more memory in use than may be, new sessions are refused, known ones go on, and who does not read goes."""
    used = [1000]
    monkeypatch.setattr(keeper, "resident_bytes", lambda: used[-1])
    monkeypatch.setattr(keeper, "_LOOK_S", 0.05)
    gateway = await start(write_buffer_bytes=16_777_216, linger_s=30, window=256, client_bytes_per_s=10**6)
    alice, slow = device(gateway, "alice"), device(gateway, "slow", auto_ack=False)
    await alice.connect()
    await slow.connect()
    slow.pause()
    await mesh.publish("slow", 256, size=15_000)
    (session,) = (one for one in gateway.hub.by_id.values() if one.user == "slow")
    while session.unread_bytes < 100_000:
        # What fits into the kernel's buffers is no memory of ours: redeliveries fill them.
        session.resend()
        await asyncio.sleep(0.01)
    used.append(2**50)
    await until(lambda: session.socket is None, "who does not read is closed")
    slow.resume()
    assert await slow.closed() == 4410
    late = device(gateway, "bob")
    await late.connect()
    assert await late.closed() == 4503
    await alice.expect(*await mesh.publish("alice"))
    await alice.cut()
    assert (await alice.connect())["t"] == "welcome"
    used.append(1000)
    await until(lambda: not gateway.hub.overloaded, "there is memory again")
    assert (await late.connect())["t"] == "welcome"
    for one in (alice, slow, late):
        await one.close()


async def test_who_asks_and_does_not_read(start: Start, mesh: Mesh) -> None:
    """Answers that nobody reads do not pile up: the client is closed, and at most one page waited beyond the buffer."""
    await mesh.inbox()
    gateway = await start(
        write_buffer_bytes=65_536, write_stall_s=0.5, client_frames_per_s=10_000, client_frames_burst=100_000
    )
    ids = await mesh.publish("mallory", 100, size=15_000)
    await mesh.stored("mallory", *ids)
    async with RawClient(gateway.port, read_limit=1024) as mallory:
        await mallory.hello(issue(KEY, "mallory"), device="d")
        (session,) = gateway.hub.by_id.values()
        asked = most = 0
        # As many as may be under way, before the first of them is answered.
        mallory.send(frame('{"t":"inbox","ref":"all","limit":100}') * gateway.hub.settings.requests_per_session)
        while session.socket is not None:
            mallory.send(frame(json.dumps({"t": "inbox", "ref": asked, "limit": 100})))
            asked += 1
            most = max(most, session.unread_bytes)
            await asyncio.sleep(0.002)
        assert 65_536 < most < 100 * 16_384 + 2 * 65_536
    await until(lambda: not len(gateway.hub), "no session is left")


async def test_an_outside_client(start: Start, mesh: Mesh) -> None:
    """A whole conversation with a WebSocket client that is not ours: hello, delivery, ack, inbox, marks, goodbye."""
    await mesh.inbox()
    gateway = await start(linger_s=30)
    url = f"ws://127.0.0.1:{gateway.port}/v1/ws"
    async with asyncio.timeout(PATIENCE_S):
        async with connect(url, subprotocols=["tidings.v1.json"]) as socket:  # type: ignore[list-item]
            assert socket.subprotocol == "tidings.v1.json"

            async def ask(**members: Any) -> dict[str, Any]:
                await socket.send(json.dumps(members))
                while True:
                    answer: dict[str, Any] = json.loads(await socket.recv())
                    if answer["t"] not in ("count", "state"):
                        return answer

            welcome = await ask(t="hello", token=issue(KEY, "alice"), device="outside", window=8)
            assert welcome["t"] == "welcome"
            assert welcome["window"] == 8
            assert (await ask(t="sub", ref=1, topics=["post.42"])) == {"t": "ok", "ref": 1}
            ids = await mesh.publish("alice", 3)
            await mesh.stored("alice", *ids)
            items: list[dict[str, Any]] = []
            while len(items) < 3:
                items += json.loads(await socket.recv())["items"]
            assert [item["n"]["id"] for item in items] == ids
            await socket.send(json.dumps({"t": "ack", "pos": [item["pos"] for item in items]}))
            assert (await ask(t="count", ref=2))["unread"] == 3
            assert (await ask(t="mark", ref=3, pos="all", **{"as": "read"}))["t"] == "ok"
            page = await ask(t="inbox", ref=4, limit=10)
            assert [(item["n"]["id"], item["read"]) for item in page["items"]] == [(id, True) for id in ids[::-1]]
            assert (await ask(t="subs", ref=5))["topics"] == ["post.42"]
            await (await socket.ping())
        assert socket.close_code == 1000
        # A goodbye of 1000 lets nothing linger, and what was acknowledged does not come again.
        await until(lambda: not len(gateway.hub), "no session is left")
        async with connect(url, subprotocols=["tidings.v1.json"]) as socket:  # type: ignore[list-item]
            await socket.send(json.dumps({"t": "hello", "token": issue(KEY, "alice"), "device": "outside"}))
            assert json.loads(await socket.recv())["pos"] == items[-1]["pos"]
            await socket.send(b"binary")
            await socket.wait_closed()
            assert socket.close_code == 4400
