"""The topology: which streams and shared consumers a mesh has, and whether the server has them so.

| stream | stores | shared consumer |
|---|---|---|
| ``NOTIFY_<n>`` | ``part.<n>.user.*``: the personal plane, mapped there from ``notify.user.*`` | ``inbox`` |
| ``TOPICS`` | ``notify.topic.>``: what services publish to topics | ``fanout`` |
| ``BROADCAST`` | ``broadcast.>``: what goes to a topic's many subscribers as one message | ``inbox`` |
| ``DECISIONS`` | ``decided``: which topic messages go out as copies, and which as a broadcast | |
| ``KEYS`` | ``claimed``: which request each idempotency key of the HTTP api came with first | |
| ``REVOCATIONS`` | ``revoked.>``: whose tokens count no more, the last word on each | |
| ``DEAD`` | ``dead.>``: what could not be understood or delivered | |

The mapping is the server's configuration (an account's, in production); `probe_mapping` finds out whether it is
in force, without storing anything. The number of partitions and each stream's incarnation are kept in
the streams' metadata, so that agents need no setting for them.
"""

from __future__ import annotations

import asyncio
import logging
import secrets
import time
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Final

from tidings.runtime.settings import Settings
from tidings.wire import subject
from tidings.wire.errors import BadSettings, StreamUnavailable, TopologyMismatch
from tidings.wire.notification import MAX_BODY_BYTES
from tidings.wire.position import Position

from .connection import ApiError, Connection

__all__ = [
    "BROADCAST",
    "BROADCAST_PART",
    "DEAD",
    "DECISIONS",
    "FANOUT",
    "HEADER_ROOM",
    "INBOX",
    "KEYS",
    "REVOCATIONS",
    "SHARED",
    "TOPICS",
    "Change",
    "Topology",
    "apply",
    "check_topics",
    "discover",
    "is_partition",
    "mapping",
    "notify_stream",
    "plan",
    "probe_mapping",
    "renew",
]

DEAD: Final = "DEAD"
TOPICS: Final = "TOPICS"
BROADCAST: Final = "BROADCAST"
BROADCAST_PART: Final = -1
"""Stands for `BROADCAST` where others are numbers of partitions."""
DECISIONS: Final = "DECISIONS"
KEYS: Final = "KEYS"
REVOCATIONS: Final = "REVOCATIONS"
INBOX: Final = "inbox"
"""The inbox agents' durable consumer, one a partition."""
FANOUT: Final = "fanout"
"""The fan-out agents' durable consumer, on `TOPICS`."""

SHARED: Final = (TOPICS, DECISIONS, KEYS, BROADCAST, REVOCATIONS, DEAD)
"""All streams but those of the partitions."""
_PARTITIONS: Final = "tidings_partitions"
_INCARNATION: Final = "tidings_incarnation"
HEADER_ROOM: Final = 4096
"""What a notification may have beside its body, in bytes."""
_MAX_REVOCATIONS: Final = 1_000_000
_REVOCATIONS_SPARE_S: Final = 3600
_NOT_FOUND: Final = 404
_NAME_IN_USE: Final = 10058
_NO_CLUSTER: Final = 10074

log = logging.getLogger("tidings.topology")


def notify_stream(partition: int) -> str:
    """The stream of a partition, or `BROADCAST`."""
    return f"NOTIFY_{partition}" if partition >= 0 else BROADCAST


def is_partition(stream: str) -> bool:
    """Whether a stream is one of the personal plane."""
    return stream.startswith("NOTIFY_")


def mapping(partitions: int) -> tuple[str, str]:
    """Source and destination of the server's subject mapping for the personal plane."""
    return subject.NOTIFY_WILDCARD, subject.part_user("{{wildcard(1)}}", f"{{{{partition({partitions},1)}}}}")


@dataclass(frozen=True, slots=True)
class Topology:
    """What the agents need to know of the streams that are there."""

    partitions: int
    incarnations: tuple[int, ...]
    """Of each partition's stream."""
    broadcast: int
    """The incarnation of `BROADCAST`."""

    def beginning(self, partition: int) -> Position:
        """Before everything of a partition, or of `BROADCAST_PART`."""
        return Position(self.broadcast if partition == BROADCAST_PART else self.incarnations[partition], 0)


@dataclass(frozen=True, slots=True)
class Change:
    """One step of a plan: what `apply` does, in words and as a request to JetStream."""

    text: str
    request: str
    body: dict[str, Any]


