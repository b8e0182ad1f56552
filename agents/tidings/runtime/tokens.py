"""Device tokens: JSON Web Tokens (RFC 7519) signed with HS256.

Claims: ``sub`` the user, ``dev`` the device (optional: any device of the user), ``iat`` and ``exp``.
"""

from __future__ import annotations

import time
from typing import Final, NamedTuple

import jwt

from tidings.wire.errors import BadSubject, NotAuthenticated
from tidings.wire.subject import escape

__all__ = ["Identity", "issue", "verify"]

_ALGORITHM: Final = "HS256"
_LEEWAY_S: Final = 10
"""Clocks of two machines may differ by so much."""


class Identity(NamedTuple):
    """Who a token speaks for; a `device` of None leaves the choice to the client."""

    user: str
    device: str | None
    expires: int
    """Unix seconds."""


def issue(key: str, user: str, device: str | None = None, ttl_s: int = 3600) -> str:
    """Sign a token; raises `BadSubject` for a user or device that could never connect."""
    escape(user)
    claims: dict[str, str | int] = {"sub": user}
    if device is not None:
        escape(device, "device id")
        claims["dev"] = device
    now = int(time.time())
    return jwt.encode({**claims, "iat": now, "exp": now + ttl_s}, key, algorithm=_ALGORITHM)


def verify(key: str, token: str) -> Identity:
    """Check signature and times; raises `NotAuthenticated` with what is wrong."""
    try:
        claims = jwt.decode(token, key, algorithms=[_ALGORITHM], leeway=_LEEWAY_S, options={"require": ["sub", "exp"]})
    except jwt.ExpiredSignatureError:
        raise NotAuthenticated("the token has expired: get a new one") from None
    except jwt.PyJWTError as error:
        raise NotAuthenticated(f"the token is not valid: {error}") from None
    user, device = claims["sub"], claims.get("dev")
    try:
        escape(user)
        if device is not None:
            escape(device, "device id")
    except (BadSubject, TypeError) as error:
        raise NotAuthenticated(f"the token names nobody: {error}") from None
    return Identity(user, device, int(claims["exp"]))
