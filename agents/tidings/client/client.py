"""A device: connects, comes back, delivers each notification to the application and acknowledges it.

::

    async with Client("ws://127.0.0.1:8080", token) as client:
        async for notification in client:
            show(notification.type, notification.data)

The loop's body is the handler: a notification is acknowledged when the next one is asked for, when the loop is left
with ``break``, and not when the body raises: then it comes again. With ``auto_ack=False`` the application calls
`Client.ack`, as late as it likes; what it has not acknowledged within the gateway's `ack_wait` comes again with a
higher `attempt`.

Delivery is at least once; copies are dropped here by id while the memory of ids reaches (2,048 of them). A copy of
something that still waits in the queue, or is being handled, is not delivered a second time.
"""

from __future__ import annotations

import asyncio
import inspect
import logging
from collections import deque
from collections.abc import Awaitable, Callable, Sequence
from types import TracebackType
from typing import Any, Final, Literal, Self

import aiohttp
import orjson

from tidings.runtime.backoff import Backoff
from tidings.wire import codes
from tidings.wire.errors import ConnectionLost, RequestRefused, SessionClosed
from tidings.wire.frames import SUBPROTOCOL, Filter, MarkAs

from .models import Acknowledged, InboxEntry, InboxPage, Notification

__all__ = ["Client"]

TokenSource = str | Callable[[], str] | Callable[[], Awaitable[str]]
Callback = Callable[..., Awaitable[None] | None]

_ANSWER_S: Final = 10.0
_PONG_S: Final = 10.0

log = logging.getLogger("tidings.client")


