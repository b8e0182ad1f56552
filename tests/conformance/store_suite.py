"""What every store promises: a suite that knows the port and no adapter.

An adapter's test module inherits `StoreConformance` and gives it the fixture `store`: open, empty, closed afterwards.
"""

from __future__ import annotations

import asyncio
import time
from collections import defaultdict
from collections.abc import Awaitable, Callable, Coroutine
from dataclasses import dataclass
from itertools import count
from typing import Any, Final

import pytest
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, rule, run_state_machine_as_test

from support.clock import PATIENCE_S
from tidings.store.port import UNREAD_CAP, Cursor, CursorUpdate, Holder, InboxItem, InboxPage, InboxRow, Store
from tidings.wire.errors import StoreUnavailable
from tidings.wire.frames import FILTERS, MARKS, Filter, MarkAs
from tidings.wire.position import Position

ALICE: Final = "alice@example.org"
BOB: Final = "bob"
ONE, TWO = Holder("gateway-1", "session-1"), Holder("gateway-2", "session-2")
NOW_NS: Final = time.time_ns()
NEWEST: Final = Position(2**48 - 1, 2**63 - 1)
"""The highest position there can be."""

Ask = Callable[[Coroutine[Any, Any, Any]], Any]


def at(sequence: int, incarnation: int = 1_700_000_000_000) -> Position:
    return Position(incarnation, sequence)


def row(user: str, position: Position, body: bytes | None = None, stored_ns: int = NOW_NS) -> InboxRow:
    text = f"{user} {position}"
    return InboxRow(user, position, f"id-{text}", "org.example.test", None, stored_ns, body or text.encode())


def rows(user: str, *sequences: int, stored_ns: int = NOW_NS) -> list[InboxRow]:
    return [row(user, at(sequence), stored_ns=stored_ns) for sequence in sequences]


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
    return await store.page(user, before=None, limit=limit, filter=filter)


def update(device: str, holder: Holder, cursor: Cursor, *, release: bool = False) -> CursorUpdate:
    return CursorUpdate(ALICE, device, holder, cursor, release)


