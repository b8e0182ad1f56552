"""The inbox agent.

Reads: every partition of the personal plane, through the shared durable consumer ``inbox``; and broadcasts (see
`tidings.inbox.broadcasts`).
Writes: rows to the store; dead letters to ``DEAD``; inbox floors (core NATS), once a second.
Acks when: the row is durable in the store, or the body is durable as a dead letter.
Crash costs: nothing. What was written and not acknowledged is redelivered, here or to another inbox agent, and
written again under the same position, which changes nothing.
"""

from __future__ import annotations

import asyncio
import secrets
import time
from collections.abc import Mapping
from typing import TYPE_CHECKING, Final, NamedTuple

import orjson

from tidings.runtime.backoff import Backoff
from tidings.runtime.service import Service
from tidings.runtime.settings import Settings
from tidings.schema import reader
from tidings.store.port import InboxRow, Store
from tidings.stream import consumers, topology
from tidings.stream.connection import Connection, connect
from tidings.stream.consumers import Delivery
from tidings.stream.topology import BROADCAST_PART, INBOX, Topology, notify_stream
from tidings.wire import subject
from tidings.wire.errors import (
    BadSubject,
    InvalidNotification,
    RowsRefused,
    StoreUnavailable,
    StreamUnavailable,
    TidingsError,
)
from tidings.wire.position import Position

from .broadcasts import BroadcastWriter
from .numbers import InboxNumbers

if TYPE_CHECKING:
    from tidings.telemetry.telemetry import Telemetry

__all__ = ["InboxAgent"]

_PULL_EXPIRES_NS: Final = 30_000_000_000
_EXPIRE_EVERY_S: Final = 600
_GULP_S: Final = 0.02
"""Rows wait for company anyway: at 2,000 notifications a second reading them in gulps takes off a third of the CPU."""
_DAY_NS: Final = 86_400_000_000_000
_NOWHERE: Final = Position(0, 0)


class _Poison(NamedTuple):
    """A message that cannot be kept: mostly one that is no notification."""

    where: str
    body: bytes
    reply: bytes
    delivery: Delivery
    reason: str
    detail: str


def _poison_row(row: InboxRow, reply: bytes, reason: str) -> _Poison:
    delivery = consumers.parse_reply(reply)
    token = subject.escape(row.user)
    partition = int(delivery.stream.rpartition(b"_")[2])
    return _Poison(subject.part_user(token, partition), row.body, reply, delivery, RowsRefused.code, reason)


