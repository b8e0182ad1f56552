"""The lifecycle that every agent has: started and stopped in every order, at every moment, with nothing left."""

from __future__ import annotations

import asyncio
import gc
import logging
from collections.abc import AsyncIterator, Callable
from typing import Any

import pytest

from support.clock import PATIENCE_S
from tidings.runtime.service import Service, State

TURNS = range(16)
"""More turns of the loop than a probe takes to start, with some to spare."""


class Broken(Exception):
    """What goes wrong in these tests."""


class Probe(Service):
    """Takes three things on its way up, a turn of the loop each, with a background task for the second."""

    name = "probe"

    def __init__(self, *, fails_at: int | None = None) -> None:
        super().__init__()
        self.fails_at = fails_at
        self.held: list[int] = []
        self.said: list[str] = []
        self.stop_gate = asyncio.Event()
        """Released, unless a test holds it."""
        self.stop_gate.set()
        self.drain_gate = asyncio.Event()
        self.drain_gate.set()

    async def _start(self) -> None:
        self.said.append("start")
        for number in range(3):
            await asyncio.sleep(0)
            if number == self.fails_at:
                raise Broken(f"at {number}")
            self.held.append(number)
            if number == 1:
                self.spawn(self._work())
            await asyncio.sleep(0)

    async def _work(self) -> None:
        self.said.append("work")
        try:
            await asyncio.Event().wait()
        finally:
            # An ending that takes its time must be waited for.
            for _ in range(3):
                await asyncio.sleep(0)
            self.said.append("work ended")

    async def _drain(self) -> None:
        self.said.append("drain")
        await self.drain_gate.wait()
        self.said.append("drained")

    async def _stop(self) -> None:
        self.said.append("stop")
        await self.stop_gate.wait()
        self.held.clear()
        self.said.append("stopped")

    def check_down(self) -> None:
        """Everything is released, in order, and once."""
        assert self.state is State.STOPPED
        assert not self.ready
        assert self.held == []
        assert not self._tasks
        if "start" in self.said:
            assert self.said.count("stop") == self.said.count("stopped") == 1
        assert self.said.count("work") == self.said.count("work ended")
        if "work" in self.said:
            assert self.said.index("work ended") < self.said.index("stop")


@pytest.fixture(autouse=True)
async def nothing_left() -> AsyncIterator[None]:
    """No test leaves a task behind, or an error that nobody has looked at."""
    complaints: list[Any] = []
    asyncio.get_running_loop().set_exception_handler(lambda loop, context: complaints.append(context))
    before = asyncio.all_tasks()
    yield
    # A task that is done at this moment still has its callbacks to run.
    await asyncio.sleep(0)
    assert asyncio.all_tasks() - before - {asyncio.current_task()} == set()
    gc.collect()
    assert complaints == []


@pytest.fixture
async def probe() -> Probe:
    return Probe()


async def turns(count: int) -> None:
    """Let everybody else run for so many turns of the loop."""
    for _ in range(count):
        await asyncio.sleep(0)


async def outcome(task: asyncio.Future[None]) -> type[BaseException] | None:
    """How a task ended: the kind of what it raised, or None."""
    async with asyncio.timeout(PATIENCE_S):
        (result,) = await asyncio.gather(task, return_exceptions=True)
    return None if result is None else type(result)


# In order


async def test_one_life(probe: Probe) -> None:
    """New, starting, ready, draining, stopped: each hook is called once, in this order."""
    assert probe.state is State.NEW
    starting = asyncio.create_task(probe.start())
    await turns(2)
    assert probe.state is State.STARTING
    assert not probe.ready
    await starting
    assert probe.ready
    assert probe.held == [0, 1, 2]
    await probe.drain()
    assert probe.state is State.DRAINING
    assert not probe.ready
    await probe.stop()
    probe.check_down()
    assert probe.said == ["start", "work", "drain", "drained", "work ended", "stop", "stopped"]


async def test_hooks_may_be_left_out() -> None:
    """A service that overrides nothing has a life too."""
    service = Service()
    await service.start()
    assert service.ready
    await service.drain()
    await service.stop()
    assert service.state is State.STOPPED


