"""Public keys at an address, which rotate there.

The last good keys stay when what is there cannot be read, and the log says so once: an outage of the identity provider
must not be one of the mesh. Where there never were any, nobody gets in.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable, Sequence
from typing import Final

import aiohttp

from tidings.runtime.settings import Settings
from tidings.wire.errors import BadKeys

from .keys import MAX_DOCUMENT_BYTES, Key, need_crypto, read_jwks
from .web import FetchFailed, check_url, fetch

__all__ = ["UrlKeys"]

_AGAIN_S: Final = 5.0
"""After a failure, unless the next reading is sooner."""

log = logging.getLogger("tidings.identity")


class UrlKeys:
    """A JWK Set at an address: read at the start, every `token_jwks_refresh_s`, and when a token names a key that is
    not there, but not more often than every `token_jwks_pause_s`."""

    def __init__(self, settings: Settings, clock: Callable[[], float]) -> None:
        need_crypto()
        check_url("token_jwks_url", settings.token_jwks_url)
        self._settings = settings
        self._clock = clock
        self._http: aiohttp.ClientSession | None = None
        self._keys: list[Key] = []
        self._asked_at = float("-inf")
        self._reading: asyncio.Task[None] | None = None
        self._timer: asyncio.Task[None] | None = None
        self._failing = False

    async def open(self) -> None:
        """Read them for the first time, and again and again from now on. An address that is down is no error."""
        self._http = aiohttp.ClientSession(cookie_jar=aiohttp.DummyCookieJar(), trust_env=False)
        await self._read_once()
        self._timer = asyncio.create_task(self._keep_reading())

    async def close(self) -> None:
        tasks = [task for task in (self._timer, self._reading) if task is not None]
        self._timer = self._reading = None
        for task in tasks:
            task.cancel()
        if tasks:
            await asyncio.wait(tasks)
        if self._http is not None:
            await self._http.close()
            self._http = None

    def current(self) -> Sequence[Key]:
        return self._keys

    @property
    def known(self) -> bool:
        """If it was read at all."""
        return bool(self._keys)

    async def look_again(self) -> None:
        """A token names a key that is not there: perhaps it is new. Returns without reading when that was just done."""
        if self._reading is None and self._clock() - self._asked_at < self._settings.token_jwks_pause_s:
            return
        await self._read_once()

    async def _read_once(self) -> None:
        """All who want it read at the same time wait for one reading."""
        if self._reading is None:
            self._reading = asyncio.create_task(self._read())
            self._reading.add_done_callback(self._has_read)
        # Whoever gives up leaves the others their reading.
        await asyncio.shield(self._reading)

    def _has_read(self, task: asyncio.Task[None]) -> None:
        if self._reading is task:
            self._reading = None

    async def _read(self) -> None:
        assert self._http is not None
        settings = self._settings
        self._asked_at = self._clock()
        try:
            document = await fetch(
                self._http,
                "GET",
                settings.token_jwks_url,
                timeout_s=settings.token_jwks_timeout_s,
                most_bytes=MAX_DOCUMENT_BYTES,
                headers={"Accept": "application/jwk-set+json, application/json"},
            )
            keys = read_jwks(document)
        except (FetchFailed, BadKeys) as error:
            if not self._failing:
                what = "its last keys stay" if self._keys else "no token of its keys is accepted"
                log.warning("token_jwks_url %s: %s; %s", settings.token_jwks_url, error, what)
            self._failing = True
            return
        if self._failing or [key.kid for key in keys] != [key.kid for key in self._keys]:
            log.info("token_jwks_url %s has %d keys now", settings.token_jwks_url, len(keys))
        self._failing = False
        self._keys = keys

    async def _keep_reading(self) -> None:
        while True:
            refresh = self._settings.token_jwks_refresh_s
            await asyncio.sleep(min(refresh, _AGAIN_S) if self._failing else refresh)
            await self._read_once()
