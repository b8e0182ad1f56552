"""Gateways that leave, in peace or not, and devices that come back all at once: none is stranded, nothing is lost."""

from __future__ import annotations

import asyncio
import random
import signal
import sqlite3
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager, closing
from pathlib import Path
from typing import Final

import aiohttp

from support.clock import PATIENCE_S, until
from support.light import Light
from support.mesh import KEY, Agent, Mesh, issue

RESTART: Final = 1012
OVERLOADED: Final = 4503


def light(user: str) -> Light:
    return Light(issue(KEY, user, "phone"))


@asynccontextmanager
async def crowd(count: int, port: Callable[[], int]) -> AsyncIterator[dict[str, Light]]:
    """So many devices that stay connected, each of a user of its own."""
    devices = {f"user{number}": light(f"user{number}") for number in range(count)}
    await asyncio.gather(*(device.connect(port()) for device in devices.values()))
    staying = [asyncio.create_task(device.stay(port)) for device in devices.values()]
    try:
        yield devices
    finally:
        for task in staying:
            task.cancel()
        await asyncio.wait(staying)
        for device in devices.values():
            device.close()
    for task in staying:
        assert task.cancelled(), task.exception()


@asynccontextmanager
async def load(mesh: Mesh, users: list[str]) -> AsyncIterator[None]:
    """Notifications to all of them, in turn, eight under way at a time, until the block ends."""
    over = asyncio.Event()

    async def publish() -> None:
        while not over.is_set():
            await mesh.publish(random.choice(users))

    publishing = [asyncio.create_task(publish()) for _ in range(8)]
    try:
        yield
    finally:
        over.set()
    await asyncio.gather(*publishing)


async def all_came(mesh: Mesh, devices: dict[str, Light]) -> None:
    """The ledger: every device has all that was accepted for its user, and so has the inbox."""
    for user, device in devices.items():
        await device.expect(mesh.ledger.accepted[user], 2 * PATIENCE_S)
        mesh.ledger.check_device(user, "phone", device.ids)
    for user, ids in mesh.ledger.accepted.items():
        await mesh.stored(user, *ids)
    await mesh.ledger.check_store(mesh.store)


async def all_back(devices: dict[str, Light]) -> None:
    await until(lambda: not any(device.lost.is_set() for device in devices.values()), "every device is back")


async def test_rolling_restart_under_load(mesh: Mesh) -> None:
    """Two gateways stopped and started again, one after the other, with 300 devices: all are back, nothing is lost."""
    gateways = [await mesh.gateway(drain_per_s=200), await mesh.gateway(drain_per_s=200)]
    await mesh.inbox()
    open_to: list[Agent] = list(gateways)
    async with crowd(300, lambda: random.choice(open_to).port) as devices:
        async with load(mesh, list(devices)):
            for gateway in gateways:
                open_to.remove(gateway)
                assert await gateway.stop() == 0
                open_to.append(await mesh.gateway(drain_per_s=200))
                await all_back(devices)
        await all_came(mesh, devices)
        assert all(set(device.codes) == {RESTART} for device in devices.values())
        # Every device was on the second one when its turn came.
        assert sum(len(device.byes) for device in devices.values()) > len(devices)


async def test_notice(mesh: Mesh) -> None:
    """For `drain_notice_s` a gateway that was told to stop is not ready, and serves old devices and new ones."""
    gateway = await mesh.gateway(drain_notice_s=300)
    await mesh.inbox()
    alice = await mesh.online(gateway, "alice")
    # A supervisor may say it twice.
    gateway.process.send_signal(signal.SIGTERM)
    gateway.process.send_signal(signal.SIGTERM)
    async with aiohttp.ClientSession() as http:

        async def status() -> int:
            async with http.get(f"http://127.0.0.1:{gateway.port}/readyz") as response:
                return response.status

        async with asyncio.timeout(PATIENCE_S):
            while await status() != 503:
                await asyncio.sleep(0.01)
        bob = await mesh.online(gateway, "bob")
        await alice.expect(*await mesh.publish("alice"))
        await bob.expect(*await mesh.publish("bob"))
        assert await status() == 503
    # Who sits at the terminal need not wait: what is stored is enough to go on from.
    gateway.process.send_signal(signal.SIGINT)
    assert await gateway.process.wait() == 130
    other = await mesh.gateway()
    for device, user in ((alice, "alice"), (bob, "bob")):
        await device.closed()
        device.url = other.url
        await device.connect()
        await device.expect(*await mesh.publish(user))
        mesh.ledger.check_device(user, "phone", device.ids)


