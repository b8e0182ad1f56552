"""The system under test: nats-server, one gateway, one inbox agent and, for topics, one fan-out agent, each a process,
as an operator starts them.

Everything lives in a folder of its own and on ports of its own, and is gone afterwards. The load's processes are
started here too, on the other cores.
"""

from __future__ import annotations

import asyncio
import json
import os
import re
import secrets
import signal
import socket
import sys
import time
from asyncio.subprocess import PIPE, Process
from collections.abc import AsyncIterator, Iterable, Mapping, Sequence
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import asdict, dataclass, replace
from itertools import islice
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, Final
from urllib.request import urlopen

from tidings.runtime.settings import ENVIRONMENT_PREFIX, Settings
from tidings.store.factory import open_store_url
from tidings.stream import topology
from tidings.stream.connection import Connection, connect
from tidings.stream.server import NatsServer
from tidings.wire.position import Position

from .publisher import Order
from .system import Memory, cpu_s, idle_s, memory, on_cores
from .waiting import until

__all__ = [
    "EVERYWHERE",
    "BenchFailed",
    "Cores",
    "Followers",
    "Mesh",
    "Worker",
    "end_process",
    "free_port",
    "pick_cores",
    "publish_from",
    "running_mesh",
    "start_worker",
]

_START_S: Final = 60.0
_STOP_S: Final = 30.0
_ANSWER_S: Final = 900.0
_SETTLE_S: Final = 15.0
_PAGE: Final = 256
_LINE_BYTES: Final = 2**24
_AT_ONCE: Final = 500
_SAYS_READY: Final = {
    "gateway": r"listens on \S*:(\d+)",
    "inbox": r"reads (\d+) partitions",
    "fanout": r"reads (TOPICS)",
}

Followers = Mapping[str, Iterable[str]]
"""By topic: the users who have subscribed to it."""


class BenchFailed(Exception):
    """The benchmark cannot go on; the message says why."""


@dataclass(frozen=True, slots=True)
class Cores:
    """Where processes run; empty sets leave it to the system."""

    servers: frozenset[int]
    load: frozenset[int]


EVERYWHERE: Final = Cores(frozenset(), frozenset())
_NONE: Final[Followers] = {}
_ALWAYS: Final = Position(0, 0)
"""Before everything of every stream."""


class Worker:
    """A process that answers each line of JSON with one line of JSON."""

    def __init__(self, process: Process) -> None:
        self._process = process
        self._turn = asyncio.Lock()

    @property
    def pid(self) -> int:
        return self._process.pid

    async def ask(self, do: str, **arguments: Any) -> dict[str, Any]:
        """Give an order and wait for its answer."""
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        async with self._turn:
            self._process.stdin.write(json.dumps({"do": do, **arguments}).encode() + b"\n")
            async with asyncio.timeout(_ANSWER_S):
                line = await self._process.stdout.readline()
        if not line:
            raise BenchFailed(f"a process of the load ended with {await self._process.wait()} when told to {do}")
        answer: dict[str, Any] = json.loads(line)
        return answer

    async def stop(self) -> None:
        assert self._process.stdin is not None
        self._process.stdin.close()
        await end_process(self._process)


async def start_worker(module: str, cores: frozenset[int]) -> Worker:
    """Start a module of the benchmark that obeys orders; whoever starts it stops it."""
    with on_cores(cores):
        process = await asyncio.create_subprocess_exec(
            sys.executable, "-m", f"bench.{module}", stdin=PIPE, stdout=PIPE, limit=_LINE_BYTES
        )
    return Worker(process)


async def publish_from(module: str, order: dict[str, Any], cores: frozenset[int]) -> dict[str, Any]:
    """Publish from a process of its own, a module of the benchmark that takes one order; returns its report."""
    with on_cores(cores):
        process = await asyncio.create_subprocess_exec(sys.executable, "-m", f"bench.{module}", stdin=PIPE, stdout=PIPE)
    output, _ = await process.communicate(json.dumps(order).encode())
    if process.returncode != 0:
        raise BenchFailed(f"the publisher ended with {process.returncode}")
    answer: dict[str, Any] = json.loads(output)
    return answer