class Client:
    """One device of one user. Use it as an asynchronous context manager and iterate over it.

    `token` is a device token, or a function (plain or asynchronous) that returns a fresh one: it is called at
    each connect, and once more when the gateway refuses the token. `on_gap(missed)` is told that more was missed
    than is pushed (None: an unknown number), so that the application pages the inbox; `on_count(unread)` and
    `on_state(positions, as_)` follow the badge and the marks of the user's other devices. `since` is a position up
    to which the application has everything.
    """

    def __init__(
        self,
        url: str,
        token: TokenSource,
        *,
        device: str | None = None,
        window: int | None = None,
        since: str | None = None,
        auto_ack: bool = True,
        on_gap: Callback | None = None,
        on_count: Callback | None = None,
        on_state: Callback | None = None,
        backoff: Backoff | None = None,
    ) -> None:
        self._url = url if url.rstrip("/").endswith("/v1/ws") else url.rstrip("/") + "/v1/ws"
        self._token = token
        self._hello = {
            name: value
            for name, value in (("device", device), ("window", window), ("since", since))
            if value is not None
        }
        self._auto_ack = auto_ack
        self._on_gap, self._on_count, self._on_state = on_gap, on_count, on_state
        self._backoff = backoff or Backoff(0.5, 15.0)
        self.welcome: dict[str, Any] = {}
        """The gateway's last welcome: session, user, device, unread, window."""
        self._http: aiohttp.ClientSession | None = None
        self._socket: aiohttp.ClientWebSocketResponse | None = None
        self._runner: asyncio.Task[None] | None = None
        self._connected = asyncio.Event()
        self._news = asyncio.Event()
        self._queue: deque[Notification] = deque()
        self._open: dict[str, Notification] = {}
        """Waiting in the queue, or being handled by the loop's body."""
        self._acknowledged = Acknowledged()
        self._current: Notification | None = None
        self._acks: list[str] = []
        self._sending: set[asyncio.Task[None]] = set()
        self._answers: dict[int, asyncio.Future[dict[str, Any]]] = {}
        self._ref = 0
        self._over: SessionClosed | None = None
        self._closed = False

    # Life

    async def open(self) -> None:
        """Begin to connect; returns at the first welcome. Raises `SessionClosed` when the gateway refuses for good."""
        self._http = aiohttp.ClientSession()
        self._runner = asyncio.create_task(self._run())
        welcomed = asyncio.create_task(self._connected.wait())
        await asyncio.wait([self._runner, welcomed], return_when=asyncio.FIRST_COMPLETED)
        welcomed.cancel()
        if self._over is not None:
            await self.close()
            raise self._over

    async def close(self) -> None:
        """Say goodbye and end. The session ends with it: nothing lingers. Closing twice is fine."""
        self._closed = True
        if self._sending:
            await asyncio.gather(*self._sending, return_exceptions=True)
        if self._socket is not None and not self._socket.closed:
            await self._socket.close()
        if self._runner is not None:
            self._runner.cancel()
            await asyncio.wait([self._runner])
        if self._http is not None:
            await self._http.close()
        self._news.set()

    async def __aenter__(self) -> Self:
        await self.open()
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if error is None:
            self._finish_current()
        await self.close()

    # Notifications

    def __aiter__(self) -> Self:
        return self

    async def __anext__(self) -> Notification:
        self._finish_current()
        while not self._queue:
            if self._over is not None:
                raise self._over
            if self._closed:
                raise StopAsyncIteration
            self._news.clear()
            await self._news.wait()
        notification = self._queue.popleft()
        if self._auto_ack:
            self._current = notification
        else:
            # Handed over: if the application forgets it, the gateway's next attempt is delivered again.
            self._open.pop(notification.id, None)
        return notification

    def _finish_current(self) -> None:
        current, self._current = self._current, None
        if current is not None:
            self.ack(current)

    def ack(self, notification: Notification) -> None:
        """The application is done with it. Acks of one turn of the event loop leave in one frame."""
        latest = self._open.pop(notification.id, notification)
        self._acknowledged.add(notification.id)
        self._send_ack(latest.position)

    def _send_ack(self, position: str) -> None:
        if not self._acks:
            asyncio.get_running_loop().call_soon(self._flush_acks)
        self._acks.append(position)

    def _flush_acks(self) -> None:
        acks, self._acks = self._acks, []
        task = asyncio.create_task(self._send({"t": "ack", "pos": acks}))
        self._sending.add(task)
        task.add_done_callback(self._sending.discard)

    # Requests

    async def inbox(self, *, before: str | None = None, limit: int = 50, filter: Filter = "all") -> InboxPage:
        """A page of the inbox, newest first. Raises `RequestRefused` or `ConnectionLost`, as all requests do."""
        answer = await self._ask({"t": "inbox", "limit": limit, "filter": filter, "before": before})
        items = [
            InboxEntry(item["n"], item["pos"], item["seen"], item["read"], item["archived"]) for item in answer["items"]
        ]
        return InboxPage(items, answer["next"])

    async def mark(self, positions: Sequence[str] | Literal["all"], as_: MarkAs) -> None:
        """Mark notifications as ``seen``, ``read``, ``unread`` or ``archived``, for all devices of the user."""
        await self._ask({"t": "mark", "as": as_, "pos": positions if positions == "all" else list(positions)})

    async def count(self) -> int:
        """Unread notifications; 100 stands for more than 99."""
        unread: int = (await self._ask({"t": "count"}))["unread"]
        return unread

    async def _ask(self, frame: dict[str, Any]) -> dict[str, Any]:
        try:
            async with asyncio.timeout(_ANSWER_S):
                await self._connected.wait()
                self._ref += 1
                ref = self._ref
                future = self._answers[ref] = asyncio.get_running_loop().create_future()
                try:
                    await self._send({**frame, "ref": ref})
                    answer: dict[str, Any] = await future
                finally:
                    self._answers.pop(ref, None)
        except TimeoutError:
            raise ConnectionLost(f"no answer to `{frame['t']}` within {_ANSWER_S:g} s") from None
        if answer["t"] == "error":
            raise RequestRefused(answer["code"], answer["message"], retry=codes.may_retry(answer["code"]))
        return answer

    async def _send(self, frame: dict[str, Any]) -> None:
        """What is sent to a broken connection is lost, as it may be on the wire: acks come again with their copy."""
        if self._socket is not None and not self._socket.closed:
            try:
                await self._socket.send_str(orjson.dumps(frame).decode())
            except (ConnectionError, aiohttp.ClientError) as error:
                log.debug("a frame was not sent: %s", error)

    # The connection

    async def _run(self) -> None:
        refreshed = False
        while not self._closed:
            delay: float | None = None
            code: int | None = None
            try:
                code, delay = await self._connection()
            except (aiohttp.ClientError, OSError, TimeoutError) as error:
                log.warning("no connection to %s: %s", self._url, error or type(error).__name__)
            if self._connected.is_set():
                refreshed = False
            self._disconnected()
            if code == codes.NOT_AUTHENTICATED.code and callable(self._token) and not refreshed:
                refreshed, delay = True, 0.0
            elif not codes.reconnects(code):
                self._end(code)
                return
            await asyncio.sleep(self._backoff.next() if delay is None else delay)

    async def _connection(self) -> tuple[int | None, float | None]:
        """One connection from handshake to close; its close code, and the delay that a `bye` asked for."""
        assert self._http is not None
        token = self._token() if callable(self._token) else self._token
        hello = {"t": "hello", "token": await token if inspect.isawaitable(token) else token, **self._hello}
        bye: float | None = None
        async with self._http.ws_connect(
            self._url, protocols=(SUBPROTOCOL,), compress=0, max_msg_size=0, timeout=aiohttp.ClientWSTimeout(ws_close=2)
        ) as socket:
            self._socket = socket
            await socket.send_str(orjson.dumps(hello).decode())
            while True:
                frame = await self._receive(socket)
                if frame is None:
                    return socket.close_code, bye
                if frame["t"] == "bye":
                    bye = frame["after_ms"] / 1000
                else:
                    await self._handle(frame)

    async def _receive(self, socket: aiohttp.ClientWebSocketResponse) -> dict[str, Any] | None:
        """The next frame; None at the end. A gateway that is silent for two heartbeats is asked whether it lives."""
        patience = 2 * self.welcome.get("heartbeat", 25)
        try:
            message = await socket.receive(patience)
        except TimeoutError:
            await self._send({"t": "ping"})
            try:
                message = await socket.receive(_PONG_S)
            except TimeoutError:
                log.warning("the gateway does not answer: connecting again")
                return None
        if message.type is not aiohttp.WSMsgType.TEXT:
            return None
        frame: dict[str, Any] = orjson.loads(message.data)
        return frame

    async def _handle(self, frame: dict[str, Any]) -> None:
        kind = frame["t"]
        if kind == "n":
            for item in frame["items"]:
                self._arrived(Notification.from_item(item))
        elif kind == "welcome":
            self.welcome = frame
            self._hello.setdefault("device", frame["device"])
            self._backoff.reset()
            self._connected.set()
        elif frame.get("ref") in self._answers and kind in ("ok", "error"):
            answer = self._answers[frame["ref"]]
            if not answer.done():
                answer.set_result(frame)
        elif kind == "count":
            await _call(self._on_count, frame["unread"])
        elif kind == "state":
            await _call(self._on_state, frame["pos"], frame["as"])
        elif kind == "gap":
            if self._on_gap is None:
                log.warning("%s notifications were missed and are not pushed: page the inbox", frame["missed"])
            await _call(self._on_gap, frame["missed"])
            if frame["pos"] is not None:
                await self._send({"t": "ack", "upto": frame["pos"]})

    def _arrived(self, notification: Notification) -> None:
        if notification.id in self._acknowledged:
            self._send_ack(notification.position)
        elif notification.id in self._open:
            # It waits or is being handled: only remember where its ack goes now.
            self._open[notification.id] = notification
        elif len(self._queue) >= 2 * self.welcome["window"]:
            # The gateway does not keep to the window; what is not acknowledged comes again.
            log.warning("%d notifications wait to be handled: one more is left to the gateway", len(self._queue))
        else:
            self._open[notification.id] = notification
            self._queue.append(notification)
            self._news.set()

    def _disconnected(self) -> None:
        self._connected.clear()
        self._socket = None
        for answer in self._answers.values():
            if not answer.done():
                answer.set_exception(ConnectionLost("the connection broke before the answer came"))

    def _end(self, code: int | None) -> None:
        known = codes.close_of(code or 0)
        if known is None or known.code != codes.NORMAL.code:
            name, meaning = (known.name, known.meaning) if known else ("unknown", "no reason given")
            self._over = SessionClosed(code or 0, name, meaning)
        self._closed = True
        self._news.set()


async def _call(callback: Callback | None, *arguments: object) -> None:
    if callback is not None:
        outcome = callback(*arguments)
        if outcome is not None:
            await outcome
