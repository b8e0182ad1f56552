"""How a connection ended, and what that means for the next one."""

from __future__ import annotations

import logging
import random
from typing import Final

from tidings.runtime.backoff import Backoff
from tidings.wire import codes
from tidings.wire.errors import SessionClosed

__all__ = ["Breach", "Ending"]

_JITTER: Final = 0.1


class Breach(Exception):
    """The gateway broke the protocol: its connection is of no use."""


class Ending:
    """Filled in while a connection lasts."""

    def __init__(self) -> None:
        self.welcomed = False
        self.code: int | None = None
        """Of the gateway's close frame."""
        self.after_s: float | None = None
        """The pause that the gateway asked for."""
        self.problem = ""
        """Why there was no close frame."""
        self.reason = ""
        """What the gateway said before it closed."""
        self._may_return = True

    def bye(self, reconnect: bool, after_ms: float) -> None:
        """The gateway is about to close."""
        self._may_return = bool(reconnect)
        self.after_s = max(0.0, after_ms / 1000)

    def pause(self, backoff: Backoff) -> float:
        """Seconds to wait: as long as the gateway asked for, and a little more at random; else as `backoff` says."""
        if self.after_s is None:
            return backoff.next()
        # A gateway that takes nobody in and asks for no pause must not be asked again at once, for ever.
        least = 0.0 if self.welcomed else random.uniform(0, backoff.first_s)
        return self.after_s * random.uniform(1, 1 + _JITTER) + least

    @property
    def for_good(self) -> bool:
        return not (self._may_return and codes.reconnects(self.code))

    @property
    def token_refused(self) -> bool:
        return self.code == codes.NOT_AUTHENTICATED.code

    @property
    def level(self) -> int:
        """Of the log: a gateway that says goodbye is no reason to worry."""
        return logging.WARNING if self.after_s is None else logging.INFO

    def error(self) -> SessionClosed:
        """What the application's loop raises when the connection ended for good."""
        known = codes.close_of(self.code or 0)
        name, meaning = (known.name, known.meaning) if known else ("unknown", "it wants no reconnect")
        return SessionClosed(self.code or 0, name, f"{meaning}: {self.reason}" if self.reason else meaning)

    def __str__(self) -> str:
        if self.code is None:
            return self.problem or "the connection broke"
        known = codes.close_of(self.code)
        name = f" {known.name}" if known else ""
        said = f": {self.reason}" if self.reason else ""
        return f"the gateway closed the connection ({self.code}{name}){said}"
