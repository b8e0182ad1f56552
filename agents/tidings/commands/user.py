"""``tidings user export|erase``: what is kept of one user, in the store and in the log."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Coroutine
from typing import TYPE_CHECKING, Any

import orjson

from .common import Commands, add_nats, add_state, load_where, run

if TYPE_CHECKING:
    from tidings.runtime.settings import Settings

__all__ = ["register"]


def register(commands: Commands[argparse.ArgumentParser], common: argparse.ArgumentParser) -> None:
    parser = commands.add_parser("user", parents=[common], help="export or erase what is kept of a user")
    actions = parser.add_subparsers(title="actions", metavar="ACTION", required=True)
    for name, action in (("export", _export), ("erase", _erase)):
        sub = actions.add_parser(name, parents=[common], help=_first_line(action), description=action.__doc__)
        sub.add_argument("--user", required=True, help="whose")
        add_nats(sub)
        add_state(sub, default=None)
        sub.set_defaults(run=_run, action=action)


def _first_line(action: Callable[..., object]) -> str:
    return (action.__doc__ or "").partition(".")[0].lower()


def _run(args: argparse.Namespace) -> int:
    settings = load_where(args)
    action: Callable[[Settings, str], Coroutine[Any, Any, None]] = args.action
    run(action(settings, args.user))
    return 0


async def _export(settings: Settings, user: str) -> None:
    """Print everything kept of a user. One JSON object a line: what the inbox has, its marks and cursors, what the log
    still holds, which the inbox has too unless it is newer than a moment, and dead letters.
    """
    from tidings.store.factory import open_store_url
    from tidings.store.inbox import UserInbox
    from tidings.stream import records
    from tidings.stream.connection import connect

    store = open_store_url(settings.store_url, retention_days=settings.retention_days)
    connection = await connect(settings, "tidings-user")
    try:
        await store.open()
        floor = await records.broadcast_floor(connection)
        async for entry in UserInbox(store, lambda: floor).export(user):
            _print(entry)
        async for entry in records.of_user(connection, user):
            _print(entry)
        async for entry in records.dead_of_user(connection, user):
            _print(entry)
    finally:
        await store.close()
        await connection.finish()


def _print(entry: dict[str, Any]) -> None:
    sys.stdout.buffer.write(orjson.dumps(entry, option=orjson.OPT_APPEND_NEWLINE))


async def _erase(settings: Settings, user: str) -> None:
    """Delete everything kept of a user. That is the log, dead letters, inbox, marks and cursors, up to this moment;
    what is published from now on is kept as ever.
    """
    from tidings.store.factory import open_store_url
    from tidings.store.inbox import UserInbox
    from tidings.stream import records
    from tidings.stream.connection import connect
    from tidings.wire.position import Place

    store = open_store_url(settings.store_url, retention_days=settings.retention_days)
    connection = await connect(settings, "tidings-user")
    try:
        await store.open()
        floor = await records.broadcast_floor(connection)
        upto = await records.newest(connection, user)
        logged = await records.purge(connection, user)
        dead = await records.purge_dead(connection, user)
        # Last: what an inbox agent had taken from the log by now is at most at `upto`, and stays away.
        stored = await UserInbox(store, lambda: floor).erase(user, Place(upto, floor if floor.sequence else None))
    finally:
        await store.close()
        await connection.finish()
    print(f"inbox: {stored} notifications deleted, with all marks and cursors; devices that are online start anew")
    print(f"log: {logged} notifications deleted; dead letters: {dead}")
    print("not covered: your backups of either, and copies of the streams elsewhere (mirrors, sources); revocations of")
    print("the user's tokens, which are forgotten when no token can be alive")
