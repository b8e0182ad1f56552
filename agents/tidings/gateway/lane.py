"""A lane: the broadcast side of a session, for a user who follows something.

A device's place in the broadcasts is a cursor of its own, kept with the other one. While it is up to date the lane is
*live*: the feed writes to it. A lane that cannot take a broadcast (its window is full, its client reads slowly or is
gone) leaves the feed, keeps where it was, and catches up: from the inbox up to the inbox floor of the broadcasts, then
from what the feed keeps, or the stream where it keeps less, until it has read all that the feed has handed out. It
joins in that turn of the loop, so that there is neither a hole nor a copy.
"""

from __future__ import annotations

import asyncio
import logging
import time
from typing import TYPE_CHECKING, Final

from tidings.store.port import Cursor
from tidings.stream import consumers
from tidings.stream.topology import BROADCAST_PART
from tidings.wire import frames, subject
from tidings.wire.errors import BadTopic, InvalidNotification, StoreUnavailable, StreamUnavailable
from tidings.wire.notification import check
from tidings.wire.position import BROADCAST, Position
from tidings.wire.topic import patterns_of

from .feed import Shared
from .window import Entry, Window

if TYPE_CHECKING:
    from .session import Session

__all__ = ["Lane"]

_PAGE: Final = 64

log = logging.getLogger("tidings.gateway")


