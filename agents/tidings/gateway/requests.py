"""What a client asks of the store: its inbox (`inbox`, `mark`, `count`) and its topics (`sub`, `unsub`, `subs`)."""

from __future__ import annotations

import logging

from tidings.runtime.entitlement import Entitlement
from tidings.store.port import PageQuery
from tidings.wire import frames
from tidings.wire.errors import BadPosition, StoreUnavailable, StreamUnavailable, TooManySubscriptions
from tidings.wire.frames import InboxQuery, Mark, Request, Subscribe, Subscriptions, Unsubscribe
from tidings.wire.position import Position

from .hub import Hub
from .session import Session
from .socket import Socket

__all__ = ["Requests"]

log = logging.getLogger("tidings.gateway")


class Requests:
    """Answers one request at a time for each call; the caller bounds how many are under way."""

    def __init__(self, hub: Hub) -> None:
        self._hub = hub
        self._entitlement = Entitlement(hub.settings.subscribe_rules)

    async def answer(self, session: Session, socket: Socket, request: Request) -> None:
        """Do what is asked and answer on the socket that asked."""
        try:
            if isinstance(request, InboxQuery):
                socket.send(await self._inbox(session, request))
            elif isinstance(request, Mark):
                await self._mark(session, socket, request)
            elif isinstance(request, Subscribe):
                socket.send(await self._subscribe(session, request))
            elif isinstance(request, Unsubscribe):
                await self._hub.store.unsubscribe(session.user, request.topics)
                socket.send(frames.ok(request.ref))
            elif isinstance(request, Subscriptions):
                topics = await self._hub.store.subscriptions(session.user, request.after, request.limit)
                following = topics[-1] if len(topics) == request.limit else None
                socket.send(frames.ok(request.ref, topics=topics, next=following))
            else:
                socket.send(frames.ok(request.ref, unread=await self._hub.store.unread(session.user)))
        except (StoreUnavailable, StreamUnavailable) as error:
            log.warning("a request of session %s was not answered: %s", session.id, error)
            code, message = StoreUnavailable.code, "the inbox does not answer now: ask again later"
            socket.send(frames.error(code, message, request.ref))
        except (BadPosition, TooManySubscriptions) as error:
            socket.send(frames.error(error.code, str(error), request.ref))

    async def _subscribe(self, session: Session, request: Subscribe) -> bytes:
        """All of them or none. Answered when they are in force: fan-out agents ask the store for each message."""
        refused = self._entitlement.refused(session.user, request.topics)
        if refused:
            return frames.error("not_allowed", f"{refused[0]!r} is not open to this user", request.ref)
        await self._hub.store.subscribe(session.user, request.topics, self._hub.settings.subscriptions_max)
        return frames.ok(request.ref)

    async def _inbox(self, session: Session, query: InboxQuery) -> bytes:
        page = await self._hub.store.page(
            session.user,
            PageQuery(query.limit, query.before, query.after, query.filter, query.type, query.topic),
        )
        return frames.page(
            query.ref,
            (
                (str(item.position), item.seen, item.read, item.archived, item.delivered, item.body)
                for item in page.items
            ),
            None if page.next is None else str(page.next),
        )

    async def _mark(self, session: Session, socket: Socket, mark: Mark) -> None:
        store, user = self._hub.store, session.user
        told: list[bytes] = []
        done = frames.ok(mark.ref)
        if mark.positions is None:
            assert mark.as_ != "unread"
            upto = self._newest(session)
            await store.mark_all(user, upto, mark.as_)
            told.append(frames.state(None, mark.as_, str(upto)))
            done = frames.ok(mark.ref, upto=str(upto))
        elif mark.positions:
            if not await self._hub.is_real(session, max(mark.positions)):
                raise BadPosition(f"{max(mark.positions)} is a position that this mesh has not handed out yet")
            await store.mark(user, mark.positions, mark.as_)
            told.append(frames.state([str(position) for position in mark.positions], mark.as_))
        socket.send(done)
        # The device that asked knows its own mark; the badge is news to all.
        try:
            badge = frames.count(await store.unread(user))
            await self._hub.tell_user(user, [*told, badge], but=session)
        except StoreUnavailable as error:
            # The mark is made and was answered; what remains are courtesies.
            self._hub.tell_here(user, told, but=session)
            log.warning("the devices of session %s's user were not all told of a mark: %s", session.id, error)
        else:
            socket.send(badge)

    def _newest(self, session: Session) -> Position:
        """Nothing above it can have been shown to the user by this session or the inbox."""
        return max(session.window.last, self._hub.floors[session.partition])
