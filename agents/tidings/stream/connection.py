"""The NATS connection: nats-py's client with two fast paths for the hot side of an agent.

`Connection.listen` hands each message of a subscription to a plain function, in the turn of the event loop
that read it: no queue, no task switch, no message object. `Connection.send` publishes without an await; all that is
sent in one turn leaves in one write. Everything else (TLS, authentication, reconnecting, requests) is nats-py's
own. The parts of it that are overridden are not public there, hence the upper bound in pyproject.toml and
``tests/integration/test_connection.py``.
"""

from __future__ import annotations

import asyncio
import logging
import ssl
from collections.abc import Awaitable, Callable, Coroutine, Iterable
from typing import Any, Final
from urllib.parse import ParseResult

import nats.errors
import orjson
from nats.aio.client import DEFAULT_BUFFER_SIZE, Client, Srv
from nats.aio.subscription import Subscription
from nats.aio.transport import TcpTransport
from nats.protocol.parser import AWAITING_CONTROL_LINE, Parser

from tidings.runtime.address import has_login, has_tls, shown
from tidings.runtime.settings import Settings
from tidings.runtime.tls import ClientTls
from tidings.wire.errors import StreamUnavailable
from tidings.wire.subject import replies

from .credentials import login

__all__ = ["ApiError", "Connection", "Handler", "Subscription", "connect"]

Handler = Callable[[bytes, bytes, bytes | None, bytes], None]
"""Called with subject, reply subject (empty for none), raw headers (None for none) and payload."""

_NEARLY_S: Final = 0.5

_PERMISSIONS: Final = "permissions violation"
_AUTHORIZATION: Final = "authorization violation"
_FORBIDDEN_AGAIN_S: Final = 5.0

MAX_UNSENT_BYTES: Final = 64 * 1024 * 1024
"""A server that reads so slowly is as good as gone: the connection is made anew."""

log = logging.getLogger("tidings.stream")


class ApiError(StreamUnavailable):
    """JetStream answered a request with an error."""

    def __init__(self, request: str, error: dict[str, Any]) -> None:
        super().__init__(f"JetStream refused {request}: {error.get('description', 'no reason given')}")
        self.status: int = error.get("code", 0)
        self.err_code: int = error.get("err_code", 0)


class _FastParser(Parser):
    """Reads whole MSG and HMSG runs without a regular expression or a copy of the rest per message.

    nats-py's parser matches up to seven expressions a line and deletes each message from the front of its
    buffer. Lines that are not messages go to it unchanged.
    """

    nc: Connection

    async def parse(self, data: bytes = b"") -> None:
        if self.state != AWAITING_CONTROL_LINE:
            await super().parse(data)
            return
        if self.buf:
            data = bytes(self.buf) + data
            self.buf.clear()
        at, size, handlers = 0, len(data), self.nc.handlers
        while at < size:
            start = at + 4 if data.startswith(b"MSG ", at) else at + 5 if data.startswith(b"HMSG ", at) else 0
            end = data.find(b"\r\n", start) if start else -1
            if end < 0:
                break
            words = data[start:end].split(b" ")
            header_size = int(words[-2]) if start == at + 5 else 0
            body = end + 2
            after = body + int(words[-1])
            if after + 2 > size:
                break
            at = after + 2
            reply = words[2] if len(words) == (4 if not header_size else 5) else b""
            header = data[body : body + header_size] if header_size else None
            handler = handlers.get(words[1])
            if handler is None:
                await self.nc._process_msg(int(words[1]), words[0], reply, data[body + header_size : after], header)
            else:
                self.nc.hand_over(handler, words[0], reply, header, data[body + header_size : after])
        if at < size:
            self.buf.extend(data[at:])
            # A message that is cut short waits for its rest; anything else is nats-py's to read.
            if not (self.buf.startswith((b"MSG ", b"HMSG ")) or b"MSG ".startswith(self.buf[:4])):
                await super().parse()
        if self.nc.gulp_s and size < DEFAULT_BUFFER_SIZE:
            await self.nc.let_gather()


class _Transport(TcpTransport):
    """nats-py's, whose streams over TLS are made known to each other."""

    def __init__(self, connected: TcpTransport) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self._bare_io_reader = self._io_reader = connected._io_reader
        self._bare_io_writer = self._io_writer = connected._io_writer

    async def connect_tls(
        self, uri: str | ParseResult, ssl_context: ssl.SSLContext, buffer_size: int, connect_timeout: int
    ) -> None:
        await super().connect_tls(uri, ssl_context, buffer_size, connect_timeout)
        assert self._io_writer is not None
        # An upgraded connection is not made known to its new protocol: that asks, when the server goes, for what TLS
        # cannot do (to stay half open, of which asyncio warns), and its reader could not hold back a fast server.
        transport = self._io_writer.transport
        protocol = transport.get_protocol()
        # A server that refuses our certificate hangs up at once: reading tells.
        if protocol is not None:
            protocol.connection_made(transport)