# Starting twice


@pytest.mark.parametrize("state", [State.STARTING, State.READY, State.DRAINING, State.STOPPED])
async def test_start_twice(probe: Probe, state: State) -> None:
    """Starting is refused in every state but the first, and whoever started before is not disturbed."""
    first = asyncio.create_task(probe.start())
    await turns(1)
    if state is not State.STARTING:
        await first
    if state is State.DRAINING:
        await probe.drain()
    elif state is State.STOPPED:
        await probe.stop()
    assert probe.state is state
    with pytest.raises(RuntimeError, match="probe was started before"):
        await probe.start()
    assert probe.state is state
    await first
    assert probe.said.count("start") == 1
    await probe.stop()
    probe.check_down()


async def test_start_after_a_failed_start() -> None:
    """A service that could not start is not tried again: a new one is."""
    probe = Probe(fails_at=0)
    with pytest.raises(Broken):
        await probe.start()
    with pytest.raises(RuntimeError, match="make a new one"):
        await probe.start()


# Stopping


async def test_stop_before_start(probe: Probe) -> None:
    """What never started has nothing to release, and does not start any more."""
    await probe.stop()
    await probe.stop()
    assert probe.said == []
    assert probe.state is State.STOPPED
    with pytest.raises(RuntimeError):
        await probe.start()
    with pytest.raises(RuntimeError, match="was not started"):
        await probe.failed()


async def test_stop_twice(probe: Probe) -> None:
    """The second stop finds everything down."""
    await probe.start()
    await probe.stop()
    await probe.stop()
    probe.check_down()


async def test_stops_at_the_same_time_return_when_all_is_down(probe: Probe) -> None:
    """Whoever asks, at whatever moment, waits for the end; one that gives up waiting stops nothing of it."""
    await probe.start()
    probe.stop_gate.clear()
    stops = [asyncio.create_task(probe.stop())]
    for _ in TURNS:
        await turns(1)
        stops.append(asyncio.create_task(probe.stop()))
    await turns(len(TURNS))
    assert probe.said[-1] == "stop"
    assert not any(stop.done() for stop in stops)
    impatient = stops.pop(0)
    impatient.cancel()
    assert await outcome(impatient) is asyncio.CancelledError
    assert probe.held
    probe.stop_gate.set()
    assert [await outcome(stop) for stop in stops] == [None] * len(stops)
    probe.check_down()


async def test_stop_by_its_own_task(probe: Probe) -> None:
    """A background task may stop its service; it ends with the others."""
    await probe.start()
    own = probe.spawn(probe.stop())
    assert await outcome(own) is asyncio.CancelledError
    await probe.stop()
    probe.check_down()


async def test_stop_waits_for_tasks_that_fail_at_their_end(probe: Probe, caplog: pytest.LogCaptureFixture) -> None:
    """A task whose clean-up fails is logged, and the rest is released all the same."""

    async def fail_at_the_end() -> None:
        try:
            await asyncio.Event().wait()
        finally:
            raise Broken("on the way out")

    await probe.start()
    probe.spawn(fail_at_the_end())
    await turns(1)
    await probe.stop()
    probe.check_down()
    assert "on the way out" in caplog.text


async def test_stop_that_fails(probe: Probe, monkeypatch: pytest.MonkeyPatch) -> None:
    """A release that fails tells everybody who asked, now or later, and is not tried again."""

    async def fail() -> None:
        probe.said.append("stop")
        raise Broken("it does not let go")

    monkeypatch.setattr(probe, "_stop", fail)
    await probe.start()
    both = [asyncio.create_task(probe.stop()) for _ in range(2)]
    assert [await outcome(stop) for stop in both] == [Broken, Broken]
    with pytest.raises(Broken):
        await probe.stop()
    assert probe.said.count("stop") == 1
    assert probe.state is State.STOPPED


# Stopping while starting


