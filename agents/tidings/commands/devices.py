"""``tidings listen``: being a device."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable
from datetime import datetime
from typing import TYPE_CHECKING

import orjson

from tidings.runtime.logs import flat

from .common import Commands, add_state, load, run
from .tokens import DEFAULT_TTL_S, sign

if TYPE_CHECKING:
    from tidings.client import Notification

__all__ = ["register"]


def register(commands: Commands[argparse.ArgumentParser], common: argparse.ArgumentParser) -> None:
    listen = commands.add_parser(
        "listen", parents=[common], help="be a device: print what arrives", description=_listen.__doc__
    )
    listen.add_argument("--user", required=True, help="whose notifications")
    listen.add_argument("--device", help="a name of your own: what was missed under it comes first")
    listen.add_argument("--url", help="of the gateway (default: the mesh that runs on --state, or the settings)")
    listen.add_argument("--ca", metavar="FILE", help="what a wss gateway is checked against (default: as --url)")
    listen.add_argument("--token", help="the device token (default: one made with the key in --state)")
    listen.add_argument("--json", action="store_true", help="one JSON object a line")
    add_state(listen)
    listen.set_defaults(run=_listen)


def _listen(args: argparse.Namespace) -> int:
    """Connect as a device of a user, print each notification and acknowledge it, until Ctrl-C."""
    from tidings.dev.state import running
    from tidings.runtime.address import reachable
    from tidings.wire.subject import escape

    settings = load(args)
    escape(args.user)
    mesh = running(args.state) if args.url is None else None
    scheme = "wss" if settings.tls_certificate else "ws"
    url = args.url or (mesh.ws_url if mesh else f"{scheme}://{reachable(settings.host)}:{settings.port}/v1/ws")
    if args.token is None:
        sign(args, settings, DEFAULT_TTL_S)  # what is wrong with the key or the names is said before anything is tried
    # With the key at hand each connection gets a token of its own: none expires while this listens.
    ca = args.ca or (mesh.ca if mesh else None) or None
    return run(_print_all(args, url, ca, args.token or (lambda: sign(args, settings, DEFAULT_TTL_S))))


async def _print_all(args: argparse.Namespace, url: str, ca: str | None, token: str | Callable[[], str]) -> int:
    from tidings.client import Client

    show = _as_json if args.json else _as_text
    async with Client(url, token, device=args.device, ca=ca) as client:
        print(f"listening as {args.user} at {url}", file=sys.stderr, flush=True)
        async for notification in client:
            print(show(notification), flush=True)
    return 0


def _as_json(notification: Notification) -> str:
    item = {"pos": notification.position, "try": notification.attempt, "n": notification.raw}
    return orjson.dumps(item).decode()


def _as_text(notification: Notification) -> str:
    again = f" (attempt {notification.attempt})" if notification.attempt > 1 else ""
    data = orjson.dumps(notification.data).decode()
    return flat(f"{datetime.now():%H:%M:%S}  {notification.type}  {data}  [{notification.id}]{again}")
