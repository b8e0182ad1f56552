"""The development mesh: one command, one process and its nats-server, everything in one folder.

::

    state folder (locked) -> nats-server -> streams and mapping -> store -> inbox agent -> gateway with the page -> api

They stop in the opposite order. All agents are the ones that run in production; only their number, the store and
the settings below differ.
"""

from __future__ import annotations

import asyncio
import dataclasses
import errno
import os
import socket
from collections.abc import Coroutine, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

from tidings.api.agent import Api
from tidings.fanout.agent import FanoutAgent
from tidings.gateway.agent import Gateway
from tidings.inbox.agent import InboxAgent
from tidings.publish.publisher import Publisher
from tidings.runtime.address import reachable
from tidings.runtime.backoff import Backoff
from tidings.runtime.service import Service, State
from tidings.runtime.settings import Settings
from tidings.schema import Schemas
from tidings.store.factory import is_cql, open_store_url
from tidings.store.port import Store
from tidings.stream import consumers, topology
from tidings.stream.connection import ApiError, Connection, connect
from tidings.stream.server import NatsServer, NatsTls
from tidings.telemetry import telemetry_of
from tidings.wire.errors import StartFailed, StoreUnavailable, StreamUnavailable, TopologyMismatch

from .authority import Authority
from .crowd import Crowd
from .routes import Routes
from .state import Running, StateFolder

if TYPE_CHECKING:
    from tidings.telemetry.telemetry import Telemetry

__all__ = ["DevMesh", "embedded"]

_WHERE_NATS_IS: Final = ("127.0.0.1", "0.0.0.0")
"""Who listens there has a port that NATS cannot have."""

_RENEW_S: Final = 43_200
"""How often certificates are looked at, which are made anew a month before their end."""

_DRAIN_S: Final = 0.7
_AGENTS_STOP_S: Final = 1.0
_CLOSE_S: Final = 0.4
"""With two seconds for nats-server, all of it is less than the five that a Ctrl-C may take."""


