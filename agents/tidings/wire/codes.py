"""The catalogue of codes: what a client is told when something goes wrong, and what it does then.

``schemas/codes.json`` is this table for everybody who does not write Python; a test holds the two together.
Close codes below 4000 are RFC 6455's own, the others are ours.
"""

from __future__ import annotations

from typing import Any, Final, NamedTuple

__all__ = [
    "CLOSES",
    "ERRORS",
    "REFUSALS",
    "Close",
    "ErrorCode",
    "Refusal",
    "catalogue",
    "close_of",
    "may_retry",
    "reconnects",
]


class Close(NamedTuple):
    """A WebSocket close: its code, name, meaning, and whether the client should come back."""

    code: int
    name: str
    meaning: str
    reconnect: bool


class ErrorCode(NamedTuple):
    """A code of an ``error`` frame: its meaning, and whether the same request may succeed later."""

    code: str
    meaning: str
    retry: bool


class Refusal(NamedTuple):
    """A handshake that is refused before it is a WebSocket: the HTTP status, and the code in the answer's body."""

    status: int
    code: str
    meaning: str


NORMAL: Final = Close(1000, "normal", "the client said goodbye", False)
RESTART: Final = Close(1012, "restart", "the gateway restarts; come back after the time in `bye`", True)
BAD_FRAME: Final = Close(4400, "bad_frame", "a frame broke the protocol; the client needs mending", False)
NOT_AUTHENTICATED: Final = Close(4401, "not_authenticated", "the token is missing, expired, revoked or not ours", False)
NOT_ALLOWED: Final = Close(4403, "not_allowed", "the token does not allow this user or device", False)
NO_HELLO: Final = Close(4408, "no_hello", "no hello came in time", True)
REPLACED: Final = Close(4409, "replaced", "a newer session of the same device took over", False)
TOO_SLOW: Final = Close(4410, "too_slow", "the client did not read what it was sent", True)
FRAME_TOO_LARGE: Final = Close(4413, "frame_too_large", "a client frame was over the limit", False)
TOO_MANY_REQUESTS: Final = Close(4429, "too_many_requests", "the client asked for more than it may", True)
TOO_MANY_DEVICES: Final = Close(
    4430, "too_many_devices", "the user has as many devices connected here as one may have", True
)
OVERLOADED: Final = Close(4503, "overloaded", "this gateway cannot take the session now", True)

CLOSES: Final = (
    NORMAL,
    RESTART,
    BAD_FRAME,
    NOT_AUTHENTICATED,
    NOT_ALLOWED,
    NO_HELLO,
    REPLACED,
    TOO_SLOW,
    FRAME_TOO_LARGE,
    TOO_MANY_REQUESTS,
    TOO_MANY_DEVICES,
    OVERLOADED,
)

ERRORS: Final = (
    ErrorCode("bad_frame", "the frame is not what the protocol expects here", False),
    ErrorCode("unknown_type", "no frame of this type exists", False),
    ErrorCode("bad_position", "a position was not handed out by this mesh", False),
    ErrorCode(
        "too_many_requests",
        "too many requests are under way on this connection, or more was sent than a user's devices may",
        True,
    ),
    ErrorCode("bad_topic", "a topic is no name of levels with dots between them", False),
    ErrorCode("topic_too_long", "a topic has too many characters", False),
    ErrorCode("topic_too_deep", "a topic has too many levels", False),
    ErrorCode("not_allowed", "the user may not have this subscription", False),
    ErrorCode("not_authenticated", "the new token is not valid; the one before goes on", False),
    ErrorCode("keys_unavailable", "the keys that verify tokens cannot be read now", True),
    ErrorCode("entitlement_unavailable", "whoever decides on subscriptions does not answer now", True),
    ErrorCode("too_many_subscriptions", "the user has as many subscriptions as one may have", False),
    ErrorCode("store_unavailable", "the inbox does not answer now; deliveries go on", True),
    ErrorCode("not_supported", "this gateway does not offer it", False),
)

FOREIGN_ORIGIN: Final = Refusal(403, "foreign_origin", "pages of this origin may not connect")
TOKEN_IN_URL: Final = Refusal(400, "token_in_url", "a token is in the address, where logs keep it")

REFUSALS: Final = (FOREIGN_ORIGIN, TOKEN_IN_URL)

_BY_CODE: Final = {close.code: close for close in CLOSES}


def reconnects(code: int | None) -> bool:
    """Whether a client that saw this close code should connect again.

    A code that is not in the catalogue (1001, 1006, 1011 …) is the network's or a proxy's: come back.
    """
    known = _BY_CODE.get(code) if code is not None else None
    return known.reconnect if known else True


def close_of(code: int) -> Close | None:
    """The catalogue's entry of a close code."""
    return _BY_CODE.get(code)


def may_retry(code: str) -> bool:
    """Whether a request that got this error may succeed later."""
    return any(error.retry for error in ERRORS if error.code == code)


def catalogue() -> dict[str, Any]:
    """The content of ``schemas/codes.json``."""
    return {
        "close": [close._asdict() for close in CLOSES],
        "error": [error._asdict() for error in ERRORS],
        "handshake": [refusal._asdict() for refusal in REFUSALS],
    }
