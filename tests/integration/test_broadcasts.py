"""Broadcasts: what goes to many followers is one message, and reaches each of them like any other."""

from __future__ import annotations

import asyncio
import sqlite3
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import pytest

from support.clock import PATIENCE_S, until
from support.device import Device
from support.mesh import KEY, Mesh, running_mesh
from support.proxy import Proxy
from tidings.gateway.agent import Gateway
from tidings.gateway.feed import Feed
from tidings.gateway.follows import Follows
from tidings.gateway.session import Session
from tidings.identity import issue
from tidings.store.port import Cursor
from tidings.stream import consumers, letters, topology
from tidings.wire import subject
from tidings.wire.notification import build
from tidings.wire.position import Position

FEW = 2
"""Subscribers up to which a topic of these tests is copied."""


@pytest.fixture
async def topics(store_url: str, tmp_path: Path) -> AsyncIterator[Mesh]:
    """A mesh with fan-out and inbox agent, on either store, where three followers are many."""
    async with running_mesh(tmp_path, store_url=store_url, store_timeout_s=PATIENCE_S, fanout_write_max=FEW) as mesh:
        await mesh.inbox()
        await mesh.fanout()
        yield mesh


@pytest.fixture
async def crowded(tmp_path: Path) -> AsyncIterator[Mesh]:
    """The same on SQLite, without agents."""
    async with running_mesh(tmp_path, fanout_write_max=FEW) as mesh:
        yield mesh


async def follow(device: Device, *names: str) -> None:
    answer = await device.ask("sub", topics=list(names))
    assert answer["t"] == "ok", answer


async def crowd(mesh: Mesh, topic: str, count: int = FEW + 1) -> None:
    """So many others follow it, who are never there."""
    for number in range(count):
        await mesh.store.subscribe(f"other{number}", [topic], 100, Position(0, 0))


async def copies(mesh: Mesh) -> int:
    streams = (await mesh.connection.api("STREAM.LIST"))["streams"]
    return sum(info["state"]["messages"] for info in streams if info["config"]["name"].startswith("NOTIFY_"))


async def in_inbox(device: Device, *ids: str, **query: Any) -> list[dict[str, Any]]:
    """Wait until the inbox has these; returns its page."""
    async with asyncio.timeout(PATIENCE_S):
        while True:
            page = (await device.ask("inbox", limit=200, **query))["items"]
            if set(ids) <= {item["n"]["id"] for item in page}:
                assert isinstance(page, list)
                return page
            # A user may ask for so many rows a second and no more.
            await asyncio.sleep(0.25)


async def test_everybody_gets_it(topics: Mesh) -> None:
    """One message for all devices on all gateways, once each, above the limit; copies up to it."""
    here, there = await topics.gateway(linger_s=0), await topics.gateway(linger_s=0)
    users = ["alice", "bob", "carol"]
    devices = {
        user: await topics.online(gateway, user) for user, gateway in zip(users, (here, there, here), strict=True)
    }
    tablet = await topics.online(there, "alice", "tablet")
    dave = await topics.online(here, "dave")
    await follow(devices["alice"], "post.42", "post.>")
    await follow(devices["bob"], "post.42")
    few = await topics.publish_topic("post.42", "alice", "bob")
    await devices["bob"].expect(*few)
    assert await copies(topics) == 2
    await follow(devices["carol"], "post.>")
    many = await topics.publish_topic("post.42", *users, count=5)
    for device in (*devices.values(), tablet):
        await device.expect(*many)
    (last,) = await topics.publish("dave")
    await dave.expect(last)
    assert dave.ids == [last]
    assert await copies(topics) == 3
    for user, device in (*devices.items(), ("alice", tablet)):
        topics.ledger.check_device(user, "device", device.ids, most_copies=1)
        assert [item["pos"][0] for item in device.items if item["n"]["id"] in many] == ["b"] * 5
        assert [id for id in device.ids if id in many] == many


