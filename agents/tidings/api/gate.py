"""The gate: who asks, whether that is allowed, and whether there is room for it.

A user's token opens what is under ``/v1/users/<that user>``, and nothing else. A service's opens what its scopes say.
Nobody learns who exists: an unknown user has an empty inbox.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from typing import Final, NamedTuple

from aiohttp import hdrs, web

from tidings.identity import Caller, Device, Verifier
from tidings.runtime.porch import Porch
from tidings.runtime.settings import Settings
from tidings.stream.revocations import Revocations
from tidings.wire.errors import BadSubject, NotAuthenticated
from tidings.wire.subject import escape

from . import problems
from .limits import Limiter, Policy, Room, Verdict, header_fields
from .problems import Refused

__all__ = ["Call", "Gate", "Handler", "Route"]

_MINUTE: Final = 60


class Call(NamedTuple):
    """A request that passed the gate."""

    request: web.Request
    who: Device | Caller
    user: str
    """Whom the path names; empty where it names nobody."""
    verdicts: list[Verdict]
    """What the limits said, for the header fields of the answer."""

    @property
    def service(self) -> Caller:
        """Whoever asks, where the gate lets only services in."""
        assert isinstance(self.who, Caller)
        return self.who


Handler = Callable[[Call], Awaitable[web.StreamResponse]]


class Route(NamedTuple):
    """One operation of the api."""

    method: str
    path: str
    handler: Handler
    scope: str | None
    """What a service needs for it; None where that is in the body, and the handler's to check."""


class Gate:
    """Lets requests of tokens through that `verifier` knows and nobody has revoked.

    Their connections are let in from the porch. `clock` gives seconds that never go back.
    """

    def __init__(
        self,
        settings: Settings,
        verifier: Verifier,
        revocations: Revocations,
        porch: Porch,
        clock: Callable[[], float],
    ) -> None:
        self._porch = porch
        self._verifier = verifier
        self._revocations = revocations
        self._services = Limiter(Policy("credential", settings.api_requests_per_minute, _MINUTE), clock)
        self._users = Limiter(Policy("user", settings.api_user_requests_per_minute, _MINUTE), clock)
        self._notifications = Limiter(Policy("notifications", settings.api_notifications_per_minute, _MINUTE), clock)
        self._room = Room(settings.api_concurrency_per_credential, "too_many_concurrent", "requests of this credential")

    def guard(self, route: Route) -> Callable[[web.Request], Awaitable[web.StreamResponse]]:
        """The handler of a route, behind the gate."""

        async def guarded(request: web.Request) -> web.StreamResponse:
            verdicts: list[Verdict] = []
            try:
                response = await self._pass(request, route, verdicts)
            except Exception as error:  # noqa: BLE001 - every error becomes an answer, which has the limits too
                response = problems.response(problems.as_refusal(error))
            response.headers.update(header_fields(verdicts))
            return response

        return guarded

    async def _pass(self, request: web.Request, route: Route, verdicts: list[Verdict]) -> web.StreamResponse:
        who = await self._authenticate(request)
        self._porch.forget(request.protocol)
        # A user and a service of one name are two.
        name = f"s:{who.name}" if isinstance(who, Caller) else f"u:{who.user}"
        with self._room.of(name):
            # Whatever is asked for: what is refused counts too.
            _take(verdicts, self._services if isinstance(who, Caller) else self._users, name)
            user = _user_of(request)
            _check_allowed(who, user, route.scope)
            if user is not None and isinstance(who, Caller):
                _take(verdicts, self._users, f"{name}\0{user}")
            return await route.handler(Call(request, who, user or "", verdicts))

    def take_notifications(self, call: Call, count: int) -> None:
        """A service is about to publish so many; raises `Refused`."""
        _take(call.verdicts, self._notifications, call.service.name, count)

    async def _authenticate(self, request: web.Request) -> Device | Caller:
        given = request.headers.getall(hdrs.AUTHORIZATION, [])
        if not given:
            raise Refused("not_authenticated", "send a token: Authorization: Bearer …")
        scheme, _, token = given[0].partition(" ")
        if len(given) > 1 or scheme.lower() != "bearer" or not token.strip():
            raise NotAuthenticated("the header must be one, and be like Authorization: Bearer …")
        who = await self._verifier.verify(token.strip())
        if isinstance(who, Device) and self._revocations.refuse(who.user, who.device, who.issued):
            raise NotAuthenticated("the token was revoked: sign in again")
        return who


def _take(verdicts: list[Verdict], limiter: Limiter, key: str, units: int = 1) -> None:
    verdict = limiter.take(key, units)
    verdicts.append(verdict)
    if not verdict.allowed:
        raise Refused(
            "too_many_requests",
            f"the limit {verdict.policy.name!r} is reached: come back in {verdict.retry_s} s",
            retry_s=verdict.retry_s,
        )


def _user_of(request: web.Request) -> str | None:
    user = request.match_info.get("user")
    if user is not None:
        try:
            escape(user)
        except BadSubject as error:
            raise Refused("bad_parameter", str(error), parameter="user") from None
    return user


def _check_allowed(who: Device | Caller, user: str | None, scope: str | None) -> None:
    if isinstance(who, Device):
        if user is None:
            raise Refused("not_allowed", "this is for services: a user's token does not open it")
        if user != who.user:
            raise Refused("not_allowed", "a user's token is for that user's own inbox and subscriptions")
    elif scope is not None and not who.scopes.allows(scope):
        raise Refused("not_allowed", f"the token lacks the scope {scope}")
