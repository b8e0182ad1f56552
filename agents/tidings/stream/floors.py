"""The inbox floors, as the inbox agents announce them: all up to a partition's floor is in the store.

An old floor is a safe floor: it makes a session read more of the stream and less of the store.
"""

from __future__ import annotations

import asyncio
import logging

import orjson

from tidings.wire.position import Position

from . import consumers
from .connection import ApiError, Connection
from .topology import BROADCAST_PART, Topology

__all__ = ["Floors"]

log = logging.getLogger("tidings.stream")


class Floors:
    """The highest floor heard of for each partition, and for the broadcasts."""

    def __init__(self, topology: Topology) -> None:
        self._topology = topology
        parts = (*range(topology.partitions), BROADCAST_PART)
        self._floors = {part: topology.beginning(part) for part in parts}
        self.outdated = False
        """Somebody knows of a newer log than ours."""

    def __getitem__(self, partition: int) -> Position:
        return self._floors[partition]

    def raise_to(self, partition: int, sequence: int) -> None:
        """A floor never falls: what was stored stays stored."""
        floor = Position(self._topology.beginning(partition).incarnation, sequence)
        self._floors[partition] = max(floor, self._floors[partition])

    async def read(self, connection: Connection) -> None:
        """Ask the log for all of them; raises `StreamUnavailable` when it does not answer."""

        async def read(partition: int) -> None:
            try:
                self.raise_to(partition, await consumers.inbox_floor(connection, partition))
            except ApiError as error:
                # Without inbox agents nothing is in the store: 0 is the floor.
                log.warning("partition %d has no inbox floor: %s", partition, error)

        await asyncio.gather(*map(read, self._floors))

    def heard(self, subject: bytes, reply: bytes, header: bytes | None, payload: bytes) -> None:
        """An announcement: ``{"incarnations": [...], "floors": [...]}``, a number a partition, last the broadcasts'."""
        try:
            announced = orjson.loads(payload)
            pairs = list(zip(announced["incarnations"], announced["floors"], strict=True))
        except (orjson.JSONDecodeError, KeyError, TypeError, ValueError) as error:
            log.warning("an announcement of inbox floors cannot be read: %s", error)
            return
        for partition, (incarnation, sequence) in zip(self._floors, pairs, strict=False):
            ours = self._topology.beginning(partition).incarnation
            if incarnation == ours:
                self.raise_to(partition, sequence)
            elif incarnation > ours:
                self.outdated = True
