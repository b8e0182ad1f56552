"""The gateway agent.

Reads: the personal plane's streams, one consumer a session; inbox floors (core NATS); the store's cursors and inbox;
revocations.
Writes: WebSocket frames; cursors and marks to the store; dead letters to ``DEAD``; presence (core NATS).
Acks when: the client has acknowledged the notification, or it is durable as a dead letter, or it is nobody's.
Crash costs: the acks of the last `cursor_flush_s` seconds, which come again as duplicates; its clients reconnect to
another gateway, and its consumers end by themselves after `consumer_idle_s`.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Final

from aiohttp import web

from tidings.identity import Verifier
from tidings.identity.entitlement import TopicEntitlement
from tidings.runtime.listening import listen
from tidings.runtime.porch import Porch, Runner
from tidings.runtime.service import Service
from tidings.runtime.settings import Settings
from tidings.store.guard import GuardedStore
from tidings.store.port import Store
from tidings.stream import gateways, topology
from tidings.stream.connection import Connection, connect
from tidings.stream.topology import BROADCAST_PART
from tidings.wire import codes, subject
from tidings.wire.errors import TidingsError

from .authenticator import Authenticator
from .door import Door
from .hub import Hub
from .keeper import Keeper
from .leaving import Leaving
from .numbers import GatewayNumbers
from .opening import Opener, give_up
from .requests import Requests

if TYPE_CHECKING:
    from tidings.telemetry.telemetry import Telemetry

__all__ = ["Gateway"]

_GULP_S: Final = 0.003
"""What comes from NATS within so long is read at once: at 2,000 notifications a second one costs 64 µs of CPU, where it
costs 109 without and 90 with a millisecond (one run), and the median goes from 0.2 ms to 2.2."""


class Gateway(Service):
    """One gateway process (or, in ``tidings dev``, one of its agents).

    `routes` may add handlers to the HTTP server that carries the WebSockets. `store` is opened and closed by
    whoever made it.
    """

    name = "gateway"

    def __init__(
        self,
        settings: Settings,
        store: Store,
        *,
        routes: Callable[[web.Application], None] | None = None,
        telemetry: Telemetry | None = None,
    ) -> None:
        super().__init__()
        self._telemetry = telemetry
        self._verifier = Verifier(settings)
        self._entitlement = TopicEntitlement(settings)
        self._settings = settings
        self._store = store
        self._routes = routes
        self._connection: Connection | None = None
        self._porch: Porch | None = None
        self._runner: Runner | None = None
        self._hub: Hub | None = None
        self._door: Door | None = None
        self._authenticator: Authenticator | None = None
        self._leaving: Leaving | None = None
        self.port = 0
        """The port that is listened on, once started."""

    @property
    def hub(self) -> Hub:
        if self._hub is None:
            raise RuntimeError("the gateway was not started")
        return self._hub

    async def _start(self) -> None:
        await self._verifier.open()
        await self._entitlement.open()
        self._connection = connection = await connect(
            self._settings, "tidings-gateway", lost=self._cut_off, found=self._reconnected
        )
        found = await topology.discover(connection)
        telemetry = self._telemetry
        store = GuardedStore(
            self._store, self._settings.store_timeout_s, None if telemetry is None else telemetry.numbers
        )
        self._porch = Porch(self._settings.strangers_max)
        tracing = None if telemetry is None else telemetry.tracing
        self._hub = hub = Hub(self._settings, store, connection, found, self.spawn, tracing)
        if telemetry is not None:
            hub.numbers = GatewayNumbers(telemetry.numbers, telemetry.tracing, hub, self._porch)
            telemetry.watch_connection(connection)
        self._authenticator = authenticator = Authenticator(hub, self._verifier)
        # Before anybody is let in: a gateway that does not know what was revoked is none.
        await authenticator.revocations.open()
        await hub.floors.read(connection)
        await connection.listen(subject.INBOX_FLOOR, self._heard_floors)
        await connection.listen(subject.gateway_wildcard(hub.gateway), self._receive)
        await connection.confirm()
        await hub.feed.start(hub.floors[BROADCAST_PART])
        opener = Opener(hub)
        keeper = Keeper(hub, opener)
        requests = Requests(hub, self._entitlement)
        self._door = Door(hub, opener, self._porch, authenticator, requests)
        self._leaving = Leaving(hub, self._door, keeper)
        for loop in (
            keeper.write_cursors,
            keeper.write_notes,
            keeper.keep_time,
            keeper.mend,
            keeper.probe,
            keeper.watch_memory,
            hub.feed.mend,
            authenticator.revocations.follow,
        ):
            self.spawn(loop())
        connection.gulp_s = _GULP_S
        await self._listen()
        secured = " with TLS" if self._settings.tls_certificate else ""
        self.log.info("gateway %s listens on %s:%d%s", hub.gateway, self._settings.host, self.port, secured)

    async def _listen(self) -> None:
        assert self._porch is not None
        assert self._door is not None
        app = web.Application()
        app.router.add_get("/v1/ws", self._door.handle)
        app.router.add_get("/healthz", self._healthz)
        app.router.add_get("/readyz", self._readyz)
        if self._routes is not None:
            self._routes(app)
        self._runner = Runner(
            app,
            self._porch,
            access_log=None,
            handle_signals=False,
            shutdown_timeout=1.0,
            # It also bounds how long a request may take to come.
            keepalive_timeout=self._settings.hello_timeout_s,
            # A body that nobody asked for is not waited for.
            lingering_time=1.0,
        )
        settings = self._settings
        self.port = await listen(
            self, self._runner, settings, (settings.host, settings.port), backlog=4096, variable="TIDINGS_PORT"
        )

    # From NATS

    def _receive(self, where: bytes, reply: bytes, header: bytes | None, body: bytes) -> None:
        """Everything that comes to ``gw.<gateway>.>``: nearly always a notification, under its own subject."""
        hub = self.hub
        if where.startswith(b"part."):
            hub.on_pull_reply(where, reply, header, body)
        elif where.startswith(b"broadcast."):
            hub.feed.receive(where, reply, body)
        elif b".deleted." in where:
            hub.deletions.answered(where.rpartition(b".")[2].decode())
        elif where.endswith(b".claim"):
            # Who cannot be answered is no gateway: it would take the session, and nobody would have its cursor.
            if reply:
                hub.connection.send(reply.decode(), give_up(hub, body))
        elif where.endswith(b".topics"):
            hub.follows.asked(body.decode(), reply.decode())
        elif where.endswith(b".user"):
            hub.tell_here(*gateways.told(body))
        else:
            hub.on_pull_reply(where, reply, header, body)

    def _heard_floors(self, where: bytes, reply: bytes, header: bytes | None, body: bytes) -> None:
        floors = self.hub.floors
        floors.heard(where, reply, header, body)
        if floors.outdated:
            floors.outdated = False
            self.spawn(self._check_topology(self.hub))

    async def _cut_off(self) -> None:
        if self._hub is not None:
            self._hub.follows.cut_off()
        if self._authenticator is not None:
            self._authenticator.revocations.cut_off()

    async def _reconnected(self) -> None:
        """The connection to NATS is back: no pull survived it, and perhaps no consumer."""
        hub = self._hub
        if hub is None or self._connection is None:
            return
        self.log.info("the connection to NATS is back")
        if self._authenticator is not None:
            self._authenticator.revocations.found()
        for session in list(hub.by_consumer.values()):
            session.pull()
        hub.deletions.reconnected()
        hub.feed.lost()
        self.spawn(hub.follows.reload_all())
        self.spawn(self._check_topology(hub))

    async def _check_topology(self, hub: Hub) -> None:
        try:
            found = await topology.discover(hub.connection)
        except TidingsError as error:
            self.log.warning("the topology cannot be read: %s", error)
            return
        if found != hub.topology:
            self.log.warning("the streams are new ones, or were restored: every session starts again")
            sessions = list(hub.by_id.values())
            hub.change_topology(found)
            await hub.floors.read(hub.connection)
            hub.feed.anew()
            for session in sessions:
                hub.close_socket(session, codes.RESTART, hub.bye(2000))
                hub.end(session)

    # Leaving

    async def _drain(self) -> None:
        assert self._leaving is not None
        await self._leaving.drain()

    async def _stop(self) -> None:
        if self._leaving is not None:
            await self._leaving.stop()
        if self._hub is not None:
            self._hub.deletions.close()
        if self._runner is not None:
            await self._runner.cleanup()
        if self._connection is not None:
            await self._connection.finish()
        await self._verifier.close()
        await self._entitlement.close()

    # Health

    async def _healthz(self, request: web.Request) -> web.Response:
        return web.json_response({"status": "ok"})

    async def _readyz(self, request: web.Request) -> web.Response:
        """Whether new devices should come here: 200, or 503 with what is missing."""
        problems: list[str] = []
        if not self.ready:
            problems.append(f"the gateway is {self.state.value}")
        if self._connection is None or not self._connection.is_connected:
            problems.append("no connection to NATS")
        if self._authenticator is not None and not self._authenticator.revocations.current:
            problems.append("it is not known which tokens are revoked")
        if self._verifier.problem is not None:
            problems.append(self._verifier.problem)
        try:
            if self._hub is not None:
                await self._hub.store.check()
            store = "ok"
        except TidingsError as error:
            # Deliveries go on without it: a gateway is not taken out for that.
            store = str(error)
        body = {"status": "unavailable" if problems else "ok", "problems": problems, "store": store}
        return web.json_response(body, status=503 if problems else 200)
