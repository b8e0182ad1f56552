"""Frames of the WebSocket protocol ``tidings.v1.json``: bytes in, values out, and back.

Client frames are read strictly where a mistake could lose something (types, positions) and leniently
where it could not: unknown members are ignored, so that an older gateway serves a newer client.
A notification's body goes into its frame as the bytes that the publisher sent.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from datetime import UTC, datetime
from typing import Any, Final, Literal, NamedTuple

import orjson

from .errors import BadFrame, BadPosition, BadTopic
from .position import Place, Plane, Position, parse
from .topic import MAX_TOPIC, check_pattern

__all__ = [
    "FILTERS",
    "MARKS",
    "MAX_PAGE",
    "MAX_POSITIONS",
    "MAX_TOKEN",
    "MAX_TOPICS",
    "SUBPROTOCOL",
    "Ack",
    "ClientFrame",
    "Count",
    "Filter",
    "Hello",
    "InboxQuery",
    "Mark",
    "MarkAs",
    "Ping",
    "Renewal",
    "Request",
    "Row",
    "Subscribe",
    "Subscriptions",
    "Unsubscribe",
    "bye",
    "count",
    "decode",
    "error",
    "gap",
    "notification_item",
    "notifications",
    "ok",
    "page",
    "page_members",
    "pong",
    "state",
    "welcome",
]

SUBPROTOCOL: Final = "tidings.v1.json"
MAX_POSITIONS: Final = 1000
"""Most positions that one ``ack`` or ``mark`` may list."""
MAX_PAGE: Final = 200
"""Most rows of one inbox page."""

MAX_TOKEN: Final = 8192
"""Most characters of a token."""

MAX_TOPICS: Final = 500
"""Most topics of one ``sub`` or ``unsub``, and of one answer to ``subs``."""

Filter = Literal["all", "unread", "archived"]
MarkAs = Literal["seen", "read", "unread", "archived"]
FILTERS: Final[tuple[Filter, ...]] = ("all", "unread", "archived")
MARKS: Final[tuple[MarkAs, ...]] = ("seen", "read", "unread", "archived")

Ref = int | str | None


class Hello(NamedTuple):
    """The first frame: who the client is and up to where it has everything."""

    token: str | None
    device: str | None
    window: int | None
    since: str | None
    """Kept as text: one from another mesh is no reason to refuse a device, only no help."""


class Ack(NamedTuple):
    """These positions have arrived, or all up to one."""

    positions: Sequence[str]
    """As text, which is what a session finds them by; each is a position, if perhaps none that is under way."""
    upto: Place | None


class InboxQuery(NamedTuple):
    ref: Ref
    before: Place | None
    after: Place | None
    limit: int
    filter: Filter
    type: str | None
    topic: str | None


class Mark(NamedTuple):
    ref: Ref
    as_: MarkAs
    positions: Sequence[tuple[Plane, Position]] | None
    """None means every notification that the user has now; then `as_` is not ``unread``."""


class Count(NamedTuple):
    ref: Ref


class Subscribe(NamedTuple):
    ref: Ref
    topics: Sequence[str]


class Unsubscribe(NamedTuple):
    ref: Ref
    topics: Sequence[str]


class Subscriptions(NamedTuple):
    ref: Ref
    after: str | None
    """The last one that the client has."""
    limit: int


class Ping(NamedTuple):
    ref: Ref


class Renewal(NamedTuple):
    """A newer token, for the same user and device."""

    ref: Ref
    token: str


Request = InboxQuery | Mark | Count | Subscribe | Unsubscribe | Subscriptions
"""What is answered by ``ok`` or ``error``."""

ClientFrame = Hello | Ack | Ping | Renewal | Request


def decode(text: str | bytes) -> ClientFrame:
    """Read one client frame; raises `BadFrame` with a code, a reason and the frame's ``ref``."""
    try:
        frame = orjson.loads(text)
    except orjson.JSONDecodeError as problem:
        raise BadFrame(f"the frame is not JSON: {problem}") from None
    if type(frame) is not dict:
        raise BadFrame("a frame is a JSON object with a member `t`")
    kind = frame.get("t")
    ref = frame.get("ref")
    if ref is not None and (type(ref) not in (int, str) or len(str(ref)) > 64):
        raise BadFrame("`ref` must be an integer or a string of at most 64 characters")
    reader = _READERS.get(kind) if type(kind) is str else None
    if reader is None:
        raise BadFrame(
            f"no frame has the type {str(kind)[:40]!r}: use {', '.join(_READERS)}", code="unknown_type", ref=ref
        )
    try:
        return reader(frame, ref)
    except BadPosition as problem:
        raise BadFrame(str(problem), code=problem.code, ref=ref) from None
    except BadFrame as problem:
        problem.ref = ref
        raise


