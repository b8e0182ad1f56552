"""Bodies and queries: read within their limits, and strictly. What is not known is refused, with its place."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from typing import Any, Final, TypeVar

import orjson
from aiohttp import hdrs, web

from tidings.runtime.settings import Settings
from tidings.wire.pointer import pointer_to

from .problems import Path, Refused

__all__ = ["choice", "json_body", "listed", "members", "parameters", "text", "whole_number"]

_JSON: Final = "application/json"

_Choice = TypeVar("_Choice", bound=str)


async def json_body(request: web.Request, settings: Settings) -> Any:
    """The JSON of a request; raises `Refused`."""
    if request.content_type != _JSON:
        raise Refused("unsupported_media_type", f"send Content-Type: {_JSON}", headers={hdrs.ACCEPT: _JSON})
    if request.headers.get(hdrs.CONTENT_ENCODING, "identity").lower() != "identity":
        raise Refused("unsupported_media_type", "send the body as it is, without a Content-Encoding")
    raw = await _read(request, settings.api_body_max_bytes, settings.api_body_timeout_s)
    try:
        return orjson.loads(raw)
    except orjson.JSONDecodeError as error:
        raise Refused("malformed_json", f"the body is not UTF-8 JSON: {error}") from None


async def _read(request: web.Request, most: int, timeout_s: float) -> bytes:
    too_large = Refused("body_too_large", f"the body may have {most} bytes: send less at a time")
    if request.content_length is not None and request.content_length > most:
        raise too_large
    try:
        async with asyncio.timeout(timeout_s):
            await request.content.readexactly(most + 1)
        raise too_large
    except asyncio.IncompleteReadError as whole:
        return whole.partial
    except (web.RequestPayloadError, ConnectionError):
        raise Refused("body_incomplete", "the body ended before its end: send it again") from None
    except TimeoutError:
        raise Refused("body_timeout", f"the body did not arrive within {timeout_s:g} s") from None


def members(value: Any, at: Path, *, required: Sequence[str] = (), optional: Sequence[str] = ()) -> dict[str, Any]:
    """An object with these members, and no others."""
    where = pointer_to(*at)
    if type(value) is not dict:
        raise Refused("invalid_body", "this must be an object", pointer=where)
    known = {*required, *optional}
    for name in value:
        if name not in known:
            raise Refused(
                "invalid_body",
                f"{name[:80]!r} is no member: there are {', '.join((*required, *optional))}",
                pointer=pointer_to(*at, name),
            )
    for name in required:
        if name not in value:
            raise Refused("invalid_body", f"the member `{name}` is missing", pointer=where)
    return value


def listed(value: Any, at: Path, most: int) -> list[Any]:
    """A list with one item or more."""
    if type(value) is not list or not 0 < len(value) <= most:
        raise Refused("invalid_body", f"this must be a list of 1 to {most} items", pointer=pointer_to(*at))
    return value


def text(value: Any, at: Path) -> str:
    """A string. How long it may be is said by what it stands for."""
    if type(value) is not str:
        raise Refused("invalid_body", "this must be a string", pointer=pointer_to(*at))
    return value


def choice(value: Any, at: Path, choices: Sequence[_Choice]) -> _Choice:
    """One of these texts."""
    for one in choices:
        if value == one:
            return one
    raise Refused("invalid_body", f"this must be one of {', '.join(choices)}", pointer=pointer_to(*at))


def parameters(request: web.Request, *names: str) -> dict[str, str]:
    """The query, which may have these parameters, each once."""
    found: dict[str, str] = {}
    for name, value in request.query.items():
        if name not in names:
            known = ", ".join(names) or "none"
            raise Refused("bad_parameter", f"{name[:80]!r} is no parameter: there are {known}", parameter=name[:80])
        if name in found:
            raise Refused("bad_parameter", f"`{name}` stands there twice", parameter=name)
        found[name] = value
    return found


def whole_number(given: dict[str, str], name: str, least: int, most: int, default: int) -> int:
    """A parameter that is a number."""
    value = given.get(name)
    if value is None:
        return default
    if not value.isascii() or not value.isdigit() or len(value) > 16 or not least <= int(value) <= most:
        raise Refused("bad_parameter", f"`{name}` must be a whole number from {least} to {most}", parameter=name)
    return int(value)
