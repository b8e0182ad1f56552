"""``python -m bench.schemas``: what it costs to hold a notification against the schema of its type.

Each figure is the CPU time of reading one body as an inbox or fan-out agent does, the best of several rounds.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Final

import orjson

from tidings.runtime.settings import Settings
from tidings.schema import Schemas, reader
from tidings.wire.errors import SchemaViolation
from tidings.wire.notification import MAX_BODY_BYTES, build

_ROUNDS: Final = 7
_ROUND_S: Final = 0.2


def main() -> None:
    bodies = _bodies()
    readers = {check: reader(Settings(schema_check=check)) for check in ("off", "sampled", "always")}
    print(f"{'body':<34}" + "".join(f"{name:>10}" for name in readers) + "  µs")
    for name, body in bodies.items():
        figures = (_microseconds(read, body) for read in readers.values())
        print(f"{name:<34}" + "".join(f"{figure:>10.1f}" for figure in figures))


def _bodies() -> dict[str, bytes]:
    examples = {found.name: orjson.dumps(found.examples[-1]) for found in Schemas.load().types()}
    room = MAX_BODY_BYTES - 200
    return {
        "no schema": build(type="order.sent", data={"text": "hi"})[1],
        "social.like, small": build(type="social.like", data={"text": "hi"})[1],
        "social.comment, all members": examples["social.comment"],
        "social.like, 16 KiB of members": build(
            type="social.like", data={"text": "hi", "more": [{"id": n} for n in range(room // 12)]}
        )[1],
        "social.like, a violation": build(type="social.like", data={"text": 5})[1],
    }


def _microseconds(read: Callable[[bytes], object], body: bytes) -> float:
    best = float("inf")
    for _ in range(_ROUNDS):
        count, began = 0, time.process_time()
        while (took := time.process_time() - began) < _ROUND_S:
            for _ in range(100):
                _read(read, body)
            count += 100
        best = min(best, took / count)
    return best * 1e6


def _read(read: Callable[[bytes], object], body: bytes) -> str | None:
    try:
        read(body)
    except SchemaViolation as error:
        return error.pointer
    return None


if __name__ == "__main__":
    main()
