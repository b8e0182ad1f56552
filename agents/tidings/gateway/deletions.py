"""Consumers that nobody needs any more are deleted, some at a time.

JetStream drops its whole queue of API requests when 10,000 wait in it, the creations of other gateways among them. A
mass end of sessions must not do that: a deletion is sent when an earlier one was answered. Nothing depends on one: a
consumer that is left behind ends by itself after `consumer_idle_s`.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from typing import Final

from tidings.stream import consumers
from tidings.stream.connection import Connection

__all__ = ["Deletions"]

_ANSWER_S: Final = 1.0
"""The server has long taken a request out of its queue by then; a node that is gone never answers for its consumers."""


class Deletions:
    """The deletions of one gateway: `at_once` under way, up to `most` waiting; of more the oldest are left behind.

    `reply` makes the subject to which the answer for a consumer comes; whoever hears it calls `answered`.
    """

    def __init__(self, connection: Connection, reply: Callable[[str], str], *, at_once: int, most: int) -> None:
        self._connection = connection
        self._reply = reply
        self._at_once = at_once
        self._most = most
        self._waiting: dict[str, str] = {}
        """The stream of each consumer, oldest first."""
        self._sent: dict[str, tuple[str, float]] = {}
        """The same for those under way, with when they were sent."""
        self._look: asyncio.TimerHandle | None = None
        self._closed = False
        self._settled = asyncio.Event()
        self._settled.set()

    def __len__(self) -> int:
        return len(self._waiting) + len(self._sent)

    @property
    def under_way(self) -> int:
        return len(self._sent)

    def add(self, stream: str, name: str) -> None:
        """Delete this consumer, by and by. A second time is the first one. Once closed, it is left behind."""
        if self._closed or name in self._waiting or name in self._sent:
            return
        if len(self._waiting) >= self._most:
            del self._waiting[next(iter(self._waiting))]
        self._waiting[name] = stream
        self._settled.clear()
        self._send()

    def answered(self, name: str) -> None:
        """The server has deleted it, or has none of this name."""
        if self._sent.pop(name, None) is not None:
            self._send()

    def reconnected(self) -> None:
        """Nobody knows what of the lost connection was read: what was under way is sent again."""
        self._waiting = {**{name: stream for name, (stream, _) in self._sent.items()}, **self._waiting}
        self._sent.clear()
        self._send()

    async def settled(self) -> None:
        """Return when nothing waits or is under way, or there is no connection over which it could be."""
        while len(self) and self._connection.is_connected:
            self._settled.clear()
            await self._settled.wait()

    def _send(self) -> None:
        now = asyncio.get_running_loop().time()
        while self._waiting and len(self._sent) < self._at_once:
            name = next(iter(self._waiting))
            if not consumers.delete(self._connection, self._waiting[name], name, self._reply(name)):
                break
            self._sent[name] = self._waiting.pop(name), now
        if not self._sent:
            self._settled.set()
        elif self._look is None:
            self._look = asyncio.get_running_loop().call_later(_ANSWER_S, self._give_up)

    def _give_up(self) -> None:
        """Leave behind what was not answered in time."""
        self._look = None
        before = asyncio.get_running_loop().time() - _ANSWER_S
        for name in [name for name, (_, sent) in self._sent.items() if sent <= before]:
            del self._sent[name]
        self._send()

    def close(self) -> None:
        """Send no more; what waits or is under way is left behind."""
        self._closed = True
        self._waiting.clear()
        self._sent.clear()
        self._settled.set()
        if self._look is not None:
            self._look.cancel()
            self._look = None
