"""Who is owed what: every notification that the log confirmed, against every device that must get it.

Pure: it is told what happened and when, and counts. A process has one for its own devices. Memory is bounded by what is
still owed, so that a soak of days costs no more than a run of minutes.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field, fields
from typing import Any, Final, Self

__all__ = ["Ledger", "Tally"]

_RECENT: Final = 256
"""A device's last ids, by which a copy is told: more than a window, less than the memory of thousands of devices."""
_EARLY_S: Final = 600.0
"""How long a receipt waits for the confirmation of its publisher, who gives up long before."""
_EXAMPLES: Final = 5


@dataclass(slots=True)
class Tally:
    """What a run comes to. Tallies of several processes are added up."""

    published: int = 0
    """Notifications that the log confirmed."""
    refused: int = 0
    """Those that it refused for good."""
    doubtful: int = 0
    """Those that nobody confirmed: they may come, and nobody is owed them."""
    owed: int = 0
    """Deliveries that are due: one for each device that had to get a published notification."""
    received: int = 0
    """Those of them that came, each counted once."""
    duplicates: int = 0
    """What came once more, which at-least-once allows."""
    misled: int = 0
    """What came to a device that it was not for."""
    examples: list[str] = field(default_factory=list)
    """Of what is missing, refused or misled."""

    @property
    def missing(self) -> int:
        return self.owed - self.received

    def problems(self) -> list[str]:
        """What makes the run a failure; empty for a good one. One in which nothing was to come proves nothing."""
        found = [
            f"{count} {what}"
            for count, what in (
                (self.missing, "deliveries missing"),
                (self.refused, "notifications refused"),
                (self.misled, "deliveries to somebody else"),
            )
            if count
        ]
        if not self.owed:
            found.append("nothing was published to a device")
        return found

    def add(self, other: Tally) -> None:
        for member in fields(self):
            setattr(self, member.name, getattr(self, member.name) + getattr(other, member.name))
        del self.examples[_EXAMPLES:]

    def note(self, example: str) -> None:
        if len(self.examples) < _EXAMPLES:
            self.examples.append(example)

    def packed(self) -> dict[str, Any]:
        """For a message to another process; `unpacked` is the way back."""
        return asdict(self)

    @classmethod
    def unpacked(cls, packed: dict[str, Any]) -> Self:
        return cls(**packed)


@dataclass(slots=True)
class _Device:
    """One device: what it was ever to get, what came last, and how much it is owed."""

    ever: set[str] = field(default_factory=set)
    recent: dict[str, None] = field(default_factory=dict)
    owed: int = 0


@dataclass(slots=True)
class _Early:
    """Receipts of what its publisher has no confirmation of yet."""

    at: float
    devices: set[str] = field(default_factory=set)


@dataclass(slots=True)
class _Open:
    """A notification that some devices are still owed."""

    since: float
    """When it was published."""
    devices: set[str]


class Ledger:
    """Times are seconds of one clock, which all who publish share.

    A destination is a user or a topic, as text that tells one from the other.
    """

    def __init__(self) -> None:
        self.tally = Tally()
        self._devices: dict[str, _Device] = {}
        self._followers: defaultdict[str, dict[str, float]] = defaultdict(dict)
        """By destination: its devices, and since when they are owed what goes there."""
        self._open: dict[str, _Open] = {}
        self._early: dict[str, _Early] = {}
        """In the order of their times."""

    def allow(self, device: str, destination: str) -> None:
        """The device may get what is published there, and is owed none of it yet: it is about to follow."""
        self._devices.setdefault(device, _Device()).ever.add(destination)

    def follow(self, device: str, destination: str, since: float) -> None:
        """From now on what is published there is owed to the device; a second time changes nothing."""
        self.allow(device, destination)
        self._followers[destination].setdefault(device, since)

    def unfollow(self, device: str, destination: str) -> None:
        """From now on it is not; what was owed is."""
        self._followers[destination].pop(device, None)

    def forget(self, device: str) -> None:
        """The device is gone for good; it must be owed nothing."""
        gone = self._devices.pop(device, _Device())
        for destination in gone.ever:
            self.unfollow(device, destination)
            if not self._followers[destination]:
                del self._followers[destination]

    def stored(self, id: str, destination: str, at: float, margin_s: float = 0.0) -> None:
        """The log has what was published at `at`, at the earliest.

        `margin_s` is how far the publisher's clock may be off: who began to follow within it may have it or not.
        """
        began = self._followers.get(destination, {})
        owed = {device for device, since in began.items() if since + margin_s <= at}
        came = self._early.pop(id).devices & owed if id in self._early else set()
        self.tally.owed += len(owed)
        self.tally.received += len(came)
        if left := owed - came:
            self._open[id] = _Open(at, left)
            for device in left:
                self._devices[device].owed += 1

    def received(self, id: str, destination: str, device: str, now: float) -> bool:
        """The device got it; False when it had it before."""
        known = self._devices[device]
        if destination not in known.ever:
            self.tally.misled += 1
            self.tally.note(f"{id} to {destination} came to {device}")
            return True
        if id in known.recent:
            self.tally.duplicates += 1
            return False
        known.recent[id] = None
        if len(known.recent) > _RECENT:
            del known.recent[next(iter(known.recent))]
        entry = self._open.get(id)
        if entry is None:
            self._expire(now)
            self._early.setdefault(id, _Early(now)).devices.add(device)
        elif device in entry.devices:
            entry.devices.remove(device)
            known.owed -= 1
            self.tally.received += 1
            if not entry.devices:
                del self._open[id]
        return True

    def _expire(self, now: float) -> None:
        while self._early:
            first = next(iter(self._early))
            if self._early[first].at + _EARLY_S > now:
                return
            del self._early[first]

    def owed(self, device: str) -> int:
        """How many notifications are still to come to it."""
        return self._devices[device].owed if device in self._devices else 0

    def is_settled(self) -> bool:
        return not self._open

    def overdue(self, before: float) -> Iterator[tuple[str, str]]:
        """What was published before a time and has not come, with the device that is owed it."""
        for id, entry in self._open.items():
            if entry.since < before:
                for device in entry.devices:
                    yield id, device

    def close(self) -> Tally:
        """The end: what has not come by now is missing."""
        for id, device in self.overdue(float("inf")):
            self.tally.note(f"{id} did not come to {device}")
        return self.tally
