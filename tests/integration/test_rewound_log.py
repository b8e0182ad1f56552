"""A log restored from an older copy, under a store that has seen more: nothing published afterwards is lost."""

from __future__ import annotations

import asyncio
import shutil

from support.clock import PATIENCE_S
from support.mesh import Mesh
from tidings.store.port import PageQuery
from tidings.stream import topology
from tidings.wire.position import Position


async def test_rewound(mesh: Mesh) -> None:
    """The partition goes on under a new incarnation: its sequences come again, and its positions do not."""
    agent, gateway = await mesh.inbox(), await mesh.gateway()
    phone = await mesh.online(gateway, "alice")
    await phone.expect(*await mesh.publish("alice", 2))
    await mesh.floors_announced()
    await agent.stop()
    await mesh.stop_nats()
    copy = mesh.folder / "copy"
    shutil.copytree(mesh.folder / "nats", copy)
    await mesh.start_nats()
    agent = await mesh.inbox()
    lost_by_the_log = await mesh.publish("alice", 5)
    await phone.expect(*lost_by_the_log)
    await mesh.stored("alice", *lost_by_the_log)
    last = Position.parse(phone.items[-1]["pos"])
    async with asyncio.timeout(PATIENCE_S):
        while last not in (await mesh.store.floors()).values():
            await asyncio.sleep(0.02)
    await phone.leave()
    await agent.stop()
    await mesh.stop_nats()
    shutil.rmtree(mesh.folder / "nats")
    copy.rename(mesh.folder / "nats")
    await mesh.start_nats()

    agent = await mesh.inbox()
    await agent.said("goes on under a new incarnation")
    await gateway.said("every session starts again")
    published = await mesh.publish("alice", 3)
    await mesh.stored("alice", *published)
    await phone.connect()
    await phone.expect(*published)
    page = await mesh.store.page("alice", PageQuery(limit=50))
    positions = [item.position for item in page.items]
    assert positions == sorted(set(positions), reverse=True)
    assert positions[2] > last
    assert len(page.items) == 10

    # Whoever renews it a second time, or a little later, finds nothing to renew.
    found = await topology.discover(mesh.connection)
    assert await topology.renew(mesh.connection, await mesh.store.floors()) == found
