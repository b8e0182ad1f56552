"""A device: a real WebSocket that says hello, follows topics, acknowledges, and comes back as a client should."""

from __future__ import annotations

import random
import socket
import struct
import time
from collections.abc import Collection
from typing import Any, Final, Protocol

import gevent
import orjson
import websocket
from gevent.event import Event
from websocket import ABNF

from tidings.runtime.backoff import Backoff
from tidings.wire import codes
from tidings.wire.frames import SUBPROTOCOL

from .mesh import Mesh

__all__ = ["Device", "Reporter"]

_CONNECT_S: Final = 20.0
_SILENCE_S: Final = 60.0
"""The gateway pings more often."""
_PAGE: Final = 200
_RESET: Final = struct.pack("ii", 1, 0)
"""SO_LINGER that makes a close a reset, as of a phone in a tunnel."""
_SUB: Final = 1
_UNSUB: Final = 2
_GAP: Final = 3


class Reporter(Protocol):
    """Who is told what happens; see `Site`."""

    def welcomed(self, device: Device) -> None: ...
    def followed(self, device: Device, topics: Collection[str]) -> None: ...
    def arrived(self, device: Device, item: dict[str, Any], size: int) -> None: ...
    def event(self, kind: str, name: str, took_ms: float, *, size: int = 0, problem: str = "") -> None: ...


