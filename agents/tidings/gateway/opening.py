"""Opening a session: from a device's cursor to the first notification, without a hole.

1. The store makes this session the device's holder, atomically, and says who held it before.
2. Another gateway that held it is asked for its newer cursor and ends its session; no answer means that the
   stored row is the truth.
3. The consumer starts at max(cursor, inbox floor) + 1. What lies between cursor and floor is in the store (that is
   what the floor means) and is sent first; JetStream is not asked for anything until it is, so the order holds and
   the stream is the buffer. Past the cap the client gets a `gap` instead, and its cursor stays until it has noted it.
4. `welcome` goes out when the consumer exists: from there on nothing is missed.

While the store is down a session is *blind*: it starts from the client's `since`, or from the stream's last
minutes, says so with a `gap` of unknown size, writes no cursor, and is asked to reconnect when the store is back,
which repairs the rest.
"""

from __future__ import annotations

import asyncio
import logging
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from typing import Any

import orjson

from tidings.store.port import Claimed, Cursor, CursorUpdate, Holder
from tidings.stream import consumers
from tidings.wire import codes, frames, subject
from tidings.wire.errors import BadPosition, StoreUnavailable, StreamUnavailable
from tidings.wire.position import Position

from .hub import Hub, new_id
from .session import Session, SessionState
from .window import Window

__all__ = ["Opener", "Plan", "cursor_from_json", "cursor_to_json", "give_up"]

_PAGE = 64
_BEGINNING = Position(0, 0)

log = logging.getLogger("tidings.gateway")


def cursor_to_json(cursor: Cursor | None) -> bytes:
    """The answer to a claim."""
    return orjson.dumps({"cursor": _told(cursor)})


def _told(cursor: Cursor | None) -> dict[str, Any] | None:
    if cursor is None:
        return None
    return {
        "floor": str(cursor.floor),
        "acked": [str(position) for position in cursor.acked],
        "attempts": {str(position): count for position, count in cursor.attempts.items()},
        "broadcast": _told(cursor.broadcast),
    }


def cursor_from_json(answer: bytes) -> Cursor | None:
    """Read `cursor_to_json`'s text; raises `BadPosition` or `ValueError` for anything else."""
    return _heard(orjson.loads(answer)["cursor"])


def _heard(told: dict[str, Any] | None) -> Cursor | None:
    if told is None:
        return None
    return Cursor(
        Position.parse(told["floor"]),
        frozenset(Position.parse(text) for text in told["acked"]),
        {Position.parse(text): int(count) for text, count in told["attempts"].items()},
        # A gateway of an older version says nothing of it.
        _heard(told.get("broadcast")),
    )


@dataclass(slots=True)
class Plan:
    """What a started session sends first: `missed` notifications up to `upto`, or a gap of that size."""

    missed: int | None
    """None: an unknown number."""
    upto: Position


def give_up(hub: Hub, request: bytes) -> bytes:
    """Answer another gateway's claim: end the session, with its client if it has one, and tell its cursor."""
    try:
        asked = orjson.loads(request)
        key, id = (asked["user"], asked["device"]), asked["session"]
    except (orjson.JSONDecodeError, KeyError, TypeError) as error:
        log.warning("a claim cannot be read: %s", error)
        return cursor_to_json(None)
    ended = hub.released.pop(key, None)
    if ended is not None and ended.holder.session == id:
        return cursor_to_json(ended.cursor)
    session = hub.by_id.get(id)
    if session is None:
        return cursor_to_json(None)
    known = session.state is not SessionState.STARTING and not session.blind
    cursor = session.cursor() if known else None
    hub.replaced(session)
    return cursor_to_json(cursor)


