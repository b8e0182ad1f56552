"""A fifth of the users, and all of them at once for the middle fifth of the time. Goes with another locustfile."""

from __future__ import annotations

from tidings_load.shapes import Shape


class Spike(Shape):
    def share(self, passed: float) -> float:
        return 1.0 if 0.4 <= passed < 0.6 else 0.2
