"""The system under test: nats-server, one gateway and one inbox agent, each a process, as an operator starts them.

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
import sys
import time
from asyncio.subprocess import PIPE, Process
from collections.abc import AsyncIterator, Sequence
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, Final

from tidings.runtime.settings import ENVIRONMENT_PREFIX, Settings
from tidings.stream import topology
from tidings.stream.connection import Connection, connect
from tidings.stream.server import NatsServer

from .publisher import Order
from .system import Memory, cpu_s, idle_s, memory, on_cores
from .waiting import until

__all__ = ["EVERYWHERE", "SERVERS", "BenchFailed", "Cores", "Mesh", "Worker", "pick_cores", "running_mesh"]

SERVERS: Final = ("nats-server", "gateway", "inbox")
_START_S: Final = 60.0
_STOP_S: Final = 30.0
_ANSWER_S: Final = 900.0
_SETTLE_S: Final = 15.0
_PAGE: Final = 256
_LINE_BYTES: Final = 2**24
_SAYS_READY: Final = {"gateway": r"listens on \S*:(\d+)", "inbox": r"reads (\d+) partitions"}


class BenchFailed(Exception):
    """The benchmark cannot go on; the message says why."""


@dataclass(frozen=True, slots=True)
class Cores:
    """Where processes run; empty sets leave it to the system."""

    servers: frozenset[int]
    load: frozenset[int]


EVERYWHERE: Final = Cores(frozenset(), frozenset())


class Worker:
    """A process that answers each line of JSON with one line of JSON."""

    def __init__(self, process: Process) -> None:
        self._process = process

    @property
    def pid(self) -> int:
        return self._process.pid

    async def ask(self, do: str, **arguments: Any) -> dict[str, Any]:
        """Give an order and wait for its answer."""
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        self._process.stdin.write(json.dumps({"do": do, **arguments}).encode() + b"\n")
        async with asyncio.timeout(_ANSWER_S):
            line = await self._process.stdout.readline()
        if not line:
            raise BenchFailed(f"the load client ended with {await self._process.wait()} when told to {do}")
        answer: dict[str, Any] = json.loads(line)
        return answer

    async def stop(self) -> None:
        assert self._process.stdin is not None
        self._process.stdin.close()
        await _end(self._process)


class Mesh:
    """Made by `running_mesh`."""

    def __init__(self, folder: Path, nats: NatsServer, settings: Settings, cores: Cores) -> None:
        self._folder = folder
        self._nats = nats
        self._settings = settings
        self._cores = cores
        self._agents: dict[str, Process] = {}
        self._exit = AsyncExitStack()
        self._connection: Connection
        self._runs = 0
        self.load: Worker
        """The load client."""

    async def start(self, profiled: str | None) -> None:
        """Start the agents and the load client, in that order. `profiled` names an agent to run under a profiler."""
        self._connection = await connect(self._settings, "bench")
        self._exit.push_async_callback(self._connection.close)
        await topology.apply(self._connection, self._settings)
        await self._start_agent("inbox", profiled)
        port = int(await self._start_agent("gateway", profiled))
        with on_cores(self._cores.load):
            process = await asyncio.create_subprocess_exec(
                sys.executable, "-m", "bench.load", stdin=PIPE, stdout=PIPE, limit=_LINE_BYTES
            )
        self.load = Worker(process)
        self._exit.push_async_callback(self.load.stop)
        await self.load.ask("setup", port=port, key=self._settings.token_key)

    async def _start_agent(self, name: str, profiled: str | None) -> str:
        environment = {key: text for key, text in os.environ.items() if not key.startswith(ENVIRONMENT_PREFIX)}
        for key, value in asdict(self._settings).items():
            environment[ENVIRONMENT_PREFIX + key.upper()] = str(value)
        log = self._folder / f"{name}.log"
        under = ["-m", "bench.profiler", str(self.profile_of(name))] if name == profiled else ["-m", "tidings"]
        with on_cores(self._cores.servers), log.open("wb") as output:
            process = await asyncio.create_subprocess_exec(
                sys.executable, *under, name, env=environment, stdout=output, stderr=output
            )
        self._agents[name] = process
        self._exit.push_async_callback(_end, process)
        return await self._ready(name, process, log)

    async def _ready(self, name: str, process: Process, log: Path) -> str:
        def said() -> object:
            return process.returncode is not None or re.search(_SAYS_READY[name], log.read_text(errors="replace"))

        await until(said, _START_S)
        text = log.read_text(errors="replace")  # noqa: ASYNC240 - a few lines, before anything is measured
        found = re.search(_SAYS_READY[name], text)
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

    def _pid(self, name: str) -> int:
        if name != "nats-server":
            return self._agents[name].pid
        if self._nats.pid is None or self._nats.restarts:
            raise BenchFailed(f"nats-server died during the benchmark: its log is {self._nats.log_file}")
        return self._nats.pid

    def cpu(self) -> dict[str, float]:
        """CPU seconds so far of each server."""
        try:
            return {name: cpu_s(self._pid(name)) for name in SERVERS}
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
        return {name: memory(self._pid(name)) for name in SERVERS}

    async def publish(self, *, count: int, rate: float, users: range, size: int, message_id: bool) -> dict[str, Any]:
        """Publish from a process of its own, having told the load client what to expect; returns its report."""
        self._runs += 1
        order = Order(self._nats.port, self._runs, count, rate, users.start, len(users), size, message_id)
        await self.load.ask("expect", run=self._runs, count=count)
        with on_cores(self._cores.load):
            process = await asyncio.create_subprocess_exec(
                sys.executable, "-m", "bench.publisher", stdin=PIPE, stdout=PIPE
            )
        output, _ = await process.communicate(json.dumps(asdict(order)).encode())
        if process.returncode != 0:
            raise BenchFailed(f"the publisher ended with {process.returncode}")
        answer: dict[str, Any] = json.loads(output)
        return answer

    async def unsettled(self) -> int:
        """Messages that a consumer, a device's or the inbox agents', still owes or was not told to be done.

        Without this, "received" would be the load client's word alone: here the server says that every
        acknowledgement has reached it and that the inbox has stored everything. Waits a little for that.
        """
        end = time.monotonic() + _SETTLE_S
        while True:
            owed = await self._owed()
            if not owed or time.monotonic() > end:
                return owed
            await asyncio.sleep(0.25)

    async def _owed(self) -> int:
        owed = 0
        for number in range(self._settings.partitions):
            offset, total = 0, 1
            while offset < total:
                request = f"CONSUMER.LIST.{topology.notify_stream(number)}"
                answer = await self._connection.api(request, {"offset": offset})
                owed += sum(item["num_pending"] + item["num_ack_pending"] for item in answer["consumers"])
                offset, total = offset + _PAGE, answer["total"]
        return owed


async def _end(process: Process) -> None:
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
    partitions: int, cores: Cores, *, profiled: str | None = None, devices: int = 0
) -> AsyncIterator[Mesh]:
    """A mesh with nothing in it yet; `devices` is how many are going to connect."""
    with TemporaryDirectory(prefix="tidings-bench-") as path:
        folder = Path(path)
        nats = NatsServer(folder / "nats", partitions=partitions)
        with on_cores(cores.servers):
            await nats.start()
        settings = Settings(
            nats_url=nats.url,
            partitions=partitions,
            replicas=1,
            store_url=f"sqlite:///{folder}/tidings.db",
            token_key=secrets.token_hex(32),
            port=0,
            max_sessions=2 * devices + 1000,
            # Taking 5,000 sessions over may take longer than the default of 30 s on a slow machine.
            linger_s=120,
            drain_s=0,
        )
        mesh = Mesh(folder, nats, settings, cores)
        try:
            await mesh.start(profiled)
            yield mesh
        finally:
            await mesh.stop()
            await nats.stop()


def pick_cores(available: Sequence[int]) -> Cores:
    """Servers on the first core, load on the second; on one core alone nothing is pinned."""
    if len(available) < 2:
        return EVERYWHERE
    return Cores(frozenset(available[:1]), frozenset(available[1:2]))
