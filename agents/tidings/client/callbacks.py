"""The application's callbacks, called one at a time and away from the reader, so that they may ask the gateway."""

from __future__ import annotations

import asyncio
import inspect
import logging
from collections import deque
from collections.abc import Awaitable, Callable, Sequence
from typing import Final, Literal, NamedTuple

from tidings.wire.errors import ConnectionLost, RequestRefused
from tidings.wire.frames import MarkAs
from tidings.wire.position import Plane

__all__ = ["Callbacks", "CountCallback", "GapCallback", "Marked", "StateCallback"]

Marked = Sequence[str] | Literal["all"]
GapCallback = Callable[[int | None], Awaitable[None] | None]
CountCallback = Callable[[int], Awaitable[None] | None]
StateCallback = Callable[[Marked, MarkAs], Awaitable[None] | None]

_MOST_STATES: Final = 256

log = logging.getLogger("tidings.client")


class _Gap(NamedTuple):
    missed: int | None
    noted: Callable[[], None]


class Callbacks:
    """Holds the newest count, each plane's newest gap and the last 256 marks until their callback is free to take them.

    A callback that asks the gateway and gets no answer (`ConnectionLost`), or is told to ask later (`RequestRefused`
    with `retry`), is forgiven: a gap is then announced again on the next connection. Any other exception comes out
    of `run`.
    """

    def __init__(
        self, on_gap: GapCallback | None, on_count: CountCallback | None, on_state: StateCallback | None
    ) -> None:
        self._on_gap, self._on_count, self._on_state = on_gap, on_count, on_state
        self._gaps: dict[str | None, _Gap] = {}
        self._unread: int | None = None
        self._states: deque[tuple[Marked, MarkAs]] = deque()
        self._due = asyncio.Event()

    def gap(self, missed: int | None, plane: Plane | None, noted: Callable[[], None]) -> None:
        """More of a plane was missed than is pushed; `noted` is called when the application has taken note."""
        if self._on_gap is None:
            number = "an unknown number of" if missed is None else missed
            log.warning("%s notifications were missed and are not pushed: page the inbox", number)
            noted()
        else:
            self._gaps[plane] = _Gap(missed, noted)
            self._due.set()

    def count(self, unread: int) -> None:
        """The badge changed."""
        if self._on_count is not None:
            self._unread = unread
            self._due.set()

    def state(self, positions: Marked, as_: MarkAs) -> None:
        """Another device marked these."""
        if self._on_state is None:
            return
        if len(self._states) >= _MOST_STATES:
            # Like the marks that were made while this device was away: the inbox has them.
            log.warning("on_state is slower than marks come: the oldest is left out, page the inbox to see it")
            self._states.popleft()
        self._states.append((positions, as_))
        self._due.set()

    async def run(self) -> None:
        """Call what is due, for ever."""
        while True:
            await self._due.wait()
            self._due.clear()
            gaps, self._gaps = self._gaps, {}
            for gap in gaps.values():
                if await _tell(self._on_gap, gap.missed):
                    gap.noted()
            while self._states:
                await _tell(self._on_state, *self._states.popleft())
            unread, self._unread = self._unread, None
            if unread is not None:
                await _tell(self._on_count, unread)


async def _tell(callback: Callable[..., Awaitable[None] | None] | None, *arguments: object) -> bool:
    """Whether the callback did what it is for."""
    try:
        outcome = callback(*arguments) if callback is not None else None
        if inspect.isawaitable(outcome):
            await outcome
    except (ConnectionLost, RequestRefused) as error:
        if isinstance(error, RequestRefused) and not error.retry:
            raise
        log.warning("a callback could not finish: %s", error)
        return False
    return True
