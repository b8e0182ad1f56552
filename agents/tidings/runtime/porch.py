"""Who stands before the door: connections that have not said whose they are.

They cost memory and an open file each. An honest client says hello, or shows its token, in one round trip, so above
the limit the one that has kept silent about it for longest goes: many such connections keep nobody out. No limit
goes by address, because behind a proxy all clients have the same one.
"""

from __future__ import annotations

import asyncio
import logging
import socket
from collections.abc import Callable
from typing import Any, Final, cast

from aiohttp import hdrs, web
from aiohttp.http_exceptions import HttpProcessingError
from aiohttp.web_protocol import RequestHandler
from aiohttp.web_server import Server

__all__ = ["Porch", "Runner", "Stranger", "hang_up"]

_FAIR_S: Final = 1.0
"""Everybody has so long to say hello, however many come: those who come later are told to do so once more."""
_RETRY_AFTER_S: Final = 5
_FULL: Final = (
    f"HTTP/1.1 503 Service Unavailable\r\nRetry-After: {_RETRY_AFTER_S}\r\nContent-Length: 0\r\n"
    "Connection: close\r\n\r\n"
).encode()
_SERVER: Final = "tidings"

Refusal = Callable[[int], web.Response]
"""The answer with a status, to what never came to a handler."""


class _Full(asyncio.Protocol):
    """One connection too many."""

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        writing = cast(asyncio.WriteTransport, transport)
        writing.write(_FULL)
        writing.close()


class Porch:
    """Knows each new connection from its first moment, TLS handshake included, until `forget`."""

    def __init__(self, most: int) -> None:
        self._most = most
        self._waiting: dict[RequestHandler, float] = {}
        """Since when, the longest first."""
        self._now = asyncio.get_running_loop().time
        self.turned_away = 0
        """Connections that ended because others wanted their place, or that found none."""

    def __len__(self) -> int:
        return len(self._waiting)

    def receive(self, make: Callable[[Porch], Stranger]) -> Stranger | None:
        """The protocol of one more connection; None where there is no room for it."""
        now = self._now()
        if len(self._waiting) >= self._most:
            oldest, since = next(iter(self._waiting.items()))
            self.turned_away += 1
            if now - since < _FAIR_S:
                return None
            del self._waiting[oldest]
            cast(Stranger, oldest).drop()
        stranger = make(self)
        self._waiting[stranger] = now
        return stranger

    def forget(self, protocol: RequestHandler) -> None:
        """It has said who it is, or has gone."""
        self._waiting.pop(protocol, None)


def hang_up(connection: socket.socket) -> None:
    """End a connection below its transport, which takes it for the client's doing."""
    try:
        connection.shutdown(socket.SHUT_RDWR)
    except OSError:
        # The client was first.
        logging.getLogger("tidings.http").debug("a connection had ended before it was to")


def _is_ours(record: logging.LogRecord) -> bool:
    """Not what a stranger sent that is no HTTP: anybody could fill the log with that."""
    return record.exc_info is None or not isinstance(record.exc_info[1], HttpProcessingError)


def _plainly(status: int) -> web.Response:
    return web.Response(status=status)


class Stranger(RequestHandler):
    """aiohttp's connection; what it refuses by itself, it answers in our words, which repeat none of the request."""

    __slots__ = ("_porch", "_refusal", "shaking")

    def __init__(self, server: Server, porch: Porch, refusal: Refusal, **options: Any) -> None:
        super().__init__(server, **options)
        self._porch = porch
        self._refusal = refusal
        self.shaking: socket.socket | None = None
        """What it comes over, until the TLS handshake is done: there is no transport before."""

    def connection_lost(self, exc: BaseException | None) -> None:
        self._porch.forget(self)
        super().connection_lost(exc)

    def drop(self) -> None:
        """End the connection at once, whatever waits to be sent."""
        if self.shaking is not None:
            hang_up(self.shaking)
            return
        transport = self.transport
        self.force_close()
        if transport is not None:
            transport.abort()

    def handle_error(
        self,
        request: web.BaseRequest,
        status: int = 500,
        exc: BaseException | None = None,
        message: str | None = None,
    ) -> web.StreamResponse:
        # It logs, and raises where an answer has begun already.
        super().handle_error(request, status, exc, message)
        response = self._refusal(status)
        response.headers.setdefault(hdrs.SERVER, _SERVER)
        response.force_close()
        return response

    async def finish_response(
        self, request: web.BaseRequest, resp: web.StreamResponse, start_time: float | None
    ) -> tuple[web.StreamResponse, bool]:
        if isinstance(resp, web.HTTPExpectationFailed):
            # Raised before any handler or middleware is asked, for addresses that are none too.
            resp = self._refusal(resp.status)
            resp.headers.setdefault(hdrs.SERVER, _SERVER)
        return await super().finish_response(request, resp, start_time)


class Runner(web.AppRunner):
    """aiohttp's runner, whose connections come over the porch. `refusal` is the answer to what is no HTTP (400), to
    what expects something else than 100-continue (417), and to a request that failed beside its handler (500)."""

    def __init__(self, app: web.Application, porch: Porch, *, refusal: Refusal = _plainly, **options: Any) -> None:
        log = logging.getLogger("tidings.http")
        log.addFilter(_is_ours)
        super().__init__(app, logger=log, **options)
        self.porch = porch
        self._refusal = refusal

    @property
    def server(self) -> Callable[[], asyncio.Protocol] | None:  # type: ignore[override]
        """What makes the protocol of each connection without TLS."""
        return None if self._server is None else lambda: self.receive() or _Full()

    def receive(self) -> Stranger | None:
        """The protocol of one more connection; None where there is no room for it."""
        server = self._server
        assert server is not None
        loop = asyncio.get_running_loop()
        return self.porch.receive(lambda porch: Stranger(server, porch, self._refusal, loop=loop, **self._kwargs))