class Mesh:
    """Made by `running_mesh`."""

    def __init__(self, folder: Path, nats: NatsServer, monitor: int, settings: Settings, cores: Cores) -> None:
        self._folder = folder
        self._monitor = monitor
        self._nats = nats
        self._settings = settings
        self._cores = cores
        self._agents: dict[str, Process] = {}
        self._exit = AsyncExitStack()
        self._runs = 0
        self._port = 0
        self.connection: Connection
        """To nats-server, for the benchmark's own questions."""
        self.load: Worker
        """The load client."""

    async def start(self, profiled: str | None, followers: Followers, *, inbox: bool) -> None:
        """Start the agents and the load client, in that order. `profiled` names an agent to run under a profiler.

        There is a fan-out agent where somebody follows something, and an inbox agent unless it is not wanted.
        """
        self.connection = await connect(self._settings, "bench")
        self._exit.push_async_callback(self.connection.close)
        await topology.apply(self.connection, self._settings)
        if followers:
            await self._subscribe(followers)
            await self._start_agent("fanout", profiled)
        if inbox:
            await self._start_agent("inbox", profiled)
        self._port = int(await self._start_agent("gateway", profiled))
        self.load = await self.start_load()

    async def _subscribe(self, followers: Followers) -> None:
        """Put subscriptions into the store, which nobody has open yet."""
        store = open_store_url(self._settings.store_url)
        await store.open()
        try:
            for topic, users in followers.items():
                waiting = iter(users)
                while some := list(islice(waiting, _AT_ONCE)):
                    await asyncio.gather(*(store.subscribe(user, [topic], 1, _ALWAYS) for user in some))
        finally:
            await store.close()

    async def start_load(self) -> Worker:
        """Start a load client: a fleet of devices of its own."""
        worker = await self.start_worker("load", self._cores.load)
        await worker.ask("setup", port=self._port, key=self._settings.token_key)
        return worker

    async def start_hostile(self) -> Worker:
        """Start the hostile clients, where the load is; see `bench.mallory`."""
        worker = await self.start_worker("mallory", self._cores.load)
        await worker.ask("setup", port=self._port, key=self._settings.token_key)
        return worker

    async def start_bare(self) -> Worker:
        """Start the yardstick, where the servers are; see `bench.bare`."""
        return await self.start_worker("bare", self._cores.servers)

    async def start_worker(self, module: str, cores: frozenset[int]) -> Worker:
        """Start a module of the benchmark that obeys orders."""
        worker = await start_worker(module, cores)
        self._exit.push_async_callback(worker.stop)
        return worker

    async def start_gateway(self, name: str, *, profiled: bool = False) -> int:
        """Start another gateway, with a name that begins with ``gateway``, or one again that was stopped; its port."""
        return int(await self._start_agent(name, name if profiled else None))

    async def stop_agent(self, name: str) -> None:
        """Tell an agent to stop, and wait until it has."""
        await end_process(self._agents.pop(name))

    async def kill_agent(self, name: str) -> None:
        """End an agent without a goodbye to anybody."""
        process = self._agents.pop(name)
        process.kill()
        await process.wait()

    async def api_requests(self) -> int:
        """How many requests wait in the queue of JetStream's API now."""
        url = f"http://127.0.0.1:{self._monitor}/jsz"
        told = await asyncio.to_thread(_get, url)
        waiting: int = told["api"].get("inflight", 0)
        return waiting

    async def _start_agent(self, name: str, profiled: str | None) -> str:
        environment = {key: text for key, text in os.environ.items() if not key.startswith(ENVIRONMENT_PREFIX)}
        for key, value in asdict(self._settings).items():
            environment[ENVIRONMENT_PREFIX + key.upper()] = str(value)
        log = self._folder / f"{name}.log"
        under = ["-m", "bench.profiler", str(self.profile_of(name))] if name == profiled else ["-m", "tidings"]
        with on_cores(self._cores.servers), log.open("wb") as output:
            process = await asyncio.create_subprocess_exec(
                sys.executable, *under, _kind(name), env=environment, stdout=output, stderr=output
            )
        self._agents[name] = process
        self._exit.push_async_callback(end_process, process)
        return await self._ready(name, process, log)

    async def _ready(self, name: str, process: Process, log: Path) -> str:
        pattern = _SAYS_READY[_kind(name)]

        def said() -> object:
            return process.returncode is not None or re.search(pattern, log.read_text(errors="replace"))

        await until(said, _START_S)
        text = log.read_text(errors="replace")  # noqa: ASYNC240 - a few lines, before anything is measured
        found = re.search(pattern, text)
        if found is None:
            tail = " | ".join(text.splitlines()[-5:])
            raise BenchFailed(f"`tidings {name}` did not start (exit status {process.returncode}): {tail}")
        return found[1]

    async def stop(self) -> None:
        await self._exit.aclose()

    # Measuring

    def profile_of(self, name: str) -> Path:
        """Where a profiled agent leaves its profile."""
        return self._folder / f"{name}.profile"

    def tell(self, name: str, number: signal.Signals) -> None:
        """Send an agent a signal."""
        self._agents[name].send_signal(number)

    @property
    def nats_port(self) -> int:
        return self._nats.port

    @property
    def key(self) -> str:
        """What signs tokens."""
        return self._settings.token_key

    @property
    def port(self) -> int:
        """Of the gateway that was started first."""
        return self._port

    def log_of(self, name: str) -> str:
        """What an agent has said since it was started."""
        return (self._folder / f"{name}.log").read_text(errors="replace")

    def _pid(self, name: str) -> int:
        if name != "nats-server":
            return self._agents[name].pid
        if self._nats.pid is None or self._nats.restarts:
            raise BenchFailed(f"nats-server died during the benchmark: its log is {self._nats.log_file}")
        return self._nats.pid

    @property
    def servers(self) -> tuple[str, ...]:
        """What is measured."""
        return ("nats-server", *self._agents)

    def cpu(self) -> dict[str, float]:
        """CPU seconds so far of each server."""
        try:
            return {name: cpu_s(self._pid(name)) for name in self.servers}
        except FileNotFoundError:
            raise BenchFailed("a server died during the benchmark") from None

    @property
    def pinned(self) -> bool:
        """The servers have a core to themselves, as far as the system allows."""
        return bool(self._cores.servers)

    def idle(self) -> float:
        """Seconds so far that the servers' core had nothing to do."""
        return idle_s(self._cores.servers)

    def memory(self) -> dict[str, Memory]:
        """Memory of each server now."""
        return {name: memory(self._pid(name)) for name in self.servers}

    async def publish(
        self,
        *,
        count: int,
        rate: float,
        users: range,
        size: int,
        message_id: bool,
        to: Worker | None = None,
        traced_every: int = 0,
    ) -> dict[str, Any]:
        """Publish from a process of its own, having told the load client what to expect; returns its report."""
        run = self._next_run()
        await (to or self.load).ask("expect", run=run, count=count)
        order = Order(self._nats.port, run, count, rate, users.start, len(users), size, message_id)
        return await self.order(replace(order, traced_every=traced_every))

    async def publish_to(
        self, where: str, *, count: int, rate: float, size: int, devices: int, acking: bool
    ) -> dict[str, Any]:
        """The same to one subject, whose messages come to the load client's first `devices` devices."""
        run = self._next_run()
        await self.load.ask("expect_shared", run=run, count=count, devices=devices, acking=acking)
        return await self.order(Order(self._nats.port, run, count, rate, 0, 1, size, True, where))

    def _next_run(self) -> int:
        self._runs += 1
        return self._runs

    async def order(self, order: Order) -> dict[str, Any]:
        """Publish from a process of its own; returns its report."""
        return await publish_from("publisher", asdict(order), self._cores.load)

    async def unsettled(self, patience_s: float = _SETTLE_S) -> int:
        """Messages that a consumer, a device's or the inbox agents', still owes or was not told to be done.

        Without this, "received" would be the load client's word alone: here the server says that every
        acknowledgement has reached it and that the inbox has stored everything. Waits a little for that.
        """
        end = time.monotonic() + patience_s
        while True:
            owed = await self._owed()
            if not owed or time.monotonic() > end:
                return owed
            await asyncio.sleep(0.25)

    async def _owed(self) -> int:
        owed = 0
        streams = map(topology.notify_stream, (*range(self._settings.partitions), topology.BROADCAST_PART))
        for stream in (*streams, topology.TOPICS):
            offset, total = 0, 1
            while offset < total:
                request = f"CONSUMER.LIST.{stream}"
                answer = await self.connection.api(request, {"offset": offset})
                owed += sum(item["num_pending"] + item["num_ack_pending"] for item in answer["consumers"])
                offset, total = offset + _PAGE, answer["total"]
        return owed


