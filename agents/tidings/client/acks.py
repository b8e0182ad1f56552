"""The acknowledgements that are due to the gateway: joined, so that one turn of the loop costs one frame."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Iterable
from typing import Final

from tidings.wire.errors import ConnectionLost
from tidings.wire.position import Plane, Position, plane_of

from .link import Link

__all__ = ["Acks"]

_ACKS_A_FRAME: Final = 500

log = logging.getLogger("tidings.client")


class Acks:
    """Kept over connections: a position means the same on the next. Never more than was sent unacknowledged."""

    def __init__(self) -> None:
        self._positions: dict[str, None] = {}
        self._upto: dict[Plane, Position] = {}
        self._noted: dict[Plane, tuple[Link, str]] = {}
        self._due = asyncio.Event()

    def add(self, positions: Iterable[str]) -> None:
        """These are acknowledged."""
        self._positions.update(dict.fromkeys(positions))
        self._due.set()

    def upto(self, plane: Plane, position: Position) -> None:
        """All of this plane up to this one are."""
        self._upto[plane] = max(position, self._upto.get(plane, position))
        self._due.set()

    def noted(self, link: Link, position: str) -> None:
        """A gap that was announced on this connection was taken note of.

        Only there: on a later one the same position may cover what is pushed to the client and not handled yet.
        """
        self._noted[plane_of(position)] = (link, position)
        self._due.set()

    async def keep_writing(self, link: Link) -> None:
        """Write what becomes due until the connection ends."""
        try:
            while True:
                await self._due.wait()
                await self.write(link)
        except ConnectionLost as error:
            # The reader sees the same end; what was not written comes again and is acknowledged then.
            log.debug("acks were not sent: %s", error)

    async def write(self, link: Link) -> None:
        """Write what is due now; raises `ConnectionLost`."""
        self._due.clear()
        positions, self._positions = list(self._positions), {}
        upto, self._upto = self._upto, {}
        noted, self._noted = self._noted, {}
        for start in range(0, len(positions), _ACKS_A_FRAME):
            await link.send({"t": "ack", "pos": positions[start : start + _ACKS_A_FRAME]})
        for plane, position in upto.items():
            await link.send({"t": "ack", "upto": position.text(plane)})
        for where, gap in noted.values():
            if where is link:
                await link.send({"t": "ack", "upto": gap})
