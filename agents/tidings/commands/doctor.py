"""``tidings doctor``: what is wrong, in words, and what to do about it."""

from __future__ import annotations

import argparse
import dataclasses
import resource
import time
from collections.abc import AsyncIterator
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Final, NamedTuple
from urllib.parse import unquote

from tidings.runtime.address import shown
from tidings.wire.errors import BadSettings, StreamUnavailable, TidingsError, TopologyMismatch

from .common import DEFAULT_STATE, Commands, add_nats, add_state, check_mapping, load, run

if TYPE_CHECKING:
    from tidings.runtime.settings import Settings
    from tidings.stream.connection import Connection

__all__ = ["register"]

_OLDEST_SERVER: Final = (2, 11)
_TESTED_SERVER: Final = (2, 15)
_CLOCK_WARN_S: Final = 1.0
_CLOCK_FAIL_S: Final = 10.0
"""Device tokens allow for so much."""
_OWN_FILES: Final = 200
"""Files that a gateway has open beside its sessions."""
_SQLITE: Final = "sqlite:///"


class _Finding(NamedTuple):
    verdict: str
    """``ok``, ``warn`` or ``FAIL``."""
    text: str


def _ok(text: str) -> _Finding:
    return _Finding("ok", text)


def _warn(text: str) -> _Finding:
    return _Finding("warn", text)


def _fail(text: str) -> _Finding:
    return _Finding("FAIL", text)


def register(commands: Commands[argparse.ArgumentParser], common: argparse.ArgumentParser) -> None:
    parser = commands.add_parser(
        "doctor", parents=[common], help="say what is wrong with a mesh", description=_doctor.__doc__
    )
    add_nats(parser)
    add_state(parser, default=None)
    parser.set_defaults(run=_doctor)


def _doctor(args: argparse.Namespace) -> int:
    """Check NATS, JetStream, mapping, streams, store, clock and open files of the mesh that the settings name, or of
    the `tidings dev` that runs on --state. Exit status 1 when anything is wrong.
    """
    settings = load(args, nats_url=args.nats)
    state = args.state
    if state is None and args.nats is None and args.config is None:
        state = DEFAULT_STATE if _mesh_runs(DEFAULT_STATE) else None
    if state is not None:
        settings = _of_state(settings, state)
    return run(_examine(settings, dev=state is not None))


def _mesh_runs(folder: Path) -> bool:
    from tidings.dev.state import running

    return running(folder) is not None


def _of_state(settings: Settings, folder: Path) -> Settings:
    """The settings that the development mesh of a folder runs with."""
    from tidings.dev.mesh import embedded
    from tidings.dev.state import StateFolder, read_key, running
    from tidings.wire.errors import StartFailed

    mesh = running(folder)
    if mesh is None:
        raise StartFailed(
            f"no `tidings dev` runs on {folder}: start it, or leave --state out to check the settings' mesh"
        )
    print(f"the mesh of `tidings dev` on {folder}:")
    state = StateFolder(folder)
    state.look()
    return dataclasses.replace(embedded(settings, state, mesh.nats_url, read_key(folder)), nats_ca=mesh.ca)


async def _examine(settings: Settings, *, dev: bool) -> int:
    failed = False
    checked = [_nats(settings), _store(settings), _machine(settings)]
    if not dev:
        # Of a development mesh everything is open to this machine, on purpose.
        checked.append(_protection(settings))
    for checks in checked:
        async for verdict, text in checks:
            print(f"{verdict:<4}  {text}", flush=True)
            failed = failed or verdict == "FAIL"
    return 1 if failed else 0


async def _nats(settings: Settings) -> AsyncIterator[_Finding]:
    from tidings.stream.connection import connect

    try:
        connection = await connect(settings, "tidings-doctor")
    except (BadSettings, StreamUnavailable) as error:
        yield _fail(str(error))
        return
    try:
        yield _version(connection, settings)
        try:
            info = await connection.api("INFO")
        except StreamUnavailable as error:
            yield _fail(f"JetStream: {error}. Enable it in the server's configuration: jetstream {{ store_dir: … }}")
            return
        yield _ok(
            f"JetStream: {info['streams']} streams, {info['consumers']} consumers, {info['storage']} bytes on disk"
        )
        yield await _mapping(connection, settings)
        yield await _streams(connection, settings)
        yield await _clock(connection)
    finally:
        await connection.finish()


def _version(connection: Connection, settings: Settings) -> _Finding:
    version = connection.connected_server_version
    text = f"NATS at {shown(settings.nats_url)}: nats-server {version.major}.{version.minor}.{version.patch}"
    if (version.major, version.minor) < _OLDEST_SERVER:
        return _fail(f"{text}, which lacks what is needed: upgrade it to {_dotted(_TESTED_SERVER)} or newer")
    if (version.major, version.minor) < _TESTED_SERVER:
        return _warn(
            f"{text}, older than what Tidings is tested with: upgrade it to {_dotted(_TESTED_SERVER)} or newer"
        )
    return _ok(text)


def _dotted(version: tuple[int, int]) -> str:
    return ".".join(map(str, version))


