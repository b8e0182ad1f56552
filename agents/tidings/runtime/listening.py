"""Listening: the one place where an agent's HTTP server takes its address."""

from __future__ import annotations

import asyncio

from aiohttp import web

from tidings.wire.errors import StartFailed

from .service import Service
from .settings import Settings
from .tls import ServerTls, server_tls

__all__ = ["listen"]


class _Site(web.TCPSite):
    """aiohttp's, which would give a client asyncio's 60 s to shake hands in."""

    def __init__(
        self, runner: web.AppRunner, host: str, port: int, backlog: int, tls: ServerTls | None, handshake_s: float
    ) -> None:
        super().__init__(runner, host, port, backlog=backlog, ssl_context=None if tls is None else tls.context)
        self._handshake_s = None if tls is None else handshake_s

    async def start(self) -> None:
        await web.BaseSite.start(self)
        server = self._runner.server
        assert server is not None
        self._server = await asyncio.get_running_loop().create_server(
            server,
            self._host,
            self._port,
            ssl=self._ssl_context,
            backlog=self._backlog,
            ssl_handshake_timeout=self._handshake_s,
        )


async def listen(
    service: Service,
    runner: web.AppRunner,
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