async def test_who_was_away(topics: Mesh) -> None:
    """A device that comes back gets what it missed, in order, from the inbox and above its floor from the stream."""
    gateway = await topics.gateway(linger_s=0)
    alice = await topics.online(gateway, "alice")
    await follow(alice, "post.42")
    await crowd(topics, "post.42")
    await alice.expect(*await topics.publish_topic("post.42", "alice", count=2))
    await alice.leave()
    missed = await topics.publish_topic("post.42", "alice", count=20)
    await topics.broadcasts_stored()
    missed += await topics.publish_topic("post.42", "alice", count=20)
    await alice.connect()
    missed += await topics.publish_topic("post.42", "alice", count=20)
    await alice.expect(*missed)
    topics.ledger.check_device("alice", "phone", alice.ids, most_copies=1)
    positions = [item["pos"] for item in alice.items]
    assert positions == sorted(positions, key=lambda pos: int(pos.rpartition(".")[2]))
    # Somewhere else, where nobody knows what was acknowledged but the store.
    await alice.ask("count")
    await alice.leave()
    other = await topics.gateway(linger_s=0)
    alice.url = other.url
    await alice.connect()
    await alice.expect(*await topics.publish_topic("post.42", "alice"))
    topics.ledger.check_device("alice", "phone", alice.ids, most_copies=1)


async def test_not_acknowledged(topics: Mesh) -> None:
    """It is sent again, with its attempts; a full window holds back, and lets the rest come later, in order."""
    gateway = await topics.gateway(ack_wait_s=0.5)
    alice = await topics.online(gateway, "alice", auto_ack=False, window=4)
    await follow(alice, "post.42")
    await crowd(topics, "post.42")
    ids = await topics.publish_topic("post.42", "alice", count=10)
    await alice.until(lambda: alice.ids.count(ids[0]) >= 3, "the first one a third time")
    assert set(alice.ids) == set(ids[:4])
    tries = [item["try"] for item in alice.items if item["n"]["id"] == ids[0]]
    assert tries == list(range(1, len(tries) + 1))
    alice.auto_ack = True
    await alice.expect(*ids)
    first_times = list(dict.fromkeys(alice.ids))
    assert first_times == ids


async def test_dead_letter(topics: Mesh) -> None:
    """What a live client never acknowledges is given up after so many attempts, and holds nothing up; a replay is for
    this user alone."""
    gateway = await topics.gateway(ack_wait_s=0.5, max_deliver=2)
    alice = await topics.online(gateway, "alice", auto_ack=False, window=1)
    await follow(alice, "post.42")
    await crowd(topics, "post.42")
    first, second = await topics.publish_topic("post.42", "alice", count=2)
    await alice.expect(first, second)
    assert alice.ids.count(first) == 2
    (letter, *_) = await topics.dead_letters()
    assert (letter["tidings-reason"], letter["tidings-user"]) == ("undelivered", "alice")
    assert (letter["tidings-stream"], "tidings-origin-subject" in letter) == (topology.BROADCAST, False)
    replayed = await letters.replay(topics.connection, 1)
    assert replayed.stream.startswith("NOTIFY_")
    await alice.until(lambda: alice.ids.count(first) > 2, "the replayed broadcast")


async def test_the_inbox(topics: Mesh) -> None:
    """Pages both ways over both planes in the order of time; marks, filters, counts; each user their own."""
    gateway = await topics.gateway()
    alice, bob = await topics.online(gateway, "alice"), await topics.online(gateway, "bob")
    for device in (alice, bob):
        await follow(device, "post.42", "post.>")
    await crowd(topics, "post.42")
    ids: list[str] = []
    for _ in range(4):
        ids += await topics.publish_topic("post.42", "alice")
        await alice.expect(*ids)
        ids += await topics.publish("alice")
        await alice.expect(*ids)
    items = await in_inbox(alice, *ids)
    assert [item["n"]["id"] for item in items] == ids[::-1]
    assert (await alice.ask("count"))["unread"] == len(ids)
    for backwards in (True, False):
        found: list[str] = []
        where: dict[str, Any] = {} if backwards else {"after": items[-1]["pos"]}
        while True:
            page = await alice.ask("inbox", limit=3, **where)
            found += [item["n"]["id"] for item in page["items"]]
            if page["next"] is None:
                break
            where = {"before" if backwards else "after": page["next"]}
        assert found == (ids[::-1] if backwards else ids[1:])
    for at, item in enumerate(items):
        older = (await alice.ask("inbox", before=item["pos"]))["items"]
        assert [each["n"]["id"] for each in older] == ids[::-1][at + 1 :], item["pos"]
        newer = (await alice.ask("inbox", after=item["pos"]))["items"]
        assert [each["n"]["id"] for each in newer] == ids[len(ids) - at :], item["pos"]
    marked = [items[0]["pos"], items[1]["pos"]]
    assert (await alice.ask("mark", **{"as": "read", "pos": marked}))["t"] == "ok"
    assert (await alice.ask("count"))["unread"] == len(ids) - 2
    unread = (await alice.ask("inbox", filter="unread"))["items"]
    assert [item["n"]["id"] for item in unread] == ids[:-2][::-1]
    topic = (await alice.ask("inbox", topic="post.42"))["items"]
    assert [item["n"]["id"] for item in topic] == ids[::2][::-1]
    assert (await alice.ask("mark", **{"as": "read", "pos": "all"}))["t"] == "ok"
    assert (await alice.ask("count"))["unread"] == 0
    # Bob has the same broadcasts, and none of her marks.
    assert [item["read"] for item in await in_inbox(bob, *ids[::2])] == [False] * 4
    assert (await bob.ask("count"))["unread"] == 4
    refused = await bob.ask("mark", **{"as": "read", "pos": ["b1ffffffffff.1"]})
    assert refused["code"] == "bad_position"


