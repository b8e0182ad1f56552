"""Publishing: the Python SDK for services that speak NATS."""

from tidings.schema import Schemas
from tidings.wire.errors import (
    BadSubject,
    InvalidNotification,
    PublishRefused,
    PublishUnconfirmed,
    SchemaViolation,
    StreamUnavailable,
)

from .attempt import Event, Ready, Receipt
from .publisher import Publisher

__all__ = [
    "BadSubject",
    "Event",
    "InvalidNotification",
    "PublishRefused",
    "PublishUnconfirmed",
    "Publisher",
    "Ready",
    "Receipt",
    "SchemaViolation",
    "Schemas",
    "StreamUnavailable",
]
