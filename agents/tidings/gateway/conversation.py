"""The frames of a client, from its welcome to its end."""

from __future__ import annotations

import asyncio
from typing import Final

from tidings.wire import codes, frames
from tidings.wire.errors import BadFrame, KeysUnavailable, NotAllowed, NotAuthenticated
from tidings.wire.frames import Ack, ClientFrame, Hello, Ping, Renewal

from .admission import Admission
from .hub import Hub
from .requests import Requests
from .session import Session
from .socket import Socket

__all__ = ["Conversation"]

_MOST_REFUSED: Final = 100


class Conversation:
    """The frames of one attached client."""

    __slots__ = ("_admission", "_hub", "_refused", "_requests", "_session", "_socket", "_under_way")

    def __init__(self, hub: Hub, requests: Requests, admission: Admission, session: Session, socket: Socket) -> None:
        self._hub = hub
        self._requests = requests
        self._admission = admission
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
            else:
                self._socket.send(farewell)

    def _handle(self, frame: ClientFrame) -> None:
        session = self._session
        if isinstance(frame, Ack):
            if frame.upto is None:
                session.acknowledge(frame.positions)
            else:
                session.acknowledge_upto(frame.upto)
        elif isinstance(frame, Ping):
            self._socket.send(frames.pong(frame.ref))
        elif isinstance(frame, Hello):
            raise BadFrame("hello was said already")
        elif self._under_way >= self._hub.settings.requests_per_session:
            message = f"{self._under_way} requests are under way: wait for an answer"
            refusal = frames.error("too_many_requests", message, frame.ref)
            self._refused += 1
            if self._refused < _MOST_REFUSED:
                self._socket.send(refusal)
            else:
                self._socket.dismiss(codes.TOO_MANY_REQUESTS, refusal)
        else:
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
            who = await self._admission.renew(session, frame.token)
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

    def _answered(self, task: asyncio.Task[None]) -> None:
        self._under_way -= 1
        self._refused = 0
