"""What every store promises: a suite that knows the port and no adapter.

An adapter's test module inherits `StoreConformance` and gives it the fixture `store`: open, empty, closed afterwards.
"""

from __future__ import annotations

import asyncio
import json
import time
from collections import defaultdict
from collections.abc import Awaitable, Callable, Coroutine
from dataclasses import dataclass
from datetime import UTC, datetime
from itertools import count
from typing import Any, Final

import pytest
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, rule, run_state_machine_as_test

from support.clock import PATIENCE_S
from tidings.store.port import (
    ANONYMOUS,
    DEVICES_CAP,
    MISSED_CAP,
    UNREAD_CAP,
    Broadcast,
    Claimed,
    Cursor,
    CursorUpdate,
    Delivered,
    DeliveredMark,
    DeviceCursor,
    EndedSubscription,
    Holder,
    InboxItem,
    InboxPage,
    InboxRow,
    Lost,
    MarkAllAs,
    PageQuery,
    Store,
    Subscription,
)
from tidings.wire.errors import RowsRefused, StoreUnavailable, TooManySubscriptions
from tidings.wire.frames import FILTERS, MARKS, Filter, MarkAs
from tidings.wire.position import Position

ALICE: Final = "alice@example.org"
BOB: Final = "bob"
ONE, TWO = Holder("gateway-1", "session-1"), Holder("gateway-2", "session-2")
NOW_NS: Final = time.time_ns()
NEWEST: Final = Position(2**48 - 1, 2**63 - 1)
"""The highest position there can be."""

ZERO: Final = Position(0, 0)
"""Below every position."""

MARKS_OF_ALL: Final[tuple[MarkAllAs, ...]] = ("seen", "read", "archived")
TYPES: Final = ("org.example.even", "org.example.odd")
TOPICS: Final = (None, "news", "jobs")

Ask = Callable[[Coroutine[Any, Any, Any]], Any]


MOST = 10_000
"""Subscriptions of a user."""


def at(sequence: int, incarnation: int = 1_700_000_000_000) -> Position:
    return Position(incarnation, sequence)


def row(user: str, position: Position, body: bytes | None = None, stored_ns: int = NOW_NS) -> InboxRow:
    """What is at a position never changes: its content comes from the position."""
    text = f"{user} {position}"
    type_, topic = TYPES[position.sequence % 2], TOPICS[position.sequence % 3]
    return InboxRow(user, position, f"id-{text}", type_, topic, stored_ns, body or text.encode())


def rows(user: str, *sequences: int, stored_ns: int = NOW_NS) -> list[InboxRow]:
    return [row(user, at(sequence), stored_ns=stored_ns) for sequence in sequences]


def broadcast(topic: str, position: Position, stored_ns: int = NOW_NS) -> Broadcast:
    text = f"{topic} {position}"
    return Broadcast(topic, position, f"id-{text}", TYPES[position.sequence % 2], stored_ns, text.encode() + b"\0\xff")


def reference(row: Broadcast) -> Broadcast:
    return row._replace(body=b"")


