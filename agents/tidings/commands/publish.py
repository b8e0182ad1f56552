"""``tidings publish``: one notification to one user, or to a topic."""

from __future__ import annotations

import argparse
import os
from typing import TYPE_CHECKING, Any

import orjson

from tidings.dev.state import running
from tidings.wire.errors import InvalidNotification, StartFailed

from .common import DEFAULT_STATE, Commands, add_nats, add_state, load, run

if TYPE_CHECKING:
    from tidings.runtime.settings import Settings

__all__ = ["register"]


def register(commands: Commands[argparse.ArgumentParser], common: argparse.ArgumentParser) -> None:
    parser = commands.add_parser(
        "publish", parents=[common], help="publish a notification to a user or a topic", description=_publish.__doc__
    )
    to = parser.add_mutually_exclusive_group(required=True)
    to.add_argument("--user", help="whom it is for")
    to.add_argument("--topic", help="it is for everybody who follows this topic, such as post.42")
    parser.add_argument("--type", required=True, help="what happened, such as social.like")
    parser.add_argument("--data", metavar="JSON", help="what the device gets to show")
    parser.add_argument("--id", help="the same id is the same notification: use it to try again (default: a new one)")
    add_nats(parser)
    add_state(parser, default=None)
    parser.set_defaults(run=_publish)


def _publish(args: argparse.Namespace) -> int:
    """Publish a notification and wait until it is stored. Prints its id, its stream and its place in there."""
    data = None
    if args.data is not None:
        try:
            data = orjson.loads(args.data)
        except orjson.JSONDecodeError as error:
            raise InvalidNotification(f"--data is not JSON: {error}. Quote text, as in '\"hi\"'") from None
    return run(_send(load(args, **_where(args)), args, data))


def _where(args: argparse.Namespace) -> dict[str, str]:
    """Where NATS is: as told, else of the `tidings dev` that runs on --state, or here where nothing says another."""
    if args.nats is not None:
        return {"nats_url": args.nats}
    if args.state is None and (args.config is not None or "TIDINGS_NATS_URL" in os.environ):
        return {}
    mesh = running(args.state or DEFAULT_STATE)
    if mesh is None and args.state is not None:
        raise StartFailed(f"no `tidings dev` runs on {args.state}: start it, or leave --state out")
    return {} if mesh is None else {"nats_url": mesh.nats_url, "nats_ca": mesh.ca}


async def _send(settings: Settings, args: argparse.Namespace, data: Any) -> int:
    from tidings.publish.publisher import Publisher
    from tidings.schema import Schemas

    async with Publisher(settings, schemas=Schemas.checking(settings)) as publisher:
        event = {"type": args.type, "data": data, "id": args.id}
        if args.topic is None:
            published = await publisher.publish(args.user, **event)
        else:
            published = await publisher.publish_topic(args.topic, **event)
    again = " (it was there already)" if published.duplicate else ""
    print(f"{published.id} {published.stream} {published.seq}{again}")
    return 0
