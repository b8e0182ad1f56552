"""The publisher of a benchmark: a process that writes NATS's own protocol to a socket, at a steady rate.

No event loop and no client library: between two messages it waits in ``select``, whose timeout is exact to some
50 µs, so that messages leave evenly spaced. Confirmations of JetStream are read as they come and never waited
for; what was refused or never confirmed is reported by number. One order in JSON on standard input, one answer
in JSON on standard output.
"""

from __future__ import annotations

import json
import random
import resource
import select
import socket
import sys
import time
from array import array
from dataclasses import dataclass
from typing import Any, Final

__all__ = ["EVERYBODY", "Answers", "Order", "own_cpu_s", "user_of"]

EVERYBODY: Final = -1
"""Stands for a device's number where a notification is not for one of them."""

_CONFIRM_S: Final = 10.0
_READ_BYTES: Final = 262_144
_HELLO: Final = json.dumps(
    {"verbose": False, "pedantic": False, "headers": True, "no_responders": True, "protocol": 1, "name": "bench"}
)


def user_of(device: int) -> str:
    """The user whose only device has this number."""
    return f"bench-{device}"


@dataclass(frozen=True, slots=True)
class Order:
    """What to publish."""

    port: int
    run: int
    """Marks the run's notifications, so that a late one is not counted for another run."""
    count: int
    rate: float
    """A second."""
    first: int
    devices: int
    """Each notification goes to one of so many users from number `first` on, drawn at random."""
    size: int
    """Bytes of the body."""
    message_id: bool
    """Send ``Nats-Msg-Id``, as the SDK's Publisher does: JetStream then remembers it for its duplicate window."""
    subject: str = ""
    """Where all of it goes instead: to nobody in particular. ``*`` stands for the number of each."""
    traced_every: int = 0
    """Of so many one has a sampled ``traceparent``; 0 for none."""


class Answers:
    """Reads what the server sends: confirmations of messages, by the number at the end of their reply subject."""

    def __init__(self, count: int) -> None:
        self.states = bytearray(count)
        """0 unconfirmed, 1 stored, 2 refused."""
        self.open = count
        self.first_refusal = ""
        self.pong_due = False
        self._rest = b""

    def feed(self, data: bytes) -> None:
        """Take what was read. A server that reports an error is a mistake of this publisher: raises."""
        data = self._rest + data
        at = 0
        while (end := data.find(b"\r\n", at)) >= 0:
            line = data[at:end]
            if line.startswith((b"MSG ", b"HMSG ")):
                words = line.split(b" ")
                after = end + 2 + int(words[-1])
                if after + 2 > len(data):
                    break
                self._confirm(words[1], data[end + 2 : after])
                at = after + 2
                continue
            if line == b"PING":
                self.pong_due = True
            elif line.startswith(b"-ERR"):
                raise RuntimeError(f"nats-server: {line.decode()}")
            at = end + 2
        self._rest = data[at:]

    def _confirm(self, where: bytes, payload: bytes) -> None:
        number = int(where[where.rfind(b".") + 1 :])
        stored = b'"seq":' in payload and b'"error"' not in payload and b'"duplicate"' not in payload
        if not stored and not self.first_refusal:
            self.first_refusal = payload.decode(errors="replace").strip()
        self.open -= self.states[number] == 0
        self.states[number] = 1 if stored else 2


class _Messages:
    """Makes the protocol text of the run's notifications."""

    def __init__(self, order: Order, inbox: bytes) -> None:
        self._order = order
        self._inbox = inbox
        self._fill = b"x" * order.size
        self._time = time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()).encode()
        users = range(order.first, order.first + order.devices)
        self._users = array("l", random.Random(order.run).choices(users, k=order.count))

    def make(self, number: int) -> bytes:
        """A notification of `size` bytes that says when it was made, by the clock that the receiver has too."""
        order = self._order
        user = EVERYBODY if order.subject else self._users[number]
        traced = order.traced_every and not number % order.traced_every
        trace = b'"traceparent":"00-%032x-%016x-01",' % (order.run << 64 | number + 1, number + 1) if traced else b""
        body = (
            b'{"specversion":"1.0","id":"%d-%d","source":"bench","type":"bench.made","time":"%b",%b"data":'
            b'{"run":%d,"number":%d,"device":%d,"ns":%d,"fill":"'
            % (order.run, number, self._time, trace, order.run, number, user, time.monotonic_ns())
        )
        body += self._fill[: max(0, order.size - len(body) - 3)] + b'"}}'
        where = (order.subject.replace("*", str(number)) or f"notify.user.{user_of(user)}").encode()
        reply = b"%b.%d" % (self._inbox, number)
        if not order.message_id:
            return b"PUB %b %b %d\r\n%b\r\n" % (where, reply, len(body), body)
        header = b"NATS/1.0\r\nNats-Msg-Id: %d-%d\r\n\r\n" % (order.run, number)
        sizes = len(header), len(header) + len(body)
        return b"HPUB %b %b %d %d\r\n%b%b\r\n" % (where, reply, *sizes, header, body)


def _read(connection: socket.socket, answers: Answers, timeout_s: float) -> None:
    readable, _, _ = select.select([connection], [], [], max(0.0, timeout_s))
    if not readable:
        return
    data = connection.recv(_READ_BYTES)
    if not data:
        raise RuntimeError("nats-server closed the connection")
    answers.feed(data)
    if answers.pong_due:
        answers.pong_due = False
        connection.sendall(b"PONG\r\n")


def publish(order: Order) -> dict[str, Any]:
    """Publish at the rate, then wait for the last confirmations."""
    before = own_cpu_s()
    inbox = f"_INBOX.bench{order.run}".encode()
    messages, answers = _Messages(order, inbox), Answers(order.count)
    with socket.create_connection(("127.0.0.1", order.port)) as connection:
        connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        connection.sendall(b"CONNECT %b\r\nSUB %b.* 1\r\n" % (_HELLO.encode(), inbox))
        start, sent, late = time.monotonic(), 0, 0.0
        while sent < order.count:
            passed = time.monotonic() - start
            due = min(order.count, int(passed * order.rate) + 1)
            if due > sent:
                late = max(late, passed - sent / order.rate)
                connection.sendall(b"".join(map(messages.make, range(sent, due))))
                sent = due
            _read(connection, answers, start + sent / order.rate - time.monotonic())
        seconds = time.monotonic() - start
        until = time.monotonic() + _CONFIRM_S
        while answers.open and (left := until - time.monotonic()) > 0:
            _read(connection, answers, left)
    return {
        "published": order.count,
        "stored": answers.states.count(1),
        "not_stored": [number for number, state in enumerate(answers.states) if state != 1],
        "refused": answers.states.count(2),
        "first_refusal": answers.first_refusal,
        "seconds": seconds,
        "late_ms": late * 1000,
        "cpu_s": own_cpu_s() - before,
    }


def own_cpu_s() -> float:
    """CPU time of this process so far, in seconds."""
    used = resource.getrusage(resource.RUSAGE_SELF)
    return used.ru_utime + used.ru_stime


if __name__ == "__main__":
    print(json.dumps(publish(Order(**json.loads(sys.stdin.read())))))
