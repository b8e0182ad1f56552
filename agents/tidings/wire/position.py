"""Positions: where a notification stands among all of its user's notifications.

A position is the JetStream sequence of the user's partition, qualified by the
incarnation of the stream, so that a recreated stream never looks resumable. It
comes from the server that stored the message, never from a publisher's clock.
Clients treat the text as opaque and only echo it.

Text form: ``u<incarnation, hexadecimal>.<sequence, decimal>``. The leading
letter names the plane: ``u`` is the personal one, ``b`` that of broadcasts, whose
positions are those of their own stream. Positions of two planes do not compare.
"""

from __future__ import annotations

from typing import Final, Literal, NamedTuple

from .errors import BadPosition

__all__ = ["BROADCAST", "MAX_TEXT", "PERSONAL", "Place", "Plane", "Position", "parse", "plane_of"]

Plane = Literal["u", "b"]
PERSONAL: Final = "u"
BROADCAST: Final = "b"
_PLANES: Final[dict[str, Plane]] = {PERSONAL: PERSONAL, BROADCAST: BROADCAST}

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

    def text(self, plane: Plane) -> str:
        """As a client gets it."""
        return f"{plane}{self.incarnation:x}.{self.sequence}"

    @classmethod
    def parse(cls, text: object) -> Position:
        """Read the text of a position in the personal plane; raises `BadPosition` for anything else."""
        plane, found = parse(text)
        if plane != PERSONAL:
            raise BadPosition(f"{text} is the position of a broadcast: here it must be one of the user's own plane")
        return found


def parse(text: object) -> tuple[Plane, Position]:
    """Read a position's text; raises `BadPosition` for anything a mesh never wrote."""
    if isinstance(text, str) and 3 < len(text) <= MAX_TEXT and text.isascii() and text[0] in _PLANES:
        plane = _PLANES[text[0]]
        head, _, tail = text[1:].partition(".")
        # int() is lenient (signs, underscores, blanks): what does not come back as it was is no position.
        if tail.isdigit() and head.isalnum():
            try:
                found = Position(int(head, 16), int(tail))
            except ValueError:
                found = _NEVER
            in_range = found.incarnation <= _MAX_INCARNATION and found.sequence <= _MAX_SEQUENCE
            if in_range and found.text(plane) == text:
                return plane, found
    raise BadPosition("not a position of this mesh: echo the `pos` of a notification, unchanged")


def plane_of(text: str) -> Plane:
    """The plane of a position that a gateway sent; what is of none this version knows counts as personal."""
    return _PLANES.get(text[:1], PERSONAL)


class Place(NamedTuple):
    """A place in both planes at once, such as the end of a page of the inbox; None where nothing is said of one."""

    personal: Position | None
    broadcast: Position | None

    def __str__(self) -> str:
        sides = zip(_PLANES.values(), self, strict=True)
        return "~".join(at.text(plane) for plane, at in sides if at is not None)

    @classmethod
    def parse(cls, text: object) -> Place:
        """Read a place, or the position of a notification; raises `BadPosition`."""
        sides: dict[Plane, Position] = dict(map(parse, text.split("~", 1) if isinstance(text, str) else [text]))
        return cls(sides.get(PERSONAL), sides.get(BROADCAST))


_NEVER: Final = Position(-1, -1)
