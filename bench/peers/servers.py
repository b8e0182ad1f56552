"""The peers, each started as its documentation says, on the servers' core.

`Server` is what a workload needs of one: start, stop, restart, publish, and the processes that are measured.
"""

from __future__ import annotations

import asyncio
import json
import os
import shutil
import sys
from abc import ABC, abstractmethod
from asyncio.subprocess import Process
from collections.abc import AsyncIterator, Mapping
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, Final

from bench.host import BenchFailed, Cores, Mesh, end_process, free_port, publish_from, running_mesh
from bench.publisher import Order, user_of
from bench.system import cpu_s, idle_s, memory, on_cores
from tidings.runtime.settings import Settings
from tidings.stream import consumers, topology
from tidings.wire import subject

from .dialects import SHARED_TOPIC
from .http_publisher import HttpOrder

__all__ = ["PEERS", "Load", "Missing", "Programs", "Server", "running"]

_START_S: Final = 60.0
_HERE: Final = Path(__file__).parent
_PATIENCE_S: Final = 30.0
_PARTITIONS: Final = 64
_AT_ONCE: Final = 64


class Missing(BenchFailed):
    """What a peer needs is not on this machine; the message says what."""


@dataclass(frozen=True, slots=True)
class Programs:
    """Where the peers' programs are."""

    centrifugo: str | None = None
    redis: str = "redis-server"
    node: str = "node"
    npm: str = "npm"


@dataclass(frozen=True, slots=True)
class Load:
    """Notifications to publish."""

    run: int
    count: int
    rate: float
    """A second."""
    devices: int
    size: int
    shared: bool
    """Each to everybody, instead of to one of `devices` drawn at random."""


class Server(ABC):
    """One peer, with nobody connected yet."""

    dialect: str
    key = ""
    """What signs tokens, where devices need one."""
    port = 0

    def __init__(self, programs: Programs, folder: Path, cores: Cores) -> None:
        self._programs = programs
        self._folder = folder
        self._cores = cores
        self._exit = AsyncExitStack()
        self._processes: dict[str, Process] = {}

    @abstractmethod
    async def start(self, devices: int) -> None:
        """Start everything; `devices` are going to connect."""

    async def stop(self) -> None:
        await self._exit.aclose()

    @abstractmethod
    async def restart(self) -> None:
        """Stop what devices are connected to, as a deployment does, and start it again at the same address."""

    @abstractmethod
    async def publish(self, load: Load) -> dict[str, Any]:
        """Publish from a process of its own; returns its report."""

    async def simulate(self, first: int, count: int) -> bool:
        """Have so many further devices that only the server knows, without a socket; False where there is no such."""
        del first, count
        return False

    @property
    @abstractmethod
    def front(self) -> str:
        """The process that devices are connected to."""

    def cpu(self) -> dict[str, float]:
        """CPU seconds so far of each process."""
        return {name: cpu_s(process.pid) for name, process in self._processes.items()}

    def kilobytes(self) -> dict[str, int]:
        """Memory of each process now."""
        return {name: memory(process.pid).pss for name, process in self._processes.items()}

    def idle(self) -> float:
        """Seconds so far that the servers' core had nothing to do."""
        return idle_s(self._cores.servers)

    @property
    def pinned(self) -> bool:
        return bool(self._cores.servers)

    async def _spawn(self, name: str, *command: str, port: int, environment: Mapping[str, str] | None = None) -> None:
        """Start a process, and wait until it listens."""
        log = self._folder / f"{name}.log"
        with on_cores(self._cores.servers), log.open("ab") as output:
            process = await asyncio.create_subprocess_exec(
                *command, stdout=output, stderr=output, cwd=self._folder, env={**os.environ, **(environment or {})}
            )
        if name not in self._processes:
            self._exit.push_async_callback(self._end, name)
        self._processes[name] = process
        async with asyncio.timeout(_START_S):
            while not await _listens(port):
                if process.returncode is not None:
                    tail = " | ".join(log.read_text(errors="replace").splitlines()[-5:])
                    raise BenchFailed(f"{command[0]} ended with {process.returncode}: {tail}")
                await asyncio.sleep(0.02)

    async def _end(self, name: str) -> None:
        await end_process(self._processes[name])


