"""What the handlers work with: the log, the store, and what is known of both."""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

from tidings.identity.entitlement import TopicEntitlement
from tidings.publish import Publisher, Receipt, Schemas
from tidings.runtime.settings import Settings
from tidings.store.inbox import UserInbox
from tidings.store.port import Store
from tidings.stream import consumers, topology
from tidings.stream.connection import Connection
from tidings.stream.floors import Floors
from tidings.stream.topology import BROADCAST_PART, Topology
from tidings.wire import subject
from tidings.wire.errors import TidingsError
from tidings.wire.position import PERSONAL, Plane, Position

if TYPE_CHECKING:
    from tidings.telemetry.tracing import Tracing

__all__ = ["Backing"]

log = logging.getLogger("tidings.api")


class Backing:
    """The log and the store of one api agent. `publisher` and `entitlement` are open."""

    def __init__(
        self,
        settings: Settings,
        connection: Connection,
        store: Store,
        publisher: Publisher,
        entitlement: TopicEntitlement,
        found: Topology,
    ) -> None:
        self.settings = settings
        self.connection = connection
        self.store = store
        self.publisher = publisher
        self.topology = found
        self.floors = Floors(found)
        self.inbox = UserInbox(store, lambda: self.floors[BROADCAST_PART])
        self.entitlement = entitlement
        self.tracing: Tracing | None = None
        self.published: Callable[[Sequence[Receipt | TidingsError]], None] | None = None
        """Told what became of all that is published. Both are None where telemetry is off."""
        self.check = Schemas.of(settings).check
        """Reads an event that is to be published, strictly: its envelope, and the schema of its type."""

    async def rediscover(self) -> None:
        """Read the topology again: the streams may be new ones. Raises `StreamUnavailable` and `TopologyMismatch`."""
        found = await topology.discover(self.connection)
        if found != self.topology:
            log.warning("the streams are new ones, or were restored")
            floors = Floors(found)
            await floors.read(self.connection)
            self.topology, self.floors = found, floors

    def partition(self, user: str) -> int:
        return subject.partition(subject.escape(user), self.topology.partitions)

    async def end(self, partition: int) -> Position:
        """The newest position of a partition, or of `BROADCAST_PART`."""
        beginning = self.topology.beginning(partition)
        return beginning._replace(sequence=await consumers.last_sequence(self.connection, partition))

    async def is_real(self, user: str, plane: Plane, position: Position) -> bool:
        """If this mesh can have handed the position out: its stream has come as far."""
        partition = self.partition(user) if plane == PERSONAL else BROADCAST_PART
        known = self.floors[partition]
        if position.incarnation != known.incarnation or position <= known:
            return position.incarnation <= known.incarnation
        return position <= await self.end(partition)

    async def gateways(self, user: str) -> set[str]:
        """Those that hold a device of the user."""
        return {holder.gateway for holder in await self.store.holders(user)}
