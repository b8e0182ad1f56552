"""What arrived and what became of it: queue, copies, acknowledgements. No I/O, no clock.

::

    unknown --arrives--> queued --take()--> with the application --acknowledge()--> acknowledged
       ^                   ^                  |    |
       |                   '---redelivered----'    |
       '------------------release()----------------'

A notification comes again for three reasons, and the same rules answer all of them:

- Its ack was lost, or a publisher repeated it: the id is among the last 2,048 acknowledged. Acknowledge it again,
  so that the gateway stops; the application never sees it.
- The connection is new: the gateway sends again what is unacknowledged. What is queued here, or with the
  application, stays where it is; only the position is noted, as the ack has to name it.
- It was not acknowledged in time, so it comes a second time on one connection. If it is queued, or a handler is
  at work on it, nothing else is done: the handler's end acknowledges all its positions. If the application took
  it to acknowledge it by itself, it may have forgotten it: it is queued again, with the higher attempt.

What a handler failed on is unknown again: the gateway's next attempt is delivered.
"""

from __future__ import annotations

import enum
from collections import OrderedDict, deque
from typing import Final

from tidings.wire.errors import BadPosition
from tidings.wire.position import PERSONAL, Plane, Position, parse

from .models import Notification
from .progress import Progress

__all__ = ["Arrival", "Deliveries"]

_REMEMBERED: Final = 2048


class Arrival(enum.Enum):
    """What an arrival means to the client."""

    NEW = "queued for the application"
    HELD = "known, and not yet acknowledged"
    DONE = "acknowledged before: acknowledge it again"
    OVERFLOW = "more than the window allows"


class _Entry:
    """A notification that is queued or with the application."""

    __slots__ = ("held", "positions", "queued")

    def __init__(self) -> None:
        self.queued = True
        self.held = False
        """A handler is at work on it; otherwise, when not queued, the application has yet to acknowledge it."""
        self.positions: dict[str, int] = {}
        """Where it came from (a repeated publish has a position of its own), and on which connection last."""


class Deliveries:
    """The notifications of one client, over all its connections. Every collection has a bound."""

    def __init__(self, since: str | None = None, *, remembered: int = _REMEMBERED) -> None:
        self.progress = Progress(since)
        self._remembered = remembered
        self._acknowledged: OrderedDict[str, None] = OrderedDict()
        self._open: OrderedDict[str, _Entry] = OrderedDict()
        self._queue: deque[Notification] = deque()
        self._connection = 0
        self._limit = 0

    def __len__(self) -> int:
        """How many wait to be taken."""
        return len(self._queue)

    def begin(self, window: int, cursor: str | None) -> None:
        """A connection was welcomed.

        A gateway keeps at most `window` notifications of each plane unacknowledged. Those it gives up on (dead letters)
        make room there while they still wait here: twice the window of two planes is ordinary, more is not.
        """
        self._connection += 1
        self._limit = max(self._limit, 4 * window)
        self.progress.begin(cursor)

    def arrived(self, notification: Notification) -> Arrival:
        """Take in what the gateway sent."""
        id, position = notification.id, notification.position
        self.progress.received(position)
        if id in self._acknowledged:
            self.progress.settle(position)
            return Arrival.DONE
        entry = self._open.get(id)
        if entry is not None:
            again = entry.positions.get(position) == self._connection
            entry.positions[position] = self._connection
            if entry.queued or entry.held or not again:
                return Arrival.HELD
        if len(self._queue) >= self._limit:
            return Arrival.OVERFLOW
        if entry is None:
            entry = self._open[id] = _Entry()
            entry.positions[position] = self._connection
            self._forget()
        entry.queued = True
        self._queue.append(notification)
        return Arrival.NEW

    def take(self, *, held: bool) -> Notification | None:
        """The next one for the application. `held`: until `acknowledge` or `release`, no copy is queued."""
        while self._queue:
            notification = self._queue.popleft()
            entry = self._open.get(notification.id)
            if entry is not None and entry.queued:
                entry.queued, entry.held = False, held
                return notification
            # It was acknowledged while it waited.
        return None

    def acknowledge(self, notification: Notification) -> list[str]:
        """The application is done with it; returns the positions that the gateway is to be told."""
        entry = self._open.pop(notification.id, None)
        if entry is None and notification.id in self._acknowledged:
            return []
        positions = {notification.position: None, **(entry.positions if entry else {})}
        for position in positions:
            self.progress.settle(position)
        self._remember(notification.id)
        return list(positions)

    def acknowledge_upto(self, plane: Plane, upto: Position) -> None:
        """The application has everything of a plane up to this position."""
        for id, entry in list(self._open.items()):
            for text in [text for text in entry.positions if _within(text, plane, upto)]:
                del entry.positions[text]
            if not entry.positions:
                del self._open[id]
                self._remember(id)
        if plane == PERSONAL:
            self.progress.settle_upto(upto)

    def release(self, notification: Notification) -> None:
        """The handler failed or was abandoned: the gateway's next attempt is delivered."""
        entry = self._open.get(notification.id)
        if entry is not None and entry.held:
            del self._open[notification.id]

    def _remember(self, id: str) -> None:
        self._acknowledged[id] = None
        if len(self._acknowledged) > self._remembered:
            self._acknowledged.popitem(last=False)

    def _forget(self) -> None:
        """Let go of the oldest that the application took and never acknowledged, where they are too many."""
        if len(self._open) > self._remembered + self._limit:
            taken = (id for id, entry in self._open.items() if not (entry.queued or entry.held))
            oldest = next(taken, None)
            if oldest is not None:
                del self._open[oldest]


def _within(text: str, plane: Plane, upto: Position) -> bool:
    try:
        where, position = parse(text)
    except BadPosition:
        return False
    return where == plane and position <= upto
