"""Some a turn of the loop."""

from __future__ import annotations

import asyncio

from tidings.gateway.pace import Pace


async def test_so_many_a_turn_in_order() -> None:
    """Of a hundred that come together eight pass in each turn of the loop, in the order of asking."""
    pace, passed = Pace(8), list[tuple[int, int]]()
    turn = 0

    def count() -> None:
        nonlocal turn
        turn += 1
        loop.call_soon(count)

    async def come(number: int) -> None:
        await pace.turn()
        passed.append((turn, number))

    loop = asyncio.get_running_loop()
    loop.call_soon(count)
    await asyncio.gather(*map(come, range(100)))
    assert [number for _, number in passed] == list(range(100))
    turns = [turn for turn, _ in passed]
    assert max(map(turns.count, turns)) <= 8
    # Nor does one turn after the other go by unused.
    assert turns[-1] - turns[0] <= 100 // 8 + 2


async def test_who_gives_up_takes_nobodys_place() -> None:
    """A cancelled wait lets the next one through."""
    pace, passed = Pace(1), list[int]()

    async def come(number: int) -> None:
        await pace.turn()
        passed.append(number)

    tasks = [asyncio.create_task(come(number)) for number in range(5)]
    await asyncio.sleep(0)
    for number in (1, 2):
        tasks[number].cancel()
    await asyncio.wait(tasks)
    assert passed == [0, 3, 4]


async def test_one_by_one_nobody_waits() -> None:
    """Without a flood a turn costs nothing: it is taken in the same turn of the loop."""
    pace = Pace(1)
    for _ in range(3):
        waiting = asyncio.ensure_future(pace.turn())
        await asyncio.sleep(0)
        assert waiting.done()
        await asyncio.sleep(0)
        await asyncio.sleep(0)
