"""What the client remembers of its notifications, without a connection: queue, copies, progress, bounds."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from support.fake_gateway import at, item
from tidings.client.deliveries import Arrival, Deliveries
from tidings.client.models import Notification
from tidings.client.progress import Progress
from tidings.wire.position import Position


def notification(number: int, *, id: str | None = None) -> Notification:
    return Notification.from_item(item(number, id=id))


def begun(window: int = 64, **options: int) -> Deliveries:
    deliveries = Deliveries(**options)
    deliveries.begin(window, at(0))
    return deliveries


def test_a_copy_of_what_waits_is_not_queued_twice() -> None:
    """Neither a second attempt, nor a repeated publish, nor a new connection adds to the queue."""
    deliveries = begun()
    assert deliveries.arrived(notification(1)) is Arrival.NEW
    assert deliveries.arrived(notification(1)) is Arrival.HELD
    assert deliveries.arrived(notification(5, id="n1")) is Arrival.HELD
    deliveries.begin(64, at(0))
    assert deliveries.arrived(notification(1)) is Arrival.HELD
    assert len(deliveries) == 1
    taken = deliveries.take(held=True)
    assert taken is not None
    assert deliveries.acknowledge(taken) == [at(1), at(5)]
    assert deliveries.arrived(notification(6, id="n1")) is Arrival.DONE
    assert deliveries.progress.reached == at(6)
    assert deliveries.acknowledge(taken) == []


def test_memory_of_acknowledged_ids_is_bounded() -> None:
    """The oldest id is forgotten first; its copy is then delivered."""
    deliveries = begun(remembered=3)
    for number in range(1, 5):
        deliveries.arrived(notification(number))
        taken = deliveries.take(held=True)
        assert taken is not None
        deliveries.acknowledge(taken)
    assert deliveries.arrived(notification(4)) is Arrival.DONE
    assert deliveries.arrived(notification(1)) is Arrival.NEW


def test_memory_of_what_is_never_acknowledged_is_bounded() -> None:
    """An application that takes and never acknowledges costs a bounded number of entries."""
    deliveries = begun(window=2, remembered=8)
    for number in range(1, 100):
        assert deliveries.arrived(notification(number)) is Arrival.NEW
        deliveries.take(held=False)
    assert len(deliveries._open) == 8 + 4 * 2
    assert deliveries.arrived(notification(99)) is Arrival.NEW


def test_the_queue_is_bounded_by_the_largest_window() -> None:
    """Twice the window of each plane fits, though a later connection has a smaller one."""
    deliveries = begun(window=2)
    deliveries.begin(1, at(0))
    arrivals = [deliveries.arrived(notification(number)) for number in range(1, 11)]
    assert arrivals == [Arrival.NEW] * 8 + [Arrival.OVERFLOW] * 2


@pytest.mark.parametrize("held", [True, False])
def test_release_is_for_what_a_handler_holds(held: bool) -> None:
    """What the application took to acknowledge by itself is not given up by a loop that ends."""
    deliveries = begun()
    deliveries.arrived(notification(1))
    taken = deliveries.take(held=held)
    assert taken is not None
    deliveries.release(taken)
    deliveries.begin(64, at(0))
    assert deliveries.arrived(notification(1)) is (Arrival.NEW if held else Arrival.HELD)


@given(
    st.lists(
        st.one_of(
            st.tuples(st.just("push"), st.integers(1, 3)),
            st.tuples(st.sampled_from(["take", "ack", "fail", "redeliver", "reconnect"]), st.integers(0, 9)),
        ),
        max_size=60,
    )
)
def test_nothing_is_lost_and_nothing_is_handled_twice_at_a_time(steps: list[tuple[str, int]]) -> None:
    """Against a gateway that repeats what is unacknowledged: all is handled in the end, never by two at a time."""
    deliveries, owed, sent = begun(window=1000), {}, 0
    at_work: list[Notification] = []
    handled: set[str] = set()

    def arrive(one: Notification) -> None:
        if deliveries.arrived(one) is Arrival.DONE:
            assert one.id in handled
            owed.pop(one.position)

    def take() -> None:
        taken = deliveries.take(held=True)
        if taken is not None:
            assert taken.id not in handled | {other.id for other in at_work}
            at_work.append(taken)

    def acknowledge(one: Notification) -> None:
        handled.add(one.id)
        for position in deliveries.acknowledge(one):
            owed.pop(position, None)

    for step, number in [*steps, ("reconnect", 0)]:
        if step == "push":
            for _ in range(number):
                sent += 1
                # Every third is a repeated publish of the one before.
                one = notification(sent, id=f"n{sent - 1}" if sent % 3 == 0 else None)
                owed[one.position] = one
                arrive(one)
        elif step == "take":
            take()
        elif step in ("ack", "fail") and at_work:
            one = at_work.pop(number % len(at_work))
            acknowledge(one) if step == "ack" else deliveries.release(one)
        elif step in ("redeliver", "reconnect"):
            if step == "reconnect":
                deliveries.begin(1000, at(0))
            for one in list(owed.values()):
                arrive(one)
    while at_work or len(deliveries):
        take()
        acknowledge(at_work.pop())
    assert owed == {}


@given(st.permutations(range(1, 12)), st.integers(0, 11))
def test_progress_never_passes_what_is_open(order: list[int], count: int) -> None:
    """Whatever the order of the acks: everything up to `reached` is settled, and as much as can be said is said."""
    progress = Progress()
    progress.begin(at(0))
    for number in range(1, 12):
        progress.received(at(number))
    settled = set(order[:count])
    for number in order[:count]:
        progress.settle(at(number))
    lowest = min(set(range(1, 13)) - settled)
    assert progress.reached == at(lowest - 1)


def test_progress_over_connections() -> None:
    """A new connection goes on from the gateway's cursor, and never back."""
    progress = Progress(at(3))
    progress.begin(at(5))
    progress.received(at(7))
    progress.received(at(9))
    progress.settle(at(9))
    assert progress.reached == at(5)
    progress.begin(at(1))
    progress.received(at(2))
    progress.settle(at(2))
    assert progress.reached == at(5)
    progress.settle_upto(Position(1, 20))
    assert progress.reached == at(20)


def test_progress_is_bounded() -> None:
    """Behind one that is never settled it stands still, and costs no more."""
    progress = Progress()
    progress.begin(at(0))
    for number in range(1, 10_000):
        progress.received(at(number))
        if number > 1:
            progress.settle(at(number))
    assert progress.reached == at(0)
    assert not progress._order
    progress.received("another-plane")
    progress.settle("another-plane")
