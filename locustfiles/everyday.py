"""The everyday mix: devices that come and go, and services that publish to them and to topics over NATS and HTTP."""

from __future__ import annotations

from tidings_load.run import register
from tidings_load.users import Devices, HttpService, NatsService

__all__ = ["Devices", "HttpService", "NatsService"]

register()
