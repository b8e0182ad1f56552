"""Locust's users: devices, services that publish, a celebrity, the weather. A locustfile imports those it is about."""

from __future__ import annotations

import random
import ssl
import time
import urllib.request
from typing import Any, Final

import gevent
import orjson
from locust import FastHttpUser, User, constant_throughput, task
from locust.env import Environment
from locust.runners import STATE_CLEANUP

from .nats import Outcome
from .site import Site, site_of

__all__ = ["Celebrity", "Devices", "Followers", "HttpService", "NatsService", "Weather"]

_CELEBRITY: Final = "celebrity"
_TRY_S: Final = 30.0
_PAUSE_S: Final = 1.0
_CROWD_S: Final = 120.0


class Devices(User):
    """One device of a user of its own: it loses its connection, goes away and comes back, and is replaced."""

    weight = 10

    def __init__(self, environment: Environment) -> None:
        super().__init__(environment)
        self.site = site_of(environment)

    def on_start(self) -> None:
        self.device = self.site.new_device(self.follows())
        self.device.go_online()

    def on_stop(self) -> None:
        # At the end of the test it stays: what it is owed comes yet.
        runner = self.environment.runner
        if runner is not None and runner.state != STATE_CLEANUP:
            self.site.withdraw(self.device)

    def follows(self) -> list[str]:
        """Its topics, drawn as fame is distributed: the n-th has a share of 1/n."""
        ranks = range(1, self.site.options.load_topics + 1)
        drawn = set(random.choices(ranks, [1 / rank for rank in ranks], k=3)) if ranks else ()
        return [self.site.topic(rank) for rank in drawn]

    def wait_time(self) -> float:
        return random.expovariate(1 / self.site.options.online)

    @task(6)
    def stay(self) -> None:
        pass

    @task(2)
    def lose_the_connection(self) -> None:
        self.device.cut()

    @task(2)
    def go_away(self) -> None:
        self.device.go_offline(goodbye=random.random() < 0.5)
        gevent.sleep(random.expovariate(1 / self.site.options.offline))
        self.device.go_online()

    @task(1)
    def be_replaced(self) -> None:
        self.site.retire(self.device)
        self.on_start()


class Followers(Devices):
    """Devices that all follow the celebrity."""

    def follows(self) -> list[str]:
        return [self.site.topic(_CELEBRITY)]


class _OverNats(User):
    """Publishes with the SDK's `Publisher`."""

    abstract = True

    def __init__(self, environment: Environment) -> None:
        super().__init__(environment)
        self.site: Site = site_of(environment)

    def wait_time(self) -> float:
        pace: float = constant_throughput(self.site.options.rate)(self)
        return pace

    def publish(self, to: dict[str, str]) -> None:
        self.site.publish(to, lambda id, data: self.site.over_nats(id, to, data))


class NatsService(_OverNats):
    """A service that publishes over NATS."""

    @task(3)
    def to_a_user(self) -> None:
        if (user := self.site.somebody()) is not None:
            self.publish({"user": user})

    @task(1)
    def to_a_topic(self) -> None:
        if most := self.site.options.load_topics:
            self.publish({"topic": self.site.topic(random.randint(1, most))})


class HttpService(FastHttpUser):
    """A service that publishes over the HTTP api, and tries again under the same id."""

    def __init__(self, environment: Environment) -> None:
        self.site = site_of(environment)
        self.host = self.site.mesh.api
        self.insecure = False
        self.ssl_context_factory = self.site.mesh.tls
        super().__init__(environment)

    wait_time = _OverNats.wait_time

    def publish(self, to: dict[str, str]) -> None:
        self.site.publish(to, lambda id, data: self._send(id, to, data))

    @task(3)
    def to_a_user(self) -> None:
        if (user := self.site.somebody()) is not None:
            self.publish({"user": user})

    @task(1)
    def to_a_topic(self) -> None:
        if most := self.site.options.load_topics:
            self.publish({"topic": self.site.topic(random.randint(1, most))})

    def _send(self, id: str, to: dict[str, str], data: dict[str, Any]) -> Outcome:
        began = time.monotonic()
        while True:
            outcome, pause_s = self._try(id, to, data)
            if outcome.outcome != "doubtful" or time.monotonic() + pause_s > began + _TRY_S:
                return outcome
            gevent.sleep(pause_s)

    def _try(self, id: str, to: dict[str, str], data: dict[str, Any]) -> tuple[Outcome, float]:
        event = {"type": "load.made", "id": id, "data": {**data, "at": time.time()}}
        headers = {
            "Authorization": f"Bearer {self.site.mesh.service_token('load')}",
            "Content-Type": "application/json",
        }
        body = orjson.dumps({**to, "event": event})
        with self.client.post("/v1/publish", data=body, headers=headers, catch_response=True) as answer:
            if answer.status_code == 200:
                return Outcome("stored", "", 0.0), 0.0
            detail = f"{answer.status_code} {(answer.text or '')[:200]}"
            answer.failure(detail)
            outcome = "doubtful" if answer.status_code in (0, 429, 503) else "refused"
            after = (answer.headers or {}).get("Retry-After", _PAUSE_S)
            return Outcome(outcome, detail, 0.0), float(after)


class Celebrity(_OverNats):
    """One service that publishes to the topic that everybody follows."""

    fixed_count = 1

    def on_start(self) -> None:
        """In `tidings dev`, gather a crowd beside the devices: it takes some to make a topic a broadcast."""
        mesh, size = self.site.mesh, self.site.options.crowd
        if not size or not mesh.page:
            return
        topic = self.site.topic(_CELEBRITY)
        body = orjson.dumps({"topic": topic, "followers": size})
        request = urllib.request.Request(f"{mesh.page}/dev/crowd", body, {"Content-Type": "application/json"})
        tls: ssl.SSLContext | None = mesh.tls() if mesh.page.startswith("https") else None
        with urllib.request.urlopen(request, timeout=_CROWD_S, context=tls) as answer:
            answer.read()

    @task
    def post(self) -> None:
        self.publish({"topic": self.site.topic(_CELEBRITY)})


class Weather(User):
    """Now and then every connection breaks at the same moment, on all workers."""

    fixed_count = 1

    def wait_time(self) -> float:
        every: float = site_of(self.environment).options.storm_every
        return every

    def on_start(self) -> None:
        self.wait()

    @task
    def storm(self) -> None:
        assert self.environment.runner is not None
        self.environment.runner.send_message("tidings.blow")