def _kind(name: str) -> str:
    """The agent of a name such as ``gateway-2``."""
    return name.partition("-")[0]


def _get(url: str) -> Any:
    with urlopen(url) as response:
        return json.load(response)


async def end_process(process: Process) -> None:
    """Tell a process to end, and make it when it does not."""
    if process.returncode is None:
        try:
            process.terminate()
            async with asyncio.timeout(_STOP_S):
                await process.wait()
        except TimeoutError:
            process.kill()
            await process.wait()


@asynccontextmanager
async def running_mesh(
    partitions: int,
    cores: Cores,
    *,
    profiled: str | None = None,
    devices: int = 0,
    followers: Followers = _NONE,
    inbox: bool = True,
    **changed: Any,
) -> AsyncIterator[Mesh]:
    """A mesh with nothing in it yet but who follows what; `devices` is how many are going to connect.

    `changed` are settings.
    """
    with TemporaryDirectory(prefix="tidings-bench-") as path:
        folder = Path(path)
        monitor = free_port()
        nats = NatsServer(folder / "nats", partitions=partitions, monitor_port=monitor)
        with on_cores(cores.servers):
            await nats.start()
        values: dict[str, Any] = {
            "nats_url": nats.url,
            "partitions": partitions,
            "replicas": 1,
            "store_url": f"sqlite:///{folder}/tidings.db",
            "token_key": secrets.token_hex(32),
            "port": 0,
            "max_sessions": 2 * devices + 1000,
            # Taking 5,000 sessions over may take longer than the default of 30 s on a slow machine.
            "linger_s": 120,
            "drain_s": 0,
        }
        settings = Settings(**{**values, **changed})
        mesh = Mesh(folder, nats, monitor, settings, cores)
        try:
            await mesh.start(profiled, followers, inbox=inbox)
            yield mesh
        finally:
            await mesh.stop()
            await nats.stop()


def free_port() -> int:
    """A port that nobody listens on now."""
    with socket.create_server(("127.0.0.1", 0)) as server:
        port: int = server.getsockname()[1]
        return port


def pick_cores(available: Sequence[int]) -> Cores:
    """Servers on the first core, load on the second; on one core alone nothing is pinned."""
    if len(available) < 2:
        return EVERYWHERE
    return Cores(frozenset(available[:1]), frozenset(available[1:2]))