def first(number: int) -> Delivered:
    """A delivery, the earlier the lower its number."""
    return Delivered(NOW_NS // 10**6 + number, f"device-{number}", number)


def delivered(user: str, position: Position, number: int) -> DeliveredMark:
    return DeliveredMark(user, position, NOW_NS, first(number))


def sequences(items: list[InboxItem] | InboxPage) -> list[int]:
    return [item.position.sequence for item in (items.items if isinstance(items, InboxPage) else items)]


def letters(item: InboxItem) -> str:
    """The marks as text: s for seen, r for read, a for archived."""
    return "s" * item.seen + "r" * item.read + "a" * item.archived


async def everything(store: Store, user: str) -> list[InboxItem]:
    return await store.between(user, Position(0, 0), NEWEST, 10_000)


async def marks(store: Store, user: str) -> dict[int, str]:
    return {item.position.sequence: letters(item) for item in await everything(store, user)}


async def first_page(store: Store, user: str, filter: Filter = "all", limit: int = 50) -> InboxPage:
    return await store.page(user, PageQuery(limit, filter=filter))


async def follow(store: Store, user: str, query: PageQuery) -> list[list[int]]:
    """The sequences of every page that `next` leads to, from the first to the last."""
    pages: list[list[int]] = []
    following: Position | None = None
    while not pages or following is not None:
        if following is not None:
            query = query._replace(before=following) if query.after is None else query._replace(after=following)
        page = await store.page(user, query)
        pages.append(sequences(page))
        following = page.next
    return pages


async def listed(store: Store, user: str, query: PageQuery) -> list[int]:
    """All that the query asks for, however many pages a store makes of it."""
    return [sequence for page in await follow(store, user, query) for sequence in page]


async def exported(store: Store, user: str) -> list[dict[str, Any]]:
    return [entry async for entry in store.export(user)]


async def topics(store: Store, user: str, after: str | None = None, limit: int = 99) -> list[str]:
    """What a user follows."""
    return [subscription.topic for subscription in await store.subscriptions(user, after, limit)]


async def ended(store: Store, user: str, limit: int = 99) -> list[EndedSubscription]:
    """All that a user followed, page after page."""
    found: list[EndedSubscription] = []
    while page := await store.ended_subscriptions(user, found[-1] if found else None, limit):
        assert len(page) <= limit
        found += page
    return found


async def broadcasts(store: Store, after: Position = ZERO, limit: int = 10_000) -> list[Broadcast]:
    """All above a position, page after page."""
    found: list[Broadcast] = []
    while page := await store.broadcasts(found[-1].position if found else after, NEWEST, limit):
        assert len(page) <= limit
        found += page
    return found


async def broadcasts_to(store: Store, pattern: str, after: Position = ZERO, limit: int = 10_000) -> list[Broadcast]:
    """All of a pattern above a position, page after page."""
    found: list[Broadcast] = []
    while page := await store.broadcasts_to(pattern, found[-1].position if found else after, NEWEST, limit):
        assert len(page) <= limit
        found += page
    return found


async def followers(store: Store, topic: str, limit: int = 100) -> set[str]:
    """All subscribers of a pattern, page after page."""
    found: set[str] = set()
    page = await store.subscribers(topic, None, limit)
    while True:
        assert len(page.users) <= limit
        found.update(page.users)
        if page.next is None:
            return found
        page = await store.subscribers(topic, page.next, limit)


async def devices(store: Store) -> set[str]:
    """Whose cursor is kept."""
    return {entry["device"] async for entry in store.export(ALICE) if entry["kind"] == "cursor"}


def update(device: str, holder: Holder, cursor: Cursor, *, release: bool = False) -> CursorUpdate:
    return CursorUpdate(ALICE, device, holder, cursor, release)


class StoreConformance:
    """The promises of `Store`, a test each."""

    examples = 60
    """Runs of the machine that does everything in any order; fewer where a request takes milliseconds."""
    steps = 40
    """Most operations of a run."""

    @pytest.fixture
    async def store(self) -> Store:
        """An open and empty store."""
        raise NotImplementedError("the adapter's module gives the store")

    # The inbox

    async def test_append_and_page(self, store: Store) -> None:
        """What was appended is on the page at once, newest first, byte for byte, without marks."""
        body = bytes(range(256)) * 64
        await store.append([row(ALICE, at(1)), row(ALICE, at(3), body), row(ALICE, at(2))])
        page = await first_page(store, ALICE)
        assert sequences(page) == [3, 2, 1]
        assert page.items[0] == InboxItem(at(3), False, False, False, NOW_NS, body, None)
        assert page.next is None

    async def test_append_nothing(self, store: Store) -> None:
        """No rows, no positions and no cursors are no errors."""
        await store.append([])
        await store.mark(ALICE, [], "read")
        await store.mark_all(ALICE, NEWEST, "read")
        await store.delivered([])
        assert await store.save([]) == []
        assert await first_page(store, ALICE) == InboxPage([], None)
        assert await store.holders(ALICE) == []

    async def test_append_again(self, store: Store) -> None:
        """A row that is there stays as it is, with its marks; the new ones beside it are stored."""
        await store.append(rows(ALICE, 1))
        await store.mark(ALICE, [at(1)], "read")
        await store.delivered([delivered(ALICE, at(1), 1)])
        await store.append(rows(ALICE, 1, 2, 2))
        await store.mark(ALICE, [at(2), at(2)], "unread")
        found = [(item.body, letters(item), item.delivered) for item in await everything(store, ALICE)]
        expected = rows(ALICE, 1, 2)
        assert found == [(expected[0].body, "sr", first(1)), (expected[1].body, "", None)]

    async def test_append_what_can_never_be_stored(self, store: Store) -> None:
        """Rows that no database takes are named with the reason; all others, before and after them, are stored."""
        wrong = rows(ALICE, 2)[0]._replace(type="\ud800"), rows(ALICE, 4)[0]._replace(topic="a\udfff")
        right = rows(ALICE, 1, 3, 5)
        with pytest.raises(RowsRefused) as caught:
            await store.append([right[0], wrong[0], right[1], wrong[1], right[2]])
        assert set(caught.value.reasons) == {1, 3}
        assert all(caught.value.reasons.values())
        assert set(await marks(store, ALICE)) == {1, 3, 5}
        with pytest.raises(RowsRefused):
            await store.append([wrong[0]])
        await store.append(rows(ALICE, 2))
        assert set(await marks(store, ALICE)) == {1, 2, 3, 5}

    async def test_refused_rows_are_nobody_elses(self, store: Store) -> None:
        """Of many calls at the same time only the one whose row cannot be stored is told."""
        wrong = rows(ALICE, 50)[0]._replace(id="\udc80")
        calls = [store.append(rows(ALICE, number)) for number in range(1, 10)] + [store.append([wrong])]
        outcomes = await asyncio.gather(*calls, return_exceptions=True)
        assert outcomes[:9] == [None] * 9
        assert isinstance(outcomes[9], RowsRefused)
        assert set(await marks(store, ALICE)) == set(range(1, 10))

    async def test_pages_meet(self, store: Store) -> None:
        """Following `next` shows every row once; it is None exactly at the end."""
        await store.append(rows(ALICE, *range(1, 8)))
        assert await follow(store, ALICE, PageQuery(3)) == [[7, 6, 5], [4, 3, 2], [1]]
        assert await follow(store, ALICE, PageQuery(7)) == [[7, 6, 5, 4, 3, 2, 1]]
        assert await follow(store, ALICE, PageQuery(3, after=at(1))) == [[2, 3, 4], [5, 6, 7]]
        assert await follow(store, ALICE, PageQuery(4, after=at(1))) == [[2, 3, 4, 5], [6, 7]]

    async def test_pages_meet_while_others_store(self, store: Store) -> None:
        """What is stored between two pages moves nothing: no row is shown twice, none is left out."""
        await store.append(rows(ALICE, 2, 4, 6, 8))
        newest = await store.page(ALICE, PageQuery(2))
        oldest = await store.page(ALICE, PageQuery(2, after=at(0)))
        await store.append(rows(ALICE, 1, 9))
        assert await listed(store, ALICE, PageQuery(2, before=newest.next)) == [4, 2, 1]
        assert oldest.next is not None
        assert await listed(store, ALICE, PageQuery(2, after=oldest.next)) == [6, 8, 9]

    async def test_page_before(self, store: Store) -> None:
        """`before` is exclusive, and need not be a row's position."""
        await store.append(rows(ALICE, 2, 4, 6))
        for before, expected in ((2, []), (4, [2]), (5, [4, 2]), (99, [6, 4, 2])):
            assert sequences(await store.page(ALICE, PageQuery(9, before=at(before)))) == expected

    async def test_page_after(self, store: Store) -> None:
        """`after` is exclusive, need not be a row's position, and turns the order around."""
        await store.append(rows(ALICE, 2, 4, 6))
        for after, expected in ((6, []), (4, [6]), (3, [4, 6]), (0, [2, 4, 6])):
            assert sequences(await store.page(ALICE, PageQuery(9, after=at(after)))) == expected
        page = await store.page(ALICE, PageQuery(9, after=Position(1, 2**63 - 1)))
        assert sequences(page) == [2, 4, 6]

    @pytest.mark.parametrize("way", ["newest first", "oldest first"])
    @pytest.mark.parametrize("filter", FILTERS)
    async def test_page_of_a_type_or_topic(self, store: Store, filter: Filter, way: str) -> None:
        """Type, topic and filter hold together, in both directions, and their pages meet."""
        await store.append(rows(ALICE, *range(1, 25)) + rows(BOB, 3))
        await store.mark_all(ALICE, at(6), "archived")
        await store.mark_all(ALICE, at(15), "read")
        await store.mark(ALICE, [at(20), at(21), at(23)], "archived")
        await store.mark(ALICE, [at(2), at(8), at(9), at(10), at(15)], "unread")
        archived = {*range(1, 7), 20, 21, 23}
        unread = {8, 9, 10, 15, *range(16, 25)} - archived
        fitting = {"all": set(range(1, 25)) - archived, "unread": unread, "archived": archived}[filter]
        for type_ in (None, *TYPES, "org.example"):
            for topic in (None, "news", "jobs", "sports"):
                expected = [
                    number
                    for number in range(1, 25)
                    if number in fitting and type_ in (None, TYPES[number % 2]) and topic in (None, TOPICS[number % 3])
                ]
                query = PageQuery(2, None, at(0) if way == "oldest first" else None, filter, type_, topic)
                if way == "newest first":
                    expected.reverse()
                pages = await follow(store, ALICE, query)
                assert pages == [expected[start : start + 2] for start in range(0, len(expected), 2) or range(1)]

    async def test_incarnation_comes_first(self, store: Store) -> None:
        """A recreated stream begins at 1 again: its rows are newer than all of the old one."""
        await store.append([row(ALICE, at(9, 1)), row(ALICE, at(1, 2)), row(ALICE, at(5, 1))])
        assert [item.position for item in (await first_page(store, ALICE)).items] == [at(1, 2), at(9, 1), at(5, 1)]
        assert [item.position for item in await store.between(ALICE, at(5, 1), at(1, 2), 9)] == [at(9, 1), at(1, 2)]
        assert await store.missed(ALICE, at(9, 1), at(0, 2)) == 0
        page = await store.page(ALICE, PageQuery(1, before=at(1, 2)))
        assert page.next == at(9, 1)
        assert [item.position for item in (await store.page(ALICE, PageQuery(2, after=at(5, 1)))).items] == [
            at(9, 1),
            at(1, 2),
        ]
        await store.mark_all(ALICE, at(9, 1), "read")
        assert await store.unread(ALICE) == 1

    async def test_extreme_positions(self, store: Store) -> None:
        """The lowest and the highest position that the wire allows are rows like others."""
        lowest = Position(0, 1)
        await store.append([row(ALICE, lowest), row(ALICE, NEWEST)])
        assert [item.position for item in (await first_page(store, ALICE)).items] == [NEWEST, lowest]
        await store.mark(ALICE, [NEWEST], "read")
        await store.claim(ALICE, "phone", ONE, NEWEST)
        assert (await store.claim(ALICE, "phone", TWO, lowest)).cursor == Cursor(NEWEST)

    @pytest.mark.parametrize(
        ("filter", "expected"), [("all", [6, 3, 2, 1]), ("unread", [6, 3, 1]), ("archived", [5, 4])]
    )
    async def test_filters(self, store: Store, filter: Filter, expected: list[int]) -> None:
        """``all`` is what is not archived, ``unread`` what is neither read nor archived; pages meet in each."""
        await store.append(rows(ALICE, 1, 2, 3, 4, 5, 6))
        await store.mark(ALICE, [at(2), at(5)], "read")
        await store.mark(ALICE, [at(3)], "seen")
        await store.mark(ALICE, [at(4), at(5)], "archived")
        assert sequences(await first_page(store, ALICE, filter)) == expected
        page = await first_page(store, ALICE, filter, limit=len(expected) - 1)
        assert sequences(page) == expected[:-1]
        assert page.next is not None
        last = await store.page(ALICE, PageQuery(9, before=page.next, filter=filter))
        assert (sequences(last), last.next) == (expected[-1:], None)

    async def test_between(self, store: Store) -> None:
        """After `after`, up to and with `upto`, oldest first, at most `limit`, whatever the marks; `missed` counts."""
        await store.append(rows(ALICE, 1, 2, 3, 4, 5))
        await store.mark(ALICE, [at(2)], "archived")
        await store.mark(ALICE, [at(3)], "read")
        assert sequences(await store.between(ALICE, at(1), at(4), 9)) == [2, 3, 4]
        assert sequences(await store.between(ALICE, at(1), at(4), 2)) == [2, 3]
        assert await store.between(ALICE, at(4), at(4), 9) == []
        assert await store.between(ALICE, at(4), at(1), 9) == []
        assert await store.missed(ALICE, at(1), at(4)) == 3
        assert await store.missed(ALICE, at(5), at(99)) == 0

    async def test_missed_is_exact(self, store: Store) -> None:
        """`missed` counts on where a page and the badge have long stopped, up to its cap."""
        await store.append(rows(ALICE, *range(1, MISSED_CAP + 3)))
        assert await store.missed(ALICE, at(1501), at(3000)) == 1499
        for behind, missed in ((0, MISSED_CAP), (1, MISSED_CAP), (2, MISSED_CAP), (3, MISSED_CAP - 1)):
            assert await store.missed(ALICE, at(behind), NEWEST) == missed

    async def test_thousands_read_one_by_one(self, store: Store) -> None:
        """Whoever reads each of thousands has an inbox as ever."""
        await store.append(rows(ALICE, *range(1, 3001)))
        for first in range(1, 3000, 100):
            await store.mark(
                ALICE, [at(number) for number in range(first, first + 100) if number not in (7, 3000)], "read"
            )
        assert await store.unread(ALICE) == 2
        assert await listed(store, ALICE, PageQuery(filter="unread")) == [3000, 7]
        await store.mark_all(ALICE, at(2999), "archived")
        assert await listed(store, ALICE, PageQuery()) == [3000]
        assert await store.unread(ALICE) == 1

    async def test_unread(self, store: Store) -> None:
        """The badge counts what is neither read nor archived, and stops at its cap."""
        await store.append(rows(ALICE, *range(1, UNREAD_CAP + 3)))
        assert await store.unread(ALICE) == UNREAD_CAP
        await store.mark(ALICE, [at(1), at(2)], "read")
        assert await store.unread(ALICE) == UNREAD_CAP
        await store.mark(ALICE, [at(3)], "archived")
        await store.mark(ALICE, [at(4)], "seen")
        assert await store.unread(ALICE) == UNREAD_CAP - 1
        await store.mark(ALICE, [at(1), at(3)], "unread")
        assert await store.unread(ALICE) == UNREAD_CAP

    @pytest.mark.parametrize("early", [False, True], ids=["stored", "not-yet-stored"])
    @pytest.mark.parametrize(
        ("given", "expected"),
        [
            ("seen", "s"),
            ("read", "sr"),
            ("unread", ""),
            ("archived", "sra"),
            ("seen unread", "s"),
            ("read unread", "s"),
            ("read seen", "sr"),
            ("archived unread", "sra"),
            ("archived seen", "sra"),
            ("archived read", "sra"),
            ("read archived", "sra"),
            ("read archived unread", "sra"),
        ],
    )
    async def test_marks(self, store: Store, given: str, expected: str, early: bool) -> None:
        """What each mark implies and takes back, for a stored row and for one whose marks come first."""
        if not early:
            await store.append(rows(ALICE, 1))
        for word in given.split():
            await store.mark(ALICE, [at(1)], next(as_ for as_ in MARKS if as_ == word))
        if early:
            await store.append(rows(ALICE, 1))
        assert await marks(store, ALICE) == {1: expected}

    async def test_marks_that_wait_are_no_rows(self, store: Store) -> None:
        """Marks without their notification are on no page, in no count and in no catch-up."""
        await store.append(rows(ALICE, 1))
        for sequence, as_ in enumerate(MARKS, 2):
            await store.mark(ALICE, [at(sequence)], as_)
        for filter in FILTERS:
            assert sequences(await first_page(store, ALICE, filter)) == ([] if filter == "archived" else [1])
        assert await marks(store, ALICE) == {1: ""}
        assert await store.missed(ALICE, at(0), NEWEST) == 1
        assert await store.unread(ALICE) == 1

    @pytest.mark.parametrize(
        ("as_", "expected"),
        [
            ("seen", ["s", "sr", "sra", "sra", ""]),
            ("read", ["sr", "sr", "sra", "sra", ""]),
            ("archived", ["sra", "sra", "sra", "sra", ""]),
        ],
    )
    async def test_mark_all(self, store: Store, as_: MarkAllAs, expected: list[str]) -> None:
        """Up to and with `upto`; marks of rows, what is above and other users stay; what comes above it is unmarked."""
        await store.append(rows(ALICE, 1, 2, 3, 4, 5) + rows(BOB, 1))
        await store.mark(ALICE, [at(2), at(4)], "read")
        await store.mark(ALICE, [at(3), at(4)], "archived")
        await store.mark(ALICE, [at(6)], "seen")
        await store.mark_all(ALICE, at(4), as_)
        assert list((await marks(store, ALICE)).values()) == expected
        assert await marks(store, BOB) == {1: ""}
        await store.append(rows(ALICE, 6))
        assert (await marks(store, ALICE))[6] == "s"

    @pytest.mark.parametrize(("as_", "expected"), [("seen", "s"), ("read", "sr"), ("archived", "sra")])
    async def test_mark_all_covers_what_comes_later(self, store: Store, as_: MarkAllAs, expected: str) -> None:
        """What is not stored yet is among all where it is below `upto`, whether marks of it wait or not."""
        await store.append(rows(ALICE, 1, 4))
        await store.mark(ALICE, [at(2)], "seen")
        await store.mark_all(ALICE, at(4), as_)
        await store.append(rows(ALICE, 2, 3, 5))
        found = await marks(store, ALICE)
        assert [found[number] for number in (2, 3, 5)] == [expected, expected, ""]
        assert await store.unread(ALICE) == (5 if as_ == "seen" else 1)

    async def test_mark_all_never_takes_back(self, store: Store) -> None:
        """Of several marks of all the highest counts, each kind by itself, and archived is also read and seen."""
        await store.append(rows(ALICE, 1, 2, 3, 4, 5))
        for upto, as_ in (
            (3, MARKS_OF_ALL[1]),
            (1, "archived"),
            (2, "read"),
            (1, "seen"),
            (4, "seen"),
            (0, "archived"),
        ):
            await store.mark_all(ALICE, at(upto), as_)
        assert await marks(store, ALICE) == {1: "sra", 2: "sr", 3: "sr", 4: "s", 5: ""}
        assert await listed(store, ALICE, PageQuery(9)) == [5, 4, 3, 2]
        assert await listed(store, ALICE, PageQuery(9, filter="unread")) == [5, 4]
        assert await listed(store, ALICE, PageQuery(9, filter="archived")) == [1]
        assert await store.unread(ALICE) == 2

    async def test_unread_after_all_was_read(self, store: Store) -> None:
        """The later of the two counts: a row is unread again, until a mark of all reaches it once more."""
        await store.append(rows(ALICE, 1, 2, 3, 4, 5))
        await store.mark_all(ALICE, at(4), "read")
        await store.mark(ALICE, [at(2), at(4)], "unread")
        assert await marks(store, ALICE) == {1: "sr", 2: "s", 3: "sr", 4: "s", 5: ""}
        assert await store.unread(ALICE) == 3
        for limit in (1, 2, 3):
            assert await listed(store, ALICE, PageQuery(limit, filter="unread")) == [5, 4, 2]
            assert await listed(store, ALICE, PageQuery(limit, after=at(0), filter="unread")) == [2, 4, 5]
        await store.mark_all(ALICE, at(3), "read")
        assert await listed(store, ALICE, PageQuery(9, filter="unread")) == [5, 4]
        await store.mark(ALICE, [at(4)], "read")
        assert await store.unread(ALICE) == 1
        await store.mark(ALICE, [at(1), at(2)], "unread")
        await store.mark_all(ALICE, at(5), "read")
        assert await store.unread(ALICE) == 0
        assert set((await marks(store, ALICE)).values()) == {"sr"}

    async def test_unread_before_all_is_read(self, store: Store) -> None:
        """A row that was marked as unread, stored or not, is read by a mark of all that comes later."""
        await store.append(rows(ALICE, 1, 2))
        await store.mark(ALICE, [at(1), at(3)], "unread")
        await store.mark_all(ALICE, at(9), "read")
        await store.append(rows(ALICE, 3))
        assert await marks(store, ALICE) == {1: "sr", 2: "sr", 3: "sr"}
        assert await store.unread(ALICE) == 0

    async def test_unread_waits_below_a_mark_of_all(self, store: Store) -> None:
        """Marked as unread after all was read and before it is stored: it comes unread, and alone."""
        await store.mark_all(ALICE, at(9), "read")
        await store.mark(ALICE, [at(5)], "unread")
        assert await store.unread(ALICE) == 0
        assert await first_page(store, ALICE, "unread") == InboxPage([], None)
        await store.append(rows(ALICE, 5, 6))
        assert await marks(store, ALICE) == {5: "s", 6: "sr"}
        assert await store.unread(ALICE) == 1

    @pytest.mark.parametrize("early", [False, True], ids=["stored", "not-yet-stored"])
    async def test_all_archived_stays(self, store: Store, early: bool) -> None:
        """No ``unread`` brings back what was archived with all, before or after."""
        if not early:
            await store.append(rows(ALICE, 1, 2, 3))
        await store.mark_all(ALICE, at(3), "read")
        await store.mark(ALICE, [at(2)], "unread")
        await store.mark_all(ALICE, at(2), "archived")
        await store.mark(ALICE, [at(1), at(2), at(3)], "unread")
        if early:
            await store.append(rows(ALICE, 1, 2, 3))
        assert await marks(store, ALICE) == {1: "sra", 2: "sra", 3: "s"}
        assert await listed(store, ALICE, PageQuery(9, filter="unread")) == [3]

    async def test_many_unread_below_a_mark_of_all(self, store: Store) -> None:
        """The badge counts rows that are unread again, to its cap, together with the newer ones."""
        await store.append(rows(ALICE, *range(1, 161)))
        await store.mark_all(ALICE, at(150), "read")
        await store.mark(ALICE, [at(number) for number in range(1, 61)], "unread")
        assert await store.unread(ALICE) == 70
        await store.mark(ALICE, [at(number) for number in range(61, 121)], "unread")
        assert await store.unread(ALICE) == UNREAD_CAP
        await store.mark_all(ALICE, at(150), "read")
        assert await store.unread(ALICE) == 10

    # Deliveries

    async def test_delivered(self, store: Store) -> None:
        """The first delivery is on pages and in a catch-up, whichever of several is told first; marks are beside it."""
        await store.append(rows(ALICE, 1, 2, 3) + rows(BOB, 1))
        await store.mark(ALICE, [at(1)], "seen")
        await store.delivered([delivered(ALICE, at(1), 2), delivered(ALICE, at(2), 1)])
        await store.delivered([delivered(ALICE, at(1), 1), delivered(ALICE, at(2), 2)])
        await store.mark(ALICE, [at(2)], "read")
        await store.mark_all(ALICE, at(1), "read")
        found = [(item.delivered, letters(item)) for item in await everything(store, ALICE)]
        assert found == [(first(1), "sr"), (first(1), "sr"), (None, "")]
        page = await store.page(ALICE, PageQuery(9, after=at(1)))
        assert [item.delivered for item in page.items] == [first(1), None]
        assert (await everything(store, BOB))[0].delivered is None

    async def test_delivered_before_it_is_stored(self, store: Store) -> None:
        """A delivery waits for its row as marks do, and is none until then."""
        await store.delivered([delivered(ALICE, at(1), 4), delivered(ALICE, at(1), 3), delivered(BOB, at(1), 5)])
        await store.mark(ALICE, [at(2)], "read")
        await store.delivered([delivered(ALICE, at(2), 6)])
        assert await everything(store, ALICE) == []
        assert await store.missed(ALICE, at(0), NEWEST) == 0
        assert await store.unread(ALICE) == 0
        for filter in FILTERS:
            assert await first_page(store, ALICE, filter) == InboxPage([], None)
        await store.append(rows(ALICE, 1, 2))
        await store.delivered([delivered(ALICE, at(1), 9)])
        found = [(item.delivered, letters(item), item.body) for item in await everything(store, ALICE)]
        bodies = [each.body for each in rows(ALICE, 1, 2)]
        assert found == [(first(3), "", bodies[0]), (first(6), "sr", bodies[1])]
        assert await store.unread(ALICE) == 1

    async def test_names_are_exact(self, store: Store) -> None:
        """Ids that differ only in case, blanks or accents, or hold quotes and wildcards, are different users."""
        names = ["a", "A", " a", "a ", "a%", "a_", "'a'--", '"a"', "ä", "a\u0308", "😀", "a\n", "a\0b", "a" * 200]
        await store.append([row(name, at(number)) for number, name in enumerate(names, 1)])
        for number, name in enumerate(names, 1):
            assert [item.body for item in await everything(store, name)] == [row(name, at(number)).body]
            assert (await store.claim(ALICE, name, ONE, at(number))).first

    async def test_expire_leaves_what_is_new(self, store: Store) -> None:
        """What was stored after that time stays, with its marks."""
        await store.append(rows(ALICE, 1, 2))
        await store.mark_all(ALICE, at(1), "read")
        assert await store.expire(NOW_NS - 10**9) == 0
        assert await marks(store, ALICE) == {1: "sr", 2: ""}

    # The right to one's data

    async def test_export(self, store: Store) -> None:
        """Notifications with marks and delivery, watermarks and cursors, as JSON; of this user alone."""
        await store.append([row(ALICE, at(1), b'{"type": "a"}'), row(ALICE, at(2), b"\xff\0"), *rows(BOB, 3)])
        await store.mark_all(ALICE, at(1), "archived")
        await store.delivered([delivered(ALICE, at(2), 7)])
        await store.claim(ALICE, "phone", ONE, at(1))
        await store.save([update("phone", ONE, Cursor(at(2), frozenset({at(9)}), {at(4): 2}))])
        await store.claim(ALICE, "tablet", TWO, at(0))
        broadcast = Cursor(at(1, 3), frozenset({at(3, 3)}), {at(2, 3): 4})
        await store.save([update("tablet", TWO, Cursor(at(2), broadcast=broadcast), release=True)])
        entries = await exported(store, ALICE)
        assert json.loads(json.dumps(entries)) == entries
        of = {kind: [entry for entry in entries if entry["kind"] == kind] for kind in ("notification", "cursor")}
        stored = datetime.fromtimestamp(NOW_NS / 1e9, UTC).isoformat(timespec="milliseconds").replace("+00:00", "Z")
        common = {"kind": "notification", "stored": stored}
        one, two = of["notification"]
        assert one == common | {
            "pos": str(at(1)),
            "seen": True,
            "read": True,
            "archived": True,
            "delivered": None,
            "notification": {"type": "a"},
        }
        assert two.pop("delivered").items() >= {"device": "device-7", "attempts": 7}.items()
        assert two == common | {
            "pos": str(at(2)),
            "seen": False,
            "read": False,
            "archived": False,
            "base64": "/wA=",
        }
        assert {"kind": "watermark", "as": "archived", "upto": str(at(1))} in entries
        assert sorted(of["cursor"], key=lambda cursor: str(cursor["device"])) == [
            {
                "kind": "cursor",
                "device": "phone",
                "floor": str(at(2)),
                "acked": [str(at(9))],
                "attempts": {str(at(4)): 2},
                "broadcast": None,
                "session": ONE.session,
            },
            {
                "kind": "cursor",
                "device": "tablet",
                "floor": str(at(2)),
                "acked": [],
                "attempts": {},
                "broadcast": {
                    "floor": str(at(1, 3)),
                    "acked": [str(at(3, 3))],
                    "attempts": {str(at(2, 3)): 4},
                },
                "session": None,
            },
        ]
        assert {entry["kind"] for entry in entries} == {"notification", "watermark", "cursor"}

    async def test_export_of_many(self, store: Store) -> None:
        """However long a history is, each notification comes once, also what is archived; of nobody comes nothing."""
        await store.append(rows(ALICE, *range(1, 451)))
        await store.mark(ALICE, [at(number) for number in range(1, 450, 7)], "archived")
        assert [entry["pos"] for entry in await exported(store, ALICE)] == [str(at(number)) for number in range(1, 451)]
        assert await exported(store, BOB) == []

    async def test_erase(self, store: Store) -> None:
        """Up to and with `upto` all is gone and stays away; what is above it stays, and so does everybody else."""
        await store.append(rows(ALICE, 1, 2, 3, 5, 6) + rows(BOB, 1))
        await store.mark(ALICE, [at(2), at(4), at(5)], "read")
        await store.delivered([delivered(ALICE, at(number), number) for number in (1, 4, 5)])
        for user in (ALICE, BOB):
            await store.claim(user, "phone", ONE, at(1))
        assert await store.erase(ALICE, at(4)) == 3
        assert await marks(store, ALICE) == {5: "sr", 6: ""}
        assert (await everything(store, ALICE))[0].delivered == first(5)
        await store.append(rows(ALICE, 1, 2, 3, 4, 5, 7))
        await store.delivered([delivered(ALICE, at(3), 3)])
        await store.mark(ALICE, [at(1)], "unread")
        assert await marks(store, ALICE) == {5: "sr", 6: "", 7: ""}
        assert await store.missed(ALICE, at(0), NEWEST) == 3
        assert await store.unread(ALICE) == 2
        assert await listed(store, ALICE, PageQuery(9, after=at(0))) == [5, 6, 7]
        assert [entry["pos"] for entry in await exported(store, ALICE)] == [str(at(number)) for number in (5, 6, 7)]
        for other in ("Aaron", BOB, "zoe"):
            await store.append(rows(other, 2))
            await store.delivered([delivered(other, at(2), 2)])
            assert (await everything(store, other))[-1].delivered == first(2)
        assert await marks(store, BOB) == {1: "", 2: ""}
        assert await store.holders(BOB) == [ONE]

    async def test_erase_again(self, store: Store) -> None:
        """Erasing again finds nothing, and one that reaches less far brings nothing back."""
        await store.append(rows(ALICE, 1, 2, 3))
        assert await store.erase(ALICE, at(3)) == 3
        assert await store.erase(ALICE, at(3)) == 0
        assert await store.erase(ALICE, at(1)) == 0
        assert await store.erase(BOB, NEWEST) == 0
        await store.append(rows(ALICE, 1, 2, 3))
        assert await everything(store, ALICE) == []
        assert await exported(store, ALICE) == []

    async def test_devices(self, store: Store) -> None:
        """All of a user's, with what each has acknowledged and who has it; nobody else's."""
        await store.claim(ALICE, "phone", ONE, at(1))
        await store.claim(ALICE, "tablet", TWO, at(2))
        await store.claim(BOB, "phone", ONE, at(3))
        cursor = Cursor(at(4), frozenset([at(6)]), {at(5): 2}, Cursor(at(8)))
        await store.save([CursorUpdate(ALICE, "tablet", TWO, cursor, release=True)])
        found = sorted(await store.devices(ALICE), key=lambda known: known.device)
        assert found == [DeviceCursor("phone", Cursor(at(1)), ONE), DeviceCursor("tablet", cursor, None)]
        assert await store.devices("nobody") == []

    async def test_erased_cursors(self, store: Store) -> None:
        """A session whose user is erased loses the device, and the next one there is a first one."""
        await store.claim(ALICE, "phone", ONE, at(1))
        await store.claim(ALICE, "tablet", TWO, at(1))
        await store.erase(ALICE, at(9))
        assert await store.holders(ALICE) == []
        assert await store.save([update("phone", ONE, Cursor(at(2)))]) == [Lost(ONE, None)]
        assert await store.holders(ALICE) == []
        assert await store.claim(ALICE, "phone", TWO, at(9)) == Claimed(Cursor(at(9)), True, None)

    async def test_erased_watermarks(self, store: Store) -> None:
        """Marks of all are forgotten with what they covered: what comes above is new."""
        await store.append(rows(ALICE, 1, 2))
        await store.mark_all(ALICE, at(2), "archived")
        await store.mark(ALICE, [at(1)], "unread")
        assert await store.erase(ALICE, at(2)) == 2
        assert await exported(store, ALICE) == []
        await store.append(rows(ALICE, 2, 3))
        assert await marks(store, ALICE) == {3: ""}
        assert await store.unread(ALICE) == 1

    async def test_erase_many(self, store: Store) -> None:
        """A long history is erased whole; the number is exact."""
        await store.append(rows(ALICE, *range(1, 2502)))
        assert await store.erase(ALICE, at(2500)) == 2500
        assert await marks(store, ALICE) == {2501: ""}

    # Cursors

    async def test_first_claim(self, store: Store) -> None:
        """A device never seen begins at the floor that is proposed; later proposals change nothing."""
        found = await store.claim(ALICE, "phone", ONE, at(5))
        assert found == Claimed(Cursor(at(5)), True, None)
        found = await store.claim(ALICE, "phone", TWO, at(9))
        assert found == Claimed(Cursor(at(5)), False, ONE)
        assert await store.holders(ALICE) == [TWO]
        assert (await store.claim(ALICE, "tablet", ONE, at(7))).first
        assert (await store.claim(BOB, "phone", ONE, at(7))).first

    async def test_devices_are_bounded(self, store: Store) -> None:
        """One device too many, and one is forgotten: anonymous before named, held by nobody before held, the one
        furthest behind before others. The newest stays, and so do other users' devices."""
        await store.claim(BOB, "phone", ONE, at(1))
        await store.claim(ALICE, "old", ONE, at(1))
        await store.claim(ALICE, "older", ONE, at(0))
        await store.claim(ALICE, "held", ONE, at(0))
        await store.claim(ALICE, f"{ANONYMOUS}held", ONE, at(0))
        await store.claim(ALICE, f"{ANONYMOUS}1", ONE, at(50))
        for number in range(DEVICES_CAP - 5):
            await store.claim(ALICE, f"device-{number}", ONE, at(9))
        gone = ("old", "older", f"{ANONYMOUS}1", *(f"device-{number}" for number in range(DEVICES_CAP - 5)))
        released = [update(name, ONE, Cursor(at(0)), release=True) for name in gone]
        assert await store.save(released) == []
        kept = await devices(store)
        assert len(kept) == DEVICES_CAP
        for forgotten in (f"{ANONYMOUS}1", "older", "old"):
            await store.claim(ALICE, f"new-{forgotten}", TWO, at(0))
            kept = kept - {forgotten} | {f"new-{forgotten}"}
            assert await devices(store) == kept
        assert (await store.claim(ALICE, "held", ONE, at(7))).cursor == Cursor(at(0))
        assert not (await store.claim(BOB, "phone", ONE, at(1))).first

    async def test_one_claim_wins(self, store: Store) -> None:
        """Of claims at the same time one is first and each other learns of a different predecessor."""
        holders = [Holder(f"gateway-{number}", f"session-{number}") for number in range(20)]
        claims = await asyncio.gather(
            *(store.claim(ALICE, "phone", holder, at(number)) for number, holder in enumerate(holders))
        )
        assert [claim.first for claim in claims].count(True) == 1
        assert len({claim.cursor.floor for claim in claims}) == 1
        predecessors = [claim.previous for claim in claims if claim.previous is not None]
        assert sorted(predecessors + await store.holders(ALICE)) == sorted(holders)

    async def test_save_and_claim(self, store: Store) -> None:
        """A cursor comes back as it was saved; saving again replaces it."""
        await store.claim(ALICE, "phone", ONE, at(1))
        for cursor in (
            Cursor(at(3), frozenset({at(5), at(9), at(1, 2**48 - 1)}), {at(4): 2, at(6): 10}),
            Cursor(at(3), frozenset({at(5)}), {}),
            Cursor(at(4), broadcast=Cursor(at(2, 9), frozenset({at(4, 9), at(1, 10)}), {at(3, 9): 1, at(7, 9): 2})),
            Cursor(at(4), frozenset({at(6)}), {at(5): 1}, Cursor(at(1, 9))),
            Cursor(at(12)),
        ):
            assert await store.save([update("phone", ONE, cursor)]) == []
            # Twice: claiming by itself changes nothing of the cursor.
            assert (await store.claim(ALICE, "phone", TWO, at(0))).cursor == cursor
            assert (await store.claim(ALICE, "phone", ONE, at(0))).cursor == cursor

    async def test_save_without_the_device(self, store: Store) -> None:
        """Who lost a device, or never had it, is told and changes nothing; the others of the batch are written."""
        await store.claim(ALICE, "phone", ONE, at(1))
        await store.claim(ALICE, "phone", TWO, at(1))
        await store.claim(ALICE, "tablet", ONE, at(1))
        other = Holder(ONE.gateway, "session-3")
        lost = await store.save(
            [
                update("phone", ONE, Cursor(at(8)), release=True),
                update("tablet", ONE, Cursor(at(4), frozenset({at(6)})), release=True),
                update("tablet", other, Cursor(at(9))),
                update("watch", TWO, Cursor(at(9))),
            ]
        )
        assert set(lost) == {Lost(ONE, TWO), Lost(other, None), Lost(TWO, None)}
        assert len(lost) == 3
        assert await store.holders(ALICE) == [TWO]
        assert await store.claim(ALICE, "phone", ONE, at(0)) == Claimed(Cursor(at(1)), False, TWO)
        assert await store.claim(ALICE, "tablet", TWO, at(0)) == Claimed(Cursor(at(4), frozenset({at(6)})), False, None)
        assert (await store.claim(ALICE, "watch", ONE, at(2))).first

    async def test_floor_never_moves_back(self, store: Store) -> None:
        """Of two floors the higher one stays, and what it covers is dropped; the incarnation counts first."""
        await store.claim(ALICE, "phone", ONE, at(5, 2))
        late = Cursor(at(9, 1), frozenset({at(4, 2), at(5, 2), at(7, 2)}), {at(3, 2): 1, at(6, 2): 4})
        assert await store.save([update("phone", ONE, late)]) == []
        expected = Cursor(at(5, 2), frozenset({at(7, 2)}), {at(6, 2): 4})
        assert (await store.claim(ALICE, "phone", ONE, at(0))).cursor == expected

    async def test_broadcast_cursor_of_a_late_floor(self, store: Store) -> None:
        """What a device has of broadcasts is kept as it comes, also beside a floor that would move back."""
        await store.claim(ALICE, "phone", ONE, at(5, 2))
        broadcast = Cursor(at(1, 3), frozenset({at(3, 3)}), {at(2, 3): 4})
        late = Cursor(at(9, 1), frozenset({at(7, 2)}), {}, broadcast)
        assert await store.save([update("phone", ONE, late)]) == []
        expected = Cursor(at(5, 2), frozenset({at(7, 2)}), {}, broadcast)
        assert (await store.claim(ALICE, "phone", ONE, at(0))).cursor == expected

    async def test_release(self, store: Store) -> None:
        """A released device is nobody's; its cursor stays, and the session that ended cannot write any more."""
        await store.claim(ALICE, "phone", ONE, at(1))
        await store.claim(ALICE, "tablet", TWO, at(1))
        await store.claim(BOB, "phone", ONE, at(1))
        assert await store.save([update("phone", ONE, Cursor(at(6)), release=True)]) == []
        assert await store.holders(ALICE) == [TWO]
        assert await store.holders(BOB) == [ONE]
        assert await store.save([update("phone", ONE, Cursor(at(7)))]) == [Lost(ONE, None)]
        assert await store.claim(ALICE, "phone", TWO, at(0)) == Claimed(Cursor(at(6)), False, None)

    # Subscriptions

    async def test_floors(self, store: Store) -> None:
        """What was noted last of each partition is told, whether or not it was noted of others too."""
        assert await store.floors() == {}
        await store.note_floors({0: Position(7, 10), 63: Position(8, 2**40)})
        await store.note_floors({0: Position(7, 11), 1: Position(9, 1)})
        expected = {0: Position(7, 11), 1: Position(9, 1), 63: Position(8, 2**40)}
        assert await store.floors() == expected
        await store.note_floors({1: Position(10, 0), -1: Position(11, 5)})
        assert await store.floors() == expected | {1: Position(10, 0), -1: Position(11, 5)}

    async def test_subscribe(self, store: Store) -> None:
        """A user's subscriptions are listed in order, once each, and its topics list the user."""
        await store.subscribe(ALICE, ["post.42", "a.>", "post.42.>"], MOST, ZERO)
        await store.subscribe(ALICE, ["post.42", "ü", "post"], MOST, ZERO)
        await store.subscribe(BOB, ["post.42"], MOST, ZERO)
        expected = ["a.>", "post", "post.42", "post.42.>", "ü"]
        assert await topics(store, ALICE) == expected
        assert await topics(store, ALICE, None, 2) == expected[:2]
        assert await topics(store, ALICE, "post", 2) == expected[2:4]
        assert await topics(store, ALICE, "ü", 2) == []
        assert await followers(store, "post.42") == {ALICE, BOB}
        assert await followers(store, "post.42.>") == {ALICE}
        assert await followers(store, "post.>") == set()

    async def test_unsubscribe(self, store: Store) -> None:
        """What is ended is gone on both sides, what never was is no error, and it may begin again."""
        await store.subscribe(ALICE, ["one", "two"], MOST, ZERO)
        await store.subscribe(BOB, ["one"], MOST, ZERO)
        await store.unsubscribe(ALICE, ["one", "three"], ZERO)
        await store.unsubscribe(BOB, ["two"], ZERO)
        assert await topics(store, ALICE) == ["two"]
        assert await followers(store, "one") == {BOB}
        assert await followers(store, "two") == {ALICE}
        await store.subscribe(ALICE, ["one"], MOST, ZERO)
        assert await topics(store, ALICE) == ["one", "two"]
        assert await followers(store, "one") == {ALICE, BOB}

    async def test_most_subscriptions(self, store: Store) -> None:
        """A user has at most so many; what is there already needs no room, and a refusal changes nothing."""
        await store.subscribe(ALICE, ["a", "b"], 3, ZERO)
        with pytest.raises(TooManySubscriptions, match="more than 3"):
            await store.subscribe(ALICE, ["c", "d"], 3, ZERO)
        assert await topics(store, ALICE) == ["a", "b"]
        assert await followers(store, "c") == set()
        await store.subscribe(ALICE, ["a", "c"], 3, ZERO)
        await store.subscribe(ALICE, ["a", "b", "c"], 2, ZERO)
        await store.unsubscribe(ALICE, ["a"], ZERO)
        await store.subscribe(ALICE, ["d"], 3, ZERO)
        assert await topics(store, ALICE) == ["b", "c", "d"]

    async def test_many_subscribers(self, store: Store) -> None:
        """Page after page each is there, in pages of at most what was asked for."""
        users = {f"user {number}" for number in range(250)}
        await asyncio.gather(*(store.subscribe(user, ["crowd"], MOST, ZERO) for user in users))
        assert await followers(store, "crowd", 50) == users
        assert await followers(store, "crowd", 1000) == users
        await asyncio.gather(*(store.unsubscribe(user, ["crowd"], ZERO) for user in users))
        assert await followers(store, "crowd") == set()

    async def test_many_subscriptions(self, store: Store) -> None:
        """Thousands of topics of one user, page after page."""
        wanted = [f"topic.{number:05}" for number in range(2500)]
        for first in range(0, len(wanted), 500):
            await store.subscribe(ALICE, wanted[first : first + 500], MOST, ZERO)
        found: list[str] = []
        while page := await topics(store, ALICE, found[-1] if found else None, 400):
            found += page
        assert found == wanted

    async def test_a_subscription_keeps_its_beginning(self, store: Store) -> None:
        """It begins where it did first; one that ended begins anew."""
        await store.subscribe(ALICE, ["b", "c"], MOST, at(5))
        await store.subscribe(ALICE, ["a", "b"], MOST, at(7))
        await store.subscribe(BOB, ["b"], MOST, at(9))
        await store.unsubscribe(ALICE, ["c"], at(8))
        await store.subscribe(ALICE, ["c", "a"], MOST, at(3, 1_800_000_000_000))
        found = [Subscription("a", at(7)), Subscription("b", at(5)), Subscription("c", at(3, 1_800_000_000_000))]
        assert await store.subscriptions(ALICE, None, 99) == found
        assert await store.subscriptions(ALICE, "a", 1) == found[1:2]
        assert await store.subscriptions(BOB, None, 99) == [Subscription("b", at(9))]

    async def test_many_beginnings(self, store: Store) -> None:
        """Each of a thousand and more subscriptions has its own, on every page."""
        wanted = [Subscription(f"topic.{number:05}", at(number // 300)) for number in range(1200)]
        for first in range(0, 1200, 300):
            some = [subscription.topic for subscription in wanted[first : first + 300]]
            await store.subscribe(ALICE, some, MOST, wanted[first].since)
        found: list[Subscription] = []
        while page := await store.subscriptions(ALICE, found[-1].topic if found else None, 350):
            found += page
        assert found == wanted

    async def test_what_ended_is_kept(self, store: Store) -> None:
        """Each round of following and ending is one entry, in order; ending what is not followed adds none."""
        for turn in range(4):
            await store.subscribe(ALICE, ["b", "a.>"], MOST, at(10 * turn))
            await store.unsubscribe(ALICE, ["a.>", "b", "c"], at(10 * turn + 5))
            await store.unsubscribe(ALICE, ["a.>", "b", "c"], at(10 * turn + 7))
        await store.subscribe(ALICE, ["b"], MOST, at(50))
        await store.subscribe(BOB, ["b"], MOST, at(1))
        await store.unsubscribe(BOB, ["b"], at(1, 1_800_000_000_000))
        wanted = [
            EndedSubscription(topic, at(10 * turn), at(10 * turn + 5)) for topic in ("a.>", "b") for turn in range(4)
        ]
        for limit in (1, 3, 4, 8, 9):
            assert await ended(store, ALICE, limit) == wanted
        assert await ended(store, BOB) == [EndedSubscription("b", at(1), at(1, 1_800_000_000_000))]
        assert await store.subscriptions(ALICE, None, 99) == [Subscription("b", at(50))]

    async def test_nothing_is_kept_of_no_time(self, store: Store) -> None:
        """Where nothing can have come between beginning and end, nothing is kept."""
        await store.subscribe(ALICE, ["a", "b", "c"], MOST, at(5))
        await store.unsubscribe(ALICE, ["a"], at(5))
        await store.unsubscribe(ALICE, ["b"], at(9, 1))
        await store.unsubscribe(ALICE, ["c"], at(6))
        assert await ended(store, ALICE) == [EndedSubscription("c", at(5), at(6))]
        assert await topics(store, ALICE) == []

    async def test_ended_to_the_same_beginning(self, store: Store) -> None:
        """Who begins again where a subscription began has one entry, up to the later end."""
        for until in (6, 9):
            await store.subscribe(ALICE, ["a"], MOST, at(5))
            await store.unsubscribe(ALICE, ["a"], at(until))
        assert await ended(store, ALICE) == [EndedSubscription("a", at(5), at(9))]

    async def test_subscribing_at_once(self, store: Store) -> None:
        """Whatever two devices do at once, the two sides agree in the end."""
        for turn in range(10):
            await asyncio.gather(
                store.subscribe(ALICE, ["a", "b"], MOST, at(1)),
                store.unsubscribe(ALICE, ["b", "a"], at(2)),
                store.subscribe(ALICE, ["b"], MOST, at(1)),
            )
            own = set(await topics(store, ALICE))
            assert await store.subscriptions(ALICE, None, 99) == [Subscription(topic, at(1)) for topic in sorted(own)]
            assert set(await ended(store, ALICE)) <= {EndedSubscription(topic, at(1), at(2)) for topic in "ab"}
            assert {topic for topic in ("a", "b") if ALICE in await followers(store, topic)} == own, turn

    async def test_subscriptions_are_exported_and_erased(self, store: Store) -> None:
        """They belong to what is kept of a user."""
        await store.subscribe(ALICE, ["a", "b.>", "c"], MOST, at(1))
        await store.subscribe(BOB, ["a", "c"], MOST, at(2))
        for user in (ALICE, BOB):
            await store.unsubscribe(user, ["c"], at(3))
        assert await exported(store, ALICE) == [
            {"kind": "subscription", "topic": "a", "since": str(at(1))},
            {"kind": "subscription", "topic": "b.>", "since": str(at(1))},
            {"kind": "ended_subscription", "topic": "c", "since": str(at(1)), "until": str(at(3))},
        ]
        await store.erase(ALICE, at(0))
        assert await exported(store, ALICE) == []
        assert await topics(store, ALICE) == []
        assert await ended(store, ALICE) == []
        assert await store.subscriptions(BOB, None, 99) == [Subscription("a", at(2))]
        assert await ended(store, BOB) == [EndedSubscription("c", at(2), at(3))]
        assert await followers(store, "a") == {BOB}
        assert await followers(store, "b.>") == set()
        await store.subscribe(ALICE, ["a"], MOST, at(7))
        assert await store.subscriptions(ALICE, None, 99) == [Subscription("a", at(7))]

    # Broadcasts

    async def test_broadcasts(self, store: Store) -> None:
        """Each is there once with all that it is, whatever its topic; its references and its body are there as well."""
        rows = [broadcast("post.42.likes", at(1)), broadcast("ü", at(2)), broadcast("post.42", at(3))]
        await store.append_broadcasts([rows[2], rows[0], rows[1]])
        assert await store.broadcasts(ZERO, NEWEST, 99) == rows
        assert await store.broadcasts_to("post.>", ZERO, NEWEST, 99) == [reference(rows[0]), reference(rows[2])]
        assert await store.broadcasts_to("ü", ZERO, NEWEST, 99) == [reference(rows[1])]
        wanted = {row.position: row.body for row in rows}
        assert await store.broadcast_bodies([at(3), at(9), at(1), at(3), at(2), at(1, 1)]) == wanted
        assert await store.broadcast_bodies([]) == {}

    async def test_broadcasts_of_a_pattern(self, store: Store) -> None:
        """A topic is under its own name and under each subtree that it lies in, and nowhere else."""
        rows = [broadcast(topic, at(number)) for number, topic in enumerate(("a", "a.b", "a.b.c", "b", "a.bb", "A"), 1)]
        await store.append_broadcasts(rows)
        for pattern, wanted in (
            ("a", [1]),
            ("a.>", [2, 3, 5]),
            ("a.b", [2]),
            ("a.b.>", [3]),
            ("a.b.c", [3]),
            ("a.b.c.>", []),
            ("b", [4]),
            ("b.>", []),
            ("A", [6]),
            (">", []),
        ):
            found = await store.broadcasts_to(pattern, ZERO, NEWEST, 99)
            assert found == [reference(rows[number - 1]) for number in wanted], pattern

    async def test_broadcasts_again(self, store: Store) -> None:
        """What is there already stays as it is, once; what is new beside it is stored."""
        rows = [broadcast("a.b", at(number)) for number in range(1, 5)]
        await store.append_broadcasts([])
        await store.append_broadcasts(rows[:2])
        await store.append_broadcasts(rows[:3])
        await store.append_broadcasts([rows[3], rows[3], rows[0]])
        assert await broadcasts(store) == rows
        assert await broadcasts_to(store, "a.>") == await broadcasts_to(store, "a.b") == list(map(reference, rows))

    async def test_broadcasts_at_once(self, store: Store) -> None:
        """Whoever stores the same at the same time, each is there once."""
        rows = [broadcast("a.b", at(number)) for number in range(1, 31)]
        await asyncio.gather(*(store.append_broadcasts(rows[first : first + 10]) for first in range(0, 25, 5)))
        assert await broadcasts(store) == rows
        assert await broadcasts_to(store, "a.>") == list(map(reference, rows))

    async def test_pages_of_broadcasts(self, store: Store) -> None:
        """Of one incarnation and of the next, of near and far positions: in order, `after` exclusive, `upto` not."""
        places = [at(number, 7) for number in (1, 2, 998, 999, 1000, 1001, 5000, 2**40)]
        places += [at(number, 9) for number in (1, 3, 999, 2000)] + [at(1, 12), NEWEST]
        rows = [broadcast("a.b" if place.sequence % 2 else "a.c", place) for place in places]
        await store.append_broadcasts(rows[::-1])
        odd = [reference(row) for row in rows if row.topic == "a.b"]
        for limit in (1, 2, 3, 5, len(rows), 99):
            assert await broadcasts(store, limit=limit) == rows
            assert await broadcasts_to(store, "a.>", limit=limit) == list(map(reference, rows))
            assert await broadcasts_to(store, "a.b", limit=limit) == odd
        edges = [ZERO, at(0, 7), *places, at(4, 7), at(2**50, 7), at(5, 8), at(2, 9), at(3000, 9), at(0, 12), at(0, 13)]
        for after in edges:
            for upto in edges[::3]:
                wanted = [row for row in rows if after < row.position <= upto]
                assert await store.broadcasts(after, upto, 99) == wanted, (after, upto)
                assert await store.broadcasts_to("a.>", after, upto, 99) == list(map(reference, wanted)), (after, upto)
                assert await store.broadcasts(after, upto, 2) == wanted[:2], (after, upto)
                assert await store.broadcasts_to("a.>", after, upto, 2) == list(map(reference, wanted[:2]))
        assert await store.broadcast_bodies(places) == {row.position: row.body for row in rows}

    async def test_broadcasts_of_weeks(self, store: Store) -> None:
        """Positions give the order, also where the clock of who stored them went back, over any time."""
        days = (60, 45, 59, 30, 11, 21, 1, 9, 0)
        rows = [broadcast("a.b", at(number), NOW_NS - day * 86_400 * 10**9) for number, day in enumerate(days, 1)]
        await store.append_broadcasts(rows)
        for limit in (1, 2, 4, 99):
            assert await broadcasts(store, limit=limit) == rows
            assert await broadcasts_to(store, "a.>", limit=limit) == list(map(reference, rows))

    async def test_many_broadcasts(self, store: Store) -> None:
        """Thousands, of one topic among others."""
        rows = [broadcast(f"post.{number % 3}", at(number)) for number in range(1, 2501)]
        await store.append_broadcasts(rows)
        assert await broadcasts(store, limit=700) == rows
        ones = [reference(row) for row in rows[500:] if row.topic == "post.1"]
        assert await broadcasts_to(store, "post.1", at(500), 300) == ones
        assert len(await store.broadcast_bodies([row.position for row in rows[:150]])) == 150

    async def test_broadcasts_that_can_never_be_stored(self, store: Store) -> None:
        """They are named with the reason; all others, before and after them, are stored."""
        right = [broadcast("a.b", at(number)) for number in (1, 3, 5)]
        wrong = [
            broadcast("a.b", at(2))._replace(type="\ud800"),
            broadcast("a.b", at(4))._replace(topic="a.\udfff"),
            broadcast("a.b", at(6))._replace(stored_ns=2**70),
        ]
        with pytest.raises(RowsRefused) as caught:
            await store.append_broadcasts([right[0], wrong[0], right[1], wrong[1], right[2], wrong[2]])
        assert set(caught.value.reasons) == {1, 3, 5}
        assert all(caught.value.reasons.values())
        assert await broadcasts(store) == right
        assert await broadcasts_to(store, "a.>") == list(map(reference, right))
        with pytest.raises(RowsRefused):
            await store.append_broadcasts([wrong[0]])
        await store.append_broadcasts([broadcast("a.b", at(2))])
        assert [row.position for row in await broadcasts_to(store, "a.b")] == [at(1), at(2), at(3), at(5)]

    async def test_synced(self, store: Store) -> None:
        """What was noted last, never less; of each user alone, and of nobody after erasing."""
        assert await store.synced(ALICE) == ZERO
        for upto, wanted in ((at(5), at(5)), (at(4), at(5)), (at(6), at(6)), (at(9, 1), at(6)), (NEWEST, NEWEST)):
            await store.note_synced(ALICE, upto)
            assert await store.synced(ALICE) == wanted
        await store.note_synced(BOB, at(1))
        assert await store.synced(BOB) == at(1)
        await store.erase(ALICE, at(1))
        assert await store.synced(ALICE) == ZERO
        assert await store.synced(BOB) == at(1)
        await store.note_synced(ALICE, at(2))
        assert await store.synced(ALICE) == at(2)

    async def test_broadcasts_are_nobodys(self, store: Store) -> None:
        """Erasing a user, and expiring what is older, leaves them; the user's inbox knows nothing of them."""
        rows = [broadcast("a.b", at(1)), broadcast("a.b", at(2))]
        await store.append_broadcasts(rows)
        await store.subscribe(ALICE, ["a.>"], MOST, ZERO)
        await store.erase(ALICE, NEWEST)
        assert await store.expire(NOW_NS) == 0
        assert await broadcasts(store) == rows
        assert await broadcasts_to(store, "a.>") == list(map(reference, rows))
        assert await everything(store, ALICE) == []
        assert await exported(store, ALICE) == []

    # The life of a store

    async def test_many_at_once(self, store: Store) -> None:
        """Hundreds of writers and readers at the same time: everything is stored, nobody is mixed up."""
        users = [f"user-{number}" for number in range(100)]
        await asyncio.gather(
            *(store.append(rows(user, 1, 2)) for user in users),
            *(store.mark(user, [at(1)], "read") for user in users),
            *(store.unread(user) for user in users),
        )
        found = await asyncio.gather(*(marks(store, user) for user in users))
        assert found == [{1: "sr", 2: ""}] * len(users)

    async def test_cancelled_callers(self, store: Store) -> None:
        """Callers that give up, one way or another, take nobody else along."""
        writers = [asyncio.create_task(store.append(rows(ALICE, number))) for number in range(20)]
        readers = [asyncio.create_task(store.unread(ALICE)) for _ in range(20)]
        # Behind the first step of every task, that is: while all of them wait.
        asyncio.get_running_loop().call_soon(lambda: [task.cancel() for task in (*writers[::2], *readers[::2])])
        async with asyncio.timeout(PATIENCE_S):
            results = await asyncio.gather(*writers, *readers, return_exceptions=True)
        for result in results:
            assert result is None or type(result) in (int, asyncio.CancelledError)
        stored = set(await marks(store, ALICE))
        assert {number for number, task in enumerate(writers) if not task.cancelled()} <= stored
        assert set(range(1, 20, 2)) <= stored
        await store.check()

    async def test_check(self, store: Store) -> None:
        """A store that works says so, any number of times."""
        await asyncio.gather(*(store.check() for _ in range(5)))

    async def test_closed(self, store: Store) -> None:
        """Closing twice is fine; after it every method says that the store is not available."""
        await store.append(rows(ALICE, 1))
        await store.unread(ALICE)
        await asyncio.gather(store.close(), store.close())
        await store.close()
        calls: list[Awaitable[object]] = [
            store.check(),
            store.append(rows(ALICE, 2)),
            store.page(ALICE, PageQuery(1)),
            store.between(ALICE, at(0), at(1), 1),
            store.missed(ALICE, at(0), at(1)),
            store.unread(ALICE),
            store.mark(ALICE, [at(1)], "read"),
            store.mark_all(ALICE, at(1), "read"),
            store.claim(ALICE, "phone", ONE, at(1)),
            store.save([update("phone", ONE, Cursor(at(1)))]),
            store.holders(ALICE),
            store.expire(1),
            store.delivered([delivered(ALICE, at(1), 1)]),
            store.subscribe(ALICE, ["a"], MOST, ZERO),
            store.unsubscribe(ALICE, ["a"], ZERO),
            store.subscriptions(ALICE, None, 1),
            store.ended_subscriptions(ALICE, None, 1),
            store.append_broadcasts([broadcast("a", at(1))]),
            store.broadcasts(at(0), at(1), 1),
            store.broadcasts_to("a", at(0), at(1), 1),
            store.broadcast_bodies([at(1)]),
            store.synced(ALICE),
            store.note_synced(ALICE, at(1)),
            store.subscribers("a", None, 1),
            store.erase(ALICE, at(1)),
            exported(store, ALICE),
        ]
        async with asyncio.timeout(PATIENCE_S):
            outcomes = await asyncio.gather(*calls, return_exceptions=True)
        assert [type(outcome) for outcome in outcomes] == [StoreUnavailable] * len(calls)

    async def test_close_finishes_what_it_accepted(self, store: Store) -> None:
        """Every call made before `close` gets its answer."""
        tasks = [asyncio.create_task(store.append(rows(ALICE, number))) for number in range(1, 50)]
        tasks += [asyncio.create_task(store.mark(ALICE, [at(1)], "read"))]
        reading = [asyncio.create_task(store.missed(ALICE, at(0), NEWEST)) for _ in range(9)]
        closing = asyncio.create_task(store.close())
        async with asyncio.timeout(PATIENCE_S):
            assert await asyncio.gather(*tasks, closing) == [None] * (len(tasks) + 1)
            assert all(0 <= count < 50 for count in await asyncio.gather(*reading))

    async def test_any_order(self, store: Store) -> None:
        """Operations in any order are answered as a few dictionaries would answer them."""
        loop = asyncio.get_running_loop()

        def ask(call: Coroutine[Any, Any, Any]) -> Any:
            return asyncio.run_coroutine_threadsafe(call, loop).result(PATIENCE_S)

        limits = settings(
            deadline=None,
            max_examples=self.examples,
            stateful_step_count=self.steps,
            suppress_health_check=[HealthCheck.too_slow],
        )

        class Machine(AnyOrder):
            def __init__(self) -> None:
                super().__init__(store, ask)

        await asyncio.to_thread(run_state_machine_as_test, Machine, settings=limits)


# The model


@dataclass(slots=True)
class Row:
    """A place of the model: marks and deliveries are known of it whether a notification is there or not."""

    stored: bool = False
    seen: bool = False
    read: bool = False
    archived: bool = False
    delivered: int | None = None

    def mark(self, as_: MarkAs) -> None:
        if as_ == "unread":
            self.read = self.archived
            return
        self.seen = True
        self.read = self.read or as_ != "seen"
        self.archived = self.archived or as_ == "archived"

    def is_on(self, filter: Filter) -> bool:
        return {"all": not self.archived, "unread": not self.read, "archived": self.archived}[filter]


# More meets at one user than at two.
USERS: Final = st.sampled_from(["alice", "alice", "alice", "bob"])
DEVICES: Final = st.sampled_from(["phone", "tablet"])
HOLDERS: Final = st.builds(Holder, st.sampled_from(["gateway-1", "gateway-2"]), st.sampled_from(["s1", "s2"]))
PLACES: Final = [Position(incarnation, sequence) for incarnation in (1, 2) for sequence in range(1, 5)]
POSITIONS: Final = st.sampled_from(PLACES)
FLOORS: Final = st.builds(Position, st.integers(1, 2), st.integers(0, 4))


@st.composite
def cursors(draw: st.DrawFn, *, own: bool = True) -> Cursor:
    """A cursor as a session keeps it: what is acked and attempted lies above the floor, and nothing is both."""
    floor = draw(FLOORS)
    above = draw(st.dictionaries(POSITIONS, st.integers(0, 9), max_size=5))
    return Cursor(
        floor,
        frozenset(position for position, attempts in above.items() if position > floor and not attempts),
        {position: attempts for position, attempts in above.items() if position > floor and attempts},
        draw(st.none() | cursors(own=False)) if own else None,
    )


class AnyOrder(RuleBasedStateMachine):
    """A store beside dictionaries. `ask` runs a call of the store; every run has users of its own."""

    runs = count()

    def __init__(self, store: Store, ask: Ask) -> None:
        super().__init__()
        self.store = store
        self.ask = ask
        self.run = next(self.runs)
        self.rows = {user: {place: Row() for place in PLACES} for user in ("alice", "bob")}
        self.erased: defaultdict[str, Position] = defaultdict(lambda: Position(0, 0))
        self.all_upto: defaultdict[str, Position] = defaultdict(lambda: Position(0, 0))
        self.cursors: dict[tuple[str, str], Cursor] = {}
        self.held: dict[tuple[str, str], Holder | None] = {}

    def name(self, user: str) -> str:
        return f"{user}-{self.run}"

    def visible(self, user: str) -> list[InboxItem]:
        """Oldest first."""
        return [
            InboxItem(
                place,
                kept.seen,
                kept.read,
                kept.archived,
                NOW_NS,
                row(self.name(user), place).body,
                None if kept.delivered is None else first(kept.delivered),
            )
            for place, kept in self.rows[user].items()
            if kept.stored
        ]

    @rule(user=USERS, positions=st.lists(POSITIONS, min_size=1, max_size=8))
    def append(self, user: str, positions: list[Position]) -> None:
        self.ask(self.store.append([row(self.name(user), position) for position in positions]))
        for position in positions:
            self.rows[user][position].stored |= position > self.erased[user]

    @rule(user=USERS, positions=st.lists(POSITIONS, min_size=1, max_size=8), as_=st.sampled_from(MARKS))
    def mark(self, user: str, positions: list[Position], as_: MarkAs) -> None:
        self.ask(self.store.mark(self.name(user), positions, as_))
        for position in positions:
            self.rows[user][position].mark(as_)

    @rule(user=USERS, upto=FLOORS, as_=st.sampled_from(MARKS_OF_ALL))
    def mark_all(self, user: str, upto: Position, as_: MarkAllAs) -> None:
        self.ask(self.store.mark_all(self.name(user), upto, as_))
        self.all_upto[user] = max(upto, self.all_upto[user])
        for position, kept in self.rows[user].items():
            if position <= upto:
                kept.mark(as_)

    @rule(drawn=st.lists(st.tuples(USERS, POSITIONS, st.integers(0, 9)), max_size=4))
    def delivered(self, drawn: list[tuple[str, Position, int]]) -> None:
        self.ask(self.store.delivered([delivered(self.name(user), at, number) for user, at, number in drawn]))
        for user, position, number in drawn:
            kept = self.rows[user][position]
            kept.delivered = number if kept.delivered is None else min(kept.delivered, number)

    @rule(upto=FLOORS)
    def erase(self, upto: Position) -> None:
        """One of the users only, or nothing would be left to look at; never below what was marked with all."""
        user = "bob"
        upto = max(upto, self.all_upto[user])
        wanted = sum(kept.stored for position, kept in self.rows[user].items() if position <= upto)
        assert self.ask(self.store.erase(self.name(user), upto)) == wanted
        self.erased[user] = max(upto, self.erased[user])
        self.rows[user] |= {position: Row() for position in PLACES if position <= upto}
        self.all_upto[user] = Position(0, 0)
        for key in [key for key in self.cursors if key[0] == user]:
            del self.cursors[key]
            self.held.pop(key, None)

    @rule(
        user=USERS,
        edge=st.none() | FLOORS,
        newest_first=st.booleans(),
        limit=st.integers(1, 5),
        filter=st.sampled_from(FILTERS),
        type_=st.none() | st.sampled_from(TYPES),
        topic=st.none() | st.sampled_from(TOPICS),
    )
    def page(
        self,
        user: str,
        edge: Position | None,
        newest_first: bool,
        limit: int,
        filter: Filter,
        type_: str | None,
        topic: str | None,
    ) -> None:
        if not newest_first:
            edge = edge or Position(0, 0)
        wanted = []
        for item in self.visible(user):
            stored = row(user, item.position)
            inside = edge is None or (item.position < edge if newest_first else item.position > edge)
            fits = type_ in (None, stored.type) and topic in (None, stored.topic)
            if inside and fits and self.rows[user][item.position].is_on(filter):
                wanted.append(item)
        if newest_first:
            wanted.reverse()
        following = wanted[limit - 1].position if len(wanted) > limit else None
        edges = (edge, None) if newest_first else (None, edge)
        answer = self.ask(self.store.page(self.name(user), PageQuery(limit, *edges, filter, type_, topic)))
        assert (list(answer.items), answer.next) == (wanted[:limit], following)

    @rule(user=USERS, after=FLOORS, upto=FLOORS, limit=st.integers(1, 5))
    def between(self, user: str, after: Position, upto: Position, limit: int) -> None:
        wanted = [item for item in self.visible(user) if after < item.position <= upto]
        assert self.ask(self.store.between(self.name(user), after, upto, limit)) == wanted[:limit]
        assert self.ask(self.store.missed(self.name(user), after, upto)) == len(wanted)

    @rule(user=USERS)
    def unread(self, user: str) -> None:
        wanted = [item for item in self.visible(user) if not item.read and not item.archived]
        assert self.ask(self.store.unread(self.name(user))) == len(wanted)

    @rule(user=USERS, device=DEVICES, holder=HOLDERS, floor=FLOORS)
    def claim(self, user: str, device: str, holder: Holder, floor: Position) -> None:
        key = user, device
        wanted = Claimed(self.cursors.setdefault(key, Cursor(floor)), key not in self.held, self.held.get(key))
        assert self.ask(self.store.claim(self.name(user), device, holder, floor)) == wanted
        self.held[key] = holder

    @rule(
        drawn=st.lists(
            st.tuples(USERS, DEVICES, st.none() | HOLDERS, cursors(), st.booleans()),
            max_size=5,
        )
    )
    def save(self, drawn: list[tuple[str, str, Holder | None, Cursor, bool]]) -> None:
        """Where no holder is drawn it is the one that has the device."""
        named: dict[tuple[str, str, Holder], tuple[Cursor, bool]] = {}
        for user, device, drawn_holder, cursor, release in drawn:
            named[user, device, drawn_holder or self.held.get((user, device)) or ONE] = cursor, release
        updates = [(*key, *value) for key, value in named.items()]
        lost: list[tuple[tuple[str, str], Holder]] = []
        for user, device, holder, cursor, release in updates:
            key = user, device
            if self.held.get(key) != holder:
                lost.append((key, holder))
                continue
            floor = max(self.cursors[key].floor, cursor.floor)
            acked = frozenset(position for position in cursor.acked if position > floor)
            attempts = {position: times for position, times in cursor.attempts.items() if position > floor}
            self.cursors[key] = Cursor(floor, acked, attempts, cursor.broadcast)
            self.held[key] = None if release else holder
        batch = [CursorUpdate(self.name(entry[0]), *entry[1:]) for entry in updates]
        wanted = [Lost(holder, self.held.get(key)) for key, holder in lost]
        assert sorted(self.ask(self.store.save(batch)), key=str) == sorted(wanted, key=str)

    @rule(user=USERS)
    def holders(self, user: str) -> None:
        wanted = [holder for (owner, _), holder in self.held.items() if owner == user and holder is not None]
        assert sorted(self.ask(self.store.holders(self.name(user)))) == sorted(wanted)

    def teardown(self) -> None:
        """At the end everything is looked at once more, the cursors by claiming them."""
        for user in ("alice", "bob"):
            self.between(user, Position(0, 0), NEWEST, 100)
            self.unread(user)
            self.holders(user)
            for filter in FILTERS:
                for newest_first in (True, False):
                    self.page(user, None, newest_first, 100, filter, None, None)
        for user, device in list(self.cursors):
            self.claim(user, device, ONE, Position(0, 0))
