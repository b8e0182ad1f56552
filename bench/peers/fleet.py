"""The load client of all peers: thousands of devices in one process, whatever protocol they speak.

It obeys orders, one JSON object a line on standard input, and answers each with one line.
"""

from __future__ import annotations

import asyncio
import gc
import random
import time
from array import array
from collections.abc import Awaitable, Callable
from typing import Any, Final

import uvloop

from bench.load import quantile
from bench.orders import obey, side_by_side
from bench.peers.dialects import DIALECTS, Dialect, Place
from bench.publisher import EVERYBODY
from bench.raw_socket import WebSocket, client_frame
from bench.waiting import until

__all__ = ["Device", "Fleet", "Ledger"]

_CONNECT_S: Final = 30.0
_PAUSE_S: Final = 0.5
"""A device whose connection broke comes back after a random time of up to so much, which doubles with each failure."""
_PAUSE_MAX_S: Final = 8.0
_ADDRESSES: Final = 16
"""Devices connect from so many addresses of the loopback network: one has ports for some 28,000."""


class Ledger:
    """What came of a run: each of its notifications is for one device, or for each of the first `devices`."""

    def __init__(self, run: int, count: int, devices: int) -> None:
        self.run = run
        self.devices = devices
        """0: each notification is for one device."""
        self.count = count
        self.received = self.duplicates = self.misled = 0
        self._got = bytearray(count * (devices or 1))
        self.latencies = array("q")
        """ns from publishing to receiving, of what came while its device was connected all the time."""
        self.replays = array("q")
        """ns from a device's dialling to receiving, of what was published while the device was away."""
        self.last = array("q", bytes(8 * count))
        """By a notification's number: ns until it came last."""

    def came(self, data: dict[str, Any], device: int, dialled: int, now: int) -> None:
        """A notification came to a device that dialled at this time."""
        number, published = data["number"], data["ns"]
        if (self.devices and device >= self.devices) or (not self.devices and data["device"] != device):
            self.misled += 1
            return
        at = number * self.devices + device if self.devices else number
        if self._got[at]:
            self.duplicates += 1
            return
        self._got[at] = 1
        self.received += 1
        if published >= dialled:
            self.latencies.append(now - published)
            self.last[number] = max(self.last[number], now - published)
        else:
            self.replays.append(now - dialled)

    def missing(self, not_published: set[int]) -> int:
        """How many are still to come; none is due of what the server may not have taken."""
        if self.received >= len(self._got):
            return 0
        size = self.devices or 1
        taken = (number for number in range(self.count) if number not in not_published)
        return sum(size - self._got.count(1, number * size, (number + 1) * size) for number in taken)


class Device(WebSocket):
    """One connection of a device."""

    __slots__ = ("_fleet", "after_s", "dialled", "number", "place", "subscribed")

    def __init__(self, fleet: Fleet, number: int) -> None:
        super().__init__()
        self._fleet = fleet
        self.number = number
        self.place = fleet.place(number)
        self.dialled = time.monotonic_ns()
        self.after_s: float | None = None
        """When the server wants it back, if it said so."""
        self.subscribed: asyncio.Future[bool] | None = asyncio.get_running_loop().create_future()

    @property
    def shared(self) -> bool:
        return self._fleet.shared

    def request(self) -> bytes:
        return self._fleet.dialect.request

    def opened(self) -> None:
        self._fleet.dialect.opened(self)

    def text(self, payload: bytes, now: int) -> None:
        self._fleet.now = now
        self._fleet.dialect.text(self, payload)

    def read(self) -> None:
        self._fleet.dialect.read(self)

    def say(self, payload: bytes) -> None:
        """Send a text."""
        self.transport.write(client_frame(payload))

    def ready(self) -> None:
        """From now on what is published comes."""
        self._settle(True)

    def got(self, data: dict[str, Any]) -> None:
        """A notification came."""
        ledger = self._fleet.ledger
        if data["run"] == ledger.run and (data["device"] == EVERYBODY) == bool(ledger.devices):
            ledger.came(data, self.number, self.dialled, self._fleet.now)

    def connection_lost(self, exc: Exception | None) -> None:
        del exc
        self._fleet.gone(self)
        self._settle(False)

    def _settle(self, ready: bool) -> None:
        if self.subscribed is not None and not self.subscribed.done():
            self.subscribed.set_result(ready)
        self.subscribed = None


