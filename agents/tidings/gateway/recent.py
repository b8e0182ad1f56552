"""The gateway's short memory of ids: a publisher that retried past JetStream's window is one notification."""

from __future__ import annotations

from typing import Final

from tidings.wire.position import Position

__all__ = ["RecentIds"]

_GENERATION: Final = 8192


class RecentIds:
    """Remembers the last 8,192 to 16,384 notifications that the gateway's sessions got, in two generations.

    One memory for all sessions, because most sessions are idle: 4 MB a gateway instead of 1 KB a device.
    """

    def __init__(self, generation: int = _GENERATION) -> None:
        self._generation = generation
        self._young: dict[tuple[str, str], Position] = {}
        self._old: dict[tuple[str, str], Position] = {}

    def is_copy(self, session: str, id: str, position: Position) -> bool:
        """Whether the session had this id at another position; remembers it otherwise."""
        key = (session, id)
        known = self._young.get(key) or self._old.get(key)
        if known is not None:
            return known != position
        if len(self._young) >= self._generation:
            self._old, self._young = self._young, {}
        self._young[key] = position
        return False

    def forget(self, session: str, id: str) -> None:
        """The session was never rid of this one, and is to get it when it comes again, as a replayed dead letter."""
        self._young.pop((session, id), None)
        self._old.pop((session, id), None)
