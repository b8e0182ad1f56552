"""What a gateway counts, where telemetry is on."""

from __future__ import annotations

import time
from collections.abc import Iterable
from typing import TYPE_CHECKING, Final

from tidings.stream import consumers
from tidings.telemetry import catalogue
from tidings.telemetry.numbers import Numbers, Values

from .session import SessionState
from .window import Entry

if TYPE_CHECKING:
    from tidings.runtime.porch import Porch
    from tidings.telemetry.tracing import Tracing

    from .hub import Hub
    from .session import Session

__all__ = ["GatewayNumbers"]

_S: Final = 1e-9
_now_ns: Final = time.time_ns


class _Plane:
    """The numbers of one plane's deliveries."""

    __slots__ = ("ack_latency", "acks", "attempts", "deliveries", "gaps", "redeliveries", "socket_latency")

    def __init__(self, numbers: Numbers, plane: str) -> None:
        self.deliveries = numbers.counter(catalogue.DELIVERIES).of(plane)
        self.attempts = numbers.counter(catalogue.ATTEMPTS).of(plane)
        self.redeliveries = numbers.counter(catalogue.REDELIVERIES).of(plane)
        self.acks = numbers.counter(catalogue.ACKS).of(plane)
        self.gaps = numbers.counter(catalogue.GAPS).of(plane)
        self.socket_latency = numbers.histogram(catalogue.SOCKET_LATENCY).of(plane)
        self.ack_latency = numbers.histogram(catalogue.ACK_LATENCY).of(plane)


class GatewayNumbers:
    """Made by the gateway; hub, sessions and lanes tell it what happened."""

    def __init__(self, numbers: Numbers, tracing: Tracing, hub: Hub, porch: Porch) -> None:
        self.personal = _Plane(numbers, "personal")
        self.broadcast = _Plane(numbers, "broadcast")
        self.consumers = numbers.counter(catalogue.CONSUMERS)
        self.catch_ups = numbers.counter(catalogue.CATCH_UPS)
        self.dead_letters = numbers.counter(catalogue.DEAD_LETTERS)
        self._closes = numbers.counter(catalogue.CLOSES)
        self._ids = tracing.ids
        self._hub = hub
        numbers.observe(catalogue.SESSIONS, self._sessions)
        numbers.observe(catalogue.WINDOWS, self._windows)
        numbers.observe(catalogue.UNDER_WAY, self._under_way)
        numbers.observe(catalogue.TURNED_AWAY, lambda: [((), porch.turned_away)])

    def attempted(self, session: Session, entry: Entry, now_ns: int, plane: _Plane) -> None:
        """It is being written to the socket: an attempt that counts."""
        plane.attempts.value += 1
        if entry.attempts > 1:
            plane.redeliveries.value += 1
            return
        plane.deliveries.value += 1
        stored_ns = entry.stored_ns
        if stored_ns is None:
            assert entry.reply is not None
            stored_ns = entry.stored_ns = consumers.stored_ns(entry.reply)
        # What was missed waited for the device, not for us.
        if stored_ns > session.attached_ns:
            span = entry.span
            plane.socket_latency.record((now_ns - stored_ns) * _S, None if span is None else self._ids(span))

    def handed_out(self, count: int, stored_ns: int, trace: tuple[int, int] | None) -> None:
        """So many lanes were written a broadcast for the first time."""
        plane = self.broadcast
        plane.attempts.value += count
        plane.deliveries.value += count
        plane.socket_latency.record((time.time_ns() - stored_ns) * _S, trace, count)

    def acknowledged(self, session: Session, entry: Entry, plane: _Plane) -> None:
        """The device has it."""
        plane.acks.value += 1
        stored_ns = entry.stored_ns
        if stored_ns is not None and stored_ns > session.attached_ns:
            span = entry.span
            plane.ack_latency.record((_now_ns() - stored_ns) * _S, None if span is None else self._ids(span))

    def closed(self, code: int, by: str) -> None:
        self._closes.of(str(code), by).value += 1

    # Looked up at collection

    def _sessions(self) -> Iterable[tuple[Values, float]]:
        counts = dict.fromkeys(catalogue.SESSIONS.labels["state"], 0)
        for session in self._hub.by_id.values():
            counts[session.state.value] += 1
        return [((state,), count) for state, count in counts.items()]

    def _windows(self) -> Iterable[tuple[Values, float]]:
        empty = half = above = full = 0
        for session in self._started():
            used, size = len(session.window.under_way), session.window.size
            if not used:
                empty += 1
            elif used >= size:
                full += 1
            elif 2 * used <= size:
                half += 1
            else:
                above += 1
        return [(("empty",), empty), (("to_half",), half), (("above_half",), above), (("full",), full)]

    def _under_way(self) -> Iterable[tuple[Values, float]]:
        return [((), sum(len(session.window.under_way) for session in self._started()))]

    def _started(self) -> Iterable[Session]:
        return (session for session in self._hub.by_id.values() if session.state is not SessionState.STARTING)
