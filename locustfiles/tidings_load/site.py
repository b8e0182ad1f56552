"""What one Locust process has of a run: its devices, its publisher, its ledger. It checks its own devices only."""

from __future__ import annotations

import itertools
import random
import secrets
import time
from collections.abc import Callable, Collection
from typing import Any, Final

import gevent
from gevent.pool import Group, Pool
from locust.env import Environment

from .device import Device
from .ledger import Ledger, Tally
from .mesh import Mesh
from .nats import NatsPublisher, Outcome

__all__ = ["Lost", "Site", "site_of"]

_LOOK_S: Final = 0.1
_DRAIN_S: Final = 10.0
_CLOSING: Final = 200
_PUBLISH_S: Final = 40.0
"""Longer than a publisher tries."""
_SITES: Final[dict[int, Site]] = {}


class Lost(Exception):
    """A promise that the mesh did not keep; Locust shows it among the failures."""


def site_of(environment: Environment) -> Site:
    """The run that is under way in this process."""
    return _SITES[id(environment)]


class Site:
    """From the start of a test to its end. `stored` is told what was published to a topic, for the other processes."""

    def __init__(self, environment: Environment, mesh: Mesh, stored: Callable[[str, str, float, str], None]) -> None:
        options = environment.parsed_options
        assert options is not None
        _SITES[id(environment)] = self
        self.environment = environment
        self.options = options
        self.mesh = mesh
        self.name = secrets.token_hex(4)
        """Of this process in this run: its users and its notifications are told from others' by it."""
        self.run: str = options.load_run
        self.ledger = Ledger()
        self._tell_stored = stored
        self._devices: dict[str, Device] = {}
        self._addressable: dict[str, None] = {}
        """Users that a notification may be published to."""
        self._numbers = itertools.count(1)
        self._nats: NatsPublisher | None = None
        self._publishing = Group()
        self._overdue: set[tuple[str, str]] = set()
        self._watch = gevent.spawn(self._look_for_overdue) if options.overdue else None

    # Devices

    def topic(self, name: object) -> str:
        """A topic of this run, whichever process has its followers."""
        return f"load.{self.run}.{name}"

    def new_device(self, topics: Collection[str]) -> Device:
        user = f"load-{self.name}-{next(self._numbers)}"
        for destination in (_user(user), *map(_topic, topics)):
            self.ledger.allow(user, destination)
        device = self._devices[user] = Device(self.mesh, self, user, topics)
        return device

    def retire(self, device: Device) -> None:
        """A device leaves for good, owed nothing if that can be had within some seconds."""
        self._let_go(device)
        # First: what comes while the gateway is asked may be delivered or not.
        for destination in (_user(device.user), *map(_topic, device.topics)):
            self.ledger.unfollow(device.user, destination)
        device.unfollow(_DRAIN_S)
        _until(lambda: not self.ledger.owed(device.user), _DRAIN_S)
        device.close()
        if not self.ledger.owed(device.user):
            self.ledger.forget(device.user)
            del self._devices[device.user]

    def withdraw(self, device: Device) -> None:
        """Its Locust user is stopped while the test goes on: it stays away until the end, and is owed what comes."""
        self._let_go(device)
        device.go_offline(goodbye=True)

    def _let_go(self, device: Device) -> None:
        """Whatever it is still told, nothing new is owed to it."""
        device.is_leaving = True
        self._addressable.pop(device.user, None)

    def storm(self) -> None:
        """Break all connections at once."""
        for device in self._devices.values():
            device.cut()

    # What devices report

    def welcomed(self, device: Device) -> None:
        if not device.is_leaving:
            self.ledger.follow(device.user, _user(device.user), time.time())
            self._addressable[device.user] = None

    def followed(self, device: Device, topics: Collection[str]) -> None:
        if not device.is_leaving:
            for topic in topics:
                self.ledger.follow(device.user, _topic(topic), time.time())

    def arrived(self, device: Device, item: dict[str, Any], size: int) -> None:
        """One notification, at the moment at which it is read from the socket."""
        now, data, id = time.time(), item["n"]["data"], item["n"]["id"]
        if not self.ledger.received(id, data["to"], device.user, now):
            return
        plane = "broadcast" if item["pos"].startswith("b") else data["to"].partition("/")[0]
        assert device.welcome_at is not None
        # What waited for the device says nothing of how fast the mesh is.
        kind = "DELIVER" if data["at"] >= device.welcome_at else "CATCH UP"
        self.event(kind, plane, (now - data["at"]) * 1000, size=size)

    def event(self, kind: str, name: str, took_ms: float, *, size: int = 0, problem: str = "") -> None:
        """Locust's own event: a row of its statistics, with percentiles."""
        self.environment.events.request.fire(
            request_type=kind,
            name=name,
            response_time=took_ms,
            response_length=size,
            exception=Lost(problem) if problem else None,
            context={},
        )

    # Publishing

    def somebody(self) -> str | None:
        """A user of this process whose device has been online; None while there is none."""
        return random.choice(list(self._addressable)) if self._addressable else None

    def publish(self, to: dict[str, str], send: Callable[[str, dict[str, Any]], Outcome]) -> Outcome:
        """Publish to ``{"user": …}`` or ``{"topic": …}`` with `send`, and enter it in the ledger.

        It is seen through to its end whatever becomes of who asks for it.
        """
        return self._publishing.spawn(self._publish, to, send).get()

    def _publish(self, to: dict[str, str], send: Callable[[str, dict[str, Any]], Outcome]) -> Outcome:
        ((kind, name),) = to.items()
        id, destination, at = f"{self.run}-{self.name}-{next(self._numbers)}", f"{kind}/{name}", time.time()
        outcome = send(id, {"to": destination, "at": at, "filler": "x" * self.options.size})
        tally = self.ledger.tally
        if outcome.outcome == "refused":
            tally.refused += 1
            tally.note(f"{id} to {destination}: {outcome.detail}")
        elif outcome.outcome == "doubtful":
            tally.doubtful += 1
        else:
            tally.published += 1
            if kind == "user":
                self.ledger.stored(id, destination, at)
            else:
                self._tell_stored(id, destination, at, self.name)
        return outcome

    def stored_elsewhere(self, id: str, destination: str, at: float, origin: str) -> None:
        """Some process, this one too, has published it to a topic."""
        self.ledger.stored(id, destination, at, 0.0 if origin == self.name else self.options.clock_margin)

    def over_nats(self, id: str, to: dict[str, str], data: dict[str, Any]) -> Outcome:
        if self._nats is None:
            ca = {"nats_ca": self.mesh.nats_ca} if self.mesh.nats_ca else {}
            self._nats = NatsPublisher(nats_url=self.mesh.nats, **ca)
        outcome = self._nats.publish(id, to, data)
        problem = "" if outcome.outcome == "stored" else f"{outcome.outcome}: {outcome.detail}"
        self.event("NATS", "publish", outcome.took_ms, size=self.options.size, problem=problem)
        return outcome

    # The end

    def finish_publishing(self) -> None:
        """Its users have stopped: what they had under way comes to its end."""
        self._publishing.join(_PUBLISH_S)

    def _look_for_overdue(self) -> None:
        """A soak does not wait for its end to say that something is lost."""
        while True:
            gevent.sleep(1)
            before = time.time() - self.options.overdue
            now = set()
            for id, user in self.ledger.overdue(before):
                since = self._devices[user].welcome_at
                if since is not None and since < before:
                    now.add((id, user))
                    if (id, user) not in self._overdue:
                        self.event("LEDGER", "overdue", 0.0, problem=f"not delivered in {self.options.overdue:g} s")
            self._overdue = now

    def settle(self) -> Tally:
        """Nothing is published any more: bring who is owed something online, and wait until nobody is."""
        for user, device in self._devices.items():
            if self.ledger.owed(user):
                device.go_online()
        _until(self.ledger.is_settled, self.options.settle)
        tally = self.ledger.close()
        for device in self._devices.values():
            if device.failed:
                tally.note(f"{device.user} was sent away for good: {device.failed}")
        self.close()
        return tally

    def close(self) -> None:
        if self._watch is not None:
            self._watch.kill()
        closing = Pool(_CLOSING)
        for device in self._devices.values():
            closing.spawn(device.close)
        closing.join()
        if self._nats is not None:
            self._nats.close()


def _user(name: str) -> str:
    return f"user/{name}"


def _topic(name: str) -> str:
    return f"topic/{name}"


def _until(done: Callable[[], bool], timeout_s: float) -> None:
    """Wait until it is, or the time is over."""
    deadline = time.monotonic() + timeout_s
    while not done() and time.monotonic() < deadline:
        gevent.sleep(_LOOK_S)