class StoreConformance:
    """The promises of `Store`, a test each."""

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
        assert page.items[0] == InboxItem(at(3), False, False, False, body)
        assert page.next is None

    async def test_append_nothing(self, store: Store) -> None:
        """No rows, no positions and no cursors are no errors."""
        await store.append([])
        await store.mark(ALICE, [], "read")
        await store.mark_all(ALICE, NEWEST, "read")
        assert await store.save([]) == []
        assert await first_page(store, ALICE) == InboxPage([], None)
        assert await store.holders(ALICE) == []

    async def test_append_again(self, store: Store) -> None:
        """A row that is there stays as it is, with its marks; the new ones beside it are stored."""
        await store.append(rows(ALICE, 1))
        await store.mark(ALICE, [at(1)], "read")
        await store.append([row(ALICE, at(1), b"another"), row(ALICE, at(2), b"two"), row(ALICE, at(2), b"twice")])
        await store.mark(ALICE, [at(2), at(2)], "unread")
        found = [(item.body, letters(item)) for item in await everything(store, ALICE)]
        assert found == [(rows(ALICE, 1)[0].body, "sr"), (b"two", "")]

    async def test_pages_meet(self, store: Store) -> None:
        """Following `next` shows every row once; it is None exactly at the end."""
        await store.append(rows(ALICE, *range(1, 8)))
        for limit, expected in ((3, [[7, 6, 5], [4, 3, 2], [1]]), (7, [[7, 6, 5, 4, 3, 2, 1]])):
            before: Position | None = None
            pages: list[list[int]] = []
            while not pages or before is not None:
                page = await store.page(ALICE, before=before, limit=limit, filter="all")
                pages.append(sequences(page))
                before = page.next
            assert pages == expected

    async def test_page_before(self, store: Store) -> None:
        """`before` is exclusive, and need not be a row's position."""
        await store.append(rows(ALICE, 2, 4, 6))
        for before, expected in ((2, []), (4, [2]), (5, [4, 2]), (99, [6, 4, 2])):
            assert sequences(await store.page(ALICE, before=at(before), limit=9, filter="all")) == expected

    async def test_incarnation_comes_first(self, store: Store) -> None:
        """A recreated stream begins at 1 again: its rows are newer than all of the old one."""
        await store.append([row(ALICE, at(9, 1)), row(ALICE, at(1, 2)), row(ALICE, at(5, 1))])
        assert [item.position for item in (await first_page(store, ALICE)).items] == [at(1, 2), at(9, 1), at(5, 1)]
        assert [item.position for item in await store.between(ALICE, at(5, 1), at(1, 2), 9)] == [at(9, 1), at(1, 2)]
        assert await store.missed(ALICE, at(9, 1), at(0, 2)) == 0
        page = await store.page(ALICE, before=at(1, 2), limit=1, filter="all")
        assert page.next == at(9, 1)
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
        last = await store.page(ALICE, before=page.next, limit=9, filter=filter)
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
        """`missed` counts on where a page and the badge have long stopped."""
        await store.append(rows(ALICE, *range(1, 1501)))
        assert await store.missed(ALICE, at(1), NEWEST) == 1499

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
            ("archived", "sa"),
            ("seen unread", "s"),
            ("read unread", "s"),
            ("read seen", "sr"),
            ("archived unread", "sa"),
            ("archived seen", "sa"),
            ("archived read", "sra"),
            ("read archived", "sra"),
            ("read archived unread", "sa"),
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
            ("seen", ["s", "sr", "sa", "sra", ""]),
            ("read", ["sr", "sr", "sa", "sra", ""]),
            ("unread", ["", "s", "sa", "sra", ""]),
            ("archived", ["sa", "sra", "sa", "sra", ""]),
        ],
    )
    async def test_mark_all(self, store: Store, as_: MarkAs, expected: list[str]) -> None:
        """Up to and with `upto`; what is archived, what is above and other users stay; what comes later is unmarked."""
        await store.append(rows(ALICE, 1, 2, 3, 4, 5) + rows(BOB, 1))
        await store.mark(ALICE, [at(2), at(4)], "read")
        await store.mark(ALICE, [at(3), at(4)], "archived")
        await store.mark(ALICE, [at(6)], "seen")
        await store.mark_all(ALICE, at(4), as_)
        assert list((await marks(store, ALICE)).values()) == expected
        assert await marks(store, BOB) == {1: ""}
        await store.append(rows(ALICE, 6))
        assert (await marks(store, ALICE))[6] == "s"

    @pytest.mark.parametrize("as_", ["read", "archived"])
    async def test_mark_all_leaves_marks_that_wait(self, store: Store, as_: MarkAs) -> None:
        """What is not stored yet is not among all, also where it is below `upto`."""
        await store.append(rows(ALICE, 1, 3))
        await store.mark(ALICE, [at(2)], "seen")
        await store.mark_all(ALICE, at(3), as_)
        await store.append(rows(ALICE, 2))
        assert (await marks(store, ALICE))[2] == "s"

    async def test_names_are_exact(self, store: Store) -> None:
        """Ids that differ only in case, blanks or accents, or hold quotes and wildcards, are different users."""
        names = ["a", "A", " a", "a ", "a%", "a_", "'a'--", '"a"', "ä", "a\u0308", "😀", "a\n", "a\0b", "a" * 200]
        await store.append([row(name, at(number)) for number, name in enumerate(names, 1)])
        for number, name in enumerate(names, 1):
            assert [item.body for item in await everything(store, name)] == [row(name, at(number)).body]
            assert (await store.claim(ALICE, name, ONE, at(number))).first

    async def test_expire(self, store: Store) -> None:
        """Rows stored before that time go, marked or not, of all users; the rest stays; a second time finds none."""
        await store.append(rows(ALICE, 1, 2, stored_ns=1000) + rows(BOB, 1, stored_ns=1999))
        await store.append(rows(ALICE, 3, stored_ns=2000))
        await store.mark(ALICE, [at(1)], "archived")
        assert await store.expire(2000) == 3
        assert await marks(store, ALICE) == {3: ""}
        assert await store.unread(BOB) == 0
        assert await store.expire(2000) == 0

    async def test_expired_marks_that_waited(self, store: Store) -> None:
        """Marks whose notification never came age from when they were made."""
        await store.mark(ALICE, [at(1)], "read")
        assert await store.expire(NOW_NS) == 0
        assert await store.expire(time.time_ns() + 1) == 1
        await store.append(rows(ALICE, 1))
        assert await marks(store, ALICE) == {1: ""}

    # Cursors

    async def test_first_claim(self, store: Store) -> None:
        """A device never seen begins at the floor that is proposed; later proposals change nothing."""
        first = await store.claim(ALICE, "phone", ONE, at(5))
        assert first == (Cursor(at(5)), True, None)
        second = await store.claim(ALICE, "phone", TWO, at(9))
        assert second == (Cursor(at(5)), False, ONE)
        assert await store.holders(ALICE) == [TWO]
        assert (await store.claim(ALICE, "tablet", ONE, at(7))).first
        assert (await store.claim(BOB, "phone", ONE, at(7))).first

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
        assert sorted(lost) == sorted([ONE, other, TWO])
        assert await store.holders(ALICE) == [TWO]
        assert await store.claim(ALICE, "phone", ONE, at(0)) == (Cursor(at(1)), False, TWO)
        assert await store.claim(ALICE, "tablet", TWO, at(0)) == (Cursor(at(4), frozenset({at(6)})), False, None)
        assert (await store.claim(ALICE, "watch", ONE, at(2))).first

    async def test_floor_never_moves_back(self, store: Store) -> None:
        """Of two floors the higher one stays, and what it covers is dropped; the incarnation counts first."""
        await store.claim(ALICE, "phone", ONE, at(5, 2))
        late = Cursor(at(9, 1), frozenset({at(4, 2), at(5, 2), at(7, 2)}), {at(3, 2): 1, at(6, 2): 4})
        assert await store.save([update("phone", ONE, late)]) == []
        expected = Cursor(at(5, 2), frozenset({at(7, 2)}), {at(6, 2): 4})
        assert (await store.claim(ALICE, "phone", ONE, at(0))).cursor == expected

    async def test_release(self, store: Store) -> None:
        """A released device is nobody's; its cursor stays, and the session that ended cannot write any more."""
        await store.claim(ALICE, "phone", ONE, at(1))
        await store.claim(ALICE, "tablet", TWO, at(1))
        await store.claim(BOB, "phone", ONE, at(1))
        assert await store.save([update("phone", ONE, Cursor(at(6)), release=True)]) == []
        assert await store.holders(ALICE) == [TWO]
        assert await store.holders(BOB) == [ONE]
        assert await store.save([update("phone", ONE, Cursor(at(7)))]) == [ONE]
        assert await store.claim(ALICE, "phone", TWO, at(0)) == (Cursor(at(6)), False, None)

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
            store.page(ALICE, before=None, limit=1, filter="all"),
            store.between(ALICE, at(0), at(1), 1),
            store.missed(ALICE, at(0), at(1)),
            store.unread(ALICE),
            store.mark(ALICE, [at(1)], "read"),
            store.mark_all(ALICE, at(1), "read"),
            store.claim(ALICE, "phone", ONE, at(1)),
            store.save([update("phone", ONE, Cursor(at(1)))]),
            store.holders(ALICE),
            store.expire(1),
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
            deadline=None, max_examples=60, stateful_step_count=40, suppress_health_check=[HealthCheck.too_slow]
        )

        class Machine(AnyOrder):
            def __init__(self) -> None:
                super().__init__(store, ask)

        await asyncio.to_thread(run_state_machine_as_test, Machine, settings=limits)


