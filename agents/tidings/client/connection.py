"""The client's connections, one after the other: handshake, frames, close, and how long to wait for the next."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Coroutine
from typing import Any, Final

import aiohttp

from tidings.runtime.backoff import Backoff
from tidings.runtime.tls import ClientTls
from tidings.wire import codes
from tidings.wire.errors import ConnectionLost
from tidings.wire.position import plane_of

from .acks import Acks
from .callbacks import Callbacks
from .deliveries import Arrival, Deliveries
from .ending import Breach, Ending
from .link import BREACH, GONE, Frame, Link
from .models import Notification
from .renewal import TokenSource, keep_renewing, token_of
from .requests import Requests

__all__ = ["Connection"]

_WELCOME_S: Final = 20.0

log = logging.getLogger("tidings.client")


class Connection:
    """Stays connected until it is told to stop, or the gateway refuses for good.

    What arrives goes to `deliveries`, `requests` and `callbacks`; `news` is set when there is something to take.
    """

    def __init__(
        self,
        url: str,
        token: TokenSource,
        hello: Frame,
        backoff: Backoff,
        deliveries: Deliveries,
        callbacks: Callbacks,
        tls: ClientTls | None = None,
    ) -> None:
        self._url = url
        self._token = token
        self._tls = tls
        self._hello = hello
        self._tells_since = deliveries.progress.reached is not None
        self._backoff = backoff
        self._deliveries = deliveries
        self._callbacks = callbacks
        self.acks = Acks()
        self.requests = Requests()
        self.welcome: Frame = {}
        self.link: Link | None = None
        """Present from welcome to close."""
        self.connected = asyncio.Event()
        """Set while there is a link, and for ever when there will be none any more."""
        self.news = asyncio.Event()
        self._stopped = False

    def stop(self) -> Link | None:
        """Make no further connection; the link is the caller's to close."""
        self._stopped = True
        link, self.link = self.link, None
        return link

    def release(self) -> None:
        """Nobody is to wait for anything any more."""
        self.requests.connection_lost()
        self.connected.set()
        self.news.set()

    async def run(self) -> None:
        """One connection after the other, until one ends for good: raises `SessionClosed` then."""
        async with aiohttp.ClientSession(cookie_jar=aiohttp.DummyCookieJar()) as http:
            await self._stay_connected(http)

    async def _stay_connected(self, http: aiohttp.ClientSession) -> None:
        refreshed = False
        while True:
            ending = await self._one_connection(http)
            if self._stopped:
                return
            refreshed = refreshed and not ending.welcomed
            if ending.token_refused and callable(self._token) and not refreshed:
                refreshed = True
            elif ending.for_good:
                raise ending.error()
            else:
                after = ending.pause(self._backoff)
                log.log(ending.level, "%s: connecting again in %.1f s", ending, after)
                await asyncio.sleep(after)

    async def _one_connection(self, http: aiohttp.ClientSession) -> Ending:
        """From the handshake to the close; returns how it ended."""
        ending = Ending()
        clock = asyncio.get_running_loop().time
        start = clock()
        link: Link | None = None
        tasks: list[asyncio.Task[None]] = []
        farewell = GONE
        try:
            async with asyncio.timeout(_WELCOME_S) as limit:
                hello = await self._make_hello()
                if self._stopped:
                    return ending
                link = await Link.open(http, self._url, None if self._tls is None else self._tls.context())
                await link.send(hello)
                while (frame := await link.receive()) is not None:
                    if frame.get("t") == "welcome":
                        limit.reschedule(None)
                        self._welcomed(frame, link)
                        ending.welcomed = True
                        tasks = tasks or _start(link, self._works(frame, link))
                    else:
                        self._handle(frame, link, ending)
            ending.code = link.close_code
        except Breach as error:
            farewell, ending.problem = BREACH, str(error)
        except (ConnectionLost, OSError, TimeoutError, aiohttp.ClientError) as error:
            ending.problem = str(error) or "no welcome came in time"
        finally:
            self._disconnected()
            await _end(link, tasks, codes.NORMAL.code if self._stopped else farewell)
        if ending.welcomed and clock() - start > self._backoff.most_s:
            # Shorter ones are no success: a gateway that throws its clients out would see them at once again.
            self._backoff.reset()
        return ending

    def _works(self, welcome: Frame, link: Link) -> list[Coroutine[Any, Any, None]]:
        """What goes on beside reading for as long as the connection lasts."""
        works = [self.acks.keep_writing(link)]
        expires_in = welcome.get("expires_in")
        # A gateway of before tokens could be renewed does not say; a token that is no function's stays what it is.
        if isinstance(expires_in, int | float) and callable(self._token):
            works.append(keep_renewing(self._token, expires_in, link, self.requests))
        return works

    async def _make_hello(self) -> Frame:
        hello = {**self._hello, "token": await token_of(self._token)}
        if self._tells_since:
            hello["since"] = self._deliveries.progress.reached
        return hello

    def _handle(self, frame: Frame, link: Link, ending: Ending) -> None:
        """Anything but a welcome. Frames that this version does not know are left alone."""
        kind = frame.get("t")
        try:
            if kind == "n":
                for item in frame["items"]:
                    self._arrived(Notification.from_item(item))
            elif kind in ("ok", "error") and frame.get("ref") is not None:
                self.requests.answered(frame)
            elif kind == "count":
                self._callbacks.count(frame["unread"])
            elif kind == "state":
                self._callbacks.state(frame["pos"], frame["as"])
            elif kind == "gap":
                self._gap(frame["missed"], frame["pos"], link)
            elif kind == "bye":
                ending.bye(frame["reconnect"], frame["after_ms"])
            elif kind == "error":
                ending.reason = str(frame["message"])
        except (KeyError, TypeError) as error:
            raise Breach(f"the gateway sent a `{kind}` frame that cannot be read: {error!r}") from error

    def _welcomed(self, frame: Frame, link: Link) -> None:
        try:
            link.heartbeat_s = float(frame["heartbeat"])
            self._deliveries.begin(int(frame["window"]), frame["pos"])
            # Without a device of its own a client would come back as another one.
            self._hello.setdefault("device", frame["device"])
        except (KeyError, TypeError, ValueError) as error:
            raise Breach(f"the gateway sent a `welcome` that cannot be read: {error!r}") from error
        self.welcome = frame
        self.link = link
        self.connected.set()

    def _arrived(self, notification: Notification) -> None:
        arrival = self._deliveries.arrived(notification)
        if arrival is Arrival.NEW:
            self.news.set()
        elif arrival is Arrival.DONE:
            self.acks.add([notification.position])
        elif arrival is Arrival.OVERFLOW:
            raise Breach(f"the gateway sends past the window: {len(self._deliveries)} notifications wait")

    def _gap(self, missed: int | None, position: str | None, link: Link) -> None:
        progress = self._deliveries.progress
        if position is None:
            # The gateway does not know where the gap ends: there is nothing to acknowledge.
            progress.suspend()
            self._callbacks.gap(missed, None, lambda: None)
            return
        progress.received(position)

        def noted() -> None:
            if self.link is link:
                progress.settle(position)
                self.acks.noted(link, position)

        self._callbacks.gap(missed, plane_of(position), noted)

    def _disconnected(self) -> None:
        self.link = None
        if not self._stopped:
            self.connected.clear()
        self.requests.connection_lost()


def _start(link: Link, works: list[Coroutine[Any, Any, None]]) -> list[asyncio.Task[None]]:
    """Tasks of a connection; one that fails ends the connection, and `_end` raises its error."""
    tasks = [asyncio.create_task(work) for work in works]

    def ended(task: asyncio.Task[None]) -> None:
        if not task.cancelled() and task.exception() is not None:
            tasks.append(asyncio.create_task(link.close(GONE)))

    for task in tasks:
        task.add_done_callback(ended)
    return tasks


async def _end(link: Link | None, tasks: list[asyncio.Task[None]], farewell: int) -> None:
    """Leave nothing of a connection behind; raises what one of its tasks failed with."""
    try:
        for task in tasks:
            task.cancel()
        if tasks:
            await asyncio.wait(tasks)
    finally:
        if link is not None:
            await link.close(farewell)
    for task in tasks:
        if not task.cancelled():
            task.result()
