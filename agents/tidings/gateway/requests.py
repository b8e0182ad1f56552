"""What a client asks of the store: its inbox (`inbox`, `mark`, `count`) and its topics (`sub`, `unsub`, `subs`)."""

from __future__ import annotations

import logging
from collections.abc import Sequence

from tidings.identity.entitlement import TopicEntitlement
from tidings.store.port import PageQuery
from tidings.stream import consumers
from tidings.stream.topology import BROADCAST_PART
from tidings.wire import frames
from tidings.wire.errors import (
    BadPosition,
    EntitlementUnavailable,
    StoreUnavailable,
    StreamUnavailable,
    TooManySubscriptions,
)
from tidings.wire.frames import InboxQuery, Mark, Request, Subscribe, Subscriptions, Unsubscribe
from tidings.wire.position import PERSONAL, Place, Plane, Position

from .hub import Hub
from .session import Session
from .socket import Socket

__all__ = ["Requests"]

log = logging.getLogger("tidings.gateway")


class Requests:
    """Answers one request at a time for each call; the caller bounds how many are under way."""

    def __init__(self, hub: Hub, entitlement: TopicEntitlement) -> None:
        self._hub = hub
        self._entitlement = entitlement

    async def answer(self, session: Session, socket: Socket, request: Request) -> None:
        """Do what is asked and answer on the socket that asked."""
        try:
            if isinstance(request, InboxQuery):
                await self._inbox(session, socket, request)
            elif isinstance(request, Mark):
                await self._mark(session, socket, request)
            elif isinstance(request, Subscribe):
                socket.send(await self._subscribe(session, request))
            elif isinstance(request, Unsubscribe):
                socket.send(await self._unsubscribe(session, request))
            elif isinstance(request, Subscriptions):
                found = await self._hub.store.subscriptions(session.user, request.after, request.limit)
                topics = [one.topic for one in found]
                following = topics[-1] if len(topics) == request.limit else None
                socket.send(frames.ok(request.ref, topics=topics, next=following))
            else:
                socket.send(frames.ok(request.ref, unread=await self._hub.inbox.unread(session.user)))
        except (StoreUnavailable, StreamUnavailable) as error:
            log.warning("a request of session %s was not answered: %s", session.id, error)
            code, message = StoreUnavailable.code, "the inbox does not answer now: ask again later"
            socket.send(frames.error(code, message, request.ref))
        except (BadPosition, EntitlementUnavailable, TooManySubscriptions) as error:
            socket.send(frames.error(error.code, str(error), request.ref))

    async def _subscribe(self, session: Session, request: Subscribe) -> bytes:
        """All of them or none. Answered when they are in force: fan-out agents ask the store for each message, and
        every gateway that has a device of the user knows."""
        refused = await self._entitlement.refused(session.user, request.topics)
        if refused:
            return frames.error("not_allowed", f"{refused[0]!r} is not open to this user", request.ref)
        hub = self._hub
        # Before it is stored: what is broadcast from here on is the user's.
        since = await self._last_broadcast()
        await hub.store.subscribe(session.user, request.topics, hub.settings.subscriptions_max, since)
        await hub.follows.changed(session.user)
        return frames.ok(request.ref)

    async def _unsubscribe(self, session: Session, request: Unsubscribe) -> bytes:
        hub = self._hub
        await hub.store.unsubscribe(session.user, request.topics, await self._last_broadcast())
        await hub.follows.changed(session.user)
        return frames.ok(request.ref)

    async def _last_broadcast(self) -> Position:
        hub = self._hub
        last = await consumers.last_sequence(hub.connection, BROADCAST_PART)
        return Position(hub.topology.broadcast, last)

    async def _inbox(self, session: Session, socket: Socket, query: InboxQuery) -> None:
        """A page has up to 3 MB: none is asked of the store for a client that has not read those before it, so that at
        most one of them waits beyond `write_buffer_bytes`."""
        hub = self._hub
        async with socket.paging:
            if socket.congested():
                hub.congested(session)
                if not await socket.drained(hub.settings.write_stall_s):
                    message = "answers wait that were not read: read them first"
                    socket.send(frames.error("too_many_requests", message, query.ref))
                    return
            if not socket.open:
                return
            page = await hub.inbox.page(
                session.user,
                PageQuery(query.limit, filter=query.filter, type=query.type, topic=query.topic),
                query.before,
                query.after,
            )
            socket.send(frames.page(query.ref, page.rows(), None if page.next is None else str(page.next)))

    async def _mark(self, session: Session, socket: Socket, mark: Mark) -> None:
        inbox, user = self._hub.inbox, session.user
        told: list[bytes] = []
        done = frames.ok(mark.ref)
        if mark.positions is None:
            assert mark.as_ != "unread"
            upto = self._newest(session)
            await inbox.mark_all(user, upto, mark.as_)
            told.append(frames.state(None, mark.as_, str(upto)))
            done = frames.ok(mark.ref, upto=str(upto))
        elif mark.positions:
            await self._check_real(session, mark.positions)
            await inbox.mark(user, mark.positions, mark.as_)
            told.append(frames.state([position.text(plane) for plane, position in mark.positions], mark.as_))
        socket.send(done)
        # The device that asked knows its own mark; the badge is news to all.
        try:
            badge = frames.count(await inbox.unread(user))
            await self._hub.tell_user(user, [*told, badge], but=session)
        except StoreUnavailable as error:
            # The mark is made and was answered; what remains are courtesies.
            self._hub.tell_here(user, told, but=session)
            log.warning("the devices of session %s's user were not all told of a mark: %s", session.id, error)
        else:
            socket.send(badge)

    async def _check_real(self, session: Session, positions: Sequence[tuple[Plane, Position]]) -> None:
        hub = self._hub
        highest: dict[Plane, Position] = {}
        for plane, position in positions:
            highest[plane] = max(position, highest.get(plane, position))
        for plane, position in highest.items():
            real = hub.is_real(session, position) if plane == PERSONAL else hub.is_real_broadcast(position)
            if not await real:
                raise BadPosition(f"{position.text(plane)} is a position that this mesh has not handed out yet")

    def _newest(self, session: Session) -> Place:
        """Nothing above it can have been shown to the user by this session or the inbox."""
        hub = self._hub
        broadcast = max(hub.feed.head, hub.floors[BROADCAST_PART])
        return Place(max(session.window.last, hub.floors[session.partition]), broadcast if broadcast.sequence else None)