class Connection(Client):
    """A connection to NATS that reconnects for ever until it is closed."""

    def __init__(self) -> None:
        super().__init__()
        self._ps = _FastParser(self)
        self.handlers: dict[bytes, Handler] = {}
        self._kick: asyncio.Handle | None = None
        self.request_timeout_s = 5.0
        self.forbidden_handlers: set[Callable[[], None]] = set()
        """Called at each refusal of the server's, for `may_not_publish` to be asked."""
        self._forbidden = ""
        self._warn_from = 0.0
        self.tls: ClientTls | None = None
        """Whether the server must have TLS, and what its certificate is checked against."""
        self.api_turns = asyncio.Semaphore(64)
        """Bounds the requests under way at JetStream's API, which drops its whole queue when 10,000 wait in it."""
        self.gulp_s = 0.0
        """How long to leave what comes in the socket, after everything was read: many messages then cost one
        wake-up and one read. For who is in no hurry; a request takes so much longer too."""

    async def listen(self, subject: str, handler: Handler, queue: str = "") -> Subscription:
        """Subscribe `handler`, which must not block and should not raise; survives reconnects."""
        subscription = await self.subscribe(subject, queue=queue)
        self.handlers[b"%d" % subscription._id] = handler
        return subscription

    @property
    def ssl_context(self) -> ssl.SSLContext:
        """nats-py asks at each connect: renewed files are used from the next one on."""
        if self.tls is None:
            return super().ssl_context
        return self.tls.context()

    async def _connect_to_server(self, s: Srv) -> None:
        await super()._connect_to_server(s)
        if type(self._transport) is TcpTransport:
            self._transport = _Transport(self._transport)

    async def _process_info(self, info: dict[str, Any], initial_connection: bool = False) -> None:
        # nats-py takes TLS where the server asks for it. One that does not, or somebody in between who says that it
        # does not, would be sent the credentials in the clear.
        if initial_connection and self.tls is not None and not info.get("tls_required"):
            raise nats.errors.Error("the server has no TLS, and the settings want it")
        await super()._process_info(info, initial_connection)

    @property
    def reconnects(self) -> int:
        """How often the connection broke and was made anew: the same before and after means that it held."""
        return self.stats["reconnects"]

    def forbidden(self, said: str) -> None:
        """The server refuses a publish or a subscription, and answers nobody: say so, some times a minute at most."""
        self._forbidden = said.lower()
        now = asyncio.get_running_loop().time()
        if now >= self._warn_from:
            self._warn_from = now + _FORBIDDEN_AGAIN_S
            log.warning("these NATS credentials do not allow what is needed: %s", said)
        for handler in self.forbidden_handlers:
            handler()

    def may_not_publish(self, where: str) -> bool:
        """Whether the server's last refusal was of publishing to this subject, or to one that differs in case alone."""
        return f'publish to "{where.lower()}"' in self._forbidden

    def _why(self, where: str, error: Exception) -> str:
        """Why a request had no answer, as far as it is known. The server says subjects in lower case."""
        own = self._inbox_prefix.decode().lower()
        if self.may_not_publish(where) or f'subscription to "{own}.' in self._forbidden:
            return "the NATS credentials do not allow it. Are they those of another program (nats_credentials)?"
        return str(error) or type(error).__name__

    async def confirm(self, timeout_s: float = 10) -> None:
        """Return when the server has what was sent; raises `StreamUnavailable`."""
        try:
            await self.flush(timeout_s)  # type: ignore[arg-type]
        except (nats.errors.Error, OSError, TimeoutError) as error:
            raise StreamUnavailable(f"NATS does not answer: {error or type(error).__name__}") from error
        # While it reconnects, nats-py takes a flush for done.
        if not self.is_connected:
            raise StreamUnavailable("the connection to NATS is broken")

    def send(self, subject: str, payload: bytes = b"", reply: str = "", header: bytes = b"") -> bool:
        """Publish at most once, without waiting: False (and nothing sent) while there is no connection.

        `header` is a complete block, from ``NATS/1.0`` to the empty line.
        """
        if not self.is_connected:
            return False
        where = b"%b %b" % (subject.encode(), reply.encode())
        if header:
            size = len(header)
            command = b"HPUB %b %d %d\r\n%b%b\r\n" % (where, size, size + len(payload), header, payload)
        else:
            command = b"PUB %b %d\r\n%b\r\n" % (where, len(payload), payload)
        self._queue(command)
        return True

    def ack(self, reply: bytes, verdict: bytes = b"") -> None:
        """Acknowledge a JetStream message (``+TERM`` and ``-NAK`` are verdicts too). A lost one is redelivered."""
        if self.is_connected:
            self._queue(b"PUB %b %d\r\n%b\r\n" % (reply, len(verdict), verdict))

    def ack_all(self, replies: Iterable[bytes]) -> None:
        """Acknowledge many messages with one command buffer."""
        if self.is_connected:
            self._queue(b"".join([b"PUB %b 0\r\n\r\n" % reply for reply in replies]))

    def _queue(self, command: bytes) -> None:
        # nats-py's own list: what it queues itself and what comes here leave in the order of the calls.
        self._pending.append(command)
        self._pending_data_size += len(command)
        if self._kick is None:
            self._kick = asyncio.get_running_loop().call_soon(self._write_pending)

    def _write_pending(self) -> None:
        self._kick = None
        if not self._pending or not self.is_connected or self._transport is None:
            return
        pending, self._pending, self._pending_data_size = self._pending, [], 0
        self._transport.write(b"".join(pending))
        writer = getattr(self._transport, "_io_writer", None)
        if writer is not None and writer.transport.get_write_buffer_size() > MAX_UNSENT_BYTES:
            log.warning("NATS does not read: %d bytes are waiting, reconnecting", MAX_UNSENT_BYTES)
            self._reconnecting = asyncio.ensure_future(self.force_reconnect())

    async def let_gather(self) -> None:
        """Read nothing for `gulp_s`."""
        writer = getattr(self._transport, "_io_writer", None)
        if writer is None or writer.transport.is_closing():
            return
        writer.transport.pause_reading()
        try:
            await asyncio.sleep(self.gulp_s)
        finally:
            if not writer.transport.is_closing():
                writer.transport.resume_reading()

    def hand_over(self, handler: Handler, subject: bytes, reply: bytes, header: bytes | None, payload: bytes) -> None:
        """Call a handler; its mistakes must not end the read loop, on which everything depends."""
        try:
            handler(subject, reply, header, payload)
        except Exception:
            log.exception("a handler failed on subject %s", subject.decode(errors="replace"))

    async def _process_msg(self, sid: int, subject: bytes, reply: bytes, data: bytes, headers: bytes | None) -> None:
        handler = self.handlers.get(b"%d" % sid)
        if handler is None:
            await super()._process_msg(sid, subject, reply, data, headers)  # type: ignore[arg-type]
        else:
            self.hand_over(handler, subject, reply, headers, data)

    async def _process_pong(self) -> None:
        # Whoever flushed may have given up; nats-py would set its future all the same, and read no more.
        if self._pongs and self._pongs[0].done():
            self._pongs[0] = asyncio.get_running_loop().create_future()
        await super()._process_pong()

    async def close(self) -> None:
        # nats-py cannot close what it has not begun to connect, as when it refuses an option.
        if self._flush_queue is None:
            return
        try:
            await super().close()
        except (OSError, RuntimeError) as error:
            # nats-py stops half-way when the server goes while it writes the last bytes, or has gone: uvloop's closed
            # transports raise RuntimeError.
            log.debug("the connection to NATS broke while it was closed: %s", error)
            for subscription in self._subs.values():
                task: asyncio.Task[None] | None = subscription._wait_for_msgs_task
                if task is not None:
                    task.cancel()
            self._subs.clear()
            transport: Any = self._transport
            if transport is not None:
                transport.close()

    async def finish(self, timeout_s: float = 1.0) -> None:
        """Send what is queued, if the server is there, and close."""
        try:
            async with asyncio.timeout(timeout_s):
                await self.flush()
        except (nats.errors.Error, OSError, TimeoutError) as error:
            log.debug("the last messages to NATS may be lost: %s", error or type(error).__name__)
        finally:
            # To its end, whoever gives up waiting.
            await asyncio.shield(asyncio.ensure_future(self.close()))

    async def api(self, request: str, body: Any = None) -> dict[str, Any]:
        """Ask ``$JS.API.<request>``; raises `ApiError`, or `StreamUnavailable` when nobody answers.

        `api_requests` of them are under way at a time; the others wait for their turn here.
        """
        payload = b"" if body is None else orjson.dumps(body)
        async with self.api_turns:
            answer: dict[str, Any] = orjson.loads(await self.ask(f"$JS.API.{request}", payload))
        if "error" in answer:
            raise ApiError(request, answer["error"])
        return answer

    async def ask(self, subject: str, payload: bytes = b"", *, timeout_s: float | None = None) -> bytes:
        """Request and answer; raises `StreamUnavailable` when there is none."""
        try:
            message = await self.request(subject, payload, timeout=timeout_s or self.request_timeout_s)
        except nats.errors.NoRespondersError:
            raise StreamUnavailable(f"nobody answers on {subject}: is JetStream enabled there?") from None
        except (nats.errors.Error, TimeoutError) as error:
            raise StreamUnavailable(f"no answer on {subject}: {self._why(subject, error)}") from error
        return message.data

    async def store(self, subject: str, payload: bytes, headers: dict[str, str] | None = None) -> dict[str, Any]:
        """Publish to a stream and return its confirmation (``stream``, ``seq``, perhaps ``duplicate``).

        Raises `ApiError` when the stream refuses, `StreamUnavailable` when none confirms in time.
        """
        try:
            message = await self.request(subject, payload, timeout=self.request_timeout_s, headers=headers)
        except nats.errors.NoRespondersError:
            raise StreamUnavailable(f"no stream stores {subject}") from None
        except (nats.errors.Error, TimeoutError) as error:
            raise StreamUnavailable(f"{subject} was not confirmed: {self._why(subject, error)}") from error
        answer: dict[str, Any] = orjson.loads(message.data)
        if "error" in answer:
            raise ApiError(f"the message on {subject}", answer["error"])
        return answer