class DevMesh(Service):
    """A whole mesh on a state folder. Give `settings` with the HTTP host and port; the rest is set here."""

    name = "dev"

    def __init__(
        self,
        settings: Settings,
        state: Path,
        *,
        nats_port: int = 4222,
        fresh: bool = False,
        store_url: str | None = None,
        tls: bool = False,
    ) -> None:
        super().__init__()
        self._tls = tls
        self.authority: Authority | None = None
        """Of the certificates, where there is TLS."""
        self._store_url = store_url
        self.folder = StateFolder(state)
        self.settings = settings
        self._fresh = fresh
        self._nats_port = nats_port
        self._nats: NatsServer | None = None
        self._connection: Connection | None = None
        self._store: Store | None = None
        self._publisher: Publisher | None = None
        self._inbox: InboxAgent | None = None
        self._fanout: FanoutAgent | None = None
        self._gateway: Gateway | None = None
        self._api: Api | None = None
        self._telemetry: Telemetry | None = None

    @property
    def nats(self) -> NatsServer:
        if self._nats is None:
            raise RuntimeError("the mesh was not started")
        return self._nats

    @property
    def http_url(self) -> str:
        """Of the page; a mesh that listens everywhere is reached at the loopback address too."""
        if self._gateway is None:
            raise RuntimeError("the mesh was not started")
        return _url(self.settings.host, self._gateway.port, tls=self._tls)

    @property
    def api_url(self) -> str:
        """Of the HTTP api, likewise."""
        if self._api is None:
            raise RuntimeError("the mesh was not started")
        return _url(self.settings.api_host, self._api.port, tls=self._tls)

    async def _start(self) -> None:
        settings = self.settings
        _check_port("page", settings.host, settings.port, "--port", {"NATS": ("--nats-port", self._nats_port)})
        others = {"NATS": ("--nats-port", self._nats_port), "the page": ("--port", settings.port)}
        _check_port("HTTP api", settings.api_host, settings.api_port, "--api-port", others)
        self.folder.open(fresh=self._fresh)
        key = self.folder.key()
        if self._tls:
            self.authority = Authority(self.folder.tls, self.settings.host)
            # The address may be another one than the last time.
            self.authority.renew(anew=True)
        self._nats = NatsServer(
            self.folder.nats,
            port=self._nats_port,
            partitions=self.folder.marker.partitions,
            tls=None if self.authority is None else NatsTls(self.authority.certificate, self.authority.key),
        )
        await self._nats.start()
        self.settings = embedded(self.settings, self.folder, self._nats.url, key, self._store_url, self.authority)
        self._connection = await connect(self.settings, "tidings-dev", found=self._nats_is_back)
        await self._make_streams(self._connection)
        await topology.probe_mapping(self._connection, self.settings.partitions)
        self._store = await self._open_store()
        await self._start_agents(self._store)
        urls = self._nats.url, self.http_url, self.api_url, self.settings.store_url
        self.folder.note_running(Running(os.getpid(), *urls, self.settings.nats_ca))
        if self.authority is not None:
            self.spawn(self._keep_certificates(self.authority))

    async def _keep_certificates(self, authority: Authority) -> None:
        """A mesh that runs for months: the gateway sees by itself that the files are new, nats-server is told."""
        while True:
            await asyncio.sleep(_RENEW_S)
            if authority.renew():
                self.nats.reload()

    async def _make_streams(self, connection: Connection) -> None:
        """Create or verify the topology. What was made once and is missing now was lost, and is not made anew."""
        try:
            await self._apply(connection)
        except (TopologyMismatch, ApiError) as error:
            raise self._damaged(f"the stored streams in {self.nats.store_dir} are damaged: {error}") from None
        self.folder.note_streams_made()

    async def _apply(self, connection: Connection) -> None:
        changes = await topology.plan(connection, self.settings)
        made = [change.body["name"] for change in changes if change.request.startswith("STREAM.CREATE.")]
        # A state folder of before there were topics, broadcasts, keys or revocations has no streams for them yet.
        later = (topology.TOPICS, topology.DECISIONS, topology.BROADCAST, topology.KEYS, topology.REVOCATIONS)
        lost = [name for name in made if name not in later]
        if self.folder.marker.streams_made and lost:
            raise TopologyMismatch(f"missing {', '.join(lost)}")
        await topology.apply(connection, self.settings)

    async def _nats_is_back(self) -> None:
        # Called while nats-py is still busy reconnecting: requests wait for it to be done.
        if self.state in (State.STARTING, State.READY):
            self.spawn(self._verify_streams())

    async def _verify_streams(self) -> None:
        """After a restart of nats-server: its state is on disk, so normally nothing is to be done."""
        backoff = Backoff(0.1, 2.0)
        while self._connection is not None:
            try:
                await self._apply(self._connection)
            except StreamUnavailable as error:
                self.log.warning("the streams cannot be verified: %s", error)
                await asyncio.sleep(backoff.next())
            else:
                return

    async def _open_store(self) -> Store:
        url, elsewhere = self.settings.store_url, is_cql(self.settings.store_url)
        if not elsewhere:
            await self._check_inbox()
        store = open_store_url(url, retention_days=self.settings.retention_days)
        try:
            if elsewhere:
                await _apply_schema(url)
            await store.open()
        except StoreUnavailable as error:
            await store.close()
            if elsewhere:
                raise StartFailed(f"the inbox cannot be opened: {error}") from None
            raise self._damaged(f"the inbox cannot be opened: {error}") from None
        return store

    async def _check_inbox(self) -> None:
        """SQLite takes a file that is gone, or cut off, for a new one: what was in it would be lost in silence."""
        if not self.folder.inbox_is_empty():
            return
        connection = self._connection
        assert connection is not None
        numbers = range(self.settings.partitions)
        if any(await asyncio.gather(*(consumers.last_sequence(connection, number) for number in numbers))):
            raise StartFailed(
                f"the inbox in {self.folder.path} is missing or empty, and the log is not: put a copy of it back, name "
                "the store that it was in with --store, or begin anew with --fresh, which deletes what is stored there"
            )

    def _damaged(self, what: str) -> StartFailed:
        return StartFailed(
            f"{what}. Put a copy of the state folder {self.folder.path} back, or begin anew with --fresh, "
            "which deletes what is stored there"
        )

    async def _start_agents(self, store: Store) -> None:
        self._telemetry = telemetry = telemetry_of(self.settings, "dev")
        if telemetry is not None:
            await telemetry.start()
        # The inbox agent first: it announces the floors from which a gateway's sessions catch up.
        self._inbox = InboxAgent(self.settings, store, telemetry=telemetry)
        await self._inbox.start()
        self._fanout = FanoutAgent(self.settings, store, telemetry=telemetry)
        await self._fanout.start()
        routes = Routes(self.settings, Crowd(self.settings, store))
        self._gateway = Gateway(self.settings, store, routes=routes.add_to, telemetry=telemetry)
        self._publisher = routes.publisher = Publisher(
            self.settings,
            schemas=Schemas.checking(self.settings),
            tracing=None if telemetry is None else telemetry.tracing,
        )
        await self._publisher.open()
        await self._gateway.start()
        self._api = Api(self.settings, store, telemetry=telemetry)
        await self._api.start()
        for service in (self.nats, self._inbox, self._fanout, self._gateway, self._api):
            self.spawn(service.failed())

    async def _drain(self) -> None:
        agents = [agent.drain() for agent in self._agents()]
        await self._within(_DRAIN_S + 0.3, "the agents drain", *agents)

    async def _stop(self) -> None:
        try:
            await self._stop_agents()
        finally:
            if self._nats is not None:
                await self._nats.stop()
            self.folder.close()

    def _agents(self) -> list[Service]:
        """In the order in which they stop."""
        agents: tuple[Service | None, ...] = (self._api, self._gateway, self._fanout, self._inbox)
        return [agent for agent in agents if agent is not None]

    async def _stop_agents(self) -> None:
        agents = [agent.stop() for agent in self._agents()]
        if self._publisher is not None:
            agents.append(self._publisher.close())
        await self._within(_AGENTS_STOP_S, "the agents stop", *agents)
        if self._connection is not None:
            await self._within(_CLOSE_S, "the connection closes", self._connection.finish())
        if self._telemetry is not None:
            await self._within(_CLOSE_S, "telemetry is sent", self._telemetry.stop())
        if self._store is not None:
            await self._within(_CLOSE_S, "the store closes", self._store.close())

    async def _within(self, seconds: float, what: str, *works: Coroutine[Any, Any, None]) -> None:
        """Leave what hangs behind: the process ends, and all that matters is stored and can be read again."""
        try:
            async with asyncio.timeout(seconds):
                await asyncio.gather(*works)
        except TimeoutError:
            self.log.warning("%s for longer than %.1f s: left behind", what, seconds)


