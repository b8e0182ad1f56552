"""How a gateway leaves: its devices are sent away at a pace at which others can take them.

::

    not ready --(drain_notice_s)--> door shut --(drain_per_s, or by drain_s)--> all sent away --> all written

1. From the signal on ``/readyz`` says 503. For `drain_notice_s` everything goes on, newcomers included: a load
   balancer needs some time to notice, and would send whoever is refused straight back.
2. The door is shut: who comes now is told to come back soon, and finds another gateway.
3. Devices are sent away, `drain_per_s` a second, or faster where the deadline `drain_s` wants it. Each keeps its
   connection, and gets its notifications, until its turn has come. Its `bye` says when to come back: at `drain_per_s` a
   second, however fast they were closed, and up to a second later by chance. Its cursor is written soon after, so that
   the next gateway need not ask for it.
4. What is left is written: cursors, delivery marks, deletions of consumers. A store or a NATS that is down is waited
   for, but only for seconds: what cannot be written costs copies (the stored cursors are older) or idle consumers, and
   never a notification.

A gateway that is killed in the middle has left for good: its devices come back by themselves.
"""

from __future__ import annotations

import asyncio
import logging
import random
from typing import Final

from tidings.runtime.backoff import Backoff
from tidings.wire import codes, frames

from .door import Door
from .hub import Hub
from .keeper import Keeper
from .session import Session
from .socket import Socket

__all__ = ["Leaving"]

_PAUSE_S: Final = 0.05
_FLUSH_EVERY_S: Final = 0.25
_SETTLE_S: Final = 3.0
_SPREAD_S: Final = 1.0
_LONGEST_S: Final = 30.0

log = logging.getLogger("tidings.gateway")


class Leaving:
    """The end of one gateway: `drain`, and `stop` for whatever is left."""

    def __init__(self, hub: Hub, door: Door, keeper: Keeper) -> None:
        self._hub = hub
        self._door = door
        self._keeper = keeper
        self._began: float | None = None
        """When the first device was sent away."""
        self._back_per_s = 0.0
        """How many a second are told to be back."""
        self._sent = 0
        self._settled = False
        self._flushed_at = 0.0

    async def drain(self) -> None:
        """Send every device away in its turn, and write all that is to be written."""
        hub, settings = self._hub, self._hub.settings
        await asyncio.sleep(settings.drain_notice_s)
        self._door.shut()
        waiting = [session for session in hub.by_id.values() if session.socket is not None]
        per_s = max(settings.drain_per_s, len(waiting) / settings.drain_s) if settings.drain_s else float("inf")
        log.info("%d devices are sent away, %.0f a second", len(waiting), per_s)
        self._begin(len(waiting))
        sockets: list[Socket] = []
        began, at = hub.now(), 0
        while at < len(waiting):
            due = min(len(waiting), 1 + int(per_s * (hub.now() - began))) if settings.drain_s else len(waiting)
            sockets += filter(None, map(self._send_away, waiting[at:due]))
            at = due
            self._flush_soon()
            if at < len(waiting):
                await asyncio.sleep(_PAUSE_S)
        await self._finish(sockets)

    async def stop(self) -> None:
        """Send everybody away at once who is still here."""
        self._door.shut()
        sessions = list(self._hub.by_id.values())
        self._begin(len(sessions))
        await self._finish(list(filter(None, map(self._send_away, sessions))))

    def _begin(self, count: int) -> None:
        if self._began is None:
            self._began = self._hub.now()
            # Of very many, more a second come back, because nobody is told to stay away for long.
            self._back_per_s = max(self._hub.settings.drain_per_s, count / _LONGEST_S)

    async def _finish(self, sockets: list[Socket]) -> None:
        for session in list(self._hub.by_id.values()):
            self._hub.end(session)
        await self._settle()
        # Last, and for all of them together: a client that does not answer takes its time.
        await asyncio.gather(*(socket.gone() for socket in sockets))

    def _send_away(self, session: Session) -> Socket | None:
        socket = session.socket
        if socket is not None:
            self._hub.detach(session, socket, linger=False)
            socket.dismiss(codes.RESTART, frames.bye(self._come_back_ms()))
        return socket

    def _come_back_ms(self) -> int:
        assert self._began is not None
        due = self._began + self._sent / self._back_per_s
        self._sent += 1
        return int(1000 * (max(0.0, due - self._hub.now()) + random.uniform(0, _SPREAD_S)))

    def _flush_soon(self) -> None:
        now = self._hub.now()
        if now >= self._flushed_at + _FLUSH_EVERY_S:
            self._flushed_at = now
            self._hub.spawn(self._keeper.flush())

    async def _settle(self) -> None:
        """Write what is left, for as long as there is hope, once."""
        if self._settled:
            return
        hub, backoff = self._hub, Backoff(0.1, 0.5)
        try:
            async with asyncio.timeout(_SETTLE_S):
                while True:
                    await self._keeper.flush()
                    await self._keeper.flush_notes()
                    if not (hub.moved or hub.released or hub.notes):
                        break
                    await asyncio.sleep(backoff.next())
                await hub.deletions.settled()
        except TimeoutError:
            log.warning(
                "left without writing %d cursors (what those devices acknowledged last comes again) and %d delivery "
                "marks, and with %d consumers that end by themselves",
                len(hub.moved) + len(hub.released),
                len(hub.notes or ()),
                len(hub.deletions),
            )
        self._settled = True