def _text(frame: dict[str, Any], name: str, longest: int) -> str | None:
    value = frame.get(name)
    if value is None:
        return None
    if type(value) is not str or not 0 < len(value) <= longest:
        raise BadFrame(f"`{name}` must be a string of 1 to {longest} characters")
    return value


def _integer(frame: dict[str, Any], name: str, least: int, most: int) -> int | None:
    value = frame.get(name)
    if value is None:
        return None
    if type(value) is not int or not least <= value <= most:
        raise BadFrame(f"`{name}` must be an integer from {least} to {most}")
    return value


def _listed(frame: dict[str, Any]) -> list[str]:
    value = frame.get("pos")
    if type(value) is list and len(value) <= MAX_POSITIONS:
        for item in value:
            if type(item) is not str:
                break
        else:
            return value
    raise BadFrame(f"`pos` must be a list of at most {MAX_POSITIONS} positions")


def _hello(frame: dict[str, Any], ref: Ref) -> Hello:
    return Hello(
        _text(frame, "token", MAX_TOKEN),
        _text(frame, "device", 200),
        _integer(frame, "window", 1, 1000),
        _text(frame, "since", 256),
    )


def _ack(frame: dict[str, Any], ref: Ref) -> Ack:
    if "upto" in frame:
        return Ack((), Place.parse(frame["upto"]))
    listed = _listed(frame)
    for item in listed:
        parse(item)
    return Ack(listed, None)


def _inbox(frame: dict[str, Any], ref: Ref) -> InboxQuery:
    before, after = frame.get("before"), frame.get("after")
    if before is not None and after is not None:
        raise BadFrame("`before` pages to what is older and `after` to what is newer: give one of them")
    chosen = frame.get("filter", "all")
    if chosen not in FILTERS:
        raise BadFrame(f"`filter` must be one of {', '.join(FILTERS)}")
    return InboxQuery(
        ref,
        None if before is None else Place.parse(before),
        None if after is None else Place.parse(after),
        _integer(frame, "limit", 1, MAX_PAGE) or 50,
        chosen,
        _text(frame, "type", 256),
        _text(frame, "topic", 256),
    )


def _mark(frame: dict[str, Any], ref: Ref) -> Mark:
    state = frame.get("as")
    if state not in MARKS:
        raise BadFrame(f"`as` must be one of {', '.join(MARKS)}")
    if frame.get("pos") == "all":
        if state == "unread":
            raise BadFrame("`unread` takes positions: all at once can be `seen`, `read` or `archived`")
        return Mark(ref, state, None)
    return Mark(ref, state, [parse(item) for item in _listed(frame)])


def _count(frame: dict[str, Any], ref: Ref) -> Count:
    return Count(ref)


def _topics(frame: dict[str, Any]) -> list[str]:
    value = frame.get("topics")
    if type(value) is not list or not 0 < len(value) <= MAX_TOPICS or not all(type(one) is str for one in value):
        raise BadFrame(f"`topics` must be a list of 1 to {MAX_TOPICS} topics")
    try:
        return [check_pattern(one) for one in dict.fromkeys(value)]
    except BadTopic as problem:
        raise BadFrame(str(problem), code=problem.code) from None


def _sub(frame: dict[str, Any], ref: Ref) -> Subscribe:
    return Subscribe(ref, _topics(frame))


def _unsub(frame: dict[str, Any], ref: Ref) -> Unsubscribe:
    return Unsubscribe(ref, _topics(frame))


def _subs(frame: dict[str, Any], ref: Ref) -> Subscriptions:
    return Subscriptions(ref, _text(frame, "after", MAX_TOPIC), _integer(frame, "limit", 1, MAX_TOPICS) or MAX_TOPICS)


def _token(frame: dict[str, Any], ref: Ref) -> Renewal:
    token = _text(frame, "token", MAX_TOKEN)
    if token is None:
        raise BadFrame("a `token` frame has the member `token`")
    return Renewal(ref, token)


