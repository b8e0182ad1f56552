"""Who may subscribe to what: the rules of the settings, and behind them whoever the operator's own service says.

::

    POST <subscribe_callback_url>
    {"user":"alice","topics":["post.42","team.7.>"]}

    200 {"allowed":["post.42"]}

What is not in the answer is refused. The service is asked for what the rules allow, never for a user's own
``user.<id>.>``. No answer, or one that is none, is no permission: `EntitlementUnavailable`, and the client asks again.
Answers are remembered for `subscribe_callback_ttl_s`, as many as `subscribe_callback_cache`.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections import OrderedDict
from collections.abc import Callable, Sequence
from typing import Final

import aiohttp
import orjson

from tidings.runtime.settings import Settings
from tidings.wire.errors import EntitlementUnavailable

from .rules import Entitlement, is_own
from .web import FetchFailed, check_url, fetch

__all__ = ["TopicEntitlement"]

_MOST_BYTES: Final = 262_144
_WAITING_A_TURN: Final = 8
"""Most requests that wait, for each that may be under way."""

log = logging.getLogger("tidings.identity")


class TopicEntitlement:
    """Open it before the first question. Raises `BadSettings` for rules or an address that cannot be."""

    def __init__(self, settings: Settings, *, clock: Callable[[], float] = time.monotonic) -> None:
        self._settings = settings
        self._clock = clock
        self._rules = Entitlement(settings.subscribe_rules)
        self._url = settings.subscribe_callback_url
        if self._url:
            check_url("subscribe_callback_url", self._url)
        self._http: aiohttp.ClientSession | None = None
        self._turns = asyncio.Semaphore(settings.subscribe_callback_at_once)
        self._under_way = 0
        self._known: OrderedDict[tuple[str, str], tuple[float, bool]] = OrderedDict()
        """Until when an answer counts, and what it was; the oldest first."""
        self._failing = False

    async def open(self) -> None:
        if self._url:
            headers = {"Content-Type": "application/json"}
            if self._settings.subscribe_callback_token:
                headers["Authorization"] = f"Bearer {self._settings.subscribe_callback_token}"
            self._http = aiohttp.ClientSession(headers=headers, cookie_jar=aiohttp.DummyCookieJar(), trust_env=False)

    async def close(self) -> None:
        """Closing twice, or before opening, is fine."""
        if self._http is not None:
            await self._http.close()
            self._http = None

    async def refused(self, user: str, patterns: Sequence[str]) -> list[str]:
        """Those that the user may not have; raises `EntitlementUnavailable` when that cannot be known now."""
        refused = self._rules.refused(user, patterns)
        if refused or self._http is None:
            return refused
        wanted = [pattern for pattern in patterns if not is_own(user, pattern)]
        known = {pattern: self._remembered(user, pattern) for pattern in wanted}
        unknown = [pattern for pattern, allowed in known.items() if allowed is None]
        if unknown:
            allowed = await self._ask(self._http, user, unknown)
            known.update((pattern, pattern in allowed) for pattern in unknown)
        return [pattern for pattern in wanted if not known[pattern]]

    def _remembered(self, user: str, pattern: str) -> bool | None:
        until, allowed = self._known.get((user, pattern), (0.0, False))
        return allowed if until > self._clock() else None

    def _remember(self, user: str, pattern: str, allowed: bool) -> None:
        self._known[user, pattern] = (self._clock() + self._settings.subscribe_callback_ttl_s, allowed)
        self._known.move_to_end((user, pattern))
        while len(self._known) > self._settings.subscribe_callback_cache:
            self._known.popitem(last=False)

    async def _ask(self, http: aiohttp.ClientSession, user: str, patterns: list[str]) -> set[str]:
        settings = self._settings
        if self._under_way >= settings.subscribe_callback_at_once * (1 + _WAITING_A_TURN):
            raise self._unavailable("too many questions wait for it")
        self._under_way += 1
        try:
            # Waiting for a turn counts: a client that has given up is not to be asked for.
            async with asyncio.timeout(settings.subscribe_callback_timeout_s), self._turns:
                answer = await fetch(
                    http,
                    "POST",
                    self._url,
                    timeout_s=settings.subscribe_callback_timeout_s,
                    most_bytes=_MOST_BYTES,
                    data=orjson.dumps({"user": user, "topics": patterns}),
                )
            allowed = _allowed(answer)
        except TimeoutError:
            raise self._unavailable("it does not answer in time") from None
        except FetchFailed as error:
            raise self._unavailable(str(error)) from None
        finally:
            self._under_way -= 1
        self._failing = False
        for pattern in patterns:
            self._remember(user, pattern, pattern in allowed)
        return allowed

    def _unavailable(self, reason: str) -> EntitlementUnavailable:
        if not self._failing:
            log.warning("subscribe_callback_url %s: %s; nobody can subscribe", self._url, reason)
        self._failing = True
        return EntitlementUnavailable("it cannot be found out now who may subscribe to this: ask again later")


def _allowed(answer: bytes) -> set[str]:
    try:
        allowed = orjson.loads(answer)["allowed"]
        if isinstance(allowed, list) and all(isinstance(one, str) for one in allowed):
            return set(allowed)
    except (orjson.JSONDecodeError, KeyError, TypeError):
        pass
    raise FetchFailed('its answer is not {"allowed":[…]}')
