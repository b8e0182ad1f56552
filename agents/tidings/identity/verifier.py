"""Verifying tokens: JSON Web Tokens (RFC 7519), as RFC 8725 says to.

| claim | |
|---|---|
| ``sub`` | the user; of a service's token, the service |
| ``dev`` | the one device that it is for (optional; never in a service's token) |
| ``scope`` | makes it a service's token: what that may do |
| ``exp`` | required; not further away than `token_ttl_max_s` |
| ``iat`` | when it was issued (optional): without one every revocation ends it |
| ``nbf`` | not before |
| ``iss``, ``aud`` | must be `token_issuer` and one of `token_audience`, where those are set |
"""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, Final

import jwt

from tidings.runtime.settings import Settings, listed
from tidings.wire.errors import BadSubject, KeysUnavailable, NotAuthenticated, StartFailed
from tidings.wire.frames import MAX_TOKEN
from tidings.wire.subject import escape

from .files import FileKeys
from .keys import ALGORITHMS, Key, candidates, secret_keys
from .principals import Caller, Device
from .scopes import Scopes

if TYPE_CHECKING:
    from .jwks import UrlKeys

__all__ = ["Verifier"]

_DAMAGED: Final = "the token is not valid: it is no JSON Web Token"
_FORGED: Final = "the token is not valid: no key of this mesh has signed it"


class Verifier:
    """Tells whom a token speaks for. `open` it before the first token; raises `StartFailed` when no key is set.

    The clock is Unix seconds. No message of a refusal repeats anything of a token.
    """

    def __init__(self, settings: Settings, *, clock: Callable[[], float] = time.time) -> None:
        if not (settings.token_key or settings.token_key_file or settings.token_jwks_url):
            raise StartFailed(
                "token_key is not set: give TIDINGS_TOKEN_KEY, such as `openssl rand -hex 32`, or the public keys of "
                "whoever signs tokens, as TIDINGS_TOKEN_KEY_FILE or TIDINGS_TOKEN_JWKS_URL"
            )
        self._clock = clock
        self._settings = settings
        self._secrets = secret_keys(settings.token_key)
        self._file = FileKeys(settings.token_key_file) if settings.token_key_file else None
        self._url = _url_keys(settings) if settings.token_jwks_url else None
        self._audience = listed(settings.token_audience)

    async def open(self) -> None:
        """Read the keys. Raises `BadSettings` for a file without any; an address that is down is tried again."""
        if self._file is not None:
            self._file.open()
        if self._url is not None:
            await self._url.open()

    async def close(self) -> None:
        """Closing twice, or before opening, is fine."""
        if self._url is not None:
            await self._url.close()

    @property
    def problem(self) -> str | None:
        """Why tokens may be refused that are good: the address of keys could not be read yet."""
        if self._url is not None and not self._url.known:
            return "the keys at token_jwks_url could not be read yet"
        return None

    async def verify(self, token: str) -> Device | Caller:
        """Check signature, times, issuer and audience.

        Raises `NotAuthenticated` with what is wrong, and `KeysUnavailable` where the keys that could tell were never
        read.
        """
        algorithm, kid = _read_header(token)
        able = candidates(self._keys(), algorithm, kid)
        claims = self._claims(token, able)
        if claims is None and self._url is not None and algorithm != "HS256" and not _has_name(able, kid):
            await self._url.look_again()
            claims = self._claims(token, candidates(self._keys(), algorithm, kid))
            if claims is None and not self._url.known:
                raise KeysUnavailable("the keys that verify tokens cannot be read now: come again later")
        if claims is None:
            raise NotAuthenticated(_FORGED)
        return self._principal(claims)

    def _keys(self) -> list[Key]:
        keys = list(self._secrets)
        if self._file is not None:
            keys += self._file.current()
        if self._url is not None:
            keys += self._url.current()
        return keys

    def _claims(self, token: str, able: list[Key]) -> dict[str, Any] | None:
        """What it says; None where none of these keys has signed it."""
        settings = self._settings
        for key in able:
            try:
                return jwt.decode(
                    token,
                    key.material,
                    algorithms=[key.algorithm],
                    leeway=settings.token_leeway_s,
                    issuer=settings.token_issuer or None,
                    audience=self._audience or None,
                    options={"require": ["sub", "exp"], "verify_exp": False, "verify_iat": False, "verify_nbf": False},
                )
            except jwt.InvalidSignatureError:
                continue
            except (jwt.InvalidIssuerError, jwt.InvalidAudienceError) as error:
                raise NotAuthenticated(f"the token is for somebody else: {_sentence(error)}") from None
            except jwt.MissingRequiredClaimError as error:
                raise NotAuthenticated(f"the token lacks the claim {error.claim!r}") from None
            except (jwt.PyJWTError, RecursionError, TypeError, ValueError):
                raise NotAuthenticated(_DAMAGED) from None
        return None

    def _principal(self, claims: dict[str, Any]) -> Device | Caller:
        expires, issued = self._check_times(claims)
        name, device, scope = claims["sub"], claims.get("dev"), claims.get("scope")
        try:
            escape(name)
            if device is not None:
                escape(device, "device id")
        except (BadSubject, TypeError):
            raise NotAuthenticated("the token names nobody: `sub` and `dev` must be ids") from None
        if scope is None:
            return Device(name, device, expires, issued)
        if not isinstance(scope, str) or device is not None:
            raise NotAuthenticated("the token is not valid: `scope` is text, and a service has no device")
        return Caller(name, Scopes(scope), expires)

    def _check_times(self, claims: dict[str, Any]) -> tuple[int, int | None]:
        """When it ends and when it was issued. What is no number is refused, where PyJWT would try to read it."""
        now, leeway, longest = self._clock(), self._settings.token_leeway_s, self._settings.token_ttl_max_s
        expires, issued, begins = (_time(claims, name) for name in ("exp", "iat", "nbf"))
        assert expires is not None
        if expires + leeway <= now:
            raise NotAuthenticated("the token has expired: get a new one")
        if begins is not None and begins - leeway > now:
            raise NotAuthenticated("the token is not valid yet: is this machine's clock right?")
        if issued is not None and issued - leeway > now:
            raise NotAuthenticated("the token was issued in the future: is this machine's clock right?")
        if expires - now > longest + leeway or (issued is not None and expires - issued > longest):
            raise NotAuthenticated(f"the token lives too long: this mesh accepts at most {longest} s (token_ttl_max_s)")
        return expires, issued


