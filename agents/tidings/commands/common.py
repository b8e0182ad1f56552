"""What commands share: settings, the event loop, and running an agent until it is told to stop."""

from __future__ import annotations

import argparse
import asyncio
import os
import re
import signal
import sys
from collections.abc import Callable, Coroutine
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final, TypeVar

from tidings.runtime.collector import relax
from tidings.wire.errors import StartFailed, TidingsError

if TYPE_CHECKING:
    from tidings.runtime.service import Service
    from tidings.runtime.settings import Settings
    from tidings.stream.connection import Connection

__all__ = [
    "DEFAULT_STATE",
    "Commands",
    "add_nats",
    "add_state",
    "check_mapping",
    "duration",
    "load",
    "load_where",
    "moment",
    "run",
    "serve",
]

Commands = argparse._SubParsersAction  # its own name is private, and there is no other
DEFAULT_STATE: Final = Path(".tidings")

_UNITS: Final = {"": 1, "s": 1, "m": 60, "h": 3600, "d": 86_400}
_FORCED: Final = 130
_PROBES: Final = 16
_Result = TypeVar("_Result")


def add_state(parser: argparse.ArgumentParser, *, default: Path | None = DEFAULT_STATE) -> None:
    """The option ``--state``."""
    parser.add_argument(
        "--state",
        metavar="DIR",
        type=Path,
        default=default,
        help=f"state folder of `tidings dev` (default: {DEFAULT_STATE})",
    )


def add_nats(parser: argparse.ArgumentParser) -> None:
    """The option ``--nats``."""
    parser.add_argument("--nats", metavar="URL", help="NATS servers, comma-separated (default: the setting nats_url)")


def duration(text: str) -> int:
    """Seconds of a text such as ``90s``, ``15m``, ``1h`` or ``7d``."""
    found = re.fullmatch(r"([1-9][0-9]{0,8})([smhd]?)", text)
    if found is None:
        raise argparse.ArgumentTypeError(f"{text!r} is no duration: write 90s, 15m, 1h or 7d")
    return int(found[1]) * _UNITS[found[2]]


def moment(text: str) -> datetime:
    """The time of a text such as ``15m`` or ``7d``, so long ago, or of an RFC 3339 one."""
    try:
        return datetime.now(UTC) - timedelta(seconds=duration(text))
    except argparse.ArgumentTypeError:
        try:
            moment = datetime.fromisoformat(text)
        except ValueError:
            moment = None
    if moment is None or moment.tzinfo is None:
        raise argparse.ArgumentTypeError(
            f"{text!r} is no time: write 15m or 7d for so long ago, or a time with its zone, 2026-01-31T12:00:00Z"
        )
    return moment


def load(args: argparse.Namespace, **given: Any) -> Settings:
    """The settings of this run, with logging set up as they say."""
    from tidings.runtime import logs
    from tidings.runtime.settings import Settings

    settings = Settings.load(file=args.config, **given)
    logs.set_up(settings.log_level, form=settings.log_format)
    return settings


def load_where(args: argparse.Namespace) -> Settings:
    """`load`, with --nats and --state as `add_nats` and `add_state` (without a default) read them.

    Where both are given, the state folder says where the store is, and --nats where the log is.
    """
    where = {} if args.state is None else _of_state(args.state)
    return load(args, **{**where, **({} if args.nats is None else {"nats_url": args.nats})})


def _of_state(state: Path) -> dict[str, str]:
    """Where a running `tidings dev` has its parts."""
    from tidings.dev.state import running

    found = running(state)
    if found is None:
        raise StartFailed(f"no `tidings dev` runs on {state}: start it, its log is needed")
    return {"nats_url": found.nats_url, "store_url": found.store_url, "nats_ca": found.ca}


def run(work: Coroutine[Any, Any, _Result]) -> _Result:
    """Run a coroutine on uvloop."""
    import uvloop

    with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
        return runner.run(work)


async def check_mapping(connection: Connection, partitions: int) -> None:
    """Raise `TopologyMismatch` unless the server maps users to partitions as we do.

    Of a server that maps to fewer partitions one probe in some agrees by chance: several do not.
    """
    from tidings.stream import topology

    for _ in range(_PROBES):
        await topology.probe_mapping(connection, partitions)


async def serve(service: Service, started: Callable[[], None] | None = None) -> int:
    """Start, run until SIGINT or SIGTERM, drain, stop. Another SIGINT ends the process at once.

    Raises what made the start fail, or `TidingsError` when the service dies later.
    """
    relax()
    told = asyncio.Event()
    loop = asyncio.get_running_loop()
    loop.add_signal_handler(signal.SIGINT, _on_ctrl_c, told)
    # A supervisor may send it twice, and then kills.
    loop.add_signal_handler(signal.SIGTERM, told.set)
    stopping = asyncio.ensure_future(told.wait())
    starting = asyncio.ensure_future(service.start())
    try:
        await asyncio.wait({starting, stopping}, return_when=asyncio.FIRST_COMPLETED)
        if starting.done():
            await starting
            if started is not None:
                started()
            await _until_told(service, stopping)
            service.log.info("stopping; another Ctrl-C ends it at once")
            await service.drain()
    finally:
        stopping.cancel()
        await service.stop()
        await asyncio.wait({starting})
    return 0


async def _until_told(service: Service, stopping: asyncio.Future[Any]) -> None:
    failing = asyncio.ensure_future(service.failed())
    await asyncio.wait({failing, stopping}, return_when=asyncio.FIRST_COMPLETED)
    if not failing.done():
        failing.cancel()
        return
    error = failing.exception()
    if isinstance(error, TidingsError):
        raise error
    raise TidingsError(f"{service.name} failed and was stopped: {type(error).__name__}: {error}") from error


def _on_ctrl_c(told: asyncio.Event) -> None:
    if told.is_set():
        # Whatever hangs, hangs. A child nats-server is told by the kernel, or found at the next start.
        sys.stderr.write("tidings: stopped at once\n")
        sys.stderr.flush()
        os._exit(_FORCED)
    told.set()
