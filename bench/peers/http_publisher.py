"""The publisher of the peers that take notifications over HTTP: `bench.publisher` for ``POST`` of batches.

The body is that of Centrifugo's ``/api/batch``, which the servers of Socket.IO here read too:
``{"commands": [{"publish": {"channel": "…", "data": {…}}}, …]}``. One request is under way at a time, on one
connection, and each carries what has become due since the one before, at least every `_EVERY_S` seconds.
"""

from __future__ import annotations

import http.client
import json
import random
import sys
import time
from array import array
from dataclasses import dataclass
from typing import Any, Final

from bench.publisher import EVERYBODY, own_cpu_s, user_of

__all__ = ["HttpOrder"]

_EVERY_S: Final = 0.01
_TIMEOUT_S: Final = 10.0


@dataclass(frozen=True, slots=True)
class HttpOrder:
    """What to publish."""

    port: int
    path: str
    run: int
    count: int
    rate: float
    """A second."""
    devices: int
    """Each notification goes to one of so many, drawn at random."""
    size: int
    """Bytes of the data."""
    channel: str = ""
    """Where all of it goes instead."""
    prefix: str = ""
    """Of a channel's name."""
    patience_s: float = 0.0
    """How long a server that is away is waited for; what it did not confirm is not sent again."""


def _command(order: HttpOrder, number: int, device: int) -> bytes:
    data = b'{"run":%d,"number":%d,"device":%d,"ns":%d,"fill":"' % (order.run, number, device, time.monotonic_ns())
    data += b"x" * max(0, order.size - len(data) - 2) + b'"}'
    channel = order.prefix + (order.channel or user_of(device))
    return b'{"publish":{"channel":"%b","data":%b}}' % (channel.encode(), data)


def publish(order: HttpOrder) -> dict[str, Any]:
    """Publish at the rate; what the server did not confirm is reported by number."""
    before = own_cpu_s()
    devices = array("l", random.Random(order.run).choices(range(order.devices), k=order.count))
    connection = http.client.HTTPConnection("127.0.0.1", order.port, timeout=_TIMEOUT_S)
    doubtful: list[int] = []
    start, sent, late, away = time.monotonic(), 0, 0.0, 0.0
    while sent < order.count:
        passed = time.monotonic() - start
        due = min(order.count, int(passed * order.rate) + 1)
        if due > sent:
            late = max(late, passed - sent / order.rate)
            numbers = range(sent, due)
            commands = (_command(order, n, EVERYBODY if order.channel else devices[n]) for n in numbers)
            try:
                _post(connection, order.path, b'{"commands":[%b]}' % b",".join(commands))
                away = 0.0
            except OSError:
                connection.close()
                away = away or time.monotonic()
                if time.monotonic() - away > order.patience_s:
                    raise
                doubtful.extend(numbers)
            sent = due
        time.sleep(max(0.0, min(_EVERY_S, start + sent / order.rate - time.monotonic())) or 0.0005)
    return {
        "published": order.count,
        "stored": order.count - len(doubtful),
        "not_stored": doubtful,
        "seconds": time.monotonic() - start,
        "late_ms": late * 1000,
        "cpu_s": own_cpu_s() - before,
    }


def _post(connection: http.client.HTTPConnection, path: str, body: bytes) -> None:
    connection.request("POST", path, body, {"Content-Type": "application/json"})
    answer = connection.getresponse()
    told = answer.read()
    if answer.status != 200 or b'"error"' in told:
        raise RuntimeError(f"the server refused a batch with {answer.status}: {told[:200]!r}")


if __name__ == "__main__":
    print(json.dumps(publish(HttpOrder(**json.loads(sys.stdin.read())))))
