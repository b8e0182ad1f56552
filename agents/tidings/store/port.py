"""The store's port: what the agents ask of a database, and what every adapter promises.

All adapters pass one conformance suite (``tests/conformance``). Methods are coroutines that never block
the event loop; they raise `StoreUnavailable` when the database does not answer, and then have changed
nothing or something that repeating them changes no further.

Marks are kept beside the notifications: they may come before their row, and they outlive its redelivery. A mark of
all is one watermark, however many rows lie below it, and also covers those that are stored a moment later.
"""

from __future__ import annotations

from collections.abc import AsyncIterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Final, Literal, NamedTuple, Protocol

from tidings.wire.frames import Filter, MarkAs
from tidings.wire.position import Position

__all__ = [
    "ANONYMOUS",
    "DEVICES_CAP",
    "MISSED_CAP",
    "UNREAD_CAP",
    "Broadcast",
    "Claimed",
    "Cursor",
    "CursorUpdate",
    "Delivered",
    "DeliveredMark",
    "DeviceCursor",
    "EndedSubscription",
    "Holder",
    "InboxItem",
    "InboxPage",
    "InboxRow",
    "Lost",
    "MarkAllAs",
    "PageQuery",
    "Store",
    "SubscriberPage",
    "Subscription",
]

UNREAD_CAP: Final = 100
"""`Store.unread` never counts further: 100 means more than 99."""

MISSED_CAP: Final = 10_000
"""`Store.missed` never counts further: 10,000 means as many, or more."""


DEVICES_CAP: Final = 100
"""A user's devices are remembered to this number; see `Store.claim`."""

ANONYMOUS: Final = "session-"
"""How the id of a device begins that gave none, and got one for as long as its session."""


class InboxRow(NamedTuple):
    """A notification as the inbox keeps it."""

    user: str
    position: Position
    id: str
    type: str
    topic: str | None
    stored_ns: int
    """When JetStream stored it: nanoseconds since the Unix epoch, by the server's clock."""
    body: bytes


class Delivered(NamedTuple):
    """The first acknowledgement of a notification by any device of the user."""

    at_ms: int
    """Unix milliseconds, by the gateway's clock."""
    device: str
    attempts: int
    """How often it had been put in front of that device."""


class DeliveredMark(NamedTuple):
    """A notification that a device acknowledged, for `Store.delivered`."""

    user: str
    position: Position
    stored_ns: int
    delivered: Delivered


class InboxItem(NamedTuple):
    """A row of a page, with the user's marks."""

    position: Position
    seen: bool
    read: bool
    archived: bool
    stored_ns: int
    body: bytes
    delivered: Delivered | None = None


class PageQuery(NamedTuple):
    """What to list. All conditions hold together."""

    limit: int = 50
    before: Position | None = None
    """Only what is strictly older, newest first; the default for both None."""
    after: Position | None = None
    """Only what is strictly newer, oldest first; excludes `before`."""
    filter: Filter = "all"
    """``all`` leaves out what is archived, ``unread`` what is read or archived, ``archived`` all else."""
    type: str | None = None
    topic: str | None = None


class InboxPage(NamedTuple):
    """A page; `next` continues it (as its `before` or `after`), None at the end.

    A store that has to read past much that does not fit may return a short page with a `next`.
    """

    items: Sequence[InboxItem]
    next: Position | None


MarkAllAs = Literal["seen", "read", "archived"]


class Holder(NamedTuple):
    """Which session, on which gateway, has a device."""

    gateway: str
    session: str


@dataclass(slots=True)
class Cursor:
    """What a device has acknowledged.

    `floor`: everything up to it has arrived. `acked`: positions above the floor that have arrived too.
    `attempts`: how often the others above it were put in front of a live client. `acked` and `attempts` together
    are bounded by the session's window; a cursor that is behind costs duplicates, never a loss.
    """

    floor: Position
    acked: frozenset[Position] = frozenset()
    attempts: dict[Position, int] = field(default_factory=dict)
    broadcast: Cursor | None = None
    """The same of broadcasts, whose positions are those of another stream; None in that one, and where none is kept."""


