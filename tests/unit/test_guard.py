"""The circuit breaker around a store: whom it refuses, whom it lets through, and when it asks again."""

from __future__ import annotations

import asyncio
import gc
import warnings
from collections.abc import Awaitable, Callable
from typing import Any, Final

import pytest

from support.clock import PATIENCE_S, until
from tidings.runtime import backoff
from tidings.store.guard import GuardedStore
from tidings.store.port import Holder, PageQuery
from tidings.wire.errors import BadPosition, RowsRefused, StoreUnavailable
from tidings.wire.position import Position

AT: Final = Position(1, 1)
ENOUGH: Final = 3
"""Failures in a row that open the breaker."""
FIRST_S, MOST_S = 0.5, 10.0
"""The shortest and the longest cool-down, where chance makes none shorter."""

REFUSED: Final[dict[str, tuple[Any, ...]]] = {
    "page": ("alice", PageQuery()),
    "between": ("alice", AT, AT, 10),
    "missed": ("alice", AT, AT),
    "unread": ("alice",),
    "mark": ("alice", [AT], "read"),
    "mark_all": ("alice", AT, "read"),
    "claim": ("alice", "phone", Holder("g", "s"), AT),
    "holders": ("alice",),
    "devices": ("alice",),
    "subscribe": ("alice", ["a"], 9, AT),
    "unsubscribe": ("alice", ["a"], AT),
    "subscriptions": ("alice", "a", 9),
    "ended_subscriptions": ("alice", None, 9),
    "subscribers": ("a", None, 9),
    "broadcasts": (AT, AT, 9),
    "broadcasts_to": ("a", AT, AT, 9),
    "broadcast_bodies": ([AT],),
    "synced": ("alice",),
}
OBSERVED: Final[dict[str, tuple[Any, ...]]] = {
    "append": ([],),
    "append_broadcasts": ([],),
    "floors": (),
    "note_floors": ({},),
    "note_synced": ("alice", AT),
    "save": ([],),
    "delivered": ([],),
}
PASSED: Final[dict[str, tuple[Any, ...]]] = {"open": (), "close": (), "expire": (7,), "erase": ("alice", AT)}
SILENT: Final = {"mark", "mark_all", "subscribe", "unsubscribe", "append", "delivered", "open", "close", "check"} | {
    "append_broadcasts",
    "note_floors",
    "note_synced",
}
"""What returns nothing."""


class FakeStore:
    """Notes what it is asked; answers with the call's name, waits at its gate, or fails."""

    def __init__(self) -> None:
        self.calls: list[tuple[Any, ...]] = []
        self.error: Exception | None = None
        self.gate = asyncio.Event()
        self.gate.set()

    def __getattr__(self, name: str) -> Callable[..., Awaitable[str]]:
        async def call(*args: Any) -> str:
            self.calls.append((name, *args))
            await self.gate.wait()
            if self.error is not None:
                raise self.error
            return name

        return call


class Time:
    """The event loop's clock, which moves by hand alone: nobody may wait on it without moving it."""

    def __init__(self) -> None:
        self.now = 1000.0

    async def passes(self, seconds: float) -> None:
        self.now += seconds
        # Once for the timers that are due, once for the task that one of them cancels, once for who awaits that.
        for _ in range(4):
            await asyncio.sleep(0)


@pytest.fixture
async def time(monkeypatch: pytest.MonkeyPatch) -> Time:
    """Time that stands still, and cool-downs that are as long as they can be."""
    made = Time()
    monkeypatch.setattr(asyncio.get_running_loop(), "time", lambda: made.now)
    monkeypatch.setattr(backoff.random, "uniform", lambda low, high: high)
    return made


@pytest.fixture
async def store() -> FakeStore:
    return FakeStore()


@pytest.fixture
def guard(store: FakeStore, time: Time) -> GuardedStore:
    return GuardedStore(store, timeout_s=1.0)  # type: ignore[arg-type]


def call(guard: GuardedStore, name: str) -> Any:
    return getattr(guard, name)(*({**REFUSED, **OBSERVED, **PASSED, "check": ()}[name]))


