"""Kills of fan-out agents and of the log half-way through a crowd: nobody misses a copy, nobody gets two.

Where many subscribe: what was decided once is done, by whoever does it, and one broadcast is stored.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Final

import pytest

from support.clock import PATIENCE_S
from support.ledger import stored_ids
from support.mesh import Agent, Mesh, running_mesh
from tidings.stream.topology import BROADCAST, DECISIONS
from tidings.wire.position import Position

CROWD: Final = 1000
MANY: Final = 5000
"""More than are copied by default."""
FEW: Final = 3
"""Subscribers up to which a topic of some tests is copied."""
MOST: Final = 10_000
ZERO: Final = Position(0, 0)


@pytest.fixture
async def small(tmp_path: Path) -> AsyncIterator[Mesh]:
    """A mesh where more than a few subscribers get a broadcast."""
    async with running_mesh(tmp_path, fanout_write_max=FEW) as running:
        yield running


async def crowd(mesh: Mesh, topic: str, count: int = CROWD) -> list[str]:
    """So many users follow a topic."""
    users = [f"user{number}" for number in range(count)]
    for first in range(0, count, 250):
        await asyncio.gather(*(mesh.store.subscribe(user, [topic], MOST, ZERO) for user in users[first : first + 250]))
    return users


async def copies(mesh: Mesh) -> int:
    """How many there are in the log."""
    streams = (await mesh.connection.api("STREAM.LIST"))["streams"]
    return sum(info["state"]["messages"] for info in streams if info["config"]["name"].startswith("NOTIFY_"))


async def messages(mesh: Mesh, stream: str) -> int:
    """How many there are in a stream."""
    count: int = (await mesh.connection.api(f"STREAM.INFO.{stream}"))["state"]["messages"]
    return count


async def half_way(mesh: Mesh, agents: list[Agent]) -> None:
    """Wait until some copies are there, and have all agents stand still: not all are."""
    async with asyncio.timeout(PATIENCE_S):
        while not await copies(mesh):
            await asyncio.sleep(0)
    for agent in agents:
        agent.freeze()


async def settled(mesh: Mesh, count: int) -> None:
    """Wait until so many topic messages are done with."""
    async with asyncio.timeout(3 * PATIENCE_S):
        while (await mesh.connection.api("CONSUMER.INFO.TOPICS.fanout"))["ack_floor"]["stream_seq"] < count:
            await asyncio.sleep(0.05)


async def each_has_one(mesh: Mesh, users: list[str], ids: list[str], others: int = 0) -> None:
    """In the end every user has a copy of each, in the log and in the inbox, and nobody two."""
    await settled(mesh, len(ids))
    expected = sorted(ids)

    async def has_one(user: str) -> None:
        await mesh.stored(user, *ids)
        assert sorted(await stored_ids(mesh.store, user)) == expected

    for first in range(0, len(users), 50):
        await asyncio.gather(*map(has_one, users[first : first + 50]))
    assert await copies(mesh) == len(users) * len(ids) + others


@pytest.mark.parametrize("how", ["killed", "frozen"])
async def test_agent_dies_half_way(mesh: Mesh, how: str) -> None:
    """Another agent takes over what one had, all of it; one that thaws and goes on adds nothing."""
    users = await crowd(mesh, "crowd")
    first = await mesh.fanout(fanout_in_flight=128)
    ids = await mesh.publish_topic("crowd", *users)
    await half_way(mesh, [first])
    assert 0 < await copies(mesh) < CROWD
    if how == "killed":
        await first.kill_agent()
    await mesh.fanout()
    await mesh.inbox()
    await each_has_one(mesh, users, ids)
    if how == "frozen":
        first.thaw()
    ids += await mesh.publish_topic("crowd", *users)
    await each_has_one(mesh, users, ids)


async def test_five_thousand_copies(tmp_path: Path) -> None:
    """As many as an operator lets be copied: killed half-way, all of them are there, once."""
    async with running_mesh(tmp_path, fanout_write_max=MANY) as mesh:
        users = await crowd(mesh, "crowd", MANY)
        await mesh.inbox()
        first = await mesh.fanout(fanout_in_flight=128)
        ids = await mesh.publish_topic("crowd")
        await half_way(mesh, [first])
        assert 0 < await copies(mesh) < MANY
        await first.kill_agent()
        await mesh.fanout()
        await each_has_one(mesh, users, ids)
        assert await messages(mesh, BROADCAST) == 0


async def test_agents_come_and_go_under_load(mesh: Mesh) -> None:
    """Three lives of an agent, each killed in the middle of something, beside one that stays."""
    users = await crowd(mesh, "crowd", 100)
    await mesh.inbox()
    await mesh.fanout()
    ids: list[str] = []
    for _ in range(3):
        agent = await mesh.fanout()
        ids += await mesh.publish_topic("crowd", *users, count=20)
        await agent.kill_agent()
    await each_has_one(mesh, users, ids)


async def test_nats_restarts_half_way(mesh: Mesh) -> None:
    """The log goes away in the middle of a crowd, and comes back."""
    users = await crowd(mesh, "crowd")
    await mesh.inbox()
    await mesh.fanout(fanout_in_flight=128)
    ids = await mesh.publish_topic("crowd", *users)
    async with asyncio.timeout(PATIENCE_S):
        while not await copies(mesh):
            await asyncio.sleep(0)
    mesh.nats.kill()
    await mesh.nats.answering()
    await each_has_one(mesh, users, ids)


async def test_a_busy_topic_delays_no_other(mesh: Mesh) -> None:
    """While a topic has more than an agent takes in, what is published to another one is copied at once."""
    users = await crowd(mesh, "crowd", 300)
    await mesh.inbox()
    await mesh.fanout(fanout_batch=64, fanout_in_flight=128)
    await mesh.store.subscribe("alice", ["small"], MOST, ZERO)
    busy = await mesh.publish_topic("crowd", *users, count=120)
    (id,) = await mesh.publish_topic("small", "alice")
    await mesh.stored("alice", id)
    assert await copies(mesh) < len(users) * len(busy), "the busy topic is not done yet"
    await each_has_one(mesh, users, busy, others=1)


@pytest.mark.parametrize("step", ["decided", "broadcast"])
async def test_agent_dies_around_its_broadcast(small: Mesh, step: str) -> None:
    """After the decision and before the broadcast, or before its ack: another agent stores it, if it is not there.

    Few are left to subscribe by then, and it was decided when they were many.
    """
    users = await crowd(small, "crowd", FEW + 1)
    stuck = await small.stuck_fanout(step)
    ids = await small.publish_topic("crowd", *users)
    await stuck.said("stored broadcast")
    assert await messages(small, BROADCAST) == (step == "broadcast")
    await stuck.kill_agent()
    for user in users[1:]:
        await small.store.unsubscribe(user, ["crowd"], ZERO)
    await small.fanout()
    await settled(small, len(ids))
    assert (await messages(small, BROADCAST), await copies(small), await messages(small, DECISIONS)) == (1, 0, 1)


async def test_agent_dies_before_its_copies(small: Mesh) -> None:
    """It was decided when they were few: they get their copies, and so does who came meanwhile."""
    users = await crowd(small, "crowd", FEW)
    stuck = await small.stuck_fanout("decided")
    ids = await small.publish_topic("crowd")
    await stuck.said("stored copies")
    await stuck.kill_agent()
    users = await crowd(small, "crowd", FEW + 2)
    await small.inbox()
    await small.fanout()
    await each_has_one(small, users, ids)
    assert (await messages(small, BROADCAST), await messages(small, DECISIONS)) == (0, 1)
