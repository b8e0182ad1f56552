"""A device: connects, comes back, delivers each notification to the application and acknowledges it.

::

    import asyncio
    from tidings.client import Client, SessionClosed

    async def main(token: str) -> None:
        async with Client("ws://127.0.0.1:8080", token, device="desk", on_count=print) as client:
            page = await client.inbox(limit=10, filter="unread")
            for entry in page.items:
                print("unread:", entry.notification["type"])
            try:
                async for notification in client:
                    print(notification.type, notification.data)  # returns: acknowledged; raises: comes again
                    await client.mark([notification.position], "read")
            except SessionClosed as closed:
                print(closed)  # such as 4409: a newer session of this device took over

**Acknowledgement.** The loop's body is the handler. A notification is acknowledged when its body has run to the end,
that is, when the loop asks for the next one. A body that is left by an exception, `break` or `return` has not: its
notification is not acknowledged, and comes again after the gateway's `ack_wait` or at the next connection. To leave
a loop with an acknowledgement, call `Client.ack` before `break`. Several loops over one client share its
notifications, each acknowledging its own. With ``auto_ack=False`` only `Client.ack` and `Client.ack_upto` acknowledge.

**Copies.** Delivery is at least once. A copy of what was acknowledged is dropped by its id, as far as the memory of
2,048 ids reaches; a copy of what is queued, or in the hands of a handler, is not delivered a second time. With
``auto_ack=False`` what stays unacknowledged past `ack_wait` is delivered again, with a higher `attempt`.

**Back-pressure.** The gateway holds back what exceeds the window, so a slow application costs a queue of at most
two windows. A gateway that sends more than that broke the protocol, and is left.
"""

from __future__ import annotations

import asyncio
import inspect
import logging
import os
from collections.abc import AsyncGenerator, Awaitable, Callable, Sequence
from types import TracebackType
from typing import Final, Literal, Self
from urllib.parse import urlsplit

from tidings.runtime.backoff import Backoff
from tidings.runtime.tls import ClientTls
from tidings.wire import codes
from tidings.wire.errors import BadSettings, ConnectionLost
from tidings.wire.frames import Filter, MarkAs
from tidings.wire.position import Position, parse

from .callbacks import Callbacks, CountCallback, GapCallback, StateCallback
from .connection import Connection
from .deliveries import Deliveries
from .link import Frame, Link
from .models import InboxEntry, InboxPage, Notification
from .renewal import TokenSource

__all__ = ["Client"]

Handler = Callable[[Notification], Awaitable[None] | None]
ErrorHandler = Callable[[Notification, Exception], Awaitable[None] | None]

_PATH: Final = "/v1/ws"
_GOODBYE_S: Final = 2.0

log = logging.getLogger("tidings.client")


