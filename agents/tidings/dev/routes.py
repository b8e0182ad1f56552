"""What a development mesh serves beside the WebSocket: the page, and four calls that the page makes.

``POST /dev/token`` hands out tokens, so that a browser needs no account here. It must therefore never answer
a page of somebody else's that is open in the same browser:

- only ``application/json`` is read, which another origin cannot send without asking first (CORS), and nobody
  answers that question;
- an ``Origin`` other than our own is refused;
- the ``Host`` must be one that we listen on. A name that an attacker points to 127.0.0.1 (DNS rebinding)
  would otherwise make his page one of ours.
"""

from __future__ import annotations

import asyncio
import ipaddress
import shlex
from collections.abc import Awaitable, Callable
from importlib import resources
from typing import Any, Final

import orjson
from aiohttp import hdrs, web

import tidings
from tidings.identity import issue
from tidings.publish.publisher import Publisher
from tidings.runtime.settings import Settings
from tidings.wire.errors import PublishUnconfirmed, StoreUnavailable, StreamUnavailable, TidingsError
from tidings.wire.topic import check_topic

from .crowd import MAX_CROWD, Crowd
from .program import program

__all__ = ["Routes"]

_MAX_BODY_BYTES: Final = 64 * 1024
_BODY_WAIT_S: Final = 10
_LOOPBACK: Final = frozenset(("localhost", "127.0.0.1", "::1"))
_WILDCARDS: Final = frozenset(("", "0.0.0.0", "::"))
_INDEX: Final = "index.html"
_TYPES: Final = {
    ".html": "text/html",
    ".js": "text/javascript",
    ".css": "text/css",
    ".svg": "image/svg+xml",
    ".png": "image/png",
    ".ico": "image/x-icon",
}
_PAGE_HEADERS: Final = {
    "Content-Security-Policy": (
        "default-src 'self'; connect-src 'self' ws: wss:; img-src 'self' data:; object-src 'none'; "
        "base-uri 'none'; form-action 'self'; frame-ancestors 'none'"
    ),
    "X-Content-Type-Options": "nosniff",
    "Referrer-Policy": "no-referrer",
    "Cross-Origin-Opener-Policy": "same-origin",
    "Cache-Control": "no-cache",
}
_TRY_LATER: Final = (StreamUnavailable, StoreUnavailable, PublishUnconfirmed)
_CROWD: Final = 2000

_Handler = Callable[[web.Request], Awaitable[web.StreamResponse]]


class _Refused(Exception):
    """The request ends here, with this answer."""

    def __init__(self, status: int, code: str, message: str) -> None:
        super().__init__(message)
        self.status = status
        self.code = code


class Routes:
    """Routes for the gateway's HTTP server. `publisher` is given when there is one, before the server listens."""

    def __init__(self, settings: Settings, crowd: Crowd) -> None:
        self._settings = settings
        self._crowd = crowd
        self._files = _page_files()
        self.publisher: Publisher | None = None

    def add_to(self, app: web.Application) -> None:
        """Add the routes to an application that does not run yet."""
        app.add_routes(
            [
                web.get("/", self._index),
                web.get("/page/{file}", self._file),
                web.get("/dev/info", self._guarded(self._info)),
                web.post("/dev/token", self._guarded(self._token)),
                web.post("/dev/publish", self._guarded(self._publish)),
                web.post("/dev/crowd", self._guarded(self._gather)),
            ]
        )

    async def _index(self, request: web.Request) -> web.Response:
        return self._serve(_INDEX)

    async def _file(self, request: web.Request) -> web.Response:
        return self._serve(request.match_info["file"])

    def _serve(self, name: str) -> web.Response:
        # Names are looked up among the files of the package, never put together to a path.
        found = self._files.get(name)
        if found is None:
            return _error(404, "not_found", f"the page has no file {name[:80]!r}")
        body, kind = found
        charset = "utf-8" if kind.startswith("text/") else None
        return web.Response(body=body, content_type=kind, charset=charset, headers=_PAGE_HEADERS)

    def _guarded(self, handler: _Handler) -> _Handler:
        async def guarded(request: web.Request) -> web.StreamResponse:
            try:
                self._check_caller(request)
                return await handler(request)
            except _Refused as refused:
                return _error(refused.status, refused.code, str(refused))
            except _TRY_LATER as error:
                return _error(503, error.code, str(error))
            except TidingsError as error:
                return _error(400, error.code, str(error))

        return guarded

    def _check_caller(self, request: web.Request) -> None:
        host = request.headers.get(hdrs.HOST, "")
        if not self._is_ours(_host_name(host)):
            raise _Refused(403, "foreign_host", f"this mesh is not {host[:80]!r}: use the address that it printed")
        origin = request.headers.get(hdrs.ORIGIN)
        if origin is not None and origin.lower() not in (f"http://{host}".lower(), f"https://{host}".lower()):
            raise _Refused(403, "foreign_origin", f"a page of {origin[:80]!r} may not ask this mesh")

    def _is_ours(self, name: str) -> bool:
        listening = self._settings.host.lower()
        if name in _LOOPBACK or name == listening:
            return True
        # Listening everywhere: an address in digits is no name that DNS could have pointed here.
        return listening in _WILDCARDS and _is_address(name)

    async def _info(self, request: web.Request) -> web.Response:
        settings = self._settings
        return _answer(
            {
                "nats_url": settings.nats_url,
                "program": shlex.join(program()),
                "version": tidings.__version__,
                "ack_wait_s": settings.ack_wait_s,
                "linger_s": settings.linger_s,
            }
        )

    async def _token(self, request: web.Request) -> web.Response:
        asked = await _body(request, required=("user",), optional=("device",))
        user, device = _text(asked, "user"), asked.get("device")
        if device is not None:
            device = _text(asked, "device")
        return _answer({"token": issue(self._settings.token_key, user, device)})

    async def _publish(self, request: web.Request) -> web.Response:
        asked = await _body(request, required=("type",), optional=("user", "topic", "data", "id"))
        if ("user" in asked) == ("topic" in asked):
            raise _Refused(400, "bad_request", "give either `user` or `topic`: whom the notification is for")
        kind, data = _text(asked, "type"), asked.get("data")
        id_ = None if asked.get("id") is None else _text(asked, "id")
        if self.publisher is None:
            raise _Refused(503, "starting", "this mesh is not ready yet")
        if "user" in asked:
            published = await self.publisher.publish(_text(asked, "user"), type=kind, data=data, id=id_)
        else:
            published = await self.publisher.publish_topic(_text(asked, "topic"), type=kind, data=data, id=id_)
        return _answer(
            {
                "id": published.id,
                "stream": published.stream,
                "seq": published.seq,
                "duplicate": published.duplicate,
            }
        )

    async def _gather(self, request: web.Request) -> web.Response:
        asked = await _body(request, required=("topic",), optional=("followers",))
        topic, size = check_topic(_text(asked, "topic")), asked.get("followers", _CROWD)
        if type(size) is not int or not 0 <= size <= MAX_CROWD:
            raise _Refused(400, "bad_request", f"`followers` must be an integer from 0 to {MAX_CROWD}")
        if size and not self._crowd.may_follow(topic):
            raise _Refused(403, "not_allowed", f"{topic!r} is not open to a crowd")
        return _answer({"topic": topic, **(await self._crowd.gather(topic, size))._asdict()})


