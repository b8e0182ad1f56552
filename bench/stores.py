"""``python -m bench.stores``: what the inbox costs on each store. See ``bench/README.md``.

The inbox agent is a process as an operator starts it; it reads from a real nats-server what is published meanwhile.
Pages, counts and cursors are asked of the store by this process, as a gateway would ask.
"""

from __future__ import annotations

import argparse
import asyncio
import os
import re
import secrets
import statistics
import sys
import time
from asyncio.subprocess import PIPE
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from contextlib import asynccontextmanager, contextmanager, nullcontext
from dataclasses import asdict
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, Final

import uvloop

from tidings.runtime.settings import ENVIRONMENT_PREFIX, Settings
from tidings.store.factory import open_store_url
from tidings.store.port import Cursor, CursorUpdate, Holder, InboxRow, PageQuery, Store
from tidings.stream import topology
from tidings.stream.connection import Connection, connect
from tidings.stream.server import NatsServer
from tidings.wire import subject
from tidings.wire.notification import build
from tidings.wire.position import Position

from .host import BenchFailed
from .system import alone, cpu_s, machine, memory

_README: Final = Path(__file__).with_name("README.md")
_BEGIN: Final = "<!-- stores: written by `python -m bench.stores --write` -->"
_END: Final = "<!-- end of stores -->"
_PARTITIONS: Final = 16
_USERS: Final = 5000
_WARM_UP: Final = 2000
_PATIENCE_S: Final = 300.0
_LONG: Final = "long-history"
_AT: Final = 1_700_000_000_000

Figures = dict[str, float]


def _say(text: str) -> None:
    print(f"{time.strftime('%H:%M:%S')} {text}", file=sys.stderr, flush=True)


# The agent


async def _publish(connection: Connection, count: int, first: int) -> None:
    """Pipelined, spread over the users."""
    for start in range(first, first + count, 500):
        await asyncio.gather(*(_publish_one(connection, number) for number in range(start, start + 500)))


async def _publish_one(connection: Connection, number: int) -> None:
    data = {"text": "somebody whom you follow did what such a notification says", "number": number}
    id, body = build(type="bench.made", data=data, id=f"b{number}")
    await connection.store(subject.notify_user(f"bench-{number % _USERS}"), body, {"Nats-Msg-Id": id})


async def _stored(connection: Connection) -> None:
    """Wait until the inbox agent has acknowledged everything."""
    deadline = time.monotonic() + _PATIENCE_S
    while time.monotonic() < deadline:
        infos = await asyncio.gather(
            *(
                connection.api(f"CONSUMER.INFO.{topology.notify_stream(number)}.{topology.INBOX}")
                for number in range(_PARTITIONS)
            )
        )
        if not sum(info["num_pending"] + info["num_ack_pending"] for info in infos):
            return
        await asyncio.sleep(0.02)
    raise BenchFailed("the inbox agent does not store what was published")


@asynccontextmanager
async def _agent(settings: Settings, folder: Path) -> AsyncIterator[int]:
    environment = {key: text for key, text in os.environ.items() if not key.startswith(ENVIRONMENT_PREFIX)}
    for key, value in asdict(settings).items():
        environment[ENVIRONMENT_PREFIX + key.upper()] = str(value)
    process = await asyncio.create_subprocess_exec(
        sys.executable, "-m", "tidings", "inbox", env=environment, stderr=PIPE, cwd=folder
    )
    try:
        assert process.stderr is not None
        async for line in process.stderr:
            if re.search(rb"reads \d+ partitions", line):
                break
        else:
            raise BenchFailed("`tidings inbox` did not start")
        yield process.pid
    finally:
        process.terminate()
        await process.communicate()


async def _measure_agent(url: str, rows: int) -> Figures:
    with TemporaryDirectory(prefix="tidings-bench-") as name:
        folder = Path(name)
        nats = NatsServer(folder / "nats", partitions=_PARTITIONS)
        await nats.start()
        settings = Settings(nats_url=nats.url, partitions=_PARTITIONS, replicas=1, store_url=url)
        connection = await connect(settings, "bench")
        try:
            await topology.apply(connection, settings)
            async with _agent(settings, folder) as pid:
                await _publish(connection, _WARM_UP, 0)
                await _stored(connection)
                used, began = cpu_s(pid), time.monotonic()
                await _publish(connection, rows, _WARM_UP)
                await _stored(connection)
                took = time.monotonic() - began
                return {
                    "agent_us": (cpu_s(pid) - used) / rows * 1e6,
                    "agent_rows_s": rows / took,
                    "agent_mb": memory(pid).pss / 1024,
                }
        finally:
            await connection.close()
            await nats.stop()


