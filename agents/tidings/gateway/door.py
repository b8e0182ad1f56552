"""The door: from an HTTP upgrade to an attached session."""

from __future__ import annotations

import asyncio
import logging
from typing import Final

from aiohttp import web

from tidings.runtime.tokens import Identity, verify
from tidings.store.port import Holder
from tidings.stream import consumers
from tidings.wire import codes, frames
from tidings.wire.codes import Close
from tidings.wire.errors import BadFrame, BadPosition, BadSubject, NotAuthenticated, StoreUnavailable, StreamUnavailable
from tidings.wire.frames import Hello
from tidings.wire.position import Place, Position
from tidings.wire.subject import escape

from .admission import Admission
from .conversation import Conversation
from .hub import Hub, new_id
from .opening import Opener, Plan
from .pace import Pace
from .requests import Requests
from .session import Session
from .socket import Socket

__all__ = ["Door"]

_RETRY_SPREAD_MS: Final = 3000
_A_TURN: Final = 8
"""Handshakes, and hellos, of one turn of the loop: one or two milliseconds of it."""

log = logging.getLogger("tidings.gateway")


class _Refused(Exception):
    """The connection ends here, with this close."""

    def __init__(self, close: Close, message: str, code: str | None = None, after_ms: int | None = None) -> None:
        super().__init__(message)
        self.close = close
        self.code = code
        self.after_ms = after_ms
        """When to come back; None for some time soon."""


