"""The load client: thousands of devices in one process of its own, as cheap as a client can be.

Each acknowledges every notification of one read in one frame. The client obeys orders, one JSON object a line on
standard input, and answers each with one line.
"""

from __future__ import annotations

import asyncio
import gc
import random
import time
from array import array
from collections.abc import Awaitable, Callable
from typing import Any, Final

import orjson
import uvloop

from bench.orders import obey, side_by_side
from bench.publisher import EVERYBODY, own_cpu_s, user_of
from bench.raw_socket import CLOSE, WebSocket, client_frame, upgrade_request
from bench.returning import Attempt, Returning
from bench.waiting import until
from tidings.identity import issue
from tidings.wire.frames import SUBPROTOCOL

__all__ = ["Device", "Fleet", "Shared", "quantile"]

_GOODBYE: Final = client_frame((1000).to_bytes(2, "big"), CLOSE)
_REQUEST: Final = upgrade_request("/v1/ws", SUBPROTOCOL)
_CONNECT_S: Final = 30.0
_LEAVE_S: Final = 5.0


class Shared:
    """What came of a run of broadcasts: every one of them is for each of the first so many devices."""

    def __init__(self, run: int, count: int, devices: int) -> None:
        self.run = run
        self.received = self.duplicates = self.misled = 0
        self._devices = devices
        self._got = bytearray(count * devices)
        self._last = array("q", bytes(8 * count))
        """By a broadcast's number: how long after it was published it came last."""

    def came(self, number: int, device: int, took_ns: int) -> None:
        """One broadcast has come to one device."""
        if device >= self._devices:
            self.misled += 1
            return
        at = number * self._devices + device
        if self._got[at]:
            self.duplicates += 1
            return
        self._got[at] = 1
        self.received += 1
        self._last[number] = max(self._last[number], took_ns)

    def missing(self, doubtful: set[int]) -> int:
        """How many deliveries are still to come; none is due of what may not have been stored."""
        if self.received >= len(self._got):
            return 0
        size = self._devices
        whole = (number for number in range(len(self._last)) if number not in doubtful)
        return sum(size - self._got.count(1, number * size, (number + 1) * size) for number in whole)

    def last_ms(self) -> list[float]:
        """Of each broadcast that came at all."""
        return [took / 1e6 for took in self._last if took]


class Device(WebSocket):
    """One connected device."""

    __slots__ = (
        "_fleet",
        "_number",
        "_positions",
        "after_s",
        "ended",
        "newest",
        "welcomed",
    )

    def __init__(self, fleet: Fleet, number: int) -> None:
        super().__init__()
        self._fleet = fleet
        self._number = number
        self._positions: list[str] = []
        """Of the notifications of one read."""
        self.newest = ""
        """The position that came last, while nothing is acknowledged."""
        self.after_s: float | None = None
        """When the gateway wants it back."""
        loop = asyncio.get_running_loop()
        self.welcomed: asyncio.Future[bool] | None = loop.create_future()
        self.ended: asyncio.Future[None] | None = None

    def request(self) -> bytes:
        return _REQUEST

    def opened(self) -> None:
        self.transport.write(self._fleet.hellos[self._number])

    def connection_lost(self, exc: Exception | None) -> None:
        self._fleet.gone(self._number, self)
        self._settle(False)
        if self.ended is not None:
            self.ended.set_result(None)

    def _settle(self, welcome: bool) -> None:
        if self.welcomed is not None and not self.welcomed.done():
            self.welcomed.set_result(welcome)
        self.welcomed = None

    def text(self, payload: bytes, now: int) -> None:
        if payload.startswith(b'{"t":"n",'):
            self._notified(orjson.loads(payload)["items"], self._positions, now)
        else:
            self._told(orjson.loads(payload))

    def read(self) -> None:
        positions = self._positions
        if positions and not self._fleet.acking:
            self.newest = positions[-1]
        elif positions:
            self.transport.write(client_frame(b'{"t":"ack","pos":["%b"]}' % '","'.join(positions).encode()))
        positions.clear()

    def _notified(self, items: list[dict[str, Any]], positions: list[str], now: int) -> None:
        fleet = self._fleet
        for item in items:
            positions.append(item["pos"])
            data = item["n"]["data"]
            if data["device"] == EVERYBODY:
                fleet.repeated += item["try"] > 1
                if data["run"] == fleet.shared.run:
                    fleet.shared.came(data["number"], self._number, now - data["ns"])
                else:
                    fleet.strays += 1
                continue
            if data["run"] != fleet.run:
                fleet.strays += 1
                continue
            number = data["number"]
            if not fleet.copies[number]:
                fleet.received += 1
                fleet.latencies.append(now - data["ns"])
            fleet.copies[number] += 1
            fleet.repeated += item["try"] > 1
            fleet.misled += data["device"] != self._number

    def _told(self, frame: dict[str, Any]) -> None:
        kind = frame["t"]
        if kind == "welcome":
            self._settle(True)
        elif kind == "gap":
            self._fleet.gaps += 1
        elif kind == "error":
            self.problem = frame["message"]
        elif kind == "bye":
            self.after_s = frame["after_ms"] / 1000


