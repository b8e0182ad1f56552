"""``tidings schemas list|check``: the event types that have a schema, and whether a notification fits its own."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import TYPE_CHECKING

import orjson

from tidings.wire.errors import InvalidNotification

from .common import Commands, load

if TYPE_CHECKING:
    from tidings.runtime.settings import Settings

__all__ = ["register"]


def register(commands: Commands[argparse.ArgumentParser], common: argparse.ArgumentParser) -> None:
    parser = commands.add_parser("schemas", parents=[common], help="list event types, check notifications against them")
    actions = parser.add_subparsers(title="actions", metavar="ACTION", required=True)
    listing = actions.add_parser(
        "list", parents=[common], help="the types that have a schema", description=_list.__doc__
    )
    listing.add_argument("--json", action="store_true", help="one JSON object a line, with the type's examples")
    check = actions.add_parser(
        "check", parents=[common], help="hold notifications against them", description=_check.__doc__
    )
    check.add_argument("files", metavar="FILE", nargs="+", help="a notification as JSON; - for standard input")
    for sub, action in ((listing, _list), (check, _check)):
        sub.add_argument("--dir", metavar="DIR", type=Path, help="your own schemas (default: the setting schema_dir)")
        sub.set_defaults(run=_run, action=action)


def _run(args: argparse.Namespace) -> int:
    status: int = args.action(args, load(args, schema_dir=None if args.dir is None else str(args.dir)))
    return status


def _list(args: argparse.Namespace, settings: Settings) -> int:
    """The event types that have a schema. Those of schema_dir replace shipped ones of the same name. Exit status 1 when
    a file is no schema.
    """
    from tidings.schema import Schemas

    types = Schemas.of(settings).types()
    if args.json:
        for found in types:
            sys.stdout.buffer.write(orjson.dumps(found._asdict(), option=orjson.OPT_APPEND_NEWLINE))
        return 0
    width = max((len(found.name) for found in types), default=0)
    for found in types:
        print(f"{found.name:<{width}}  {found.title}  ({found.place})")
    return 0


def _check(args: argparse.Namespace, settings: Settings) -> int:
    """Hold notifications against the schema of their type, as the HTTP api does. Exit status 1 when one is refused."""
    from tidings.schema import Schemas

    schemas = Schemas.of(settings)
    status = 0
    for name in args.files:
        body = sys.stdin.buffer.read() if name == "-" else Path(name).read_bytes()
        try:
            envelope = schemas.check(body)
        except InvalidNotification as error:
            print(f"{name}: {error}", file=sys.stderr)
            status = 1
        else:
            print(f"{name}: a good {envelope.type}")
    return status
