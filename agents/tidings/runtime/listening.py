"""Listening: the one place where an agent's HTTP server takes its address."""

from __future__ import annotations

import asyncio

from aiohttp import web

from tidings.wire.errors import StartFailed

from .porch import Runner
from .service import Service
from .settings import Settings
from .tls import ServerTls, server_tls
from .tls_server import TlsServer, bind

__all__ = ["listen"]


class _Site(web.TCPSite):
    """aiohttp's; with TLS, connections are accepted by our own server, which counts them before they shake hands."""

    def __init__(
        self, runner: Runner, host: str, port: int, backlog: int, tls: ServerTls | None, handshake_s: float
    ) -> None:
        super().__init__(runner, host, port, backlog=backlog, ssl_context=None if tls is None else tls.context)
        self._strangers = runner
        self._handshake_s = handshake_s
        self._tls_server: TlsServer | None = None

    async def start(self) -> None:
        if self._ssl_context is None:
            await super().start()
            return
        await web.BaseSite.start(self)
        sockets = await bind(self._host, self._port, self._backlog)
        # It has what aiohttp uses of asyncio's: `sockets` and `close`.
        self._tls_server = self._server = TlsServer(  # type: ignore[assignment]
            sockets, self._strangers, self._ssl_context, self._handshake_s
        )

    async def stop(self) -> None:
        await super().stop()
        if self._tls_server is not None:
            await self._tls_server.wait_closed()


async def listen(
    service: Service,
    runner: Runner,
    settings: Settings,
    where: tuple[str, int],
    *,
    backlog: int,
    variable: str,
) -> int:
    """Set `runner` up and serve it at host and port `where`, with TLS if the settings have a certificate.

    Returns the port. Raises `StartFailed`, which names the service, and `variable` for another port. Renewed
    certificates are looked for by a task of the service.
    """
    await runner.setup()
    host, port = where
    tls = server_tls(settings)
    if tls is not None:
        service.spawn(tls.watch())
    site = _Site(runner, host, port, backlog, tls, settings.hello_timeout_s)
    try:
        # Cancelled half-way, asyncio would leave a socket that listens and that nobody has.
        listening = asyncio.ensure_future(site.start())
        try:
            await asyncio.shield(listening)
        except asyncio.CancelledError:
            await asyncio.wait([listening])
            raise
    except OSError as error:
        raise StartFailed(
            f"the {service.name} cannot listen on {host}:{port}: {error.strerror or error}. Is something else running "
            f"there? Choose another with --port or {variable}"
        ) from None
    found: int = runner.addresses[0][1]
    return found