class InboxAgent(Service):
    """One inbox process; any number of them share the work. `store` is opened and closed by whoever made it.

    Memory is bounded: at most four batches of notifications are asked for, and none while the store is down.
    """

    name = "inbox"

    def __init__(self, settings: Settings, store: Store, *, telemetry: Telemetry | None = None) -> None:
        super().__init__()
        self._telemetry = telemetry
        self._numbers = None if telemetry is None else InboxNumbers(telemetry.numbers)
        self._tracing = None if telemetry is None else telemetry.tracing
        self._settings = settings
        self._store = store
        self._read = reader(settings)
        self._id = secrets.token_hex(4)
        self._connection: Connection
        self._topology: Topology
        self._broadcasts: BroadcastWriter
        self._rows: list[InboxRow] = []
        self._replies: list[bytes] = []
        """Where each row's message is acknowledged."""
        self._poison: list[_Poison] = []
        self._some = asyncio.Event()
        self._enough = asyncio.Event()
        self._pull_size = 0
        self._pull_left: list[int] = []
        self._pulls: list[int] = []
        self._others_announced = 0.0
        self._resumed = asyncio.Event()
        """It is known which log this is: its messages may be asked for."""
        self._noted: dict[int, Position] = {}

    async def _start(self) -> None:
        self._connection = connection = await connect(self._settings, "tidings-inbox", found=self._reconnected)
        if self._telemetry is not None:
            self._telemetry.watch_connection(connection)
        self._topology = await topology.discover(connection)
        partitions = self._topology.partitions
        self._pull_size = max(8, 4 * self._settings.inbox_batch // partitions)
        self._pull_left, self._pulls = [0] * partitions, [0] * partitions
        self._broadcasts = BroadcastWriter(
            self._id, connection, self._store, lambda: self._topology.broadcast, self.spawn, self._numbers
        )
        await self._broadcasts.listen()
        await connection.listen(subject.inbox_pull(self._id, "*", "*"), self._receive)
        await connection.listen(subject.INBOX_FLOOR, self._heard_floors)
        await connection.confirm()
        for loop in (self._resume, self._write, self._announce_floors, self._expire):
            self.spawn(loop())
        connection.gulp_s = min(_GULP_S, self._settings.inbox_delay_ms / 1000)
        self.log.info("inbox agent %s reads %d partitions", self._id, partitions)

    async def _stop(self) -> None:
        if hasattr(self, "_connection"):
            await self._connection.finish()

    async def _reconnected(self) -> None:
        """No pull survives a broken connection; what it had under way is redelivered."""
        self._resumed.clear()
        self.spawn(self._resume())

    async def _resume(self) -> None:
        """Before anything is read, find out which log this is: a position must name the right incarnation."""
        backoff = Backoff(0.1, 2.0)
        while True:
            try:
                self._noted = await self._store.floors()
                self._topology = await topology.renew(self._connection, self._noted)
                break
            except TidingsError as error:
                self.log.warning("nothing is read yet: %s", error)
                await asyncio.sleep(backoff.next())
        self._resumed.set()
        for partition in range(self._topology.partitions):
            self._pull(partition)
        self._broadcasts.pull()

    # Messages in

    def _pull(self, partition: int) -> None:
        """Ask for the partition's next messages, unless enough of them wait for the store."""
        if not self._resumed.is_set() or len(self._rows) >= 4 * self._settings.inbox_batch:
            self._pull_left[partition] = 0
            return
        self._pulls[partition] += 1
        self._pull_left[partition] = self._pull_size
        consumers.pull(
            self._connection,
            notify_stream(partition),
            INBOX,
            subject.inbox_pull(self._id, partition, self._pulls[partition]),
            batch=self._pull_size,
            expires_ns=_PULL_EXPIRES_NS,
        )

    def _pull_where_none(self) -> None:
        for partition, left in enumerate(self._pull_left):
            if left <= 0:
                self._pull(partition)

    def _receive(self, where: bytes, reply: bytes, header: bytes | None, body: bytes) -> None:
        if not reply:
            self._pull_ended(where, header)
            return
        words = where.split(b".", 3)
        delivery = consumers.parse_reply(reply)
        partition = int(words[1])
        try:
            user = subject.unescape(subject.readable(words[3]))
            envelope = self._read(body)
        except (InvalidNotification, BadSubject) as error:
            self._poison.append(_Poison(subject.readable(where), body, reply, delivery, error.code, str(error)))
        else:
            position = Position(self._topology.incarnations[partition], delivery.stream_sequence)
            self._rows.append(InboxRow(user, position, *envelope, delivery.stored_ns, body))
            self._replies.append(reply)
        self._some.set()
        if len(self._rows) >= self._settings.inbox_batch:
            self._enough.set()
        self._pull_left[partition] -= 1
        if self._pull_left[partition] <= 0:
            self._pull(partition)

    def _pull_ended(self, where: bytes, header: bytes | None) -> None:
        """A pull expired, or the consumer did not answer."""
        words = where.decode().split(".")
        partition, number = int(words[2]), int(words[3])
        if header is None or number != self._pulls[partition]:
            return
        status, description = consumers.status_of(header)
        if status == 408:
            self._pull(partition)
        else:
            self.log.debug("pull of partition %d ended: %d %s", partition, status, description.decode())
            self._pull_left[partition] = 0

    # Rows out

    async def _write(self) -> None:
        """Take what has come together and store it, for as long as the agent lives."""
        delay_s = self._settings.inbox_delay_ms / 1000
        while True:
            await self._some.wait()
            if len(self._rows) < self._settings.inbox_batch and delay_s:
                try:
                    async with asyncio.timeout(delay_s):
                        await self._enough.wait()
                except TimeoutError:
                    self.log.debug("%d rows are company enough", len(self._rows))
            self._some.clear()
            self._enough.clear()
            poison, self._poison = self._poison, []
            for letter in poison:
                await self._bury(letter)
            while self._rows:
                size = self._settings.inbox_batch
                rows, self._rows = self._rows[:size], self._rows[size:]
                replies, self._replies = self._replies[:size], self._replies[size:]
                refused = await self._store_traced(rows)
                if refused:
                    for index, reason in refused.items():
                        await self._bury(_poison_row(rows[index], replies[index], reason))
                    replies = [reply for index, reply in enumerate(replies) if index not in refused]
                self._connection.ack_all(replies)
                self._pull_where_none()

    async def _store_traced(self, rows: list[InboxRow]) -> Mapping[int, str]:
        """`_store_batch`, in a span of its own that is linked to each traced notification of the batch."""
        tracing = self._tracing
        if tracing is None:
            return await self._store_batch(rows)
        links = [parent for row in rows if (parent := tracing.sampled(row.body)) is not None]
        if not links:
            return await self._store_batch(rows)
        span = tracing.start(
            "store notify.user.{user}",
            "process",
            links=links,
            template="notify.user.{user}",
            group=INBOX,
            batch__message_count=len(rows),
        )
        with tracing.within(span):
            refused = await self._store_batch(rows)
        tracing.end(span, RowsRefused.code if refused else None)
        return refused

    async def _store_batch(self, rows: list[InboxRow]) -> Mapping[int, str]:
        """Store rows durably; while the store is down, wait, and pull no more than is asked for.

        Returns the reasons of those that no store can keep, by index.
        """
        backoff = Backoff(0.1, 5.0)
        while True:
            try:
                if self._numbers is None:
                    await self._store.append(rows)
                else:
                    await self._numbers.calls.timed("append", self._store.append(rows))
                    self._numbers.stored("personal", [row.stored_ns for row in rows])
            except RowsRefused as error:
                return error.reasons
            except StoreUnavailable as error:
                delay = backoff.next()
                self.log.warning("%d rows wait %.1f s for the store: %s", len(rows), delay, error)
                await asyncio.sleep(delay)
            else:
                return {}

    async def _bury(self, letter: _Poison) -> None:
        """Make a dead letter of what is no notification; unacknowledged until that is durable."""
        delivery, sequence = letter.delivery, letter.delivery.stream_sequence
        self.log.warning("message %d on %s is a dead letter: %s", sequence, letter.where, letter.detail)
        try:
            await consumers.bury(
                self._connection,
                "user",
                letter.body,
                key=f"invalid.{delivery.stream.decode()}.{delivery.stored_ns}.{sequence}",
                reason=letter.reason,
                detail=letter.detail,
                origin_subject=letter.where,
                stream=delivery.stream.decode(),
                sequence=sequence,
                attempts=delivery.delivered,
            )
        except StreamUnavailable as error:
            self.log.warning("the dead letter waits for its redelivery: %s", error)
        else:
            if self._numbers is not None:
                self._numbers.buried(letter.reason)
            self._connection.ack(letter.reply, b"+TERM")

    async def _expire(self) -> None:
        """Forget what is older than the retention."""
        while True:
            try:
                gone = await self._store.expire(time.time_ns() - self._settings.retention_days * _DAY_NS)
                if gone:
                    self.log.info("%d notifications are past their retention", gone)
            except StoreUnavailable as error:
                self.log.warning("old notifications are deleted later: %s", error)
            await asyncio.sleep(_EXPIRE_EVERY_S)

    # Floors

    def _heard_floors(self, where: bytes, reply: bytes, header: bytes | None, body: bytes) -> None:
        if b'"' + self._id.encode() + b'"' not in body:
            self._others_announced = time.monotonic()

    async def _announce_floors(self) -> None:
        """Tell the gateways up to where everything is in the store; one agent's word is enough for all."""
        interval = self._settings.floor_interval_s
        while True:
            await self._resumed.wait()
            if time.monotonic() - self._others_announced >= interval:
                try:
                    await self._announce()
                except StreamUnavailable as error:
                    self.log.debug("no floors are announced: %s", error)
            # A pull that was refused (no consumer yet, a leader that moves) is tried again here.
            self._pull_where_none()
            self._broadcasts.pull_where_none()
            await asyncio.sleep(interval * (1 + 0.1 * secrets.randbelow(5)))

    async def _announce(self) -> None:
        found = self._topology
        parts = (*range(found.partitions), BROADCAST_PART)
        reached = await asyncio.gather(
            *(consumers.shared_progress(self._connection, notify_stream(part), INBOX) for part in parts)
        )
        if found is not self._topology:
            return
        floors = [one.floor for one in reached]
        if self._numbers is not None:
            # Broadcasts are the last part.
            self._numbers.learned(sum(one.lag for one in reached[:-1]), reached[-1].lag)
        incarnations = [found.beginning(part).incarnation for part in parts]
        body = {"agent": self._id, "incarnations": incarnations, "floors": floors}
        self._connection.send(subject.INBOX_FLOOR, orjson.dumps(body))
        await self._note(dict(zip(parts, map(Position, incarnations, floors), strict=True)))

    async def _note(self, floors: Mapping[int, Position]) -> None:
        """Keep the floors in the store as well, by which a log that lost its end is recognised."""
        moved = {part: at for part, at in floors.items() if at > self._noted.get(part, _NOWHERE)}
        if not moved:
            return
        try:
            await self._store.note_floors(moved)
        except StoreUnavailable as error:
            self.log.debug("%d floors are noted later: %s", len(moved), error)
        else:
            self._noted.update(moved)
