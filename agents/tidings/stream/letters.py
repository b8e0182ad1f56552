"""Dead letters: what could not be understood or delivered, to be looked at, replayed or dropped.

A letter is known by its sequence in ``DEAD``. It holds the original bytes, why they died, and where they came from.

Replaying publishes the bytes once more, as a service would, and takes the letter out when the log has confirmed them:
who dies between the two repeats it, and within the log's duplicate window the repeat adds nothing, because the
message id names the letter. Past the window the copy has the id of its notification, by which clients drop it. A
letter that is gone was replayed, dropped, or is past ``dead_max_age_s``.
"""

from __future__ import annotations

import base64
from collections import deque
from collections.abc import AsyncGenerator, Callable, Mapping
from contextlib import aclosing
from datetime import datetime
from typing import Any, Final, NamedTuple

from tidings.wire import subject
from tidings.wire.errors import (
    InvalidNotification,
    NoSuchLetter,
    ReplayRefused,
    TopologyMismatch,
)
from tidings.wire.notification import check as check_envelope

from . import reading
from .connection import ApiError, Connection
from .consumers import NOT_FOUND
from .letter import EVERYTHING, Filter, Letter
from .topology import DEAD, TOPICS, is_partition

__all__ = [
    "EVERYTHING",
    "Filter",
    "Letter",
    "Page",
    "Replayed",
    "discard",
    "drop",
    "each",
    "look",
    "newest",
    "page",
    "replay",
]

_BATCH: Final = 256
"""Letters of one request: at most 5 MB."""
_SCAN: Final = 10_000
"""Letters that are read for one page at most: one of a rare kind may be short, and still have a `next`."""


class Page(NamedTuple):
    """Some letters, and where the next page begins: None at the end. A page may be short and have a `next`."""

    letters: list[Letter]
    next: int | None


class Replayed(NamedTuple):
    """Where the log has what was in the letter."""

    stream: str
    sequence: int
    duplicate: bool
    """It was there: an earlier replay had died before it took the letter out."""


async def newest(connection: Connection) -> int:
    """The sequence of the newest letter there ever was; 0 for none."""
    return (await _bounds(connection))[1]


async def page(
    connection: Connection,
    wanted: Filter = EVERYTHING,
    *,
    limit: int = 50,
    before: int | None = None,
    after: int | None = None,
) -> Page:
    """A page of letters: newest first, older than `before`; or with `after` oldest first, newer than that.

    All of it is in memory, bodies too. A replica answers, which may lag the leader for a moment.
    """
    first, last = await _bounds(connection)
    if after is not None:
        return await _oldest_first(connection, wanted, limit, after, last)
    found: list[Letter] = []
    end = last + 1 if before is None else min(before, last + 1)
    width, seen = _BATCH, 0
    while end > first and len(found) < limit and seen < _SCAN:
        start, before_window = max(first, end - width), seen
        some: deque[Letter] = deque(maxlen=limit - len(found))
        async with aclosing(_read(connection, start, end - 1)) as letters:
            async for letter in letters:
                seen += 1
                if wanted.matches(letter):
                    some.append(letter)
        found.extend(reversed(some))
        end = start
        # Where many were taken out in a row, ever wider windows find the next ones in few requests.
        width = 2 * width if seen == before_window else _BATCH
    if len(found) == limit:
        end = found[-1].sequence
    return Page(found, end if end > first else None)


async def _oldest_first(connection: Connection, wanted: Filter, limit: int, after: int, last: int) -> Page:
    found: list[Letter] = []
    seen = 0
    async with aclosing(_read(connection, max(after, 0) + 1, last)) as letters:
        async for letter in letters:
            seen += 1
            if wanted.matches(letter):
                found.append(letter)
            if len(found) == limit or seen == _SCAN:
                return Page(found, letter.sequence if letter.sequence < last else None)
    return Page(found, None)


async def each(
    connection: Connection, wanted: Filter = EVERYTHING, *, upto: int | None = None
) -> AsyncGenerator[Letter, None]:
    """All letters that are meant, oldest first: up to a sequence, or to the newest there is now."""
    first, last = await _bounds(connection)
    end = last if upto is None else min(upto, last)
    async with aclosing(_read(connection, first, end, since=wanted.since)) as letters:
        async for letter in letters:
            if wanted.matches(letter):
                yield letter


async def look(connection: Connection, sequence: int) -> Letter:
    """One letter; raises `NoSuchLetter`."""
    message = await _find(connection, sequence) if _may_be(sequence) else None
    if message is None:
        raise NoSuchLetter(_gone(sequence))
    headers = reading.fields(base64.b64decode(message.get("hdrs", "")))
    return _letter(
        message["seq"], message["subject"], message["time"], headers, base64.b64decode(message.get("data", ""))
    )