async def fails(guard: GuardedStore, store: FakeStore, times: int, name: str = "unread") -> None:
    """So many calls reach the store and fail there."""
    store.error = StoreUnavailable("down")
    for _ in range(times):
        before = len(store.calls)
        with pytest.raises(StoreUnavailable, match=r"^down$"):
            await call(guard, name)
        assert len(store.calls) == before + 1
    store.error = None


async def is_refused(guard: GuardedStore, store: FakeStore, name: str = "unread") -> None:
    """A call fails although the store would answer, and the store hears nothing of it."""
    before = len(store.calls)
    task = asyncio.ensure_future(call(guard, name))
    await asyncio.sleep(0)
    try:
        assert task.done(), "a refused call does not wait"
    finally:
        task.cancel()
    with pytest.raises(StoreUnavailable, match="did not answer a moment ago"):
        await task
    assert len(store.calls) == before


async def is_asked(guard: GuardedStore, store: FakeStore, name: str = "unread") -> None:
    before = len(store.calls)
    assert await call(guard, name) == (None if name in SILENT else name)
    assert len(store.calls) == before + 1


async def reaches(store: FakeStore, count: int) -> None:
    """Let the others run until the store has been called that often."""
    for _ in range(10):
        await asyncio.sleep(0)
    assert len(store.calls) == count


# Closed


@pytest.mark.parametrize("name", [*REFUSED, *OBSERVED, *PASSED, "check"])
async def test_what_is_asked_is_passed_on(guard: GuardedStore, store: FakeStore, name: str) -> None:
    """While all is well every method reaches the store with its arguments, and returns what the store returns."""
    await is_asked(guard, store, name)
    assert store.calls == [(name, *{**REFUSED, **OBSERVED, **PASSED}.get(name, ()))]


async def test_an_export_is_passed_on(guard: GuardedStore, store: FakeStore) -> None:
    """An export is the store's own iterator."""
    given = object()
    store.export = lambda user: (given, user)  # type: ignore[attr-defined]
    assert guard.export("alice") == (given, "alice")


async def test_failures_in_a_row_open_it(guard: GuardedStore, store: FakeStore) -> None:
    """A success in between starts the count anew; the third failure in a row opens the breaker."""
    for _ in range(3):
        await fails(guard, store, ENOUGH - 1)
        await is_asked(guard, store)
    await fails(guard, store, ENOUGH)
    await is_refused(guard, store)


async def test_slow_calls_time_out(guard: GuardedStore, store: FakeStore, time: Time) -> None:
    """A call that is not answered in time fails with a sentence, is given up, and counts as a failure."""
    store.gate.clear()
    for _ in range(ENOUGH):
        task = asyncio.ensure_future(call(guard, "page"))
        await reaches(store, len(store.calls) + 1)
        await time.passes(0.99)
        assert not task.done()
        await time.passes(0.02)
        assert task.done()
        with pytest.raises(StoreUnavailable, match="did not answer within 1 s"):
            await task
    store.gate.set()
    await is_refused(guard, store)


@pytest.mark.parametrize("error", [BadPosition("no"), RowsRefused({0: "too large"}), ValueError("bug")])
async def test_other_errors_do_not_open_it(guard: GuardedStore, store: FakeStore, error: Exception) -> None:
    """An error that is about the question, not about the store, goes to the caller and changes nothing."""
    store.error = error
    for name in (*REFUSED, *OBSERVED):
        with pytest.raises(type(error)):
            await call(guard, name)
    store.error = None
    await is_asked(guard, store)


async def test_callers_who_leave_are_no_failures(guard: GuardedStore, store: FakeStore) -> None:
    """A cancelled call says nothing about the store, whichever method it was."""
    store.gate.clear()
    for name in (*REFUSED, *OBSERVED):
        task = asyncio.ensure_future(call(guard, name))
        await reaches(store, len(store.calls) + 1)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
    store.gate.set()
    await is_asked(guard, store)


# Open


