"""The store's port: what the agents ask of a database, and what every adapter promises.

All adapters pass one conformance suite (``tests/conformance``). Methods are coroutines that never block
the event loop; they raise `StoreUnavailable` when the database does not answer, and then have changed
nothing or something that repeating them changes no further.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Final, NamedTuple, Protocol

from tidings.wire.frames import Filter, MarkAs
from tidings.wire.position import Position

__all__ = [
    "UNREAD_CAP",
    "Claimed",
    "Cursor",
    "CursorUpdate",
    "Holder",
    "InboxItem",
    "InboxPage",
    "InboxRow",
    "Store",
]

UNREAD_CAP: Final = 100
"""`Store.unread` never counts further: 100 means more than 99."""


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


class InboxItem(NamedTuple):
    """A row of a page, with the user's marks."""

    position: Position
    seen: bool
    read: bool
    archived: bool
    body: bytes


class InboxPage(NamedTuple):
    """Newest first; `next` is the `before` of the following page, None at the end."""

    items: Sequence[InboxItem]
    next: Position | None


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


class Claimed(NamedTuple):
    """The answer to `Store.claim`: the device's cursor, and who had the device until now."""

    cursor: Cursor
    first: bool
    """The device was never seen before: the cursor is the floor that the claim proposed."""
    previous: Holder | None


class CursorUpdate(NamedTuple):
    """A cursor to save for as long as `holder` still has the device."""

    user: str
    device: str
    holder: Holder
    cursor: Cursor
    release: bool
    """The session has ended: nobody holds the device from now on."""


class Store(Protocol):
    """The inbox, its marks, and the devices' cursors (which are also the routing table)."""

    async def open(self) -> None:
        """Connect and bring the schema up to date. Opening twice is an error of the caller."""

    async def close(self) -> None:
        """Finish what was accepted, then let go. Closing twice or before opening is fine."""

    async def check(self) -> None:
        """Answer if the store can read and write now; raises `StoreUnavailable` otherwise."""

    async def append(self, rows: Sequence[InboxRow]) -> None:
        """Store rows; durable when it returns. A row that is there already stays, with its marks."""

    async def page(self, user: str, *, before: Position | None, limit: int, filter: Filter) -> InboxPage:
        """Rows newest first, strictly older than `before`.

        ``all`` leaves out what is archived, ``unread`` what is read or archived, ``archived`` all else.
        """

    async def between(self, user: str, after: Position, upto: Position, limit: int) -> list[InboxItem]:
        """Rows with after < position <= upto, oldest first, at most `limit`; marks do not matter."""

    async def missed(self, user: str, after: Position, upto: Position) -> int:
        """How many rows `between` has, however many."""

    async def unread(self, user: str) -> int:
        """Rows neither read nor archived, counted to `UNREAD_CAP`."""

    async def mark(self, user: str, positions: Sequence[Position], as_: MarkAs) -> None:
        """Mark rows, also ones that are still to be appended: their marks wait for them.

        ``read`` and ``archived`` imply seen; ``unread`` takes read back; nothing takes archived back.
        """

    async def mark_all(self, user: str, upto: Position, as_: MarkAs) -> None:
        """Mark every row up to and including `upto`. Archived rows are left as they are."""

    async def claim(self, user: str, device: str, holder: Holder, floor: Position) -> Claimed:
        """Make `holder` the device's session, durably and atomically; `floor` is a first-ever device's cursor."""

    async def save(self, updates: Sequence[CursorUpdate]) -> list[Holder]:
        """Write cursors, each only where its holder still has the device; returns the holders that lost theirs.

        A floor never moves back: of two the higher one stays.
        """

    async def holders(self, user: str) -> list[Holder]:
        """The sessions that have the user's devices now (or had them when their gateway was killed)."""

    async def expire(self, before_ns: int) -> int:
        """Delete rows stored before that time (nanoseconds since the epoch); returns how many."""
