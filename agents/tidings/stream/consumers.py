"""Consumers of the personal plane and of the broadcasts: made, pulled, acknowledged and forgotten.

A session's consumer is durable, in memory, on one node, and cheap: 40 KB at a standalone server, 24 KB on
every node of a cluster of three. `max_ack_pending` is the client's window, so the server itself holds back
what does not fit, and still redelivers what was not acknowledged.
"""

from __future__ import annotations

from base64 import b64decode
from datetime import UTC, datetime
from typing import Any, Final, NamedTuple

import orjson

from tidings.wire import subject

from .connection import ApiError, Connection
from .topology import BROADCAST, DEAD, INBOX, notify_stream

__all__ = [
    "Delivery",
    "Progress",
    "SharedProgress",
    "Stored",
    "bury",
    "create_feed",
    "create_session",
    "delete",
    "direct_get_status",
    "inbox_floor",
    "last_sequence",
    "leader",
    "nak",
    "next_broadcast",
    "parse_reply",
    "progress",
    "pull",
    "resize",
    "session_consumer",
    "session_of",
    "shared_progress",
    "status_of",
    "stored_ns",
]

_NANOSECONDS: Final = 1_000_000_000
_V1_TOKENS: Final = 9
_STORED: Final = b"\r\nNats-Sequence: "
NOT_FOUND: Final = 404


class Delivery(NamedTuple):
    """What a JetStream reply subject says of its message."""

    stream: bytes
    consumer: bytes
    delivered: int
    """How often the consumer has sent it, this time included."""
    stream_sequence: int
    consumer_sequence: int
    """Counts the consumer's deliveries, redeliveries included, without gaps."""
    stored_ns: int


def parse_reply(reply: bytes) -> Delivery:
    """Read ``$JS.ACK.<stream>.<consumer>.<delivered>.<sseq>.<cseq>.<time>.<pending>`` and its newer form.

    The newer form (nats-server's ``js_ack_fc_v2``) has domain and account hash before the stream.
    """
    words = reply.split(b".")
    at = 2 if len(words) == _V1_TOKENS else 4
    return Delivery(
        words[at], words[at + 1], int(words[at + 2]), int(words[at + 3]), int(words[at + 4]), int(words[at + 5])
    )


def stored_ns(reply: bytes) -> int:
    """Of that only when the message was stored, for whoever asks it of each."""
    if reply.count(b".") == _V1_TOKENS - 1:
        return int(reply.rsplit(b".", 2)[1])
    return parse_reply(reply).stored_ns


def status_of(header: bytes) -> tuple[int, bytes]:
    """Status and description of a message without a body: ``NATS/1.0 408 Request Timeout``."""
    line = header[9 : header.find(b"\r\n")]
    return (int(line[:3]), line[4:]) if line[:3].isdigit() else (0, b"")


def direct_get_status(header: bytes) -> int:
    """What ends the answer to a Direct Get; 0 for a message of the stream, whatever status its sender gave it."""
    return 0 if _STORED in header else status_of(header)[0]


async def create_session(
    connection: Connection,
    partition: int,
    name: str,
    token: str,
    *,
    start: int | None,
    start_time: datetime | None = None,
    window: int,
    ack_wait_s: float,
    idle_s: float,
) -> tuple[str, int]:
    """Make a session's consumer from a sequence (or, without one, a time).

    Returns its node ("" on a lone server), and the sequence behind which it really begins: later than asked for where
    the stream has forgotten what lies between, of which the server says no other word.
    """
    stream, where = notify_stream(partition), subject.part_user(token, partition)
    config: dict[str, Any] = {
        "durable_name": name,
        "filter_subject": where,
        "ack_policy": "explicit",
        "ack_wait": int(ack_wait_s * _NANOSECONDS),
        "max_deliver": -1,
        "max_ack_pending": window,
        "max_waiting": 4,
        "mem_storage": True,
        "num_replicas": 1,
        "inactive_threshold": int(idle_s * _NANOSECONDS),
    }
    if start is not None:
        config |= {"deliver_policy": "by_start_sequence", "opt_start_seq": max(1, start)}
    elif start_time is not None:
        config |= {"deliver_policy": "by_start_time", "opt_start_time": start_time.isoformat()}
    answer = await connection.api(
        f"CONSUMER.CREATE.{stream}.{name}.{where}", {"stream_name": stream, "config": config, "action": "create"}
    )
    return _leader(answer), answer["delivered"]["stream_seq"]


