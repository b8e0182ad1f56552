"""The frames of a client, from its welcome to its end."""

from __future__ import annotations

import asyncio
from typing import Final

from tidings.wire import codes, frames
from tidings.wire.errors import BadFrame, KeysUnavailable, NotAllowed, NotAuthenticated
from tidings.wire.frames import (
    Ack,
    ClientFrame,
    Hello,
    InboxQuery,
    Mark,
    Ping,
    Renewal,
    Request,
    Subscribe,
    Unsubscribe,
)

from .authenticator import Authenticator
from .hub import Hub
from .meter import CONNECT_FRAMES, GRACE_S
from .requests import Requests
from .session import Session
from .socket import Socket

__all__ = ["Conversation"]

_MOST_REFUSED: Final = 100
_LIKE_A_FRAME: Final = 16
"""So many positions, topics or rows cost about as much as one more frame."""


class Conversation:
    """The frames of one attached client."""

    __slots__ = ("_authenticator", "_hub", "_refused", "_requests", "_session", "_socket", "_under_way")

    def __init__(
        self, hub: Hub, requests: Requests, authenticator: Authenticator, session: Session, socket: Socket
    ) -> None:
        self._hub = hub
        self._requests = requests
        self._authenticator = authenticator
        self._session = session
        self._socket = socket
        self._under_way = 0
        self._refused = 0
        """Requests that came while too many were under way, since one was answered."""

    async def run(self) -> None:
        """Until the connection ends; what breaks the protocol ends it."""
        await self._socket.serve(self._heard)

    def _heard(self, text: str) -> None:
        if self._session.socket is not self._socket:
            return
        try:
            self._handle(frames.decode(text))
        except BadFrame as error:
            farewell = frames.error(error.code, str(error), error.ref)
            # A request that names a ref gets its answer; without one, nobody could tell what was lost.
            if error.ref is None:
                self._socket.dismiss(codes.BAD_FRAME, farewell)
            elif self._may(1) is not None:
                self._socket.send(farewell)

    def _may(self, cost: float) -> bool | None:
        """Count frames: True within the limits, False somewhat beyond, None when the client was turned away."""
        owed_s = self._socket.meter.frames(self._hub.now(), cost)
        if owed_s > GRACE_S:
            self._socket.turn_away()
            return None
        if self._socket.congested():
            # It asks and does not read: what is answered would wait here.
            self._hub.congested(self._session)
            return False
        return owed_s <= 0

    def _handle(self, frame: ClientFrame) -> None:
        session = self._session
        if isinstance(frame, Ack):
            self._acknowledge(frame)
        elif isinstance(frame, Ping):
            if self._may(1):
                self._socket.send(frames.pong(frame.ref))
        elif isinstance(frame, Hello):
            raise BadFrame("hello was said already")
        else:
            allowed = self._may(_cost(frame))
            if allowed is None:
                return
            if not allowed or self._under_way >= self._hub.settings.requests_per_session:
                self._refuse(frame, allowed)
                return
            self._under_way += 1
            if isinstance(frame, Renewal):
                work = self._renew(frame)
            else:
                work = self._requests.answer(session, self._socket, frame)
            task = self._hub.spawn_for(session, work)
            task.add_done_callback(self._answered)

    async def _renew(self, frame: Renewal) -> None:
        """A new token instead of the one before, which goes on where the new one is not good."""
        session, socket = self._session, self._socket
        try:
            who = await self._authenticator.renew(session, frame.token)
        except NotAllowed as error:
            socket.dismiss(codes.NOT_ALLOWED, frames.error(error.code, str(error), frame.ref))
        except NotAuthenticated as error:
            refusal = frames.error(error.code, str(error), frame.ref)
            if frame.ref is None and not isinstance(error, KeysUnavailable):
                socket.dismiss(codes.NOT_AUTHENTICATED, refusal)
            else:
                socket.send(refusal)
        else:
            # Another connection of the device may have taken over meanwhile, with a token of its own.
            if session.socket is socket:
                socket.send(frames.ok(frame.ref, expires_in=self._hub.admit(session, who)))

    def _acknowledge(self, frame: Ack) -> None:
        """What settles a delivery is free: the gateway decides how many of these there are."""
        session = self._session
        if frame.upto is not None:
            idle = 0 if session.acknowledge_upto(frame.upto) else 1
        else:
            idle = len(frame.positions) - session.acknowledge(frame.positions)
        if idle or not (frame.positions or frame.upto):
            self._may(1 + idle // _LIKE_A_FRAME)

    def _refuse(self, request: Request | Renewal, allowed: bool) -> None:
        if allowed:
            message = f"{self._under_way} requests are under way: wait for an answer"
        elif self._socket.congested():
            message = "answers wait that were not read: read them first"
        else:
            message = "more was sent than a user's devices may: send less"
        self._refused += 1
        self._socket.send(frames.error("too_many_requests", message, request.ref))
        if self._refused >= _MOST_REFUSED:
            self._socket.turn_away()

    def _answered(self, task: asyncio.Task[None]) -> None:
        self._under_way -= 1
        self._refused = 0


def _cost(request: Request | Renewal) -> int:
    """What a request counts, in frames."""
    if isinstance(request, InboxQuery):
        return 1 + request.limit // _LIKE_A_FRAME
    if isinstance(request, Mark):
        return 1 + len(request.positions or ()) // _LIKE_A_FRAME
    if isinstance(request, Subscribe | Unsubscribe):
        return 1 + len(request.topics) // _LIKE_A_FRAME
    if isinstance(request, Renewal):
        # A signature is checked, as for a connection.
        return CONNECT_FRAMES
    return 1
