"""Kills, freezes, cuts and restarts under load: nothing accepted is lost, and everything recovers by itself."""

from __future__ import annotations

import asyncio
import socket
import sqlite3
from contextlib import suppress

import orjson

from support.clock import until
from support.ledger import stored_ids
from support.mesh import KEY, PARTITIONS, Mesh
from support.proxy import Proxy
from tidings.identity import issue
from tidings.wire.errors import StreamUnavailable


async def test_gateway_killed_with_unacknowledged(mesh: Mesh) -> None:
    """kill -9 of the gateway: what was not acknowledged comes again elsewhere, what was does not."""
    one, two, _ = await mesh.gateway(ack_wait_s=30), await mesh.gateway(ack_wait_s=30), await mesh.inbox()
    alice = await mesh.online(one, "alice", auto_ack=False)
    sent = await mesh.publish("alice", 10)
    await alice.expect(*sent)
    await alice.ack(*(item["pos"] for item in alice.items[:4]), alice.items[7]["pos"])
    await alice.ask("count")
    floor = alice.items[3]["pos"]
    await until_cursor(mesh, "alice", floor)
    await one.kill_agent()
    alice.items.clear()
    alice.auto_ack = True
    alice.url = two.url
    await alice.connect()
    assert alice.welcome["pos"] == floor
    meanwhile = await mesh.publish("alice", 2)
    expected = [*sent[4:7], *sent[8:], *meanwhile]
    await alice.expect(*expected)
    assert alice.ids == expected
    assert [item["try"] for item in alice.items] == [2] * 5 + [1] * 2


async def test_device_moves_in_peace(mesh: Mesh) -> None:
    """A device that connects to another gateway brings its cursor along, and its old socket closes with 4409."""
    one, two, _ = await mesh.gateway(cursor_flush_s=60), await mesh.gateway(), await mesh.inbox()
    alice = await mesh.online(one, "alice")
    first = await mesh.publish("alice", 5)
    await alice.expect(*first)
    await alice.ask("count")
    moved = await mesh.online(two, "alice")
    assert await alice.closed() == 4409
    second = await mesh.publish("alice", 5)
    await moved.expect(*second)
    # The first gateway's cursor was never written: it was handed over.
    assert moved.ids == second
    back = await mesh.online(one, "alice")
    assert await moved.closed() == 4409
    third = await mesh.publish("alice", 5)
    await back.expect(*third)
    assert back.ids == third


async def test_device_moves_while_its_gateway_is_frozen(mesh: Mesh) -> None:
    """A frozen gateway cannot be asked: the stored cursor counts, and the frozen one gives up when it thaws."""
    one, two, _ = await mesh.gateway(), await mesh.gateway(), await mesh.inbox()
    old = await mesh.online(one, "alice")
    first = await mesh.publish("alice", 3)
    await old.expect(*first)
    await until_cursor(mesh, "alice", old.items[-1]["pos"])
    one.freeze()
    new = await mesh.online(two, "alice")
    second = await mesh.publish("alice", 3)
    await new.expect(*second)
    one.thaw()
    assert await old.closed() == 4409
    third = await mesh.publish("alice", 3)
    await new.expect(*third)
    mesh.ledger.check_device("alice", "phone", [*old.ids, *new.ids])
    assert new.close_code is None


async def test_same_device_twice_at_the_same_instant(mesh: Mesh) -> None:
    """Of two connections of one device that come together, on two gateways, one is left standing."""
    one, two, _ = await mesh.gateway(), await mesh.gateway(), await mesh.inbox()
    for _ in range(5):
        pair = [await mesh.device(gateway, "alice") for gateway in (one, two)]
        await asyncio.gather(*(device.connect() for device in pair))
        await until(lambda pair=pair: sum(d.close_code is None for d in pair) == 1, "one is left")
        (standing,) = (device for device in pair if device.close_code is None)
        (loser,) = (device for device in pair if device.close_code is not None)
        assert loser.close_code == 4409
        await standing.expect(*await mesh.publish("alice"))
        await standing.leave()


