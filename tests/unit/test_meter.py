"""The meter: what a user may send at once, in the long run, and after too much."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tidings.gateway.meter import Limits, Meter, Meters

LIMITS = Limits(frames_per_s=10, frames_burst=20, bytes_per_s=1000, bytes_burst=5000)


def test_a_burst() -> None:
    """As many as the burst at once, from the first moment on; one more is too early by its share of a second."""
    meter = Meter(LIMITS)
    assert [meter.frames(100.0) <= 0 for _ in range(21)] == [True] * 20 + [False]
    assert meter.owed_s(100.0) == pytest.approx(0.1)
    assert meter.bytes(100.0, 5000) <= 0
    assert meter.bytes(100.0, 100) == pytest.approx(0.1)


def test_a_burst_comes_back() -> None:
    """Who pauses for as long as the burst takes has all of it again, and no more than that however long the pause."""
    meter = Meter(LIMITS)
    meter.frames(0.0, 20)
    assert meter.frames(2.0, 20) <= 0
    assert meter.frames(1e6, 20) <= 0
    assert meter.frames(1e6, 1) > 0


def test_what_is_owed_is_bounded() -> None:
    """Whoever stops is let in again after half a minute, whatever was sent."""
    meter = Meter(LIMITS)
    assert meter.frames(0.0, 1e9) == pytest.approx(30)
    assert meter.owed_s(30.0) == 0
    assert meter.frames(30.5, 1) <= 0


@given(st.lists(st.tuples(st.floats(0, 5), st.integers(1, 40)), max_size=50))
def test_never_more_than_the_rate(sent: list[tuple[float, int]]) -> None:
    """Of whatever is sent no more is allowed than a burst and the rate since the beginning."""
    meter, now, allowed = Meter(LIMITS), 0.0, 0
    for pause, count in sent:
        now += pause
        if meter.frames(now, count) <= 0:
            allowed += count
    assert allowed <= 20 + 10 * now + 1e-6


def test_meters_of_users() -> None:
    """A user has one meter for as long as it matters; those who sent nothing for a while take no memory."""
    meters = Meters(LIMITS)
    meters.of("mallory", 0.0).frames(0.0, 1e9)
    assert meters.of("mallory", 1.0).owed_s(1.0) > 0
    for number in range(10_000):
        now = 1.0 + number / 1000
        meters.of(f"user-{number}", now).frames(now)
    assert len(meters) < 1000
    assert meters.of("mallory", 11.0).owed_s(11.0) > 0
