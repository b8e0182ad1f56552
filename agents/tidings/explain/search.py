"""Looking for one id in a mesh, within a time and a number of messages.

The log has no index of ids. Of a user it is one subject of one partition, which the stream finds by itself; without a
user it is everything that was stored since a time, which is read and counted, up to a limit. Nothing is changed, except
that a user's broadcasts are noted in the inbox, as whenever somebody looks.
"""

from __future__ import annotations

from collections.abc import AsyncGenerator
from contextlib import aclosing
from dataclasses import replace
from datetime import UTC, datetime
from typing import Final

from tidings.store.inbox import UserInbox
from tidings.store.port import Cursor, DeviceCursor, InboxItem, PageQuery, Store
from tidings.stream import consumers, letters, reading, records, topology
from tidings.stream.connection import Connection
from tidings.stream.consumers import Progress
from tidings.stream.reading import Message
from tidings.stream.topology import BROADCAST, DEAD, FANOUT, TOPICS, Topology, notify_stream
from tidings.wire import subject
from tidings.wire.errors import BadSubject, BadTopic, InvalidNotification
from tidings.wire.frames import Filter
from tidings.wire.notification import Envelope, check
from tidings.wire.position import BROADCAST as BROADCASTS
from tidings.wire.position import PERSONAL, Place, Plane, Position, parse
from tidings.wire.topic import patterns_of

from .story import DeviceState, InInbox, Looked, OnDevice, StoredAt, Story

__all__ = ["Search"]

_PAGE: Final = 200
_COPIES: Final = 20
"""Copies of one topic message that are told one by one."""
_FILTERS: Final[tuple[Filter, ...]] = ("all", "archived")
"""Two pages that have every row."""


