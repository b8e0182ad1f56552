"""Catch-up from the inbox is exact by its floors: in every order of the steps involved, and with real processes."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator

import orjson
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from support.clock import PATIENCE_S, until
from support.device import Device
from support.interleave import Scene, World, explore, stepped_agents
from support.mesh import PARTITIONS, Mesh
from tidings.stream import consumers
from tidings.wire import subject
from tidings.wire.position import Position


@pytest.fixture
def stepped() -> Iterator[None]:
    """Inbox agents are those of the world of the moment."""
    with stepped_agents():
        yield


_BACK = {"acks": True, "leaves": 1, "connects": 2}
EXHAUSTED = {
    "the inbox lags": (Scene(3, published=3, batch=1, burst=True), 100_000_000),
    "published meanwhile": (Scene(2), 100_000_000),
    "window of one": (Scene(2, published=2, burst=True, window=1, acks=True), 100_000),
    "holes in the cursor": (Scene(3, published=3, stored=2, acked=frozenset({2, 3}), window=1, acks=True), 100_000),
    "left and back": (Scene(1, published=1, stored=1, heard=1, agents=0, writes=1, **_BACK), 100_000),
    "left and back while the inbox lags": (Scene(1, published=1, batch=1, **_BACK), 1_000_000),
    "past the cap": (Scene(2, published=2, stored=2, heard=2, agents=0, cap=1, writes=1, **_BACK), 1_000),
    "past the cap while the inbox lags": (Scene(2, published=2, stored=1, cap=1, acks=True), 1_000_000),
    "a new device": (Scene(1, known=False, announcements=0), 100_000),
    "an old floor is heard last": (Scene(1, published=1, announcements=2, trims=1), 1_000_000),
    "the store fails": (Scene(2, published=2, stored=1, heard=1, agents=0, outages=1, acks=True), 500),
    "rows expire": (Scene(2, published=2, stored=2, heard=1, expiries=1, trims=1), 10_000),
}
"""Small scenes, and the least number of orders of steps that each of them has."""


@pytest.mark.parametrize("name", EXHAUSTED)
def test_every_order_of_steps(stepped: None, name: str) -> None:
    """Whatever the order: each comes once, in order, from the inbox or the stream and never from both."""
    scene, least = EXHAUSTED[name]
    explored = explore(lambda: World(scene))
    assert explored.interleavings >= least, explored
    assert explored.ends > 1, explored


def _scenes() -> st.SearchStrategy[Scene]:
    few = st.integers(0, 2)

    @st.composite
    def scene(draw: st.DrawFn) -> Scene:
        messages = draw(st.integers(1, 12))
        published = draw(st.integers(0, messages))
        stored = draw(st.integers(0, published))
        known = draw(st.booleans())
        cursor = draw(st.integers(0, published)) if known else 0
        return Scene(
            messages,
            published=published,
            stored=stored,
            heard=draw(st.integers(0, stored)),
            agents=draw(st.integers(1, 3)),
            announcements=draw(st.integers(0, 5)),
            others=draw(st.frozensets(st.integers(1, messages), max_size=3)),
            known=known,
            cursor=cursor,
            acked=draw(st.frozensets(st.integers(cursor + 1, published), max_size=3))
            if known and cursor < published
            else frozenset(),
            window=draw(st.integers(1, 5)),
            cap=draw(st.sampled_from([1, 3, 1000])),
            batch=draw(st.integers(1, 4)),
            burst=draw(st.booleans()),
            connects=draw(st.integers(1, 4)),
            acks=True,
            leaves=draw(few),
            writes=draw(st.integers(0, 6)),
            crashes=draw(few),
            deaths=draw(few),
            late=draw(few),
            refusals=draw(few),
            outages=draw(few),
            repeats=draw(few),
            lost_consumers=draw(few),
            expiries=draw(few),
            trims=draw(few),
        )

    return scene()


@settings(max_examples=400, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(scene=_scenes(), choices=st.lists(st.integers(0, 255), min_size=40, max_size=200))
def test_long_orders_of_steps(stepped: None, scene: Scene, choices: list[int]) -> None:
    """The same with more of everything, and with agents, gateways, stores and consumers that fail."""
    world = World(scene)
    try:
        for choice in choices:
            names = list(world.options())
            if not names:
                break
            world.step(names[choice % len(names)])
        world.drain()
        world.check()
    finally:
        world.close()


# With real processes


CAP = 50


def _in_order(device: Device) -> None:
    """What came is in the order of its positions, without copies."""
    positions = [Position.parse(item["pos"]) for item in device.items]
    assert positions == sorted(set(positions))


async def test_up_to_the_cap_and_past_it(mesh: Mesh) -> None:
    """Nothing missed, one, as many as the cap: pushed in order; one more: counted in a gap, and none of it pushed."""
    gateway, _ = await mesh.gateway(linger_s=0, catchup_cap=CAP), await mesh.inbox()
    missed = {f"user{count}": count for count in (0, 1, CAP, CAP + 1)}
    devices = {user: await mesh.online(gateway, user) for user in missed}
    for user, count in missed.items():
        await devices[user].expect(*await mesh.publish(user))
        await devices[user].leave()
        await mesh.publish(user, count)
    await mesh.floors_announced()
    for user, count in missed.items():
        device = devices[user]
        await device.connect()
        if count > CAP:
            gap = await device.expect_frame("gap", missed=count)
            *skipped, live = [*mesh.ledger.accepted[user][1:], *await mesh.publish(user)]
            await device.expect(live)
            assert device.ids == [mesh.ledger.accepted[user][0], live]
            page = await device.ask("inbox", limit=200, after=device.items[0]["pos"])
            there = [item["n"]["id"] for item in page["items"] if item["pos"] != device.items[1]["pos"]]
            assert there == skipped
            assert gap["pos"]
        else:
            await device.expect(*mesh.ledger.accepted[user], *await mesh.publish(user))
            assert device.ids == mesh.ledger.accepted[user]
            assert "gap" not in {frame["t"] for frame in device.frames}
        _in_order(device)


async def test_ten_thousand_missed(mesh: Mesh) -> None:
    """With a cap above it, a long absence is pushed whole, window by window, and what is live comes behind it."""
    gateway, _ = await mesh.gateway(linger_s=0, catchup_cap=20_000, ack_wait_s=60), await mesh.inbox()
    alice = await mesh.online(gateway, "alice", window=256)
    await alice.leave()
    for _ in range(20):
        await asyncio.gather(*(mesh.publish("alice") for _ in range(500)))
    await mesh.floors_announced()
    await alice.connect()
    live = await mesh.publish("alice", 3)
    await alice.until(lambda: len(alice.items) >= 10_003, "all of them", 3 * PATIENCE_S)
    await alice.ask("count")
    mesh.ledger.check_device("alice", "phone", alice.ids, most_copies=1)
    _in_order(alice)
    assert alice.ids[-3:] == live
    assert {item["try"] for item in alice.items} == {1}


async def test_writer_frozen_in_the_middle(mesh: Mesh) -> None:
    """What the frozen inbox agent was given and has not stored comes from the stream; it stores it when it thaws."""
    gateway, inbox = await mesh.gateway(linger_s=0), await mesh.inbox(inbox_batch=8)
    alice = await mesh.online(gateway, "alice")
    await alice.leave()
    await mesh.publish("alice", 40)
    await mesh.floors_announced()
    inbox.freeze()
    await mesh.publish("alice", 40)
    await alice.connect()
    await alice.expect(*mesh.ledger.accepted["alice"])
    await alice.leave()
    await mesh.publish("alice", 10)
    inbox.thaw()
    await mesh.publish("alice", 10)
    await alice.connect()
    await alice.expect(*mesh.ledger.accepted["alice"], *await mesh.publish("alice"))
    assert alice.ids == mesh.ledger.accepted["alice"]
    await mesh.floors_announced()
    await mesh.ledger.check_store(mesh.store)


async def test_floor_of_long_ago(mesh: Mesh) -> None:
    """A gateway that hears of no floor any more reads more of the stream, and nothing twice."""
    gateway, inbox = await mesh.gateway(linger_s=0), await mesh.inbox()
    alice = await mesh.online(gateway, "alice")
    await alice.leave()
    await mesh.publish("alice", 10)
    await mesh.floors_announced()
    await inbox.stop()
    partition = subject.partition("alice", PARTITIONS)
    heard: list[int] = []

    def listen(where: bytes, reply: bytes, header: bytes | None, body: bytes) -> None:
        heard.append(orjson.loads(body)["floors"][partition])

    await mesh.connection.listen(subject.INBOX_FLOOR, listen)
    await mesh.inbox(floor_interval_s=60)
    # It says once what the gateway knows already, and then nothing for a minute.
    await until(lambda: heard, "the first announcement")
    await mesh.publish("alice", 10)
    await mesh.stored("alice", *mesh.ledger.accepted["alice"])
    await until_floor(mesh, partition, 20)
    await alice.connect()
    await alice.expect(*mesh.ledger.accepted["alice"], *await mesh.publish("alice"))
    assert alice.ids == mesh.ledger.accepted["alice"]
    assert heard == [10]


async def until_floor(mesh: Mesh, partition: int, floor: int) -> None:
    """Wait until the inbox agents have acknowledged so much."""
    async with asyncio.timeout(PATIENCE_S):
        while await consumers.inbox_floor(mesh.connection, partition) < floor:
            await asyncio.sleep(0.02)


async def test_durable_handed_over_while_a_device_is_away(mesh: Mesh) -> None:
    """Rows that a killed agent stored and did not acknowledge are no floor; another agent makes one of them."""
    gateway, stuck = await mesh.gateway(linger_s=0), await mesh.stuck_inbox()
    alice = await mesh.online(gateway, "alice")
    await alice.leave()
    await mesh.publish("alice", 10)
    await stuck.said(r"stored \d+ rows")
    await alice.connect()
    await alice.expect(*mesh.ledger.accepted["alice"])
    await alice.leave()
    await mesh.publish("alice", 10)
    await stuck.kill_agent()
    partition = subject.partition("alice", PARTITIONS)
    assert await consumers.inbox_floor(mesh.connection, partition) == 0
    stream = f"NOTIFY_{partition}"
    config = (await mesh.connection.api(f"CONSUMER.INFO.{stream}.inbox"))["config"]
    # The server gives what the dead agent had to another one after this, and not after the default minute.
    body = {"stream_name": stream, "config": {**config, "ack_wait": 500_000_000}, "action": "update"}
    await mesh.connection.api(f"CONSUMER.CREATE.{stream}.inbox", body)
    await mesh.inbox()
    await mesh.floors_announced()
    await alice.connect()
    await alice.expect(*mesh.ledger.accepted["alice"], *await mesh.publish("alice"))
    assert alice.ids == mesh.ledger.accepted["alice"]
    await mesh.floors_announced()
    await mesh.ledger.check_store(mesh.store)


async def test_a_floor_older_than_the_log(mesh: Mesh) -> None:
    """Where the stream has forgotten what lies above the floor that a gateway knows, the inbox has it."""
    gateway, inbox = await mesh.gateway(linger_s=0), await mesh.inbox()
    alice = await mesh.online(gateway, "alice")
    await alice.expect(*await mesh.publish("alice"))
    await alice.leave()
    await mesh.floors_announced()
    await inbox.stop()
    heard: list[bytes] = []
    await mesh.connection.listen(subject.INBOX_FLOOR, lambda where, reply, header, body: heard.append(body))
    await mesh.connection.flush()
    await mesh.inbox(floor_interval_s=60)
    await until(lambda: heard, "the only announcement has come")
    missed = await mesh.publish("alice", 10)
    await mesh.stored("alice", *missed)
    await mesh.connection.api(f"STREAM.PURGE.NOTIFY_{subject.partition('alice', PARTITIONS)}")
    await alice.connect()
    live = await mesh.publish("alice")
    await alice.expect(*missed, *live)
    mesh.ledger.check_device("alice", "phone", alice.ids, most_copies=1)
    assert alice.ids == mesh.ledger.accepted["alice"]