def _url_keys(settings: Settings) -> UrlKeys:
    # Imported here: who only signs a token on the command line does not wait for an HTTP client.
    from .jwks import UrlKeys

    return UrlKeys(settings, time.monotonic)


def _has_name(keys: list[Key], kid: str | None) -> bool:
    """If one of them is the key that the token names: one of no name is not, though it was tried."""
    return kid is not None and any(key.kid == kid for key in keys)


def _read_header(token: str) -> tuple[str, str | None]:
    """Its algorithm, which must be one of ours, and the name of its key, before anything of it is believed."""
    if len(token) > MAX_TOKEN:
        raise NotAuthenticated(f"the token is not valid: it is over {MAX_TOKEN} characters")
    try:
        header = jwt.get_unverified_header(token)
    except (jwt.PyJWTError, RecursionError, TypeError, ValueError):
        raise NotAuthenticated(_DAMAGED) from None
    algorithm, kid = header.get("alg"), header.get("kid")
    if algorithm not in ALGORITHMS:
        raise NotAuthenticated(f"the token is not valid: it must be signed with one of {', '.join(ALGORITHMS)}")
    if "crit" in header or "b64" in header:
        raise NotAuthenticated("the token is not valid: its header asks for what this mesh does not do (crit)")
    if kid is not None and not isinstance(kid, str):
        raise NotAuthenticated(_DAMAGED)
    return algorithm, kid


def _time(claims: dict[str, Any], name: str) -> int | None:
    value = claims.get(name)
    if value is None and name != "exp":
        return None
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not 0 <= value < 2**53:
        raise NotAuthenticated(f"the token is not valid: `{name}` is no time in Unix seconds")
    return int(value)


def _sentence(error: jwt.PyJWTError) -> str:
    if isinstance(error, jwt.InvalidIssuerError):
        return "its `iss` is not token_issuer"
    return "its `aud` has none of token_audience"