async def test_inbox_agent_killed_between_store_and_ack(mesh: Mesh) -> None:
    """Rows that were stored and not acknowledged are stored again by another agent: once in the inbox."""
    stuck = await mesh.stuck_inbox()
    sent = await mesh.publish("alice", 5)
    await stuck.said(r"stored \d+ rows")
    assert await stored_ids(mesh.store, "alice")
    await stuck.kill_agent()
    # The server redelivers what the dead agent had after ack_wait; the test does not wait for the default minute.
    for partition in range(PARTITIONS):
        stream = f"NOTIFY_{partition}"
        config = (await mesh.connection.api(f"CONSUMER.INFO.{stream}.inbox"))["config"]
        body = {"stream_name": stream, "config": {**config, "ack_wait": 500_000_000}, "action": "update"}
        await mesh.connection.api(f"CONSUMER.CREATE.{stream}.inbox", body)
    await mesh.inbox()
    more = await mesh.publish("alice", 5)
    await mesh.stored("alice", *sent, *more)
    await mesh.floors_announced()
    await mesh.ledger.check_store(mesh.store)


async def test_inbox_agent_killed_under_load(mesh: Mesh) -> None:
    """kill -9 of one of two inbox agents in the middle of a thousand: all are stored once."""
    first, _ = await mesh.inbox(inbox_batch=8), await mesh.inbox(inbox_batch=8)
    half = await asyncio.gather(*(mesh.publish(f"user{n % 20}") for n in range(500)))
    await first.kill_agent()
    rest = await asyncio.gather(*(mesh.publish(f"user{n % 20}") for n in range(500)))
    assert len(half) + len(rest) == 1000
    for stream in range(PARTITIONS):
        config = (await mesh.connection.api(f"CONSUMER.INFO.NOTIFY_{stream}.inbox"))["config"]
        body = {"stream_name": f"NOTIFY_{stream}", "config": {**config, "ack_wait": 500_000_000}, "action": "update"}
        await mesh.connection.api(f"CONSUMER.CREATE.NOTIFY_{stream}.inbox", body)
    for user, ids in mesh.ledger.accepted.items():
        await mesh.stored(user, *ids)
    await mesh.ledger.check_store(mesh.store)


async def test_nats_restarted_under_load(mesh: Mesh) -> None:
    """nats-server killed while 50 devices are served: every session recovers by itself, nothing accepted is lost."""
    gateway, _ = await mesh.gateway(), await mesh.inbox()
    users = [f"user{number}" for number in range(50)]
    devices = [await mesh.online(gateway, user) for user in users]
    stop = asyncio.Event()

    async def load(user: str) -> None:
        while not stop.is_set():
            # What was not confirmed is not entered: it may or may not be there.
            with suppress(StreamUnavailable):
                await mesh.publish(user)
            await asyncio.sleep(0.02)

    loads = [asyncio.create_task(load(user)) for user in users[:20]]
    for _ in range(2):
        await until(lambda: all(len(d.items) > 10 for d in devices[:20]), "a flow")
        before = [len(device.items) for device in devices[:20]]
        mesh.nats.kill()
        await mesh.nats.answering()
        await until(
            lambda before=before: all(len(d.items) > n + 10 for d, n in zip(devices[:20], before, strict=True)),
            "the flow goes on",
        )
    stop.set()
    await asyncio.gather(*loads)
    for user, device in zip(users, devices, strict=True):
        await mesh.publish(user)
        await device.expect(*mesh.ledger.accepted[user])
        assert device.close_code is None
    for user in users:
        await mesh.stored(user, *mesh.ledger.accepted[user])
    await mesh.ledger.check_store(mesh.store)


async def test_tcp_cut_without_fin(mesh: Mesh) -> None:
    """A connection that went silent is found by its heartbeat; the device that comes back misses nothing."""
    gateway, _ = await mesh.gateway(heartbeat_s=0.5, linger_s=30), await mesh.inbox()
    async with Proxy(gateway.port) as proxy:
        alice = await mesh.online(gateway, "alice")
        await alice.leave()
        alice.url = f"http://127.0.0.1:{proxy.port}/v1/ws"
        await alice.connect()
        await alice.expect(*await mesh.publish("alice"))
        proxy.go_silent()
        lost = await mesh.publish("alice", 5)
        await gateway.said("does not answer: its socket is dropped")
        await alice.connect()
        await alice.expect(*lost)
        mesh.ledger.check_device("alice", "phone", alice.ids)
        await alice.close()


async def test_silent_old_socket_gives_way(mesh: Mesh) -> None:
    """A device that comes back before its dead socket is noticed takes its session over at once."""
    gateway, _ = await mesh.gateway(ack_wait_s=30), await mesh.inbox()
    async with Proxy(gateway.port) as proxy:
        alice = await mesh.online(gateway, "alice", auto_ack=False)
        alice.url = f"http://127.0.0.1:{proxy.port}/v1/ws"
        await alice.connect()
        proxy.go_silent()
        lost = await mesh.publish("alice", 3)
        await asyncio.wait_for(alice.connect(), 10)
        await alice.expect(*lost)
        assert alice.ids == lost
        await alice.close()