class Door:
    """Handles ``GET /v1/ws``."""

    def __init__(self, hub: Hub, opener: Opener) -> None:
        self._hub = hub
        self._opener = opener
        self._requests = Requests(hub)
        self._handshakes, self._hellos = Pace(_A_TURN), Pace(_A_TURN)
        self._admission = Admission(hub.settings.consumer_starts, hub.settings.start_wait_s, hub.now)
        self.open = True
        """Cleared when the gateway drains."""
        self._entering: set[Socket] = set()
        """Connections that have no session yet."""

    async def handle(self, request: web.Request) -> web.StreamResponse:
        """One connection, from handshake to close."""
        settings = self._hub.settings
        socket = Socket(settings.frame_max_bytes, settings.write_buffer_bytes)
        if len(self._entering) >= settings.entering_max:
            # Not even a handshake: it would cost more than all that is asked for.
            raise web.HTTPServiceUnavailable(headers={"Retry-After": str(1 + self._admission.come_back_ms() // 1000)})
        self._entering.add(socket)
        try:
            await self._handshakes.turn()
            response = await socket.accept(request)
            session = await self._enter(socket, request.headers.get("Authorization"))
            self._entering.discard(socket)
            if session is not None:
                try:
                    await Conversation(self._hub, self._requests, session, socket).run()
                finally:
                    self._hub.detach(session, socket, linger=socket.may_return)
        except _Refused as refused:
            log.debug("a connection was refused: %s", refused)
            farewell = frames.error(refused.code or refused.close.name, str(refused))
            if refused.close.reconnect:
                socket.send(farewell)
                after = refused.after_ms
                farewell = self._hub.bye(_RETRY_SPREAD_MS) if after is None else frames.bye(after)
            socket.dismiss(refused.close, farewell)
        finally:
            await socket.gone()
            self._entering.discard(socket)
        return response

    def shut(self) -> None:
        """Let nobody in any more; who stands in the door is sent elsewhere."""
        self.open = False
        for socket in list(self._entering):
            socket.dismiss(codes.RESTART, self._hub.bye(_RETRY_SPREAD_MS))

    async def _enter(self, socket: Socket, authorization: str | None) -> Session | None:
        """Hello, identity, session. None when the connection ended or was taken over on the way."""
        settings = self._hub.settings
        if not self.open:
            raise _Refused(codes.RESTART, "this gateway is closing")
        try:
            async with asyncio.timeout(settings.hello_timeout_s):
                frame = await socket.receive()
        except TimeoutError:
            raise _Refused(codes.NO_HELLO, f"no hello came within {settings.hello_timeout_s:g} s") from None
        if frame is None:
            return None
        await self._hellos.turn()
        hello = self._read_hello(frame)
        identity = self._identify(hello, authorization)
        device = identity.device or hello.device or f"session-{new_id()}"
        if hello.device is not None and hello.device != device:
            raise _Refused(codes.NOT_ALLOWED, "the token is for another device than the hello names")
        window = min(hello.window or settings.window, settings.window_max)
        return await self._join(socket, identity.user, device, window, _since(hello))

    def _read_hello(self, frame: str | bytes) -> Hello:
        try:
            hello = frames.decode(frame)
            if isinstance(frame, bytes):
                raise BadFrame("frames are text, not binary")
            if not isinstance(hello, Hello):
                raise BadFrame("the first frame must be a hello")
            if hello.device is not None:
                escape(hello.device, "device id")
        except BadFrame as error:
            raise _Refused(codes.BAD_FRAME, str(error), error.code) from None
        except BadSubject as error:
            raise _Refused(codes.BAD_FRAME, str(error)) from None
        return hello

    def _identify(self, hello: Hello, authorization: str | None) -> Identity:
        token = hello.token
        if token is None and authorization is not None:
            scheme, _, token = authorization.partition(" ")
            if scheme.lower() != "bearer":
                raise _Refused(codes.NOT_AUTHENTICATED, "the Authorization header must be `Bearer <token>`")
        if not token:
            raise _Refused(codes.NOT_AUTHENTICATED, "a token is missing: send it in the hello or as a bearer header")
        try:
            return verify(self._hub.settings.token_key, token)
        except NotAuthenticated as error:
            raise _Refused(codes.NOT_AUTHENTICATED, str(error)) from None

    async def _join(
        self, socket: Socket, user: str, device: str, window: int, since: Position | None
    ) -> Session | None:
        """Take the device's session over, or start one. The newest socket of a device wins, at every await."""
        hub = self._hub
        while True:
            if not self.open or not socket.open:
                return None
            session = hub.find(user, device)
            if session is None:
                if self._admission.full:
                    after_ms = self._admission.come_back_ms()
                    raise _Refused(codes.OVERLOADED, "too many devices come at a time", after_ms=after_ms)
                if len(hub) >= hub.settings.max_sessions:
                    raise _Refused(codes.OVERLOADED, f"this gateway has its {hub.settings.max_sessions} sessions")
                session = hub.add(user, device)
                session.opening = hub.spawn(self._open(session, window, since))
            if session.suitor is not None:
                session.suitor.dismiss(codes.REPLACED)
            session.suitor = socket
            plan = await asyncio.shield(session.opening) if session.opening is not None else None
            if isinstance(plan, StreamUnavailable):
                raise _Refused(codes.OVERLOADED, f"the log does not answer: {plan}", plan.code)
            unread = await self._unread(session)
            ours = plan is not None or await self._still_ours(session)
            if session.suitor is not socket:
                return None
            session.suitor = None
            if ours and not session.has_ended():
                break
            # It ended while we waited, or went to another gateway behind our back: begin anew.
            hub.end(session, keep_cursor=False)
        self._attach(session, socket, since, plan if session.opening is not None else None, unread)
        session.opening = None
        if session.window.size != window:
            hub.spawn_for(session, self._resize(session, window))
        return session

    async def _open(self, session: Session, window: int, since: Position | None) -> Plan | StreamUnavailable:
        try:
            async with self._admission.turn():
                if session.suitor is None or not session.suitor.open:
                    raise StreamUnavailable("the client has left before its turn came")
                return await self._opener.start(session, window, since)
        except StreamUnavailable as error:
            self._hub.end(session)
            return error
        except Exception:
            # A mistake of ours costs this device its session, not all others theirs.
            log.exception("session %s could not be opened", session.id)
            self._hub.end(session)
            return StreamUnavailable("the gateway made a mistake, which its log describes")

    async def _still_ours(self, session: Session) -> bool:
        """Whether no other gateway took the device while this one was cut off or frozen."""
        try:
            holders = await self._hub.store.holders(session.user)
        except StoreUnavailable:
            return True
        return Holder(self._hub.gateway, session.id) in holders

    async def _resize(self, session: Session, window: int) -> None:
        session.window.size = window
        try:
            await consumers.resize(self._hub.connection, session.partition, session.consumer, window)
        except StreamUnavailable as error:
            log.warning("session %s keeps its old window at the server: %s", session.id, error)

    async def _unread(self, session: Session) -> int | None:
        try:
            return await self._hub.inbox.unread(session.user)
        except StoreUnavailable:
            return None

    def _attach(
        self,
        session: Session,
        socket: Socket,
        since: Position | None,
        plan: Plan | None,
        unread: int | None,
    ) -> None:
        """The hand-over, in one turn of the loop: welcome, then what was missed, then what is live."""
        hub = self._hub
        if session.socket is not None:
            session.socket.dismiss(codes.REPLACED)
        if plan is None and since is not None and since.incarnation <= session.incarnation:
            session.acknowledge_upto(Place(since, None))
        hub.attach(session, socket)
        pos = None if session.blind else str(session.window.cursor().floor)
        socket.send(
            frames.welcome(
                session=session.id,
                user=session.user,
                device=session.device,
                pos=pos,
                unread=unread,
                window=session.window.size,
                heartbeat=hub.settings.heartbeat_s,
            )
        )
        if plan is None:
            session.send_gap()
            session.resend()
        elif plan.missed is None:
            session.announce_gap(None, None if session.blind else plan.upto)
            session.go_live()
        elif plan.missed > hub.settings.catchup_cap:
            session.announce_gap(plan.missed, plan.upto)
            session.go_live()
        elif plan.missed:
            hub.spawn_for(session, self._opener.catch_up(session, plan.upto))
        else:
            session.go_live()
        if session.lane is not None:
            session.lane.resume()


def _since(hello: Hello) -> Position | None:
    """A `since` that is none of ours is no help and no harm: the stored cursor counts."""
    try:
        return None if hello.since is None else Position.parse(hello.since)
    except BadPosition:
        log.debug("a hello has a since from elsewhere")
        return None
