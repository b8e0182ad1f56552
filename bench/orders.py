"""What the benchmark's processes have in common: they obey orders, and do many things side by side."""

from __future__ import annotations

import asyncio
import json
import sys
from collections.abc import Awaitable, Callable, Iterable, Mapping
from typing import Any, Final

__all__ = ["obey", "side_by_side"]

_LINE_BYTES: Final = 2**24


async def obey(orders: Mapping[str, Callable[..., Awaitable[dict[str, Any]]]]) -> None:
    """Read orders, one JSON object a line on standard input, until its end; answer each with one line.

    ``do`` names the order, and the rest are its arguments.
    """
    reader = asyncio.StreamReader(limit=_LINE_BYTES)
    await asyncio.get_running_loop().connect_read_pipe(lambda: asyncio.StreamReaderProtocol(reader), sys.stdin)
    async for line in reader:
        order = json.loads(line)
        print(json.dumps(await orders[order.pop("do")](**order)), flush=True)


async def side_by_side(numbers: Iterable[int], at_once: int, action: Callable[[int], Awaitable[None]]) -> None:
    """Do `action` with each of these numbers, `at_once` of them under way at a time."""
    waiting = iter(numbers)

    async def work() -> None:
        for number in waiting:
            await action(number)

    await asyncio.gather(*(work() for _ in range(at_once)))
