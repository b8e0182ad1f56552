"""``tidings topology plan|apply|show``: the streams and shared consumers on the server, and the store's schema.

``nats-config`` has a module of its own.
"""

from __future__ import annotations

import argparse
from collections.abc import Awaitable, Callable
from types import ModuleType
from typing import TYPE_CHECKING, Any

from . import nats_config
from .common import Commands, add_nats, check_mapping, load, run

if TYPE_CHECKING:
    from tidings.runtime.settings import Settings
    from tidings.store.cql import Where
    from tidings.stream.connection import Connection

__all__ = ["register"]


def register(commands: Commands[argparse.ArgumentParser], common: argparse.ArgumentParser) -> None:
    parser = commands.add_parser(
        "topology", parents=[common], help="the streams on the NATS server, the store's schema"
    )
    actions = parser.add_subparsers(title="actions", metavar="ACTION", required=True)
    for name, action, text in (
        ("plan", _plan, "say what apply would change"),
        (
            "apply",
            _apply,
            "make the streams and the store's schema as the settings want them, and check the subject mapping",
        ),
        ("show", _show, "say what is there"),
    ):
        sub = actions.add_parser(name, parents=[common], help=text, description=text)
        add_nats(sub)
        sub.set_defaults(run=_run, action=action)
    nats_config.register(actions, common)


def _run(args: argparse.Namespace) -> int:
    return run(_with_connection(load(args, nats_url=args.nats), args.action))


async def _with_connection(settings: Settings, action: Callable[[Connection, Settings], Awaitable[None]]) -> int:
    from tidings.stream.connection import connect

    connection = await connect(settings, "tidings-topology")
    try:
        await action(connection, settings)
    finally:
        await connection.finish()
    return 0


def _schema() -> ModuleType:
    """Imported here: whoever keeps the inbox in SQLite may not have the driver."""
    from tidings.store.cql import schema

    return schema


def _where(settings: Settings) -> Where:
    from tidings.store.cql import parse_url

    return parse_url(settings.store_url)


async def _plan(connection: Connection, settings: Settings) -> None:
    from tidings.store.factory import is_cql
    from tidings.stream import topology

    changes = [change.text for change in await topology.plan(connection, settings)]
    if is_cql(settings.store_url):
        changes += [
            f"apply {file} to the store" for file in await _schema().pending(_where(settings), settings.cql_replication)
        ]
    for change in changes:
        print(change)
    print(f"{len(changes)} to do: `tidings topology apply` does it" if changes else "nothing to do")


async def _apply(connection: Connection, settings: Settings) -> None:
    from tidings.store.factory import is_cql
    from tidings.stream import topology

    changes = [change.text for change in await topology.apply(connection, settings)]
    if is_cql(settings.store_url):
        files = await _schema().apply(_where(settings), settings.cql_replication)
        changes += [f"apply {file} to the store" for file in files]
    for change in changes:
        print(change)
    print(f"{len(changes)} done" if changes else "nothing to do")
    await check_mapping(connection, settings.partitions)


async def _show(connection: Connection, settings: Settings) -> None:
    from tidings.stream import topology

    found = await topology.discover(connection)
    print(f"{found.partitions} partitions")
    rows = [("stream", "messages", "bytes", "replicas", "consumers", "behind", "incarnation")]
    for number, incarnation in enumerate(found.incarnations):
        name = topology.notify_stream(number)
        behind = await _behind(connection, name, topology.INBOX)
        rows.append((*_numbers(await connection.api(f"STREAM.INFO.{name}")), behind, f"{incarnation:x}"))
    consumers = {topology.TOPICS: topology.FANOUT, topology.BROADCAST: topology.INBOX}
    incarnations = {topology.BROADCAST: f"{found.broadcast:x}"}
    for name in topology.SHARED:
        behind = await _behind(connection, name, consumers[name]) if name in consumers else ""
        numbers = _numbers(await connection.api(f"STREAM.INFO.{name}"))
        rows.append((*numbers, behind, incarnations.get(name, "")))
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
    for row in rows:
        print("  ".join(f"{cell:<{width}}" for cell, width in zip(row, widths, strict=True)).rstrip())


async def _behind(connection: Connection, stream: str, consumer: str) -> str:
    """Messages that the agents have not acknowledged."""
    info = await connection.api(f"CONSUMER.INFO.{stream}.{consumer}")
    return str(info["num_pending"] + info["num_ack_pending"])


def _numbers(info: dict[str, Any]) -> tuple[str, str, str, str, str]:
    config, state = info["config"], info["state"]
    values = (state["messages"], state["bytes"], config["num_replicas"], state["consumer_count"])
    messages, size, replicas, consumers = map(str, values)
    return config["name"], messages, size, replicas, consumers
