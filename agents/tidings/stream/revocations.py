"""Revoked tokens: written once, known to every gateway and api agent within two seconds.

A revocation is a message of the stream `REVOCATIONS`, the last one of a user or of a user's device. It means: no token
of theirs that was issued before it. Its time is that of the stream, so that there is one clock for all of them. The
stream keeps it longer than any token lives.

Who follows them reads all at the start, and from then on every `_LOOK_S` what came behind the last one, by Direct Get,
which costs the JetStream API nothing. After a break of any kind everything is read again, so that nothing is missed.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable
from datetime import datetime
from typing import Any, Final, NamedTuple

import orjson

from tidings.runtime.backoff import Backoff
from tidings.runtime.settings import Settings
from tidings.wire import subject
from tidings.wire.errors import BadSubject, StreamUnavailable, TopologyMismatch

from .connection import ApiError, Connection
from .consumers import NOT_FOUND, direct_get_status
from .topology import REVOCATIONS

__all__ = ["Revocation", "Revocations", "revoke"]

_LOOK_S: Final = 0.5
_LOOKS_A_CHECK: Final = 20
"""After so many looks the stream is asked whether it is still the same one."""
_BATCH: Final = 500
_ANSWER_S: Final = 2.0
_END_OF_BATCH: Final = 204
_BEGINNING: Final = 0

log = logging.getLogger("tidings.revocations")


class Revocation(NamedTuple):
    """No token of the user (of this device, if one is named) that was issued at `at`, in Unix seconds, or before."""

    user: str
    device: str | None
    at: int


async def revoke(connection: Connection, user: str, device: str | None = None) -> None:
    """Refuse every token that was issued to a user, or to one device, up to now.

    Returns when it is stored, raises `BadSubject` for names that cannot be, and `StreamUnavailable`.
    """
    where = subject.revoked_user(user) if device is None else subject.revoked_device(user, device)
    await connection.store(where, b"")


class Revocations:
    """All revocations in force. `told` is called with each that is new, in the turn in which it becomes known."""

    def __init__(
        self, connection: Connection, settings: Settings, told: Callable[[Revocation], None] = lambda new: None
    ) -> None:
        self._connection = connection
        self._keep_s = int(settings.token_ttl_max_s + 2 * settings.token_leeway_s)
        self._told = told
        self._known: dict[tuple[str, str | None], int] = {}
        """Oldest first."""
        self._created = ""
        self._last = _BEGINNING
        self._inbox = ""
        self._asked = 0
        self._answer: asyncio.Future[int] | None = None
        self._found: list[tuple[str, int, int]] = []
        self._wake = asyncio.Event()
        self.current = False
        """If all that there are were read, and nothing has broken since."""

    def refuse(self, user: str, device: str | None, issued: int | None) -> bool:
        """If a token that was issued then, or at a time that it does not say, is revoked for this device."""
        revoked = (self._known.get((user, None)), self._known.get((user, device)))
        return any(at is not None and (issued is None or issued <= at) for at in revoked)

    async def open(self) -> None:
        """Read all of them; raises `StreamUnavailable`, or `TopologyMismatch` for a stream that is not right."""
        self._inbox = self._connection.new_inbox()
        await self._connection.listen(f"{self._inbox}.*", self._receive)
        await self._read_all()

    def cut_off(self) -> None:
        """The connection broke: what was published meanwhile is not known."""
        self.current = False

    def found(self) -> None:
        """The connection is back: read them now."""
        self._wake.set()

    async def follow(self) -> None:
        """Read what comes, for ever."""
        backoff = Backoff(0.1, 2.0)
        looks = 0
        while True:
            await self._pause(_LOOK_S if self.current else backoff.next())
            try:
                if not self.current:
                    await self._read_all()
                    log.info("the revocations are read again")
                elif looks % _LOOKS_A_CHECK == 0 and await self._is_another():
                    await self._read_all()
                else:
                    await self._read_on()
            except (StreamUnavailable, TopologyMismatch) as error:
                if self.current:
                    log.warning("the revocations cannot be read: %s", error)
                self.current = False
            else:
                backoff.reset()
            looks += 1

    async def _pause(self, seconds: float) -> None:
        try:
            async with asyncio.timeout(seconds):
                await self._wake.wait()
        except TimeoutError:
            return
        self._wake.clear()

    # Reading

    async def _read_all(self) -> None:
        info = await self._info()
        self._created, self._last = info["created"], _BEGINNING
        await self._read_on()
        # Any replica answers a Direct Get, also one that lags: the leader says whether there is more.
        while self._last < info["state"]["last_seq"] and await self._has_more():
            await self._read_on()
        self.current = True

    async def _is_another(self) -> bool:
        """If the stream was made anew behind our back, and counts from the beginning."""
        return bool((await self._info())["created"] != self._created)

    async def _has_more(self) -> bool:
        wanted = {"seq": self._last + 1, "next_by_subj": subject.REVOKED_WILDCARD}
        try:
            await self._connection.api(f"STREAM.MSG.GET.{REVOCATIONS}", wanted)
        except ApiError as error:
            if error.status == NOT_FOUND:
                return False
            raise
        return True

    async def _info(self) -> dict[str, Any]:
        try:
            info = await self._connection.api(f"STREAM.INFO.{REVOCATIONS}")
        except ApiError as error:
            if error.status != NOT_FOUND:
                raise
            raise TopologyMismatch(f"the server has no stream {REVOCATIONS}: run `tidings topology apply`") from None
        kept_s = info["config"].get("max_age", 0) // 1_000_000_000
        if 0 < kept_s < self._keep_s:
            raise TopologyMismatch(
                f"the stream {REVOCATIONS} forgets after {kept_s} s, and a token may live for {self._keep_s} s: run "
                "`tidings topology apply` with the same TIDINGS_TOKEN_TTL_MAX_S as here"
            )
        return info

    async def _read_on(self) -> None:
        """Take in what lies behind the last one that was read."""
        while await self._read_batch():
            pass

    async def _read_batch(self) -> bool:
        """If there may be more."""
        self._asked += 1
        self._found = []
        self._answer = asyncio.get_running_loop().create_future()
        wanted = orjson.dumps({"seq": self._last + 1, "batch": _BATCH})
        if not self._connection.send(f"$JS.API.DIRECT.GET.{REVOCATIONS}", wanted, f"{self._inbox}.{self._asked}"):
            raise StreamUnavailable("the connection to NATS is broken")
        try:
            async with asyncio.timeout(_ANSWER_S):
                status = await self._answer
        except TimeoutError:
            raise StreamUnavailable(f"the stream {REVOCATIONS} does not answer") from None
        if status not in (_END_OF_BATCH, NOT_FOUND):
            raise StreamUnavailable(f"the stream {REVOCATIONS} answers with status {status}")
        for where, sequence, at in self._found:
            self._last = sequence
            self._add(where, at)
        return len(self._found) == _BATCH

    def _receive(self, where: bytes, reply: bytes, header: bytes | None, body: bytes) -> None:
        if header is None or not where.endswith(b".%d" % self._asked):
            # Such as the rest of an answer that nobody waits for any more.
            return
        status = direct_get_status(header)
        if status:
            if self._answer is not None and not self._answer.done():
                self._answer.set_result(status)
            return
        said = dict(line.split(": ", 1) for line in header.decode().split("\r\n") if ": " in line)
        at = int(datetime.fromisoformat(said["Nats-Time-Stamp"]).timestamp())
        self._found.append((said["Nats-Subject"], int(said["Nats-Sequence"]), at))

    def _add(self, where: str, at: int) -> None:
        try:
            user, device = subject.revoked_of(where)
        except BadSubject as error:
            log.warning("a revocation names nobody: %s", error)
            return
        known = self._known.pop((user, device), None)
        self._known[user, device] = at if known is None else max(at, known)
        while (oldest := next(iter(self._known.items())))[1] + self._keep_s < at:
            # No token from before it is alive any more.
            del self._known[oldest[0]]
        if known is None or known < at:
            self._told(Revocation(user, device, at))
