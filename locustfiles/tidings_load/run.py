"""A run, from its start to its verdict, over Locust's own messages between workers and master.

::

    worker                                   master, or a Locust that runs alone
    joined   (at the start of the test) -->  who must report in the end
    publish  (stored in a topic)        -->  stored, to all: each worker enters it for its own devices
    blow                                -->  storm, to all
    ended    (its users have stopped)   <--  end
                                        <--  settle, when all have ended: all that was stored is known everywhere
    settled  (its tally)                -->  added up: the verdict

Locust delivers messages of one process to another in order, so what a worker stored is known to all before they settle.
A worker that does not report fails the run: what its devices were owed is not known.
"""

from __future__ import annotations

import logging
import secrets
import time
from typing import Any, Final

import gevent
from locust import events
from locust.env import Environment
from locust.runners import LocalRunner, MasterRunner, WorkerRunner

from tidings.wire.errors import TidingsError

from .ledger import Tally
from .mesh import Mesh
from .options import add_options
from .site import Lost, Site

__all__ = ["register"]

_LOOK_S: Final = 0.05
_GRACE_S: Final = 60.0
"""Beyond the time to settle, for stopping users and closing connections."""

log = logging.getLogger("tidings.load")


def register() -> None:
    """Hook it into Locust, once, however many locustfiles ask for it."""
    if add_options not in events.init_command_line_parser._handlers:
        events.init_command_line_parser.add_listener(add_options)
        events.init.add_listener(_begin)


def _begin(environment: Environment, **_: Any) -> None:
    runner = environment.runner
    if isinstance(runner, (LocalRunner, WorkerRunner)):
        _Part(environment)
    if isinstance(runner, (LocalRunner, MasterRunner)):
        _Referee(environment)


class _Part:
    """Where devices are: a worker, or a Locust that runs alone."""

    def __init__(self, environment: Environment) -> None:
        self._environment = environment
        self._site: Site | None = None
        runner = self._runner = environment.runner
        if isinstance(runner, LocalRunner):
            # A worker learns of the options with the start.
            self._find_mesh()
        # Before the referee's of the same process: it draws the run's name.
        environment.events.test_start.add_listener(self._start)
        environment.events.test_stop.add_listener(self._ended)
        runner.register_message("tidings.stored", self._stored)
        runner.register_message("tidings.storm", self._storm)
        runner.register_message("tidings.end", self._end, concurrent=True)
        runner.register_message("tidings.settle", self._settle, concurrent=True)

    def _find_mesh(self) -> Mesh:
        assert self._environment.parsed_options is not None
        try:
            return Mesh.find(self._environment.parsed_options)
        except TidingsError as error:
            raise SystemExit(f"tidings: {error}") from None

    def _start(self, environment: Environment, **_: Any) -> None:
        assert environment.parsed_options is not None
        if isinstance(self._runner, LocalRunner):
            environment.parsed_options.load_run = secrets.token_hex(4)
        self._site = Site(environment, self._find_mesh(), self._tell_stored)
        self._runner.send_message("tidings.joined", {"id": self._runner.client_id})

    def _tell_stored(self, *what: Any) -> None:
        self._runner.send_message("tidings.publish", what)

    def _stored(self, msg: Any, **_: Any) -> None:
        if self._site is not None:
            self._site.stored_elsewhere(*msg.data)

    def _storm(self, **_: Any) -> None:
        if self._site is not None:
            self._site.storm()

    def _end(self, **_: Any) -> None:
        # Does nothing where Locust has told it already.
        self._runner.stop()

    def _ended(self, **_: Any) -> None:
        if self._site is not None:
            self._site.finish_publishing()
            self._runner.send_message("tidings.ended", {"id": self._runner.client_id})

    def _settle(self, **_: Any) -> None:
        site, self._site = self._site, None
        assert site is not None
        self._runner.send_message("tidings.settled", {"id": self._runner.client_id, "tally": site.settle().packed()})


