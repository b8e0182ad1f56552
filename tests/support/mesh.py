"""A mesh of real processes on free ports: nats-server, gateways, inbox agents, a SQLite store."""

from __future__ import annotations

import asyncio
import os
import re
import signal
import sys
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack, asynccontextmanager
from pathlib import Path
from typing import Any, Final

import orjson

from tidings.identity import issue
from tidings.runtime.settings import Settings
from tidings.store.factory import open_store_url
from tidings.store.port import Store
from tidings.stream import consumers, topology
from tidings.stream.connection import Connection, connect
from tidings.stream.server import NatsServer
from tidings.wire import subject
from tidings.wire.notification import build

from .clock import PATIENCE_S, SCALE, until
from .device import Device
from .ledger import Ledger, stored_ids

KEY: Final = "a-key-for-tests-and-nothing-else-0123456789"
PARTITIONS: Final = 4

QUICK: Final[dict[str, Any]] = {
    "partitions": PARTITIONS,
    "replicas": 1,
    "token_key": KEY,
    "port": 0,
    "api_port": 0,
    "ack_wait_s": 1.0 * SCALE,
    "linger_s": 2.0 * SCALE,
    "cursor_flush_s": 0.2,
    "inbox_ack_wait_s": 2.0 * SCALE,
    "fanout_ack_wait_s": 2.0 * SCALE,
    "floor_interval_s": 0.2,
    "probe_interval_s": 0.3,
    "drain_s": 0.5,
    "log_level": "info",
}
"""The product's settings, with its waits shortened to a test's."""


class Agent:
    """A `tidings gateway` or `tidings inbox` of its own process."""

    def __init__(self, kind: str, process: asyncio.subprocess.Process) -> None:
        self.kind = kind
        self.process = process
        self.port = 0
        self.output: list[str] = []
        self._reader = asyncio.create_task(self._read())

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}/v1/ws"

    async def _read(self) -> None:
        assert self.process.stderr is not None
        async for line in self.process.stderr:
            self.output.append(line.decode(errors="replace").rstrip())

    async def said(self, pattern: str) -> re.Match[str]:
        """Wait for a line on standard error."""

        def found() -> re.Match[str] | None:
            return next((match for line in self.output if (match := re.search(pattern, line))), None)

        def done() -> object:
            return found() or self.process.returncode is not None

        await until(done, f"{self.kind} says {pattern!r}: {self.output[-3:]}")
        match = found()
        assert match is not None, f"{self.kind} ended with {self.process.returncode}: {self.output[-5:]}"
        return match

    async def kill_agent(self) -> None:
        """SIGKILL: no goodbye to anybody."""
        self.process.kill()
        await self.process.wait()

    def freeze(self) -> None:
        """SIGSTOP: alive for the kernel, silent for everybody else."""
        self.process.send_signal(signal.SIGSTOP)

    def thaw(self) -> None:
        self.process.send_signal(signal.SIGCONT)

    async def stop(self) -> int:
        """SIGTERM and wait; returns the exit code."""
        if self.process.returncode is None:
            self.thaw()
            self.process.terminate()
            try:
                async with asyncio.timeout(PATIENCE_S):
                    await self.process.wait()
            except TimeoutError:
                self.process.kill()
                await self.process.wait()
                raise AssertionError(f"{self.kind} did not stop: {self.output[-5:]}") from None
        await self._reader
        assert self.process.returncode is not None
        return self.process.returncode


