"""A real nats-server on the configuration that ``tidings topology nats-config`` writes, and a mesh of it.

Every program signs in with the key of its role. `Outsider` is any NATS client with a key: what an attacker has who
found one.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager, contextmanager
from pathlib import Path
from types import TracebackType
from typing import Any, Final, Self

import nats
from nats.aio.msg import Msg

from tidings.runtime.settings import Settings
from tidings.store.factory import open_store_url
from tidings.stream import topology
from tidings.stream.connection import connect
from tidings.stream.server import find_binary

from .clock import PATIENCE_S
from .command import run_here
from .mesh import PARTITIONS, QUICK, Agent, Mesh

PUBLISHERS: Final = ("shop:user:*,topic:shop.>", "bank:user:alice,topic:bank.rates")


class SecuredNats:
    """The server and everybody's keys, in a folder. Port and state are the test's, all else is as it was written."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.url = ""
        self._log = folder / "server.log"
        self._process: subprocess.Popen[bytes] | None = None

    def key(self, name: str) -> Path:
        """The file with the seed of a role, or of a publisher (`publisher-shop`)."""
        return self.folder / f"{name}.nk"

    def configure(self, *options: str) -> None:
        """``tidings topology nats-config`` with the publishers and these options."""
        publishers = [word for spec in PUBLISHERS for word in ("--publisher", spec)]
        settings = self.folder / "settings.toml"
        settings.write_text(f"partitions = {PARTITIONS}\n")
        command = ["topology", "nats-config", str(self.folder), *publishers, *options, "--config", str(settings)]
        assert run_here(*command) == 0

    def tidings(self, *arguments: str, key: str | None = None, **environment: str) -> str:
        """Run ``tidings`` to its end, with the key of a role; fails unless it succeeds."""
        own = {name: value for name, value in os.environ.items() if not name.startswith("TIDINGS_")}
        own |= {"TIDINGS_NATS_URL": self.url, "TIDINGS_PARTITIONS": str(PARTITIONS), "TIDINGS_REPLICAS": "1"}
        if key is not None:
            own["TIDINGS_NATS_CREDENTIALS"] = str(self.key(key))
        done = subprocess.run(
            [sys.executable, "-m", "tidings", *arguments],
            env={**own, **environment},
            cwd=self.folder,
            capture_output=True,
            text=True,
            timeout=PATIENCE_S,
            check=False,
        )
        assert done.returncode == 0, done.stdout + done.stderr
        return done.stdout

    def start(self) -> None:
        ports = self.folder / "ports"
        ports.mkdir()
        command = [str(find_binary()), "-c", "nats-server.conf", "-p", "-1", "-a", "127.0.0.1"]
        with self._log.open("wb") as log:
            self._process = subprocess.Popen(
                [*command, "--ports_file_dir", str(ports)], cwd=self.folder, stdout=log, stderr=log
            )
        self._wait(lambda: self._listens(ports), "the server listens")

    def _listens(self, ports: Path) -> bool:
        for file in ports.iterdir():
            text = file.read_text()
            if text:
                self.url = f"nats://127.0.0.1:{json.loads(text)['nats'][0].rpartition(':')[2]}"
                return True
        return False

    def reload(self) -> None:
        """Have the server read its configuration again."""
        assert self._process is not None
        before = self._log.read_text().count("Reloaded server configuration")
        self._process.send_signal(signal.SIGHUP)
        self._wait(lambda: self._log.read_text().count("Reloaded server configuration") > before, "it is read again")

    def _wait(self, done: Any, what: str) -> None:
        until = time.monotonic() + PATIENCE_S
        assert self._process is not None
        # Another process has no event to wait for.
        while not done():
            assert self._process.poll() is None, self._log.read_text()[-2000:]
            assert time.monotonic() < until, f"not in time: {what}"
            time.sleep(0.01)

    def stop(self) -> None:
        if self._process is not None:
            self._process.send_signal(signal.SIGINT)
            self._process.wait(timeout=PATIENCE_S)


@contextmanager
def secured_nats(folder: Path) -> Iterator[SecuredNats]:
    """A server that has no streams yet."""
    folder.mkdir(exist_ok=True)
    server = SecuredNats(folder)
    server.configure()
    try:
        server.start()
        yield server
    finally:
        server.stop()


class Outsider:
    """A NATS client with somebody's key, which tries things. It is not ours, and keeps every refusal."""

    def __init__(self, server: SecuredNats, key: str, replies: str) -> None:
        self._server = server
        self._key = key
        self._replies = replies
        self.refusals: list[str] = []
        self.seen: list[Msg] = []
        """What came to its subscriptions."""

    async def __aenter__(self) -> Self:
        async def refused(error: Exception) -> None:
            self.refusals.append(str(error))

        self.client = await nats.connect(
            self._server.url,
            nkeys_seed=str(self._server.key(self._key)),
            inbox_prefix=self._replies,
            error_cb=refused,
            allow_reconnect=False,
        )
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        await self.client.close()

    async def may_publish(self, where: str, payload: bytes = b"", reply: str = "", **headers: str) -> bool:
        """Publish; whether the server took it."""
        before = len(self.refusals)
        named = {name.replace("_", "-"): value for name, value in headers.items()}
        await self.client.publish(where, payload, reply=reply, headers=named or None)
        await self.settle()
        return len(self.refusals) == before

    async def settle(self) -> None:
        """Wait for the server's word on all that was sent: a refusal comes before the answer to a later ping."""
        # nats-py sends the ping of a flush before what it has queued.
        for _ in range(2):
            await self.client.flush()

    async def may_subscribe(self, where: str, queue: str = "") -> bool:
        """Subscribe; whether the server took it. What comes is in `seen`."""

        async def come(message: Msg) -> None:
            self.seen.append(message)

        before = len(self.refusals)
        await self.client.subscribe(where, queue=queue, cb=come)
        await self.settle()
        return len(self.refusals) == before

    async def ask(self, where: str, body: Any = None) -> dict[str, Any]:
        """A request and its answer, both JSON."""
        payload = b"" if body is None else json.dumps(body).encode()
        answer = await self.client.request(where, payload, timeout=PATIENCE_S)
        found: dict[str, Any] = json.loads(answer.data)
        return found


class SecuredMesh(Mesh):
    """A mesh whose agents sign in, each with the key of its role. The test's own connection is the operator's."""

    secured: SecuredNats
    agents: list[Agent]

    async def _start(self, kind: str, changed: dict[str, Any], program: list[str] | None = None) -> Agent:
        agent = await super()._start(kind, {"nats_credentials": str(self.secured.key(kind)), **changed}, program)
        self.agents.append(agent)
        return agent

    def refusals(self) -> list[str]:
        """What the server refused to any agent."""
        return [line for agent in self.agents for line in agent.output if "credentials" in line]


@asynccontextmanager
async def secured_mesh(folder: Path, **changed: Any) -> AsyncIterator[SecuredMesh]:
    """As `running_mesh`, on a server that lets nobody do more than its role may."""
    with secured_nats(folder / "nats") as server:
        values = {
            **QUICK,
            "nats_url": server.url,
            "nats_credentials": str(server.key("operator")),
            "store_url": f"sqlite:///{folder}/tidings.db",
            **changed,
        }
        settings = Settings(**values)
        store = open_store_url(settings.store_url)
        await store.open()
        connection = await connect(settings, "test")
        mesh = SecuredMesh(folder, server, connection, settings, store)
        mesh.secured, mesh.agents = server, []
        try:
            await topology.apply(connection, settings)
            yield mesh
        finally:
            await mesh.close()
            await connection.close()
            await store.close()
