"""The HTTP application: routes, and what holds for every request and answer."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable, Sequence
from time import perf_counter
from typing import Final
from urllib.parse import unquote_to_bytes

from aiohttp import hdrs, web
from aiohttp.typedefs import Handler as WebHandler

from tidings.runtime.settings import Settings

from . import problems
from .backing import Backing
from .contract import Contract
from .cors import Origins
from .deadletters import DeadLetters
from .gate import Gate, Route
from .health import Health
from .inbox import Inbox
from .limits import Room
from .problems import Refused
from .publishing import Publishing
from .revoking import Revoking
from .subscriptions import Subscriptions

__all__ = ["Observer", "make_app", "routes"]

Observer = Callable[[str, str, int, float], None]
"""Told of each answer: method, route (its pattern, never a path), status, seconds. Where counters are kept."""

_HEADERS: Final = {
    hdrs.SERVER: "tidings",
    hdrs.CACHE_CONTROL: "no-store",
    hdrs.X_CONTENT_TYPE_OPTIONS: "nosniff",
}
_HEALTH: Final = ("/healthz", "/readyz")

log = logging.getLogger("tidings.api")


def routes(backing: Backing, gate: Gate) -> Sequence[Route]:
    """Every operation that needs a token."""
    publishing, inbox, subscriptions = Publishing(backing, gate), Inbox(backing), Subscriptions(backing)
    dead = DeadLetters(backing)
    of_user = "/v1/users/{user}"
    return (
        Route("POST", "/v1/publish", publishing.one, None),
        Route("POST", "/v1/publish/batch", publishing.batch, None),
        Route("GET", f"{of_user}/inbox", inbox.page, "inbox:read"),
        Route("GET", f"{of_user}/unread", inbox.unread, "inbox:read"),
        Route("POST", f"{of_user}/marks", inbox.mark, "inbox:write"),
        Route("GET", f"{of_user}/subscriptions", subscriptions.page, "subscriptions:read"),
        Route("POST", f"{of_user}/subscriptions", subscriptions.add, "subscriptions:write"),
        Route("GET", "/v1/deadletters", dead.page, "deadletters:read"),
        Route("GET", "/v1/deadletters/{id}", dead.look, "deadletters:read"),
        Route("POST", "/v1/deadletters/{id}/replay", dead.replay, "deadletters:write"),
        Route("DELETE", "/v1/deadletters/{id}", dead.drop, "deadletters:write"),
        Route("POST", "/v1/revocations", Revoking(backing).revoke, "revoke"),
        Route("DELETE", f"{of_user}/subscriptions/{{topic}}", subscriptions.remove, "subscriptions:write"),
    )


def make_app(
    backing: Backing,
    gate: Gate,
    unready: Callable[[], Sequence[str]],
    observer: Observer | None = None,
) -> web.Application:
    """The application. `unready` says what is wrong with the agent; `observer` is told of each answer."""
    app = web.Application(middlewares=[_Frame(backing.settings, observer).answer])
    for route in routes(backing, gate):
        app.router.add_route(route.method, route.path, gate.guard(route))
    contract, health = Contract(), Health(backing, unready)
    app.add_routes(
        [
            web.get("/v1/openapi.json", contract.document),
            web.get("/v1/docs", contract.page),
            web.get("/healthz", health.alive),
            web.get("/readyz", health.ready),
        ]
    )
    return app


class _Frame:
    """Around every handler: room, refusals, header fields, and a client that does not read."""

    def __init__(self, settings: Settings, observer: Observer | None) -> None:
        self._write_timeout_s = settings.api_write_timeout_s
        self._room = Room(settings.api_concurrency, "overloaded", "requests")
        self._origins = Origins(settings.allowed_origins)
        self._observer = observer

    @web.middleware
    async def answer(self, request: web.Request, handler: WebHandler) -> web.StreamResponse:
        began = perf_counter()
        try:
            # Whoever looks after this process has to be answered most of all when it is busy.
            with self._room.of(units=0 if request.path in _HEALTH else 1):
                response = await self._handle(request, handler)
                await self._send(request, response)
        except Refused as busy:
            response = problems.response(busy)
            await self._send(request, response)
        if self._observer is not None:
            resource = request.match_info.route.resource
            route = "" if resource is None else resource.canonical
            self._observer(request.method, route, response.status, perf_counter() - began)
        return response

    async def _handle(self, request: web.Request, handler: WebHandler) -> web.StreamResponse:
        try:
            _check_text(request)
            return self._origins.preflight(request) or await handler(request)
        except Exception as error:  # noqa: BLE001 - one place turns every error into an answer, and logs what is new
            return problems.response(problems.as_refusal(error))

    async def _send(self, request: web.Request, response: web.StreamResponse) -> None:
        """Write the answer while there is room for it, and for no longer than a client may take to read."""
        response.headers.update(_HEADERS)
        response.headers.update(self._origins.header_fields(request))
        try:
            async with asyncio.timeout(self._write_timeout_s):
                await response.prepare(request)
                await response.write_eof()
        except TimeoutError:
            log.info("a client does not read its answer: its connection is dropped")
            if request.transport is not None:
                request.transport.abort()
        except ConnectionError as error:
            log.debug("a client left before its answer: %s", error)


def _check_text(request: web.Request) -> None:
    """Refuse what aiohttp would read as U+FFFD; of the line as it came, since yarl encodes that again."""
    path, _, query = request.raw_path.partition("?")
    for name, value in (("path", path), ("query", query)):
        try:
            # What came as it is, not as %XX, aiohttp holds with surrogates for what is no UTF-8.
            unquote_to_bytes(value.encode("utf-8", "surrogateescape")).decode()
        except UnicodeDecodeError:
            raise Refused("bad_parameter", f"the {name} is no UTF-8 text behind its %XX", parameter=name) from None