class _Referee:
    """Who has the last word: the master, or a Locust that runs alone."""

    def __init__(self, environment: Environment) -> None:
        self._environment = environment
        self._joined: set[str] = set()
        self._ended: set[str] = set()
        self._tallies: dict[str, Tally] = {}
        runner = self._runner = environment.runner
        environment.events.test_start.add_listener(self._start)
        environment.events.test_stop.add_listener(self._judge)
        # After Ctrl-C, Locust settles the exit status before it stops who runs alone.
        environment.events.quitting.add_listener(lambda **_: runner.stop())
        runner.register_message("tidings.joined", lambda msg, **_: self._joined.add(msg.data["id"]))
        runner.register_message("tidings.publish", lambda msg, **_: self._to_all("stored", msg.data))
        runner.register_message("tidings.blow", lambda **_: self._to_all("storm"))
        runner.register_message("tidings.ended", lambda msg, **_: self._ended.add(msg.data["id"]))
        runner.register_message("tidings.settled", self._settled)

    def _start(self, environment: Environment, **_: Any) -> None:
        if isinstance(self._runner, MasterRunner):
            assert environment.parsed_options is not None
            environment.parsed_options.load_run = secrets.token_hex(4)
            self._joined.clear()
        self._ended.clear()
        self._tallies.clear()
        environment.process_exit_code = None

    def _to_all(self, what: str, data: Any = None) -> None:
        if isinstance(self._runner, LocalRunner):
            self._runner.send_message(f"tidings.{what}", data)
            return
        # By name: while it stops, a worker is on no list of Locust's.
        for worker in self._joined:
            self._runner.send_message(f"tidings.{what}", data, worker)

    def _settled(self, msg: Any, **_: Any) -> None:
        self._tallies[msg.data["id"]] = Tally.unpacked(msg.data["tally"])

    def _judge(self, environment: Environment, **_: Any) -> None:
        if not self._joined:
            return
        assert environment.parsed_options is not None
        settle_s = environment.parsed_options.settle
        self._to_all("end")
        self._wait_for(self._ended, environment.stop_timeout + _GRACE_S)
        log.info("all users have stopped; devices have %g s to fetch what they are owed", settle_s)
        self._to_all("settle")
        self._wait_for(self._tallies, settle_s + _GRACE_S)
        total = Tally()
        for tally in self._tallies.values():
            total.add(tally)
        problems = total.problems()
        if silent := len(self._joined - self._tallies.keys()):
            problems.append(f"{silent} workers did not report")
        problems += self._too_slow(environment.parsed_options.max_p99_ms)
        self._joined.clear()
        self._say(total, problems)

    def _wait_for(self, reports: Any, timeout_s: float) -> None:
        deadline = time.monotonic() + timeout_s
        while self._joined - set(reports) - self._lost() and time.monotonic() < deadline:
            gevent.sleep(_LOOK_S)

    def _lost(self) -> set[str]:
        """Workers that Locust hears nothing of."""
        runner = self._runner
        return {worker.id for worker in runner.clients.missing} if isinstance(runner, MasterRunner) else set()

    def _too_slow(self, most_ms: float) -> list[str]:
        found = []
        for (name, kind), entry in self._environment.stats.entries.items():
            p99 = entry.get_response_time_percentile(0.99)
            if kind == "DELIVER" and most_ms and p99 > most_ms:
                found.append(f"p99 of {name} deliveries is {p99:g} ms, more than {most_ms:g}")
        return found

    def _say(self, total: Tally, problems: list[str]) -> None:
        counts = {name: value for name, value in total.packed().items() if name != "examples"}
        log.info("ledger: %s", ", ".join(f"{name} {value}" for name, value in counts.items()))
        for example in total.examples:
            log.error("ledger: %s", example)
        for problem in problems:
            log.error("ledger: %s", problem)
            self._environment.events.request.fire(
                request_type="LEDGER",
                name="verdict",
                response_time=0,
                response_length=0,
                exception=Lost(problem),
                context={},
            )
        if problems:
            # Whatever --exit-code-on-error says of failures that a run may have.
            self._environment.process_exit_code = 1