class Claimed(NamedTuple):
    """The answer to `Store.claim`: the device's cursor, and who had the device until now."""

    cursor: Cursor
    first: bool
    """The device was never seen before: the cursor is the floor that the claim proposed."""
    previous: Holder | None
    lost: bool = False
    """Somebody newer claimed the device in the same moment: this session is to end."""


class Lost(NamedTuple):
    """The answer to a `CursorUpdate` that changed nothing: its holder has the device no longer."""

    holder: Holder
    now: Holder | None
    """Who has it; None where nobody does: it was released, or erased with its user."""


class DeviceCursor(NamedTuple):
    """A device of a user, as the store knows it."""

    device: str
    cursor: Cursor
    holder: Holder | None
    """Who has it; None where nobody does."""


class CursorUpdate(NamedTuple):
    """A cursor to save for as long as `holder` still has the device."""

    user: str
    device: str
    holder: Holder
    cursor: Cursor
    release: bool
    """The session has ended: nobody holds the device from now on."""


class Broadcast(NamedTuple):
    """A topic message as the inbox keeps it once, whoever has subscribed."""

    topic: str
    position: Position
    """In the stream BROADCAST."""
    id: str
    type: str
    stored_ns: int
    """When JetStream stored it: nanoseconds since the Unix epoch, by the server's clock."""
    body: bytes
    """Empty where only the reference was asked for."""


class Subscription(NamedTuple):
    """What a user follows."""

    topic: str
    """A pattern, see `tidings.wire.topic`."""
    since: Position
    """Broadcasts above it are the user's."""


class EndedSubscription(NamedTuple):
    """What a user followed."""

    topic: str
    since: Position
    until: Position
    """Broadcasts above `since` and up to this one are the user's."""


class SubscriberPage(NamedTuple):
    """Some subscribers of a pattern, in an order of the store's; one may come twice. `next` is None at the end.

    A page may have fewer than was asked for, and none, although more follow.
    """

    users: Sequence[str]
    next: str | None