async def test_unsubscribed(topics: Mesh) -> None:
    """What came stays in the inbox, what comes after is not there, and following again begins again."""
    gateway = await topics.gateway()
    alice, bob = await topics.online(gateway, "alice"), await topics.online(gateway, "bob")
    await follow(alice, "post.42")
    await follow(bob, "post.42")
    await crowd(topics, "post.42")
    (first,) = await topics.publish_topic("post.42")
    await alice.expect(first)
    assert (await alice.ask("unsub", topics=["post.42"]))["t"] == "ok"
    (second,) = await topics.publish_topic("post.42")
    await bob.expect(first, second)
    await follow(alice, "post.42")
    (third,) = await topics.publish_topic("post.42")
    await alice.expect(third)
    await topics.broadcasts_stored()
    assert [item["n"]["id"] for item in await in_inbox(alice, first, third)] == [third, first]
    assert alice.ids == [first, third]


async def test_in_force_everywhere(topics: Mesh) -> None:
    """After its ok a subscription has every broadcast, on a device at another gateway too."""
    here, there = await topics.gateway(), await topics.gateway()
    alice, tablet = await topics.online(here, "alice"), await topics.online(there, "alice", "tablet")
    for number in range(10):
        await crowd(topics, f"race.{number}")
        await follow(alice, f"race.{number}")
        ids = await topics.publish_topic(f"race.{number}", "alice")
        for device in (alice, tablet):
            await device.expect(*ids)
    topics.ledger.check_device("alice", "tablet", tablet.ids, most_copies=1)


async def test_gap(crowded: Mesh) -> None:
    """Past the cap it is counted and not pushed; the client pages the inbox, and is told until it has noted it."""
    await crowded.inbox()
    await crowded.fanout()
    gateway = await crowded.gateway(linger_s=0, catchup_cap=10)
    alice = await crowded.online(gateway, "alice")
    await follow(alice, "post.42")
    await crowd(crowded, "post.42")
    await alice.leave()
    missed = await crowded.publish_topic("post.42", "alice", count=11)
    await crowded.broadcasts_stored()
    await alice.connect()
    gap = await alice.expect_frame("gap", missed=11)
    live = await crowded.publish_topic("post.42", "alice")
    await alice.expect(*live)
    assert alice.ids == live
    assert len(await in_inbox(alice, *missed, *live)) == 12
    alice.frames.clear()
    await alice.cut()
    await alice.connect()
    again = await alice.expect_frame("gap")
    # What was live is below the floor by now, and is counted with the rest.
    assert again["pos"] in (gap["pos"], alice.items[0]["pos"])
    await alice.ack(again["pos"])
    await alice.ask("count")
    alice.frames.clear()
    await alice.leave()
    await alice.connect()
    await alice.expect(*await crowded.publish_topic("post.42", "alice"))
    assert "gap" not in {frame["t"] for frame in alice.frames}


async def inside(mesh: Mesh, **changed: Any) -> Gateway:
    values = {name: getattr(mesh.settings, name) for name in type(mesh.settings).__slots__}
    gateway = Gateway(type(mesh.settings)(**{**values, **changed}), mesh.store)
    await gateway.start()
    return gateway


