"""Limits: token buckets by whoever is limited, and how much is under way.

Source: token bucket, RFC 2697 section 3; the header fields, draft-ietf-httpapi-ratelimit-headers-10. A bucket holds at
most its quota and fills at quota / window. Limits are those of one process: several api agents add up.
"""

from __future__ import annotations

import math
from collections import OrderedDict
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Final, NamedTuple

from .problems import Refused

__all__ = ["Limiter", "Policy", "Room", "Verdict", "header_fields"]

MAX_BUCKETS: Final = 100_000
"""Of one limiter: some 20 MB. The one that was used longest ago is forgotten, and is full when it comes back."""


class Policy(NamedTuple):
    """So many units in so many seconds."""

    name: str
    quota: int
    window_s: int


class Verdict(NamedTuple):
    """What a bucket says after it was asked."""

    policy: Policy
    allowed: bool
    remaining: int
    reset_s: int
    """Until the bucket is full again."""
    retry_s: int
    """Until it holds what was asked for; 0 where that was taken."""


class _Bucket:
    __slots__ = ("at", "held")

    def __init__(self, held: float, at: float) -> None:
        self.held = held
        self.at = at


class Limiter:
    """Buckets of one policy, by key. `clock` gives seconds that never go back."""

    def __init__(self, policy: Policy, clock: Callable[[], float], *, most: int = MAX_BUCKETS) -> None:
        self._policy = policy
        self._clock = clock
        self._most = most
        self._buckets: OrderedDict[str, _Bucket] = OrderedDict()

    def __len__(self) -> int:
        return len(self._buckets)

    def take(self, key: str, units: int = 1) -> Verdict:
        """Take units out of a bucket, or none of them where it does not hold as many."""
        quota, now = self._policy.quota, self._clock()
        rate = quota / self._policy.window_s
        bucket = self._buckets.get(key)
        if bucket is None:
            bucket = self._buckets[key] = _Bucket(quota, now)
            if len(self._buckets) > self._most:
                self._buckets.popitem(last=False)
        else:
            self._buckets.move_to_end(key)
        held = min(quota, bucket.held + (now - bucket.at) * rate)
        allowed = held >= units
        bucket.held, bucket.at = held - units if allowed else held, now
        reset_s = math.ceil((quota - bucket.held) / rate)
        retry_s = 0 if allowed else max(1, math.ceil((units - held) / rate))
        return Verdict(self._policy, allowed, int(bucket.held), reset_s, retry_s)


def header_fields(verdicts: list[Verdict]) -> dict[str, str]:
    """``RateLimit-Policy`` and ``RateLimit``, for an answer."""
    if not verdicts:
        return {}
    policies = ", ".join(f'"{v.policy.name}";q={v.policy.quota};w={v.policy.window_s}' for v in verdicts)
    limits = ", ".join(f'"{v.policy.name}";r={v.remaining};t={v.reset_s}' for v in verdicts)
    return {"RateLimit-Policy": policies, "RateLimit": limits}


class Room:
    """How much is under way, by key. Who finds no room is refused at once: nothing waits in a queue."""

    def __init__(self, most: int, code: str, what: str) -> None:
        self._most = most
        self._code = code
        self._what = what
        self._taken: dict[str, int] = {}

    @contextmanager
    def of(self, key: str = "", units: int = 1) -> Iterator[None]:
        """Hold room for as long as something is under way; raises `Refused`."""
        taken = self._taken.get(key, 0)
        if taken + units > self._most:
            raise Refused(self._code, f"{taken} {self._what} are under way here, of at most {self._most}", retry_s=1)
        self._taken[key] = taken + units
        try:
            yield
        finally:
            # Whoever took no units may find that the last one of those who did took the entry along.
            left = self._taken.pop(key, 0) - units
            if left:
                self._taken[key] = left