async def _apply_schema(url: str) -> None:
    from tidings.store.cql import parse_url, schema

    await schema.apply(parse_url(url), "simple:1", development=True)


def embedded(
    settings: Settings,
    folder: StateFolder,
    nats_url: str,
    key: str,
    store_url: str | None = None,
    authority: Authority | None = None,
) -> Settings:
    """The settings of a mesh on a state folder: its own server, store and keys, whatever the environment says.

    `store_url` is for an inbox that is not in the folder.
    """
    return dataclasses.replace(
        settings,
        nats_url=nats_url,
        nats_credentials="",
        nats_ca="" if authority is None else str(authority.ca),
        nats_certificate="",
        nats_key="",
        tls_certificate="" if authority is None else str(authority.certificate),
        tls_key="" if authority is None else str(authority.key),
        partitions=folder.marker.partitions,
        replicas=1,
        store_url=store_url or folder.store_url,
        token_key=key,
        token_key_file="",
        token_jwks_url="",
        token_issuer="",
        token_audience="",
        drain_s=min(settings.drain_s, _DRAIN_S),
    )


def _url(host: str, port: int, *, tls: bool) -> str:
    return f"{'https' if tls else 'http'}://{reachable(host)}:{port}"


def _check_port(what: str, host: str, port: int, option: str, others: Mapping[str, tuple[str, int]]) -> None:
    """Fail before anything is started; the agents find the same out later, after much that is then stopped again.

    `others` are the ports of whoever else listens here: who, its option and its port.
    """
    try:
        found = socket.getaddrinfo(host or None, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)
    except OSError as error:
        raise StartFailed(
            f"no address is known for the host {host!r}: {error.strerror}. Choose another --host"
        ) from None
    for other, (its_option, its_port) in others.items():
        if port and port == its_port and any(address[0] in _WHERE_NATS_IS for *_, address in found):
            raise StartFailed(
                f"the {what} and {other} cannot both have port {port}: give {option} and {its_option} different "
                "numbers (0 for any free one)"
            )
    for family, kind, protocol, _, address in found:
        with socket.socket(family, kind, protocol) as trial:
            trial.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            try:
                trial.bind(address)
            except OSError as error:
                raise _cannot_listen(what, host, port, option, error) from None


def _cannot_listen(what: str, host: str, port: int, option: str, error: OSError) -> StartFailed:
    if error.errno == errno.EADDRINUSE:
        reason = f"the port is in use: stop who has it, or choose another with {option} (0 for any free one)"
    elif error.errno == errno.EACCES:
        reason = f"this user may not listen on that port: choose one above 1023 with {option}"
    else:
        reason = f"{error.strerror}: choose an address of this machine with --host"
    return StartFailed(f"the {what} cannot be served on {host}:{port}, {reason}")
