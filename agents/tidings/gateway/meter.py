"""What a client may send, and how much of that it has sent.

Each limit is the generic cell rate algorithm (ITU-T I.371, the leaky bucket as a meter): one number, the time at which
all that was sent would be paid for at the allowed rate. It needs no timer, and nothing that fills up again.

A meter belongs to a user and not to a connection, which costs nothing to make anew.
"""

from __future__ import annotations

from typing import Final

__all__ = ["CONNECT_FRAMES", "GRACE_S", "Limits", "Meter", "Meters"]

CONNECT_FRAMES: Final = 10
"""A connection costs the gateway and the log about as much as so many frames."""
GRACE_S: Final = 2.0
"""How far beyond the burst requests are refused, each with its answer, before the connection is closed."""
_MOST_OWED_S: Final = 30.0
"""Nobody owes more, however much was sent: whoever stops is let in again after so long."""
_FEW: Final = 256


class Limits:
    """Of one user's devices on one gateway: so many a second in the long run, and so many at once."""

    __slots__ = ("burst_of_bytes_s", "burst_of_frames_s", "byte_s", "frame_s")

    def __init__(self, frames_per_s: float, frames_burst: int, bytes_per_s: float, bytes_burst: int) -> None:
        self.frame_s = 1 / frames_per_s
        self.burst_of_frames_s = frames_burst / frames_per_s
        self.byte_s = 1 / bytes_per_s
        self.burst_of_bytes_s = bytes_burst / bytes_per_s


class Meter:
    """How much of its limits a user has used. Times are seconds of a clock that never goes back."""

    __slots__ = ("_bytes_paid", "_frames_paid", "_limits")

    def __init__(self, limits: Limits) -> None:
        self._limits = limits
        self._frames_paid = self._bytes_paid = 0.0

    def frames(self, now: float, count: float = 1) -> float:
        """Frames were sent; returns by how many seconds they are too early, which is at most 0 within the burst."""
        limits, paid = self._limits, self._frames_paid
        owed = (paid if paid > now else now) + count * limits.frame_s - now - limits.burst_of_frames_s
        if owed > _MOST_OWED_S:
            owed = _MOST_OWED_S
        self._frames_paid = now + limits.burst_of_frames_s + owed
        return owed

    def bytes(self, now: float, size: int) -> float:
        """The same of bytes."""
        limits, paid = self._limits, self._bytes_paid
        owed = (paid if paid > now else now) + size * limits.byte_s - now - limits.burst_of_bytes_s
        if owed > _MOST_OWED_S:
            owed = _MOST_OWED_S
        self._bytes_paid = now + limits.burst_of_bytes_s + owed
        return owed

    def owed_s(self, now: float) -> float:
        """How long to wait until something more may be sent."""
        limits = self._limits
        frames = self._frames_paid - now - limits.burst_of_frames_s
        return max(0.0, frames, self._bytes_paid - now - limits.burst_of_bytes_s)

    def is_unused(self, now: float) -> bool:
        """Nothing is remembered that a new meter would not have."""
        return self._frames_paid <= now and self._bytes_paid <= now


class Meters:
    """The meters of users who are here or were a moment ago."""

    def __init__(self, limits: Limits) -> None:
        self.limits = limits
        self._by_user: dict[str, Meter] = {}
        self._sweep_at = _FEW

    def of(self, user: str, now: float) -> Meter:
        """The user's meter. Who is forgotten has sent nothing for as long as a burst takes."""
        meter = self._by_user.get(user)
        if meter is None:
            if len(self._by_user) >= self._sweep_at:
                self._by_user = {name: one for name, one in self._by_user.items() if not one.is_unused(now)}
                self._sweep_at = max(_FEW, 2 * len(self._by_user))
            meter = self._by_user[user] = Meter(self.limits)
        return meter

    def __len__(self) -> int:
        return len(self._by_user)