# The store


async def _times(count: int, work: Callable[[int], Awaitable[object]]) -> list[float]:
    """Milliseconds of each, one after the other."""
    taken = []
    for number in range(count):
        began = time.perf_counter()
        await work(number)
        taken.append((time.perf_counter() - began) * 1000)
    return sorted(taken)


def _quantiles(name: str, taken: list[float]) -> Figures:
    return {f"{name}_p50": statistics.median(taken), f"{name}_p99": taken[int(len(taken) * 0.99)]}


async def _measure_store(url: str, rows: int, devices: int) -> Figures:
    store = open_store_url(url)
    await store.open()
    try:
        return {
            **await _append(store, rows),
            **await _reading(store, rows),
            **await _saving(store, devices),
        }
    finally:
        await store.close()


async def _append(store: Store, rows: int) -> Figures:
    """A long history of one user, a batch of 250 at a time: what the store itself costs a row."""
    _, body = build(type="bench.made", data={"text": "somebody whom you follow did something"}, id="b")
    used, began = time.process_time(), time.monotonic()
    for start in range(1, rows + 1, 250):
        now = time.time_ns()
        positions = [Position(_AT, number) for number in range(start, start + 250)]
        await store.append([InboxRow(_LONG, at, f"b{at.sequence}", "bench.made", None, now, body) for at in positions])
    return {
        "append_us": (time.process_time() - used) / rows * 1e6,
        "append_rows_s": rows / (time.monotonic() - began),
    }


