"""``tidings explain``: what became of one notification."""

from __future__ import annotations

import argparse
import sys
from dataclasses import replace
from datetime import UTC, datetime, timedelta
from typing import TYPE_CHECKING, Any, Final

import orjson

from tidings.runtime.logs import flat

from .common import Commands, add_nats, add_state, load_where, moment, run

if TYPE_CHECKING:
    from tidings.explain.story import InInbox, Looked, OnDevice, StoredAt, Story
    from tidings.runtime.settings import Settings

__all__ = ["register"]

_OF_USER: Final = timedelta(days=7)
_OF_ANYBODY: Final = timedelta(minutes=15)
_MOST: Final = 100_000


def register(commands: Commands[argparse.ArgumentParser], common: argparse.ArgumentParser) -> None:
    parser = commands.add_parser(
        "explain", parents=[common], help="what became of a notification", description=_explain.__doc__
    )
    parser.add_argument("--id", required=True, help="of the event, as its publisher knows it")
    whose = parser.add_mutually_exclusive_group()
    whose.add_argument("--user", help="whose: finds it at once, and says how far each device is")
    whose.add_argument("--topic", help="the topic that it was published to")
    parser.add_argument(
        "--since",
        metavar="WHEN",
        type=moment,
        help="not older than: 15m, 1h, 7d, or an RFC 3339 time (default: 7d with --user, else 15m)",
    )
    parser.add_argument(
        "--most",
        metavar="N",
        type=_count,
        default=_MOST,
        help=f"read at most so many messages and rows (default: {_MOST})",
    )
    parser.add_argument("--json", action="store_true", help="as one JSON object")
    add_nats(parser)
    add_state(parser, default=None)
    parser.set_defaults(run=_run)


def _count(text: str) -> int:
    if not text.isascii() or not text.isdigit() or not 0 < int(text) <= 1_000_000_000:
        raise argparse.ArgumentTypeError(f"{text!r} is no count: write a number from 1 to 1000000000")
    return int(text)


def _run(args: argparse.Namespace) -> int:
    story = run(_explain(load_where(args), args))
    if args.json:
        sys.stdout.buffer.write(orjson.dumps(story.describe(), option=orjson.OPT_APPEND_NEWLINE))
    else:
        print("\n".join(map(flat, _lines(story))))
    return 1 if story.verdict == "unknown" else 0


async def _explain(settings: Settings, args: argparse.Namespace) -> Story:
    """The life of one notification: where it is stored and since when, its copies, which devices have it, its dead
    letters. Exit status 1 when it is not found. Without --user everything since --since is read.
    """
    from tidings.explain.search import Search
    from tidings.store.factory import open_store_url
    from tidings.stream.connection import connect

    since = args.since or datetime.now(UTC) - (_OF_USER if args.user else _OF_ANYBODY)
    store = open_store_url(settings.store_url, retention_days=settings.retention_days)
    connection = await connect(settings, "tidings-explain")
    try:
        await store.open()
        search = Search(connection, store, args.id, since=since, most=args.most)
        return await (search.of_anybody(args.topic) if args.user is None else search.of_user(args.user))
    finally:
        await store.close()
        await connection.finish()


def _lines(story: Story) -> list[str]:
    whose = f" of {story.user}" if story.user is not None else ""
    lines = [f"{story.id}{whose}: {story.summary}"]
    lines += _section("published to a topic", [_stored(one) for one in story.topics])
    lines += _section("broadcast", [_stored(one) for one in story.broadcasts])
    more = story.copies - len(story.log)
    lines += _section("in the log", [*map(_stored, story.log), *([f"and {more} more users"] if more else [])])
    lines += _section("in the inbox", [_inbox(row) for row in story.inbox])
    lines += _section("devices", [f"{one.device}: {one.words}{_details(one)}" for one in story.devices])
    lines += _section("dead letters", [_letter(letter) for letter in story.dead])
    lines += _section("looked at", [_looked(look) for look in _together(story.looked)])
    return lines


def _together(looked: list[Looked]) -> list[Looked]:
    """All partitions in one line, where all were read."""
    from tidings.stream.topology import is_partition

    personal = [look for look in looked if is_partition(look.where)]
    if len(personal) < 2:
        return looked
    whole = replace(
        personal[0],
        where=f"all {len(personal)} partitions",
        messages=sum(look.messages for look in personal),
        complete=all(look.complete for look in personal),
    )
    return [*(look for look in looked if not is_partition(look.where)), whole]


def _looked(look: Looked) -> str:
    since = "" if look.since is None else f", since {look.since}"
    limit = "" if look.complete else ", and no further: narrow it with --user, --topic or --since, or raise --most"
    return f"{look.where}{since}: {look.messages} read{limit}"


def _section(title: str, rows: list[str]) -> list[str]:
    return [title, *(f"  {row}" for row in rows)] if rows else []


def _stored(one: StoredAt) -> str:
    told = [one.stored, f"{one.stream} {one.sequence}"]
    told += [
        f"{name} {value}" for name in ("pos", "user", "topic", "type") if (value := getattr(one, name)) is not None
    ]
    return "  ".join([*told, f"until {one.until}"] if one.until is not None else told)


def _inbox(row: InInbox) -> str:
    marks = [name for name in ("seen", "read", "archived") if getattr(row, name)]
    told = [row.stored, f"pos {row.pos}", " ".join(marks) or "unseen"]
    if row.delivered:
        told.append("first acknowledged {at} by {device}, attempt {attempts}".format(**row.delivered))
    return "  ".join(told)


def _details(one: OnDevice) -> str:
    told = [f"attempts {one.attempts}"] if one.attempts else []
    if one.session is not None:
        told.append(f"session {one.session} on gateway {one.gateway}")
    if one.consumer is not None:
        told.append("consumer at {delivered}, acknowledged to {ack_floor}".format(**one.consumer))
        told.append("{unacknowledged} of {window} under way, {redelivered} again".format(**one.consumer))
    return f" ({'; '.join(told)})" if told else ""


def _letter(letter: dict[str, Any]) -> str:
    told = [str(letter["id"]), letter["stored"], letter["reason"], letter["detail"]]
    told += [f"{name} {letter[name]}" for name in ("user", "topic", "device") if letter[name]]
    return "  ".join([*told, f"attempts {letter['attempts']}"])
