"""An api agent that publishes and then neither answers nor goes on, to be killed there."""

from __future__ import annotations

import asyncio
import sys
from collections.abc import Sequence

from tidings.api.agent import Api
from tidings.publish import Publisher, Ready
from tidings.runtime.settings import Settings
from tidings.store.factory import open_store_url

publish_ready = Publisher.publish_ready


async def main() -> None:
    settings = Settings.load()
    opened = open_store_url(settings.store_url)
    await opened.open()

    async def publish_and_stop(publisher: Publisher, messages: Sequence[Ready]) -> None:
        await publish_ready(publisher, messages)
        print(f"stored {len(messages)}", file=sys.stderr, flush=True)
        await asyncio.Event().wait()

    Publisher.publish_ready = publish_and_stop  # type: ignore[assignment, method-assign]
    api = Api(settings, opened)
    await api.start()
    print(f"the api listens on {settings.api_host}:{api.port}", file=sys.stderr, flush=True)
    await asyncio.Event().wait()


asyncio.run(main())
