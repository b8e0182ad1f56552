"""A user's inbox: pages, marks and the count, as devices have them over the WebSocket."""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from typing import Final, TypeVar

from aiohttp import web

from tidings.store.port import PageQuery
from tidings.stream import gateways
from tidings.stream.topology import BROADCAST_PART
from tidings.wire import frames
from tidings.wire.errors import BadPosition, StoreUnavailable
from tidings.wire.frames import FILTERS, MARKS, MAX_PAGE, MAX_POSITIONS, MarkAs
from tidings.wire.pointer import pointer_to
from tidings.wire.position import Place, Plane, Position, parse

from .answers import answer, json_bytes
from .backing import Backing
from .bodies import choice, json_body, listed, members, parameters, text, whole_number
from .gate import Call
from .problems import Refused, located

__all__ = ["Inbox"]

_DEFAULT_PAGE: Final = 50
_MAX_NAME: Final = 256
_Read = TypeVar("_Read")

log = logging.getLogger("tidings.api")


class Inbox:
    """The handlers."""

    def __init__(self, backing: Backing) -> None:
        self._backing = backing

    async def page(self, call: Call) -> web.Response:
        """One page, newest first; ``after`` turns it round."""
        given = parameters(call.request, "before", "after", "limit", "filter", "type", "topic")
        before, after = _place(given, "before"), _place(given, "after")
        if before is not None and after is not None:
            raise Refused("bad_parameter", "give one of `before` and `after`", parameter="after")
        chosen = given.get("filter", "all")
        filter_ = next((one for one in FILTERS if one == chosen), None)
        if filter_ is None:
            raise Refused("bad_parameter", f"`filter` must be one of {', '.join(FILTERS)}", parameter="filter")
        query = PageQuery(
            whole_number(given, "limit", 1, MAX_PAGE, _DEFAULT_PAGE),
            filter=filter_,
            type=_name(given, "type"),
            topic=_name(given, "topic"),
        )
        page = await self._backing.inbox.page(call.user, query, before, after)
        next_ = None if page.next is None else str(page.next)
        return json_bytes(b"{%b}" % frames.page_members(page.rows(), next_))

    async def unread(self, call: Call) -> web.Response:
        """The count; 100 means more than 99."""
        parameters(call.request)
        return answer({"unread": await self._backing.inbox.unread(call.user)})

    async def mark(self, call: Call) -> web.Response:
        """Mark some or all; the user's devices that are online are told."""
        parameters(call.request)
        given = members(await json_body(call.request, self._backing.settings), (), required=("as", "pos"))
        as_ = choice(given["as"], ("as",), MARKS)
        if given["pos"] == "all":
            told, upto = await self._mark_all(call.user, as_)
        else:
            told, upto = await self._mark_some(call.user, as_, given["pos"]), None
        return answer({"upto": upto, "unread": await self._tell(call.user, told)})

    async def _mark_all(self, user: str, as_: MarkAs) -> tuple[bytes, str]:
        """All that the log has now: nothing that is shown to anybody lies above it."""
        if as_ == "unread":
            raise Refused(
                "invalid_body",
                "`unread` takes positions: all at once can be `seen`, `read` or `archived`",
                pointer="/as",
            )
        backing = self._backing
        broadcast = await backing.end(BROADCAST_PART)
        upto = Place(await backing.end(backing.partition(user)), broadcast if broadcast.sequence else None)
        await backing.inbox.mark_all(user, upto, as_)
        return frames.state(None, as_, str(upto)), str(upto)

    async def _mark_some(self, user: str, as_: MarkAs, given: object) -> bytes:
        positions = []
        for number, one in enumerate(listed(given, ("pos",), MAX_POSITIONS)):
            with located(("pos", number)):
                positions.append(parse(text(one, ("pos", number))))
        await self._check_real(user, positions)
        await self._backing.inbox.mark(user, positions, as_)
        return frames.state([position.text(plane) for plane, position in positions], as_)

    async def _check_real(self, user: str, positions: Sequence[tuple[Plane, Position]]) -> None:
        highest: dict[Plane, tuple[Position, int]] = {}
        for number, (plane, position) in enumerate(positions):
            highest[plane] = max((position, number), highest.get(plane, (position, number)))
        for plane, (position, number) in highest.items():
            if not await self._backing.is_real(user, plane, position):
                raise Refused(
                    "bad_position",
                    f"{position.text(plane)} is a position that this mesh has not handed out yet",
                    pointer=pointer_to("pos", number),
                )

    async def _tell(self, user: str, told: bytes) -> int | None:
        """The user's devices get the marks and the badge; returns that, None where it is not known."""
        backing = self._backing
        try:
            unread = await backing.inbox.unread(user)
            holders = await backing.gateways(user)
        except StoreUnavailable as error:
            # The mark is made; what remains are courtesies.
            log.warning("the devices of %r are not told of a mark: %s", user, error)
            return None
        gateways.tell(backing.connection, holders, user, [told, frames.count(unread)])
        return unread


def _place(given: dict[str, str], name: str) -> Place | None:
    return _read(given, name, Place.parse)


def _name(given: dict[str, str], name: str) -> str | None:
    value = given.get(name)
    if value is not None and not 0 < len(value) <= _MAX_NAME:
        raise Refused("bad_parameter", f"`{name}` must have 1 to {_MAX_NAME} characters", parameter=name)
    return value


def _read(given: dict[str, str], name: str, read: Callable[[str], _Read]) -> _Read | None:
    if name not in given:
        return None
    try:
        return read(given[name])
    except BadPosition as error:
        raise Refused("bad_parameter", str(error), parameter=name) from None
