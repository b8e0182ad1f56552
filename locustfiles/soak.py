"""The everyday mix for hours or days, at its pace; what an online device waits a minute for is a failure at once."""

from __future__ import annotations

from typing import Any

from locust import events
from locust.argument_parser import LocustArgumentParser

from tidings_load.run import register
from tidings_load.users import Devices, HttpService, NatsService

__all__ = ["Devices", "HttpService", "NatsService"]

register()


@events.init_command_line_parser.add_listener
def _take_time(parser: LocustArgumentParser, **_: Any) -> None:
    parser.set_defaults(online=300.0, offline=120.0, overdue=60.0, rate=1.0)
