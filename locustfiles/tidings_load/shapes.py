"""What the shapes have in common: a share of ``--users`` at each moment of ``--run-time``."""

from __future__ import annotations

from abc import abstractmethod
from typing import Final

from locust import LoadTestShape

__all__ = ["Shape"]

_RUN_S: Final = 300.0
_USERS: Final = 100
_STEPS: Final = 20
_PER_S: Final = 100.0
"""As fast as Locust starts users without trouble: the shape says how fast, not --spawn-rate."""


class Shape(LoadTestShape):
    """`share` gives how many of the users there are, from 0 to 1, by how much of the time has passed, from 0 to 1."""

    abstract = True
    use_common_options = True

    @abstractmethod
    def share(self, passed: float) -> float: ...

    def tick(self) -> tuple[int, float] | None:
        assert self.runner is not None
        options = self.runner.environment.parsed_options
        assert options is not None
        passed = self.get_run_time() / (options.run_time or _RUN_S)
        if passed >= 1:
            return None
        most = options.num_users or _USERS
        # In steps: each change makes Locust dispatch its users anew.
        users = round(most * round(self.share(passed) * _STEPS) / _STEPS)
        return max(1, users), min(_PER_S, float(most))
