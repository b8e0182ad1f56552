"""The door: from an HTTP upgrade to an attached session."""

from __future__ import annotations

import asyncio
import logging
from typing import Final

from aiohttp import web

from tidings.identity import Device
from tidings.runtime.porch import Porch
from tidings.store.port import ANONYMOUS, Holder
from tidings.stream import consumers
from tidings.wire import codes, frames
from tidings.wire.codes import Close
from tidings.wire.errors import (
    BadFrame,
    BadPosition,
    BadSubject,
    KeysUnavailable,
    NotAllowed,
    NotAuthenticated,
    StoreUnavailable,
    StreamUnavailable,
)
from tidings.wire.frames import Hello
from tidings.wire.position import Place, Position
from tidings.wire.subject import escape

from .admission import Admission
from .authenticator import Authenticator
from .conversation import Conversation
from .handshake import refuse
from .hub import Hub, new_id
from .meter import CONNECT_FRAMES
from .opening import Opener, Plan
from .pace import Pace
from .requests import Requests
from .session import Session
from .socket import Socket

__all__ = ["Door"]

_RETRY_SPREAD_MS: Final = 3000
_A_TICK: Final = 8
"""Handshakes, and hellos, of two milliseconds: more than there is time for, but what is started goes on in between."""
_SELDOM_S: Final = 0.01
_CROWDED_MS: Final = 30_000
"""How long a device that is one too many stays away."""

log = logging.getLogger("tidings.gateway")


class _Refused(Exception):
    """The connection ends here, with this close."""

    def __init__(self, close: Close, message: str, code: str | None = None, *, after_ms: int | None = None) -> None:
        super().__init__(message)
        self.close = close
        self.code = code
        self.after_ms = after_ms
        """When to come back; None for some time soon."""