class Tidings(Server):
    """Ours: nats-server, a gateway, a fan-out agent and an inbox agent."""

    dialect = "tidings"
    inbox = True
    _pulls: str | None = None

    async def start(self, devices: int) -> None:
        followers = {SHARED_TOPIC: (f"bench-{number}" for number in range(devices))}
        self.port = free_port()
        self._mesh: Mesh = await self._exit.enter_async_context(
            running_mesh(
                _PARTITIONS,
                self._cores,
                devices=devices,
                followers=followers,
                inbox=self.inbox,
                port=self.port,
                # What everybody follows is a broadcast, however small the benchmark.
                fanout_write_max=min(Settings().fanout_write_max, devices // 2),
            )
        )
        self.key = self._mesh.key

    @property
    def front(self) -> str:
        return "gateway"

    async def restart(self) -> None:
        await self._mesh.stop_agent("gateway")
        await self._mesh.start_gateway("gateway")

    async def publish(self, load: Load) -> dict[str, Any]:
        where = f"notify.topic.{SHARED_TOPIC}" if load.shared else ""
        return await self._mesh.order(
            Order(self._mesh.nats_port, load.run, load.count, load.rate, 0, load.devices, load.size, True, where)
        )

    async def simulate(self, first: int, count: int) -> bool:
        """The consumers of so many sessions, each with its pull out, as a gateway elsewhere has them."""
        connection, settings = self._mesh.connection, Settings()
        if self._pulls is None:
            self._pulls = connection.new_inbox()
            await connection.listen(self._pulls, _ignore)
        pulls = self._pulls
        waiting = iter(range(first, first + count))

        async def create() -> None:
            for number in waiting:
                token = subject.escape(user_of(number))
                partition, name = subject.partition(token, _PARTITIONS), f"simulated-{number}"
                await consumers.create_session(
                    connection,
                    partition,
                    name,
                    token,
                    start=None,
                    start_time=datetime.now(UTC),
                    window=settings.window,
                    ack_wait_s=settings.ack_wait_s,
                    idle_s=3600,
                )
                where = f"$JS.API.CONSUMER.MSG.NEXT.{topology.notify_stream(partition)}.{name}"
                connection.send(where, b'{"batch":64,"expires":3600000000000}', pulls)

        await asyncio.gather(*(create() for _ in range(_AT_ONCE)))
        return True

    def cpu(self) -> dict[str, float]:
        return self._mesh.cpu()

    def kilobytes(self) -> dict[str, int]:
        return {name: used.pss for name, used in self._mesh.memory().items()}


class TidingsWithoutInbox(Tidings):
    """The same without the agent that keeps what a user has been sent: durable in the stream, and acknowledged."""

    inbox = False


class _OverHttp(Server):
    """A peer that is published to by POST /api/batch."""

    prefix = ""

    async def publish(self, load: Load) -> dict[str, Any]:
        order = HttpOrder(
            self.port,
            "/api/batch",
            load.run,
            load.count,
            load.rate,
            load.devices,
            load.size,
            SHARED_TOPIC if load.shared else "",
            self.prefix,
            _PATIENCE_S,
        )
        return await publish_from("peers.http_publisher", asdict(order), self._cores.load)

    async def restart(self) -> None:
        await self._end(self.front)
        await self._start_front()

    @abstractmethod
    async def _start_front(self) -> None: ...

    async def start(self, devices: int) -> None:
        del devices
        self.port = free_port()
        await self._start_front()

    async def _start_redis(self) -> str:
        """Redis as it keeps what it was told when it is killed: written a second later at the latest."""
        program = shutil.which(self._programs.redis)
        if program is None:
            raise Missing(f"{self._programs.redis} is not here: install redis-server, or name it with --redis")
        port = free_port()
        await self._spawn(
            "redis",
            *(program, "--port", str(port), "--bind", "127.0.0.1", "--save", ""),
            *("--appendonly", "yes", "--appendfsync", "everysec"),
            port=port,
        )
        return f"redis://127.0.0.1:{port}"


class Centrifugo(_OverHttp):
    """Centrifugo with its memory engine."""

    dialect = "centrifugo"
    prefix = "news:"

    @property
    def front(self) -> str:
        return "centrifugo"

    async def start(self, devices: int) -> None:
        config = {
            "client": {"insecure": True},
            "http_api": {"insecure": True},
            "log": {"level": "error"},
            "engine": await self._engine(),
            "channel": {
                "namespaces": [
                    {"name": "news", "history_size": 1000, "history_ttl": "300s", "force_recovery": True},
                ]
            },
        }
        (self._folder / "centrifugo.json").write_text(json.dumps(config))
        await super().start(devices)

    async def _engine(self) -> dict[str, Any]:
        return {"type": "memory"}

    async def _start_front(self) -> None:
        if self._programs.centrifugo is None:
            raise Missing("where is Centrifugo? Name its binary with --centrifugo")
        program = os.path.abspath(self._programs.centrifugo)  # noqa: ASYNC240 - asks nothing of the disk
        address = ("--http_server.address", "127.0.0.1", "--http_server.port", str(self.port))
        await self._spawn("centrifugo", program, "-c", "centrifugo.json", *address, port=self.port)


class CentrifugoRedis(Centrifugo):
    """Centrifugo with its Redis engine."""

    async def _engine(self) -> dict[str, Any]:
        return {"type": "redis", "redis": {"address": await self._start_redis()}}


class SocketIO(_OverHttp):
    """Socket.IO on Node with connection state recovery."""

    dialect = "socketio"

    @property
    def front(self) -> str:
        return "socket.io"

    async def start(self, devices: int) -> None:
        npm = shutil.which(self._programs.npm)
        if npm is None or shutil.which(self._programs.node) is None:
            raise Missing("Socket.IO needs node and npm")
        source = _HERE / "socketio"
        if not (source / "node_modules").exists():
            installing = await asyncio.create_subprocess_exec(npm, "install", "--no-fund", "--silent", cwd=source)
            if await installing.wait() != 0:
                raise BenchFailed(f"npm install in {source} ended with {installing.returncode}")
        await super().start(devices)

    async def _start_front(self) -> None:
        script = str(_HERE / "socketio" / "server.js")
        await self._spawn(
            "socket.io", self._programs.node, script, str(self.port), port=self.port, environment={"RECOVERY": "1"}
        )


class PythonSocketIO(_OverHttp):
    """python-socketio on aiohttp and uvloop with its Redis manager; it has no recovery."""

    dialect = "socketio"

    @property
    def front(self) -> str:
        return "python-socketio"

    async def start(self, devices: int) -> None:
        self._redis = await self._start_redis()
        await super().start(devices)

    async def _start_front(self) -> None:
        root = str(_HERE.parents[1])
        await self._spawn(
            "python-socketio",
            *(sys.executable, "-m", "bench.peers.python_socketio", str(self.port), self._redis),
            port=self.port,
            environment={"PYTHONPATH": root},
        )


PEERS: Final[dict[str, type[Server]]] = {
    "tidings": Tidings,
    "tidings-no-inbox": TidingsWithoutInbox,
    "centrifugo": Centrifugo,
    "centrifugo-redis": CentrifugoRedis,
    "socketio": SocketIO,
    "python-socketio": PythonSocketIO,
}


def _ignore(where: bytes, reply: bytes, header: bytes | None, body: bytes) -> None:
    """Nobody publishes to a simulated device."""


async def _listens(port: int) -> bool:
    try:
        _, writer = await asyncio.open_connection("127.0.0.1", port)
    except OSError:
        return False
    writer.close()
    await asyncio.gather(writer.wait_closed(), return_exceptions=True)
    return True


@asynccontextmanager
async def running(name: str, programs: Programs, cores: Cores, devices: int) -> AsyncIterator[Server]:
    """One of `PEERS`, in a folder of its own that is gone afterwards."""
    with TemporaryDirectory(prefix="tidings-peers-") as folder:
        server = PEERS[name](programs, Path(folder), cores)
        try:
            await server.start(devices)
            yield server
        finally:
            await server.stop()
