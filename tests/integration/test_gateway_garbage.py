"""Connections and sessions that end leave nothing for the garbage collector: see `tidings.runtime.collector`."""

from __future__ import annotations

import asyncio
import gc
from collections import Counter
from collections.abc import Iterator

import pytest

from support.clock import until
from support.device import Device
from support.mesh import KEY, Mesh
from tidings.gateway.agent import Gateway
from tidings.identity import issue
from tidings.runtime.settings import Settings

DEVICES = 40
LOOPS = 5
OURS = ("Session", "Socket", "Window", "Entry", "_Frames", "_Response", "_Conversation")


@pytest.fixture
def no_collector() -> Iterator[None]:
    """What is freed, is freed by reference count."""
    gc.collect()
    gc.disable()
    yield
    gc.enable()


def alive() -> Counter[str]:
    """Objects of the gateway's own that exist now, by class."""
    found = Counter(type(thing).__name__ for thing in gc.get_objects() if "tidings.gateway" in str(type(thing)))
    return Counter({name: found[name] for name in OURS if found[name]})


@pytest.mark.usefixtures("no_collector")
async def test_nothing_is_left(mesh: Mesh) -> None:
    """After goodbyes, cuts, replaced and refused connections no object of theirs is alive, without a collection."""
    values = {name: getattr(mesh.settings, name) for name in Settings.__slots__}
    gateway = Gateway(Settings(**{**values, "linger_s": 0, "cursor_flush_s": 0.1, "heartbeat_s": 0.5}), mesh.store)
    await gateway.start()
    # Of earlier tests of the same process, which may have kept a traceback.
    others = alive()
    await mesh.inbox()
    url = f"http://127.0.0.1:{gateway.port}/v1/ws"
    again, refused = Device(url, issue(KEY, "user-0", "phone")), Device(url, "no token")
    devices = [Device(url, issue(KEY, f"user-{number}", "phone")) for number in range(DEVICES)]
    try:
        await asyncio.gather(*(device.connect() for device in devices))
        assert (alive() - others)["Session"] == DEVICES
        for number, device in enumerate(devices):
            await device.expect(*await mesh.publish(f"user-{number}", 2))
        assert (await again.connect())["t"] == "welcome"
        await refused.connect()
        await devices[0].until(lambda: devices[0].close_code == 4409, "the older connection is replaced")
        await asyncio.gather(*(device.leave() for device in devices[1::2]), again.leave())
        await asyncio.gather(*(device.cut() for device in devices[2::2]))
        await refused.close()
        await until(lambda: not len(gateway.hub) and not gateway.hub.notes, "all sessions have ended and are noted")
        await until(lambda: set(alive() - others) <= {"Session", "Window"}, "every connection is freed")
        # Each of the gateway's loops may still name the session that it looked at last.
        await until(lambda: (alive() - others)["Session"] <= LOOPS, "every session is freed")
    finally:
        for device in (*devices, again, refused):
            await device.close()
        await gateway.stop()
