"""A little of a flood at a time."""

from __future__ import annotations

import asyncio

from tidings.gateway.pace import Pace


class Crowd:
    """Those who come, and who of them has passed."""

    def __init__(self, pace: Pace, count: int) -> None:
        self.passed: list[int] = []
        self.tasks = [asyncio.create_task(self._come(pace, number)) for number in range(count)]

    async def _come(self, pace: Pace, number: int) -> None:
        await pace.turn()
        self.passed.append(number)


async def test_so_many_a_tick_in_order() -> None:
    """Of a hundred that come together eight pass in each tick, in the order of asking."""
    asked: list[int] = []

    def most() -> int:
        asked.append(len(crowd.passed))
        return 8

    crowd = Crowd(Pace(most), 100)
    await asyncio.wait(crowd.tasks)
    assert crowd.passed == list(range(100))
    # Each time that the limit was asked for, those of the tick before had passed, and no more.
    assert asked[-12:] == list(range(8, 100, 8))


async def test_nobody_passes_while_nobody_may() -> None:
    """A limit of nothing holds all, and the next one that is something lets them go on."""
    limit, asked = 0, 0
    held = asyncio.Event()

    def most() -> int:
        nonlocal asked
        asked += 1
        if asked > 10:
            held.set()
        return limit

    pace = Pace(most)
    crowd = Crowd(pace, 3)
    await held.wait()
    assert crowd.passed == []
    assert len(pace) == 3
    limit = 2
    await asyncio.wait(crowd.tasks)
    assert crowd.passed == [0, 1, 2]
    assert len(pace) == 0


async def test_who_gives_up_takes_nobodys_place() -> None:
    """A cancelled wait lets the next one through."""
    crowd = Crowd(Pace(lambda: 1), 5)
    await asyncio.sleep(0)
    for number in (1, 2):
        crowd.tasks[number].cancel()
    await asyncio.wait(crowd.tasks)
    assert crowd.passed == [0, 3, 4]


async def test_without_a_flood_nobody_waits() -> None:
    """What comes alone passes at once: in the turn of the loop in which it asked."""
    crowd = Crowd(Pace(lambda: 1), 1)
    await asyncio.sleep(0)
    assert crowd.passed == [0]
