"""Signing tokens with the mesh's own secret (HS256): for the command line, the development page and tests.

In production an identity provider signs with a private key that Tidings never has, or the application's back end
with the shared secret; any JWT library makes the same token.
"""

from __future__ import annotations

import time
from typing import Any, Final

import jwt

from tidings.runtime.settings import listed
from tidings.wire.errors import NotAuthenticated
from tidings.wire.subject import escape

from .scopes import Scopes

__all__ = ["issue", "issue_service"]

_ALGORITHM: Final = "HS256"


def issue(
    key: str, user: str, device: str | None = None, ttl_s: int = 3600, *, issuer: str = "", audience: str = ""
) -> str:
    """Sign a user's token with the first secret of `key` (the setting `token_key`), valid for `ttl_s` seconds.

    Raises `BadSubject` for a user or device that could never connect.
    """
    escape(user)
    claims: dict[str, Any] = {"sub": user}
    if device is not None:
        escape(device, "device id")
        claims["dev"] = device
    return _sign(key, claims, ttl_s, issuer, audience)


def issue_service(key: str, name: str, scope: str, ttl_s: int = 3600, *, issuer: str = "", audience: str = "") -> str:
    """Sign a service's token with these scopes; raises `BadSubject` for its name and `BadScope` for a scope."""
    escape(name, "service name")
    return _sign(key, {"sub": name, "scope": Scopes.checked(scope).text}, ttl_s, issuer, audience)


def _sign(key: str, claims: dict[str, Any], ttl_s: int, issuer: str, audience: str) -> str:
    secrets = listed(key)
    if not secrets:
        raise NotAuthenticated("there is no secret to sign with: set token_key")
    now = int(time.time())
    claims |= {"iat": now, "exp": now + ttl_s}
    claims |= {name: value for name, value in (("iss", issuer), ("aud", audience)) if value}
    return jwt.encode(claims, secrets[0], algorithm=_ALGORITHM)
