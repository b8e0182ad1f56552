"""What is refused before the upgrade: pages of somebody else, and tokens where logs and histories would keep them."""

from __future__ import annotations

from typing import Final

import orjson
from aiohttp import hdrs, web

from tidings.runtime.settings import Settings, listed
from tidings.wire.codes import FOREIGN_ORIGIN, TOKEN_IN_URL, Refusal

__all__ = ["refuse"]

_ANY: Final = "*"
_TOKENS: Final = frozenset(("token", "access_token", "id_token", "jwt", "authorization", "bearer"))


def refuse(request: web.Request, settings: Settings) -> web.Response | None:
    """The answer to a handshake that must not be; None for any other.

    A browser names the page's origin, and a page cannot change it (RFC 6455, section 10.2); whoever else sends one must
    be on the list too. Without the setting `allowed_origins` a page is of the same origin as the gateway.
    """
    if any(name.lower() in _TOKENS for name in request.query):
        return _answer(TOKEN_IN_URL, "a token does not belong into an address: send it in the hello, or as a header")
    origin = request.headers.get(hdrs.ORIGIN)
    if origin is not None and not _may(origin, request.headers.get(hdrs.HOST, ""), settings):
        return _answer(FOREIGN_ORIGIN, "this page may not connect: its origin is not in allowed_origins")
    return None


def _may(origin: str, host: str, settings: Settings) -> bool:
    allowed = listed(settings.allowed_origins)
    origin = origin.lower()
    if not allowed:
        # A proxy in front may have taken TLS off.
        return origin in (f"http://{host}".lower(), f"https://{host}".lower())
    return _ANY in allowed or origin in (one.lower() for one in allowed)


def _answer(refusal: Refusal, detail: str) -> web.Response:
    """As RFC 9457 has it."""
    problem = {
        "type": "about:blank",
        "title": refusal.meaning,
        "status": refusal.status,
        "detail": detail,
        "code": refusal.code,
    }
    response = web.Response(status=refusal.status, body=orjson.dumps(problem), content_type="application/problem+json")
    response.force_close()
    return response
