"""Whether this agent lives, and whether requests should come here."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from aiohttp import web

from tidings.wire.errors import TidingsError

from .answers import answer
from .backing import Backing

__all__ = ["Health"]


class Health:
    """The handlers; `problems` says what is wrong with the agent itself."""

    def __init__(self, backing: Backing, problems: Callable[[], Sequence[str]]) -> None:
        self._backing = backing
        self._problems = problems

    async def alive(self, request: web.Request) -> web.Response:
        """This process answers."""
        return answer({"status": "ok"})

    async def ready(self, request: web.Request) -> web.Response:
        """200, or 503 with what is missing: the log or the store."""
        problems = list(self._problems())
        if not self._backing.connection.is_connected:
            problems.append("no connection to NATS")
        try:
            await self._backing.store.check()
        except TidingsError as error:
            problems.append(f"the store does not answer: {error}")
        body = {"status": "unavailable" if problems else "ok", "problems": problems}
        return answer(body, 503 if problems else 200)
