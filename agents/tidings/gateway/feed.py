"""The feed: what a gateway reads of the broadcasts, once for all its sessions.

One consumer in memory reads ``broadcast.>`` from where the gateway began, in the order of the stream and without a
hole: a delivery that is lost shows in the consumer's own sequence, and the next consumer begins behind the last one
seen. What came last is kept (`Feed.recent`), so that who leaves the feed for a while catches up without asking the
server.

A broadcast is encoded once, and written to the sessions that follow it in slices, a turn of the loop each: between two
of them the gateway does everything else.
"""

from __future__ import annotations

import asyncio
import logging
from collections import deque
from collections.abc import Iterator
from itertools import islice
from typing import TYPE_CHECKING, Final

from tidings.runtime.backoff import Backoff
from tidings.stream import consumers
from tidings.stream.topology import BROADCAST, BROADCAST_PART
from tidings.wire import frames, position, subject
from tidings.wire.errors import BadTopic, InvalidNotification, StreamUnavailable
from tidings.wire.notification import check
from tidings.wire.position import Position
from tidings.wire.topic import patterns_of

from .socket import encode

if TYPE_CHECKING:
    from tidings.telemetry.tracing import Span

    from .hub import Hub
    from .lane import Lane

__all__ = ["Feed", "Shared"]

_TRACED: Final = 16
"""Of a traced broadcast, deliveries that are traced: a span for each of thousands would be what takes the time."""
_SLICE: Final = 64
"""Sockets that a broadcast is written to in one turn of the loop: a millisecond or less."""
_BATCH: Final = 256
_PULL_AGAIN_S: Final = 1.0
_RECENT: Final = 4096
_RECENT_BYTES: Final = 32 * 1024 * 1024
_PATTERNS: Final = 10_000
"""Patterns whose followers are listed: those of the followed topics that were broadcast last."""

log = logging.getLogger("tidings.gateway")


class Shared:
    """One broadcast, for all sessions."""

    __slots__ = ("body", "frame", "patterns", "position", "span", "stored_ns", "text", "traces_left")

    def __init__(self, at: Position, topic: str, body: bytes, stored_ns: int) -> None:
        self.position = at
        self.text = at.text(position.BROADCAST)
        self.patterns = patterns_of(topic)
        self.body = body
        self.stored_ns = stored_ns
        self.frame = encode(frames.notifications([frames.notification_item(self.text, 1, body)]))
        """As it goes to who gets it for the first time."""
        self.span: Span | None = None
        """Where it is traced: of handing it out here."""
        self.traces_left = _TRACED
        """Devices whose delivery gets a span of its own."""


