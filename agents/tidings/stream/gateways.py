"""What is said to gateways about a user: by a gateway to the others, and by whoever else acts for users.

Which gateways hold a device of the user, the store knows (`Store.holders`).
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Iterable, Sequence
from typing import Final

import orjson

from tidings.wire import subject
from tidings.wire.errors import StreamUnavailable

from .connection import Connection

__all__ = ["reload", "tell", "told"]

_ANSWER_S: Final = 0.5

log = logging.getLogger("tidings.stream")


def tell(connection: Connection, gateways: Iterable[str], user: str, frames: Sequence[bytes]) -> None:
    """Have frames sent to all live sessions of a user on these gateways; a courtesy, and lost when one is gone."""
    message = orjson.dumps({"user": user, "frames": [frame.decode() for frame in frames]})
    for gateway in gateways:
        connection.send(subject.gateway_user(gateway), message)


def told(message: bytes) -> tuple[str, list[bytes]]:
    """Whom the frames of a `tell` are for, and the frames."""
    said = orjson.loads(message)
    return said["user"], [frame.encode() for frame in said["frames"]]


async def reload(connection: Connection, gateways: Iterable[str], user: str) -> None:
    """What the user follows has changed, durably: have these gateways read it again, and return when they have.

    Raises `StreamUnavailable` where it cannot be said that they were asked.
    """
    await asyncio.gather(*(_ask(connection, gateway, user) for gateway in gateways))


async def _ask(connection: Connection, gateway: str, user: str) -> None:
    before = connection.reconnects
    try:
        await connection.ask(subject.gateway_topics(gateway), user.encode(), timeout_s=_ANSWER_S)
    except StreamUnavailable as error:
        # Was it asked? If we are who is cut off, it goes on, and knows nothing.
        await connection.confirm(timeout_s=_ANSWER_S)
        if connection.reconnects != before:
            raise
        # It was killed, stands still, or is cut off: it reads them before it hands out anything more.
        log.info("gateway %s does not answer what %r follows: %s", gateway, user, error)