class Device:
    """Online and offline as it is told, until it is closed. Its greenlet ends with it."""

    def __init__(self, mesh: Mesh, reporter: Reporter, user: str, topics: Collection[str]) -> None:
        self.user = user
        self.name = "phone"
        self.topics = tuple(topics)
        self.welcome_at: float | None = None
        """When the connection that is open began, in seconds since the epoch; None while there is none."""
        self.failed = ""
        """Why it does not come back: a close whose code forbids it."""
        self.is_leaving = False
        """Set by who made it, when nothing more is to be published to it."""
        self._mesh = mesh
        self._reporter = reporter
        self._wanted = Event()
        self._changed = Event()
        """Told to go, to come or to hurry: ends a pause."""
        self._closed = False
        self._back = False
        self._followed = False
        self._gaps: list[str] = []
        self._backoff = Backoff(0.1, 10.0)
        self._after_s: float | None = None
        """When the gateway wants it back, as its last `bye` says."""
        self._ws: websocket.WebSocket | None = None
        self._unfollowed = Event()
        self._life = gevent.spawn(self._live)

    # What it is told

    def go_online(self) -> None:
        self._wanted.set()
        self._changed.set()

    def go_offline(self, *, goodbye: bool) -> None:
        """Leave: with a close frame, or by a cut connection."""
        self._wanted.clear()
        self._changed.set()
        if goodbye and self._ws is not None and self.welcome_at is not None:
            self._send_close(self._ws)
        else:
            self.cut()

    def cut(self) -> None:
        """Break the connection, without a word to anybody; it comes back if it is to be online."""
        ws, self._ws = self._ws, None
        if ws is not None and ws.sock is not None:
            ws.sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, _RESET)
            ws.shutdown()

    def unfollow(self, timeout_s: float) -> None:
        """Follow nothing any more; returns when the gateway says so, or the time is over."""
        if self._ws is not None and self.topics and self._followed:
            self._ask(self._ws, {"t": "unsub", "ref": _UNSUB, "topics": self.topics})
            self._unfollowed.wait(timeout_s)

    def close(self) -> None:
        """For good."""
        self._closed = True
        self.go_offline(goodbye=True)
        self._wanted.set()
        self._life.join(_CONNECT_S)
        self._life.kill()

    # Its life

    def _live(self) -> None:
        while not self._closed and not self.failed:
            self._wanted.wait()
            if self._closed:
                return
            self._changed.clear()
            try:
                self._be_connected()
            finally:
                self.cut()
                self.welcome_at = None
            pause, self._after_s = self._after_s, None
            self._changed.wait(self._backoff.next() if pause is None else pause)

    def _is_to_stay(self) -> bool:
        """Whether an end of the connection is not what it was told."""
        return self._wanted.is_set() and not self._closed

    def _be_connected(self) -> None:
        """One connection, from its beginning to its end."""
        began = time.perf_counter()
        self._gaps.clear()
        try:
            ws = self._open()
            problem = self._greet(ws)
        except (OSError, websocket.WebSocketException) as error:
            problem = f"{type(error).__name__}: {error}"
            if not self._is_to_stay():
                return  # told to go while it came
        if problem and self._after_s is not None:
            self._event("CONNECT", "sent away", began)
            return
        self._event("CONNECT", "again" if self._back else "first", began, problem)
        if problem:
            return
        self._back = True
        self._backoff.reset()
        try:
            self._read(ws)
        except (OSError, websocket.WebSocketException):
            # A cut of our own, or one that nobody asked for.
            if self._ws is ws and self._is_to_stay():
                self._event("CLOSED", "lost", None)

    def _open(self) -> websocket.WebSocket:
        mesh = self._mesh
        ws = websocket.create_connection(
            mesh.gateway,
            timeout=_CONNECT_S,
            subprotocols=[SUBPROTOCOL],
            sslopt={"context": mesh.tls()} if mesh.gateway.startswith("wss") else None,
            suppress_origin=True,
            enable_multithread=True,
        )
        self._ws = ws
        return ws

    def _greet(self, ws: websocket.WebSocket) -> str:
        """Say hello; returns why there is no welcome, or nothing."""
        token = self._mesh.token(self.user, self.name)
        self._ask(ws, {"t": "hello", "token": token, "device": self.name})
        while True:
            kind, frame = ws.recv_data_frame(True)
            if kind == ABNF.OPCODE_CLOSE:
                return self._sent_away(frame.data)
            if kind != ABNF.OPCODE_TEXT:
                continue
            said = orjson.loads(frame.data)
            if said["t"] == "welcome":
                break
            self._told(ws, said)
        self.welcome_at = time.time()
        ws.settimeout(_SILENCE_S)
        self._reporter.welcomed(self)
        if self.topics and not self._followed:
            self._ask(ws, {"t": "sub", "ref": _SUB, "topics": self.topics})
        return ""

    def _read(self, ws: websocket.WebSocket) -> None:
        while True:
            kind, frame = ws.recv_data_frame(True)
            if kind == ABNF.OPCODE_TEXT:
                self._told(ws, orjson.loads(frame.data))
            elif kind == ABNF.OPCODE_CLOSE:
                if self._is_to_stay():
                    self._event("CLOSED", self._name(frame.data), None, self._sent_away(frame.data))
                return

    def _told(self, ws: websocket.WebSocket, said: dict[str, Any]) -> None:
        kind = said["t"]
        if kind == "n":
            for item in said["items"]:
                self._reporter.arrived(self, item, len(orjson.dumps(item["n"])))
            self._ask(ws, {"t": "ack", "pos": [item["pos"] for item in said["items"]]})
        elif kind == "bye" and said["reconnect"]:
            self._after_s = said["after_ms"] / 1000
        elif kind == "gap":
            self._gaps.append(said["pos"])
            if len(self._gaps) == 1:
                self._ask(ws, {"t": "inbox", "ref": _GAP, "limit": _PAGE})
        elif kind == "ok":
            self._answered(ws, said)
        elif kind == "error":
            self._event("REQUEST", said["code"], None, said["message"])

    def _answered(self, ws: websocket.WebSocket, said: dict[str, Any]) -> None:
        if said["ref"] == _SUB:
            self._followed = True
            self._reporter.followed(self, self.topics)
        elif said["ref"] == _UNSUB:
            self._unfollowed.set()
        elif said["ref"] == _GAP:
            for item in said["items"]:
                self._reporter.arrived(self, item, len(orjson.dumps(item["n"])))
            if said["next"] is not None:
                self._ask(ws, {"t": "inbox", "ref": _GAP, "limit": _PAGE, "before": said["next"]})
                return
            # Both planes may have one; the pages had all of either.
            for position in self._gaps:
                self._ask(ws, {"t": "ack", "upto": position})
            self._gaps.clear()

    def _sent_away(self, close: bytes) -> str:
        """The problem that a close is; nothing for one after which a client comes back."""
        code = int.from_bytes(close[:2], "big")
        if self._after_s is not None or (len(close) >= 2 and codes.reconnects(code)):
            self._after_s = random.uniform(0, 1) if self._after_s is None else self._after_s
            return "sent away" if self.welcome_at is None else ""
        self.failed = self._name(close)
        return f"closed with {code} ({self.failed})"

    @staticmethod
    def _name(close: bytes) -> str:
        known = codes.close_of(int.from_bytes(close[:2], "big")) if len(close) >= 2 else None
        return known.name if known else "closed"

    def _event(self, kind: str, name: str, began: float | None, problem: str = "") -> None:
        took_ms = 0.0 if began is None else (time.perf_counter() - began) * 1000
        self._reporter.event(kind, name, took_ms, problem=problem)

    @staticmethod
    def _ask(ws: websocket.WebSocket, frame: dict[str, Any]) -> None:
        ws.send(orjson.dumps(frame).decode())

    @staticmethod
    def _send_close(ws: websocket.WebSocket) -> None:
        try:
            ws.send_close()
        except (OSError, websocket.WebSocketException):
            return  # it was gone already