class Search:
    """One search. `since` has a time zone; `most` bounds the messages and rows that are read."""

    def __init__(self, connection: Connection, store: Store, id: str, *, since: datetime, most: int) -> None:
        self._connection = connection
        self._store = store
        self._since = since
        self._left = most
        self._ages: dict[str, float] = {}
        self._topology: Topology
        self.story = Story(id, None, _text(since))

    async def of_user(self, user: str) -> Story:
        """How far it is with one user; raises `BadSubject`, `StreamUnavailable`, `StoreUnavailable`."""
        story, token = self.story, subject.escape(user)
        story.user = user
        self._topology = await topology.discover(self._connection)
        partition = subject.partition(token, self._topology.partitions)
        where = subject.part_user(token, partition)
        await self._look(notify_stream(partition), where, story.log, since=self._since)
        story.copies = len(story.log)
        floor = await records.broadcast_floor(self._connection)
        await self._look_into_inbox(user, floor)
        if not story.inbox:
            # What the inbox agents have not stored yet is in no inbox.
            await self._look(BROADCAST, subject.BROADCAST_WILDCARD, story.broadcasts, first=floor.sequence + 1)
            if story.broadcasts:
                story.broadcasts = await self._of_followed_topics(user, story.broadcasts)
        await self._look_at_letters(user)
        await self._look_at_devices(user, partition)
        topics = {found.topic for found in story.log} | {row.topic for row in story.inbox}
        for topic in sorted(topic for topic in topics if topic is not None):
            await self._look_at_topic(topic)
        if not (story.log or story.inbox or story.broadcasts):
            served = await self._connection.api(f"CONSUMER.INFO.{TOPICS}.{FANOUT}")
            first = served["ack_floor"]["stream_seq"] + 1
            await self._look(TOPICS, subject.TOPICS_WILDCARD, story.topics, first=first)
        return story

    async def of_anybody(self, topic: str | None) -> Story:
        """Where it is, of whomever: of a topic, or of all. Raises `BadTopic` and as `of_user`."""
        self._topology = await topology.discover(self._connection)
        if topic is not None:
            await self._look_at_topic(topic)
        else:
            await self._look(TOPICS, subject.TOPICS_WILDCARD, self.story.topics, since=self._since)
            await self._look(BROADCAST, subject.BROADCAST_WILDCARD, self.story.broadcasts, since=self._since)
        # A broadcast has no copies.
        if not self.story.broadcasts:
            for partition in range(self._topology.partitions):
                where = subject.part_wildcard(partition)
                await self._look(notify_stream(partition), where, self.story.log, since=self._since)
        await self._look_at_letters(None)
        return self.story

    async def _of_followed_topics(self, user: str, found: list[StoredAt]) -> list[StoredAt]:
        followed: set[str] = set()
        after: str | None = None
        while some := await self._store.subscriptions(user, after, _PAGE):
            followed.update(subscription.topic for subscription in some)
            after = some[-1].topic
        return [one for one in found if one.topic is not None and followed.intersection(patterns_of(one.topic))]

    # The log

    async def _look_at_topic(self, topic: str) -> None:
        await self._look(TOPICS, subject.notify_topic(topic), self.story.topics, since=self._since)
        await self._look(BROADCAST, subject.broadcast(topic), self.story.broadcasts, since=self._since)

    async def _look(
        self, stream: str, where: str, found: list[StoredAt], *, first: int = 1, since: datetime | None = None
    ) -> None:
        look = self._began(f"{stream} {where}" + (f" from {first} on" if since is None else ""), since)
        found_before = [(one.stream, one.sequence) for one in found]
        messages = reading.messages(self._connection, stream, where, first=first, since=since)
        async with aclosing(self._bounded(messages, look)) as some:
            async for message in some:
                envelope = _envelope(message.body)
                if envelope is None or envelope.id != self.story.id or (stream, message.sequence) in found_before:
                    continue
                if stream not in (TOPICS, BROADCAST):
                    self.story.copies += 1
                if len(found) < _COPIES:
                    found.append(await self._stored(stream, message, envelope))

    def _began(self, where: str, since: datetime | None) -> Looked:
        look = Looked(where, None if since is None else _text(since), 0)
        self.story.looked.append(look)
        return look

    async def _bounded(self, messages: AsyncGenerator[Message], look: Looked) -> AsyncGenerator[Message]:
        async with aclosing(messages):
            async for message in messages:
                if not self._left:
                    look.complete = False
                    return
                self._left -= 1
                look.messages += 1
                yield message

    async def _stored(self, stream: str, message: Message, envelope: Envelope) -> StoredAt:
        token = subject.token_of(message.where)
        return StoredAt(
            stream,
            message.sequence,
            self._position(stream, message.sequence),
            _named(token) if token else None,
            envelope.topic if token else _topic_of(message.where),
            envelope.type,
            message.stored,
            await self._until(stream, message.stored),
            message.headers.get("Nats-Msg-Id"),
        )

    def _position(self, stream: str, sequence: int) -> str | None:
        if stream == TOPICS:
            return None
        if stream == BROADCAST:
            return Position(self._topology.broadcast, sequence).text(BROADCASTS)
        return str(Position(self._topology.incarnations[int(stream.rpartition("_")[2])], sequence))

    async def _until(self, stream: str, stored: str) -> str | None:
        if stream not in self._ages:
            info = await self._connection.api(f"STREAM.INFO.{stream}")
            self._ages[stream] = info["config"]["max_age"] / 1e9
        age_s = self._ages[stream]
        end = datetime.fromisoformat(stored).timestamp() + age_s
        return _text(datetime.fromtimestamp(end, UTC)) if age_s else None

    # The inbox

    async def _look_into_inbox(self, user: str, floor: Position) -> None:
        """By its position where the log has it, else page by page, newest first."""
        inbox = UserInbox(self._store, lambda: floor)
        known = [Position.parse(found.pos) for found in self.story.log]
        for position in known:
            for filter_ in _FILTERS:
                before = Place(Position(position.incarnation, position.sequence + 1), Position(0, 0))
                page = await inbox.page(user, PageQuery(1, filter=filter_), before, None)
                for plane, item in page.items:
                    if (plane, item.position) == (PERSONAL, position):
                        self.story.inbox.append(_row(plane, item))
        if known:
            return
        for filter_ in _FILTERS:
            await self._page_through(inbox, user, filter_)

    async def _page_through(self, inbox: UserInbox, user: str, filter_: Filter) -> None:
        look = self._began(f"inbox of {user}, {'archived' if filter_ == 'archived' else 'not archived'}", self._since)
        oldest_ns = int(self._since.timestamp() * 1e9)
        before: Place | None = None
        while True:
            page = await inbox.page(user, PageQuery(_PAGE, filter=filter_), before, None)
            for plane, item in page.items:
                if item.stored_ns < oldest_ns:
                    return
                if not self._left:
                    look.complete = False
                    return
                self._left -= 1
                look.messages += 1
                envelope = _envelope(item.body)
                if envelope is not None and envelope.id == self.story.id:
                    self.story.inbox.append(_row(plane, item))
                    return
            before = page.next
            if before is None:
                return

    # Devices

    async def _look_at_devices(self, user: str, partition: int) -> None:
        story = self.story
        positions = [one.pos for one in (*story.log, *story.broadcasts)] + [row.pos for row in story.inbox]
        places = sorted({pos for pos in positions if pos is not None})
        if not places:
            return
        first = {(row.pos, row.delivered["device"]) for row in self.story.inbox if row.delivered}
        given_up = {letter["device"] for letter in self.story.dead}
        for known in sorted(await self._store.devices(user), key=lambda known: known.device):
            progress = None
            if known.holder is not None:
                progress = await consumers.progress(self._connection, partition, known.holder.session)
            for pos in places:
                one = _on_device(known, pos, progress)
                if (pos, known.device) in first:
                    one = replace(one, state="acknowledged")
                elif known.device in given_up:
                    one = replace(one, state="given_up")
                self.story.devices.append(one)

    # Dead letters

    async def _look_at_letters(self, user: str | None) -> None:
        look = self._began(DEAD, self._since)
        async with aclosing(letters.each(self._connection, letters.Filter(since=self._since))) as found:
            async for letter in found:
                if not self._left:
                    look.complete = False
                    return
                self._left -= 1
                look.messages += 1
                envelope = _envelope(letter.body)
                # One of a topic's is everybody's.
                if user is not None and letter.user not in (user, None):
                    continue
                if envelope is not None and envelope.id == self.story.id:
                    self.story.dead.append(letter.describe(body=False))


