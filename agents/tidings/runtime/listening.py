"""Listening: the one place where an agent's HTTP server takes its address."""

from __future__ import annotations

import asyncio

from aiohttp import web

from tidings.wire.errors import StartFailed

from .tls import ServerTls

__all__ = ["listen"]


async def listen(
    runner: web.AppRunner, what: str, host: str, port: int, *, backlog: int, tls: ServerTls | None, variable: str
) -> int:
    """Set `runner` up and serve it; returns the port. Raises `StartFailed`, which names `what` and `variable`."""
    await runner.setup()
    site = web.TCPSite(runner, host, port, backlog=backlog, ssl_context=None if tls is None else tls.context)
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
            f"the {what} cannot listen on {host}:{port}: {error.strerror or error}. Is something else running there? "
            f"Choose another with --port or {variable}"
        ) from None
    found: int = runner.addresses[0][1]
    return found