class Lane:
    """The broadcasts of one session."""

    __slots__ = ("_catching_up", "_room", "_session", "follows", "gap", "live", "moved", "read_upto", "window")

    def __init__(self, session: Session, cursor: Cursor, window: int, follows: dict[str, Position]) -> None:
        self._session = session
        self.window = Window(cursor, window)
        self.follows = follows
        """Patterns, and behind which position each began. Shared by the sessions of a user."""
        self.read_upto = cursor.floor
        """Everything up to here was looked at; while the lane is live the feed looks."""
        self.live = False
        self.moved = False
        """The cursor is to be written, by and by: each broadcast moves those of everybody."""
        self.gap: Position | None = None
        """Announced and not yet noted by the client."""
        self._catching_up = False
        self._room: asyncio.Event | None = None

    @property
    def user(self) -> str:
        return self._session.user

    # From the feed

    def take(self, shared: Shared) -> bool:
        """One broadcast that this user follows; returns whether this was its first way to the device."""
        if not self.live:
            return False
        socket = self._session.socket
        if socket is None or self.window.full or socket.congested():
            # It was handed out, and not to us.
            self.leave(Position(shared.position.incarnation, shared.position.sequence - 1))
            self.catch_up()
            return False
        entry = self.window.offer(shared.text, shared.position, shared.body, None, shared.stored_ns)
        if entry is None:
            return False
        hub = self._session.hub
        entry.attempts += 1
        entry.sent_at = now = hub.now()
        hub.feed.unacked.setdefault(self, now)
        if shared.span is not None:
            hub.trace_shared(entry, shared)
        if entry.attempts == 1:
            # The feed counts these, a slice at a time.
            _note_sent(entry)
            socket.send_encoded(shared.frame)
            return True
        self._attempted(entry)
        self._send([(shared.text, entry)])
        return False

    def _attempted(self, entry: Entry) -> None:
        numbers = self._session.hub.numbers
        if numbers is not None:
            numbers.attempted(self._session, entry, time.time_ns(), numbers.broadcast)
        _note_sent(entry)

    def leave(self, upto: Position | None = None) -> None:
        """No longer written to by the feed; everything up to here was."""
        if self.live:
            self.live = False
            self.read_upto = max(self.read_upto, self._session.hub.feed.done if upto is None else upto)

    # To the device

    def _send(self, entries: list[tuple[str, Entry]]) -> None:
        socket = self._session.socket
        if socket is not None and entries:
            socket.send(
                frames.notifications(
                    frames.notification_item(text, entry.attempts, entry.body) for text, entry in entries
                )
            )

    def resume(self) -> None:
        """A socket was attached: what is under way is sent again, and what was missed follows."""
        if self.gap is not None:
            self._announce(None)
        self._again([(text, entry) for text, entry in self.window.in_order()])
        self.catch_up()

    def repeat(self, before: float) -> None:
        """Send again what was not acknowledged since `before` (seconds, by the loop's clock)."""
        socket = self._session.socket
        if socket is None or socket.congested():
            return
        self._again([(text, entry) for text, entry in self.window.in_order() if entry.sent_at < before])

    def _again(self, entries: list[tuple[str, Entry]]) -> None:
        hub = self._session.hub
        now, due = hub.now(), []
        for text, entry in entries:
            if entry.attempts >= hub.settings.max_deliver:
                hub.exhausted(self._session, text, entry)
                continue
            # A device that comes and goes within the time of one attempt has had one, however often it is sent.
            if not entry.attempts or now - entry.sent_at > 0.9 * hub.settings.ack_wait_s:
                entry.attempts += 1
                entry.sent_at = now
                self._attempted(entry)
            due.append((text, entry))
        for at in range(0, len(due), _PAGE):
            self._send(due[at : at + _PAGE])

    # From the device

    def acknowledge(self, text: str) -> bool:
        """The device has this one; returns whether it was under way."""
        entry = self.window.ack(text)
        settled = entry is not None
        if entry is not None:
            self._acknowledged(entry)
        elif self.gap is not None and text == self.gap.text(BROADCAST):
            self._noted()
            settled = True
        self.moved = True
        self.wake()
        return settled

    def buried(self, text: str) -> None:
        """Its dead letter is stored: it is sent no more."""
        entry = self.window.ack(text)
        if entry is not None and entry.span is not None:
            self._session.hub.end_trace(entry, "undelivered")
        self.moved = True
        self.wake()

    def acknowledge_upto(self, upto: Position) -> int:
        """The device has everything up to this one; returns how many were under way."""
        settled = 0
        if self.gap is not None and upto >= self.gap:
            self._noted()
            settled = 1
        for entry in self.window.ack_upto(upto):
            settled += 1
            self._acknowledged(entry)
        self.moved = True
        self.wake()
        return settled

    def _acknowledged(self, entry: Entry) -> None:
        hub = self._session.hub
        if hub.numbers is not None:
            hub.numbers.acknowledged(self._session, entry, hub.numbers.broadcast)
        if entry.span is not None:
            hub.end_trace(entry)

    def _noted(self) -> None:
        self.gap = None
        self.window.unpin()

    def cursor(self) -> Cursor:
        """What is to be remembered: with nothing under way, all that the feed has handed out."""
        if not self.window.under_way and self.gap is None:
            upto = self._session.hub.feed.done if self.live else self.read_upto
            self.window.last = max(self.window.last, upto)
        return self.window.cursor()

    # Catching up

    def wake(self) -> None:
        """There is room again: in the window, or in the socket."""
        if self._room is not None:
            self._room.set()

    def catch_up(self) -> None:
        if not (self.live or self._catching_up) and self._is_here():
            self._catching_up = True
            self._session.hub.spawn_for(self._session, self._catch_up())

    async def _catch_up(self) -> None:
        feed = self._session.hub.feed
        try:
            while self._is_here():
                if self.read_upto < self._floor():
                    await self._from_inbox(self._floor())
                elif self.read_upto < feed.tail:
                    await self._from_stream(feed.tail)
                elif not await self._from_recent():
                    continue
                else:
                    self.live = True
                    return
        finally:
            self._catching_up = False

    def _is_here(self) -> bool:
        session = self._session
        return session.socket is not None and not session.has_ended() and not session.hub.follows.holds(session.user)

    def _floor(self) -> Position:
        return self._session.hub.floors[BROADCAST_PART]

    async def _has_room(self) -> bool:
        """Wait until something can be sent; False when the socket is gone."""
        while self._is_here():
            socket = self._session.socket
            assert socket is not None
            if self.window.room and not socket.congested():
                return True
            if socket.congested():
                self._session.hub.congested(self._session)
            self._room = asyncio.Event()
            await self._room.wait()
            self._room = None
        return False

    def _give(self, at: Position, body: bytes, stored_ns: int) -> None:
        """Send one that was missed; the caller has seen to the room."""
        text = at.text(BROADCAST)
        entry = self.window.offer(text, at, body, None, stored_ns)
        if entry is not None:
            self._again([(text, entry)])
            self._session.hub.feed.unacked.setdefault(self, entry.sent_at)

    def _passed(self, at: Position) -> None:
        self.read_upto = max(self.read_upto, at)

    def _is_ours(self, at: Position, patterns: tuple[str, ...]) -> bool:
        return any(pattern in self.follows and at > self.follows[pattern] for pattern in patterns)

    async def _from_recent(self) -> bool:
        """What the feed keeps; True when that was all, in the turn of the loop in which it was."""
        feed = self._session.hub.feed
        while self.read_upto < feed.head:
            for shared in feed.since(self.read_upto):
                if self._is_ours(shared.position, shared.patterns):
                    if not self.window.room or self._session.socket is None or self._session.socket.congested():
                        break
                    self._give(shared.position, shared.body, shared.stored_ns)
                self._passed(shared.position)
            else:
                self._passed(feed.head)
                continue
            if not await self._has_room() or self.read_upto < feed.tail:
                return False
        return True

    async def _from_stream(self, upto: Position) -> None:
        """What the feed keeps no longer, and the inbox has not yet: one after the other."""
        hub = self._session.hub
        after = self.read_upto.sequence if self.read_upto.incarnation == upto.incarnation else 0
        try:
            found = await consumers.next_broadcast(hub.connection, after + 1)
        except StreamUnavailable as error:
            log.warning("the broadcasts of session %s wait for the stream: %s", self._session.id, error)
            await asyncio.sleep(1)
            return
        if not self._is_here():
            # Perhaps this is what the user follows by now.
            return
        if found is None or found.sequence > upto.sequence:
            self._passed(upto)
            return
        at = Position(upto.incarnation, found.sequence)
        try:
            patterns = patterns_of(subject.topic_of(found.where))
            check(found.body)
        except (BadTopic, InvalidNotification):
            patterns = ()
        if self._is_ours(at, patterns):
            if not await self._has_room():
                return
            self._give(at, found.body, found.stored_ns)
        self._passed(at)

    async def _from_inbox(self, upto: Position) -> None:
        """What lies below the inbox floor; past the cap the client gets a gap, and pages the inbox."""
        hub, user = self._session.hub, self._session.user
        try:
            missed = await hub.inbox.missed_broadcasts(user, self.read_upto, upto)
            if missed > hub.settings.catchup_cap:
                self.gap = upto
                self.window.pin(upto)
                if hub.numbers is not None:
                    hub.numbers.broadcast.gaps.value += 1
                self._announce(missed)
                self._passed(upto)
                return
            while missed and self.read_upto < upto:
                if not await self._has_room():
                    return
                limit = min(self.window.room, _PAGE)
                items, looked_upto = await hub.inbox.broadcasts_between(user, self.read_upto, upto, limit)
                for item in items:
                    self._give(item.position, item.body, item.stored_ns)
                self._passed(looked_upto)
            self._passed(upto)
        except StoreUnavailable as error:
            log.warning("session %s cannot catch up with broadcasts from the inbox: %s", self._session.id, error)
            # It begins again from its stored cursor when the store is back; until then it gets what is live.
            hub.make_blind(self._session)
            self._passed(upto)

    def _announce(self, missed: int | None) -> None:
        if self._session.socket is not None and self.gap is not None:
            self._session.socket.send(frames.gap(missed, self.gap.text(BROADCAST)))


def _note_sent(entry: Entry) -> None:
    if entry.span is not None:
        entry.span.add_event("sent", {"tidings.attempt": entry.attempts})
