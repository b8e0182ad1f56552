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


@dataclass(frozen=True, slots=True)
class InboxPage:
    """Newest first; `next` is the `before` of the following page, None at the end."""

    items: Sequence[InboxEntry]
    next: str | None