async def _body(request: web.Request, *, required: tuple[str, ...], optional: tuple[str, ...]) -> dict[str, Any]:
    """The request's JSON object, with these members and no others."""
    if request.content_type != "application/json":
        raise _Refused(415, "not_json", "send Content-Type: application/json")
    try:
        async with asyncio.timeout(_BODY_WAIT_S):
            await request.content.readexactly(_MAX_BODY_BYTES + 1)
        # The rest stays unread, so this connection cannot serve another request.
        raise _Refused(413, "too_large", f"the body is over {_MAX_BODY_BYTES} bytes")
    except asyncio.IncompleteReadError as whole:
        raw = whole.partial
    except TimeoutError:
        raise _Refused(408, "too_slow", f"the body did not arrive within {_BODY_WAIT_S} s") from None
    try:
        asked = orjson.loads(raw)
    except orjson.JSONDecodeError as error:
        raise _Refused(400, "bad_request", f"the body is not JSON: {error}") from None
    if not isinstance(asked, dict):
        raise _Refused(400, "bad_request", "the body must be a JSON object")
    missing = [name for name in required if name not in asked]
    unknown = sorted(set(asked) - {*required, *optional})
    if missing or unknown:
        wanted = ", ".join((*required, *(f"{name} (optional)" for name in optional)))
        raise _Refused(400, "bad_request", f"the body must have the members {wanted}, and no others")
    return asked


def _text(asked: dict[str, Any], name: str) -> str:
    value = asked[name]
    if not isinstance(value, str) or not value:
        raise _Refused(400, "bad_request", f"`{name}` must be a string that is not empty")
    return value


def _answer(content: dict[str, Any], status: int = 200) -> web.Response:
    headers = {"X-Content-Type-Options": "nosniff", "Cache-Control": "no-store"}
    return web.Response(body=orjson.dumps(content), status=status, content_type="application/json", headers=headers)


def _error(status: int, code: str, message: str) -> web.Response:
    return _answer({"code": code, "message": message}, status)


def _host_name(host: str) -> str:
    """The name of a Host header, without its port and brackets."""
    name = host[1:].partition("]")[0] if host.startswith("[") else host.partition(":")[0]
    return name.lower()


def _is_address(name: str) -> bool:
    try:
        ipaddress.ip_address(name)
    except ValueError:
        return False
    return True


def _page_files() -> dict[str, tuple[bytes, str]]:
    """The files of the package's folder ``page`` that a browser may have: content and media type."""
    folder = resources.files("tidings.dev").joinpath("page")
    found: dict[str, tuple[bytes, str]] = {}
    if folder.is_dir():
        for file in folder.iterdir():
            kind = _TYPES.get("." + file.name.rpartition(".")[2])
            if kind is not None and file.is_file():
                found[file.name] = (file.read_bytes(), kind)
    return found
