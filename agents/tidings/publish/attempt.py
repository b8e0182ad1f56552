"""One publish: what is sent, and what the answers to it mean."""

from __future__ import annotations

import asyncio
from collections.abc import Mapping
from datetime import datetime
from types import MappingProxyType
from typing import TYPE_CHECKING, Any, Final, NamedTuple, Self
from urllib.parse import quote

import orjson

from tidings.stream.consumers import status_of
from tidings.stream.topology import TOPICS, notify_stream
from tidings.wire import subject

if TYPE_CHECKING:
    from tidings.telemetry.tracing import Span

__all__ = ["Attempt", "Event", "Ready", "Receipt", "Verdict", "read_answer"]


class Receipt(NamedTuple):
    """The log has it, durably."""

    id: str
    stream: str
    seq: int
    duplicate: bool
    """It was there already: this was a retry."""


class Event(NamedTuple):
    """One notification of `Publisher.publish_many`."""

    user: str
    type: str
    data: Any = None
    id: str | None = None
    time: datetime | None = None
    attributes: Mapping[str, Any] = MappingProxyType({})
    """CloudEvents extension attributes: ``topic``, ``collapsekey``, ``priority`` …"""


class Ready(NamedTuple):
    """One message of `Publisher.publish_ready`."""

    where: str
    """Its subject, of `tidings.wire.subject`."""
    id: str
    """Of its event."""
    body: bytes
    """A CloudEvent, checked."""


class Verdict(NamedTuple):
    """What an answer means: stored in a stream; refused for good; or to be tried again."""

    stream: str | None = None
    seq: int = 0
    duplicate: bool = False
    problem: str = ""
    final: bool = False
    unheard: bool = False
    """No stream takes the subject. That is so while a cluster elects a leader, too."""
    is_closed: bool = False

    @classmethod
    def temporary(cls, problem: str) -> Self:
        return cls(problem=problem)

    @classmethod
    def forbidden(cls, attempt: Attempt) -> Self:
        """Of one that was sent again the log may have the first."""
        problem = (
            f"these NATS credentials may not publish to {attempt.where}: give their publisher that subject "
            "(`tidings topology nats-config --publisher`), or use those of another (nats_credentials, "
            "TIDINGS_NATS_CREDENTIALS)"
        )
        return cls(problem=problem, final=attempt.began == attempt.last_sent)

    @classmethod
    def closed(cls) -> Self:
        return cls(problem="the publisher was closed before", is_closed=True)


_NO_ANSWER: Final = Verdict(
    problem="no confirmation came: is JetStream running, and may these credentials publish there?"
)
_NO_STREAM: Final = Verdict(
    problem="no stream stores its subject: apply the topology (`tidings topology apply`), "
    "and check that the server's subject mapping is in force (`tidings doctor`)",
    unheard=True,
)
_TO_USER: Final = subject.notify_user("x").removesuffix("x")
_STREAMS: Final = notify_stream(0).removesuffix("0")

_STORE_FAILED: Final = 10077
_REASONS: Final = {
    10023: "NATS is out of storage: give JetStream more (max_file_store), or shorten stream_max_age_s",
    10047: "NATS is out of storage: give JetStream more (max_file_store), or shorten stream_max_age_s",
    10054: "it is larger than the log takes: send a reference instead of the content",
}
"""Refusals for good, whatever their status, with what to do."""
_IN_PROCESS: Final = 10158
"""The same message id is being stored at this moment: the next attempt finds it there."""
_TOO_MANY: Final = 429


def read_answer(header: bytes | None, payload: bytes) -> Verdict | None:
    """Read JetStream's confirmation, or the server's word that nobody is there to give one; None for anything else."""
    if header is not None and not payload:
        return _NO_STREAM if status_of(header)[0] == 503 else Verdict.temporary(header.decode(errors="replace"))
    try:
        answer = orjson.loads(payload)
        error = answer.get("error")
        if error is not None:
            return _refusal(error)
        stream = answer["stream"]
        if stream != TOPICS and not stream.startswith(_STREAMS):
            problem = (
                f"stream {stream} stored it, from which no device reads: the server's subject mapping is not in force, "
                "or that stream's subjects cover ours (`tidings doctor`)"
            )
            return Verdict(problem=problem, final=True)
        return Verdict(stream, answer["seq"], bool(answer.get("duplicate")))
    except (orjson.JSONDecodeError, KeyError, TypeError, AttributeError):
        return None


def _refusal(error: dict[str, Any]) -> Verdict:
    status, number = error.get("code", 0), error.get("err_code", 0)
    text = str(error.get("description", "no reason given"))
    if number in _REASONS:
        return Verdict(problem=f"{text}; {_REASONS[number]}", final=True)
    if number == _STORE_FAILED and "maximum" in text:
        hint = "the log is full: raise stream_max_bytes, or find out why notifications come so fast"
        return Verdict(problem=f"{text}; {hint}", final=True)
    again = status >= 500 or status == _TOO_MANY or number == _IN_PROCESS
    return Verdict(problem=text, final=not again)


class Attempt:
    """A publish under way: sent once or more, always under the same message id."""

    __slots__ = ("_answer", "began", "body", "header", "id", "key", "last_sent", "reply", "span", "where")

    def __init__(self, where: str, id: str, body: bytes, reply: str) -> None:
        self.where = where
        self.id = id
        self.body = body
        self.reply = reply
        self.key = reply.encode()
        # Users share a partition's stream, topics theirs, and an event's id may be in use at several: the message id
        # names both. A user's is short, and the same whether a service publishes to the user or to a topic.
        token = where.removeprefix(_TO_USER)
        self.header = f"NATS/1.0\r\nNats-Msg-Id: {token}/{quote(id, safe='')}\r\n\r\n".encode()
        self.span: Span | None = None
        """Of this publish, where it is traced."""
        self.began = 0.0
        self.last_sent = 0.0
        self._answer: asyncio.Future[Verdict] | None = None

    def sent(self, answer: asyncio.Future[Verdict], now: float) -> None:
        """It leaves now; `answer` is settled by whoever answers."""
        self._answer = answer
        self.last_sent = now
        self.began = self.began or now

    def settle(self, verdict: Verdict) -> None:
        """An answer came; the first counts."""
        if self._answer is not None and not self._answer.done():
            self._answer.set_result(verdict)

    async def verdict(self, until: float) -> Verdict:
        """The answer, or that there was none until then."""
        assert self._answer is not None
        if self._answer.done():
            return self._answer.result()
        timer = self._answer.get_loop().call_at(until, self.settle, _NO_ANSWER)
        try:
            return await self._answer
        finally:
            timer.cancel()