# The model


@dataclass(slots=True)
class Row:
    """A row of the model; without a body only its marks are there."""

    body: bytes | None = None
    seen: bool = False
    read: bool = False
    archived: bool = False

    def mark(self, as_: MarkAs) -> None:
        self.seen = self.seen or as_ != "unread"
        self.read = as_ == "read" or (self.read and as_ != "unread")
        self.archived = self.archived or as_ == "archived"

    def is_on(self, filter: Filter) -> bool:
        return {"all": not self.archived, "unread": not (self.read or self.archived), "archived": self.archived}[filter]


USERS: Final = st.sampled_from(["alice", "bob"])
DEVICES: Final = st.sampled_from(["phone", "tablet"])
HOLDERS: Final = st.builds(Holder, st.sampled_from(["gateway-1", "gateway-2"]), st.sampled_from(["s1", "s2"]))
POSITIONS: Final = st.builds(Position, st.integers(1, 2), st.integers(1, 6))
FLOORS: Final = st.builds(Position, st.integers(1, 2), st.integers(0, 6))


@st.composite
def cursors(draw: st.DrawFn) -> Cursor:
    """A cursor as a session keeps it: what is acked and attempted lies above the floor, and nothing is both."""
    floor = draw(FLOORS)
    above = draw(st.dictionaries(POSITIONS, st.integers(0, 9), max_size=5))
    return Cursor(
        floor,
        frozenset(position for position, attempts in above.items() if position > floor and not attempts),
        {position: attempts for position, attempts in above.items() if position > floor and attempts},
    )