class Store(Protocol):
    """The inbox, its marks, the devices' cursors (which are also the routing table), subscriptions and broadcasts."""

    async def open(self) -> None:
        """Connect and bring the schema up to date. Opening twice is an error of the caller."""

    async def close(self) -> None:
        """Finish what was accepted, then let go. Closing twice or before opening is fine."""

    async def check(self) -> None:
        """Answer if the store can read and write now; raises `StoreUnavailable` otherwise."""

    async def append(self, rows: Sequence[InboxRow]) -> None:
        """Store rows; durable when it returns. A row that is there already stays, with its marks.

        Raises `RowsRefused` when some can never be stored; all others then are durable.
        """

    async def floors(self) -> dict[int, Position]:
        """The inbox floors that were noted, by partition: a log that ends below its own has lost its end.

        Partition -1 is the stream BROADCAST.
        """

    async def note_floors(self, floors: Mapping[int, Position]) -> None:
        """Note inbox floors; of two who note one in the same moment, either stays."""

    async def page(self, user: str, query: PageQuery) -> InboxPage:
        """One page of what the query asks for; following `next` shows each row once, whatever is stored meanwhile."""

    async def between(self, user: str, after: Position, upto: Position, limit: int) -> list[InboxItem]:
        """Rows with after < position <= upto, oldest first, at most `limit`; marks do not matter."""

    async def missed(self, user: str, after: Position, upto: Position) -> int:
        """How many rows `between` has, counted to `MISSED_CAP`."""

    async def unread(self, user: str) -> int:
        """Rows neither read nor archived, counted to `UNREAD_CAP`."""

    async def mark(self, user: str, positions: Sequence[Position], as_: MarkAs) -> None:
        """Mark rows, also ones that are still to be appended: their marks wait for them.

        ``read`` implies seen, ``archived`` implies both; ``unread`` takes read back, from what is not archived.
        """

    async def mark_all(self, user: str, upto: Position, as_: MarkAllAs) -> None:
        """Mark every row up to and including `upto`, also those that are appended later."""

    async def delivered(self, marks: Sequence[DeliveredMark]) -> None:
        """Note first deliveries; a later one of the same notification changes nothing."""

    async def claim(self, user: str, device: str, holder: Holder, floor: Position) -> Claimed:
        """Make `holder` the device's session, durably and atomically; `floor` is a first-ever device's cursor.

        Where the user has more than `DEVICES_CAP` devices then, some are forgotten: first those that nobody holds, of
        these the anonymous ones, and of the same kind the one furthest behind, which is the one away for longest. Two
        claims at once may exceed it by one.
        """

    async def save(self, updates: Sequence[CursorUpdate]) -> list[Lost]:
        """Write cursors, each only where its holder still has the device; returns what was lost.

        A floor never moves back: of two the higher one stays. `Cursor.broadcast` is kept as it comes. A holder is
        known to the store that claimed for it.
        """

    async def holders(self, user: str) -> list[Holder]:
        """The sessions that have the user's devices now (or had them when their gateway was killed)."""

    async def devices(self, user: str) -> list[DeviceCursor]:
        """The user's devices, with what each has acknowledged as of its gateway's last write."""

    async def expire(self, before_ns: int) -> int:
        """Delete rows and broadcasts stored, and forget what ended, before that time (nanoseconds since the epoch).

        Returns how many of the rows and broadcasts are gone.

        A store whose rows have a time to live deletes nothing here.
        """

    async def subscribe(self, user: str, topics: Sequence[str], most: int, since: Position) -> None:
        """Subscribe to patterns (see `tidings.wire.topic`); in force for every reader of `subscribers` when it returns.

        One that is there already keeps its `since`. Raises `TooManySubscriptions`, and changes nothing, where the user
        would have more than `most`. Two calls at once may exceed it by what they add.
        """

    async def unsubscribe(self, user: str, topics: Sequence[str], until: Position) -> None:
        """End subscriptions; those that are none are no error.

        Each whose `since` lies below `until` is kept as one that ended, for the retention.
        """

    async def subscriptions(self, user: str, after: str | None, limit: int) -> list[Subscription]:
        """The user's subscriptions to topics behind `after`, at most `limit`, in the order of their UTF-8 bytes."""

    async def ended_subscriptions(
        self, user: str, after: EndedSubscription | None, limit: int
    ) -> list[EndedSubscription]:
        """Those of the user that ended, behind `after`, at most `limit`, in the order of topic and `since`."""

    async def subscribers(self, topic: str, after: str | None, limit: int) -> SubscriberPage:
        """Who has subscribed to exactly this pattern; `after` is the `next` of the page before."""

    async def append_broadcasts(self, rows: Sequence[Broadcast]) -> None:
        """Store broadcasts: each once, and a reference under every pattern that covers its topic; durable when it
        returns. One that is there already stays.

        Raises `RowsRefused` when some can never be stored; all others then are durable.
        """

    async def broadcasts(self, after: Position, upto: Position, limit: int) -> list[Broadcast]:
        """Those of all topics with after < position <= upto, oldest first, at most `limit`."""

    async def broadcasts_to(self, pattern: str, after: Position, upto: Position, limit: int) -> list[Broadcast]:
        """References to those of exactly this pattern with after < position <= upto, oldest first, at most `limit`."""

    async def broadcast_bodies(self, positions: Sequence[Position]) -> dict[Position, bytes]:
        """The bodies of those that are there."""

    async def synced(self, user: str) -> Position:
        """Up to where the broadcasts of the user's topics are in the user's inbox: as noted, Position(0, 0) at first.

        A store whose rows have a time to live forgets it when no broadcast that it covers is left.
        """

    async def note_synced(self, user: str, upto: Position) -> None:
        """Note it; it never moves back. Of two who note it in the same moment, either may stay."""

    def export(self, user: str) -> AsyncIterator[dict[str, Any]]:
        """Everything kept of a user, as JSON-ready objects with a member ``kind``: notifications, marks, cursors,
        subscriptions and those that ended."""

    async def erase(self, user: str, upto: Position) -> int:
        """Delete everything kept of a user: notifications and marks up to `upto`, all cursors and subscriptions, what
        ended, and what is synced. Broadcasts are nobody's.

        Returns how many notifications were deleted. What is appended later up to `upto` stays away too.
        """
