"""The inbox floors, as the inbox agents announce them: all up to a partition's floor is in the store.

An old floor is a safe floor: it makes a session read more of the stream and less of the store.
"""

from __future__ import annotations

import logging

import orjson

from tidings.stream.topology import Topology
from tidings.wire.position import Position

__all__ = ["Floors"]

log = logging.getLogger("tidings.gateway")


class Floors:
    """The highest floor heard of for each partition."""

    def __init__(self, topology: Topology) -> None:
        self._topology = topology
        self._floors = [Position(incarnation, 0) for incarnation in topology.incarnations]
        self.outdated = False
        """Somebody knows of a newer log than ours."""

    def __getitem__(self, partition: int) -> Position:
        return self._floors[partition]

    def raise_to(self, partition: int, sequence: int) -> None:
        """A floor never falls: what was stored stays stored."""
        floor = Position(self._topology.incarnations[partition], sequence)
        self._floors[partition] = max(floor, self._floors[partition])

    def heard(self, subject: bytes, reply: bytes, header: bytes | None, payload: bytes) -> None:
        """An announcement: ``{"incarnations": [...], "floors": [...]}``, one number a partition."""
        try:
            announced = orjson.loads(payload)
            pairs = list(zip(announced["incarnations"], announced["floors"], strict=True))
        except (orjson.JSONDecodeError, KeyError, TypeError, ValueError) as error:
            log.warning("an announcement of inbox floors cannot be read: %s", error)
            return
        for partition, (incarnation, sequence) in enumerate(pairs[: self._topology.partitions]):
            if incarnation == self._topology.incarnations[partition]:
                self.raise_to(partition, sequence)
            elif incarnation > self._topology.incarnations[partition]:
                self.outdated = True
