"""Waiting longer after each failure, at random, so that many who failed together do not return together."""

from __future__ import annotations

import random
from dataclasses import dataclass

__all__ = ["Backoff"]


@dataclass(slots=True)
class Backoff:
    """Full jitter: each delay is uniform between 0 and a limit that doubles from `first_s` to `most_s`.

    Source: Brooker, "Exponential Backoff And Jitter", AWS Architecture Blog, 2015.
    """

    first_s: float = 0.1
    most_s: float = 10.0
    failures: int = 0

    def next(self) -> float:
        """The delay after one more failure, in seconds."""
        limit = min(self.most_s, self.first_s * 2 ** min(self.failures, 30))
        self.failures += 1
        return random.uniform(0, limit)

    def reset(self) -> None:
        """A success: the next delay is short again."""
        self.failures = 0