async def test_lost_on_the_way(crowded: Mesh, monkeypatch: pytest.MonkeyPatch) -> None:
    """Deliveries to a gateway that never arrive, in the middle and at the end, are found missing and read again."""
    await crowded.inbox(floor_interval_s=60)
    await crowded.fanout()
    gateway = await inside(crowded, linger_s=0)
    alice = Device(f"http://127.0.0.1:{gateway.port}/v1/ws", issue(KEY, "alice", "phone"))
    try:
        await alice.connect()
        await follow(alice, "post.42")
        await crowd(crowded, "post.42")
        receive, lost = Feed.receive, set[int]()

        def forgetful(self: Feed, where: bytes, reply: bytes, body: bytes) -> None:
            sequence = consumers.parse_reply(reply).stream_sequence
            if sequence % 3 == 0 and sequence not in lost:
                lost.add(sequence)
            else:
                receive(self, where, reply, body)

        monkeypatch.setattr(Feed, "receive", forgetful)
        ids = await crowded.publish_topic("post.42", "alice", count=30)
        await alice.expect(*ids)
        assert alice.ids == ids
        assert lost == set(range(3, 31, 3))
        # And the consumer itself.
        await crowded.connection.api(f"CONSUMER.DELETE.{topology.BROADCAST}.{gateway.hub.feed.consumer}")
        ids += await crowded.publish_topic("post.42", "alice", count=5)
        await alice.expect(*ids)
        assert alice.ids == ids
    finally:
        await alice.close()
        await gateway.stop()


@pytest.mark.parametrize("before", [[], ["video.1"]], ids=["nothing followed", "something followed"])
async def test_in_force_where_nobody_could_be_asked(crowded: Mesh, before: list[str]) -> None:
    """A gateway that is cut off while a user subscribes elsewhere hands out what came since, when it is back."""
    await crowded.inbox()
    await crowded.fanout()
    async with Proxy(crowded.nats.port) as proxy:
        gateway = await inside(crowded, nats_url=f"nats://127.0.0.1:{proxy.port}")
        there = await crowded.gateway()
        phone = Device(f"http://127.0.0.1:{gateway.port}/v1/ws", issue(KEY, "alice", "phone"))
        try:
            await phone.connect()
            for topic in before:
                await follow(phone, topic)
            tablet = await crowded.online(there, "alice", "tablet")
            await crowd(crowded, "post.42")
            proxy.cut()
            await until(lambda: not gateway.hub.connection.is_connected, "the break is noticed")
            await follow(tablet, "post.42")
            ids = await crowded.publish_topic("post.42", "alice", count=3)
            await tablet.expect(*ids)
            assert not phone.ids
            await proxy.mend()
            await phone.expect(*ids)
            ids += await crowded.publish_topic("post.42", "alice")
            await phone.expect(*ids)
            assert phone.ids == ids
        finally:
            await phone.close()
            await gateway.stop()


async def test_not_in_force_where_the_asker_is_cut_off(crowded: Mesh, monkeypatch: pytest.MonkeyPatch) -> None:
    """A gateway that loses NATS between storing a subscription and asking the others does not say ``ok``."""
    await crowded.inbox()
    await crowded.fanout()
    async with Proxy(crowded.nats.port) as proxy:
        gateway = await inside(crowded, nats_url=f"nats://127.0.0.1:{proxy.port}")
        tablet = await crowded.online(await crowded.gateway(), "alice", "tablet")
        phone = Device(f"http://127.0.0.1:{gateway.port}/v1/ws", issue(KEY, "alice", "phone"))
        reload = Follows.reload

        async def reload_and_lose(follows: Follows, user: str) -> None:
            await reload(follows, user)
            if follows is gateway.hub.follows:
                monkeypatch.undo()
                proxy.cut()

        try:
            await phone.connect()
            await crowd(crowded, "post.42")
            monkeypatch.setattr(Follows, "reload", reload_and_lose)
            answer = await phone.ask("sub", topics=["post.42"])
            assert (answer["t"], answer.get("code")) == ("error", "store_unavailable"), answer
            await proxy.mend()
            await until(lambda: gateway.hub.connection.is_connected, "the gateway is back")
            await follow(phone, "post.42")
            ids = await crowded.publish_topic("post.42", "alice", count=3)
            await tablet.expect(*ids)
            await phone.expect(*ids)
        finally:
            await phone.close()
            await gateway.stop()


