"""The hub: every session of a gateway, and what they share.

One subscription receives for all of them; one callback a loop turn writes what came; one task each writes cursors,
keeps time (heartbeats, lingering, replays) and mends lost consumers.
"""

from __future__ import annotations

import asyncio
import logging
import secrets
import time
from base64 import b32encode
from collections import deque
from collections.abc import Callable, Coroutine, Iterator
from typing import TYPE_CHECKING, Any

import orjson

from tidings.identity import Device
from tidings.runtime.settings import Settings
from tidings.store.inbox import UserInbox
from tidings.store.port import CursorUpdate, Holder, Store
from tidings.stream import consumers, gateways
from tidings.stream.connection import Connection
from tidings.stream.floors import Floors
from tidings.stream.topology import BROADCAST_PART, Topology, notify_stream
from tidings.wire import codes, frames, subject
from tidings.wire.codes import Close
from tidings.wire.errors import StreamUnavailable
from tidings.wire.position import BROADCAST, Position, plane_of

from .deletions import Deletions
from .expiry import Expiries
from .feed import Feed
from .follows import Follows
from .meter import Limits, Meters
from .recent import RecentIds
from .session import Session, SessionState
from .socket import Socket, Turns
from .window import Entry

if TYPE_CHECKING:
    from tidings.telemetry.tracing import Span, Tracing

    from .feed import Shared
    from .numbers import GatewayNumbers

__all__ = ["Hub", "new_id"]

_STRAY_DELAY_S = 5.0
_RELEASED_MOST = 50_000
_MOST_NOTES = 20_000

log = logging.getLogger("tidings.gateway")


