"""What a device says to each of the peers, and how it reads what they say: all that differs between load clients.

A dialect is asked for the request that opens a connection and for the first text, and is given each text that comes.
It calls `Device.ready` when the device is subscribed, and `Device.got` with each notification. What a device must
remember to be given what it missed lives in its `Place`, which outlives its connections.

Sources: ``schemas/asyncapi.yaml`` (Tidings), Centrifugo's client protocol in JSON, Engine.IO 4 and Socket.IO 5.
"""

from __future__ import annotations

from typing import Any, Final, Protocol

import orjson

from bench.publisher import user_of
from bench.raw_socket import upgrade_request
from tidings.identity import issue
from tidings.wire.frames import SUBPROTOCOL

__all__ = ["DIALECTS", "SHARED_TOPIC", "Conversation", "Dialect", "Place"]

SHARED_TOPIC: Final = "crowd"
"""What everybody follows; `own_channel` is what one device has alone."""


class Place:
    """How far a device is, as the server told it."""

    __slots__ = ("epoch", "offset", "session")

    def __init__(self) -> None:
        self.offset: int | str | None = None
        self.epoch = ""
        self.session = ""


class Conversation(Protocol):
    """A device, as its dialect sees it."""

    number: int
    place: Place
    shared: bool
    """Subscribed to what everybody follows, and not to its own channel."""
    problem: str
    after_s: float | None

    def say(self, payload: bytes) -> None: ...
    def ready(self) -> None: ...
    def got(self, data: dict[str, Any]) -> None: ...


class Dialect(Protocol):
    """One peer's protocol, from the client's side."""

    request: bytes

    def opened(self, device: Conversation) -> None:
        """The WebSocket is open."""

    def text(self, device: Conversation, payload: bytes) -> None:
        """A text came."""

    def read(self, device: Conversation) -> None:
        """All texts of one read have been given to `text`."""


class Tidings:
    """Every notification is acknowledged, all of one read together; the server keeps each device's place."""

    request = upgrade_request("/v1/ws", SUBPROTOCOL)

    def __init__(self, key: str) -> None:
        self._key = key
        self._hellos: dict[int, bytes] = {}
        self._positions: list[str] = []

    def opened(self, device: Conversation) -> None:
        hello = self._hellos.get(device.number)
        if hello is None:
            token = issue(self._key, user_of(device.number), "phone", ttl_s=86_400)
            hello = orjson.dumps({"t": "hello", "token": token, "device": "phone"})
            self._hellos[device.number] = hello
        device.say(hello)

    def text(self, device: Conversation, payload: bytes) -> None:
        frame = orjson.loads(payload)
        kind = frame["t"]
        if kind == "n":
            for item in frame["items"]:
                self._positions.append(item["pos"])
                device.got(item["n"]["data"])
        elif kind == "welcome":
            device.ready()
        elif kind == "bye":
            device.after_s = frame["after_ms"] / 1000
        elif kind == "error":
            device.problem = frame["message"]

    def read(self, device: Conversation) -> None:
        if self._positions:
            device.say(b'{"t":"ack","pos":["%b"]}' % '","'.join(self._positions).encode())
            self._positions.clear()


class Centrifugo:
    """Nothing is acknowledged; a device that comes back says the offset that it has, and is given what follows."""

    request = upgrade_request("/connection/websocket")

    def __init__(self, key: str) -> None:
        del key

    def opened(self, device: Conversation) -> None:
        place = device.place
        subscribe: dict[str, Any] = {"channel": f"news:{SHARED_TOPIC if device.shared else user_of(device.number)}"}
        if place.offset is not None:
            subscribe |= {"recover": True, "offset": place.offset, "epoch": place.epoch}
        device.say(b'{"id":1,"connect":{}}\n%b' % orjson.dumps({"id": 2, "subscribe": subscribe}))

    def text(self, device: Conversation, payload: bytes) -> None:
        # Several replies and pushes may come in one text, each on a line of its own.
        for line in payload.split(b"\n"):
            if line == b"{}":
                device.say(b"{}")
                continue
            frame = orjson.loads(line)
            if "push" in frame:
                if (publication := frame["push"].get("pub")) is not None:
                    self._published(device, publication)
            elif "error" in frame:
                device.problem = frame["error"]["message"]
            elif (subscribed := frame.get("subscribe")) is not None:
                device.place.epoch = subscribed.get("epoch", "")
                missed = subscribed.get("publications", ())
                device.place.offset = subscribed.get("offset", 0)
                device.ready()
                for publication in missed:
                    self._published(device, publication)

    @staticmethod
    def _published(device: Conversation, publication: dict[str, Any]) -> None:
        device.place.offset = publication.get("offset", device.place.offset)
        device.got(publication["data"])

    def read(self, device: Conversation) -> None:
        """Nothing to say."""


class SocketIO:
    """Nothing is acknowledged; with connection state recovery a device names its old session and its last offset."""

    request = upgrade_request("/socket.io/?EIO=4&transport=websocket")

    def __init__(self, key: str) -> None:
        del key

    def opened(self, device: Conversation) -> None:
        """The server speaks first."""

    def text(self, device: Conversation, payload: bytes) -> None:
        kind = payload[:2]
        if kind == b"42":
            _, data, *offset = orjson.loads(payload[2:])
            if offset:
                device.place.offset = offset[0]
            device.got(data)
        elif kind == b"2":
            device.say(b"3")
        elif kind == b"40":
            device.place.session = orjson.loads(payload[2:]).get("pid", "")
            device.ready()
        elif payload[:1] == b"0":
            auth = {"room": SHARED_TOPIC if device.shared else user_of(device.number)}
            if device.place.session and device.place.offset is not None:
                auth |= {"pid": device.place.session, "offset": str(device.place.offset)}
            device.say(b"40" + orjson.dumps(auth))
        elif kind == b"44":
            device.problem = payload[2:].decode()

    def read(self, device: Conversation) -> None:
        """Nothing to say."""


DIALECTS: Final[dict[str, type[Tidings | Centrifugo | SocketIO]]] = {
    "tidings": Tidings,
    "centrifugo": Centrifugo,
    "socketio": SocketIO,
}