async def create_feed(connection: Connection, name: str, *, start: int, idle_s: float) -> tuple[str, int]:
    """Make a gateway's consumer of all broadcasts from a sequence; returns as `create_session`.

    It acknowledges nothing: what a gateway has read is in its memory, and it reads again what it lost.
    """
    config: dict[str, Any] = {
        "durable_name": name,
        "ack_policy": "none",
        "max_deliver": 1,
        "max_waiting": 4,
        "mem_storage": True,
        "num_replicas": 1,
        "inactive_threshold": int(idle_s * _NANOSECONDS),
        "deliver_policy": "by_start_sequence",
        "opt_start_seq": max(1, start),
    }
    body = {"stream_name": BROADCAST, "config": config, "action": "create"}
    answer = await connection.api(f"CONSUMER.CREATE.{BROADCAST}.{name}", body)
    return _leader(answer), answer["delivered"]["stream_seq"]


class Stored(NamedTuple):
    """A message as it lies in its stream."""

    sequence: int
    where: str
    body: bytes
    stored_ns: int


async def next_broadcast(connection: Connection, sequence: int) -> Stored | None:
    """The first broadcast at or behind a sequence; None when there is none."""
    try:
        found = await connection.api(
            f"STREAM.MSG.GET.{BROADCAST}", {"seq": sequence, "next_by_subj": subject.BROADCAST_WILDCARD}
        )
    except ApiError as error:
        if error.status == NOT_FOUND:
            return None
        raise
    message = found["message"]
    # RFC 3339 with up to nine digits of a second, which `datetime` does not read.
    whole, _, fraction = message["time"].removesuffix("Z").partition(".")
    seconds = int(datetime.fromisoformat(whole).replace(tzinfo=UTC).timestamp())
    stored_ns = seconds * _NANOSECONDS + int(fraction.ljust(9, "0") or 0)
    return Stored(message["seq"], message["subject"], b64decode(message.get("data", "")), stored_ns)


async def resize(connection: Connection, partition: int, name: str, window: int) -> None:
    """Give a session's consumer another window."""
    stream = notify_stream(partition)
    config = (await connection.api(f"CONSUMER.INFO.{stream}.{name}"))["config"]
    config["max_ack_pending"] = window
    await connection.api(
        f"CONSUMER.CREATE.{stream}.{name}.{config['filter_subject']}",
        {"stream_name": stream, "config": config, "action": "update"},
    )


def delete(connection: Connection, stream: str, name: str, reply: str = "") -> bool:
    """Forget a consumer, without waiting; one that stays behind ends by itself when it idles.

    The server's answer comes to `reply`, if it is given. False, and nothing sent, while there is no connection.
    """
    return connection.send(f"$JS.API.CONSUMER.DELETE.{stream}.{name}", b"", reply)


async def leader(connection: Connection, partition: int, name: str, *, timeout_s: float) -> str | None:
    """The node that has a consumer; None when it is gone. Raises `StreamUnavailable` when nobody answers."""
    info = await _info(connection, notify_stream(partition), name, timeout_s)
    return None if info is None else _leader(info)


async def delivered_to_feed(connection: Connection, name: str, *, timeout_s: float) -> int | None:
    """How many messages a gateway's consumer of broadcasts has sent; None and errors as `leader`."""
    info = await _info(connection, BROADCAST, name, timeout_s)
    return None if info is None else info["delivered"]["consumer_seq"]


async def _info(connection: Connection, stream: str, name: str, timeout_s: float) -> dict[str, Any] | None:
    answer: dict[str, Any] = orjson.loads(
        await connection.ask(f"$JS.API.CONSUMER.INFO.{stream}.{name}", timeout_s=timeout_s)
    )
    if "error" in answer:
        if answer["error"].get("code") == NOT_FOUND:
            return None
        raise ApiError(f"CONSUMER.INFO of {name}", answer["error"])
    return answer


