"""The catalogue of codes: what a client is told when something goes wrong, and what it does then.

``schemas/codes.json`` is this table for everybody who does not write Python; a test holds the two together.
Close codes below 4000 are RFC 6455's own, the others are ours.
"""

from __future__ import annotations

from typing import Any, Final, NamedTuple

__all__ = [
    "CLOSES",
    "ERRORS",
    "PROBLEMS",
    "REFUSALS",
    "Close",
    "ErrorCode",
    "Problem",
    "Refusal",
    "catalogue",
    "close_of",
    "may_retry",
    "problem_of",
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


class Problem(NamedTuple):
    """A refusal of the HTTP api (RFC 9457): its code, HTTP status, title, and whether asking again may help."""

    code: str
    status: int
    title: str
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

PROBLEMS: Final = (
    Problem("bad_request", 400, "the request is no HTTP that is understood here", False),
    Problem("malformed_json", 400, "the body is not JSON, or nested too deeply", False),
    Problem("body_incomplete", 400, "the body ended before its end", True),
    Problem("bad_parameter", 400, "a parameter of the path, the query or a header is not what it must be", False),
    Problem("not_authenticated", 401, "the token is missing, expired, revoked or not ours", False),
    Problem("not_allowed", 403, "the token does not allow this", False),
    Problem("not_found", 404, "there is nothing at this address", False),
    Problem("no_such_letter", 404, "no dead letter has this id: it was replayed or dropped, or never was", False),
    Problem("method_not_allowed", 405, "this address does not take that method", False),
    Problem("body_timeout", 408, "the body did not arrive in time", True),
    Problem("replay_refused", 409, "the dead letter would come back at once, or names nobody; it is kept", False),
    Problem("body_too_large", 413, "the body is over the limit", False),
    Problem("unsupported_media_type", 415, "the body is not of the type application/json", False),
    Problem("expectation_failed", 417, "nothing else than 100-continue can be expected", False),
    Problem("invalid_body", 422, "the body is not what this address takes", False),
    Problem("invalid_notification", 422, "an event is no CloudEvents 1.0 event as Tidings carries it", False),
    Problem("schema_violation", 422, "the schema of its type forbids an event", False),
    Problem("bad_subject", 422, "a user id is empty, too long, or no text", False),
    Problem("bad_topic", 422, "a topic is no name of levels with dots between them", False),
    Problem("topic_too_long", 422, "a topic has too many characters", False),
    Problem("topic_too_deep", 422, "a topic has too many levels", False),
    Problem("bad_position", 422, "a position was not handed out by this mesh", False),
    Problem("too_many_subscriptions", 422, "the user has as many subscriptions as one may have", False),
    Problem("idempotency_key_reused", 422, "the idempotency key came with another request before", False),
    Problem("too_many_requests", 429, "a limit of requests or notifications is reached", True),
    Problem("internal", 500, "a mistake of this api agent; its log has it", True),
    Problem("overloaded", 503, "this api agent has as much to do as it can", True),
    Problem("too_many_concurrent", 503, "this credential has as many requests under way as one may have", True),
    Problem("keys_unavailable", 503, "the keys that verify tokens cannot be read now", True),
    Problem("entitlement_unavailable", 503, "whoever decides on subscriptions does not answer now", True),
    Problem("store_unavailable", 503, "the inbox does not answer now", True),
    Problem("stream_unavailable", 503, "the log does not answer now", True),
    Problem("publish_unconfirmed", 503, "not everything was confirmed: `results` says what is stored", True),
    Problem("publish_refused", 503, "the log refuses until an operator acts: `results` says what is stored", True),
)

FOREIGN_ORIGIN: Final = Refusal(403, "foreign_origin", "pages of this origin may not connect")
TOKEN_IN_URL: Final = Refusal(400, "token_in_url", "a token is in the address, where logs keep it")

REFUSALS: Final = (FOREIGN_ORIGIN, TOKEN_IN_URL)

_BY_CODE: Final = {close.code: close for close in CLOSES}

_PROBLEMS: Final = {problem.code: problem for problem in PROBLEMS}


def reconnects(code: int | None) -> bool:
    """Whether a client that saw this close code should connect again.

    A code that is not in the catalogue (1001, 1006, 1011 …) is the network's or a proxy's: come back.
    """
    known = _BY_CODE.get(code) if code is not None else None
    return known.reconnect if known else True


def close_of(code: int) -> Close | None:
    """The catalogue's entry of a close code."""
    return _BY_CODE.get(code)


def problem_of(code: str) -> Problem | None:
    """The catalogue's entry of a refusal of the HTTP api."""
    return _PROBLEMS.get(code)


def may_retry(code: str) -> bool:
    """Whether a request that got this error may succeed later."""
    return any(error.retry for error in ERRORS if error.code == code)


def catalogue() -> dict[str, Any]:
    """The content of ``schemas/codes.json``."""
    return {
        "close": [close._asdict() for close in CLOSES],
        "error": [error._asdict() for error in ERRORS],
        "problem": [problem._asdict() for problem in PROBLEMS],
        "handshake": [refusal._asdict() for refusal in REFUSALS],
    }
