"""A session: one device of one user, its consumer, its window, and the socket that it has or waits for.

::

    starting --attach()--> live --(socket gone)--> lingering --(linger over)--> ended
                             ^------attach()------'    |
                             '--- replaced, refused, gone for good: ended <----'

What a session costs while it is idle: about 16 KB here (aiohttp's connection and its handler task are 14 of
them), no timer and no task of its own, and some 50 KB at a standalone nats-server. What a notification costs here:
one reading of its envelope, one socket write, one reading of the client's ack, and its share of one write to
NATS a loop turn.
"""

from __future__ import annotations

import asyncio
import enum
import time
from collections.abc import Iterable
from typing import TYPE_CHECKING, Any

from tidings.identity import Device
from tidings.store.port import Cursor
from tidings.stream import consumers
from tidings.stream.topology import notify_stream
from tidings.wire import frames, subject
from tidings.wire.errors import InvalidNotification
from tidings.wire.notification import check
from tidings.wire.position import BROADCAST, Place, Position

from .socket import Socket
from .window import Entry, Window

if TYPE_CHECKING:
    from .hub import Hub
    from .lane import Lane

__all__ = ["Session", "SessionState"]

_PULL_AGAIN_S = 1.0
_FRAME_BYTES = 65_536
"""Where a run of notifications is cut into frames."""


class SessionState(enum.Enum):
    STARTING = "starting"
    LIVE = "live"
    LINGERING = "lingering"
    ENDED = "ended"


