"""When the tokens of sessions are over: by the second, so that looking costs little and who has gone leaves nothing."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from .session import Session

__all__ = ["Expiries"]


class Expiries:
    """The sessions of a gateway by the Unix second in which their token ends, the leeway of clocks included."""

    def __init__(self, leeway_s: float) -> None:
        self._leeway_s = leeway_s
        self._at: dict[int, set[Session]] = {}
        self._of: dict[Session, int] = {}
        self._looked_at = 0

    def add(self, session: Session, expires: int) -> None:
        """The session's token ends then; what was known of it before is forgotten."""
        self.discard(session)
        at = math.ceil(expires + self._leeway_s)
        self._of[session] = at
        self._at.setdefault(at, set()).add(session)

    def discard(self, session: Session) -> None:
        at = self._of.pop(session, None)
        if at is not None:
            others = self._at[at]
            others.discard(session)
            if not others:
                del self._at[at]

    def due(self, now: float) -> list[Session]:
        """Those whose token is over; each is told once."""
        if int(now) == self._looked_at:
            return []
        self._looked_at = int(now)
        over = [session for at, sessions in self._at.items() if at <= now for session in sessions]
        for session in over:
            self.discard(session)
        return over
