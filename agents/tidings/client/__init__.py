"""The client SDK: a device, in Python."""

from tidings.wire.errors import ConnectionLost, RequestRefused, SessionClosed

from .client import Client
from .models import InboxEntry, InboxPage, Notification

__all__ = ["Client", "ConnectionLost", "InboxEntry", "InboxPage", "Notification", "RequestRefused", "SessionClosed"]