@pytest.mark.parametrize("count", TURNS)
async def test_stop_while_starting(probe: Probe, count: int) -> None:
    """At whatever turn of its start a service is stopped: all is down when the stop returns, and stays so."""
    starting = asyncio.create_task(probe.start())
    await turns(count)
    was_ready = probe.ready
    await probe.stop()
    probe.check_down()
    ended = await outcome(starting)
    # Between the last turn of `_start` and the first that could tell, a start is as good as through.
    assert ended is None if was_ready else ended in (None, asyncio.CancelledError)
    await turns(len(TURNS))
    probe.check_down()


@pytest.mark.parametrize("count", TURNS)
async def test_two_stops_while_starting(probe: Probe, count: int) -> None:
    """Two who stop a starting service both return when it is down."""
    starting = asyncio.create_task(probe.start())
    await turns(count + 1)
    probe.stop_gate.clear()
    stops = [asyncio.create_task(probe.stop()) for _ in range(2)]
    await turns(len(TURNS))
    assert not any(stop.done() for stop in stops)
    probe.stop_gate.set()
    assert [await outcome(stop) for stop in stops] == [None, None]
    probe.check_down()
    await outcome(starting)
    probe.check_down()


@pytest.mark.parametrize("count", TURNS)
async def test_start_is_cancelled(probe: Probe, count: int) -> None:
    """At whatever turn the task that awaits the start is cancelled: it returns when all is down."""
    starting = asyncio.create_task(probe.start())
    await turns(count)
    if not starting.cancel():
        assert probe.ready
        await probe.stop()
    elif count == 0:
        assert await outcome(starting) is asyncio.CancelledError
        assert probe.state is State.NEW
        return
    else:
        assert await outcome(starting) is asyncio.CancelledError
    probe.check_down()
    await probe.stop()
    probe.check_down()


@pytest.mark.parametrize("count", TURNS)
async def test_start_is_cancelled_and_stopped(probe: Probe, count: int) -> None:
    """A cancelled start and a stop in the same turn, in both orders, do not get into each other's way."""
    for order in (0, 1):
        mine = Probe()
        starting = asyncio.create_task(mine.start())
        await turns(count + 1)
        if order:
            starting.cancel()
        stopping = asyncio.create_task(mine.stop())
        if not order:
            await turns(1)
            starting.cancel()
        assert await outcome(stopping) is None
        mine.check_down()
        await outcome(starting)
        mine.check_down()


async def test_cancelled_twice_while_starting(probe: Probe) -> None:
    """A second cancel ends the wait, and not the release."""
    probe.stop_gate.clear()
    starting = asyncio.create_task(probe.start())
    await turns(5)
    starting.cancel()
    await turns(len(TURNS))
    assert not starting.done()
    starting.cancel()
    assert await outcome(starting) is asyncio.CancelledError
    assert probe.held
    probe.stop_gate.set()
    await probe.stop()
    probe.check_down()


async def test_clean_up_of_a_start_is_not_interrupted(probe: Probe, monkeypatch: pytest.MonkeyPatch) -> None:
    """However many give a start up, `_start` hears of it once, and what it releases then is released to the end."""

    async def start() -> None:
        try:
            await asyncio.Event().wait()
        finally:
            await turns(5)
            probe.said.append("cleaned up")

    monkeypatch.setattr(probe, "_start", start)
    starting = asyncio.create_task(probe.start())
    await turns(3)
    starting.cancel()
    await turns(2)
    await probe.stop()
    assert await outcome(starting) is asyncio.CancelledError
    assert probe.said == ["cleaned up", "stop", "stopped"]


async def test_start_that_does_not_hear_the_cancel(probe: Probe, monkeypatch: pytest.MonkeyPatch) -> None:
    """A library may swallow a cancel: what is taken after that is released too."""
    start = probe._start

    async def deaf() -> None:
        try:
            await asyncio.Event().wait()
        except asyncio.CancelledError:
            await start()

    monkeypatch.setattr(probe, "_start", deaf)
    starting = asyncio.create_task(probe.start())
    await turns(3)
    await probe.stop()
    probe.check_down()
    assert "work" in probe.said
    await outcome(starting)
    probe.check_down()