class Mesh:
    """Made by `running_mesh`; whatever is started through it ends with it."""

    def __init__(
        self, folder: Path, nats: NatsServer, connection: Connection, settings: Settings, store: Store
    ) -> None:
        self.folder = folder
        self.nats = nats
        self.connection = connection
        self.settings = settings
        self.store = store
        self.ledger = Ledger()
        self._exit = AsyncExitStack()
        self._sent = 0

    async def gateway(self, **settings: Any) -> Agent:
        """Start a gateway process; returns when it is ready."""
        agent = await self._start("gateway", settings)
        agent.port = int((await agent.said(r"listens on .*:(\d+)"))[1])
        return agent

    async def inbox(self, **settings: Any) -> Agent:
        """Start an inbox process; returns when it is ready."""
        agent = await self._start("inbox", settings)
        await agent.said(r"reads \d+ partitions")
        return agent

    async def fanout(self, **settings: Any) -> Agent:
        """Start a fan-out process; returns when it is ready."""
        agent = await self._start("fanout", settings)
        await agent.said(r"reads TOPICS")
        return agent

    async def api(self, **settings: Any) -> Agent:
        """Start an HTTP api process; returns when it is ready."""
        agent = await self._start("api", settings)
        agent.port = int((await agent.said(r"listens on .*:(\d+)"))[1])
        return agent

    async def stop_nats(self) -> None:
        """Stop nats-server as an operator does, until `start_nats`."""
        await self.nats.stop()

    async def start_nats(self) -> None:
        """Start it again where it was, on whatever its folder has now."""
        self.nats = NatsServer(self.nats.folder, partitions=PARTITIONS, port=self.nats.port)
        await self.nats.start()

    async def stuck_inbox(self) -> Agent:
        """An inbox process that stores and then neither acknowledges nor goes on."""
        return await self._start("inbox", {}, program=["-P", str(Path(__file__).with_name("stuck_inbox.py"))])

    async def stuck_fanout(self, step: str) -> Agent:
        """A fan-out process that stands still after this step of its first message; see `stuck_fanout.py`."""
        program = ["-P", str(Path(__file__).with_name("stuck_fanout.py")), step]
        agent = await self._start("fanout", {}, program=program)
        await agent.said(r"reads TOPICS")
        return agent

    async def _start(self, kind: str, changed: dict[str, Any], program: list[str] | None = None) -> Agent:
        environment = {name: value for name, value in os.environ.items() if not name.startswith("TIDINGS_")}
        default = Settings()
        own = {name for name in Settings.__slots__ if getattr(self.settings, name) != getattr(default, name)}
        for name in {*QUICK, *own, *changed}:
            value = changed.get(name, getattr(self.settings, name))
            environment[f"TIDINGS_{name.upper()}"] = str(value)
        process = await asyncio.create_subprocess_exec(
            sys.executable,
            *(program or ["-m", "tidings", kind]),
            env=environment,
            stderr=asyncio.subprocess.PIPE,
            cwd=self.folder,
        )
        agent = Agent(kind, process)
        self._exit.push_async_callback(agent.stop)
        return agent

    async def device(self, gateway: Agent, user: str, device: str = "phone", **options: Any) -> Device:
        """A device that is not connected yet; see `Device`."""
        made = Device(gateway.url, issue(KEY, user, device), **options)
        self._exit.push_async_callback(made.close)
        return made

    async def online(self, gateway: Agent, user: str, device: str = "phone", **options: Any) -> Device:
        """A device that is connected and welcome."""
        made = await self.device(gateway, user, device, **options)
        welcome = await made.connect()
        assert welcome.get("t") == "welcome", (welcome, made.close_code)
        return made

    async def publish(self, user: str, count: int = 1, *, size: int = 0) -> list[str]:
        """Publish notifications, confirmed by the stream and entered in the ledger; returns their ids."""
        return [await self._publish_one(user, size) for _ in range(count)]

    async def _publish_one(self, user: str, size: int) -> str:
        self._sent += 1
        id, body = build(type="test.made", data={"number": self._sent, "filler": "x" * size}, id=f"n{self._sent}")
        await self.connection.store(subject.notify_user(user), body, {"Nats-Msg-Id": id})
        self.ledger.accept(user, id)
        return id

    async def publish_topic(self, topic: str, *users: str, count: int = 1, size: int = 0) -> list[str]:
        """Publish to a topic; the ledger has each as accepted for these users."""
        ids = []
        for _ in range(count):
            self._sent += 1
            data = {"number": self._sent, "filler": "x" * size}
            id, body = build(type="test.made", data=data, id=f"n{self._sent}", topic=topic)
            await self.connection.store(subject.notify_topic(topic), body, {"Nats-Msg-Id": id})
            for user in users:
                self.ledger.accept(user, id)
            ids.append(id)
        return ids

    async def stored(self, user: str, *ids: str) -> None:
        """Wait until the inbox has these."""
        async with asyncio.timeout(PATIENCE_S):
            while not set(ids) <= set(await stored_ids(self.store, user)):
                await asyncio.sleep(0.02)

    async def floors_announced(self) -> None:
        """Wait until every gateway has heard of floors that cover all that is in the streams now."""
        last = [
            (await self.connection.api(f"STREAM.INFO.{topology.notify_stream(n)}"))["state"]["last_seq"]
            for n in (*range(PARTITIONS), topology.BROADCAST_PART)
        ]
        heard = asyncio.Event()
        times = 0

        def listen(where: bytes, reply: bytes, header: bytes | None, body: bytes) -> None:
            nonlocal times
            if all(floor >= need for floor, need in zip(orjson.loads(body)["floors"], last, strict=True)):
                times += 1
                # Gateways leave what comes in their sockets for some milliseconds: of two they have read the first.
                if times == 2:
                    heard.set()

        watch = await self.connection.listen(subject.INBOX_FLOOR, listen)
        async with asyncio.timeout(PATIENCE_S):
            await heard.wait()
        # What we have heard has left the server for the gateways too; a round trip through it comes after.
        await self.connection.flush()
        await watch.unsubscribe()

    async def broadcasts_stored(self) -> None:
        """Wait until the inbox has all broadcasts, and every gateway knows."""
        async with asyncio.timeout(PATIENCE_S):
            while True:
                last = (await self.connection.api(f"STREAM.INFO.{topology.BROADCAST}"))["state"]["last_seq"]
                stored = await consumers.inbox_floor(self.connection, topology.BROADCAST_PART)
                topics = await self.connection.api("CONSUMER.INFO.TOPICS.fanout")
                if stored == last and not topics["num_pending"] + topics["num_ack_pending"]:
                    break
                await asyncio.sleep(0.02)
        await self.floors_announced()

    async def dead_letters(self) -> list[dict[str, Any]]:
        """What is in DEAD: headers (lower-case names) and body."""
        letters = []
        info = await self.connection.api("STREAM.INFO.DEAD")
        js = self.connection.jetstream()
        for sequence in range(max(1, info["state"]["first_seq"]), info["state"]["last_seq"] + 1):
            message = await js.get_msg("DEAD", sequence)
            headers = {name.lower(): value for name, value in (message.headers or {}).items()}
            letters.append({**headers, "body": message.data or b""})
        return letters

    async def close(self) -> None:
        await self._exit.aclose()


@asynccontextmanager
async def running_mesh(folder: Path, **changed: Any) -> AsyncIterator[Mesh]:
    """nats-server with its topology and a store; gateways and inbox agents are the test's to start."""
    nats = NatsServer(folder / "nats", partitions=PARTITIONS)
    await nats.start()
    values = {**QUICK, "nats_url": nats.url, "store_url": f"sqlite:///{folder}/tidings.db", **changed}
    settings = Settings(**values)
    store = open_store_url(settings.store_url)
    await store.open()
    connection = await connect(settings, "test")
    mesh = Mesh(folder, nats, connection, settings, store)
    try:
        await topology.apply(connection, settings)
        yield mesh
    finally:
        await mesh.close()
        await connection.close()
        await store.close()
        await mesh.nats.stop()
