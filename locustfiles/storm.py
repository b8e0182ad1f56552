"""The everyday mix, and every ``--storm-every`` seconds all connections break at once."""

from __future__ import annotations

from tidings_load.run import register
from tidings_load.users import Devices, HttpService, NatsService, Weather

__all__ = ["Devices", "HttpService", "NatsService", "Weather"]

register()