class Feed:
    """Reads `BROADCAST` and hands each message to the lanes of those who follow its topic."""

    def __init__(self, hub: Hub) -> None:
        self._hub = hub
        self.head = hub.topology.beginning(BROADCAST_PART)
        """Everything up to here was handed out, or is being handed out: who has read up to here may join."""
        self.done = self.head
        """Everything up to here was handed out to everybody."""
        self._read = self.head
        self.tail = self.head
        """`recent` has everything behind it."""
        self.recent: deque[Shared] = deque()
        self._recent_bytes = 0
        self.lanes: dict[Lane, None] = {}
        self.unacked: dict[Lane, float] = {}
        """Lanes with something under way, and some whose last was acknowledged a while ago. Nothing that is under way
        was sent before that time (seconds, by the loop's clock): until it is due, nobody looks at a lane."""
        self._followed: dict[str, int] = {}
        """By pattern: how many lanes follow it. Most topics that are broadcast nobody here follows."""
        self._followers: dict[str, dict[Lane, Position]] = {}
        """By pattern: who follows it, and behind which position that began."""
        self._queue: deque[Shared] = deque()
        self._current: Iterator[Lane] | None = None
        self._turning = False
        self.consumer = ""
        self._silent = 0
        """How often in a row the consumer's node did not say that it has it."""
        self._consumer_sequence = 0
        self._sent = 0
        """What the consumer had sent when it was last asked."""
        self._pulls = 0
        self._pull_left = 0
        self._lost = asyncio.Event()

    # The consumer

    async def start(self, floor: Position) -> None:
        """Begin behind the inbox floor: who connects first needs nothing older out of the stream."""
        self.head = self.done = self.tail = self._read = floor
        await self._make_consumer()

    async def _make_consumer(self) -> None:
        hub, name = self._hub, f"feed-{self._hub.gateway}-{self._pulls}"
        read = self._read
        _, begins_behind = await consumers.create_feed(
            hub.connection, name, start=read.sequence + 1, idle_s=hub.settings.consumer_idle_s
        )
        if self.consumer:
            consumers.delete(hub.connection, BROADCAST, self.consumer)
        if hub.numbers is not None:
            hub.numbers.consumers.of("feed").value += 1
        if begins_behind > read.sequence:
            # The stream has forgotten what lies between; whoever needs it gets it out of the inbox.
            self._restart(Position(read.incarnation, begins_behind))
        self.consumer, self._silent, self._consumer_sequence, self._sent = name, 0, 0, 0
        self.pull()

    def _restart(self, at: Position) -> None:
        """Nothing up to here is in memory: every lane catches up from where it is."""
        self.recent.clear()
        self._queue.clear()
        self._current, self._recent_bytes = None, 0
        self.head = self.done = self.tail = self._read = at
        for lane in self.lanes:
            lane.leave()

    def pull(self) -> None:
        self._pulls += 1
        self._pull_left = _BATCH
        hub = self._hub
        where = subject.gateway_feed(hub.gateway, self._pulls)
        consumers.pull(hub.connection, BROADCAST, self.consumer, where, batch=_BATCH, expires_ns=hub.pull_expires_ns)

    def pull_ended(self, number: int, status: int, description: bytes) -> None:
        """The server answered a pull with a status: it expired, or the consumer is gone."""
        if number != self._pulls:
            return
        if status in (404, 503) or (status == 409 and b"Deleted" in description):
            self.lost()
        elif status == 408:
            self.pull()
        else:
            asyncio.get_running_loop().call_later(_PULL_AGAIN_S, self._pull_again, number)

    def _pull_again(self, number: int) -> None:
        if number == self._pulls:
            self.pull()

    def lost(self) -> None:
        """The consumer is gone, or lost a delivery: there is a new one soon."""
        self._lost.set()

    async def mend(self) -> None:
        """A loop that replaces a lost consumer."""
        backoff = Backoff(0.1, 2.0)
        while True:
            await self._lost.wait()
            self._lost.clear()
            try:
                await self._make_consumer()
                backoff.reset()
            except StreamUnavailable as error:
                log.warning("broadcasts wait for a consumer: %s", error)
                await asyncio.sleep(backoff.next())
                self._lost.set()

    async def probe(self) -> None:
        """Ask for the consumer: its node may have lost it, or the last that it sent was lost on the way."""
        hub, name = self._hub, self.consumer
        try:
            sent = await consumers.delivered_to_feed(hub.connection, name, timeout_s=hub.settings.probe_interval_s)
        except StreamUnavailable as error:
            log.debug("the feed's consumer does not answer: %s", error)
            self._silent += 1
            # One lost answer is no lost node.
            if self._silent >= 2 and self.consumer == name:
                self.lost()
            return
        if self.consumer != name:
            return
        # What it had sent a while ago must be here by now.
        if sent is None or self._sent > self._consumer_sequence:
            self.lost()
        self._silent, self._sent = 0, sent or 0

    def anew(self) -> None:
        """The stream is another one, or goes on under a new incarnation: begin at its inbox floor."""
        self._restart(self._hub.floors[BROADCAST_PART])
        self.lost()

    def receive(self, where: bytes, reply: bytes, body: bytes) -> None:
        """One message of the consumer."""
        delivery = consumers.parse_reply(reply)
        if delivery.consumer != self.consumer.encode():
            return
        if delivery.consumer_sequence != self._consumer_sequence + 1:
            self.lost()
            return
        self._consumer_sequence += 1
        self._pull_left -= 1
        at = self._read = Position(self.head.incarnation, delivery.stream_sequence)
        try:
            topic = subject.topic_of(subject.readable(where))
            envelope = check(body)
        except (BadTopic, InvalidNotification) as error:
            # The inbox agent, which sees every message once, makes it a dead letter.
            log.debug("broadcast %d is skipped: %s", at.sequence, error)
        else:
            # Its topic is part of it: another one may have the same id, for other users.
            if not self._hub.recent.is_copy(subject.readable(where), envelope.id, at):
                shared = Shared(at, topic, body, delivery.stored_ns)
                if self._hub.tracing is not None and (parent := self._hub.tracing.sampled(body)) is not None:
                    shared.span = self._hub.tracing.start(
                        "receive broadcast.{topic}", "receive", parent=parent, template="broadcast.{topic}"
                    )
                self._queue.append(shared)
        if not self._turning:
            self._turning = True
            asyncio.get_running_loop().call_soon(self._turn)

    # To the lanes

    def _turn(self) -> None:
        """Write a slice; a broadcast is done before the next one begins."""
        room = _SLICE
        while room > 0:
            if self._current is None:
                if not self._queue:
                    break
                self._begin(self._queue[0])
            assert self._current is not None
            shared = self._queue[0]
            some = list(islice(self._current, room))
            sent = 0
            for lane in some:
                sent += lane.take(shared)
            if sent and self._hub.numbers is not None:
                trace = None if shared.span is None else self._hub.ids(shared.span)
                self._hub.numbers.handed_out(sent, shared.stored_ns, trace)
            if len(some) < room:
                self._current = None
                if shared.span is not None:
                    shared.span.end()
                self.done = self._queue.popleft().position
            room -= max(1, len(some))
        if self._queue:
            asyncio.get_running_loop().call_soon(self._turn)
            return
        self._turning = False
        if self._pull_left <= 0:
            self.pull()

    def _begin(self, shared: Shared) -> None:
        """From here on who joins has read this one: `recent` has it."""
        self._current = self._receivers(shared)
        self.recent.append(shared)
        self._recent_bytes += len(shared.body)
        while len(self.recent) > _RECENT or self._recent_bytes > _RECENT_BYTES:
            oldest = self.recent.popleft()
            self._recent_bytes -= len(oldest.body)
            self.tail = oldest.position
        self.head = shared.position

    def _receivers(self, shared: Shared) -> Iterator[Lane]:
        """Who follows it at this moment, each once. They are looked at as they are asked for, a slice at a time."""
        at = shared.position
        followed = [self._followers_of(pattern) for pattern in shared.patterns if pattern in self._followed]
        crowds = [list(crowd.items()) for crowd in followed]
        following = (lane for crowd in crowds for lane, since in crowd if at > since)
        return following if len(crowds) < 2 else iter(dict.fromkeys(following))

    def _followers_of(self, pattern: str) -> dict[Lane, Position]:
        """Who follows a pattern. Looked for when a topic is first broadcast: few that users follow ever are."""
        found = self._followers.pop(pattern, None)
        if found is None:
            found = {lane: lane.follows[pattern] for lane in self.lanes if pattern in lane.follows}
            while len(self._followers) >= _PATTERNS:
                del self._followers[next(iter(self._followers))]
        self._followers[pattern] = found
        return found

    def since(self, at: Position) -> Iterator[Shared]:
        """What is kept behind a position, oldest first."""
        skip = 0
        for shared in reversed(self.recent):
            if shared.position <= at:
                break
            skip += 1
        return islice(self.recent, len(self.recent) - skip, None)

    # Who follows

    def add(self, lane: Lane) -> None:
        self.lanes[lane] = None
        for pattern, since in lane.follows.items():
            self._followed[pattern] = self._followed.get(pattern, 0) + 1
            if pattern in self._followers:
                self._followers[pattern][lane] = since

    def remove(self, lane: Lane) -> None:
        if lane not in self.lanes:
            return
        del self.lanes[lane]
        self.unacked.pop(lane, None)
        for pattern in lane.follows:
            left = self._followed[pattern] - 1
            if left:
                self._followed[pattern] = left
                if pattern in self._followers:
                    del self._followers[pattern][lane]
            else:
                del self._followed[pattern]
                self._followers.pop(pattern, None)

    def refollow(self, lane: Lane, follows: dict[str, Position]) -> None:
        """The user follows other topics now."""
        since = self.unacked.get(lane)
        self.remove(lane)
        lane.follows = follows
        self.add(lane)
        if since is not None:
            self.unacked[lane] = since

    def repeat_unacked(self, before: float) -> None:
        """Send again what was not acknowledged since `before`."""
        for lane, since in list(self.unacked.items()):
            if since >= before:
                continue
            if lane.window.under_way:
                lane.repeat(before)
                self.unacked[lane] = min(entry.sent_at for entry in lane.window.under_way.values())
            else:
                del self.unacked[lane]