async def discover(connection: Connection) -> Topology:
    """Read the topology from the server; raises `TopologyMismatch` when it is not whole."""
    found = await _streams(connection)
    numbers = {name: info["config"] for name, info in found.items() if name.startswith("NOTIFY_")}
    if not numbers:
        raise TopologyMismatch("the server has no NOTIFY streams: run `tidings topology apply`")
    declared = {config.get("metadata", {}).get(_PARTITIONS) for config in numbers.values()}
    partitions = len(numbers)
    expected = {notify_stream(number) for number in range(partitions)}
    if declared != {str(partitions)} or set(numbers) != expected:
        raise TopologyMismatch(
            f"the server has {partitions} NOTIFY streams, made for {', '.join(map(str, declared))} partitions: "
            "run `tidings topology plan` to see what is missing"
        )
    try:
        incarnations = tuple(
            int(numbers[notify_stream(number)]["metadata"][_INCARNATION]) for number in range(partitions)
        )
        broadcast = int(found[BROADCAST]["config"]["metadata"][_INCARNATION]) if BROADCAST in found else None
    except (KeyError, ValueError):
        raise TopologyMismatch(
            "a stream does not say its incarnation: it was not made by `tidings topology apply`"
        ) from None
    if broadcast is None:
        raise TopologyMismatch(f"the server has no stream {BROADCAST}: run `tidings topology apply`")
    return Topology(partitions, incarnations, broadcast)


async def renew(connection: Connection, known: Mapping[int, Position]) -> Topology:
    """Give each partition whose log ends below a position that is known of it a new incarnation; returns what holds.

    Such a log was restored from an older copy, or lost its end in a power cut. It gives sequences away a second time,
    and under the old incarnation two notifications would have one position. Two who renew at once agree: the new
    incarnation follows from the position.
    """
    topology = await discover(connection)
    for partition, position in known.items():
        if partition >= topology.partitions:
            continue
        stream = notify_stream(partition)
        info = await connection.api(f"STREAM.INFO.{stream}")
        config, end = info["config"], info["state"]["last_seq"]
        if position <= Position(int(config["metadata"][_INCARNATION]), end):
            continue
        log.warning(
            "%s ends at %d, and the inbox has it up to %d: it was restored from an older copy, or lost its end. "
            "It goes on under a new incarnation",
            stream,
            end,
            position.sequence,
        )
        config["metadata"][_INCARNATION] = str(position.incarnation + 1)
        await connection.api(f"STREAM.UPDATE.{stream}", config)
    return await discover(connection)


async def check_topics(connection: Connection) -> None:
    """Raise `TopologyMismatch` when topics lack a stream, or fan-out agents their consumer."""
    missing = {TOPICS, BROADCAST, DECISIONS} - set(await _streams(connection))
    if missing:
        raise TopologyMismatch(f"the server has no stream {min(missing)}: run `tidings topology apply`")
    if await _consumer(connection, TOPICS, FANOUT) is None:
        raise TopologyMismatch(f"the server has no consumer {FANOUT} on {TOPICS}: run `tidings topology apply`")


async def plan(connection: Connection, settings: Settings) -> list[Change]:
    """What `apply` would do; raises `TopologyMismatch` where the existing streams cannot become what is asked."""
    found = await _streams(connection)
    changes: list[Change] = []
    count = sum(name.startswith("NOTIFY_") for name in found)
    known = {info["config"].get("metadata", {}).get(_PARTITIONS) for name, info in found.items() if is_partition(name)}
    if count and known != {str(settings.partitions)}:
        made_for = ", ".join(sorted(map(str, known)))
        raise TopologyMismatch(
            f"the streams were made for {made_for} partitions, and TIDINGS_PARTITIONS is {settings.partitions}: the "
            "number is fixed, because users' positions belong to their partition."
            + (f" Set TIDINGS_PARTITIONS={made_for}" if made_for.isdecimal() else "")
        )
    partitions = (_notify(settings, number) for number in range(settings.partitions))
    shared = (make(settings) for make in (_topics, _broadcast, _decisions, _keys, _revocations, _dead))
    for config in (*partitions, *shared):
        changes.extend(_stream_change(config, found.get(config["name"])))
    for number in (*range(settings.partitions), BROADCAST_PART):
        stream = notify_stream(number)
        existing = await _consumer(connection, stream, INBOX) if stream in found else None
        changes.extend(_consumer_change(stream, _inbox_consumer(settings), existing))
    existing = await _consumer(connection, TOPICS, FANOUT) if TOPICS in found else None
    changes.extend(_consumer_change(TOPICS, _fanout_consumer(settings), existing))
    return changes