@pytest.mark.parametrize("name", REFUSED)
async def test_open_refuses_at_once(guard: GuardedStore, store: FakeStore, name: str) -> None:
    """A refused call does not wait, does not reach the store, and leaves no coroutine that was never awaited."""
    await fails(guard, store, ENOUGH)
    refused = call(guard, name)
    with warnings.catch_warnings(record=True) as seen:
        warnings.simplefilter("always")
        with pytest.raises(StoreUnavailable, match="asked again soon"):
            # The first step of the coroutine is its last: it never gives way to the loop.
            refused.send(None)
        del refused
        gc.collect()
    assert not seen, [str(one.message) for one in seen]
    assert len(store.calls) == ENOUGH


@pytest.mark.parametrize("name", [*OBSERVED, *PASSED, "check"])
async def test_open_lets_writes_and_the_operator_through(guard: GuardedStore, store: FakeStore, name: str) -> None:
    """Writes that are repeated until they succeed, and what the operator asks, reach the store."""
    await fails(guard, store, ENOUGH)
    await is_asked(guard, store, name)


@pytest.mark.parametrize("name", [*OBSERVED, "check"])
async def test_a_write_that_succeeds_closes_it(guard: GuardedStore, store: FakeStore, name: str) -> None:
    """The store is back as soon as it takes a write: no cool-down is waited for."""
    await fails(guard, store, ENOUGH)
    await is_refused(guard, store)
    await is_asked(guard, store, name)
    for other in REFUSED:
        await is_asked(guard, store, other)


@pytest.mark.parametrize("name", OBSERVED)
async def test_writes_that_fail_open_it(guard: GuardedStore, store: FakeStore, name: str) -> None:
    """Users do not have to find out themselves."""
    await fails(guard, store, ENOUGH, name)
    await is_refused(guard, store)


async def test_writes_have_no_deadline_here(guard: GuardedStore, store: FakeStore, time: Time) -> None:
    """A write takes as long as its store lets it."""
    store.gate.clear()
    tasks = [asyncio.ensure_future(call(guard, name)) for name in OBSERVED]
    await reaches(store, len(tasks))
    await time.passes(100)
    assert not any(task.done() for task in tasks)
    store.gate.set()
    assert await asyncio.gather(*tasks) == [None if name in SILENT else name for name in OBSERVED]


async def test_a_check_has_a_deadline(guard: GuardedStore, store: FakeStore, time: Time) -> None:
    """Whoever asks for the health of a silent store gets an answer."""
    store.gate.clear()
    task = asyncio.ensure_future(guard.check())
    await reaches(store, 1)
    await time.passes(1.01)
    assert task.done()
    with pytest.raises(StoreUnavailable, match="within 1 s"):
        await task


async def test_a_late_answer_closes_it(guard: GuardedStore, store: FakeStore) -> None:
    """A call that began before the store failed, and succeeds, says that it is back."""
    store.gate.clear()
    late = asyncio.ensure_future(call(guard, "page"))
    await reaches(store, 1)
    gate, store.gate = store.gate, asyncio.Event()
    store.gate.set()
    await fails(guard, store, ENOUGH)
    await is_refused(guard, store)
    gate.set()
    assert await late == "page"
    await is_asked(guard, store)


# Half open


async def test_one_probe_only(guard: GuardedStore, store: FakeStore, time: Time) -> None:
    """After the cool-down one call tries while all others are refused; if it succeeds all are served."""
    await fails(guard, store, ENOUGH)
    await time.passes(FIRST_S)
    store.gate.clear()
    probe = asyncio.ensure_future(call(guard, "page"))
    await reaches(store, ENOUGH + 1)
    for name in REFUSED:
        await is_refused(guard, store, name)
    store.gate.set()
    assert await probe == "page"
    for name in REFUSED:
        await is_asked(guard, store, name)


async def test_cool_downs_grow(guard: GuardedStore, store: FakeStore, time: Time) -> None:
    """A probe that fails opens it again, twice as long each time up to ten seconds."""
    await fails(guard, store, ENOUGH)
    for seconds in (0.5, 1.0, 2.0, 4.0, 8.0, MOST_S, MOST_S):
        await is_refused(guard, store)
        await time.passes(seconds - 0.01)
        await is_refused(guard, store)
        await time.passes(0.02)
        await fails(guard, store, 1)
    await is_refused(guard, store)


