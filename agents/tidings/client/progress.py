"""Up to where the application has everything, as far as this client can know it. No I/O."""

from __future__ import annotations

from collections import OrderedDict
from typing import Final

from tidings.wire.errors import BadPosition
from tidings.wire.position import Position

__all__ = ["Progress"]

_MOST: Final = 4096
"""Positions that wait behind one that is never settled; past it the progress stands still until the next connection."""


class Progress:
    """Follows one connection at a time: each begins at the gateway's cursor and goes on in the order of positions.

    While the gateway does not know the cursor (the store was down), what arrives may have a hole before it, and
    nothing is concluded from it.
    """

    def __init__(self, since: str | None = None) -> None:
        self._reached = _parsed(since)
        self._order: OrderedDict[Position, bool] = OrderedDict()
        """What came above `_reached`, in order, and whether it is settled."""
        self._exact = False

    @property
    def reached(self) -> str | None:
        """Everything up to this position is acknowledged; None while nothing is known."""
        return None if self._reached is None else str(self._reached)

    def begin(self, cursor: str | None) -> None:
        """A connection begins at `cursor`; what is not acknowledged will come again on it."""
        self._order.clear()
        position = _parsed(cursor)
        self._exact = position is not None
        self._raise(position)

    def suspend(self) -> None:
        """The gateway lost track: conclude nothing more from this connection."""
        self._exact = False
        self._order.clear()

    def received(self, text: str) -> None:
        """Something at this position is to be settled, now or later."""
        position = _parsed(text)
        if position is None or not self._exact or position in self._order:
            return
        if self._reached is not None and position <= self._reached:
            return
        self._order[position] = False
        if len(self._order) > _MOST:
            self.suspend()

    def settle(self, text: str) -> None:
        """The application is done with this position."""
        settled = _parsed(text)
        if settled is None or settled not in self._order:
            return
        self._order[settled] = True
        while self._order:
            first, is_settled = next(iter(self._order.items()))
            if not is_settled:
                break
            del self._order[first]
            self._raise(first)

    def settle_upto(self, upto: Position) -> None:
        """The application has everything up to this one, whatever this client saw of it."""
        for position in [position for position in self._order if position <= upto]:
            del self._order[position]
        self._raise(upto)

    def _raise(self, position: Position | None) -> None:
        if position is not None and (self._reached is None or position > self._reached):
            self._reached = position


def _parsed(text: str | None) -> Position | None:
    """None for a broadcast's: those have an order of their own, which the gateway keeps."""
    try:
        return None if text is None else Position.parse(text)
    except BadPosition:
        return None
