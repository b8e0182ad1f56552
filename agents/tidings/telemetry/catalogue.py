"""Every metric: its name, kind, unit, meaning, and all values that its labels may have.

A label has a value of a list that is written here, or derived from a list of the code, and nothing else: users, devices
and topics are never labels, so the number of series does not grow with them. ``docs/operations.md`` has the same
list for people, and a test holds it against this one.
"""

from __future__ import annotations

from collections.abc import Mapping
from enum import Enum
from types import MappingProxyType
from typing import Final, NamedTuple

from tidings.wire import codes, errors

__all__ = ["CATALOGUE", "LATENCY_S", "OTHER", "Instrument", "Kind", "status_class"]

OTHER: Final = "other"
"""The value of a label for what is not in its list."""

LATENCY_S: Final = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.2, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0, 300.0)
"""Upper bounds of the bins of every latency, in seconds. The objective of deliveries, 0.2 s, is one of them."""


class Kind(Enum):
    COUNTER = "counter"
    GAUGE = "gauge"
    HISTOGRAM = "histogram"


class Instrument(NamedTuple):
    """One metric; `labels` has all values of each label."""

    name: str
    """As OpenTelemetry has it. Prometheus has ``_`` for each dot, the unit behind that, and ``_total`` of a counter."""
    kind: Kind
    unit: str
    """UCUM: ``s``, ``By``, ``{thing}`` of what is counted."""
    text: str
    labels: Mapping[str, tuple[str, ...]] = MappingProxyType({})

    @property
    def prometheus(self) -> str:
        """The name of the metric family at ``/metrics``, without the suffixes of its samples."""
        suffix = {"s": "_seconds", "By": "_bytes"}.get(self.unit, "")
        return self.name.replace(".", "_") + suffix


CATALOGUE: Final[dict[str, Instrument]] = {}


def _add(name: str, kind: Kind, unit: str, text: str, **labels: tuple[str, ...]) -> Instrument:
    found = CATALOGUE[name] = Instrument(name, kind, unit, text, MappingProxyType(labels))
    return found


def _counter(name: str, unit: str, text: str, **labels: tuple[str, ...]) -> Instrument:
    return _add(name, Kind.COUNTER, unit, text, **labels)


def _gauge(name: str, unit: str, text: str, **labels: tuple[str, ...]) -> Instrument:
    return _add(name, Kind.GAUGE, unit, text, **labels)


def _latency(name: str, text: str, **labels: tuple[str, ...]) -> Instrument:
    return _add(name, Kind.HISTOGRAM, "s", text, **labels)


def status_class(status: int) -> str:
    """``2xx`` of 204."""
    return f"{status // 100}xx"


_PLANES: Final = ("personal", "broadcast")
_CODES: Final = (*sorted({str(close.code) for close in codes.CLOSES}), OTHER)
_STORE_CALLS: Final = (
    "append",
    "append_broadcasts",
    "broadcast_bodies",
    "broadcasts",
    "broadcasts_to",
    "between",
    "claim",
    "delivered",
    "devices",
    "ended_subscriptions",
    "floors",
    "holders",
    "mark",
    "mark_all",
    "missed",
    "note_floors",
    "note_synced",
    "page",
    "save",
    "subscribe",
    "subscribers",
    "subscriptions",
    "synced",
    "unread",
    "unsubscribe",
)
_REASONS: Final = (
    errors.BadSubject.code,
    errors.BadTopic.code,
    errors.InvalidNotification.code,
    errors.SchemaViolation.code,
    errors.Unreadable.code,
    errors.RowsRefused.code,
    "undelivered",
    OTHER,
)