class Fleet:
    """All devices of the process."""

    def __init__(self) -> None:
        self.devices: dict[int, Device] = {}
        self.dialect: Dialect
        self.shared = False
        self.ledger = Ledger(-1, 0, 0)
        self.now = 0
        self.dropped = 0
        self._port = 0
        self._places: dict[int, Place] = {}
        self._coming_back: set[asyncio.Task[None]] | None = None
        self._cutter: asyncio.Task[None] | None = None
        self._away = array("d")
        self._began = self._last = 0.0
        self._failures = 0

    def place(self, number: int) -> Place:
        return self._places.setdefault(number, Place())

    async def setup(self, port: int, dialect: str, key: str) -> dict[str, Any]:
        """Which server, and how it is spoken to."""
        self._port, self.dialect = port, DIALECTS[dialect](key)
        return {}

    async def _dial(self, number: int) -> Device | str:
        """Connect and subscribe; the device, or why not."""
        source = f"127.0.1.{number % _ADDRESSES + 1}", 0
        loop = asyncio.get_running_loop()
        try:
            async with asyncio.timeout(_CONNECT_S):
                transport, device = await loop.create_connection(
                    lambda: Device(self, number), "127.0.0.1", self._port, local_addr=source
                )
                try:
                    ready = await device.subscribed if device.subscribed is not None else not device.problem
                except asyncio.CancelledError:
                    transport.abort()
                    raise
        except (TimeoutError, OSError) as error:
            return str(error) or f"not subscribed within {_CONNECT_S:g} s"
        if not ready or device.problem:
            transport.abort()
            return device.problem or "the connection ended before the device was subscribed"
        self.devices[number] = device
        return device

    async def connect(self, first: int, count: int, at_once: int, shared: bool) -> dict[str, Any]:
        """Connect devices, `at_once` at a time; `shared`: to what everybody follows, else to their own channel."""
        self.shared = shared
        waits = array("d")
        problems: list[str] = []

        async def one(number: int) -> None:
            began = time.monotonic()
            found = await self._dial(number)
            if isinstance(found, str):
                problems.append(found)
            else:
                waits.append(time.monotonic() - began)

        began = time.monotonic()
        await side_by_side(range(first, first + count), at_once, one)
        gc.freeze()
        return {
            "connected": len(waits),
            "seconds": time.monotonic() - began,
            "p99_ms": quantile(waits, 0.99) * 1000,
            "problems": problems[:3],
        }

    async def leave(self) -> dict[str, Any]:
        """Cut all connections, and forget how far each device was."""
        leaving = list(self.devices.values())
        self.devices.clear()
        for device in leaving:
            device.transport.abort()
        self._places.clear()
        return {"left": len(leaving)}

    async def expect(self, run: int, count: int, devices: int) -> dict[str, Any]:
        """From now on count the notifications of this run; `devices`: each is for all of the first so many."""
        self.ledger, self.dropped = Ledger(run, count, devices), 0
        gc.disable()
        return {}

    async def collect(self, not_stored: list[int], timeout_s: float) -> dict[str, Any]:
        """Wait until everything has come, or the time is over; then say what came."""
        ledger, doubtful = self.ledger, set(not_stored)
        await until(lambda: not ledger.missing(doubtful), timeout_s, 0.05)
        gc.enable()
        missing = ledger.missing(doubtful)
        live, replays = sorted(ledger.latencies), sorted(ledger.replays)
        lasts = [took / 1e6 for took in ledger.last if took]
        return {
            "received": ledger.received,
            "missing": missing,
            "due": ledger.received + missing,
            "duplicates": ledger.duplicates,
            "misled": ledger.misled,
            "dropped": self.dropped,
            "p50_ms": quantile(live, 0.50) / 1e6,
            "p99_ms": quantile(live, 0.99) / 1e6,
            "last_p50_ms": quantile(lasts, 0.50),
            "replayed": len(replays),
            "replay_p50_ms": quantile(replays, 0.50) / 1e6,
            "replay_p99_ms": quantile(replays, 0.99) / 1e6,
        }

    # Connections that break

    def gone(self, device: Device) -> None:
        """A connection ended."""
        if self.devices.get(device.number) is not device:
            return
        del self.devices[device.number]
        self.dropped += 1
        if self._coming_back is not None:
            self._return(device.number, random.uniform(0, _PAUSE_S) if device.after_s is None else device.after_s)

    def _return(self, number: int, after_s: float) -> None:
        assert self._coming_back is not None
        task = asyncio.ensure_future(self._come_back(number, after_s))
        self._coming_back.add(task)
        task.add_done_callback(self._coming_back.discard)

    async def _come_back(self, number: int, after_s: float) -> None:
        left, pause = time.monotonic(), _PAUSE_S
        await asyncio.sleep(after_s)
        while isinstance(await self._dial(number), str):
            self._failures += 1
            pause = min(2 * pause, _PAUSE_MAX_S)
            await asyncio.sleep(random.uniform(0, pause))
        now = time.monotonic()
        self._away.append(now - left)
        self._last = now - self._began

    async def come_back(self) -> dict[str, Any]:
        """From now on devices whose connections end come back."""
        self._coming_back = self._coming_back if self._coming_back is not None else set()
        self._away, self._began, self._last, self._failures = array("d"), time.monotonic(), 0.0, 0
        return {}

    async def returned(self, timeout_s: float) -> dict[str, Any]:
        """Wait until all are back, or the time is over; then say how that was."""
        coming = self._coming_back
        assert coming is not None
        await until(lambda: not coming, timeout_s, 0.02)
        return {
            "connected": len(self.devices),
            "absent": len(coming),
            "returned": len(self._away),
            "failures": self._failures,
            "away_p50_s": quantile(self._away, 0.50),
            "away_p99_s": quantile(self._away, 0.99),
            "last_s": self._last,
        }

    async def cut_all(self) -> dict[str, Any]:
        """Cut every connection now; all devices dial again at once."""
        assert self._coming_back is not None
        cut = list(self.devices.values())
        self._began = time.monotonic()
        for device in cut:
            device.after_s = 0.0
            device.transport.abort()
        return {"cut": len(cut)}

    async def jitter(self, least_s: float, most_s: float, away_s: float) -> dict[str, Any]:
        """From now on cut each device's TCP after a time between `least_s` and `most_s`, for `away_s`, and again."""

        async def cut() -> None:
            due = {number: time.monotonic() + random.uniform(0, most_s) for number in self.devices}
            while True:
                now = time.monotonic()
                for number in [number for number, when in due.items() if when <= now]:
                    due[number] = now + away_s + random.uniform(least_s, most_s)
                    if (device := self.devices.get(number)) is not None:
                        device.after_s = away_s
                        device.transport.abort()
                await asyncio.sleep(0.01)

        self._cutter = asyncio.ensure_future(cut())
        return {}

    async def calm(self) -> dict[str, Any]:
        """Cut no more."""
        assert self._cutter is not None
        self._cutter.cancel()
        await asyncio.gather(self._cutter, return_exceptions=True)
        return {}


async def _main() -> None:
    fleet = Fleet()
    orders: dict[str, Callable[..., Awaitable[dict[str, Any]]]] = {
        "setup": fleet.setup,
        "connect": fleet.connect,
        "leave": fleet.leave,
        "expect": fleet.expect,
        "collect": fleet.collect,
        "come_back": fleet.come_back,
        "returned": fleet.returned,
        "cut_all": fleet.cut_all,
        "jitter": fleet.jitter,
        "calm": fleet.calm,
    }
    await obey(orders)


if __name__ == "__main__":
    uvloop.run(_main())