async def _mapping(connection: Connection, settings: Settings) -> _Finding:
    try:
        await check_mapping(connection, settings.partitions)
    except TopologyMismatch as error:
        other = await _other_number(connection, settings)
        if other is None:
            return _fail(f"subject mapping: {error}")
        return _fail(
            f"subject mapping: users go to {other} partitions, for which the streams were made, and TIDINGS_PARTITIONS "
            f"is {settings.partitions}: set TIDINGS_PARTITIONS={other}"
        )
    except StreamUnavailable as error:
        return _fail(f"subject mapping: {error}")
    return _ok(f"subject mapping: users go to {settings.partitions} partitions")


async def _other_number(connection: Connection, settings: Settings) -> int | None:
    """The number of partitions that mapping and streams agree on, if it is another than the settings'."""
    from tidings.stream import topology

    try:
        number = (await topology.discover(connection)).partitions
        await check_mapping(connection, number)
    except (TopologyMismatch, StreamUnavailable):
        return None
    return number if number != settings.partitions else None


async def _streams(connection: Connection, settings: Settings) -> _Finding:
    from tidings.stream import topology

    try:
        changes = await topology.plan(connection, settings)
    except (TopologyMismatch, StreamUnavailable) as error:
        return _fail(f"streams: {error}")
    if changes:
        some = ", ".join(change.text for change in changes[:3])
        more = f" and {len(changes) - 3} more" if len(changes) > 3 else ""
        return _fail(f"streams: they are not as the settings want them ({some}{more}): run `tidings topology apply`")
    return _ok("streams: all there, with their shared consumers")


async def _clock(connection: Connection) -> _Finding:
    from tidings.stream.topology import notify_stream

    before = time.time()
    try:
        stamp = (await connection.api(f"STREAM.INFO.{notify_stream(0)}")).get("ts")
    except StreamUnavailable:
        return _warn("clock: not compared, as the server tells its time with a stream only, and NOTIFY_0 is not there")
    if stamp is None:
        return _warn("clock: the server does not tell its time")
    there = datetime.fromisoformat(stamp).astimezone(UTC).timestamp()
    off = (before + time.time()) / 2 - there
    text = f"clock: {abs(off):.1f} s {'ahead of' if off > 0 else 'behind'} the NATS server's"
    if abs(off) > _CLOCK_FAIL_S:
        return _fail(f"{text}: device tokens are refused too early or too late. Set both clocks by NTP")
    if abs(off) > _CLOCK_WARN_S:
        return _warn(f"{text}: set both clocks by NTP")
    return _ok(f"clock: within {_CLOCK_WARN_S:g} s of the NATS server's")


async def _store(settings: Settings) -> AsyncIterator[_Finding]:
    from tidings.store import factory

    if _is_missing_file(settings.store_url):
        # Opening would make it, here, where perhaps no agent runs.
        where = factory.shown(settings.store_url)
        yield _warn(f"store at {where}: not there yet: the first agent that starts in this folder makes it")
        return
    store = factory.open_store_url(settings.store_url, retention_days=settings.retention_days)
    try:
        await store.open()
        await store.check()
    except TidingsError as error:
        yield _fail(f"store at {factory.shown(settings.store_url)}: {error}")
    else:
        yield _ok(f"store at {factory.shown(settings.store_url)}: reads and writes")
    finally:
        await store.close()


def _is_missing_file(store_url: str) -> bool:
    file = unquote(store_url.removeprefix(_SQLITE))
    return store_url.startswith(_SQLITE) and not Path(file).exists()


async def _machine(settings: Settings) -> AsyncIterator[_Finding]:
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    need = settings.max_sessions + _OWN_FILES
    if soft == resource.RLIM_INFINITY or soft >= need:
        yield _ok(f"open files: {settings.max_sessions} sessions fit the limit of {soft}")
    else:
        remedy = f"`ulimit -n {need}`" if hard == resource.RLIM_INFINITY or hard >= need else "raise the hard limit"
        yield _warn(
            f"open files: the limit of {soft} has no room for max_sessions, {settings.max_sessions}: "
            f"{remedy}, or set max_sessions to {max(1, soft - _OWN_FILES)}"
        )
    if settings.token_key:
        yield _ok("token_key: set")
    else:
        yield _fail("token_key: not set, gateways do not start. Give them TIDINGS_TOKEN_KEY: `openssl rand -hex 32`")


async def _protection(settings: Settings) -> AsyncIterator[_Finding]:
    from tidings.runtime.exposure import exposures
    from tidings.runtime.settings import listed
    from tidings.runtime.tls import end_of, server_tls

    found, allowed = exposures(settings), listed(settings.insecure)
    for name, text in found:
        yield _warn(f"insecure={name}: {text}") if name in allowed else _fail(f"agents do not start: {text}")
    if not found:
        yield _ok("protection: no address outside of this machine is without TLS")
    if settings.tls_certificate:
        try:
            server_tls(settings)
            end = end_of(settings.tls_certificate)
        except (BadSettings, ValueError) as error:
            yield _fail(f"certificate: {error}")
            return
        text = f"certificate: {settings.tls_certificate} is good until {end:%Y-%m-%d %H:%M} UTC"
        yield _ok(text) if end > datetime.now(UTC) else _fail(f"{text}: renew it")
