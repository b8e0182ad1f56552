"""``tidings deadletters list|show|replay|drop``: what could not be understood or delivered."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Awaitable, Callable
from typing import TYPE_CHECKING, Any, Final

import orjson

from tidings.runtime.logs import flat
from tidings.wire.errors import NoSuchLetter, ReplayRefused

from .common import Commands, add_nats, load, moment, run

if TYPE_CHECKING:
    from tidings.runtime.settings import Settings
    from tidings.stream.connection import Connection
    from tidings.stream.letters import Filter, Letter

__all__ = ["register"]

_PAGE: Final = 50
_MOST: Final = 1000
_COLUMNS: Final = ("id", "stored", "plane", "reason", "attempts", "for", "detail")


def register(commands: Commands[argparse.ArgumentParser], common: argparse.ArgumentParser) -> None:
    parser = commands.add_parser("deadletters", parents=[common], help="list, show, replay or drop dead letters")
    actions = parser.add_subparsers(title="actions", metavar="ACTION", required=True)
    listing = _add(actions, common, "list", "a page of dead letters, newest first", _list)
    _add_filters(listing)
    listing.add_argument("--limit", type=_page_size, default=_PAGE, help=f"most letters of the page (default: {_PAGE})")
    where = listing.add_mutually_exclusive_group()
    where.add_argument("--before", metavar="ID", type=int, help="only letters older than this one")
    where.add_argument("--after", metavar="ID", type=int, help="oldest first, newer than this one; 0 for the oldest")
    listing.add_argument("--json", action="store_true", help="one JSON object a line")
    show = _add(actions, common, "show", "one dead letter with its original bytes", _show)
    show.add_argument("id", metavar="ID", type=int, help="which, as `list` has it")
    form = show.add_mutually_exclusive_group()
    form.add_argument("--json", action="store_true", help="as one JSON object")
    form.add_argument("--raw", action="store_true", help="nothing but the original bytes")
    for name, text, action in (
        ("replay", "publish dead letters once more, to their user or topic, and take them out", _replay),
        ("drop", "delete dead letters", _drop),
    ):
        sub = _add(actions, common, name, text, action)
        sub.add_argument("ids", metavar="ID", type=int, nargs="*", help="which; or give filters, or --all")
        _add_filters(sub)
        sub.add_argument("--all", action="store_true", help="all there are now, or all that the filters mean")
        sub.add_argument(
            "--limit", type=_count, default=_MOST, help=f"at most so many, oldest first (default: {_MOST})"
        )
        sub.add_argument("--json", action="store_true", help="one JSON object a line")


def _add(
    actions: Commands[argparse.ArgumentParser], common: argparse.ArgumentParser, name: str, text: str, action: Any
) -> argparse.ArgumentParser:
    sub = actions.add_parser(name, parents=[common], help=text, description=action.__doc__)
    add_nats(sub)
    sub.set_defaults(run=_run, action=action, usage=sub.error)
    return sub


def _add_filters(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--plane", choices=("user", "topic", "broadcast"), help="where they died")
    parser.add_argument("--reason", metavar="CODE", help="why, such as undelivered or invalid_notification")
    parser.add_argument("--user", help="whose they were")
    parser.add_argument("--topic", help="the topic that they were published to")
    parser.add_argument(
        "--since", metavar="WHEN", type=moment, help="not older than: 90s, 15m, 1h, 7d, or an RFC 3339 time"
    )
    parser.add_argument("--until", metavar="WHEN", type=moment, help="older than; as --since")


def _count(text: str, most: int = 1_000_000) -> int:
    if not text.isascii() or not text.isdigit() or not 0 < int(text) <= most:
        raise argparse.ArgumentTypeError(f"{text!r} is no count: write a number from 1 to {most}")
    return int(text)


def _page_size(text: str) -> int:
    return _count(text, _MOST)


def _run(args: argparse.Namespace) -> int:
    if args.action in (_replay, _drop) and bool(args.ids) == (args.all or _is_filtered(args)):
        args.usage("say which: either IDs, or filters, or --all")
    settings = load(args, nats_url=args.nats)
    action: Callable[[Connection, argparse.Namespace, Settings], Awaitable[int]] = args.action
    return run(_with_connection(settings, args, action))


async def _with_connection(
    settings: Settings,
    args: argparse.Namespace,
    action: Callable[[Connection, argparse.Namespace, Settings], Awaitable[int]],
) -> int:
    from tidings.stream.connection import connect

    connection = await connect(settings, "tidings-deadletters")
    try:
        return await action(connection, args, settings)
    finally:
        await connection.finish()


def _is_filtered(args: argparse.Namespace) -> bool:
    return any(value is not None for value in _filter(args))


def _filter(args: argparse.Namespace) -> Filter:
    from tidings.stream.letters import Filter

    return Filter(args.plane, args.reason, args.user, args.topic, args.since, args.until)


async def _list(connection: Connection, args: argparse.Namespace, settings: Settings) -> int:
    """A page of dead letters, newest first. The ids are stable; the last line says how to go on."""
    from tidings.stream import letters

    page = await letters.page(connection, _filter(args), limit=args.limit, before=args.before, after=args.after)
    if args.json:
        for letter in page.letters:
            _print_json(letter.describe(body=False))
    else:
        _print_table(page.letters)
    if page.next is not None:
        option = "--before" if args.after is None else "--after"
        print(f"more with {option} {page.next}", file=sys.stderr)
    return 0


def _print_table(found: list[Letter]) -> None:
    rows = [_COLUMNS, *map(_row, found)]
    widths = [max(len(row[column]) for row in rows) for column in range(len(_COLUMNS))]
    for row in rows:
        print("  ".join(f"{cell:<{width}}" for cell, width in zip(row, widths, strict=True)).rstrip())


def _row(letter: Letter) -> tuple[str, ...]:
    whose = letter.user or letter.topic or letter.origin or ""
    stored = letter.stored[:19] + "Z"
    cells = (str(letter.sequence), stored, letter.plane, letter.reason, str(letter.attempts), whose, letter.detail)
    return tuple(map(flat, cells))


def _print_json(entry: dict[str, Any]) -> None:
    sys.stdout.buffer.write(orjson.dumps(entry, option=orjson.OPT_APPEND_NEWLINE))


async def _show(connection: Connection, args: argparse.Namespace, settings: Settings) -> int:
    """One dead letter: why and where it died, where it came from, and its original bytes."""
    from tidings.stream import letters

    letter = await letters.look(connection, args.id)
    if args.raw:
        sys.stdout.buffer.write(letter.body)
    elif args.json:
        _print_json(letter.describe())
    else:
        for name, value in letter.describe(body=False).items():
            if value is not None:
                print(f"{name:<9} {flat(str(value))}")
        print()
        for line in letter.body.decode(errors="backslashreplace").splitlines():
            print(flat(line))
    return 0


async def _replay(connection: Connection, args: argparse.Namespace, settings: Settings) -> int:
    """Publish dead letters once more, to their user or topic, and take each out when the log has confirmed it. Safe to
    repeat. What would come back at once is refused and kept. Exit status 1 when one was refused or is not there.
    """
    from tidings.schema import reader
    from tidings.stream import letters

    check = reader(settings)

    async def replay(sequence: int) -> dict[str, Any]:
        return (await letters.replay(connection, sequence, check=check))._asdict()

    return await _each(connection, args, replay, "replayed")


async def _drop(connection: Connection, args: argparse.Namespace, settings: Settings) -> int:
    """Delete dead letters, for good. Exit status 1 when one is not there."""
    from tidings.stream import letters

    async def drop(sequence: int) -> dict[str, Any]:
        await letters.drop(connection, sequence)
        return {}

    return await _each(connection, args, drop, "dropped")


async def _each(
    connection: Connection, args: argparse.Namespace, work: Callable[[int], Awaitable[dict[str, Any]]], done: str
) -> int:
    """Do it to each letter that is meant, and say how many it was done to."""
    from tidings.stream import letters

    ids: list[int] = list(dict.fromkeys(args.ids))
    more = False
    if not ids:
        # What is replayed and dies again is a new letter, behind those that are there now.
        async for letter in letters.each(connection, _filter(args)):
            if len(ids) == args.limit:
                more = True
                break
            ids.append(letter.sequence)
    count = refused = 0
    try:
        for sequence in ids:
            try:
                result = await work(sequence)
            except (NoSuchLetter, ReplayRefused) as error:
                refused += 1
                print(f"tidings: {flat(str(error))}", file=sys.stderr)
                continue
            count += 1
            if args.json:
                _print_json({"id": sequence, done: True, **result})
                # Whoever is stopped half-way has said what is done.
                sys.stdout.flush()
    finally:
        if not args.json:
            print(f"{count} {done}" + (f", {refused} not" if refused else ""))
    if more:
        print(f"there are more than {args.limit}: go on with the same command", file=sys.stderr)
    return 1 if refused else 0
