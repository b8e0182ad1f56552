"""One lifecycle for everything that runs: start, ready, drain, stop.

::

    new --start()--> starting --> ready --drain()--> draining --stop()--> stopped
                        |            `----------------stop()----------------^
                        `--(failure)--> stopped

Stopping twice, before starting or while starting is fine; starting twice is a mistake of the caller.
"""

from __future__ import annotations

import asyncio
import enum
import logging
from collections.abc import Coroutine
from typing import Any, Final

__all__ = ["Service", "State"]

_CANCEL_AGAIN_S: Final = 1.0


class State(enum.Enum):
    NEW = "new"
    STARTING = "starting"
    READY = "ready"
    DRAINING = "draining"
    STOPPED = "stopped"


class Service:
    """Base of the agents. Subclasses override `_start`, `_drain` and `_stop`; all three may be left out.

    Background tasks made by `spawn` end with the service. One that dies of an error is logged and makes
    the service `failed`, which whoever runs it watches: an agent that is half alive is worse than a dead one.
    """

    name = "service"

    def __init__(self) -> None:
        self.state = State.NEW
        self.log = logging.getLogger(f"tidings.{self.name}")
        self._tasks: set[asyncio.Task[Any]] = set()
        self._failed: asyncio.Future[None] | None = None
        self._stopping: asyncio.Task[None] | None = None
        self._starting: asyncio.Task[None] | None = None

    @property
    def ready(self) -> bool:
        return self.state is State.READY

    async def start(self) -> None:
        """Return when ready. After an error (which is raised) everything half started is stopped again."""
        if self.state is not State.NEW:
            raise RuntimeError(f"{self.name} was started before: make a new one")
        self.state = State.STARTING
        self._failed = asyncio.get_running_loop().create_future()
        self._starting = asyncio.ensure_future(self._start())
        try:
            # Whoever is cancelled here leaves the cancelling to `stop`: twice would interrupt what `_start` releases.
            await asyncio.shield(self._starting)
        except BaseException:
            await self.stop()
            raise
        if self.state is State.STARTING:
            self.state = State.READY

    async def drain(self) -> None:
        """Take no new work and hand over what can be handed over; `stop` follows."""
        if self.state is State.READY:
            self.state = State.DRAINING
            await self._drain()

    async def stop(self) -> None:
        """End everything. Returns when all is down, whoever asked first."""
        if self._stopping is None:
            self._stopping = asyncio.ensure_future(self._stop_once())
        await asyncio.shield(self._stopping)

    async def failed(self) -> None:
        """Wait until a background task dies; raises its error."""
        if self._failed is None:
            raise RuntimeError(f"{self.name} was not started")
        await asyncio.shield(self._failed)

    def spawn(self, work: Coroutine[Any, Any, Any]) -> asyncio.Task[Any]:
        """Run a background task that ends with the service."""
        task = asyncio.ensure_future(work)
        self._tasks.add(task)
        task.add_done_callback(self._ended)
        return task

    def _ended(self, task: asyncio.Task[Any]) -> None:
        self._tasks.discard(task)
        if task.cancelled():
            return
        error = task.exception()
        if error is not None:
            self.log.error("a background task died", exc_info=error)
            if self._failed is not None and not self._failed.done():
                self._failed.set_exception(error)
                # Whoever watches gets it; when nobody does, the log line above has said it.
                self._failed.exception()

    async def _stop_once(self) -> None:
        was = self.state
        self.state = State.STOPPED
        if self._starting is not None and not self._starting.done():
            self._starting.cancel()
            await asyncio.wait([self._starting])
        await self._end_tasks()
        try:
            if was is not State.NEW:
                await self._stop()
        finally:
            # What was spawned meanwhile, as by a reconnect at that moment; also when `_stop` failed half-way.
            await self._end_tasks()
            if self._failed is not None and not self._failed.done():
                self._failed.cancel()

    async def _end_tasks(self) -> None:
        while self._tasks:
            tasks = list(self._tasks)
            for task in tasks:
                task.cancel()
            # Again and again: before Python 3.12 `asyncio.wait_for`, which nats-py asks with, forgets a cancellation
            # that comes in the same turn as the answer, and its caller goes on.
            await asyncio.wait(tasks, timeout=_CANCEL_AGAIN_S)

    async def _start(self) -> None:
        """Acquire what the service needs; return when it can serve."""

    async def _drain(self) -> None:
        """Stop taking work."""

    async def _stop(self) -> None:
        """Release everything; background tasks are down already."""
