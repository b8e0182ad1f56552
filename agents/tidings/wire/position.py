"""Positions: where a notification stands among all of its user's notifications.

A position is the JetStream sequence of the user's partition, qualified by the
incarnation of the stream, so that a recreated stream never looks resumable. It
comes from the server that stored the message, never from a publisher's clock.
Clients treat the text as opaque and only echo it.

Text form: ``u<incarnation, hexadecimal>.<sequence, decimal>``. The leading
letter names the plane: ``u`` is the personal one.
"""

from __future__ import annotations

from typing import Final, NamedTuple

from .errors import BadPosition

__all__ = ["MAX_TEXT", "Position"]

MAX_TEXT: Final = 40
"""Longest text of a position, in characters."""

_MAX_INCARNATION: Final = 2**48 - 1
_MAX_SEQUENCE: Final = 2**63 - 1


class Position(NamedTuple):
    """A place in a user's order; compares as (incarnation, sequence)."""

    incarnation: int
    """Of the stream: Unix milliseconds at its creation, made to grow with each recreation."""
    sequence: int
    """In the stream of the user's partition, from 1; 0 is before everything."""

    def __str__(self) -> str:
        return f"u{self.incarnation:x}.{self.sequence}"

    @classmethod
    def parse(cls, text: object) -> Position:
        """Read a position's text; raises `BadPosition` for anything a mesh never wrote."""
        if isinstance(text, str) and 3 < len(text) <= MAX_TEXT and text[0] == "u" and text.isascii():
            head, _, tail = text[1:].partition(".")
            # int() is lenient (signs, underscores, blanks): what does not come back as it was is no position.
            if tail.isdigit() and head.isalnum():
                try:
                    found = cls(int(head, 16), int(tail))
                except ValueError:
                    found = _NEVER
                in_range = found.incarnation <= _MAX_INCARNATION and found.sequence <= _MAX_SEQUENCE
                if in_range and str(found) == text:
                    return found
        raise BadPosition("not a position of this mesh: echo the `pos` of a notification, unchanged")


_NEVER: Final = Position(-1, -1)