async def apply(connection: Connection, settings: Settings) -> list[Change]:
    """Make the streams as the settings want them; returns what was changed. Safe when two run at once.

    Raises `BadSettings` where one server is to keep several copies.
    """
    changes = await plan(connection, settings)
    for change in changes:
        try:
            await connection.api(change.request, change.body)
        except ApiError as error:
            if error.err_code == _NO_CLUSTER:
                raise BadSettings(
                    f"replicas is {settings.replicas}, and this NATS server, which is no cluster, keeps one copy: "
                    "set TIDINGS_REPLICAS=1, or start a cluster"
                ) from None
            # Another one made it a moment ago, with its own incarnation: that one stands.
            if error.err_code != _NAME_IN_USE:
                raise
    await discover(connection)
    return changes


def _stream(settings: Settings, name: str, description: str, subjects: str, max_age_s: int) -> dict[str, Any]:
    """What all streams have in common, with room for one notification and its headers."""
    return {
        "name": name,
        "description": f"Tidings: {description}",
        "subjects": [subjects],
        "storage": "file",
        "num_replicas": settings.replicas,
        "retention": "limits",
        # A full log refuses: dropping the oldest would lose what was accepted.
        "discard": "new",
        "max_age": max_age_s * 1_000_000_000,
        "max_msg_size": MAX_BODY_BYTES + HEADER_ROOM,
        "max_consumers": settings.stream_max_consumers,
        "duplicate_window": min(settings.duplicate_window_s, max_age_s) * 1_000_000_000,
        "allow_direct": True,
        "metadata": {},
    }


def _log(settings: Settings, name: str, description: str, subjects: str) -> dict[str, Any]:
    """A stream of what services publish, and of what comes of it."""
    config = _stream(settings, name, description, subjects, settings.stream_max_age_s)
    return {**config, "max_bytes": settings.stream_max_bytes}


