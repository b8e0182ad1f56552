"""What a client hands to its application."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Final

__all__ = ["Acknowledged", "InboxEntry", "InboxPage", "Notification"]

_REMEMBERED: Final = 2048


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


class Acknowledged:
    """The last 2,048 acknowledged ids: what comes again although it was acknowledged is a copy."""

    def __init__(self, most: int = _REMEMBERED) -> None:
        self._most = most
        self._ids: OrderedDict[str, None] = OrderedDict()

    def __contains__(self, id: str) -> bool:
        return id in self._ids

    def add(self, id: str) -> None:
        self._ids[id] = None
        self._ids.move_to_end(id)
        if len(self._ids) > self._most:
            self._ids.popitem(last=False)