async def _reading(store: Store, rows: int) -> Figures:
    found: Figures = {}
    full = await _times(200, lambda _: store.unread(_LONG))
    found |= _quantiles("count_many", full)
    found |= _quantiles("page", await _times(300, lambda _: store.page(_LONG, PageQuery())))
    step = max(1, rows // 300)
    deep = await _times(300, lambda n: store.page(_LONG, PageQuery(before=Position(_AT, rows - n * step))))
    found |= _quantiles("page_deep", deep)
    began = time.perf_counter()
    await store.mark_all(_LONG, Position(_AT, rows), "read")
    found["mark_all"] = (time.perf_counter() - began) * 1000
    await store.mark(_LONG, [Position(_AT, 1), Position(_AT, rows // 2)], "unread")
    few = await _times(200, lambda _: store.unread(_LONG))
    found |= _quantiles("count_few", few)
    found |= _quantiles("page_unread", await _times(200, lambda _: store.page(_LONG, PageQuery(filter="unread"))))
    return found


async def _saving(store: Store, devices: int) -> Figures:
    """Cursors of so many devices, written twice in flushes of 500."""
    holders = [Holder("bench", f"session-{number}") for number in range(devices)]
    for start in range(0, devices, 100):
        await asyncio.gather(
            *(
                store.claim(f"bench-{number}", "phone", holders[number], Position(_AT, 1))
                for number in range(start, start + 100)
            )
        )
    used = time.process_time()
    for flush in (2, 3):
        for start in range(0, devices, 500):
            await store.save(
                [
                    CursorUpdate(
                        f"bench-{number}", "phone", holders[number], Cursor(Position(_AT, flush * 10)), release=False
                    )
                    for number in range(start, start + 500)
                ]
            )
    return {"save_us": (time.process_time() - used) / (2 * devices) * 1e6}


# The report

_ROWS: Final = (
    ("agent_us", "inbox agent: CPU a stored notification", "µs"),
    ("agent_rows_s", "inbox agent: notifications a second", ""),
    ("agent_mb", "inbox agent: memory (PSS)", "MB"),
    ("append_us", "of that the store: CPU a row", "µs"),
    ("append_rows_s", "one user's history: rows a second", ""),
    ("page_p50", "newest page of 50: p50", "ms"),
    ("page_p99", "newest page of 50: p99", "ms"),
    ("page_deep_p99", "page of 50 deep in the history: p99", "ms"),
    ("page_unread_p99", "page of the unread, two in all of it: p99", "ms"),
    ("count_many_p99", "badge, all unread: p99", "ms"),
    ("count_few_p99", "badge, two unread in all of it: p99", "ms"),
    ("mark_all", "all marked as read", "ms"),
    ("save_us", "cursor of a device: CPU a flush", "µs"),
)


def _table(found: dict[str, list[Figures]]) -> str:
    names = list(found)
    lines = [f"| | {' | '.join(names)} |", f"|---|{'---|' * len(names)}"]
    for key, text, unit in _ROWS:
        cells = []
        for name in names:
            values = [figures[key] for figures in found[name]]
            middle = statistics.median(values)
            digits = 0 if middle >= 100 else 1 if middle >= 10 else 2
            spread = f" ({min(values):,.{digits}f} to {max(values):,.{digits}f})" if len(values) > 1 else ""
            cells.append(f"{middle:,.{digits}f}{spread} {unit}".rstrip())
        lines.append(f"| {text} | {' | '.join(cells)} |")
    return "\n".join(lines)


@contextmanager
def _cql_address(given: str | None) -> Iterator[str]:
    """The server that was named, else the one that the tests bring."""
    if given:
        yield given
        return
    sys.path.insert(0, str(Path(__file__).parents[1] / "tests"))
    from support.cassandra import cql_server

    with cql_server() as server:
        yield server.contact_point


async def _cql_store(address: str) -> str:
    from tidings.store.cql import parse_url, schema

    url = f"cql://{address}/bench_{secrets.token_hex(4)}?timeout_s=30"
    await schema.apply(parse_url(url), "simple:1", development=True)
    return url


def _main() -> int:
    parser = argparse.ArgumentParser(prog="bench.stores", description="What the inbox costs on each store.")
    parser.add_argument("--cql", metavar="HOST:PORT", help="a running CQL server (default: the one of the tests)")
    parser.add_argument("--only", choices=("sqlite", "cql"), help="one store alone")
    parser.add_argument("--rows", type=int, default=20_000, help="notifications of each step (default: 20000)")
    parser.add_argument("--devices", type=int, default=2000, help="devices whose cursors are written (default: 2000)")
    parser.add_argument("--repeats", type=int, default=3, help="how often (default: 3)")
    parser.add_argument("--write", action="store_true", help="put the table into bench/README.md")
    args = parser.parse_args()
    found: dict[str, list[Figures]] = {}
    wanted = [args.only] if args.only else ["sqlite", "cql"]
    with (
        alone(lambda: _say("another benchmark runs here: waiting for its end")),
        _cql_address(args.cql) if "cql" in wanted else nullcontext("") as address,
    ):
        for number in range(args.repeats):
            for kind in wanted:
                _say(f"repeat {number + 1} of {args.repeats}: {kind}")
                found.setdefault(kind, []).append(uvloop.run(_one(kind, address, args)))
    host = machine()
    text = (
        f"{time.strftime('%Y-%m-%d')}: {host['cpu']}, {host['cores']} cores; {args.rows:,} rows, "
        f"repeats: {args.repeats}; the CQL server is on the same machine.\n\n{_table(found)}"
    )
    print(text)
    if args.write:
        head, begin, rest = _README.read_text().partition(_BEGIN)
        _, end, tail = rest.partition(_END)
        if not begin or not end:
            raise BenchFailed(f"{_README.name} has lost its markers: {_BEGIN} and {_END}")
        _README.write_text(f"{head}{begin}\n\n{text}\n\n{end}{tail}")
    return 0


async def _one(kind: str, address: str, args: Any) -> Figures:
    with TemporaryDirectory(prefix="tidings-bench-") as folder:
        url = f"sqlite:///{folder}/inbox.db" if kind == "sqlite" else await _cql_store(address)
        return {**await _measure_agent(url, args.rows), **await _measure_store(url, args.rows, args.devices)}


if __name__ == "__main__":
    sys.exit(_main())