class Fleet:
    """All devices of the process, what they received, and the orders that they obey."""

    def __init__(self) -> None:
        self.devices: dict[int, Device] = {}
        self.listening: list[asyncio.BaseTransport] = []
        self.hellos: dict[int, bytes] = {}
        self.run = -1
        self.shared = Shared(-1, 0, 0)
        self.acking = True
        """Whether what comes is acknowledged at once."""
        self.copies = bytearray()
        """By a notification's number: how often it came."""
        self.latencies = array("q")
        self.received = self.strays = self.repeated = self.misled = self.gaps = self.dropped = 0
        self._ports = [0]
        self._key = ""
        self._returning: Returning | None = None

    def gone(self, number: int, device: Device) -> None:
        if self.devices.get(number) is device:
            del self.devices[number]
            if self._returning is None:
                self.dropped += 1
            else:
                self._returning.gone(number, device.after_s)

    async def setup(self, port: int, key: str) -> dict[str, Any]:
        """Where the gateway is, and the key that signs tokens."""
        self._ports, self._key = [port], key
        return {}

    async def move(self, ports: list[int]) -> dict[str, Any]:
        """Connect to one of these gateways from now on, as behind a load balancer."""
        self._ports = ports
        return {}

    async def come_back(self, at_once: bool) -> dict[str, Any]:
        """Devices whose connection ends come back from now on; see `Returning`."""
        if self._returning is None:
            self._returning = Returning(self._attempt)
        self._returning.begin(at_once)
        return {}

    async def returned(self, timeout_s: float) -> dict[str, Any]:
        """Wait until all are back, or the time is over; then say how that was."""
        assert self._returning is not None
        returning = self._returning
        await until(lambda: not returning.absent, timeout_s, 0.02)
        return {**returning.report(), "connected": len(self.devices)}

    async def _attempt(self, number: int) -> Attempt:
        try:
            async with asyncio.timeout(_CONNECT_S):
                device, welcome = await self._dial(number)
        except (TimeoutError, OSError):
            return Attempt(False, None)
        return Attempt(welcome, device.after_s)

    async def _dial(self, number: int) -> tuple[Device, bool]:
        """Connect, and wait for the welcome or the end of the connection."""
        port = random.choice(self._ports)
        _, device = await asyncio.get_running_loop().create_connection(lambda: Device(self, number), "127.0.0.1", port)
        try:
            welcome = await device.welcomed if device.welcomed is not None else False
        except asyncio.CancelledError:
            device.transport.abort()
            raise
        if welcome:
            self.devices[number] = device
        return device, welcome

    async def connect(self, first: int, count: int, at_once: int) -> dict[str, Any]:
        """Connect devices, `at_once` at a time, each until its welcome."""
        numbers = range(first, first + count)
        for number in numbers:
            token = issue(self._key, user_of(number), "phone", ttl_s=86_400)
            self.hellos[number] = client_frame(orjson.dumps({"t": "hello", "token": token, "device": "phone"}))
        waits = array("d")
        problems: list[str] = []
        start = time.monotonic()
        await side_by_side(numbers, at_once, lambda number: self._connect(number, waits, problems))
        seconds = time.monotonic() - start
        # Devices live until they leave: no need to look at them again and again for garbage.
        gc.freeze()
        return {
            "connected": len(waits),
            "seconds": seconds,
            "p50_ms": quantile(waits, 0.50) * 1000,
            "p99_ms": quantile(waits, 0.99) * 1000,
            "problems": problems[:3],
        }

    async def _connect(self, number: int, waits: array[float], problems: list[str]) -> None:
        began = time.monotonic()
        try:
            async with asyncio.timeout(_CONNECT_S):
                device, welcome = await self._dial(number)
        except (TimeoutError, OSError) as error:
            problems.append(str(error) or f"no welcome within {_CONNECT_S:g} s")
            return
        if welcome:
            waits.append(time.monotonic() - began)
        else:
            problems.append(device.problem or "the connection ended before its welcome")

    async def leave(self, first: int, count: int, at_once: int, goodbye: bool) -> dict[str, Any]:
        """Close connections: with a goodbye (1000), or by cutting TCP, as a dying network does."""
        leaving = [number for number in range(first, first + count) if number in self.devices]
        await side_by_side(leaving, at_once, lambda number: self._leave(number, goodbye))
        return {"left": len(leaving)}

    async def _leave(self, number: int, goodbye: bool) -> None:
        device = self.devices.pop(number)
        device.ended = asyncio.get_running_loop().create_future()
        if goodbye:
            device.transport.write(_GOODBYE)
        else:
            device.transport.abort()
        try:
            async with asyncio.timeout(_LEAVE_S):
                await device.ended
        except TimeoutError:
            device.transport.abort()

    async def expect(self, run: int, count: int) -> dict[str, Any]:
        """From now on count the notifications of this run, numbered from 0 to `count` - 1."""
        self.run, self.copies, self.latencies = run, bytearray(count), array("q")
        self.received = self.strays = self.repeated = self.misled = self.gaps = self.dropped = 0
        gc.disable()
        return {}

    async def expect_shared(self, run: int, count: int, devices: int, acking: bool) -> dict[str, Any]:
        """The same for broadcasts, each to the first `devices` devices."""
        self.shared, self.acking = Shared(run, count, devices), acking
        self.strays = self.repeated = self.gaps = self.dropped = 0
        gc.disable()
        return {}

    async def collect_shared(self, not_stored: list[int], timeout_s: float) -> dict[str, Any]:
        """As `collect`, for broadcasts."""
        shared, doubtful = self.shared, set(not_stored)
        await until(lambda: not shared.missing(doubtful), timeout_s, 0.05)
        gc.enable()
        return {
            "received": shared.received,
            "lost": shared.missing(doubtful),
            "duplicates": shared.duplicates,
            "repeated": self.repeated,
            "misled": shared.misled,
            "strays": self.strays,
            "gaps": self.gaps,
            "dropped": self.dropped,
            "last_ms": shared.last_ms(),
            "cpu_s": own_cpu_s(),
        }

    async def acknowledge(self) -> dict[str, Any]:
        """Every device acknowledges all that it has, in one frame."""
        told = 0
        for device in self.devices.values():
            if device.newest:
                device.transport.write(client_frame(b'{"t":"ack","upto":"%b"}' % device.newest.encode()))
                device.newest = ""
                told += 1
        return {"told": told, "cpu_s": own_cpu_s()}

    async def listen(self, port: int, count: int) -> dict[str, Any]:
        """Connect to something that is no gateway, and read whatever it writes."""
        loop = asyncio.get_running_loop()

        async def one(_: int) -> None:
            transport, _protocol = await loop.create_connection(asyncio.Protocol, "127.0.0.1", port)
            self.listening.append(transport)

        await side_by_side(range(count), 64, one)
        gc.freeze()
        return {"connected": count}

    async def collect(self, not_stored: list[int], timeout_s: float) -> dict[str, Any]:
        """Wait until every stored notification has come, or the time is over; then say what came."""
        doubtful = set(not_stored)
        await until(lambda: not self._missing(doubtful), timeout_s, 0.05)
        gc.enable()
        ordered = sorted(self.latencies)
        return {
            "received": self.received,
            "lost": self._missing(doubtful),
            "duplicates": sum(self.copies) - self.received,
            "repeated": self.repeated,
            "misled": self.misled,
            "strays": self.strays,
            "gaps": self.gaps,
            "dropped": self.dropped,
            **{name: quantile(ordered, share) / 1e6 for name, share in (("p50_ms", 0.5), ("p99_ms", 0.99))},
            "max_ms": ordered[-1] / 1e6 if ordered else 0.0,
            "cpu_s": own_cpu_s(),
        }

    def _missing(self, doubtful: set[int]) -> int:
        if self.received >= len(self.copies):
            return 0
        return sum(1 for number, copies in enumerate(self.copies) if not copies and number not in doubtful)


def quantile(values: Any, share: float) -> float:
    """The value below which this share of all lies; 0 of none."""
    ordered = sorted(values)
    return float(ordered[min(len(ordered) - 1, int(len(ordered) * share))]) if ordered else 0.0


async def _main() -> None:
    fleet = Fleet()
    orders: dict[str, Callable[..., Awaitable[dict[str, Any]]]] = {
        "setup": fleet.setup,
        "connect": fleet.connect,
        "leave": fleet.leave,
        "expect": fleet.expect,
        "collect": fleet.collect,
        "expect_shared": fleet.expect_shared,
        "collect_shared": fleet.collect_shared,
        "acknowledge": fleet.acknowledge,
        "listen": fleet.listen,
        "move": fleet.move,
        "come_back": fleet.come_back,
        "returned": fleet.returned,
    }
    await obey(orders)


if __name__ == "__main__":
    uvloop.run(_main())