class Opener:
    """Starts sessions and runs their catch-up."""

    def __init__(self, hub: Hub) -> None:
        self._hub = hub

    async def start(self, session: Session, window: int, since: Position | None) -> Plan:
        """Bring a new session up to its consumer. Raises `StreamUnavailable` when that cannot be."""
        hub = self._hub
        floor = hub.floors[session.partition]
        # Before the claim: the write of this cursor may be refused while the claim is answered, and forgotten then.
        ended = hub.released.get((session.user, session.device))
        try:
            claimed = await hub.store.claim(session.user, session.device, Holder(hub.gateway, session.id), floor)
        except StoreUnavailable as error:
            log.warning("session %s starts without its cursor: %s", session.id, error)
            return await self._start_blind(session, window, since)
        cursor = await self._newest(session, claimed, ended)
        if claimed.lost:
            log.info("session %s was replaced while it was opened", session.id)
            hub.replaced(session)
        if session.has_ended():
            return Plan(0, floor)
        tells = since is not None and (claimed.first or since > cursor.floor) and await hub.is_real(session, since)
        if since is not None and tells:
            # Also of a device that was never seen: the store has lost it, and its own word is all there is.
            cursor = Cursor(since) if claimed.first else _raised(cursor, since)
        elif claimed.first:
            now = await consumers.last_sequence(hub.connection, session.partition)
            cursor = Cursor(max(floor, Position(session.incarnation, now)))
        broadcast = cursor.broadcast
        if broadcast is None:
            # Of a device that is new here nothing was missed; of another one, what its user follows says from when.
            broadcast = Cursor(hub.feed.done if claimed.first and not tells else _BEGINNING)
        real = await hub.is_real(session, cursor.floor)
        if not real:
            log.warning("the cursor of session %s is ahead of its stream: was it restored or recreated?", session.id)
            cursor = Cursor(floor)
        session.window = Window(cursor, window)
        start = max(cursor.floor, floor).sequence + 1
        begins_behind, missed, _ = await asyncio.gather(
            self._make_consumer(session, start),
            self._count_missed(session, cursor.floor, floor),
            self._open_lane(session, broadcast),
        )
        if begins_behind >= start:
            # The floor was heard long ago: the stream has forgotten what lies above it, and the store has it.
            floor = Position(session.incarnation, begins_behind)
            missed = await self._count_missed(session, cursor.floor, floor)
        hub.claimed.append(session)
        return Plan(missed if real else None, floor)

    async def _start_blind(self, session: Session, window: int, since: Position | None) -> Plan:
        hub = self._hub
        hub.make_blind(session)
        beginning = Position(session.incarnation, 0)
        if since is not None and beginning < since and await hub.is_real(session, since):
            session.window = Window(Cursor(since), window)
            await self._make_consumer(session, since.sequence + 1)
        else:
            session.window = Window(Cursor(beginning), window)
            await self._make_consumer(session, None)
        return Plan(None, beginning)

    async def _newest(self, session: Session, claimed: Claimed, ended: CursorUpdate | None) -> Cursor:
        """The device's cursor: from the gateway that had it a moment ago, else from the store."""
        hub, previous = self._hub, claimed.previous
        if previous is None:
            return claimed.cursor
        if previous.gateway == hub.gateway:
            ended = hub.released.pop((session.user, session.device), ended)
            if ended is not None and ended.holder == previous and ended.cursor.floor >= claimed.cursor.floor:
                return ended.cursor
            return claimed.cursor
        request = {"user": session.user, "device": session.device, "session": previous.session}
        try:
            answer = await hub.connection.ask(
                subject.gateway_claim(previous.gateway),
                orjson.dumps(request),
                timeout_s=hub.settings.claim_timeout_ms / 1000,
            )
            told = cursor_from_json(answer)
        except StreamUnavailable:
            return claimed.cursor
        except (BadPosition, ValueError, KeyError, TypeError) as error:
            log.warning("gateway %s answered a claim with what is no cursor: %s", previous.gateway, error)
            return claimed.cursor
        return told if told is not None and told.floor >= claimed.cursor.floor else claimed.cursor

    async def _count_missed(self, session: Session, after: Position, upto: Position) -> int | None:
        if after >= upto:
            return 0
        try:
            return await self._hub.store.missed(session.user, after, upto)
        except StoreUnavailable as error:
            log.warning("session %s cannot catch up from the inbox: %s", session.id, error)
            self._hub.make_blind(session)
            return None

    async def _open_lane(self, session: Session, cursor: Cursor) -> None:
        try:
            await self._hub.follows.open(session, cursor)
        except StoreUnavailable as error:
            log.warning("it is not known what the user of session %s follows: %s", session.id, error)
            self._hub.make_blind(session)

    async def _make_consumer(self, session: Session, start: int | None) -> int:
        """From a sequence, or (None) from as far back as the overlap reaches; returns behind which it begins."""
        settings, name = self._hub.settings, consumers.session_consumer(session.id, new_id(4))
        session.start_at = start or 0
        node, begins_behind = await consumers.create_session(
            self._hub.connection,
            session.partition,
            name,
            session.token,
            start=start,
            start_time=datetime.now(UTC) - timedelta(seconds=settings.overlap_s),
            window=session.window.size,
            ack_wait_s=settings.ack_wait_s,
            idle_s=settings.consumer_idle_s,
        )
        if self._hub.numbers is not None:
            self._hub.numbers.consumers.of("mend" if session.consumer else "start").value += 1
        if session.has_ended():
            self._hub.deletions.add(session.stream, name)
        else:
            self._hub.adopt_consumer(session, name, node)
        return begins_behind

    async def remake_consumer(self, session: Session) -> None:
        """Another consumer for a session that lost its own, from the first message that JetStream owes it."""
        window = session.window
        owed = [entry.position.sequence for entry in window.under_way.values() if entry.reply is not None]
        seen = window.last.sequence if window.last.incarnation == session.incarnation else 0
        start = min(owed, default=max(session.start_at, seen + 1))
        # A blind session that has seen nothing began at a time, not at a sequence.
        timed = session.blind and start <= 1
        # Not one of the hub's deletions: a node that is gone answers none, and those of others would wait for it.
        consumers.delete(self._hub.connection, session.stream, session.consumer)
        begins_behind = await self._make_consumer(session, None if timed else start)
        if session.has_ended():
            return
        if not timed and begins_behind >= start:
            # The stream has forgotten what this session was owed: a new one gets it out of the inbox.
            self._hub.close_socket(session, codes.RESTART, self._hub.bye(2000))
            self._hub.end(session)
        else:
            session.pull()

    async def catch_up(self, session: Session, upto: Position) -> None:
        """Send what lies between cursor and inbox floor, as the window allows; then let the stream go on."""
        hub = self._hub
        after = session.window.last
        while not session.has_ended() and after < upto:
            limit = min(session.window.room, _PAGE)
            if not limit:
                await hub.wait_for_room(session)
                continue
            try:
                rows = await hub.store.between(session.user, after, upto, limit)
            except StoreUnavailable as error:
                log.warning("the catch-up of session %s stops: %s", session.id, error)
                hub.make_blind(session)
                if session.socket is not None:
                    session.socket.send(frames.gap(None, None))
                break
            if session.has_ended():
                return
            for row in rows:
                session.replay(row.position, row.body, row.stored_ns)
                after = row.position
            if len(rows) < limit:
                break
        if not session.has_ended():
            session.go_live()


def _raised(cursor: Cursor, floor: Position) -> Cursor:
    return Cursor(
        floor,
        frozenset(position for position in cursor.acked if position > floor),
        {position: count for position, count in cursor.attempts.items() if position > floor},
        cursor.broadcast,
    )
