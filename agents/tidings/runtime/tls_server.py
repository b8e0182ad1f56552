"""A server of TLS whose connections are known from the moment they are accepted.

asyncio's own shows no connection before it has shaken hands: those that never do could be neither counted nor ended,
and each of them keeps an open file and the buffers of a handshake. Here the porch has the protocol, and with it the
socket, from the accept on. (`loop.start_tls` on a plain connection is no way there: uvloop reads from a new connection
whatever its protocol pauses, and what comes before the upgrade would be lost to the handshake.)
"""

from __future__ import annotations

import asyncio
import logging
import socket
import ssl
from collections.abc import Sequence
from typing import Final

from .porch import Runner, Stranger, hang_up

__all__ = ["TlsServer", "bind"]

_AT_ONCE: Final = 64
"""Connections accepted in one turn of the loop: what is open goes on in between."""
_RETRY_S: Final = 1.0
"""Without an open file to spare, accepting would fail as often as it is tried."""

log = logging.getLogger("tidings.tls")


async def bind(host: str | None, port: int, backlog: int) -> list[socket.socket]:
    """Sockets that listen on each address of `host`. Raises `OSError` where one cannot be had."""
    found = await asyncio.get_running_loop().getaddrinfo(
        host or None, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE
    )
    sockets: list[socket.socket] = []
    try:
        for family, address in dict.fromkeys((family, address) for family, _, _, _, address in found):
            sockets.append(socket.create_server(address, family=family, backlog=backlog))
            sockets[-1].setblocking(False)
    except OSError:
        for one in sockets:
            one.close()
        raise
    return sockets


class TlsServer:
    """Accepts from `sockets`, which it closes, as long as it is not closed. `context` is good for every handshake,
    which has `handshake_s` seconds."""

    def __init__(
        self, sockets: Sequence[socket.socket], runner: Runner, context: ssl.SSLContext, handshake_s: float
    ) -> None:
        self.sockets = list(sockets)
        self._runner = runner
        self._context = context
        self._handshake_s = handshake_s
        self._loop = asyncio.get_running_loop()
        self._handshakes: dict[asyncio.Task[None], socket.socket] = {}
        """At most as many as the porch has room for."""
        self._retries: set[asyncio.TimerHandle] = set()
        for one in self.sockets:
            self._loop.add_reader(one, self._accept, one)

    def _accept(self, listening: socket.socket) -> None:
        for _ in range(_AT_ONCE):
            try:
                connection, _ = listening.accept()
            except (BlockingIOError, InterruptedError, ConnectionAbortedError):
                return
            except OSError as error:
                log.error("no connection can be accepted for %g s: %s", _RETRY_S, error.strerror or error)  # noqa: TRY400 - the sentence says it all
                self._loop.remove_reader(listening)
                self._retries.add(self._loop.call_later(_RETRY_S, self._retry, listening))
                return
            connection.setblocking(False)
            stranger = self._runner.receive()
            if stranger is None:
                # To be told so it would have to shake hands first, which is what there is no room for.
                connection.close()
                continue
            stranger.shaking = connection
            task = self._loop.create_task(self._shake_hands(connection, stranger))
            self._handshakes[task] = connection
            task.add_done_callback(self._handshakes.pop)

    def _retry(self, listening: socket.socket) -> None:
        self._retries = {one for one in self._retries if one.when() > self._loop.time()}
        self._loop.add_reader(listening, self._accept, listening)

    async def _shake_hands(self, connection: socket.socket, stranger: Stranger) -> None:
        try:
            await self._loop.connect_accepted_socket(
                lambda: stranger, connection, ssl=self._context, ssl_handshake_timeout=self._handshake_s
            )
        except OSError as error:
            # What a stranger sends is no matter for the log: anybody could fill it with that.
            log.debug("a TLS handshake came to nothing: %s", error)
        finally:
            stranger.shaking = None
            if stranger.transport is None:
                self._runner.porch.forget(stranger)

    def close(self) -> None:
        """Accept nothing more, and end the handshakes that are under way."""
        for timer in self._retries:
            timer.cancel()
        for listening in self.sockets:
            self._loop.remove_reader(listening)
            listening.close()
        self.sockets.clear()
        for connection in self._handshakes.values():
            hang_up(connection)

    async def wait_closed(self) -> None:
        """Return when no handshake is under way any more."""
        if self._handshakes:
            await asyncio.wait(list(self._handshakes))
