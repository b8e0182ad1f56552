"""What a store gives away of a user, as JSON-ready objects, alike for all stores."""

from __future__ import annotations

import base64
from datetime import UTC, datetime
from typing import Any

import orjson

from tidings.wire.position import Position

from .port import Cursor, DeviceCursor, EndedSubscription, InboxItem, Subscription

__all__ = ["exported_cursor", "exported_ended", "exported_item", "exported_subscription", "exported_watermark"]


def exported_item(item: InboxItem) -> dict[str, Any]:
    """A notification with its marks; a body that is no JSON as base64."""
    body: dict[str, Any]
    try:
        body = {"notification": orjson.loads(item.body)}
    except orjson.JSONDecodeError:
        body = {"base64": base64.b64encode(item.body).decode()}
    delivered = item.delivered
    return {
        "kind": "notification",
        "pos": str(item.position),
        "stored": _time(item.stored_ns / 1e9),
        "seen": item.seen,
        "read": item.read,
        "archived": item.archived,
        "delivered": None
        if delivered is None
        else {"at": _time(delivered.at_ms / 1e3), "device": delivered.device, "attempts": delivered.attempts},
        **body,
    }


def exported_watermark(as_: str, upto: Position) -> dict[str, Any]:
    """All up to this position were marked at once."""
    return {"kind": "watermark", "as": as_, "upto": str(upto)}


def exported_cursor(known: DeviceCursor) -> dict[str, Any]:
    """A device and what it has acknowledged."""
    device, cursor, holder = known
    return {
        "kind": "cursor",
        "device": device,
        **_acknowledged(cursor),
        "broadcast": None if cursor.broadcast is None else _acknowledged(cursor.broadcast),
        "session": None if holder is None else holder.session,
    }


def _acknowledged(cursor: Cursor) -> dict[str, Any]:
    return {
        "floor": str(cursor.floor),
        "acked": [str(position) for position in sorted(cursor.acked)],
        "attempts": {str(position): count for position, count in sorted(cursor.attempts.items())},
    }


def exported_subscription(subscription: Subscription) -> dict[str, Any]:
    """A topic, or a subtree, that the user follows."""
    return {"kind": "subscription", "topic": subscription.topic, "since": str(subscription.since)}


def exported_ended(ended: EndedSubscription) -> dict[str, Any]:
    """A topic, or a subtree, that the user followed."""
    return {
        "kind": "ended_subscription",
        "topic": ended.topic,
        "since": str(ended.since),
        "until": str(ended.until),
    }


def _time(seconds: float) -> str:
    return datetime.fromtimestamp(seconds, UTC).isoformat(timespec="milliseconds").replace("+00:00", "Z")
