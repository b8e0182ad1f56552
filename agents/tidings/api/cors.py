"""CORS: pages of the origins that may connect to a gateway may use the api. Nobody's, where none is listed.

No cookie is ever read, so that an origin can do nothing but what its page has a token for.

Source: the Fetch standard, section "HTTP extensions".
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Final

from aiohttp import hdrs, web

from tidings.runtime.settings import listed

__all__ = ["Origins"]

_ANY: Final = "*"
_METHODS: Final = "GET, POST, DELETE"
_REQUEST_HEADERS: Final = "Authorization, Content-Type, Idempotency-Key"
_ANSWER_HEADERS: Final = "RateLimit, RateLimit-Policy, Retry-After"
_MAX_AGE_S: Final = "600"


class Origins:
    """The origins of the setting `allowed_origins`; ``*`` is any."""

    def __init__(self, setting: str) -> None:
        self._allowed = frozenset(one.lower() for one in listed(setting))

    def preflight(self, request: web.Request) -> web.Response | None:
        """The answer to a browser that asks first; None for anything else."""
        if request.method != hdrs.METH_OPTIONS or hdrs.ACCESS_CONTROL_REQUEST_METHOD not in request.headers:
            return None
        if not self._allows(request):
            return None
        headers = {
            hdrs.ACCESS_CONTROL_ALLOW_METHODS: _METHODS,
            hdrs.ACCESS_CONTROL_ALLOW_HEADERS: _REQUEST_HEADERS,
            hdrs.ACCESS_CONTROL_MAX_AGE: _MAX_AGE_S,
        }
        return web.Response(status=204, headers=headers)

    def header_fields(self, request: web.Request) -> Mapping[str, str]:
        """For every answer."""
        if not self._allowed:
            return {}
        if not self._allows(request):
            return {hdrs.VARY: hdrs.ORIGIN}
        return {
            hdrs.VARY: hdrs.ORIGIN,
            hdrs.ACCESS_CONTROL_ALLOW_ORIGIN: request.headers[hdrs.ORIGIN],
            hdrs.ACCESS_CONTROL_EXPOSE_HEADERS: _ANSWER_HEADERS,
        }

    def _allows(self, request: web.Request) -> bool:
        origin = request.headers.get(hdrs.ORIGIN)
        return origin is not None and (_ANY in self._allowed or origin.lower() in self._allowed)
