"""Token buckets and room, with a clock of their own."""

from __future__ import annotations

import contextlib

import pytest

from tidings.api.limits import Limiter, Policy, Room, header_fields
from tidings.api.problems import Refused


class Clock:
    def __init__(self) -> None:
        self.now = 1000.0

    def __call__(self) -> float:
        return self.now


def test_bucket_empties_and_fills() -> None:
    """A burst of the whole quota is allowed, then as much as flows in; what is refused takes nothing."""
    clock = Clock()
    limiter = Limiter(Policy("credential", 6, 60), clock)
    assert [limiter.take("a").remaining for _ in range(6)] == [5, 4, 3, 2, 1, 0]
    refused = limiter.take("a")
    assert (refused.allowed, refused.retry_s, refused.reset_s) == (False, 10, 60)
    clock.now += 9.5
    assert limiter.take("a").retry_s == 1
    clock.now += 0.5
    assert limiter.take("a").allowed
    assert not limiter.take("a").allowed
    clock.now += 10_000
    assert limiter.take("a").remaining == 5


def test_units() -> None:
    """Several units are taken together, or none of them."""
    limiter = Limiter(Policy("notifications", 100, 60), Clock())
    assert limiter.take("a", 60).allowed
    refused = limiter.take("a", 60)
    assert (refused.allowed, refused.remaining, refused.retry_s) == (False, 40, 12)
    assert limiter.take("a", 40).allowed


def test_buckets_are_each_ones_own_and_bounded() -> None:
    """Nobody uses up another's bucket, and however many there are, memory has an end."""
    limiter = Limiter(Policy("user", 1, 60), Clock(), most=3)
    assert limiter.take("a").allowed
    assert limiter.take("b").allowed
    assert not limiter.take("a").allowed
    for name in "cdefgh":
        assert limiter.take(name).allowed
    assert len(limiter) == 3
    assert not limiter.take("h").allowed


def test_header_fields() -> None:
    """Every limit that a request counted for is named, as draft-ietf-httpapi-ratelimit-headers writes it."""
    clock = Clock()
    verdicts = [
        Limiter(Policy("credential", 60, 60), clock).take("a"),
        Limiter(Policy("user", 10, 60), clock).take("a", 2),
    ]
    assert header_fields(verdicts) == {
        "RateLimit-Policy": '"credential";q=60;w=60, "user";q=10;w=60',
        "RateLimit": '"credential";r=59;t=1, "user";r=8;t=12',
    }
    assert header_fields([]) == {}


def test_room() -> None:
    """Room is held by whoever is in it, by key, and given back however that ends; nobody waits for it."""
    room = Room(3, "overloaded", "requests")
    with room.of("a", 2):
        with pytest.raises(Refused) as refused, room.of("a", 2):
            pytest.fail("there was no room")
        assert refused.value.headers["Retry-After"] == "1"
        with room.of("a"), room.of("b", 3):
            pass
    with pytest.raises(KeyError), room.of("a", 3):
        raise KeyError
    with room.of("a", 3):
        pass
    assert room._taken == {}


def test_room_of_nothing() -> None:
    """Who takes no units is let in always, and out again however those beside it come and go."""
    room = Room(1, "overloaded", "requests")
    with room.of():
        with room.of(units=0):
            pass
        with pytest.raises(Refused), room.of():
            pytest.fail("there was no room")
    with contextlib.ExitStack() as first, contextlib.ExitStack() as second:
        first.enter_context(room.of(units=0))
        second.enter_context(room.of(units=0))
        first.close()
        second.close()
    with contextlib.ExitStack() as long:
        long.enter_context(room.of(units=0))
        with room.of():
            pass
    assert room._taken == {}
