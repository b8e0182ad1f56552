"""The frames of a client, from its welcome to its end."""

from __future__ import annotations

import asyncio
from typing import Final

from tidings.wire import codes, frames
from tidings.wire.errors import BadFrame
from tidings.wire.frames import Ack, ClientFrame, Hello, Ping

from .hub import Hub
from .requests import Requests
from .session import Session
from .socket import Socket

__all__ = ["Conversation"]

_MOST_REFUSED: Final = 100


class Conversation:
    """The frames of one attached client."""

    __slots__ = ("_hub", "_refused", "_requests", "_session", "_socket", "_under_way")

    def __init__(self, hub: Hub, requests: Requests, session: Session, socket: Socket) -> None:
        self._hub = hub
        self._requests = requests
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
            task = self._hub.spawn_for(session, self._requests.answer(session, self._socket, frame))
            task.add_done_callback(self._answered)

    def _answered(self, task: asyncio.Task[None]) -> None:
        self._under_way -= 1
        self._refused = 0