class Session:
    """Delivers one partition's messages for one user to one device. Made and ended by the registry."""

    __slots__ = (
        "_outbox",
        "_pull_left",
        "_pulls",
        "attached_ns",
        "beating",
        "blind",
        "burying",
        "consumer",
        "consumer_sequence",
        "device",
        "gap",
        "hub",
        "id",
        "identity",
        "incarnation",
        "lane",
        "live_stream",
        "node",
        "opening",
        "partition",
        "place",
        "prefix",
        "socket",
        "start_at",
        "state",
        "suitor",
        "token",
        "unstored",
        "user",
        "waiting_since",
        "window",
    )

    def __init__(self, hub: Hub, id: str, user: str, device: str) -> None:
        self.hub = hub
        self.id = id
        self.user = user
        self.device = device
        self.token = subject.escape(user)
        self.partition = subject.partition(self.token, hub.topology.partitions)
        self.incarnation = hub.topology.incarnations[self.partition]
        self.prefix = str(Position(self.incarnation, 0))[:-1]
        self.state = SessionState.STARTING
        self.socket: Socket | None = None
        self.identity: Device | None = None
        """What the last client's token says; None before the first one."""
        self.window: Window
        self.lane: Lane | None = None
        """The broadcasts, of a user who follows something."""
        self.place: Cursor | None = None
        """Where the device was in the broadcasts when the user's subscriptions were first read; None before."""
        self.consumer = ""
        self.consumer_sequence = 0
        self.node = ""
        self.beating = False
        """It is in the hub's round of heartbeats."""
        self.blind = False
        """The device's cursor is not known: nothing is written of it, and it reconnects when the store is back."""
        self.live_stream = False
        """The inbox part of the catch-up is sent: the stream may be pulled."""
        self.unstored = 0
        """How many entries under way came out of the inbox: JetStream does not redeliver those."""
        self.start_at = 0
        """The sequence from which the stream part began."""
        self.waiting_since = 0.0
        self.attached_ns = 0
        """When it got its socket, by the clock on the wall."""
        self.opening: asyncio.Task[Any] | None = None
        self.suitor: Socket | None = None
        """The newest socket that wants this session and does not have it yet."""
        self.gap: tuple[int | None, Position | None] | None = None
        """Announced and not yet noted by the client: how many, and the position whose ack notes it."""
        self.burying: set[str] | None = None
        self._outbox: list[str] = []
        self._pull_left = 0
        self._pulls = 0

    @property
    def stream(self) -> str:
        return notify_stream(self.partition)

    def has_ended(self) -> bool:
        return self.state is SessionState.ENDED

    @property
    def unread_bytes(self) -> int:
        """What waits for the client to read."""
        return 0 if self.socket is None else self.socket.unread_bytes

    def go_live(self) -> None:
        """What the inbox had to give is sent: let the stream go on."""
        self.live_stream = True
        self.pull()

    def announce_gap(self, missed: int | None, upto: Position | None) -> None:
        """The client is to page the inbox; its cursor stays until it has noted that."""
        if self.hub.numbers is not None:
            self.hub.numbers.personal.gaps.value += 1
        self.gap = (missed, upto)
        self.window.pin(upto)
        self.send_gap()

    def send_gap(self) -> None:
        if self.gap is not None and self.socket is not None:
            missed, upto = self.gap
            self.socket.send(frames.gap(missed, None if upto is None else str(upto)))

    # From JetStream

    def receive(self, sequence_text: bytes, consumer_sequence: bytes, reply: bytes, body: bytes) -> None:
        """One message of the consumer, with its place in the stream and in the consumer's deliveries, as text."""
        if int(consumer_sequence) != self.consumer_sequence + 1:
            # A delivery was lost on its way here, and going on would let the cursor pass it.
            self.hub.lost(self)
            return
        self.consumer_sequence += 1
        self._pull_left -= 1
        text = self.prefix + sequence_text.decode()
        entry = self.window.under_way.get(text)
        if entry is not None:
            entry.reply = reply
            # In front of this client for less than its time: it was sent again when the device came back.
            if self.hub.now() - entry.sent_at > 0.9 * self.hub.settings.ack_wait_s:
                self._outbox_add(text)
        else:
            self._receive_new(text, Position(self.incarnation, int(sequence_text)), reply, body)
        if self._pull_left <= 0:
            self.pull()

    def _receive_new(self, text: str, position: Position, reply: bytes, body: bytes) -> None:
        try:
            envelope = check(body)
        except InvalidNotification:
            # The inbox agent, which sees every message once, makes it a dead letter.
            self.window.skip(position)
            self.hub.connection.ack(reply)
            return
        if self.hub.recent.is_copy(self.id, envelope.id, position):
            self.window.skip(position)
            self.hub.connection.ack(reply)
        else:
            entry = self.window.offer(text, position, body, reply)
            if entry is None:
                self.hub.connection.ack(reply)
                return
            if self.hub.tracing is not None:
                self.hub.trace(entry)
            self._outbox_add(text)

    def pull(self) -> None:
        """Ask for more. The server holds back what exceeds the window, and redelivers past it; while items of the
        inbox are under way, which the server does not know of, what is asked for makes room for them."""
        if not self.live_stream:
            return
        batch = self.window.size if not self.unstored else self.window.room
        if batch <= 0:
            # Nothing is asked for: the next acknowledgement asks.
            self._pull_left = 0
            return
        self._pulls += 1
        self._pull_left = batch
        consumers.pull(
            self.hub.connection,
            self.stream,
            self.consumer,
            f"{self.hub.pull_prefix}{self.id}.{self._pulls}",
            batch=batch,
            expires_ns=self.hub.pull_expires_ns,
        )

    def pull_ended(self, number: int, status: int, description: bytes) -> None:
        """The server answered a pull with a status: it expired, or its consumer is gone."""
        if number != self._pulls or self.has_ended():
            return
        gone = status in (404, 503) or (status == 409 and b"Deleted" in description)
        if gone:
            self.hub.lost(self)
        elif status == 408:
            self.pull()
        else:
            # Such as: pulls of before a reconnect still wait there, as many as may.
            asyncio.get_running_loop().call_later(_PULL_AGAIN_S, self._pull_again, number)

    def _pull_again(self, number: int) -> None:
        if number == self._pulls and not self.has_ended():
            self.pull()

    # From the inbox

    def replay(self, position: Position, body: bytes, stored_ns: int) -> bool:
        """One item of the catch-up; False when the device has it already."""
        text = str(position)
        entry = self.window.offer(text, position, body, None, stored_ns)
        if entry is None:
            return False
        if self.hub.tracing is not None:
            self.hub.trace(entry)
        self.unstored += 1
        self.hub.replaying.add(self)
        self._outbox_add(text)
        return True

    def repeat_replayed(self, before: float) -> None:
        """Send what came out of the inbox again where it was not acknowledged since `before`."""
        if self.socket is None:
            return
        for text, entry in self.window.under_way.items():
            if entry.reply is None and entry.attempts and entry.sent_at < before:
                self._outbox_add(text)

    # To the device

    def _outbox_add(self, text: str) -> None:
        if self.socket is None:
            return
        if not self._outbox:
            self.hub.to_flush(self)
        self._outbox.append(text)

    def resend(self) -> None:
        """Everything under way, oldest first: a socket has just been attached."""
        self._outbox.clear()
        for text, _ in self.window.in_order():
            self._outbox_add(text)

    def flush(self) -> None:
        """Write what the outbox names. Called once a loop turn at most."""
        socket = self.socket
        if socket is None or not socket.open:
            # Whatever is under way is sent again when a socket is attached.
            self._outbox.clear()
            return
        if socket.congested():
            self.hub.congested(self)
            return
        now, limit = self.hub.now(), self.hub.settings.max_deliver
        names, self._outbox = self._outbox, []
        items: list[bytes] = []
        size = 0
        numbers = self.hub.numbers
        now_ns = 0 if numbers is None else time.time_ns()
        for at, text in enumerate(names):
            entry = self.window.under_way.get(text)
            if entry is None:
                continue
            if entry.attempts >= limit:
                self.hub.exhausted(self, text, entry)
                continue
            # A device that comes and goes within the time of one attempt has had one, however often it is sent.
            if not entry.attempts or now - entry.sent_at > 0.9 * self.hub.settings.ack_wait_s:
                entry.attempts += 1
                entry.sent_at = now
                if numbers is not None:
                    numbers.attempted(self, entry, now_ns, numbers.personal)
                if entry.span is not None:
                    entry.span.add_event("sent", {"tidings.attempt": entry.attempts})
            items.append(frames.notification_item(text, entry.attempts, entry.body))
            size += len(entry.body)
            if size >= _FRAME_BYTES:
                socket.send(frames.notifications(items))
                items, size = [], 0
                if socket.congested():
                    self._outbox = names[at + 1 :] + self._outbox
                    self.hub.congested(self)
                    break
        if items:
            socket.send(frames.notifications(items))

    # From the device

    def acknowledge(self, texts: Iterable[str]) -> int:
        """The device has these; what is not under way (any more) is ignored. Returns how many were."""
        settled = 0
        for text in texts:
            if self.lane is not None and text.startswith(BROADCAST):
                settled += self.lane.acknowledge(text)
                continue
            entry = self.window.ack(text)
            if entry is not None:
                settled += 1
                self.hub.delivered(self, entry)
                self._settled(entry)
            elif self.gap is not None and self.gap[1] is not None and text == str(self.gap[1]):
                settled += 1
                self._noted()
        self.hub.cursor_moved(self)
        return settled

    def acknowledge_upto(self, upto: Place) -> int:
        """The device has everything up to this place. Returns how many were under way."""
        settled = 0
        if self.lane is not None and upto.broadcast is not None:
            settled += self.lane.acknowledge_upto(upto.broadcast)
        if upto.personal is None:
            return settled
        if self.gap is not None and self.gap[1] is not None and upto.personal >= self.gap[1]:
            settled += 1
            self._noted()
        for entry in self.window.ack_upto(upto.personal):
            settled += 1
            self.hub.delivered(self, entry)
            self._settled(entry)
        self.hub.cursor_moved(self)
        return settled

    def cursor(self) -> Cursor:
        """What is to be remembered of the device, in both planes."""
        cursor = self.window.cursor()
        cursor.broadcast = self.place if self.lane is None else self.lane.cursor()
        return cursor

    def _noted(self) -> None:
        self.gap = None
        self.window.unpin()

    def buried(self, text: str) -> None:
        """The dead letter is stored: the stream is told to send it no more."""
        if self.lane is not None and text.startswith(BROADCAST):
            self.lane.buried(text)
            return
        entry = self.window.ack(text)
        if entry is not None:
            if entry.span is not None:
                self.hub.end_trace(entry, "undelivered")
            self.hub.recent.forget(self.id, check(entry.body).id)
            self._settled(entry, b"+TERM")
            self.hub.cursor_moved(self)

    def _settled(self, entry: Entry, verdict: bytes = b"") -> None:
        if entry.reply is not None:
            self.hub.connection.ack(entry.reply, verdict)
            if self.unstored and self._pull_left <= 0:
                self.pull()
            return
        self.unstored -= 1
        self.hub.room(self)
        if not self.unstored:
            self.hub.replaying.discard(self)
        if self._pull_left <= 0:
            self.pull()
