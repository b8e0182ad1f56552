"""Who may start a session, and when the others are to come back."""

from __future__ import annotations

import asyncio
from itertools import pairwise

import pytest

from tidings.gateway.admission import Admission


class Clock:
    """Seconds, as the test says."""

    def __init__(self) -> None:
        self.at = 1000.0

    def __call__(self) -> float:
        return self.at


@pytest.fixture
def clock() -> Clock:
    return Clock()


class Held:
    """Starts that go on until the test ends them, in their order."""

    def __init__(self, admission: Admission, count: int) -> None:
        self._ends = [asyncio.Event() for _ in range(count)]
        self.started: list[int] = []
        self._tasks = [asyncio.create_task(self._one(admission, number)) for number in range(count)]

    async def _one(self, admission: Admission, number: int) -> None:
        async with admission.turn():
            self.started.append(number)
            await self._ends[number].wait()

    async def settle(self) -> None:
        for _ in range(4):
            await asyncio.sleep(0)

    async def end(self, number: int) -> None:
        self._ends[number].set()
        await self._tasks[number]
        await self.settle()

    async def close(self) -> None:
        for task in self._tasks:
            task.cancel()
        await asyncio.wait(self._tasks)


async def test_so_many_at_a_time_in_their_order(clock: Clock) -> None:
    """The next one starts when one has ended, and not before."""
    held = Held(Admission(2, 1.0, clock), 5)
    await held.settle()
    assert held.started == [0, 1]
    await held.end(1)
    assert held.started == [0, 1, 2]
    await held.end(0)
    assert held.started == [0, 1, 2, 3]
    await held.close()


async def test_who_gives_up_waiting_takes_no_turn(clock: Clock) -> None:
    """A cancelled wait is no start, and is not counted as waiting."""
    admission = Admission(1, 1.0, clock)
    held = Held(admission, 3)
    await held.settle()
    held._tasks[1].cancel()
    await held.settle()
    assert admission.waiting == 1
    await held.end(0)
    assert held.started == [0, 2]
    await held.close()


async def test_the_rate_is_measured_while_somebody_waits(clock: Clock) -> None:
    """Two hundred a second, for a while; then what is measured without a queue changes nothing."""
    admission = Admission(1, 1.0, clock)
    held = Held(admission, 2000)
    await held.settle()
    for number in range(1999):
        clock.at += 0.005
        await held.end(number)
    assert admission.per_s == pytest.approx(200, rel=0.05)
    clock.at += 3600
    await held.end(1999)
    assert admission.per_s == pytest.approx(200, rel=0.05)


async def test_full_when_the_wait_would_be_too_long(clock: Clock) -> None:
    """As many may wait as are served in that time, at least as many as start at a time, and never too many."""
    admission = Admission(64, 2.0, clock)
    limits = []
    for per_s in (10, 100, 1_000_000):
        admission.per_s = per_s
        admission.waiting = next(n for n in range(3000) if setattr(admission, "waiting", n) or admission.full)
        limits.append(admission.waiting)
    assert limits == [64, 200, 2048]


def test_each_has_a_turn_of_its_own(clock: Clock) -> None:
    """What is promised is spread as starts are served, behind those who wait."""
    admission = Admission(64, 2.0, clock)
    # A half more than was measured is hoped for.
    admission.per_s, admission.waiting = 100 / 1.5, 200
    pauses = [admission.come_back_ms() for _ in range(100)]
    for number, pause in enumerate(pauses):
        due = 2000 + 10 * (number + 1)
        assert due - 1 <= pause <= due * 1.1 + 1
    # With time the promises come nearer.
    clock.at += 1.0
    admission.waiting = 0
    assert 2010 - 1 <= admission.come_back_ms() <= 2010 * 1.1 + 1


def test_promises_of_long_ago_count_no_more(clock: Clock) -> None:
    """Whoever comes when all is quiet again need not wait for those who came before."""
    admission = Admission(64, 2.0, clock)
    admission.per_s = 100 / 1.5
    for _ in range(1000):
        admission.come_back_ms()
    clock.at += 60
    assert admission.come_back_ms() <= 12


def test_nobody_is_sent_away_for_long(clock: Clock) -> None:
    """Of many more than can be served each comes back within half a minute, and not all at its end."""
    admission = Admission(64, 2.0, clock)
    admission.per_s = 50 / 1.5
    pauses = [admission.come_back_ms() for _ in range(20_000)]
    assert max(pauses) <= 33_000
    late = pauses[1500:]
    assert min(late) >= 15_000
    buckets = [sum(1 for pause in late if low <= pause < high) for low, high in pairwise(range(15_000, 30_001, 3000))]
    assert min(buckets) > len(late) / 10
