"""Refusals: RFC 9457 problem details, each with a stable code of ``schemas/codes.json``.

::

    {"type": "urn:tidings:problem:invalid_body", "title": "…", "status": 422, "code": "invalid_body",
     "detail": "what was wrong, and what to do", "pointer": "/event/type"}

`pointer` (RFC 6901) is where in the body, `parameter` which one of the path, the query or the headers.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any, Final

import orjson
from aiohttp import hdrs, web

from tidings.wire import codes
from tidings.wire.errors import BadPosition, BadSubject, BadTopic, InvalidNotification, NotAuthenticated, TidingsError
from tidings.wire.pointer import pointer_to

__all__ = ["Path", "Refused", "as_refusal", "located", "of_status", "response"]

Path = tuple[str | int, ...]
"""Where in a body: members and indices, from its root."""

_TYPE: Final = "urn:tidings:problem:"
_OF_STATUS: Final = {404: "not_found", 405: "method_not_allowed"}
_RETRY_S: Final = 2
"""What a client should wait before it asks again, where nothing better is known."""

log = logging.getLogger("tidings.api")


class Refused(Exception):
    """The request ends here, with this code of the catalogue. `members` go into the answer."""

    def __init__(
        self, code: str, detail: str, *, headers: Mapping[str, str] | None = None, retry_s: int = 0, **members: Any
    ) -> None:
        super().__init__(detail)
        problem = codes.problem_of(code)
        if problem is None:
            raise ValueError(f"{code!r} is no code of the catalogue")
        self.problem = problem
        self.members = {name: value for name, value in members.items() if value is not None}
        self.headers = dict(headers or {})
        if problem.status == 401:
            self.headers.setdefault(hdrs.WWW_AUTHENTICATE, 'Bearer realm="tidings"')
        if problem.status in (429, 503):
            self.headers.setdefault(hdrs.RETRY_AFTER, str(retry_s or _RETRY_S))


def response(refused: Refused) -> web.Response:
    """The answer that a refusal becomes."""
    problem = refused.problem
    body = {
        "type": _TYPE + problem.code,
        "title": problem.title,
        "status": problem.status,
        "code": problem.code,
        "detail": str(refused),
        **refused.members,
    }
    return web.Response(
        body=orjson.dumps(body),
        status=problem.status,
        content_type="application/problem+json",
        headers=refused.headers,
    )


def as_refusal(error: Exception) -> Refused:
    """What whoever asked is told of an error. One that nobody thought of is logged, and told nothing of."""
    if isinstance(error, Refused):
        return error
    if isinstance(error, NotAuthenticated):
        return Refused(error.code, str(error), headers={hdrs.WWW_AUTHENTICATE: 'Bearer error="invalid_token"'})
    if isinstance(error, TidingsError) and codes.problem_of(error.code) is not None:
        return Refused(error.code, str(error))
    if isinstance(error, web.HTTPException) and error.status in _OF_STATUS:
        return _of_router(error)
    log.error("a request failed", exc_info=error)
    return Refused("internal", "this api agent made a mistake: its log has it")


@contextmanager
def located(at: Path) -> Iterator[None]:
    """Whatever is refused in here is at this place of the body, or below it."""
    try:
        yield
    except InvalidNotification as error:
        code = _known(error.code, "invalid_notification")
        raise Refused(code, str(error), pointer=pointer_to(*at) + error.pointer) from None
    except (BadSubject, BadTopic, BadPosition) as error:
        raise Refused(error.code, str(error), pointer=pointer_to(*at)) from None


def _known(code: str, otherwise: str) -> str:
    return code if codes.problem_of(code) is not None else otherwise


def of_status(status: int) -> web.Response:
    """The answer to what is no HTTP, to an expectation, and to what failed outside of every handler."""
    if status == 417:
        return response(Refused("expectation_failed", "send `Expect: 100-continue`, or no Expect at all"))
    if status < 500:
        return response(Refused("bad_request", "it cannot be read as HTTP/1.1, or a part of it is too long"))
    return response(Refused("internal", "this api agent made a mistake: its log has it"))


def _of_router(error: web.HTTPException) -> Refused:
    headers: dict[str, str] = {}
    detail = "there is nothing at this address: /v1/openapi.json says what there is"
    if isinstance(error, web.HTTPMethodNotAllowed):
        allowed = ", ".join(sorted(error.allowed_methods))
        headers = {hdrs.ALLOW: allowed}
        detail = f"this address takes {allowed}"
    return Refused(_OF_STATUS[error.status], detail, headers=headers)
