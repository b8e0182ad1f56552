"""The few HTTP requests of this package: one bounded answer, in a bounded time, from an address that was checked."""

from __future__ import annotations

import ipaddress
from typing import Any, Final
from urllib.parse import urlsplit

import aiohttp

from tidings.wire.errors import BadSettings

__all__ = ["FetchFailed", "check_url", "fetch"]

_OK: Final = 200


class FetchFailed(Exception):
    """The request got no answer that can be used; the message is for a log, and names no secret."""


def check_url(setting: str, url: str) -> None:
    """Raise `BadSettings` unless it is https, or http to this machine: what comes from there decides who gets in."""
    try:
        parts = urlsplit(url)
        host, port = parts.hostname or "", parts.port
    except ValueError:
        host, port, parts = "", None, urlsplit("")
    if not host or port == 0 or parts.scheme not in ("https", "http"):
        raise BadSettings(f"{setting} is {url!r}: it must be like https://id.example.com/keys")
    if parts.username is not None or parts.password is not None:
        raise BadSettings(f"{setting} has a user or a password in its address, where logs would show it")
    if parts.scheme == "http" and not _is_loopback(host):
        raise BadSettings(f"{setting} is {url!r}: it must be https, as what answers there decides who gets in")


def _is_loopback(host: str) -> bool:
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"


async def fetch(
    http: aiohttp.ClientSession, method: str, url: str, *, timeout_s: float, most_bytes: int, **options: Any
) -> bytes:
    """The body of a 200 answer; raises `FetchFailed` for everything else. Redirects are not followed."""
    try:
        async with http.request(
            method, url, allow_redirects=False, timeout=aiohttp.ClientTimeout(total=timeout_s), **options
        ) as answer:
            if answer.status != _OK:
                raise FetchFailed(f"it answered {answer.status}")
            body = bytearray()
            async for chunk in answer.content.iter_any():
                body += chunk
                if len(body) > most_bytes:
                    raise FetchFailed(f"its answer is over {most_bytes} bytes")
            return bytes(body)
    except TimeoutError:
        raise FetchFailed(f"it did not answer within {timeout_s:g} s") from None
    except (aiohttp.ClientError, OSError, ValueError) as error:
        raise FetchFailed(str(error) or type(error).__name__) from None