# Failing


@pytest.mark.parametrize("fails_at", range(3))
async def test_failure_while_starting(fails_at: int) -> None:
    """Whatever was taken before the failure is released before its error is raised."""
    probe = Probe(fails_at=fails_at)
    with pytest.raises(Broken, match=f"at {fails_at}"):
        await probe.start()
    probe.check_down()
    assert ("work" in probe.said) == (fails_at == 2)
    await probe.stop()
    await probe.drain()
    probe.check_down()


@pytest.mark.parametrize("count", TURNS)
async def test_failure_while_starting_and_a_stop(count: int) -> None:
    """A stop at any turn of a start that fails waits for the release, and does not do it again."""
    probe = Probe(fails_at=2)
    starting = asyncio.create_task(probe.start())
    await turns(count + 1)
    await probe.stop()
    probe.check_down()
    assert await outcome(starting) in (Broken, asyncio.CancelledError)
    probe.check_down()


async def test_dead_task_fails_the_service(probe: Probe, caplog: pytest.LogCaptureFixture) -> None:
    """Every watcher gets the first error, whenever it looks; the service runs on until it is stopped."""

    async def die(error: Exception) -> None:
        raise error

    await probe.start()
    watchers = [asyncio.create_task(probe.failed()) for _ in range(2)]
    gone = asyncio.create_task(probe.failed())
    await turns(2)
    gone.cancel()
    assert await outcome(gone) is asyncio.CancelledError
    first = Broken("the first")
    probe.spawn(die(first))
    probe.spawn(die(ValueError("the second")))
    assert [await outcome(watcher) for watcher in watchers] == [Broken, Broken]
    with pytest.raises(Broken) as caught:
        await probe.failed()
    assert caught.value is first
    assert probe.ready
    assert next(record.exc_info[1] for record in caplog.records if record.exc_info) is first
    assert "the second" in caplog.text
    await probe.stop()
    probe.check_down()
    with pytest.raises(Broken):
        await probe.failed()


async def test_dead_task_that_nobody_watches(caplog: pytest.LogCaptureFixture) -> None:
    """The log has it, once; asyncio has nothing to add when the service is forgotten."""

    async def die() -> None:
        raise Broken("unseen")

    probe = Probe()
    await probe.start()
    probe.spawn(die())
    await turns(2)
    await probe.stop()
    assert [(record.name, record.levelno) for record in caplog.records] == [("tidings.probe", logging.ERROR)]