def _ping(frame: dict[str, Any], ref: Ref) -> Ping:
    return Ping(ref)


_READERS: Final[dict[str, Callable[[dict[str, Any], Ref], ClientFrame]]] = {
    "hello": _hello,
    "ack": _ack,
    "inbox": _inbox,
    "mark": _mark,
    "count": _count,
    "sub": _sub,
    "unsub": _unsub,
    "subs": _subs,
    "token": _token,
    "ping": _ping,
}


def notification_item(position: str, attempt: int, body: bytes) -> bytes:
    """One item of a notification frame; `body` is the publisher's JSON, unchanged."""
    return b'{"pos":"%b","try":%d,"n":%b}' % (position.encode(), attempt, body)


def notifications(items: Iterable[bytes]) -> bytes:
    """A frame of items made by `notification_item`."""
    return b'{"t":"n","items":[%b]}' % b",".join(items)


def welcome(
    *,
    session: str,
    user: str,
    device: str,
    pos: str | None,
    unread: int | None,
    window: int,
    heartbeat: float,
    expires_in: int,
) -> bytes:
    """`pos` and `unread` are None while the store does not answer; the token ends in `expires_in` seconds."""
    return orjson.dumps(
        {
            "t": "welcome",
            "session": session,
            "user": user,
            "device": device,
            "pos": pos,
            "unread": unread,
            "window": window,
            "heartbeat": heartbeat,
            "expires_in": expires_in,
        }
    )


def ok(ref: Ref, **answer: Any) -> bytes:
    return orjson.dumps({"t": "ok", "ref": ref, **answer})


def error(code: str, message: str, ref: Ref = None) -> bytes:
    return orjson.dumps({"t": "error", "ref": ref, "code": code, "message": message})


Row = tuple[str, bool, bool, bool, tuple[int, str, int] | None, bytes]
"""A row of the inbox: position, seen, read, archived, delivered, body.

`delivered` is when (Unix milliseconds), on which device and with which attempt a device acknowledged it first.
"""


def page(ref: Ref, rows: Iterable[Row], next_: str | None) -> bytes:
    """The answer to ``inbox``."""
    return b'{"t":"ok","ref":%b,%b}' % (orjson.dumps(ref), page_members(rows, next_))


def page_members(rows: Iterable[Row], next_: str | None) -> bytes:
    """The members ``items`` and ``next`` of an object; each body as the publisher sent it."""
    items = b",".join(
        b'{"pos":"%b","seen":%b,"read":%b,"archived":%b,"delivered":%b,"n":%b}'
        % (pos.encode(), _BOOL[seen], _BOOL[read], _BOOL[archived], _delivered(delivered), body)
        for pos, seen, read, archived, delivered, body in rows
    )
    return b'"items":[%b],"next":%b' % (items, orjson.dumps(next_))


def _delivered(delivered: tuple[int, str, int] | None) -> bytes:
    if delivered is None:
        return b"null"
    at_ms, device, attempts = delivered
    return orjson.dumps(
        {"at": datetime.fromtimestamp(at_ms / 1000, UTC), "device": device, "try": attempts}, option=_TIME
    )


_TIME: Final = orjson.OPT_UTC_Z
_BOOL: Final = {False: b"false", True: b"true"}


def count(unread: int) -> bytes:
    """The badge; 100 stands for more than 99."""
    return b'{"t":"count","unread":%d}' % unread


def state(positions: Sequence[str] | None, as_: MarkAs, upto: str | None = None) -> bytes:
    """Another device marked these; None means all up to and including `upto`."""
    if positions is None:
        return orjson.dumps({"t": "state", "pos": "all", "upto": upto, "as": as_})
    return orjson.dumps({"t": "state", "pos": positions, "as": as_})


def gap(missed: int | None, position: str | None) -> bytes:
    """More was missed than is pushed: page the inbox.

    `missed` is None when the number is not known. An ``ack`` of `position` says that the client has taken
    note; until then every connection announces the gap anew.
    """
    return orjson.dumps({"t": "gap", "missed": missed, "pos": position})


def bye(after_ms: int, *, reconnect: bool = True) -> bytes:
    return b'{"t":"bye","reconnect":%b,"after_ms":%d}' % (_BOOL[reconnect], after_ms)


def pong(ref: Ref) -> bytes:
    return orjson.dumps({"t": "pong", "ref": ref}) if ref is not None else b'{"t":"pong"}'
