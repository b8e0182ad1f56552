"""Broadcasts while something breaks: who follows gets each of them, and what was answered `ok` holds."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from typing import Final, cast

import pytest

from support.clock import PATIENCE_S, until
from support.device import Device
from support.faulty import FaultyStore
from support.light import Light
from support.mesh import KEY, Mesh, running_mesh
from support.proxy import Proxy
from tidings.gateway.agent import Gateway
from tidings.identity import issue
from tidings.store.port import Store
from tidings.stream.topology import BROADCAST, BROADCAST_PART
from tidings.wire.codes import RESTART
from tidings.wire.errors import StreamUnavailable
from tidings.wire.position import Position

FEW: Final = 3
"""Subscribers up to which a topic of these tests is copied."""
ROUNDS: Final = 24
CROWD: Final = 2000
HEAVY: Final = 220
"""As many large ones as neither the kernel's buffers of a connection nor the gateway's take in."""


@pytest.fixture
async def crowded(tmp_path: Path) -> AsyncIterator[Mesh]:
    """Fan-out and inbox agent, where more than a few followers are many; gateways that do not send again."""
    async with running_mesh(tmp_path, fanout_write_max=FEW, ack_wait_s=60) as mesh:
        await mesh.inbox()
        await mesh.fanout()
        yield mesh


async def crowd(mesh: Mesh, pattern: str, count: int = FEW + 1) -> None:
    """So many others follow it, who are never there."""
    for number in range(count):
        await mesh.store.subscribe(f"other{number}", [pattern], 1000, Position(0, 0))


async def ok(device: Device, kind: str, *topics: str) -> None:
    answer = await device.ask(kind, topics=list(topics))
    assert answer["t"] == "ok", answer


async def side_by_side(work: Callable[[str], Awaitable[None]], users: Sequence[str], at_once: int = 64) -> None:
    for first in range(0, len(users), at_once):
        await asyncio.gather(*map(work, users[first : first + at_once]))


async def fanned_out(mesh: Mesh) -> None:
    """Wait until the fan-out agents are done with all that was published until now."""
    last = (await mesh.connection.api("STREAM.INFO.TOPICS"))["state"]["last_seq"]
    async with asyncio.timeout(3 * PATIENCE_S):
        while (await mesh.connection.api("CONSUMER.INFO.TOPICS.fanout"))["ack_floor"]["stream_seq"] < last:
            await asyncio.sleep(0.02)


async def all_came(mesh: Mesh, *devices: tuple[str, Device]) -> None:
    """Wait until the devices have what is in the log of either plane; they follow ``last``, as many do.

    Both planes keep their order, so what comes last of each says that the rest is there.
    """
    await fanned_out(mesh)
    users = {user for user, _ in devices}
    ends = {user: await mesh.publish(user) for user in users}
    everywhere = await mesh.publish_topic("last", *users)
    for user, device in devices:
        await device.expect(*ends[user], *everywhere)


@pytest.mark.parametrize("others", [0, FEW + 1], ids=["copies", "broadcast"])
async def test_what_ok_promises(crowded: Mesh, others: int) -> None:
    """From `ok` on everything comes, on a device elsewhere too; from the one to `unsub` on nothing does."""
    here, there = await crowded.gateway(), await crowded.gateway()
    phone, tablet = await crowded.online(here, "alice"), await crowded.online(there, "alice", "tablet")
    await crowd(crowded, "last")
    await ok(phone, "sub", "last")
    unwanted: set[str] = set()
    for number in range(ROUNDS):
        asks, pattern = (phone, tablet)[number % 2], (f"post.{number}", f"post.{number}.>")[number // 2 % 2]
        topic = pattern.replace(">", "new.one")
        await crowd(crowded, pattern, others)
        await ok(asks, "sub", pattern)
        wanted = await crowded.publish_topic(topic, "alice")
        if number % 3:
            # Otherwise it goes on. What was not handed out by then need not come.
            for device in (phone, tablet):
                await device.expect(*wanted)
            await ok(asks, "unsub", pattern)
            unwanted.update(await crowded.publish_topic(topic))
    await all_came(crowded, ("alice", phone), ("alice", tablet))
    for name, device in (("phone", phone), ("tablet", tablet)):
        assert not unwanted & set(device.ids)
        crowded.ledger.check_device("alice", name, device.ids, most_copies=1)


async def test_ok_while_another_device_connects(crowded: Mesh) -> None:
    """A device that is being let in elsewhere when a topic is followed has all that comes from then on."""
    here, there = await crowded.gateway(), await crowded.gateway()

    async def one(user: str) -> tuple[str, Device, Device]:
        topic = f"of.{user}"
        await crowd(crowded, topic)
        phone, tablet = await crowded.online(here, user), await crowded.device(there, user, "tablet")
        await asyncio.gather(ok(phone, "sub", topic), tablet.connect())
        await crowded.publish_topic(topic, user)
        return user, phone, tablet

    for first in range(0, 4 * ROUNDS, 8):
        for user, phone, tablet in await asyncio.gather(*(one(f"user{first + n}") for n in range(8))):
            for device in (phone, tablet):
                await device.expect(*crowded.ledger.accepted[user])


async def away(mesh: Mesh, phones: dict[str, Device], tablets: dict[str, Device], leave: Callable[[], None]) -> None:
    """Where the tablets are goes away; then their users follow more than they did, or anything at all."""
    users = list(phones)
    for topic in ("known", "new.>"):
        await crowd(mesh, topic)
    for user in users[::2]:
        await ok(phones[user], "sub", "known")
    await mesh.publish_topic("known", *users[::2])
    for user in users[::2]:
        await tablets[user].expect(*mesh.ledger.accepted[user])
    leave()
    await mesh.publish_topic("known", *users[::2])
    for user in users:
        await ok(phones[user], "sub", "new.>")
        await mesh.publish_topic("new.one", user, count=2)
    for user in users:
        await phones[user].expect(*mesh.ledger.accepted[user][-2:])
    await fanned_out(mesh)


async def test_ok_while_a_gateway_stands_still(crowded: Mesh) -> None:
    """A frozen gateway reads in one go that it is asked, and what came after: it hands out what was followed."""
    here, there = await crowded.gateway(), await crowded.gateway()
    users = [f"user{number}" for number in range(6)]
    phones = {user: await crowded.online(here, user) for user in users}
    tablets = {user: await crowded.online(there, user, "tablet") for user in users}
    await away(crowded, phones, tablets, there.freeze)
    there.thaw()
    for user in users:
        await tablets[user].expect(*crowded.ledger.accepted[user])


async def test_ok_while_a_gateway_is_cut_off(crowded: Mesh) -> None:
    """A gateway that cannot be asked, and whose store is down when it is back, waits for it with what it reads."""
    here, store = await crowded.gateway(), FaultyStore(crowded.store)
    async with Proxy(int(crowded.settings.nats_url.rpartition(":")[2])) as proxy:
        settings = replace(crowded.settings, nats_url=f"nats://127.0.0.1:{proxy.port}")
        there = Gateway(settings, cast(Store, store))
        await there.start()
        users = [f"user{number}" for number in range(6)]
        phones = {user: await crowded.online(here, user) for user in users}
        url = f"http://127.0.0.1:{there.port}/v1/ws"
        tablets = {user: Device(url, issue(KEY, user, "tablet")) for user in users}
        try:
            for tablet in tablets.values():
                await tablet.connect()
            await away(crowded, phones, tablets, proxy.cut)
            store.down = True
            await proxy.mend()
            last = (await crowded.connection.api(f"STREAM.INFO.{BROADCAST}"))["state"]["last_seq"]
            await until(lambda: there.hub.feed.done.sequence == last, "it has read all broadcasts")
            for user in users[::2]:
                assert len(tablets[user].ids) == 1, "it handed out what it did not know to be followed"
            store.down = False
            for user in users:
                await tablets[user].expect(*crowded.ledger.accepted[user])
                crowded.ledger.check_device(user, "tablet", tablets[user].ids)
        finally:
            for tablet in tablets.values():
                await tablet.close()
            await there.stop()


async def test_topic_grows_and_shrinks(tmp_path: Path) -> None:
    """Across the limit and back under load: each notification comes once, as a copy or a broadcast.

    On each way one agent of two dies when it has sent and not acknowledged; another one finds the same message on the
    other side of the limit.
    """
    async with running_mesh(tmp_path, fanout_write_max=5, fanout_ack_wait_s=1, ack_wait_s=60) as mesh:
        gateways = [await mesh.gateway() for _ in range(2)]
        stays = await mesh.fanout()
        await mesh.inbox()
        users = [f"user{number}" for number in range(5)]
        devices = {user: await mesh.online(gateways[n % 2], user) for n, user in enumerate(users)}
        await asyncio.gather(*(ok(devices[user], "sub", "post.42") for user in users[:3]))
        following = users[:3]
        watched, done = devices[users[0]], asyncio.Event()

        async def load() -> None:
            while not done.is_set():
                await mesh.publish_topic("post.42", *following)
                await asyncio.sleep(0.004)

        async def goes_on(kind: str) -> None:
            """Some more have come, and the last of them as this."""
            count = len(watched.ids) + 20
            await watched.until(
                lambda: len(watched.ids) > count and watched.items[-1]["pos"][0] == kind, f"more {kind}"
            )

        loading = asyncio.create_task(load())
        try:
            for late in users[3:]:
                await goes_on("u")
                dies = await mesh.stuck_fanout("copied")
                await dies.said(r"stored \d copies")
                await crowd(mesh, "post.42", 3)
                await dies.kill_agent()
                await fanned_out(mesh)
                await goes_on("b")
                await ok(devices[late], "sub", "post.42")
                following.append(late)
                dies = await mesh.stuck_fanout("broadcast")
                await dies.said("stored broadcast")
                for number in range(3):
                    await mesh.store.unsubscribe(f"other{number}", ["post.42"], Position(0, 0))
                await dies.kill_agent()
                await fanned_out(mesh)
                # And one that is at work.
                works, stays = stays, await mesh.fanout()
                await works.kill_agent()
        finally:
            done.set()
            await loading
        await fanned_out(mesh)
        planes: dict[str, set[str]] = {}
        for user, device in devices.items():
            # A second copy would have come before this one.
            await mesh.publish(user)
            await device.expect(*mesh.ledger.accepted[user])
        for user, device in devices.items():
            mesh.ledger.check_device(user, "phone", device.ids, most_copies=1)
            for item in device.items:
                planes.setdefault(item["n"]["id"], set()).add(item["pos"][0])
        assert all(len(kinds) == 1 for kinds in planes.values())
        broadcasts = sum(kinds == {"b"} for kinds in planes.values())
        assert broadcasts == (await mesh.connection.api(f"STREAM.INFO.{BROADCAST}"))["state"]["messages"]
        assert 0 < broadcasts < len(mesh.ledger.accepted[users[0]])


async def test_two_thousand_devices(crowded: Mesh) -> None:
    """Some are cut off, some read slowly, one of two gateways is killed: nobody misses one; where nothing happened
    each comes once, in order."""
    kept, killed = [await crowded.gateway(write_buffer_bytes=16_384, write_stall_s=60) for _ in range(2)]
    async with Proxy(kept.port) as proxy:
        users = [f"user{number}" for number in range(CROWD)]
        lights = {user: Light(issue(KEY, user, "phone"), window=256) for user in users}
        quiet, moving, cut, slow = users[:950], users[950:1900], users[1900:1995], users[1995:]
        ports = dict.fromkeys(quiet + slow, kept.port) | dict.fromkeys(moving, killed.port)
        ports |= dict.fromkeys(cut, proxy.port)
        followed = {user: ["all", "odd.>"] if n % 2 else ["all"] for n, user in enumerate(users)}
        followed |= {user: ["all", "heavy"] for user in [quiet[0], *slow]}

        async def begin(user: str) -> None:
            await crowded.store.subscribe(user, followed[user], 10, Position(0, 0))
            await lights[user].connect(ports[user], receive_bytes=4096 if user in slow else None)

        async def move(user: str) -> None:
            await lights[user].lost.wait()
            async with turns:
                await lights[user].connect(kept.port)

        async def publish(count: int) -> None:
            for _ in range(count):
                for topic, pattern in (("all", "all"), ("odd.one", "odd.>")):
                    await crowded.publish_topic(topic, *(user for user in users if pattern in followed[user]))

        turns = asyncio.Semaphore(64)
        await side_by_side(begin, users)
        moves = asyncio.gather(*map(move, moving))
        for user in slow:
            lights[user].pause()
        await publish(8)
        await crowded.publish_topic("heavy", quiet[0], *slow, count=HEAVY, size=15_900)
        # In the middle of what it hands out.
        some = lights[moving[0]]
        await some.expect(crowded.ledger.accepted[moving[0]][:4])
        proxy.go_silent()
        await asyncio.gather(killed.kill_agent(), publish(8))
        await side_by_side(lambda user: lights[user].connect(kept.port), cut)
        await moves
        await publish(4)
        await lights[quiet[0]].expect(crowded.ledger.accepted[quiet[0]])
        for user in slow:
            assert set(crowded.ledger.accepted[user]) - set(lights[user].ids)
            lights[user].resume()
        for user in users:
            await lights[user].expect(crowded.ledger.accepted[user])
        for user, light in lights.items():
            disturbed = user in moving or user in cut
            crowded.ledger.check_device(user, "phone", light.ids, most_copies=None if disturbed else 1)
            assert set(light.ids) == set(crowded.ledger.accepted[user])
            if not disturbed:
                assert light.positions == sorted(light.positions, key=lambda pos: int(pos.rpartition(".")[2]))
            light.close()


async def test_nats_restarts_while_broadcasting(crowded: Mesh) -> None:
    """Consumers in memory are gone, a gateway that stood still has unread what was before: nobody misses one."""
    gateways = [await crowded.gateway() for _ in range(2)]
    users = [f"user{number}" for number in range(12)]
    devices = {user: await crowded.online(gateways[n % 2], user, window=256) for n, user in enumerate(users)}
    await asyncio.gather(*(ok(device, "sub", "post.>") for device in devices.values()))
    crowded.connection.request_timeout_s = 1.0
    done = asyncio.Event()

    async def load() -> None:
        while not done.is_set():
            # What was not confirmed is not entered: it may or may not be there.
            with suppress(StreamUnavailable):
                await crowded.publish_topic("post.42", *users)
            await asyncio.sleep(0.004)

    async def goes_on(some: Sequence[str]) -> None:
        counts = {user: len(devices[user].ids) for user in some}
        for user in some:
            await devices[user].until(lambda user=user: len(devices[user].ids) > counts[user] + 20, "the flow goes on")

    loading = asyncio.create_task(load())
    try:
        await goes_on(users)
        crowded.nats.kill()
        await crowded.nats.answering()
        await goes_on(users)
        gateways[1].freeze()
        await goes_on(users[::2])
        crowded.nats.kill()
        await crowded.nats.answering()
        await goes_on(users[::2])
        gateways[1].thaw()
        await goes_on(users)
    finally:
        done.set()
        await loading
    await fanned_out(crowded)
    await crowded.publish_topic("post.42", *users)
    for user, device in devices.items():
        await device.expect(*crowded.ledger.accepted[user])
        crowded.ledger.check_device(user, "phone", device.ids, most_copies=1)
        sequences = [int(item["pos"].rpartition(".")[2]) for item in device.items]
        assert sequences == sorted(sequences)


async def test_store_is_down_while_broadcasting(crowded: Mesh, monkeypatch: pytest.MonkeyPatch) -> None:
    """Who is up to date does not notice; who has to catch up does so when the store is back, and misses nothing."""
    # What a lane misses is in the inbox, and not in what the gateway still knows.
    monkeypatch.setattr("tidings.gateway.feed._RECENT", 5)
    store = FaultyStore(crowded.store)
    gateway = Gateway(replace(crowded.settings, linger_s=0), cast(Store, store))
    await gateway.start()
    users = ["live", "slow", "away"]
    url = f"http://127.0.0.1:{gateway.port}/v1/ws"
    live, slow, away = devices = [Device(url, issue(KEY, user, "phone"), window=4) for user in users]
    try:
        await crowd(crowded, "post.42")
        for device in devices:
            await device.connect()
            await ok(device, "sub", "post.42")
        first = await crowded.publish_topic("post.42", *users)
        for device in devices:
            await device.expect(*first)
            # An answer to what comes later says that the acknowledgement was read.
            assert (await device.ask("count"))["t"] == "ok"
        slow.auto_ack = False
        await away.leave()
        store.down = True
        missed = await crowded.publish_topic("post.42", *users, count=20)
        await live.expect(*missed)
        await slow.expect(*missed[:4])
        await crowded.broadcasts_stored()
        await until(lambda: gateway.hub.floors[BROADCAST_PART].sequence == 21, "the gateway has heard so")
        slow.auto_ack = True
        await slow.ack(*(item["pos"] for item in slow.items[-4:]))
        assert (await away.connect())["pos"] is None
        missed += await crowded.publish_topic("post.42", *users)
        await live.expect(*missed)
        store.down = False
        for device in (slow, away):
            assert await device.closed() == RESTART.code
            await device.connect()
        missed += await crowded.publish_topic("post.42", *users)
        for user, device in zip(users, devices, strict=True):
            await device.expect(*missed)
            crowded.ledger.check_device(user, "phone", device.ids)
        assert live.ids == [*first, *missed]
        assert live.close_code is None
    finally:
        for device in devices:
            await device.close()
        await gateway.stop()
