"""What a client hands to its application."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

__all__ = ["InboxEntry", "InboxPage", "Notification"]


@dataclass(frozen=True, slots=True)
class Notification:
    """One notification as it arrived. `raw` is the whole CloudEvent."""

    id: str
    type: str
    source: str
    data: Any
    time: str | None
    topic: str | None
    position: str
    """Opaque; later ones of the same user are later in the user's order."""
    attempt: int
    """1 at first; more when it was not acknowledged before."""
    raw: dict[str, Any]

    @classmethod
    def from_item(cls, item: dict[str, Any]) -> Notification:
        """Read an item of a notification frame; raises `KeyError` or `TypeError` for anything else."""
        event = item["n"]
        return cls(
            event["id"],
            event["type"],
            event["source"],
            event.get("data"),
            event.get("time"),
            event.get("topic"),
            item["pos"],
            item["try"],
            event,
        )


@dataclass(frozen=True, slots=True)
class InboxEntry:
    """A row of the inbox, with the user's marks."""

    notification: dict[str, Any]
    position: str
    seen: bool
    read: bool
    archived: bool
    delivered: dict[str, Any] | None
    """The first acknowledgement by any device: ``at`` (RFC 3339), ``device``, ``try``."""

    @classmethod
    def from_item(cls, item: dict[str, Any]) -> InboxEntry:
        """Read an item of the answer to ``inbox``."""
        return cls(item["n"], item["pos"], item["seen"], item["read"], item["archived"], item.get("delivered"))


@dataclass(frozen=True, slots=True)
class InboxPage:
    """`next` continues it, as the `before` or `after` of the following page; None at the end.

    A page may be short, or empty, and have a `next`: the gateway reads only so far at a time.
    """

    items: Sequence[InboxEntry]
    next: str | None
