"""What is said first holds: a value under a name, decided by the log among any number of processes.

JetStream numbers the messages of a stream one after the other, and answers a message id that it knows with the
sequence of the first. So whoever says something under a name learns whether it was the first, and what the first said.
It holds for as long as the stream remembers message ids (``duplicate_window_s``).
"""

from __future__ import annotations

from base64 import b64decode

from .connection import Connection

__all__ = ["first"]


async def first(connection: Connection, stream: str, where: str, name: str, value: bytes) -> bytes:
    """The value that was said first under `name`, durably: this one, or an earlier one. Raises `StreamUnavailable`."""
    answer = await connection.store(where, value, {"Nats-Msg-Id": name})
    if not answer.get("duplicate"):
        return value
    found = await connection.api(f"STREAM.MSG.GET.{stream}", {"seq": answer["seq"]})
    return b64decode(found["message"].get("data", ""))