class Door:
    """Handles ``GET /v1/ws``."""

    def __init__(
        self, hub: Hub, opener: Opener, porch: Porch, authenticator: Authenticator, requests: Requests
    ) -> None:
        self._hub = hub
        self._porch = porch
        self._opener = opener
        self._next_handshake = 0.0
        self._handshakes, self._hellos = Pace(self._handshakes_now), Pace(lambda: _A_TICK)
        self._authenticator = authenticator
        self._requests = requests
        self._admission = Admission(hub.settings.consumer_starts, hub.settings.start_wait_s, hub.now)
        self.open = True
        """Cleared when the gateway drains."""
        self._entering: set[Socket] = set()
        """Connections that have no session yet."""

    async def handle(self, request: web.Request) -> web.StreamResponse:
        """One connection, from handshake to close."""
        settings = self._hub.settings
        refusal = refuse(request, settings)
        if refusal is not None:
            return refusal
        numbers = self._hub.numbers
        told = None if numbers is None else numbers.closed
        socket = Socket(
            settings.frame_max_bytes, settings.write_buffer_bytes, self._hub.meters.limits, self._hub.turns, told
        )
        self._entering.add(socket)
        try:
            await self._handshakes.turn()
            response = await socket.accept(request)
            session = await self._enter(socket, request)
            self._entering.discard(socket)
            if session is not None:
                try:
                    await Conversation(self._hub, self._requests, self._authenticator, session, socket).run()
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
            self._porch.forget(request.protocol)
            await socket.gone()
            self._entering.discard(socket)
        return response

    def _handshakes_now(self) -> int:
        """While enough devices wait to be started only few are let in: whoever waits here costs nothing but memory.

        Those few may have sessions here, which are taken over. What is too much is to be told when to come back.
        """
        now = self._hub.now()
        if not self._admission.busy:
            return _A_TICK
        if len(self._handshakes) <= self._admission.soon and now < self._next_handshake:
            return 0
        self._next_handshake = now + _SELDOM_S
        return 1

    def shut(self) -> None:
        """Let nobody in any more; who stands in the door is sent elsewhere."""
        self.open = False
        for socket in list(self._entering):
            socket.dismiss(codes.RESTART, self._hub.bye(_RETRY_SPREAD_MS))

    async def _enter(self, socket: Socket, request: web.Request) -> Session | None:
        """Hello, identity, session. None when the connection ended or was taken over on the way."""
        settings = self._hub.settings
        if not self.open:
            raise _Refused(codes.RESTART, "this gateway is closing")
        try:
            async with asyncio.timeout(settings.hello_timeout_s):
                frame = await socket.receive()
        except TimeoutError:
            raise _Refused(codes.NO_HELLO, f"no hello came within {settings.hello_timeout_s:g} s") from None
        self._porch.forget(request.protocol)
        if frame is None:
            return None
        await self._hellos.turn()
        hello = self._read_hello(frame)
        who = await self._identify(hello, request.headers.get("Authorization"))
        device = who.device or hello.device or f"{ANONYMOUS}{new_id()}"
        # Before it can put another connection of the device out, or anything on the user's account.
        self._check_revoked(who, device)
        self._count(socket, who.user)
        if hello.device is not None and hello.device != device:
            raise _Refused(codes.NOT_ALLOWED, "the token is for another device than the hello names")
        window = min(hello.window or settings.window, settings.window_max)
        return await self._join(socket, who, device, window, _since(hello))

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

    async def _identify(self, hello: Hello, authorization: str | None) -> Device:
        token = hello.token
        if token is None and authorization is not None:
            scheme, _, token = authorization.partition(" ")
            if scheme.lower() != "bearer":
                raise _Refused(codes.NOT_AUTHENTICATED, "the Authorization header must be `Bearer <token>`")
        if not token:
            raise _Refused(codes.NOT_AUTHENTICATED, "a token is missing: send it in the hello or as a bearer header")
        try:
            return await self._authenticator.identify(token)
        except KeysUnavailable as error:
            raise _Refused(codes.OVERLOADED, str(error), error.code) from None
        except NotAuthenticated as error:
            raise _Refused(codes.NOT_AUTHENTICATED, str(error)) from None
        except NotAllowed as error:
            raise _Refused(codes.NOT_ALLOWED, str(error)) from None

    def _check_revoked(self, who: Device, device: str) -> None:
        try:
            self._authenticator.check(who, device)
        except NotAuthenticated as error:
            raise _Refused(codes.NOT_AUTHENTICATED, str(error)) from None

    def _count(self, socket: Socket, user: str) -> None:
        """From here on it is the user's account that a connection is on, and each costs something."""
        now = self._hub.now()
        socket.meter = self._hub.meters.of(user, now)
        owed_s = socket.meter.frames(now, CONNECT_FRAMES)
        if owed_s > 0:
            message = f"more was sent than a user's devices may: come back in {owed_s:.0f} s, and send less"
            raise _Refused(codes.TOO_MANY_REQUESTS, message, after_ms=int(owed_s * 1000))

    async def _join(
        self, socket: Socket, who: Device, device: str, window: int, since: Position | None
    ) -> Session | None:
        """Take the device's session over, or start one. The newest socket of a device wins, at every await."""
        hub = self._hub
        while True:
            if not self.open or not socket.open:
                return None
            session = hub.find(who.user, device)
            if session is None:
                self._check_room(who.user)
                session = hub.add(who.user, device)
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
        try:
            # It may have been revoked since it came.
            self._check_revoked(who, device)
        except _Refused:
            if session.identity is None:
                # Made for this one, and nobody else came for it.
                hub.end(session)
            raise
        expires_in = hub.admit(session, who)
        self._attach(session, socket, since, plan if session.opening is not None else None, unread, expires_in)
        session.opening = None
        if session.window.size != window:
            hub.spawn_for(session, self._resize(session, window))
        return session

    def _check_room(self, user: str) -> None:
        """Refuse one more session where there is no place for it, now or at all."""
        hub = self._hub
        if self._admission.full:
            after_ms = self._admission.come_back_ms()
            raise _Refused(codes.OVERLOADED, "too many devices come at a time", after_ms=after_ms)
        if len(hub) >= hub.settings.max_sessions:
            raise _Refused(codes.OVERLOADED, f"this gateway has its {hub.settings.max_sessions} sessions")
        if hub.overloaded:
            raise _Refused(codes.OVERLOADED, "this gateway has all the memory that it may")
        if not hub.make_room(user):
            message = f"{hub.settings.devices_max} devices of this user are connected here"
            raise _Refused(codes.TOO_MANY_DEVICES, message, after_ms=_CROWDED_MS)

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
        expires_in: int,
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
                expires_in=expires_in,
            )
        )
        if hub.numbers is not None:
            hub.numbers.catch_ups.of(self._way(session, plan)).value += 1
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

    def _way(self, session: Session, plan: Plan | None) -> str:
        """How the device gets what it missed, as the catalogue of metrics names it."""
        if plan is None:
            return "takeover"
        if session.blind:
            return "blind"
        if plan.missed is None or plan.missed > self._hub.settings.catchup_cap:
            return "gap"
        return "inbox" if plan.missed else "stream"


def _since(hello: Hello) -> Position | None:
    """A `since` that is none of ours is no help and no harm: the stored cursor counts."""
    try:
        return None if hello.since is None else Position.parse(hello.since)
    except BadPosition:
        log.debug("a hello has a since from elsewhere")
        return None
