"""A session's delivery window: what is under way to a device, and what it has acknowledged.

Pure: no I/O, no clock. The session feeds it positions in the order in which the plane has them; it answers with the
device's cursor. Costs 0.3 KB while nothing is under way, and 0.35 KB and the body for each unacknowledged item.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING

from tidings.store.port import Cursor
from tidings.wire.position import Position

if TYPE_CHECKING:
    from tidings.telemetry.tracing import Span

__all__ = ["Entry", "Window"]


class Entry:
    """A notification under way, kept until the device has it: a device that comes back is served from memory."""

    __slots__ = ("attempts", "body", "position", "reply", "sent_at", "span", "stored_ns")

    def __init__(
        self, position: Position, body: bytes, reply: bytes | None, attempts: int, stored_ns: int | None = None
    ) -> None:
        self.position = position
        self.body = body
        self.reply = reply
        """Where JetStream takes the acknowledgement; None for what came out of the inbox."""
        self.attempts = attempts
        """How often it was put in front of a live client, earlier sessions included."""
        self.stored_ns = stored_ns
        """When JetStream stored it, for what came out of the inbox, and for the others where it was asked for: their
        `reply` says it."""
        self.sent_at = 0.0
        self.span: Span | None = None
        """Of its delivery, where that is traced."""


class Window:
    """What one device has, in one plane.

    `last` is the highest position seen; everything up to it is acknowledged, or under way. The cursor's floor
    is therefore `last` when nothing is under way, and just below the lowest entry otherwise.
    """

    __slots__ = ("_acked", "_attempts", "_pinned", "last", "size", "under_way")

    def __init__(self, cursor: Cursor, size: int) -> None:
        self.size = size
        self.last = cursor.floor
        self.under_way: dict[str, Entry] = {}
        """By the position's text, as the client will echo it."""
        self._acked: set[Position] = set(cursor.acked)
        self._attempts = dict(cursor.attempts)
        self._pinned: Position | None = None

    @property
    def room(self) -> int:
        return max(0, self.size - len(self.under_way))

    @property
    def full(self) -> bool:
        """There is no room, for whoever asks this for every broadcast and every device."""
        return len(self.under_way) >= self.size

    def offer(
        self, text: str, position: Position, body: bytes, reply: bytes | None, stored_ns: int | None = None
    ) -> Entry | None:
        """Take a notification in; None when the device has acknowledged it before."""
        if position in self._acked:
            self.last = max(self.last, position)
            return None
        if position <= self.last:
            return None
        self.last = position
        attempts = self._attempts.pop(position, 0) if self._attempts else 0
        entry = self.under_way[text] = Entry(position, body, reply, attempts, stored_ns)
        return entry

    def skip(self, position: Position) -> None:
        """A position that the device is not to have (it is nobody's, or a copy of another one)."""
        if position > self.last:
            self.last = position
            if self.under_way:
                self._acked.add(position)

    def ack(self, text: str) -> Entry | None:
        """The device has this one; None when it is not under way (acknowledged before, or never sent)."""
        entry = self.under_way.pop(text, None)
        if entry is not None:
            if self.under_way or self._pinned is not None:
                self._acked.add(entry.position)
            if self._acked and (not self.under_way or len(self._acked) > 8 * self.size):
                self._forget()
        return entry

    def ack_upto(self, position: Position) -> list[Entry]:
        """The device has everything up to this one."""
        texts = [text for text, entry in self.under_way.items() if entry.position <= position]
        return [entry for text in texts if (entry := self.ack(text)) is not None]

    def pin(self, upto: Position | None) -> None:
        """Keep the cursor where it is, until `unpin`: what lies between it and `upto` is announced and not sent."""
        self._pinned = self.cursor().floor
        if upto is not None:
            self.last = max(self.last, upto)

    def unpin(self) -> None:
        """The client has taken note of what was announced."""
        self._pinned = None

    def in_order(self) -> Iterator[tuple[str, Entry]]:
        """What is under way, oldest first."""
        return iter(sorted(self.under_way.items(), key=lambda item: item[1].position))

    def cursor(self) -> Cursor:
        """What is to be remembered of this device.

        Bounded: past four windows the highest acks are forgotten, which costs duplicates after a crash and
        never a loss.
        """
        if not self.under_way and not self._acked and self._pinned is None:
            return Cursor(self.last)
        floor = self._floor()
        acked = sorted(position for position in self._acked if position > floor)
        attempts = {entry.position: entry.attempts for entry in self.under_way.values() if entry.attempts}
        return Cursor(floor, frozenset(acked[: 4 * self.size]), attempts)

    def _floor(self) -> Position:
        lowest = min((entry.position for entry in self.under_way.values()), default=None)
        floor = self.last if lowest is None else Position(lowest.incarnation, lowest.sequence - 1)
        return floor if self._pinned is None else min(floor, self._pinned)

    def _forget(self) -> None:
        """Drop acks that the floor has passed, and the highest ones where they are too many."""
        floor = self._floor()
        kept = sorted(position for position in self._acked if position > floor)
        self._acked = set(kept[: 4 * self.size])