async def test_task_that_dies_while_starting(probe: Probe, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whoever watches from the moment of readiness still gets it."""

    async def die() -> None:
        raise Broken("early")

    async def start() -> None:
        probe.spawn(die())
        await turns(3)

    monkeypatch.setattr(probe, "_start", start)
    await probe.start()
    with pytest.raises(Broken, match="early"):
        await probe.failed()
    await probe.stop()


@pytest.mark.parametrize("end", ["returns", "is cancelled"])
async def test_task_that_ends_in_peace(probe: Probe, end: str) -> None:
    """A task that returns, or is cancelled by whoever made it, is no failure; a stop ends those who watch."""
    await probe.start()
    watcher = asyncio.create_task(probe.failed())
    task = probe.spawn(turns(2) if end == "returns" else asyncio.Event().wait())
    await turns(1)
    if end == "is cancelled":
        task.cancel()
    await asyncio.wait([task])
    await turns(2)
    assert not watcher.done()
    await probe.stop()
    assert await outcome(watcher) is asyncio.CancelledError


# Draining


async def test_drain_where_nothing_is_to_drain(probe: Probe) -> None:
    """Before the start, while starting and after the stop a drain does nothing, and hinders nothing."""
    await probe.drain()
    assert probe.state is State.NEW
    starting = asyncio.create_task(probe.start())
    await turns(2)
    await probe.drain()
    assert probe.state is State.STARTING
    await starting
    assert probe.ready
    await probe.stop()
    await probe.drain()
    assert "drain" not in probe.said
    probe.check_down()


async def test_drain_twice(probe: Probe) -> None:
    """The second drain, during the first or after it, drains nothing again."""
    await probe.start()
    probe.drain_gate.clear()
    first = asyncio.create_task(probe.drain())
    await turns(2)
    second = asyncio.create_task(probe.drain())
    await turns(2)
    probe.drain_gate.set()
    assert [await outcome(first), await outcome(second)] == [None, None]
    await probe.drain()
    assert probe.said.count("drain") == 1
    await probe.stop()
    probe.check_down()


async def test_stop_during_drain(probe: Probe) -> None:
    """A stop does not wait for a drain that hangs, and all is down when it returns."""
    await probe.start()
    probe.drain_gate.clear()
    draining = asyncio.create_task(probe.drain())
    await turns(2)
    async with asyncio.timeout(PATIENCE_S):
        await probe.stop()
    probe.check_down()
    probe.drain_gate.set()
    await outcome(draining)
    probe.check_down()


@pytest.mark.parametrize("ending", ["fails", "is cancelled"])
async def test_drain_that_does_not_come_to_its_end(probe: Probe, monkeypatch: pytest.MonkeyPatch, ending: str) -> None:
    """Its caller is told; the stop that follows releases everything."""

    async def fail() -> None:
        raise Broken("no hand-over")

    if ending == "fails":
        monkeypatch.setattr(probe, "_drain", fail)
    probe.drain_gate.clear()
    await probe.start()
    draining = asyncio.create_task(probe.drain())
    await turns(2)
    draining.cancel()
    assert await outcome(draining) is (Broken if ending == "fails" else asyncio.CancelledError)
    assert probe.state is State.DRAINING
    await probe.stop()
    probe.check_down()


# Spawning late


def _in_a_task(probe: Probe) -> None:
    async def spawn_at_the_end() -> None:
        try:
            await asyncio.Event().wait()
        finally:
            probe.spawn(asyncio.Event().wait())

    probe.spawn(spawn_at_the_end())


def _in_the_release(probe: Probe) -> None:
    release = probe._stop

    async def spawn_and_release() -> None:
        probe.spawn(asyncio.Event().wait())
        await release()

    probe._stop = spawn_and_release  # type: ignore[method-assign]


@pytest.mark.parametrize("arrange", [_in_a_task, _in_the_release])
async def test_task_made_while_stopping(probe: Probe, arrange: Callable[[Probe], None]) -> None:
    """What is spawned while the service stops, as by a reconnect at that moment, ends with it as well."""
    await probe.start()
    arrange(probe)
    await turns(1)
    await probe.stop()
    left = list(probe._tasks)
    for task in left:
        task.cancel()
    await asyncio.gather(*left, return_exceptions=True)
    assert left == []


async def test_task_made_before_the_release_fails(probe: Probe) -> None:
    """What is spawned while the service stops ends with it also when its release fails, and that is told."""
    await probe.start()

    async def spawn_and_fail() -> None:
        probe.spawn(asyncio.Event().wait())
        raise Broken

    probe._stop = spawn_and_fail  # type: ignore[method-assign]
    with pytest.raises(Broken):
        await probe.stop()
    left = list(probe._tasks)
    for task in left:
        task.cancel()
    await asyncio.gather(*left, return_exceptions=True)
    assert left == []


async def test_task_that_misses_its_cancellation(probe: Probe) -> None:
    """An answer that comes in the turn of the stop hides it from who asked, on Python 3.11: it is told again."""
    await probe.start()
    answers: list[asyncio.Future[None]] = []

    async def ask() -> None:
        while True:
            answers.append(asyncio.get_running_loop().create_future())
            await asyncio.wait_for(answers[-1], 60)

    asking = probe.spawn(ask())
    while not answers:
        await asyncio.sleep(0)
    await asyncio.sleep(0)
    stopping = asyncio.create_task(probe.stop())
    answers[-1].set_result(None)
    async with asyncio.timeout(PATIENCE_S):
        await stopping
    assert asking.cancelled()
