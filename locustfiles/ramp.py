"""Up to all users in a third of the time, all of them for a third, and down again. Goes with another locustfile."""

from __future__ import annotations

from tidings_load.shapes import Shape


class Ramp(Shape):
    def share(self, passed: float) -> float:
        return min(1.0, 3 * passed, 3 * (1 - passed))