class Client:
    """One device of one user. Use it as an asynchronous context manager and iterate over it.

    `token` is a device token, or a function (plain or asynchronous) that returns a fresh one: it is called at
    each connect, before the last token ends (which renews it without a reconnect), and once more when the gateway
    refuses its token. When it raises `OSError`, `TimeoutError` or `aiohttp.ClientError`, that is a failed connect, or a
    renewal to be tried again; any other exception ends the client and comes out of the loop.
    `since` is a position up to which the application has everything, kept from `Client.position`; only a client that
    was given one sends one, as the gateway knows the cursor.

    `on_gap(missed)` is told that more was missed than is pushed (None: an unknown number), so that the application
    pages the inbox; the gap is acknowledged when it returns. `on_count(unread)` follows the badge, and
    `on_state(positions | "all", as_)` the marks of the user's other devices. They are plain or asynchronous, and
    may use the client. One whose request is not answered is forgiven (a gap is announced again on the next
    connection); any other exception ends the client and comes out of the loop.

    `ca` is the path of the certificates (PEM) that a `wss` gateway is checked against, where they are not the system's:
    such as ``.tidings/tls/ca.pem`` of `tidings dev --tls`. They are read again at a connect, if they have changed.

    `timeout_s` bounds each request. What the gateway refuses for good raises `SessionClosed` out of the loop.
    """

    def __init__(
        self,
        url: str,
        token: TokenSource,
        *,
        ca: str | os.PathLike[str] | None = None,
        device: str | None = None,
        window: int | None = None,
        auto_ack: bool = True,
        since: str | None = None,
        on_gap: GapCallback | None = None,
        on_count: CountCallback | None = None,
        on_state: StateCallback | None = None,
        backoff: Backoff | None = None,
        timeout_s: float = 10.0,
    ) -> None:
        if since is not None:
            Position.parse(since)
        hello: Frame = {"t": "hello"}
        hello |= {name: value for name, value in (("device", device), ("window", window)) if value is not None}
        self._auto_ack = auto_ack
        self._timeout_s = timeout_s
        self._deliveries = Deliveries(since)
        self._callbacks = Callbacks(on_gap, on_count, on_state)
        self._connection = Connection(
            _address(url),
            token,
            hello,
            backoff or Backoff(0.5, 15.0),
            self._deliveries,
            self._callbacks,
            None if ca is None else ClientTls(os.fspath(ca)),
        )
        self._tasks: list[asyncio.Task[None]] = []
        self._over: BaseException | None = None
        """Why there will be no more notifications."""
        self._closed = False

    @property
    def welcome(self) -> Frame:
        """The gateway's last welcome: ``session``, ``user``, ``device``, ``unread``, ``window``."""
        return self._connection.welcome

    @property
    def position(self) -> str | None:
        """Everything up to here is acknowledged by the application; None while nothing is known. See `since`."""
        return self._deliveries.progress.reached

    # Life

    async def open(self) -> None:
        """Connect, for as long as it takes; returns at the first welcome. Raises `SessionClosed` when refused for good.

        A gateway that is not there is tried again, with a warning in the log: bound it with `asyncio.timeout`.
        """
        if self._tasks or self._closed:
            raise RuntimeError("a client is opened once: make another")
        for work in (self._connection.run(), self._callbacks.run()):
            task = asyncio.create_task(work)
            task.add_done_callback(self._ended)
            self._tasks.append(task)
        try:
            await self._connection.connected.wait()
        except BaseException:
            await self.close()
            raise
        if self._over is not None:
            await self.close()
            raise self._over

    async def close(self) -> None:
        """Send the acks that are due, say goodbye and end. Closing twice is fine.

        The session ends with it: nothing lingers. What a handler is still at work on is not acknowledged.
        """
        self._closed = True
        link = self._connection.stop()
        try:
            if link is not None:
                await self._say_goodbye(link)
        finally:
            await self._stop()

    async def _say_goodbye(self, link: Link) -> None:
        try:
            async with asyncio.timeout(_GOODBYE_S):
                await self._connection.acks.write(link)
                await link.close(codes.NORMAL.code)
        except (ConnectionLost, TimeoutError) as error:
            log.debug("the last acks may be lost: %s", error or "the gateway does not read")

    async def _stop(self) -> None:
        # A callback may close its client, and is no task to wait for then.
        tasks = [task for task in self._tasks if task is not asyncio.current_task()]
        for task in tasks:
            task.cancel()
        if tasks:
            await asyncio.wait(tasks)
        self._connection.release()

    async def __aenter__(self) -> Self:
        await self.open()
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        await self.close()

    # Notifications

    async def __aiter__(self) -> AsyncGenerator[Notification, None]:
        while (notification := await self._next(held=self._auto_ack)) is not None:
            try:
                yield notification
            except GeneratorExit:
                # Left by break, return or an exception, which look alike from here: it was not handled.
                if self._auto_ack:
                    self._deliveries.release(notification)
                raise
            if self._auto_ack:
                self._acknowledge(notification)

    async def run(self, handler: Handler, *, on_error: ErrorHandler | None = None) -> None:
        """Call `handler` with each notification until the client is closed; acknowledge it when the handler returned.

        One that raises is not acknowledged, and comes again. Its exception goes to `on_error`, and the next
        notification to `handler`; without `on_error` it is raised.
        """
        while (notification := await self._next(held=True)) is not None:
            try:
                outcome = handler(notification)
                if inspect.isawaitable(outcome):
                    await outcome
            except BaseException as error:
                self._deliveries.release(notification)
                if on_error is None or not isinstance(error, Exception):
                    raise
                told = on_error(notification, error)
                if inspect.isawaitable(told):
                    await told
            else:
                self._acknowledge(notification)

    async def _next(self, *, held: bool) -> Notification | None:
        if not self._tasks:
            raise RuntimeError("the client is not open: use `async with`")
        while True:
            if self._over is not None:
                raise self._over
            if self._closed:
                return None
            notification = self._deliveries.take(held=held)
            if notification is not None:
                return notification
            self._connection.news.clear()
            await self._connection.news.wait()

    async def ack(self, notification: Notification) -> None:
        """The application is done with it. Acks of one turn of the event loop leave in one frame.

        One that is given while there is no connection leaves at the next; one that is lost is made up for when
        the notification comes again.
        """
        self._acknowledge(notification)

    async def ack_upto(self, position: str) -> None:
        """The application has everything up to this position, of its plane: broadcasts have a `pos` that begins with
        ``b``, and an order of their own. Raises `BadPosition` for what is none.
        """
        plane, upto = parse(position)
        self._deliveries.acknowledge_upto(plane, upto)
        self._connection.acks.upto(plane, upto)

    def _acknowledge(self, notification: Notification) -> None:
        self._connection.acks.add(self._deliveries.acknowledge(notification))

    # Requests

    async def inbox(
        self,
        before: str | None = None,
        limit: int = 50,
        filter: Filter = "all",
        *,
        after: str | None = None,
        type: str | None = None,
        topic: str | None = None,
    ) -> InboxPage:
        """A page of the inbox: what is older than `before`, newest first, or newer than `after`, oldest first.

        Raises `RequestRefused` or `ConnectionLost`, as all requests do.
        """
        chosen = {"before": before, "after": after, "type": type, "topic": topic}
        given = {name: value for name, value in chosen.items() if value is not None}
        answer = await self._ask({"t": "inbox", "limit": limit, "filter": filter, **given})
        return InboxPage([InboxEntry.from_item(item) for item in answer["items"]], answer["next"])

    async def mark(self, positions: Sequence[str] | Literal["all"], as_: MarkAs) -> None:
        """Mark notifications as ``seen``, ``read``, ``unread`` or ``archived``, for all devices of the user.

        All at once can be seen, read or archived; that covers what is stored a moment later, too.
        """
        await self._ask({"t": "mark", "as": as_, "pos": positions if positions == "all" else list(positions)})

    async def count(self) -> int:
        """Unread notifications; 100 stands for more than 99."""
        unread: int = (await self._ask({"t": "count"}))["unread"]
        return unread

    # Topics

    async def subscribe(self, *topics: str) -> None:
        """Follow topics (``post.42``) and subtrees (``post.42.>``), for the user; in force when it returns.

        All of them or none. Raises `RequestRefused`, such as ``not_allowed`` or ``too_many_subscriptions``.
        """
        await self._ask({"t": "sub", "topics": list(topics)})

    async def unsubscribe(self, *topics: str) -> None:
        """Follow these no longer; what is not followed is no error."""
        await self._ask({"t": "unsub", "topics": list(topics)})

    async def subscriptions(self) -> AsyncGenerator[str, None]:
        """What the user follows, in the order of UTF-8 bytes; asks the gateway for some hundreds at a time."""
        following: str | None = None
        while True:
            given = {} if following is None else {"after": following}
            answer = await self._ask({"t": "subs", **given})
            for topic in answer["topics"]:
                yield topic
            following = answer["next"]
            if following is None:
                return

    async def _ask(self, frame: Frame) -> Frame:
        """Send a request, when there is a connection, and wait for its answer."""
        try:
            async with asyncio.timeout(self._timeout_s):
                await self._connection.connected.wait()
                if self._connection.link is None:
                    raise ConnectionLost("the client has no connection, and makes none any more")
                return await self._connection.requests.ask(self._connection.link, frame)
        except TimeoutError:
            raise ConnectionLost(f"no answer to `{frame['t']}` within {self._timeout_s:g} s") from None

    def _ended(self, task: asyncio.Task[None]) -> None:
        """A task of this client ended: what it raised is the loop's to raise."""
        error = None if task.cancelled() else task.exception()
        if error is not None and self._over is None:
            self._over = error
            self._connection.release()


def _address(url: str) -> str:
    """The gateway's WebSocket; raises `BadSettings` for what is no address."""
    parts = urlsplit(url)
    if parts.scheme not in ("ws", "wss", "http", "https") or not parts.hostname:
        raise BadSettings(
            f"the gateway's url is {url!r}: it must be like ws://127.0.0.1:8080 or wss://push.example.com"
        )
    path = parts.path.rstrip("/")
    return parts._replace(path=path if path.endswith(_PATH) else path + _PATH).geturl()