async def _undivided(connecting: Coroutine[Any, Any, None]) -> None:
    """Connect. Who is cancelled meanwhile waits for the end of it, if that is near.

    asyncio loses a socket whose connecting is cancelled in the turn in which it succeeds, and nats-py its tasks.
    """
    work = asyncio.ensure_future(connecting)
    try:
        await asyncio.shield(work)
    except asyncio.CancelledError:
        await asyncio.wait({work}, timeout=_NEARLY_S)
        work.cancel()
        await asyncio.wait({work})
        raise


async def connect(
    settings: Settings,
    name: str,
    *,
    lost: Callable[[], Awaitable[None]] | None = None,
    found: Callable[[], Awaitable[None]] | None = None,
) -> Connection:
    """Connect, or raise `StreamUnavailable`, or `BadSettings` for credentials that are none.

    `lost` and `found` are called at each break and reconnect. With a ``tls://`` address or `nats_ca` no server without
    TLS is spoken to.
    """
    options: dict[str, Any] = {"reconnect_time_wait": 0.2, "inbox_prefix": replies(name)}
    if settings.nats_credentials:
        options |= login(settings.nats_credentials)
    connection = Connection()
    connection.tls = _tls(settings)
    connection.request_timeout_s = settings.request_timeout_s
    connection.api_turns = asyncio.Semaphore(settings.api_requests)
    problems: list[Exception] = []

    async def problem(error: Exception) -> None:
        # What the server said of the credentials; it hangs up then, and that may be noticed once more.
        if not any(_AUTHORIZATION in str(known).lower() for known in problems):
            problems[:] = [error]
        if _PERMISSIONS in str(error).lower():
            connection.forbidden(str(error))
        else:
            log.debug("nats: %s", error or type(error).__name__)

    try:
        async with asyncio.timeout(settings.request_timeout_s):
            await _undivided(
                connection.connect(
                    settings.nats_url.split(","),
                    name=name,
                    max_reconnect_attempts=-1,
                    ping_interval=10,
                    max_outstanding_pings=2,
                    error_cb=problem,
                    disconnected_cb=lost,
                    reconnected_cb=found,
                    **options,
                )
            )
    except (nats.errors.Error, OSError, TimeoutError) as error:
        await connection.close()
        reason = problems[0] if problems else error
        if _AUTHORIZATION in str(reason).lower():
            raise StreamUnavailable(_not_let_in(settings)) from None
        raise StreamUnavailable(
            f"no connection to NATS at {shown(settings.nats_url)}: {_reason(reason)}. Is nats-server running there?"
        ) from None
    except BaseException:
        # Whoever waited for it waits no more: it would stay open with nobody to close it.
        await asyncio.shield(connection.close())
        raise
    return connection


def _tls(settings: Settings) -> ClientTls | None:
    """What the servers are checked against; None where TLS is for them to ask for."""
    if not settings.nats_ca and not settings.nats_certificate and not has_tls(settings.nats_url):
        return None
    names = ("nats_ca", "nats_certificate", "nats_key")
    return ClientTls(settings.nats_ca, settings.nats_certificate, settings.nats_key, names=names)


def _reason(error: Exception) -> str:
    if isinstance(error, ssl.SSLCertVerificationError):
        return f"its certificate is refused ({error.verify_message}): does nats_ca (TIDINGS_NATS_CA) name its CA?"
    return str(error) or type(error).__name__


def _not_let_in(settings: Settings) -> str:
    which = "nobody without credentials is let in"
    if settings.nats_credentials:
        which = f"the credentials in {settings.nats_credentials} are not let in"
    elif has_login(settings.nats_url):
        which = "the login in the address is not let in"
    return (
        f"{which} (authorization violation) by NATS at {shown(settings.nats_url)}: set nats_credentials "
        "(TIDINGS_NATS_CREDENTIALS) to a key that the server knows and that was not retired"
    )
