"""A fan-out agent that stops at a step of a topic message, to be killed there; the step is its only argument.

``decided``: how the message goes out is noted, and nothing was sent. ``broadcast``: the one message is stored, and not
acknowledged. ``copied``: the same of copies.
"""

from __future__ import annotations

import asyncio
import sys
from collections.abc import Sequence
from typing import Any

from tidings.fanout.agent import FanoutAgent
from tidings.publish import Publisher
from tidings.runtime.settings import Settings
from tidings.store.factory import open_store_url
from tidings.stream.connection import Connection
from tidings.wire import subject

_LAST = {"decided": subject.DECIDED, "broadcast": "broadcast."}
store, publish_copies = Connection.store, Publisher.publish_copies


async def main(step: str) -> None:
    settings = Settings.load()
    opened = open_store_url(settings.store_url)
    await opened.open()

    async def store_and_stop(
        connection: Connection, where: str, payload: bytes, headers: dict[str, str] | None = None
    ) -> dict[str, Any]:
        answer = await store(connection, where, payload, headers)
        if step in _LAST and where.startswith(_LAST[step]):
            print(f"stored {payload.decode() if step == 'decided' else where}", file=sys.stderr, flush=True)
            await asyncio.Event().wait()
        return answer

    async def copy_and_stop(publisher: Publisher, users: Sequence[str], id: str, body: bytes) -> None:
        await publish_copies(publisher, users, id, body)
        if step == "copied":
            print(f"stored {len(users)} copies", file=sys.stderr, flush=True)
            await asyncio.Event().wait()

    Publisher.publish_copies = copy_and_stop  # type: ignore[method-assign]
    Connection.store = store_and_stop  # type: ignore[method-assign]
    await FanoutAgent(settings, opened).start()
    print("reads TOPICS", file=sys.stderr, flush=True)
    await asyncio.Event().wait()


asyncio.run(main(sys.argv[1]))