class AnyOrder(RuleBasedStateMachine):
    """A store beside dictionaries. `ask` runs a call of the store; every run has users of its own."""

    runs = count()

    def __init__(self, store: Store, ask: Ask) -> None:
        super().__init__()
        self.store = store
        self.ask = ask
        self.run = next(self.runs)
        self.rows: defaultdict[str, defaultdict[Position, Row]] = defaultdict(lambda: defaultdict(Row))
        self.cursors: dict[tuple[str, str], Cursor] = {}
        self.held: dict[tuple[str, str], Holder | None] = {}

    def name(self, user: str) -> str:
        return f"{user}-{self.run}"

    def visible(self, user: str) -> list[InboxItem]:
        """Oldest first."""
        found = sorted(self.rows[user].items())
        return [InboxItem(at, r.seen, r.read, r.archived, r.body) for at, r in found if r.body is not None]

    @rule(user=USERS, positions=st.lists(POSITIONS, max_size=4), body=st.binary(max_size=3))
    def append(self, user: str, positions: list[Position], body: bytes) -> None:
        self.ask(self.store.append([row(self.name(user), position, body or None) for position in positions]))
        for position in positions:
            kept = self.rows[user][position]
            if kept.body is None:
                kept.body = row(self.name(user), position, body or None).body

    @rule(user=USERS, positions=st.lists(POSITIONS, max_size=4), as_=st.sampled_from(MARKS))
    def mark(self, user: str, positions: list[Position], as_: MarkAs) -> None:
        self.ask(self.store.mark(self.name(user), positions, as_))
        for position in positions:
            self.rows[user][position].mark(as_)

    @rule(user=USERS, upto=FLOORS, as_=st.sampled_from(MARKS))
    def mark_all(self, user: str, upto: Position, as_: MarkAs) -> None:
        self.ask(self.store.mark_all(self.name(user), upto, as_))
        for position, kept in self.rows[user].items():
            if position <= upto and kept.body is not None and not kept.archived:
                kept.mark(as_)

    @rule(user=USERS, before=st.none() | FLOORS, limit=st.integers(1, 5), filter=st.sampled_from(FILTERS))
    def page(self, user: str, before: Position | None, limit: int, filter: Filter) -> None:
        wanted = [
            item
            for item in reversed(self.visible(user))
            if (before is None or item.position < before) and self.rows[user][item.position].is_on(filter)
        ]
        following = wanted[limit - 1].position if len(wanted) > limit else None
        answer = self.ask(self.store.page(self.name(user), before=before, limit=limit, filter=filter))
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
        wanted = self.cursors.setdefault(key, Cursor(floor)), key not in self.held, self.held.get(key)
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
        wanted: list[Holder] = []
        for user, device, holder, cursor, release in updates:
            key = user, device
            if self.held.get(key) != holder:
                wanted.append(holder)
                continue
            floor = max(self.cursors[key].floor, cursor.floor)
            acked = frozenset(position for position in cursor.acked if position > floor)
            attempts = {position: times for position, times in cursor.attempts.items() if position > floor}
            self.cursors[key] = Cursor(floor, acked, attempts)
            self.held[key] = None if release else holder
        batch = [CursorUpdate(self.name(entry[0]), *entry[1:]) for entry in updates]
        assert sorted(self.ask(self.store.save(batch))) == sorted(wanted)

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
                self.page(user, None, 100, filter)
        for user, device in list(self.cursors):
            self.claim(user, device, ONE, Position(0, 0))
