"""What a publish asks for: one event and all whom it is for, checked whole before any of it is sent."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from datetime import UTC, datetime
from typing import TYPE_CHECKING, Any, Final, NamedTuple
from uuid import uuid4

import orjson

from tidings.identity import Caller
from tidings.publish import Ready
from tidings.wire import subject
from tidings.wire.errors import InvalidNotification
from tidings.wire.notification import Envelope
from tidings.wire.pointer import pointer_to

from .bodies import listed, members, text
from .idempotency import IdempotencyKey
from .problems import Path, Refused, located

if TYPE_CHECKING:
    from tidings.telemetry.tracing import Span, Tracing

__all__ = ["MAX_AT_ONCE", "Order", "OrderReader"]

MAX_AT_ONCE: Final = 1000
"""Most messages of one request: each user and each topic that is named is one."""
_TARGETS: Final = ("user", "users", "topic")
_LEAST: Final = -(2**31)
_MOST: Final = 2**31 - 1


class Order(NamedTuple):
    """One event and all whom it is for."""

    id: str
    kind: str
    """``user`` or ``topic``: what the names are."""
    names: Sequence[str]
    messages: Sequence[Ready]
    span: Span | None = None
    """Of its publish, where that is traced."""


class OrderReader:
    """Reads the orders of one request by `who`. `check` reads a finished event; raises `InvalidNotification`.

    `around` is the ``traceparent`` of the request, to which the spans of events that have none themselves belong.
    """

    def __init__(
        self,
        check: Callable[[bytes], Envelope],
        who: Caller,
        key: IdempotencyKey | None,
        tracing: Tracing | None = None,
        around: str | None = None,
    ) -> None:
        self._tracing = tracing
        self._around = around
        self._check = check
        self._who = who
        self._key = key

    def read(self, document: Any, at: Path = (), number: int = 0) -> Order:
        """The order at this place of the body, with its number there; raises `Refused` with what is wrong where."""
        given = members(document, at, required=("event",), optional=_TARGETS)
        chosen = [name for name in _TARGETS if name in given]
        if len(chosen) != 1:
            raise Refused("invalid_body", "give one of `user`, `users` and `topic`", pointer=pointer_to(*at))
        kind = chosen[0]
        names, subjects = _read_targets(given[kind], (*at, kind), kind)
        topic = names[0] if kind == "topic" else None
        self._allow(topic)
        span = self._trace(given["event"], topic, len(subjects))
        try:
            id_, body = self._read_event(given["event"], (*at, "event"), topic, number, span)
        except (Refused, InvalidNotification) as error:
            if self._tracing is not None:
                self._tracing.end(span, error)
            raise
        messages = [Ready(where, id_, body) for where in subjects]
        return Order(id_, "user" if topic is None else "topic", names, messages, span)

    def _trace(self, event: Any, topic: str | None, count: int) -> Span | None:
        if self._tracing is None or type(event) is not dict:
            return None
        template = "notify.user.{user}" if topic is None else "notify.topic.{topic}"
        return self._tracing.publish(template, count, event.get("traceparent", self._around))

    def _allow(self, topic: str | None) -> None:
        scopes = self._who.scopes
        if topic is None and not scopes.allows("publish:user"):
            raise Refused("not_allowed", "the token lacks the scope publish:user")
        if topic is not None and not scopes.allows_topic(topic):
            raise Refused("not_allowed", f"the token has no scope publish:topic: for {topic!r}")

    def _read_event(self, given: Any, at: Path, topic: str | None, number: int, span: Span | None) -> tuple[str, bytes]:
        """The event's id, and the event with what it may leave out."""
        if type(given) is not dict:
            raise Refused("invalid_body", "this must be an object: a CloudEvents 1.0 event", pointer=pointer_to(*at))
        if topic is not None and "topic" in given:
            raise Refused("invalid_body", "the event gets the topic that it goes to", pointer=pointer_to(*at, "topic"))
        event = {
            "specversion": "1.0",
            "id": str(uuid4()) if self._key is None else self._key.id_of(number),
            "source": self._who.name,
            "time": datetime.now(UTC).isoformat(),
        }
        with located(at):
            event.update((name, _attribute(name, value)) for name, value in given.items())
            if topic is not None:
                event["topic"] = topic
            if span is not None and self._tracing is not None:
                event.setdefault("traceparent", self._tracing.traceparent(span))
            try:
                body = orjson.dumps(event)
            except orjson.JSONEncodeError as error:
                raise InvalidNotification(f"the event cannot be written as JSON: {error}") from None
            return self._check(body).id, body


def _read_targets(given: Any, at: Path, kind: str) -> tuple[list[str], list[str]]:
    """Names and subjects. Who is named twice is one."""
    if kind == "users":
        places = {text(one, (*at, number)): (*at, number) for number, one in enumerate(listed(given, at, MAX_AT_ONCE))}
    else:
        places = {text(given, at): at}
    subjects = []
    for name, place in places.items():
        with located(place):
            subjects.append(subject.notify_topic(name) if kind == "topic" else subject.notify_user(name))
    return list(places), subjects


def _attribute(name: str, value: Any) -> Any:
    """An attribute as CloudEvents has them: a number is whole, also where it was written as 1.0, and has 32 bits."""
    if name == "data" or type(value) not in (int, float):
        return value
    if value % 1 or not _LEAST <= value <= _MOST:
        raise InvalidNotification(
            f"attribute `{name[:80]}` must be a whole number from {_LEAST} to {_MOST}; payload belongs under `data`",
            pointer_to(name),
        )
    return int(value)
