"""The NATS publisher of a Locust process: the real `Publisher`, on an event loop in a process of its own.

gevent replaces the parts of the standard library that asyncio stands on, so the two do not share a process. Standard
input has one JSON object a line: the settings, then orders. Each order is answered with one line, in the order of their
confirmations.
"""

from __future__ import annotations

import asyncio
import sys
import time
from typing import Any

import orjson
import uvloop

from tidings.publish import Publisher
from tidings.runtime.settings import Settings
from tidings.wire.errors import PublishUnconfirmed, TidingsError


async def _publish(publisher: Publisher, order: dict[str, Any]) -> dict[str, Any]:
    event = {"type": "load.made", "id": order["id"], "data": {**order["data"], "at": time.time()}}
    began = time.perf_counter()
    try:
        if "topic" in order:
            await publisher.publish_topic(order["topic"], **event)
        else:
            await publisher.publish(order["user"], **event)
    except PublishUnconfirmed as error:
        outcome, detail = "doubtful", str(error)
    except TidingsError as error:
        outcome, detail = "refused", str(error)
    else:
        outcome, detail = "stored", ""
    took_ms = (time.perf_counter() - began) * 1000
    return {"id": order["id"], "outcome": outcome, "detail": detail, "ms": took_ms}


async def _obey() -> None:
    reader = asyncio.StreamReader()
    await asyncio.get_running_loop().connect_read_pipe(lambda: asyncio.StreamReaderProtocol(reader), sys.stdin.buffer)
    where = orjson.loads(await reader.readline())

    async def answer(order: dict[str, Any]) -> None:
        said = await _publish(publisher, order)
        sys.stdout.buffer.write(orjson.dumps(said, option=orjson.OPT_APPEND_NEWLINE))
        sys.stdout.buffer.flush()

    async with Publisher(Settings.load(**where), source="load") as publisher, asyncio.TaskGroup() as tasks:
        async for line in reader:
            tasks.create_task(answer(orjson.loads(line)))


if __name__ == "__main__":
    try:
        uvloop.run(_obey())
    except TidingsError as refused:
        sys.exit(f"tidings: {refused}")
