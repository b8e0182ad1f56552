"""What a gateway does by the clock: writes cursors, mends consumers, looks after silent and lingering sessions.

A few loops serve all sessions; none of them is a session's own.
"""

from __future__ import annotations

import asyncio
import logging
import time
from itertools import islice

from tidings.runtime.backoff import Backoff
from tidings.runtime.memory import give_back, resident_bytes
from tidings.store.port import Delivered, DeliveredMark
from tidings.stream import consumers
from tidings.wire import codes
from tidings.wire.errors import StoreUnavailable, StreamUnavailable

from .hub import Hub
from .opening import Opener
from .session import Session, SessionState
from .window import Entry

__all__ = ["Keeper"]

_SLICE = 500
"""Cursors of one write."""
_LOOK_S = 1.0
_SLOW_BYTES = 65_536
"""Who leaves more than that unread while memory is short is closed."""

log = logging.getLogger("tidings.gateway")


class Keeper:
    """The periodic work of a hub. Each method is a loop that runs until it is cancelled."""

    def __init__(self, hub: Hub, opener: Opener) -> None:
        self._hub = hub
        self._opener = opener
        self._flushing = asyncio.Lock()

    # Cursors

    async def write_cursors(self) -> None:
        claimed: list[Session] = []
        while True:
            await asyncio.sleep(self._hub.settings.cursor_flush_s)
            # Two gateways that claimed a device in the same moment may both have it: a write tells the older one, also
            # where nothing is delivered.
            for session in claimed:
                if not session.has_ended():
                    self._hub.cursor_moved(session)
            claimed, self._hub.claimed = self._hub.claimed, []
            await self.flush()
            if self._hub.blind:
                await self._end_blindness()

    async def flush(self) -> None:
        """Write every cursor that moved, and the last ones of sessions that ended; one after the other."""
        async with self._flushing:
            await self._flush()

    async def _flush(self) -> None:
        hub = self._hub
        while hub.moved or hub.released:
            released = list(islice(hub.released.values(), _SLICE))
            moved = list(islice(hub.moved, _SLICE - len(released)))
            for session in moved:
                del hub.moved[session]
            updates = released + [hub.update(session) for session in moved]
            try:
                lost = await hub.store.save(updates)
            except StoreUnavailable as error:
                hub.moved.update((session, None) for session in moved if not session.has_ended())
                log.warning("%d cursors wait for the store: %s", len(hub.moved) + len(hub.released), error)
                return
            for update in released:
                # A newer session of the device may have ended while this was written.
                if hub.released.get((update.user, update.device)) is update:
                    del hub.released[update.user, update.device]
            for holder, now in lost:
                session_lost = hub.by_id.get(holder.session)
                if session_lost is None:
                    continue
                if now is None:
                    log.info("session %s has its device no longer: its user was erased", session_lost.id)
                    hub.close_socket(session_lost, codes.RESTART, hub.bye(2000))
                    hub.end(session_lost, keep_cursor=False)
                else:
                    log.info("session %s was replaced on another gateway", session_lost.id)
                    hub.replaced(session_lost)

    async def write_notes(self) -> None:
        """Note in the inbox what was delivered, when and where: an audit, which no delivery waits for."""
        hub = self._hub
        while hub.notes is not None:
            await asyncio.sleep(hub.settings.cursor_flush_s)
            await self.flush_notes()

    async def flush_notes(self) -> None:
        notes = self._hub.notes
        while notes:
            some = [notes.popleft() for _ in range(min(_SLICE, len(notes)))]
            try:
                await self._hub.store.delivered([_mark(*note) for note in some])
            except StoreUnavailable as error:
                notes.extendleft(reversed(some))
                log.warning("%d delivery marks wait for the store: %s", len(notes), error)
                return

    async def _end_blindness(self) -> None:
        """The store answers again: sessions that began without it come back through the front door."""
        hub = self._hub
        try:
            await hub.store.check()
        except StoreUnavailable:
            return
        for session in list(hub.blind):
            if session.state is not SessionState.STARTING:
                hub.close_socket(session, codes.RESTART, hub.bye(2000))
                hub.end(session)

    # Time

    async def keep_time(self) -> None:
        """Four times a second: heartbeats, lingering, tokens that end, what the inbox part of a catch-up waits for."""
        hub = self._hub
        tick = min(0.25, hub.settings.heartbeat_s / 4, max(0.05, hub.settings.linger_s / 4))
        owed = look_at = 0.0
        while True:
            await asyncio.sleep(tick)
            now = hub.now()
            while hub.lingering and hub.lingering[0][0] + hub.settings.linger_s <= now:
                since, session = hub.lingering.popleft()
                if session.state is SessionState.LINGERING and session.waiting_since == since:
                    hub.end(session)
            for session in hub.expiries.due(time.time()):
                hub.expire(session)
            owed += len(hub.heartbeats) * tick / hub.settings.heartbeat_s
            while owed >= 1 and hub.heartbeats:
                owed -= 1
                self._heartbeat(hub.heartbeats.popleft())
            for session in list(hub.replaying):
                session.repeat_replayed(now - hub.settings.ack_wait_s)
            if now >= look_at:
                look_at = now + hub.settings.ack_wait_s / 8
                hub.feed.repeat_unacked(now - hub.settings.ack_wait_s)

    def _heartbeat(self, session: Session) -> None:
        """Ping who was silent since the last look, drop who was silent since the last ping."""
        socket = session.socket
        if socket is None:
            session.beating = False
            return
        self._hub.heartbeats.append(session)
        if session.lane is not None and session.lane.moved:
            # Once a round: a broadcast moves the cursors of all who follow it.
            session.lane.moved = False
            self._hub.cursor_moved(session)
        if socket.heard:
            socket.heard = False
        elif socket.pinged:
            log.info("session %s does not answer: its socket is dropped", session.id)
            socket.abort()
        else:
            socket.ping()

    # Memory

    async def watch_memory(self) -> None:
        """While the process has more memory than it may: no new sessions, and who does not read is closed first."""
        hub, most = self._hub, self._hub.settings.memory_max_bytes
        while most:
            used = resident_bytes()
            if used is None:
                log.warning("this system does not say how much memory a process has: memory_max_bytes has no effect")
                return
            if (used > most) != hub.overloaded:
                hub.overloaded = used > most
                log.warning("%d MB of %d MB are used: %s", used >> 20, most >> 20, _CONSEQUENCE[hub.overloaded])
            if hub.overloaded:
                self._close_slow(used - most)
                give_back()
            await asyncio.sleep(_LOOK_S)

    def _close_slow(self, excess: int) -> None:
        hub = self._hub
        sessions = [(session.unread_bytes, session) for session in hub.by_id.values()]
        slow = sorted((one for one in sessions if one[0] > _SLOW_BYTES), key=lambda one: one[0], reverse=True)
        for size, session in slow:
            if excess <= 0:
                break
            log.info("session %s leaves %d bytes unread while memory is short: closed", session.id, size)
            hub.close_socket(session, codes.TOO_SLOW)
            excess -= size

    # Consumers

    async def mend(self) -> None:
        """Give sessions whose consumer is gone another one, `consumer_starts` at a time."""
        hub = self._hub
        backoff = Backoff(0.1, 2.0)
        while True:
            await hub.broken_event.wait()
            hub.broken_event.clear()
            while hub.broken:
                some = list(islice(hub.broken, hub.settings.consumer_starts))
                for session in some:
                    del hub.broken[session]
                results = await asyncio.gather(*map(self._mend_one, some))
                if all(results):
                    backoff.reset()
                else:
                    await asyncio.sleep(backoff.next())

    async def _mend_one(self, session: Session) -> bool:
        if session.state not in (SessionState.LIVE, SessionState.LINGERING):
            return True
        try:
            await self._opener.remake_consumer(session)
        except StreamUnavailable as error:
            log.debug("session %s still has no consumer: %s", session.id, error)
            self._hub.lost(session)
            return False
        return True

    async def probe(self) -> None:
        """Ask each node for one of the consumers it holds: a node that lost them does not tell by itself.

        A consumer in memory goes with its node, and its waiting pull goes silently (measured: no status, no
        advisory to the reply subject).
        """
        hub = self._hub
        silent: dict[str, int] = {}
        while True:
            await asyncio.sleep(hub.settings.probe_interval_s)
            if not hub.connection.is_connected:
                continue
            by_node: dict[str, Session] = {}
            for session in islice(hub.by_consumer.values(), 4 * hub.settings.consumer_starts):
                by_node.setdefault(session.node, session)
            await hub.feed.probe()
            verdicts = await asyncio.gather(*(self._node_lives(session) for session in by_node.values()))
            for node, lives in zip(by_node, verdicts, strict=True):
                silent[node] = 0 if lives else silent.get(node, 0) + 1
                # One lost answer is no lost node; a consumer that is gone for certain is counted as two.
                if lives is None or silent[node] >= 2:
                    silent[node] = 0
                    self._node_lost(node)

    async def _node_lives(self, session: Session) -> bool | None:
        """True: it answers; False: it does not; None: it answers, and the consumer is gone."""
        hub, name = self._hub, session.consumer
        try:
            node = await consumers.leader(
                hub.connection, session.partition, name, timeout_s=hub.settings.probe_interval_s
            )
        except StreamUnavailable:
            return False
        if node is None and session.consumer == name and not session.has_ended():
            return None
        return True

    def _node_lost(self, node: str) -> None:
        hub = self._hub
        gone = [session for session in hub.by_consumer.values() if session.node == node]
        log.warning("NATS node %s lost its consumers: %d sessions get new ones", node or "(alone)", len(gone))
        for session in gone:
            hub.lost(session)


_CONSEQUENCE = {True: "no new sessions", False: "new sessions again"}


def _mark(user: str, device: str, entry: Entry, at: float) -> DeliveredMark:
    stored_ns = consumers.parse_reply(entry.reply).stored_ns if entry.reply is not None else entry.stored_ns
    assert stored_ns is not None
    return DeliveredMark(user, entry.position, stored_ns, Delivered(int(at * 1000), device, entry.attempts))
