"""Requests under way: each waits for the frame that answers it."""

from __future__ import annotations

import asyncio

from tidings.wire import codes
from tidings.wire.errors import ConnectionLost, RequestRefused

from .link import Frame, Link

__all__ = ["Requests"]


class Requests:
    """Matches answers to requests by their `ref`. Bounded by the application's own waiting."""

    def __init__(self) -> None:
        self._waiting: dict[int, asyncio.Future[Frame]] = {}
        self._ref = 0

    async def ask(self, link: Link, frame: Frame) -> Frame:
        """Send a request and wait; raises `RequestRefused`, or `ConnectionLost` when the connection breaks first."""
        self._ref += 1
        ref = self._ref
        future = self._waiting[ref] = asyncio.get_running_loop().create_future()
        try:
            await link.send({**frame, "ref": ref})
            answer: Frame = await future
        finally:
            del self._waiting[ref]
        if answer["t"] == "error":
            code = str(answer.get("code"))
            raise RequestRefused(code, str(answer.get("message")), retry=codes.may_retry(code))
        return answer

    def answered(self, frame: Frame) -> None:
        """An `ok` or `error` with a ref came. One that nobody waits for any more is late."""
        future = self._waiting.get(frame["ref"])
        if future is not None and not future.done():
            future.set_result(frame)

    def connection_lost(self) -> None:
        """What is under way gets no answer any more; whether it was done is not known."""
        for future in self._waiting.values():
            if not future.done():
                future.set_exception(ConnectionLost("the connection broke before the answer came"))
