"""Reading a stream as it lies there, without a consumer: batched Direct Gets (NATS ADR-31).

A replica answers, which may lag the leader for a moment. What is read costs the server what lies between the first and
the last message of the subject: one subject of a partition is found by the stream's index of subjects.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, Mapping
from datetime import UTC, datetime
from typing import Any, Final, NamedTuple

import orjson

from tidings.wire.errors import StreamUnavailable

from .connection import Connection
from .consumers import NOT_FOUND, direct_get_status

__all__ = ["Message", "batch", "fields", "messages"]

_BATCH: Final = 256
_END_OF_BATCH: Final = 204


class Message(NamedTuple):
    """A message of a stream."""

    sequence: int
    where: str
    """Its subject."""
    stored: str
    """When: RFC 3339, UTC, to the nanosecond."""
    headers: Mapping[str, str]
    body: bytes


async def batch(
    connection: Connection, stream: str, where: str, size: int, *, first: int = 1, since: datetime | None = None
) -> list[Message]:
    """Up to `size` messages on a subject or pattern, oldest first, from a sequence on, or from a time; none at the end.

    Raises `StreamUnavailable`.
    """
    found: list[Message] = []
    status: asyncio.Future[int] = asyncio.get_running_loop().create_future()

    def arrived(subject: bytes, reply: bytes, header: bytes | None, body: bytes) -> None:
        code = direct_get_status(header) if header is not None else 0
        if code:
            if not status.done():
                status.set_result(code)
        elif header is not None:
            said = fields(header)
            found.append(Message(int(said["Nats-Sequence"]), said["Nats-Subject"], said["Nats-Time-Stamp"], said, body))

    start: dict[str, Any] = {"seq": first} if since is None else {"start_time": since.astimezone(UTC).isoformat()}
    request = orjson.dumps({**start, "batch": size, "next_by_subj": where})
    inbox = connection.new_inbox()
    watch = await connection.listen(inbox, arrived)
    try:
        async with asyncio.timeout(connection.request_timeout_s):
            connection.send(f"$JS.API.DIRECT.GET.{stream}", request, inbox)
            code = await status
    except TimeoutError:
        raise StreamUnavailable(f"{stream} did not answer in {connection.request_timeout_s} s") from None
    finally:
        connection.handlers.pop(b"%d" % watch._id, None)
        if not connection.is_closed:
            await watch.unsubscribe()
    if code not in (_END_OF_BATCH, NOT_FOUND):
        raise StreamUnavailable(f"{stream} cannot be read now: status {code}")
    return found


async def messages(
    connection: Connection, stream: str, where: str, *, first: int = 1, since: datetime | None = None
) -> AsyncGenerator[Message, None]:
    """All messages on a subject or pattern, oldest first, from a sequence on, or from a time; errors as `batch`."""
    while some := await batch(connection, stream, where, _BATCH, first=first, since=since):
        for message in some:
            yield message
        first, since = some[-1].sequence + 1, None


def fields(header: bytes) -> dict[str, str]:
    """The names and values of a message's header."""
    lines = (line.partition(":") for line in header.decode("latin-1").split("\r\n")[1:])
    return {name: value.strip() for name, colon, value in lines if colon}