async def replay(
    connection: Connection, sequence: int, *, check: Callable[[bytes], object] = check_envelope
) -> Replayed:
    """Publish a letter once more and take it out: to its user, or to its topic.

    A broadcast that one device did not acknowledge goes to that device's user alone, not to the topic again. `check`
    raises `InvalidNotification` for what would come back at once. Raises `NoSuchLetter`, `ReplayRefused`, and
    `StreamUnavailable` when the log did not confirm: the letter is kept then, and a repeat is harmless.
    """
    letter = await look(connection, sequence)
    where = _destination(letter)
    try:
        check(letter.body)
    except InvalidNotification as error:
        raise ReplayRefused(f"letter {sequence} would come back at once: {error}") from None
    answer = await connection.store(where, letter.body, {"Nats-Msg-Id": f"replay.{sequence}.{letter.stored}"})
    if answer["stream"] != TOPICS and not is_partition(answer["stream"]):
        raise TopologyMismatch(
            f"stream {answer['stream']} stored letter {sequence}, from which no device reads: the server's subject "
            "mapping is not in force, or that stream's subjects cover ours (`tidings doctor`). The letter is kept"
        )
    await discard(connection, sequence)
    return Replayed(answer["stream"], answer["seq"], bool(answer.get("duplicate")))


async def discard(connection: Connection, sequence: int) -> bool:
    """Delete a letter; False when it is gone already."""
    if not _may_be(sequence):
        return False
    try:
        await connection.api(f"STREAM.MSG.DELETE.{DEAD}", {"seq": sequence})
    except ApiError:
        # JetStream has one number for what it could not delete and for what is not there.
        if await _find(connection, sequence) is None:
            return False
        raise
    return True


async def drop(connection: Connection, sequence: int) -> None:
    """Delete a letter; raises `NoSuchLetter`."""
    if not await discard(connection, sequence):
        raise NoSuchLetter(_gone(sequence))


def _gone(sequence: int) -> str:
    return f"there is no dead letter {sequence}: it was replayed or dropped, is past its age, or never was"


async def _find(connection: Connection, sequence: int) -> dict[str, Any] | None:
    """A letter as the leader has it; None when it is gone."""
    try:
        found: dict[str, Any] = await connection.api(f"STREAM.MSG.GET.{DEAD}", {"seq": sequence})
    except ApiError as error:
        if error.status == NOT_FOUND:
            return None
        raise
    message: dict[str, Any] = found["message"]
    return message


def _may_be(sequence: int) -> bool:
    return 0 < sequence < 2**63


def _destination(letter: Letter) -> str:
    """Where a service would publish it; raises `ReplayRefused`."""
    if letter.user is not None:
        return subject.notify_user(letter.user)
    if letter.topic is not None:
        return subject.notify_topic(letter.topic)
    raise ReplayRefused(
        f"letter {letter.sequence} came from {letter.origin!r}, which names no user and no topic: "
        "publish it anew where it belongs (`tidings deadletters show` has the body), and drop it"
    )


async def _bounds(connection: Connection) -> tuple[int, int]:
    """The first and the last sequence; the first is one more than the last when there are no letters."""
    state = (await connection.api(f"STREAM.INFO.{DEAD}"))["state"]
    return state["first_seq"], state["last_seq"]


async def _read(
    connection: Connection, first: int, last: int, *, since: datetime | None = None
) -> AsyncGenerator[Letter, None]:
    """The letters from one sequence, or from a time, to another sequence, oldest first."""
    while first <= last:
        some = await _batch(connection, first, since)
        since = None
        for letter in some:
            if letter.sequence > last:
                return
            yield letter
        if not some:
            return
        first = some[-1].sequence + 1


async def _batch(connection: Connection, first: int, since: datetime | None) -> list[Letter]:
    """Up to `_BATCH` letters from a sequence on, or from a time."""
    found = await reading.batch(connection, DEAD, subject.DEAD_WILDCARD, _BATCH, first=first, since=since)
    return [
        _letter(message.sequence, message.where, message.stored, message.headers, message.body) for message in found
    ]


def _letter(sequence: int, where: str, stored: str, headers: Mapping[str, str], body: bytes) -> Letter:
    ours = {name: value for name, value in headers.items() if name.startswith("Tidings-")}
    return Letter(sequence, subject.plane_of_dead(where), stored, ours, body)