def _incarnation() -> str:
    return str(time.time_ns() // 1_000_000)


def _notify(settings: Settings, number: int) -> dict[str, Any]:
    description = f"personal notifications, partition {number} of {settings.partitions}"
    config = _log(settings, notify_stream(number), description, subject.part_wildcard(number))
    return {**config, "metadata": {_PARTITIONS: str(settings.partitions), _INCARNATION: _incarnation()}}


def _topics(settings: Settings) -> dict[str, Any]:
    return _log(settings, TOPICS, "what services publish to topics", subject.TOPICS_WILDCARD)


def _broadcast(settings: Settings) -> dict[str, Any]:
    description = "topic messages that go to many subscribers as one message"
    config = _log(settings, BROADCAST, description, subject.BROADCAST_WILDCARD)
    return {**config, "metadata": {_INCARNATION: _incarnation()}}


def _memo(settings: Settings, name: str, description: str, where: str) -> dict[str, Any]:
    """What is said first holds (`tidings.stream.once`)."""
    config = _log(settings, name, description, where)
    # What a duplicate refers to is there for as long as it is known to be one.
    return {**config, "max_age": 2 * config["duplicate_window"]}


def _decisions(settings: Settings) -> dict[str, Any]:
    return _memo(settings, DECISIONS, "how a topic message goes out, decided once", subject.DECIDED)


def _keys(settings: Settings) -> dict[str, Any]:
    return _memo(settings, KEYS, "what each idempotency key of the HTTP api stands for", subject.CLAIMED)


def _revocations(settings: Settings) -> dict[str, Any]:
    kept_s = int(settings.token_ttl_max_s + 2 * settings.token_leeway_s) + _REVOCATIONS_SPARE_S
    description = "whose tokens count no more, kept longer than any token lives"
    return {
        **_stream(settings, REVOCATIONS, description, subject.REVOKED_WILDCARD, kept_s),
        # The last one of a user, or of a device, is the one that counts.
        "max_msgs_per_subject": 1,
        "max_msgs": _MAX_REVOCATIONS,
        "max_msg_size": HEADER_ROOM,
    }


def _dead(settings: Settings) -> dict[str, Any]:
    description = "what could not be understood or delivered, with the reason"
    return {
        **_stream(settings, DEAD, description, subject.DEAD_WILDCARD, settings.dead_max_age_s),
        "max_bytes": -1,
        "max_msg_size": MAX_BODY_BYTES + 4 * HEADER_ROOM,
    }


def _inbox_consumer(settings: Settings) -> dict[str, Any]:
    return {
        "durable_name": INBOX,
        "description": "Tidings: the inbox agents write these to the store",
        "ack_policy": "explicit",
        "deliver_policy": "all",
        "ack_wait": int(settings.inbox_ack_wait_s * 1_000_000_000),
        "max_deliver": -1,
        "max_ack_pending": 8 * settings.inbox_batch,
        "max_waiting": 128,
    }


def _fanout_consumer(settings: Settings) -> dict[str, Any]:
    return {
        "durable_name": FANOUT,
        "description": "Tidings: the fan-out agents make copies of these",
        "ack_policy": "explicit",
        "deliver_policy": "all",
        "ack_wait": int(settings.fanout_ack_wait_s * 1_000_000_000),
        "max_deliver": -1,
        # What agents give back for a while is pending too: one busy topic must not keep the others from being sent.
        "max_ack_pending": 100_000,
        "max_waiting": 128,
    }


def _stream_change(config: dict[str, Any], found: dict[str, Any] | None) -> list[Change]:
    name = config["name"]
    if found is None:
        return [Change(f"create stream {name}", f"STREAM.CREATE.{name}", config)]
    merged = {**found["config"], **config, "metadata": found["config"].get("metadata", {})}
    differing = sorted(key for key, value in merged.items() if found["config"].get(key) != value)
    if not differing:
        return []
    return [Change(f"update stream {name}: {', '.join(differing)}", f"STREAM.UPDATE.{name}", merged)]


def _consumer_change(stream: str, config: dict[str, Any], found: dict[str, Any] | None) -> list[Change]:
    name = config["durable_name"]
    differing = sorted(key for key, value in config.items() if found is None or found.get(key) != value)
    if not differing:
        return []
    text = f"create consumer {name} on {stream}" if found is None else f"update consumer {name} on {stream}"
    body = {"stream_name": stream, "config": config, "action": ""}
    return [Change(text, f"CONSUMER.CREATE.{stream}.{name}", body)]


async def _consumer(connection: Connection, stream: str, name: str) -> dict[str, Any] | None:
    try:
        config: dict[str, Any] = (await connection.api(f"CONSUMER.INFO.{stream}.{name}"))["config"]
    except ApiError as error:
        if error.status == _NOT_FOUND:
            return None
        raise
    return config


async def _streams(connection: Connection) -> dict[str, dict[str, Any]]:
    found: dict[str, dict[str, Any]] = {}
    while True:
        answer = await connection.api("STREAM.LIST", {"offset": len(found)})
        streams = answer.get("streams") or []
        found.update((info["config"]["name"], info) for info in streams)
        if not streams or len(found) >= answer.get("total", 0):
            return {name: info for name, info in found.items() if name in SHARED or is_partition(name)}


async def probe_mapping(connection: Connection, partitions: int, *, timeout_s: float = 2.0) -> None:
    """Raise `TopologyMismatch` unless the server maps ``notify.user.*`` to the same partition as we do.

    A message that expects to be stored by a stream of another name is refused by every stream, and still
    passes the mapping on its way: a subscription sees where it went, and nothing is stored.
    """
    token = f"probe-{secrets.token_hex(8)}"
    seen: asyncio.Future[str] = asyncio.get_running_loop().create_future()

    def arrived(where: bytes, reply: bytes, header: bytes | None, payload: bytes) -> None:
        if not seen.done():
            seen.set_result(where.decode())

    watches = [
        await connection.listen(pattern, arrived)
        for pattern in (subject.part_user(token, "*"), subject.notify_user(token))
    ]
    expected = subject.part_user(token, subject.partition(token, partitions))
    try:
        await connection.publish(subject.notify_user(token), b"", headers={"Nats-Expected-Stream": "tidings-probe"})
        async with asyncio.timeout(timeout_s):
            where = await seen
    except TimeoutError:
        raise StreamUnavailable("the server did not deliver a probe of the subject mapping") from None
    finally:
        for watch in watches:
            connection.handlers.pop(b"%d" % watch._id, None)
            await watch.unsubscribe()
    if where != expected:
        source, destination = mapping(partitions)
        mapped = where != subject.notify_user(token)
        raise TopologyMismatch(
            f"the server sends {subject.notify_user(token)} to {where} and not to {expected}: "
            + (f"set TIDINGS_PARTITIONS, now {partitions}, to the number that it maps to, or " if mapped else "")
            + f"add to its configuration (of the account, or at the top): mappings: {{ {source!r}: {destination!r} }}"
        )
