"""``tidings gateway``, ``inbox``, ``fanout`` and ``api``: one agent as a process of its own."""

from __future__ import annotations

import argparse
from collections.abc import Callable
from typing import TYPE_CHECKING

from .common import Commands, load, run, serve

if TYPE_CHECKING:
    from tidings.runtime.service import Service
    from tidings.runtime.settings import Settings

__all__ = ["register"]


def register(commands: Commands[argparse.ArgumentParser], common: argparse.ArgumentParser) -> None:
    gateway = commands.add_parser(
        "gateway", parents=[common], help="run one gateway: devices connect to it", description=_gateway.__doc__
    )
    gateway.add_argument("--host", help="address to listen on (default: the setting host)")
    gateway.add_argument("--port", type=int, help="port to listen on, 0 for any (default: the setting port)")
    gateway.set_defaults(run=_gateway)
    inbox = commands.add_parser(
        "inbox", parents=[common], help="run one inbox agent: it stores notifications", description=_inbox.__doc__
    )
    inbox.set_defaults(run=_inbox)
    fanout = commands.add_parser(
        "fanout", parents=[common], help="run one fan-out agent: it serves topics", description=_fanout.__doc__
    )
    fanout.set_defaults(run=_fanout)
    api = commands.add_parser(
        "api",
        parents=[common],
        help="run one HTTP api agent: services and web clients use it",
        description=_api.__doc__,
    )
    api.add_argument("--host", help="address to listen on (default: the setting api_host)")
    api.add_argument("--port", type=int, help="port to listen on, 0 for any (default: the setting api_port)")
    api.set_defaults(run=_api)


def _gateway(args: argparse.Namespace) -> int:
    """A gateway, configured by the environment (TIDINGS_…) or --config, until SIGINT or SIGTERM."""
    from tidings.gateway.agent import Gateway

    return run(_agent("gateway", load(args, host=args.host, port=args.port), Gateway))


def _inbox(args: argparse.Namespace) -> int:
    """An inbox agent, configured by the environment (TIDINGS_…) or --config, until SIGINT or SIGTERM."""
    from tidings.inbox.agent import InboxAgent

    return run(_agent("inbox", load(args), InboxAgent))


def _fanout(args: argparse.Namespace) -> int:
    """A fan-out agent, configured by the environment (TIDINGS_…) or --config, until SIGINT or SIGTERM."""
    from tidings.fanout.agent import FanoutAgent

    return run(_agent("fanout", load(args), FanoutAgent))


def _api(args: argparse.Namespace) -> int:
    """An HTTP api agent, configured by the environment (TIDINGS_…) or --config, until SIGINT or SIGTERM."""
    from tidings.api.agent import Api

    return run(_agent("api", load(args, api_host=args.host, api_port=args.port), Api))


async def _agent(name: str, settings: Settings, make: Callable[..., Service]) -> int:
    from tidings.runtime.exposure import check_exposures
    from tidings.store.factory import open_store_url
    from tidings.telemetry import telemetry_of

    check_exposures(settings, name)
    store = open_store_url(settings.store_url, retention_days=settings.retention_days)
    telemetry = telemetry_of(settings, name)
    agent = make(settings, store, telemetry=telemetry)
    try:
        await store.open()
        if telemetry is not None:
            await telemetry.start()
        return await serve(agent)
    finally:
        if telemetry is not None:
            await telemetry.stop()
        await store.close()
