"""Publishing over NATS from gevent: orders to the process of `publisher.py`, and its answers."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any, Final, NamedTuple

import gevent
import orjson
from gevent.event import AsyncResult
from gevent.lock import RLock

__all__ = ["NatsPublisher", "Outcome"]

_PROGRAM: Final = Path(__file__).with_name("publisher.py")
_END_S: Final = 10.0


class Outcome(NamedTuple):
    """What became of a notification: ``stored``, ``refused``, or ``doubtful`` where nobody knows."""

    outcome: str
    detail: str
    took_ms: float


class NatsPublisher:
    """One child process. Who publishes waits for the confirmation, so no more is under way than Locust has users."""

    def __init__(self, **settings: str) -> None:
        """`settings` are those of Tidings that differ from the environment's."""
        self._waiting: dict[str, AsyncResult[Outcome]] = {}
        self._child = subprocess.Popen(
            [sys.executable, "-P", str(_PROGRAM)], stdin=subprocess.PIPE, stdout=subprocess.PIPE
        )
        self._one_line = RLock()
        self._write(settings)
        self._reader = gevent.spawn(self._read)

    def publish(self, id: str, to: dict[str, str], data: dict[str, Any]) -> Outcome:
        """Publish to ``{"user": …}`` or ``{"topic": …}``; returns when it is known what became of it."""
        answer: AsyncResult[Outcome] = AsyncResult()
        self._waiting[id] = answer
        try:
            self._write({"id": id, **to, "data": data})
            return answer.get()
        except OSError:
            return _gone()
        finally:
            self._waiting.pop(id, None)

    def _write(self, order: dict[str, Any]) -> None:
        assert self._child.stdin is not None
        with self._one_line:
            self._child.stdin.write(orjson.dumps(order, option=orjson.OPT_APPEND_NEWLINE))
            self._child.stdin.flush()

    def _read(self) -> None:
        assert self._child.stdout is not None
        for line in self._child.stdout:
            said = orjson.loads(line)
            if (answer := self._waiting.get(said["id"])) is not None:
                answer.set(Outcome(said["outcome"], said["detail"], said["ms"]))
        for answer in self._waiting.values():
            answer.set(_gone())

    def close(self) -> None:
        """Publish what was ordered, then end."""
        assert self._child.stdin is not None
        self._child.stdin.close()
        self._reader.join(_END_S)
        if self._child.poll() is None:
            self._child.kill()
        self._child.wait()


def _gone() -> Outcome:
    return Outcome("doubtful", "the publisher's process has ended", 0.0)