def _leader(info: dict[str, Any]) -> str:
    node: str = info.get("cluster", {}).get("leader", "")
    return node


class Progress(NamedTuple):
    """How far a session's consumer is, by sequences of its stream."""

    begins: int
    """What lies below is not its own: the device has it, or gets it from the inbox."""
    delivered: int
    ack_floor: int
    unacknowledged: int
    """Under way to the device now."""
    redelivered: int
    """Of these, those that were sent more than once."""
    window: int
    """How many may be under way."""


async def progress(connection: Connection, partition: int, session: str) -> Progress | None:
    """Where a session's consumer is; None when it has none. Reads the names of all consumers of the partition."""
    stream = notify_stream(partition)
    names: list[str] = []
    while True:
        answer = await connection.api(f"CONSUMER.NAMES.{stream}", {"offset": len(names)})
        some = answer.get("consumers") or []
        names += some
        if not some or len(names) >= answer["total"]:
            break
    newest: dict[str, Any] | None = None
    for name in names:
        if session_of(name) != session:
            continue
        info = await _info(connection, stream, name, connection.request_timeout_s)
        if info is not None and (newest is None or info["created"] > newest["created"]):
            newest = info
    if newest is None:
        return None
    config = newest["config"]
    return Progress(
        config.get("opt_start_seq", 0),
        newest["delivered"]["stream_seq"],
        newest["ack_floor"]["stream_seq"],
        newest["num_ack_pending"],
        newest["num_redelivered"],
        config["max_ack_pending"],
    )


def session_consumer(session: str, part: str) -> str:
    """The name of a consumer of a session, which has one after the other; `part` tells them apart."""
    return f"{session}-{part}"


def session_of(name: str) -> str:
    """The session of a consumer that `session_consumer` named."""
    return name.rpartition("-")[0]


def pull(connection: Connection, stream: str, name: str, reply: str, *, batch: int, expires_ns: int) -> bool:
    """Ask for up to `batch` messages, to be sent to `reply` as they come."""
    return connection.send(
        f"$JS.API.CONSUMER.MSG.NEXT.{stream}.{name}", b'{"batch":%d,"expires":%d}' % (batch, expires_ns), reply
    )


def nak(connection: Connection, reply: bytes, delay_s: float) -> None:
    """Give a message back, to be redelivered after a while."""
    connection.ack(reply, b'-NAK {"delay": %d}' % int(delay_s * _NANOSECONDS))


async def last_sequence(connection: Connection, partition: int) -> int:
    """The newest sequence of a partition."""
    last: int = (await connection.api(f"STREAM.INFO.{notify_stream(partition)}"))["state"]["last_seq"]
    return last


async def inbox_floor(connection: Connection, partition: int) -> int:
    """The ack floor of the inbox agents: all up to it is in the store."""
    return (await shared_progress(connection, notify_stream(partition), INBOX)).floor


class SharedProgress(NamedTuple):
    """How far the agents that share a consumer have come."""

    floor: int
    """Everything up to this sequence is acknowledged."""
    lag: int
    """Messages that are not acknowledged."""


async def shared_progress(connection: Connection, stream: str, name: str) -> SharedProgress:
    """Of a shared consumer; raises `StreamUnavailable`."""
    info = await connection.api(f"CONSUMER.INFO.{stream}.{name}")
    return SharedProgress(info["ack_floor"]["stream_seq"], info["num_pending"] + info["num_ack_pending"])


async def bury(
    connection: Connection, plane: str, body: bytes, *, key: str, reason: str, detail: str, **origin: str | int
) -> None:
    """Store a dead letter with its reason and origin; durable when it returns.

    `key` makes burying the same letter twice (by another agent, or again after a crash) one letter.
    """
    headers = {"Nats-Msg-Id": key, "Tidings-Reason": reason, "Tidings-Detail": _header_text(detail)}
    headers.update((f"Tidings-{name.replace('_', '-').title()}", str(value)) for name, value in origin.items())
    headers["Nats-Expected-Stream"] = DEAD
    await connection.store(subject.dead(plane), body, headers)


def _header_text(text: str) -> str:
    return text.encode("ascii", "backslashreplace").decode().replace("\r", " ").replace("\n", " ")[:500]