async def test_recovery_resets_the_cool_down(guard: GuardedStore, store: FakeStore, time: Time) -> None:
    """The next failure is a new story: three in a row open it, and the first cool-down is short."""
    await fails(guard, store, ENOUGH)
    for _ in range(6):
        await time.passes(MOST_S)
        await fails(guard, store, 1)
    await time.passes(MOST_S)
    await is_asked(guard, store)
    await fails(guard, store, ENOUGH - 1)
    await is_asked(guard, store)
    await fails(guard, store, ENOUGH)
    await is_refused(guard, store)
    await time.passes(FIRST_S)
    await is_asked(guard, store)


async def test_a_slow_probe_opens_it_again(guard: GuardedStore, store: FakeStore, time: Time) -> None:
    """The probe has its deadline too, and the next cool-down begins when it is over."""
    await fails(guard, store, ENOUGH)
    await time.passes(FIRST_S)
    store.gate.clear()
    probe = asyncio.ensure_future(call(guard, "page"))
    await reaches(store, ENOUGH + 1)
    await time.passes(1.01)
    assert probe.done()
    with pytest.raises(StoreUnavailable, match="within 1 s"):
        await probe
    store.gate.set()
    await is_refused(guard, store)
    await time.passes(2 * FIRST_S)
    await is_asked(guard, store)


async def test_a_cancelled_probe_makes_room_for_another(guard: GuardedStore, store: FakeStore, time: Time) -> None:
    """A client that leaves while its call is the probe leaves no breaker that is half open for ever."""
    await fails(guard, store, ENOUGH)
    await time.passes(FIRST_S)
    store.gate.clear()
    probe = asyncio.ensure_future(call(guard, "page"))
    await reaches(store, ENOUGH + 1)
    probe.cancel()
    with pytest.raises(asyncio.CancelledError):
        await probe
    store.gate.set()
    await is_asked(guard, store)
    await is_asked(guard, store)


async def test_a_probe_with_a_bad_question_makes_room_for_another(
    guard: GuardedStore, store: FakeStore, time: Time
) -> None:
    """An error of the caller's ends the probe, and the next call is one."""
    await fails(guard, store, ENOUGH)
    await time.passes(FIRST_S)
    store.error = BadPosition("no")
    with pytest.raises(BadPosition):
        await call(guard, "page")
    store.error = None
    await is_asked(guard, store)
    await is_asked(guard, store)


async def test_failing_together_is_one_cool_down(guard: GuardedStore, store: FakeStore, time: Time) -> None:
    """However many wait for a store when it goes, it is asked again after the shortest cool-down."""
    store.gate.clear()
    tasks = [asyncio.ensure_future(call(guard, "page")) for _ in range(50)]
    await reaches(store, len(tasks))
    await time.passes(1.01)
    answers = await asyncio.gather(*tasks, return_exceptions=True)
    assert {type(answer) for answer in answers} == {StoreUnavailable}
    store.gate.set()
    await is_refused(guard, store)
    await time.passes(FIRST_S)
    await is_asked(guard, store)


async def test_in_real_time(store: FakeStore, monkeypatch: pytest.MonkeyPatch) -> None:
    """The same with a clock that runs: refused while the store is silent, served soon after it is back."""
    monkeypatch.setattr(backoff.random, "uniform", lambda low, high: 0.02)
    guard = GuardedStore(store, timeout_s=0.02)  # type: ignore[arg-type]
    store.gate.clear()

    async def ask() -> object:
        try:
            return await guard.unread("alice")
        except StoreUnavailable as error:
            return str(error)

    answers = await asyncio.gather(*(ask() for _ in range(5)))
    assert answers == ["the store did not answer within 0.02 s"] * 5
    store.gate.set()
    answered: list[object] = []

    async def keep_asking() -> None:
        while "unread" not in answered:
            answered.append(await ask())
            await asyncio.sleep(0)

    task = asyncio.create_task(keep_asking())
    await until(task.done, "the store is asked again", PATIENCE_S)
    assert set(answered) <= {"unread", "the store did not answer a moment ago: it is asked again soon"}
