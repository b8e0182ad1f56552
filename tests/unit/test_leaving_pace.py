"""When devices that are sent away are to be back."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest

from tidings.gateway.leaving import Leaving


def pauses(count: int, drain_per_s: int, closed_per_s: float) -> list[tuple[float, float]]:
    """When each of so many devices is closed, and when it is to be back, in seconds from the first."""
    clock = SimpleNamespace(at=1000.0)
    hub: Any = SimpleNamespace(now=lambda: clock.at, settings=SimpleNamespace(drain_per_s=drain_per_s))
    nobody: Any = None
    leaving = Leaving(hub, nobody, nobody)
    leaving._begin(count)
    times = []
    for number in range(count):
        clock.at = 1000.0 + number / closed_per_s
        closed = clock.at - 1000
        times.append((closed, closed + leaving._come_back_ms() / 1000))
    return times


@pytest.mark.parametrize("closed_per_s", [250.0, 1000.0, 1e9])
def test_back_at_the_pace_however_fast_they_were_closed(closed_per_s: float) -> None:
    """Each is expected in its turn, `drain_per_s` a second, and up to a second later."""
    for number, (closed, back) in enumerate(pauses(2000, 250, closed_per_s)):
        due = max(closed, number / 250)
        assert due - 0.001 <= back <= due + 1.001


def test_closed_at_the_pace_nobody_is_away_for_long() -> None:
    """Who keeps the connection until the turn has come is away for half a second in the mean."""
    away = [back - closed for closed, back in pauses(5000, 250, 250.0)]
    assert max(away) <= 1.001
    assert 0.4 < sum(away) / len(away) < 0.6


def test_of_very_many_nobody_stays_away_for_long() -> None:
    """The last of a hundred thousand is expected after half a minute, too, and they are spread over it."""
    back = [back for _, back in pauses(100_000, 250, 1e9)]
    assert max(back) <= 31.001
    for second in range(1, 30):
        assert sum(second <= at < second + 1 for at in back) == pytest.approx(100_000 / 30, rel=0.1)