async def test_readings_take_turns(crowded: Mesh, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of three changes at once the last one stays, also where the store is slower with the earlier ones."""
    gateway = await inside(crowded)
    phone = Device(f"http://127.0.0.1:{gateway.port}/v1/ws", issue(KEY, "alice", "phone"))
    gates = [asyncio.Event() for _ in range(3)]
    read, begun = Follows._read, []

    async def slow(follows: Follows, user: str) -> dict[str, Position]:
        found = await read(follows, user)
        begun.append(found)
        await gates[len(begun) - 1].wait()
        return found

    try:
        await phone.connect()
        monkeypatch.setattr(Follows, "_read", slow)
        asked: list[asyncio.Task[None]] = []
        for number in range(3):
            await crowded.store.subscribe("alice", [f"t.{number}"], 10, Position(0, 0))
            asked.append(asyncio.create_task(gateway.hub.follows.reload("alice")))
            if number == 1:
                await until(lambda: len(begun) == 1, "the first one reads")
                gates[0].set()
                await asked[0]
        gates[2].set()
        await until(lambda: len(begun) == 2, "the second one reads")
        # Were the third let in beside it, it would have read by now: the store answers one after the other.
        for _ in range(3):
            await crowded.store.subscriptions("alice", None, 10)
        gates[1].set()
        await asyncio.gather(*asked)
        (session,) = gateway.hub.users["alice"]
        assert session.lane is not None
        assert set(session.lane.follows) == {"t.0", "t.1", "t.2"}
    finally:
        await phone.close()
        await gateway.stop()


async def test_in_order(crowded: Mesh) -> None:
    """Many messages to one topic, quicker than they go out, do so in the order in which they were stored."""
    await crowded.inbox()
    await crowded.fanout()
    await crowd(crowded, "post.42")
    device = await crowded.online(await crowded.gateway(), "alice")
    await follow(device, "post.42")
    ids = await crowded.publish_topic("post.42", "alice", count=150)
    await device.expect(*ids)
    assert device.ids == ids


async def test_a_body_that_has_expired(crowded: Mesh) -> None:
    """A reference whose broadcast is gone hides none of those behind it from a device that catches up."""
    gateway = await crowded.gateway()
    device = await crowded.online(gateway, "alice")
    await follow(device, "post.42")
    await device.close()
    await crowd(crowded, "post.42")
    await crowded.inbox()
    await crowded.fanout()
    ids = await crowded.publish_topic("post.42", "alice", count=80)
    await crowded.floors_announced()
    # References are noted when the user looks.
    tablet = await crowded.online(gateway, "alice", "tablet")
    assert (await tablet.ask("count"))["unread"] == len(ids)
    with sqlite3.connect(crowded.settings.store_url.removeprefix("sqlite:///")) as db:
        assert db.execute("DELETE FROM broadcasts WHERE id = ?", (ids[2],)).rowcount == 1
    await device.connect()
    await device.expect(*ids[:2], *ids[3:])
    assert ids[2] not in device.ids


async def test_in_force_for_who_is_just_coming(crowded: Mesh, monkeypatch: pytest.MonkeyPatch) -> None:
    """A device has read what its user follows and is not welcome yet when the user follows more."""
    await crowded.fanout()
    gateway = await inside(crowded)
    there = await crowded.gateway()
    phone = Device(f"http://127.0.0.1:{gateway.port}/v1/ws", issue(KEY, "alice", "phone"))
    read, goes_on = asyncio.Event(), asyncio.Event()
    create, opened = consumers.create_session, Follows.open

    async def slow(*arguments: Any, **options: Any) -> tuple[str, int]:
        await goes_on.wait()
        return await create(*arguments, **options)

    async def noted(self: Follows, session: Session, cursor: Cursor) -> None:
        await opened(self, session, cursor)
        read.set()

    monkeypatch.setattr(consumers, "create_session", slow)
    monkeypatch.setattr(Follows, "open", noted)
    connecting = asyncio.create_task(phone.connect())
    try:
        await read.wait()
        tablet = await crowded.online(there, "alice", "tablet")
        await crowd(crowded, "post.42")
        await follow(tablet, "post.42")
        ids = await crowded.publish_topic("post.42", "alice")
        await tablet.expect(*ids)
        goes_on.set()
        await connecting
        await phone.expect(*ids)
    finally:
        goes_on.set()
        await connecting
        await phone.close()
        await gateway.stop()


async def test_what_the_feed_no_longer_keeps(crowded: Mesh, monkeypatch: pytest.MonkeyPatch) -> None:
    """Without inbox agents, and with a short memory: the rest comes out of the stream."""
    monkeypatch.setattr("tidings.gateway.feed._RECENT", 5)
    await crowded.fanout()
    gateway = await inside(crowded, linger_s=0)
    alice = Device(f"http://127.0.0.1:{gateway.port}/v1/ws", issue(KEY, "alice", "phone"))
    try:
        await alice.connect()
        await follow(alice, "post.42", "video.1")
        await crowd(crowded, "post.42")
        await crowd(crowded, "post.43")
        first = await crowded.publish_topic("post.42", "alice")
        await alice.expect(*first)
        await alice.leave()
        missed = await crowded.publish_topic("post.42", "alice", count=10)
        others = await crowded.publish_topic("post.43", count=10)
        missed += await crowded.publish_topic("post.42", "alice", count=10)
        await until(lambda: gateway.hub.feed.done.sequence == 31, "all of them have been read")
        await alice.connect()
        await alice.expect(*missed)
        assert alice.ids == [*first, *missed]
        assert others
    finally:
        await alice.close()
        await gateway.stop()


async def test_nonsense_on_the_stream(topics: Mesh) -> None:
    """What is no notification is a dead letter, and nothing stops for it."""
    gateway = await topics.gateway()
    alice = await topics.online(gateway, "alice")
    await follow(alice, "post.42")
    await crowd(topics, "post.42")
    await topics.connection.store(subject.broadcast("post.42"), b"not json")
    _, body = build(type="t", data=None, id="x")
    await topics.connection.store("broadcast.post%2E42", body)
    ids = await topics.publish_topic("post.42", "alice")
    await alice.expect(*ids)
    await topics.broadcasts_stored()
    assert [letter["tidings-origin-subject"] for letter in await topics.dead_letters()] == [
        "broadcast.post.42",
        "broadcast.post%2E42",
    ]


async def test_slow_reader(crowded: Mesh) -> None:
    """A client that does not read leaves the feed; when it reads again it gets everything, and nobody waited for it."""
    await crowded.inbox()
    await crowded.fanout()
    gateway = await crowded.gateway(write_buffer_bytes=4096, write_stall_s=30, ack_wait_s=30)
    slow, quick = await crowded.online(gateway, "slow", window=1000), await crowded.online(gateway, "quick")
    for device in (slow, quick):
        await follow(device, "post.42")
    await crowd(crowded, "post.42")
    slow.pause()
    ids = await crowded.publish_topic("post.42", "slow", "quick", count=600, size=10_000)
    await quick.expect(*ids)
    assert len(slow.ids) < len(ids)
    slow.resume()
    await slow.expect(*ids)
    crowded.ledger.check_device("slow", "phone", slow.ids, most_copies=1)


async def test_place_of_who_follows_nothing(crowded: Mesh) -> None:
    """What a device acknowledged of topics that its user left does not come again, however often it came and went."""
    await crowded.inbox()
    await crowded.fanout()
    gateway = await crowded.gateway(linger_s=0)
    phone = await crowded.online(gateway, "alice")
    for topic in ("post.42", "post.43"):
        await crowd(crowded, topic)
    await follow(phone, "post.42")
    await phone.expect(*await crowded.publish_topic("post.42", "alice", count=3))
    await crowded.broadcasts_stored()
    assert (await phone.ask("unsub", topics=["post.42"]))["t"] == "ok"
    for _ in range(2):
        await phone.leave()
        await phone.connect()
    tablet = await crowded.online(gateway, "alice", "tablet")
    await phone.leave()
    await follow(tablet, "post.43")
    missed = await crowded.publish_topic("post.43", "alice")
    await phone.connect()
    await phone.expect(*missed, *await crowded.publish_topic("post.43", "alice"))
    crowded.ledger.check_device("alice", "phone", phone.ids, most_copies=1)


async def test_one_id_on_two_topics(crowded: Mesh) -> None:
    """Services number their events by themselves: what has the id of another topic's broadcast is no copy of it."""
    await crowded.fanout()
    gateway = await crowded.gateway()
    alice, bob = await crowded.online(gateway, "alice"), await crowded.online(gateway, "bob")
    for device, topic in ((alice, "post.42"), (bob, "video.1")):
        await crowd(crowded, topic)
        await follow(device, topic)
    for topic in ("post.42", "video.1"):
        _, body = build(type="test.made", data=None, id="7", topic=topic)
        await crowded.connection.store(subject.notify_topic(topic), body)
    for device in (alice, bob):
        await device.expect("7")