async def test_killed_in_the_middle_of_leaving(mesh: Mesh) -> None:
    """kill -9 when some were sent away: those and the others are back elsewhere, and nothing is lost."""
    first = await mesh.gateway(drain_per_s=10, drain_s=300)
    other = await mesh.gateway()
    await mesh.inbox()
    ports = [first.port]
    async with crowd(60, lambda: ports[0]) as devices:
        async with load(mesh, list(devices)):
            ports[0] = other.port
            first.process.send_signal(signal.SIGTERM)
            await until(lambda: sum(len(device.byes) for device in devices.values()) >= 5, "some are sent away")
            await first.kill_agent()
            await all_back(devices)
        told = [device for device in devices.values() if device.byes]
        assert 5 <= len(told) < len(devices)
        await all_came(mesh, devices)


async def test_leaving_while_nats_is_down(mesh: Mesh) -> None:
    """Devices are sent away all the same; the consumers went with the server, and nothing else did."""
    gateway = await mesh.gateway()
    await mesh.inbox()
    ports = [gateway.port]
    async with crowd(20, lambda: ports[0]) as devices:
        async with load(mesh, list(devices)):
            await until(lambda: all(device.ids for device in devices.values()), "it flows")
        await mesh.stop_nats()
        assert await gateway.stop() == 0
        assert all(set(device.codes) == {RESTART} for device in devices.values())
        await mesh.start_nats()
        await until(lambda: mesh.connection.is_connected, "the test has NATS again")
        ports[0] = (await mesh.gateway()).port
        async with load(mesh, list(devices)):
            await all_back(devices)
        await all_came(mesh, devices)


async def test_leaving_while_the_store_is_locked(mesh: Mesh) -> None:
    """Cursors that cannot be written are left behind after a while: copies, and no loss."""
    gateway = await mesh.gateway(cursor_flush_s=300)
    await mesh.inbox()
    ports = [gateway.port]
    async with crowd(20, lambda: ports[0]) as devices:
        async with load(mesh, list(devices)):
            await until(lambda: all(device.ids for device in devices.values()), "it flows")
        await all_came(mesh, devices)
        with closing(sqlite3.connect(mesh.folder / "tidings.db", isolation_level=None)) as database:
            database.execute("BEGIN IMMEDIATE")
            assert await gateway.stop() == 0
        assert any("left without writing 20 cursors" in line for line in gateway.output), gateway.output[-3:]
        ports[0] = (await mesh.gateway()).port
        async with load(mesh, list(devices)):
            await all_back(devices)
        await all_came(mesh, devices)


def knocking(port: int) -> int:
    """Connections to a port of this machine that are open, accepted by its server or not yet; see proc_net_tcp(5)."""
    rows = [line.split() for line in Path("/proc/net/tcp").read_text().splitlines()[1:]]
    return sum(row[1].endswith(f":{port:04X}") and row[3] == "01" for row in rows)


async def test_all_back_at_once(mesh: Mesh) -> None:
    """150 devices of a killed gateway at the door of one that starts one at a time: told when to come, and served."""
    first = await mesh.gateway()
    small = await mesh.gateway(consumer_starts=1, api_requests=1, start_wait_s=0.1)
    await mesh.inbox()
    ports = [first.port]
    async with crowd(150, lambda: ports[0]) as devices:
        async with load(mesh, list(devices)):
            ports[0] = small.port
            await first.kill_agent()
            await all_back(devices)
        await all_came(mesh, devices)
        told = [pause for device in devices.values() for pause in device.byes]
        assert told, "none had to wait: nothing was tried here"
        assert {code for device in devices.values() for code in device.codes} == {OVERLOADED}
        assert min(told) > 0
        assert not any("without its cursor" in line for line in small.output)