# The gateway
SESSIONS: Final = _gauge(
    "tidings.gateway.sessions", "{session}", "Sessions by state", state=("starting", "live", "lingering")
)
WINDOWS: Final = _gauge(
    "tidings.gateway.windows",
    "{session}",
    "Sessions by how full their window of unacknowledged personal notifications is",
    fill=("empty", "to_half", "above_half", "full"),
)
UNDER_WAY: Final = _gauge("tidings.gateway.under.way", "{notification}", "Personal notifications sent or to be sent")
DELIVERIES: Final = _counter(
    "tidings.gateway.deliveries", "{notification}", "Notifications sent to a device for the first time", plane=_PLANES
)
ATTEMPTS: Final = _counter(
    "tidings.gateway.attempts", "{attempt}", "Attempts in front of a live client, the first included", plane=_PLANES
)
REDELIVERIES: Final = _counter("tidings.gateway.redeliveries", "{attempt}", "Attempts after the first", plane=_PLANES)
ACKS: Final = _counter("tidings.gateway.acks", "{notification}", "Notifications acknowledged by devices", plane=_PLANES)
SOCKET_LATENCY: Final = _latency(
    "tidings.gateway.socket.latency",
    "From stored in the log to written to the socket, of what came while the device was connected",
    plane=_PLANES,
)
ACK_LATENCY: Final = _latency(
    "tidings.gateway.ack.latency",
    "From stored in the log to acknowledged by the device, of what came while it was connected",
    plane=_PLANES,
)
CONSUMERS: Final = _counter(
    "tidings.gateway.consumer.creations",
    "{consumer}",
    "Consumers made: for a session that starts, one that lost its own, the feed of broadcasts",
    cause=("start", "mend", "feed"),
)
CATCH_UPS: Final = _counter(
    "tidings.gateway.catch.ups",
    "{session}",
    "Connects, by how the device gets what it missed: taken over from memory, from the stream alone, from the inbox, "
    "by a gap (too much was missed), blind (the store is down)",
    way=("takeover", "stream", "inbox", "gap", "blind"),
)
GAPS: Final = _counter("tidings.gateway.gaps", "{gap}", "Gaps announced: the client has to page", plane=_PLANES)
CLOSES: Final = _counter(
    "tidings.gateway.closes",
    "{connection}",
    "WebSockets closed with a close frame, by its code and by who began",
    code=_CODES,
    by=("gateway", "client"),
)
TURNED_AWAY: Final = _counter(
    "tidings.strangers.turned.away", "{connection}", "Connections that found no place before they said who they are"
)

# The inbox agent
STORED: Final = _counter("tidings.inbox.stored", "{notification}", "Notifications written to the store", plane=_PLANES)
INBOX_LATENCY: Final = _latency("tidings.inbox.latency", "From stored in the log to written to the store")

# The fan-out agent
FANNED_OUT: Final = _counter(
    "tidings.fanout.messages", "{message}", "Topic messages done, by how", way=("copies", "broadcast", "nobody")
)
COPIES: Final = _counter("tidings.fanout.copies", "{notification}", "Personal copies stored in the log")
FANOUT_LATENCY: Final = _latency(
    "tidings.fanout.latency", "From stored in the log to all copies, or the broadcast, stored"
)
HELD: Final = _gauge("tidings.fanout.held", "{message}", "Topic messages under way in this agent")

# The HTTP api and publishing
REQUESTS: Final = _latency(
    "tidings.api.request.duration",
    "HTTP requests answered",
    method=("GET", "POST", "PUT", "DELETE", OTHER),
    status=("2xx", "3xx", "4xx", "5xx", OTHER),
)
PUBLISHED: Final = _counter(
    "tidings.api.published",
    "{notification}",
    "Notifications published over HTTP, by outcome",
    outcome=("stored", "duplicate", "refused", "unconfirmed"),
)

# What several have
DEAD_LETTERS: Final = _counter(
    "tidings.dead.letters",
    "{message}",
    "Dead letters made, by who made them and why",
    agent=("gateway", "inbox", "fanout"),
    reason=_REASONS,
)
STREAM_LAG: Final = _gauge(
    "tidings.stream.lag",
    "{message}",
    "Messages of the log that an agent's shared consumer has not got acknowledged yet, over all partitions",
    consumer=("inbox", "broadcasts", "fanout"),
)
STORE_LATENCY: Final = _latency(
    "tidings.store.latency", "Calls to the store that it answered, by operation", operation=_STORE_CALLS
)
STORE_FAILURES: Final = _counter(
    "tidings.store.failures", "{call}", "Calls that the store did not answer, or not in time", operation=_STORE_CALLS
)
STORE_REFUSALS: Final = _counter(
    "tidings.store.refusals", "{call}", "Calls refused at once because the breaker is open"
)
BREAKER: Final = _gauge(
    "tidings.store.breaker", "{agent}", "1 in the state that the breaker has", state=("closed", "open", "half_open")
)
NATS_CONNECTED: Final = _gauge("tidings.nats.connected", "{connection}", "1 while the connection to NATS is up")
NATS_RECONNECTS: Final = _counter("tidings.nats.reconnects", "{connection}", "How often that connection was made anew")
CPU: Final = _counter("process.cpu.time", "s", "CPU that the process has used")
MEMORY: Final = _gauge("process.memory.usage", "By", "Resident memory of the process")