def new_id(length: int = 12) -> str:
    """A random name for a gateway, session or consumer: lower-case letters and the digits 2 to 7."""
    # Five bits a letter: a tenth of what choosing each by itself costs, and two of them are made for each connect.
    return b32encode(secrets.token_bytes(-(-length * 5 // 8))).decode().lower()[:length]


class Hub:
    """The sessions of one gateway process, by device and by consumer."""

    def __init__(
        self,
        settings: Settings,
        store: Store,
        connection: Connection,
        topology: Topology,
        spawn: Callable[[Coroutine[Any, Any, Any]], asyncio.Task[Any]],
        tracing: Tracing | None = None,
    ) -> None:
        self.settings = settings
        self.tracing = tracing
        self.numbers: GatewayNumbers | None = None
        """Both are None where telemetry is off."""
        self.store = store
        self.connection = connection
        self.topology = topology
        self.spawn = spawn
        self.floors = Floors(topology)
        self.inbox = UserInbox(store, lambda: self.floors[BROADCAST_PART])
        self.gateway = new_id(8)
        self.pull_prefix = subject.gateway_session(self.gateway, "")
        self.pull_expires_ns = int(settings.pull_expires_s * 1_000_000_000)
        self.deletions = Deletions(
            connection,
            lambda name: subject.gateway_deleted(self.gateway, name),
            at_once=max(1, settings.api_requests // 2),
            most=settings.max_sessions,
        )
        self.recent = RecentIds()
        self.meters = Meters(
            Limits(
                settings.client_frames_per_s,
                settings.client_frames_burst,
                settings.client_bytes_per_s,
                settings.client_bytes_burst,
            )
        )
        self.turns = Turns()
        self.overloaded = False
        """The process has as much memory as it may: no new sessions."""
        self.feed = Feed(self)
        self.follows = Follows(self)
        self.expiries = Expiries(settings.token_leeway_s)
        self.users: dict[str, list[Session]] = {}
        self.by_consumer: dict[bytes, Session] = {}
        self.by_id: dict[str, Session] = {}
        self.replaying: set[Session] = set()
        self.blind: set[Session] = set()
        self.lingering: deque[tuple[float, Session]] = deque()
        self.heartbeats: deque[Session] = deque()
        """The round of heartbeats. Who has no socket any more leaves it at its turn, within `heartbeat_s`."""
        self.claimed: list[Session] = []
        """Sessions that have claimed their device a moment ago."""
        self.moved: dict[Session, None] = {}
        """Sessions whose cursor is to be written."""
        self.released: dict[tuple[str, str], CursorUpdate] = {}
        """Last cursors of sessions that ended, by user and device, until they are written."""
        self.broken: dict[Session, None] = {}
        """Sessions whose consumer is gone."""
        self.broken_event = asyncio.Event()
        self.notes: deque[tuple[str, str, Entry, float]] | None = None
        """Deliveries to be noted: user, device, what, Unix seconds. While the store is down the oldest go."""
        if settings.delivery_marks == "on":
            self.notes = deque(maxlen=_MOST_NOTES)
        self._rooms: dict[Session, asyncio.Event] = {}
        self._dirty: list[Session] = []
        self._loop = asyncio.get_running_loop()
        self.now = self._loop.time

    # Who is here

    def find(self, user: str, device: str) -> Session | None:
        return next((session for session in self.users.get(user, ()) if session.device == device), None)

    def live(self, user: str) -> Iterator[Session]:
        return (session for session in self.users.get(user, ()) if session.socket is not None)

    def __len__(self) -> int:
        return len(self.by_id)

    def make_room(self, user: str) -> bool:
        """Whether the user may have one more device here. One that only lingers makes room, the longest gone first:
        its cursor is kept. One that is connected does not: who has a stolen token drives nobody out."""
        sessions = self.users.get(user, [])
        if len(sessions) < self.settings.devices_max:
            return True
        lingering = [session for session in sessions if session.state is SessionState.LINGERING]
        if not lingering:
            return False
        self.end(min(lingering, key=lambda session: session.waiting_since))
        return True

    def add(self, user: str, device: str) -> Session:
        """A new session, starting; the caller starts it."""
        session = Session(self, new_id(), user, device)
        self.users.setdefault(user, []).append(session)
        self.by_id[session.id] = session
        return session

    async def is_real_broadcast(self, position: Position) -> bool:
        """Whether the stream of broadcasts has come as far as `position`."""
        head = self.feed.head
        if position.incarnation != head.incarnation or position <= head:
            return position.incarnation <= head.incarnation
        return position.sequence <= await consumers.last_sequence(self.connection, BROADCAST_PART)

    async def is_real(self, session: Session, position: Position) -> bool:
        """Whether the stream of the session's user has come as far as `position`."""
        if position.incarnation != session.incarnation:
            return position.incarnation < session.incarnation
        if position <= self.floors[session.partition]:
            return True
        if session.state in (SessionState.LIVE, SessionState.LINGERING) and position <= session.window.last:
            return True
        return position.sequence <= await consumers.last_sequence(self.connection, session.partition)

    def adopt_consumer(self, session: Session, name: str, node: str) -> None:
        """From now on this consumer's messages are the session's."""
        self.by_consumer.pop(session.consumer.encode(), None)
        session.consumer, session.node, session.consumer_sequence = name, node, 0
        self.by_consumer[name.encode()] = session

    def change_topology(self, topology: Topology) -> None:
        """The streams were made anew: sessions from now on are of the new ones."""
        self.topology = topology
        self.floors = Floors(topology)

    # From NATS

    def spawn_for(self, session: Session, work: Coroutine[Any, Any, None]) -> asyncio.Task[None]:
        """Run a session's own task. A mistake in there ends that session; the gateway has thousands of others."""
        return self.spawn(self._contained(session, work))

    async def _contained(self, session: Session, work: Coroutine[Any, Any, None]) -> None:
        try:
            await work
        except Exception:
            log.exception("session %s ends: its task failed", session.id)
            self.close_socket(session, codes.RESTART, self.bye(2000))
            self.end(session)

    def on_pull_reply(self, where: bytes, reply: bytes, header: bytes | None, body: bytes) -> None:
        """A message of some session's consumer (under its own subject), or the end of a pull (under ours)."""
        if not reply:
            self._on_status(where, header)
            return
        # $JS.ACK.<stream>.<consumer>.<delivered>.<stream sequence>.<consumer sequence>.<time>.<pending>
        words = reply.split(b".")
        at = 2 if len(words) == 9 else 4
        session = self.by_consumer.get(words[at + 1])
        if session is None:
            consumers.nak(self.connection, reply, _STRAY_DELAY_S)
            self.deletions.add(words[at].decode(), words[at + 1].decode())
            return
        session.receive(words[at + 3], words[at + 4], reply, body)

    def _on_status(self, where: bytes, header: bytes | None) -> None:
        words = subject.readable(where).split(".")
        if len(words) != 4 or header is None or not words[3].isdigit():
            return
        if words[2] == "feed":
            self.feed.pull_ended(int(words[3]), *consumers.status_of(header))
            return
        session = self.by_id.get(words[2])
        if session is not None:
            session.pull_ended(int(words[3]), *consumers.status_of(header))

    # What sessions ask of the hub

    def to_flush(self, session: Session) -> None:
        """Write the session's outbox at the end of this loop turn."""
        if not self._dirty:
            self._loop.call_soon(self._flush)
        self._dirty.append(session)

    def _flush(self) -> None:
        dirty, self._dirty = self._dirty, []
        for session in dirty:
            session.flush()

    def congested(self, session: Session) -> None:
        """The client does not read as fast as it is sent: wait for it, or close it. Nobody else notices."""
        socket = session.socket
        if socket is not None and not socket.stalled:
            socket.stalled = True
            self.spawn_for(session, self._wait_for_reader(session, socket))

    async def _wait_for_reader(self, session: Session, socket: Socket) -> None:
        if await socket.drained(self.settings.write_stall_s):
            session.flush()
            if session.lane is not None:
                session.lane.wake()
        elif socket.open:
            log.info("session %s reads too slowly: closed", session.id)
            await socket.close(codes.TOO_SLOW)

    def make_blind(self, session: Session) -> None:
        """The device's cursor is not known, or what lies behind it cannot be read: write nothing of it."""
        session.blind = True
        if not session.has_ended():
            self.blind.add(session)
        self.moved.pop(session, None)

    def delivered(self, session: Session, entry: Entry) -> None:
        """A device has it: noted in the inbox by and by, off the path of deliveries."""
        if self.numbers is not None:
            self.numbers.acknowledged(session, entry, self.numbers.personal)
        if entry.span is not None:
            self.end_trace(entry)
        if self.notes is not None:
            self.notes.append((session.user, session.device, entry, time.time()))

    # Traces, where there are any

    def trace(self, entry: Entry) -> None:
        """Begin the span of a personal delivery, if its notification is traced. It ends with the acknowledgement."""
        assert self.tracing is not None
        parent = self.tracing.sampled(entry.body)
        if parent is not None:
            entry.span = self.tracing.start(
                "deliver notify.user.{user}", "process", parent=parent, template="notify.user.{user}"
            )

    def trace_shared(self, entry: Entry, shared: Shared) -> None:
        """The same of a broadcast: a trace of its own, linked to the one message that it is of."""
        if self.tracing is not None and shared.span is not None and shared.traces_left:
            shared.traces_left -= 1
            entry.span = self.tracing.start(
                "deliver broadcast.{topic}",
                "process",
                links=[shared.span.get_span_context()],
                template="broadcast.{topic}",
            )

    def ids(self, span: Span) -> tuple[int, int]:
        assert self.tracing is not None
        return self.tracing.ids(span)

    def end_trace(self, entry: Entry, problem: str | None = None) -> None:
        """The device has it, or (with `problem`) will not have it from this session."""
        assert self.tracing is not None
        self.tracing.end(entry.span, problem, tidings__attempts=entry.attempts)
        entry.span = None

    def _end_traces(self, session: Session) -> None:
        windows = [session.window] if session.lane is None else [session.window, session.lane.window]
        for window in windows:
            for entry in window.under_way.values():
                if entry.span is not None:
                    self.end_trace(entry, "session_ended")

    def cursor_moved(self, session: Session) -> None:
        if not session.blind:
            self.moved[session] = None

    def room(self, session: Session) -> None:
        """Wake the catch-up of a session, if it waits for its window."""
        event = self._rooms.get(session)
        if event is not None:
            event.set()

    async def wait_for_room(self, session: Session) -> None:
        event = self._rooms[session] = asyncio.Event()
        try:
            await event.wait()
        finally:
            del self._rooms[session]

    def lost(self, session: Session) -> None:
        """The session's consumer is gone, or lost a delivery: it gets a new one, at a bounded rate."""
        if session.state in (SessionState.LIVE, SessionState.LINGERING):
            self.broken[session] = None
            self.broken_event.set()

    def exhausted(self, session: Session, text: str, entry: Entry) -> None:
        """Put in front of a live client as often as is allowed: a dead letter."""
        if session.burying is None:
            session.burying = set()
        if text not in session.burying:
            session.burying.add(text)
            self.spawn_for(session, self._bury_traced(session, text, entry))

    async def _bury_traced(self, session: Session, text: str, entry: Entry) -> None:
        if self.tracing is None:
            await self._bury(session, text, entry)
        else:
            with self.tracing.within(entry.span):
                await self._bury(session, text, entry)

    async def _bury(self, session: Session, text: str, entry: Entry) -> None:
        if plane_of(text) == BROADCAST:
            origin = {"stream": notify_stream(BROADCAST_PART)}
        else:
            where = subject.part_user(session.token, session.partition)
            origin = {"origin_subject": where, "stream": session.stream}
        try:
            await consumers.bury(
                self.connection,
                # A broadcast too: it is this user's letter, the others have theirs.
                "user",
                entry.body,
                key=f"undelivered.{text}.{session.token}.{subject.escape(session.device, 'device id')}",
                reason="undelivered",
                detail=f"not acknowledged after {entry.attempts} attempts in front of a live client",
                user=subject.escape(session.user),
                device=subject.escape(session.device, "device id"),
                position=text,
                sequence=entry.position.sequence,
                attempts=entry.attempts,
                **origin,
            )
        except StreamUnavailable as error:
            # It stays under way; the next redelivery tries again.
            log.warning("a dead letter of session %s could not be stored: %s", session.id, error)
        else:
            if self.numbers is not None:
                self.numbers.dead_letters.of("gateway", "undelivered").value += 1
            log.warning("%s was not acknowledged in %d attempts: it is a dead letter now", text, entry.attempts)
            session.buried(text)
        finally:
            if session.burying is not None:
                session.burying.discard(text)

    # Coming and going

    def admit(self, session: Session, who: Device) -> int:
        """From now on this token is the session's; returns in how many seconds it ends."""
        session.identity = who
        self.expiries.add(session, who.expires)
        return max(0, int(who.expires - time.time()))

    def expire(self, session: Session) -> None:
        """The token is over: the client goes, and its session waits for a new one as for any that has gone."""
        socket = session.socket
        if socket is not None:
            self.detach(session, socket, linger=True)
            farewell = frames.error(codes.NOT_AUTHENTICATED.name, "the token has expired: get a new one")
            socket.dismiss(codes.NOT_AUTHENTICATED, farewell)

    def attach(self, session: Session, socket: Socket) -> None:
        """The session has a socket: it is live."""
        session.socket = socket
        session.attached_ns = time.time_ns()
        session.state = SessionState.LIVE
        if not session.beating:
            session.beating = True
            self.heartbeats.append(session)
        self._presence(session, "connected")

    def detach(self, session: Session, socket: Socket, *, linger: bool) -> None:
        """The socket is gone; another one may have taken its place already."""
        if session.socket is not socket:
            return
        session.socket = None
        if session.lane is not None:
            session.lane.leave()
            session.lane.wake()
        self._presence(session, "disconnected")
        if session.state is not SessionState.LIVE:
            return
        if linger and self.settings.linger_s > 0 and not session.blind:
            session.state = SessionState.LINGERING
            session.waiting_since = self.now()
            self.lingering.append((session.waiting_since, session))
            self.cursor_moved(session)
        else:
            self.end(session)

    def end(self, session: Session, *, keep_cursor: bool = True) -> None:
        """Forget a session and its consumer; its cursor is written unless somebody else has it now."""
        if session.has_ended():
            return
        started = session.state is not SessionState.STARTING
        session.state = SessionState.ENDED
        self.by_id.pop(session.id, None)
        others = self.users[session.user]
        others.remove(session)
        if not others:
            del self.users[session.user]
        if session.consumer:
            self.by_consumer.pop(session.consumer.encode(), None)
            self.deletions.add(session.stream, session.consumer)
        if started and self.tracing is not None:
            self._end_traces(session)
        self.expiries.discard(session)
        self.replaying.discard(session)
        self.blind.discard(session)
        self.broken.pop(session, None)
        self.moved.pop(session, None)
        self.room(session)
        if session.lane is not None:
            self.feed.remove(session.lane)
            session.lane.wake()
        if keep_cursor and started and not session.blind:
            self._release(session)

    def _release(self, session: Session) -> None:
        if len(self.released) >= _RELEASED_MOST:
            # The store has been down for long: the oldest device pays with duplicates.
            del self.released[next(iter(self.released))]
        self.released[session.user, session.device] = self.update(session, release=True)

    def close_socket(self, session: Session, reason: Close, farewell: bytes | None = None) -> None:
        """Close the session's socket, if it has one, without waiting for it."""
        socket = session.socket
        if socket is not None:
            self.detach(session, socket, linger=session.state is SessionState.LIVE and reason.reconnect)
            socket.dismiss(reason, farewell)

    def replaced(self, session: Session) -> None:
        """A newer session has the device: this one ends, and its client is told not to come back."""
        sockets = [socket for socket in (session.socket, session.suitor) if socket is not None]
        session.socket = session.suitor = None
        self.end(session, keep_cursor=False)
        for socket in sockets:
            socket.dismiss(codes.REPLACED)

    def update(self, session: Session, *, release: bool = False) -> CursorUpdate:
        holder = Holder(self.gateway, session.id)
        return CursorUpdate(session.user, session.device, holder, session.cursor(), release)

    # To the other devices of a user

    async def tell_user(self, user: str, told: list[bytes], *, but: Session | None = None) -> None:
        """Send frames to all live sessions of a user, here and on the other gateways that hold one."""
        self.tell_here(user, told, but=but)
        elsewhere = {holder.gateway for holder in await self.store.holders(user)} - {self.gateway}
        gateways.tell(self.connection, elsewhere, user, told)

    def tell_here(self, user: str, told: list[bytes], *, but: Session | None = None) -> None:
        for session in self.live(user):
            if session is not but and session.socket is not None and not session.socket.congested():
                for frame in told:
                    session.socket.send(frame)

    def _presence(self, session: Session, event: str) -> None:
        body = {"event": event, "device": session.device, "gateway": self.gateway, "time": time.time()}
        self.connection.send(subject.presence(session.token), orjson.dumps(body))

    def bye(self, spread_ms: int) -> bytes:
        return frames.bye(secrets.randbelow(max(1, spread_ms)))