def _on_device(known: DeviceCursor, pos: str, progress: Progress | None) -> OnDevice:
    plane, position = parse(pos)
    cursor = known.cursor if plane == PERSONAL else known.cursor.broadcast
    # A session has no consumer of broadcasts: its gateway reads them for all.
    own = progress if plane == PERSONAL else None
    return OnDevice(
        known.device,
        pos,
        _state(cursor, position, own, online=known.holder is not None),
        0 if cursor is None else cursor.attempts.get(position, 0),
        None if known.holder is None else known.holder.session,
        None if known.holder is None else known.holder.gateway,
        None if own is None else own._asdict(),
    )


def _state(cursor: Cursor | None, position: Position, progress: Progress | None, *, online: bool) -> DeviceState:
    """By the cursor as it was last written, and by the consumer, which is never behind."""
    if cursor is not None and position in cursor.acked:
        return "acknowledged"
    if cursor is not None and position <= cursor.floor:
        return "past"
    if progress is not None and progress.begins <= position.sequence:
        if position.sequence <= progress.ack_floor:
            return "acknowledged"
        return "under_way" if position.sequence <= progress.delivered else "waiting"
    if not online:
        return "offline"
    return "under_way" if cursor is not None and position in cursor.attempts else "waiting"


def _row(plane: Plane, item: InboxItem) -> InInbox:
    envelope = _envelope(item.body)
    delivered = item.delivered
    return InInbox(
        item.position.text(plane),
        _text(datetime.fromtimestamp(item.stored_ns / 1e9, UTC)),
        None if envelope is None else envelope.type,
        None if envelope is None else envelope.topic,
        item.seen,
        item.read,
        item.archived,
        None
        if delivered is None
        else {
            "at": _text(datetime.fromtimestamp(delivered.at_ms / 1e3, UTC)),
            "device": delivered.device,
            "attempts": delivered.attempts,
        },
    )


def _envelope(body: bytes) -> Envelope | None:
    """None for what is no notification."""
    try:
        return check(body)
    except InvalidNotification:
        return None


def _named(token: str) -> str | None:
    try:
        return subject.unescape(token)
    except BadSubject:
        return None


def _topic_of(where: str) -> str | None:
    try:
        return subject.topic_of(where)
    except BadTopic:
        return None


def _text(moment: datetime) -> str:
    return moment.astimezone(UTC).isoformat(timespec="milliseconds").replace("+00:00", "Z")
