"""An inbox agent that stops between store and ack, to be killed there: the rows are durable, nobody was told."""

from __future__ import annotations

import asyncio
import sys
from collections.abc import Sequence

from tidings.inbox.agent import InboxAgent
from tidings.runtime.settings import Settings
from tidings.store.factory import open_store_url
from tidings.store.port import InboxRow


async def main() -> None:
    settings = Settings.load()
    store = open_store_url(settings.store_url)
    await store.open()
    append = store.append

    async def append_and_stop(rows: Sequence[InboxRow]) -> None:
        await append(rows)
        print(f"stored {len(rows)} rows", file=sys.stderr, flush=True)
        await asyncio.Event().wait()

    store.append = append_and_stop  # type: ignore[method-assign]
    await InboxAgent(settings, store).start()
    print("reads 0 partitions", file=sys.stderr, flush=True)
    await asyncio.Event().wait()


asyncio.run(main())
