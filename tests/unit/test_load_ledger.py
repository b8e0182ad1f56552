"""The ledger of the load tests: what it takes for lost, for a copy, and for neither."""

from __future__ import annotations

import pytest

from tidings_load.ledger import Ledger, Tally

USER = "user/alice"
TOPIC = "topic/news"


@pytest.fixture
def ledger() -> Ledger:
    """Alice's phone follows herself since 10, and a topic since 20."""
    made = Ledger()
    made.follow("phone", USER, 10.0)
    made.follow("phone", TOPIC, 20.0)
    return made


def test_what_comes_settles_what_was_owed(ledger: Ledger) -> None:
    """A device is owed what was published since it was there, until it has it."""
    ledger.stored("n1", USER, 11.0)
    assert (ledger.owed("phone"), ledger.is_settled()) == (1, False)
    assert ledger.received("n1", USER, "phone", 12.0)
    assert (ledger.owed("phone"), ledger.is_settled()) == (0, True)
    assert ledger.close().problems() == []


def test_what_does_not_come_is_missing(ledger: Ledger) -> None:
    """It is a problem, and the verdict names an example."""
    ledger.stored("n1", USER, 11.0)
    ledger.stored("n2", USER, 11.0)
    ledger.received("n2", USER, "phone", 12.0)
    tally = ledger.close()
    assert tally.problems() == ["1 deliveries missing"]
    assert tally.examples == ["n1 did not come to phone"]


def test_a_receipt_may_be_faster_than_the_publishers_confirmation(ledger: Ledger) -> None:
    """It counts when the confirmation comes, and once."""
    ledger.received("n1", USER, "phone", 11.5)
    ledger.stored("n1", USER, 11.0)
    assert (ledger.tally.owed, ledger.tally.received, ledger.is_settled()) == (1, 1, True)


def test_a_copy_is_counted_and_allowed(ledger: Ledger) -> None:
    """At least once: a second one is neither a delivery nor a problem."""
    ledger.stored("n1", USER, 11.0)
    assert ledger.received("n1", USER, "phone", 12.0)
    assert not ledger.received("n1", USER, "phone", 13.0)
    assert (ledger.tally.received, ledger.tally.duplicates, ledger.close().problems()) == (1, 1, [])


def test_what_was_published_before_it_followed_is_not_owed(ledger: Ledger) -> None:
    """Nor is what another machine's clock may have put too late; it may come all the same."""
    ledger.stored("n1", TOPIC, 19.0)
    ledger.stored("n2", TOPIC, 20.5, margin_s=1.0)
    ledger.received("n2", TOPIC, "phone", 21.0)
    assert (ledger.tally.owed, ledger.tally.received, ledger.tally.misled) == (0, 0, 0)
    ledger.stored("n3", TOPIC, 21.0, margin_s=1.0)
    assert ledger.owed("phone") == 1


def test_what_comes_before_the_answer_to_a_subscription_is_no_mistake(ledger: Ledger) -> None:
    """It is in force before the device knows; until then nothing is owed."""
    ledger.allow("phone", "topic/sport")
    ledger.stored("n1", "topic/sport", 21.0)
    ledger.received("n1", "topic/sport", "phone", 22.0)
    assert (ledger.tally.owed, ledger.tally.misled) == (0, 0)


def test_who_unfollows_may_still_get_it(ledger: Ledger) -> None:
    """What was owed stays owed; what is published later may come or not."""
    ledger.stored("n1", TOPIC, 21.0)
    ledger.unfollow("phone", TOPIC)
    ledger.stored("n2", TOPIC, 22.0)
    assert ledger.owed("phone") == 1
    ledger.received("n2", TOPIC, "phone", 23.0)
    assert ledger.tally.misled == 0


def test_what_was_for_somebody_else_is_a_problem(ledger: Ledger) -> None:
    """A notification of a destination that the device never had."""
    ledger.received("n1", "user/bob", "phone", 12.0)
    ledger.stored("n2", USER, 12.0)
    ledger.received("n2", USER, "phone", 12.0)
    assert ledger.close().problems() == ["1 deliveries to somebody else"]


def test_a_forgotten_device_is_owed_nothing(ledger: Ledger) -> None:
    """What is published to where it was is nobody's."""
    ledger.forget("phone")
    ledger.stored("n1", USER, 12.0)
    assert ledger.is_settled()


def test_what_is_late_is_told_before_the_end(ledger: Ledger) -> None:
    """What was published before a moment and has not come."""
    ledger.stored("n1", USER, 11.0)
    ledger.stored("n2", USER, 15.0)
    assert list(ledger.overdue(15.0)) == [("n1", "phone")]


def test_a_run_in_which_nothing_was_to_come_is_no_good_one() -> None:
    """A load test that published nothing has shown nothing."""
    assert Tally().problems() == ["nothing was published to a device"]


def test_tallies_of_processes_are_added_up() -> None:
    """A worker's loss is the run's, refusals too, through a message and back."""
    total = Tally(owed=3, received=3, published=3)
    other = Tally(owed=2, received=1, refused=1, examples=["n1 did not come to phone"])
    total.add(Tally.unpacked(other.packed()))
    assert (total.owed, total.received, total.published) == (5, 4, 3)
    assert total.problems() == ["1 deliveries missing", "1 notifications refused"]
    assert total.examples == other.examples
