"""Where an agent's time goes: cProfile for the time between two signals, and its result by origin.

As a program, ``python -m bench.profiler FILE gateway`` is ``tidings gateway`` that profiles its main thread from
SIGUSR1 to SIGUSR2 and then writes FILE. The clock is the thread's CPU time, so that waiting costs nothing. The
profiler makes every Python call dearer, and C code not: read shares and order, not microseconds.
"""

from __future__ import annotations

import cProfile
import json
import re
import runpy
import signal
import sys
import time
from collections import defaultdict
from pathlib import Path
from types import FrameType
from typing import Any, Final, NamedTuple

__all__ = ["Line", "by_origin", "read", "report"]

_TOP: Final = 25
_ORIGINS: Final = (
    ("ours", re.compile(r"/tidings/")),
    ("aiohttp", re.compile(r"aiohttp")),
    ("nats-py", re.compile(r"/nats/")),
    ("uvloop", re.compile(r"uvloop")),
    ("orjson", re.compile(r"orjson")),
    ("asyncio", re.compile(r"/asyncio/|_asyncio")),
)
_PYTHON: Final = "Python itself"
_OUTSIDE: Final = "outside of callbacks"


class Line(NamedTuple):
    """One function's own time."""

    origin: str
    name: str
    calls: int
    seconds: float


def _origin(name: str) -> str:
    return next((origin for origin, pattern in _ORIGINS if pattern.search(name)), _PYTHON)


def _named(code: Any) -> str:
    if isinstance(code, str):
        return code
    # A shorter path says as much: what comes after site-packages, or the last folders.
    file = code.co_filename.rpartition("site-packages/")[2]
    return f"{'/'.join(file.split('/')[-3:])}:{code.co_firstlineno}({code.co_name})"


class _Recorder:
    """Switched by signals. Their handlers run between two bytecodes of the main thread."""

    def __init__(self, file: Path) -> None:
        self._file = file
        self._profile = cProfile.Profile(time.thread_time)
        self._start = 0.0

    def begin(self, number: int, frame: FrameType | None) -> None:
        self._start = time.thread_time()
        self._profile.enable()

    def end(self, number: int, frame: FrameType | None) -> None:
        self._profile.disable()
        total = time.thread_time() - self._start
        lines = [
            (_origin(entry.code if isinstance(entry.code, str) else f"/{entry.code.co_filename}"),
             _named(entry.code), entry.callcount, entry.inlinetime)
            for entry in self._profile.getstats()
        ]  # fmt: skip
        written = self._file.with_suffix(".tmp")
        written.write_text(json.dumps({"total": total, "lines": lines}))
        written.replace(self._file)


def read(file: Path) -> list[Line]:
    """The profile's functions, the costliest first; what no function accounts for is the event loop's own."""
    told = json.loads(file.read_text())
    lines = [Line(*line) for line in told["lines"]]
    rest = told["total"] - sum(line.seconds for line in lines)
    lines.append(Line(_OUTSIDE, "the event loop between callbacks: polling, reading sockets", 0, max(0.0, rest)))
    return sorted(lines, key=lambda line: -line.seconds)


def by_origin(lines: list[Line]) -> list[tuple[str, float]]:
    """Share of each origin, the largest first."""
    sums: dict[str, float] = defaultdict(float)
    for line in lines:
        sums[line.origin] += line.seconds
    total = sum(sums.values()) or 1.0
    return sorted(((origin, seconds / total) for origin, seconds in sums.items()), key=lambda pair: -pair[1])


def report(lines: list[Line], notifications: int) -> str:
    """Two Markdown tables: by origin, and the functions with most time of their own."""
    total = sum(line.seconds for line in lines) or 1.0
    text = ["| whose | share |", "|---|---:|"]
    text += [f"| {origin} | {share:.0%} |" for origin, share in by_origin(lines)]
    text += ["", "| share | calls a notification | whose | function |", "|---:|---:|---|---|"]
    text += [
        f"| {line.seconds / total:.1%} | {line.calls / notifications:.2f} | {line.origin} | `{line.name}` |"
        for line in lines[:_TOP]
    ]
    return "\n".join(text)


def _main() -> None:
    recorder = _Recorder(Path(sys.argv[1]))
    signal.signal(signal.SIGUSR1, recorder.begin)
    signal.signal(signal.SIGUSR2, recorder.end)
    sys.argv = ["tidings", *sys.argv[2:]]
    runpy.run_module("tidings", run_name="__main__", alter_sys=True)


if __name__ == "__main__":
    _main()
