"""The HTTP api agent.

Reads: requests over HTTP; the store's inbox, subscriptions and routing table; inbox floors (core NATS);
``REVOCATIONS``.
Writes: notifications to the log, as any service does; what an idempotency key stands for to ``KEYS``; revocations;
marks and subscriptions to the store; what devices and gateways are told of both (core NATS).
Acks when: the log has confirmed what was published; the store has committed a mark; a subscription is in force on every
gateway that has a device of the user.
Crash costs: requests under way get no answer. Each may be sent again: published under the same ids, or the same
idempotency key, it is one notification, and marks and subscriptions are the same made twice.
"""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from typing import TYPE_CHECKING, Final

from aiohttp import web

from tidings.identity import Verifier
from tidings.identity.entitlement import TopicEntitlement
from tidings.publish import Publisher
from tidings.runtime.listening import listen
from tidings.runtime.porch import Porch, Runner
from tidings.runtime.service import Service
from tidings.runtime.settings import Settings
from tidings.store.guard import GuardedStore
from tidings.store.port import Store
from tidings.stream import topology
from tidings.stream.connection import Connection, connect
from tidings.stream.revocations import Revocations
from tidings.wire import subject
from tidings.wire.errors import TidingsError

from . import problems
from .app import make_app
from .backing import Backing
from .gate import Gate
from .numbers import ApiNumbers

if TYPE_CHECKING:
    from tidings.telemetry.telemetry import Telemetry

__all__ = ["Api"]

_IDLE_S: Final = 60.0
"""How long a connection stays open between two requests."""
_LINGER_S: Final = 2.0


class Api(Service):
    """One api process (or, in ``tidings dev``, one of its agents); any number of them run side by side.

    `store` is opened and closed by whoever made it.
    """

    name = "api"

    def __init__(self, settings: Settings, store: Store, *, telemetry: Telemetry | None = None) -> None:
        super().__init__()
        self._telemetry = telemetry
        self._numbers = None if telemetry is None else ApiNumbers(telemetry.numbers)
        self._settings = settings
        self._store = store
        self._verifier = Verifier(settings)
        self._entitlement = TopicEntitlement(settings)
        self._connection: Connection | None = None
        self._publisher: Publisher | None = None
        self._backing: Backing | None = None
        self._revocations: Revocations | None = None
        self._runner: Runner | None = None
        self.port = 0
        """The port that is listened on, once started."""

    async def _start(self) -> None:
        settings = self._settings
        await self._verifier.open()
        await self._entitlement.open()
        self._connection = connection = await connect(
            settings, "tidings-api", lost=self._cut_off, found=self._reconnected
        )
        found = await topology.discover(connection)
        await topology.check_topics(connection)
        self._publisher = Publisher(connection, timeout_s=settings.api_publish_timeout_s)
        await self._publisher.open()
        telemetry = self._telemetry
        store = GuardedStore(self._store, settings.store_timeout_s, None if telemetry is None else telemetry.numbers)
        self._backing = backing = Backing(settings, connection, store, self._publisher, self._entitlement, found)
        if telemetry is not None:
            backing.tracing = telemetry.tracing
            telemetry.watch_connection(connection)
        await connection.listen(subject.INBOX_FLOOR, self._heard_floors)
        await backing.floors.read(connection)
        self._revocations = revocations = Revocations(connection, settings)
        # Before anybody is let in: who does not know what was revoked lets everybody in.
        await revocations.open()
        self.spawn(revocations.follow())
        clock = asyncio.get_running_loop().time
        porch = Porch(settings.strangers_max)
        gate = Gate(settings, self._verifier, revocations, porch, clock)
        if self._numbers is not None:
            self._numbers.watch(porch)
            backing.published = self._numbers.published
        app = make_app(backing, gate, self._unready, None if self._numbers is None else self._numbers.answered)
        await self._listen(app, porch)
        secured = " with TLS" if settings.tls_certificate else ""
        self.log.info("the api listens on %s:%d%s", settings.api_host, self.port, secured)

    async def _listen(self, app: web.Application, porch: Porch) -> None:
        settings = self._settings
        self._runner = Runner(
            app,
            porch,
            refusal=problems.of_status,
            access_log=None,
            handle_signals=False,
            shutdown_timeout=settings.api_publish_timeout_s,
            keepalive_timeout=_IDLE_S,
            lingering_time=_LINGER_S,
            auto_decompress=False,
        )
        where = settings.api_host, settings.api_port
        self.port = await listen(self, self._runner, settings, where, backlog=1024, variable="TIDINGS_API_PORT")

    def _unready(self) -> Sequence[str]:
        missing = [] if self.ready else [f"the api is {self.state.value}"]
        if self._revocations is not None and not self._revocations.current:
            missing.append("it is not known which tokens are revoked")
        if self._verifier.problem is not None:
            missing.append(self._verifier.problem)
        return missing

    # From NATS

    def _heard_floors(self, where: bytes, reply: bytes, header: bytes | None, body: bytes) -> None:
        if self._backing is None:
            return
        floors = self._backing.floors
        floors.heard(where, reply, header, body)
        if floors.outdated:
            floors.outdated = False
            self.spawn(self._rediscover(self._backing))

    async def _cut_off(self) -> None:
        if self._revocations is not None:
            self._revocations.cut_off()

    async def _reconnected(self) -> None:
        if self._revocations is not None:
            self._revocations.found()
        if self._backing is not None:
            self.spawn(self._rediscover(self._backing))

    async def _rediscover(self, backing: Backing) -> None:
        try:
            await backing.rediscover()
        except TidingsError as error:
            self.log.warning("the topology cannot be read: %s", error)

    # Leaving

    async def _drain(self) -> None:
        """Not ready from here on, and serving all the same until a load balancer has seen that."""
        await asyncio.sleep(self._settings.drain_notice_s)

    async def _stop(self) -> None:
        if self._runner is not None:
            # Takes no new connections, and waits for what is under way, as long as a publish may take.
            await self._runner.cleanup()
        if self._publisher is not None:
            await self._publisher.close()
        await self._verifier.close()
        await self._entitlement.close()
        if self._connection is not None:
            await self._connection.finish()