async def test_slow_reader_is_closed_and_harms_nobody(mesh: Mesh) -> None:
    """A client that does not read is closed at its limits; the others are served meanwhile."""
    gateway, _ = await mesh.gateway(write_buffer_bytes=16_384, write_stall_s=0.5, ack_wait_s=30), await mesh.inbox()
    other = await mesh.online(gateway, "bob")
    slow = socket.socket()
    slow.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
    slow.setblocking(False)
    loop = asyncio.get_running_loop()
    await loop.sock_connect(slow, ("127.0.0.1", gateway.port))
    await loop.sock_sendall(slow, handshake() + masked(orjson.dumps(hello("alice", window=256))))
    greeting = b""
    while b'"welcome"' not in greeting:
        greeting += await loop.sock_recv(slow, 4096)
    publishing = asyncio.gather(*(mesh.publish("alice", 25, size=15_000) for _ in range(8)))
    seen = await mesh.publish("bob", 20)
    await other.expect(*seen)
    await publishing
    await gateway.said("reads too slowly: closed")
    await other.expect(*await mesh.publish("bob", 5))
    slow.close()
    # The device itself lost nothing: it reads now, and gets everything.
    alice = await mesh.online(gateway, "alice")
    await alice.expect(*mesh.ledger.accepted["alice"])


async def test_big_burst_to_a_client_that_reads(mesh: Mesh) -> None:
    """A window of large notifications is more than the write buffer: it is sent as the client reads."""
    gateway, _ = await mesh.gateway(write_buffer_bytes=16_384, linger_s=0), await mesh.inbox()
    alice = await mesh.online(gateway, "alice", window=256)
    await alice.leave()
    await asyncio.gather(*(mesh.publish("alice", 10, size=15_000) for _ in range(20)))
    await mesh.stored("alice", *mesh.ledger.accepted["alice"])
    await mesh.floors_announced()
    await alice.connect()
    await alice.expect(*mesh.ledger.accepted["alice"])
    assert alice.close_code is None


async def test_gateway_stops_in_order(mesh: Mesh) -> None:
    """SIGTERM: clients get `bye` and 1012, cursors are written, the next gateway goes on without a copy."""
    one, two, _ = await mesh.gateway(), await mesh.gateway(), await mesh.inbox()
    devices = [await mesh.online(one, f"user{number}") for number in range(20)]
    for number, device in enumerate(devices):
        await device.expect(*await mesh.publish(f"user{number}", 3))
        await device.ask("count")
    assert await one.stop() == 0
    for number, device in enumerate(devices):
        assert await device.closed() == 1012
        bye = await device.expect_frame("bye", reconnect=True)
        assert bye["after_ms"] >= 0
        device.url = two.url
        await device.connect()
        await device.expect(*await mesh.publish(f"user{number}"))
        mesh.ledger.check_device(f"user{number}", "phone", device.ids, most_copies=1)


# Helpers of this suite


def hello(user: str, **more: object) -> dict[str, object]:
    return {"t": "hello", "token": issue(KEY, user, "phone"), **more}


def handshake() -> bytes:
    return (
        b"GET /v1/ws HTTP/1.1\r\nHost: x\r\nUpgrade: websocket\r\nConnection: Upgrade\r\n"
        b"Sec-WebSocket-Version: 13\r\nSec-WebSocket-Key: dGhlIHNhbXBsZSBub25jZQ==\r\n\r\n"
    )


def masked(payload: bytes) -> bytes:
    """A text frame with a zero mask."""
    assert 126 <= len(payload) < 65_536
    return bytes((0x81, 0x80 | 126)) + len(payload).to_bytes(2, "big") + bytes(4) + payload


async def until_cursor(mesh: Mesh, user: str, floor: str) -> None:
    """Wait until the store's cursor of the user's phone has come to `floor`."""

    def come() -> bool:
        with sqlite3.connect(mesh.folder / "tidings.db") as db:
            row = db.execute("SELECT incarnation, sequence FROM cursors WHERE user = ?", (user,)).fetchone()
        db.close()
        return row is not None and f"u{row[0]:x}.{row[1]}" == floor

    await until(come, f"the cursor of {user} is {floor}")
