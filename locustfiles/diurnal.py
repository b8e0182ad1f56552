"""One day in the time of the run: a tenth of the users at night, all of them at noon. Goes with another locustfile."""

from __future__ import annotations

import math

from tidings_load.shapes import Shape


class Diurnal(Shape):
    def share(self, passed: float) -> float:
        return 0.55 - 0.45 * math.cos(2 * math.pi * passed)
