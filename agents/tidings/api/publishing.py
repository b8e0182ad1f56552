"""``POST /v1/publish`` and ``/v1/publish/batch``: answered when the log has stored it, durably.

All of a request is checked before any of it is sent. What is sent is sent at once, and each message is answered for
by itself: one that is not confirmed in time may be stored or not, and a retry with the same ids adds nothing to it.
"""

from __future__ import annotations

from collections.abc import Sequence
from datetime import UTC, datetime
from typing import Any, Final, NamedTuple
from uuid import uuid4

import orjson
from aiohttp import web

from tidings.identity import Caller
from tidings.publish import PublishRefused, Ready, Receipt
from tidings.wire import notification, subject
from tidings.wire.errors import InvalidNotification, TidingsError

from .answers import answer
from .backing import Backing
from .bodies import json_body, listed, members, text
from .gate import Call, Gate
from .idempotency import Idempotency, IdempotencyKey
from .limits import Room
from .problems import Path, Refused, located, pointer_to

__all__ = ["MAX_AT_ONCE", "Publishing"]

MAX_AT_ONCE: Final = 1000
"""Most messages of one request: each user and each topic that is named is one."""
_LEAST: Final = -(2**31)
_MOST: Final = 2**31 - 1
_TARGETS: Final = ("user", "users", "topic")


class _Order(NamedTuple):
    """One event and all whom it is for."""

    id: str
    kind: str
    """``user`` or ``topic``: what the names are."""
    names: Sequence[str]
    messages: Sequence[Ready]


class Publishing:
    """The handlers; `gate` limits how much a service publishes."""

    def __init__(self, backing: Backing, gate: Gate) -> None:
        self._backing = backing
        self._gate = gate
        self._idempotency = Idempotency(backing.connection)
        self._room = Room(backing.settings.api_in_flight, "overloaded", "unconfirmed notifications")

    async def one(self, call: Call) -> web.Response:
        """One event, to a user, to several, or to a topic."""
        document = await json_body(call.request, self._backing.settings)
        key = self._idempotency.key_of(call)
        order = _read_order(document, (), call.service, key, 0)
        (outcomes,), failures = await self._publish(call, key, document, [order])
        return _answer(outcomes, failures)

    async def batch(self, call: Call) -> web.Response:
        """Several events, each to its own."""
        document = await json_body(call.request, self._backing.settings)
        key = self._idempotency.key_of(call)
        given = members(document, (), required=("notifications",))["notifications"]
        orders = [
            _read_order(item, ("notifications", number), call.service, key, number)
            for number, item in enumerate(listed(given, ("notifications",), MAX_AT_ONCE))
        ]
        outcomes, failures = await self._publish(call, key, document, orders)
        return _answer({"results": outcomes}, failures)

    async def _publish(
        self, call: Call, key: IdempotencyKey | None, document: Any, orders: Sequence[_Order]
    ) -> tuple[list[dict[str, Any]], list[TidingsError]]:
        """What became of each order, ready for the answer; and what was not confirmed, in their order."""
        messages = [message for order in orders for message in order.messages]
        if len(messages) > MAX_AT_ONCE:
            raise Refused(
                "invalid_body",
                f"these are {len(messages)} notifications: send at most {MAX_AT_ONCE} at a time",
                pointer="/notifications",
            )
        self._gate.take_notifications(call, len(messages))
        with self._room.of(units=len(messages)):
            if key is not None:
                await self._idempotency.claim(key, call.request.path, document)
            outcomes = iter(await self._backing.publisher.publish_ready(messages))
        failures: list[TidingsError] = []
        answers = []
        for order in orders:
            results = []
            for name in order.names:
                outcome = next(outcomes)
                results.append({order.kind: name, **_outcome(outcome)})
                if isinstance(outcome, TidingsError):
                    failures.append(outcome)
            answers.append({"id": order.id, "results": results})
        return answers, failures


def _outcome(outcome: Receipt | TidingsError) -> dict[str, Any]:
    """``stored`` is null for what may be stored or not."""
    if isinstance(outcome, Receipt):
        return {"stored": True, "duplicate": outcome.duplicate}
    stored = False if isinstance(outcome, PublishRefused) else None
    return {"stored": stored, "code": outcome.code, "detail": str(outcome)}


def _answer(content: dict[str, Any], failures: Sequence[TidingsError]) -> web.Response:
    if not failures:
        return answer(content)
    unsure = [failure for failure in failures if not isinstance(failure, PublishRefused)]
    first = (unsure or failures)[0]
    raise Refused(
        first.code,
        f"{len(failures)} were not confirmed, the first because: {first}. `results` says which; send the request again "
        "with its Idempotency-Key, or with the ids of the events, and what is stored already is stored once",
        **content,
    )


def _read_order(document: Any, at: Path, who: Caller, key: IdempotencyKey | None, number: int) -> _Order:
    """One event with its targets, checked; raises `Refused` with the place of what is wrong."""
    given = members(document, at, required=("event",), optional=_TARGETS)
    chosen = [name for name in _TARGETS if name in given]
    if len(chosen) != 1:
        raise Refused("invalid_body", "give one of `user`, `users` and `topic`", pointer=pointer_to(*at))
    kind = chosen[0]
    names, subjects = _read_targets(given[kind], (*at, kind), kind)
    topic = names[0] if kind == "topic" else None
    if topic is None and not who.scopes.allows("publish:user"):
        raise Refused("not_allowed", "the token lacks the scope publish:user")
    if topic is not None and not who.scopes.allows_topic(topic):
        raise Refused("not_allowed", f"the token has no scope publish:topic: for {topic!r}")
    id_, body = _read_event(given["event"], (*at, "event"), who, topic, key.id_of(number) if key else str(uuid4()))
    messages = [Ready(where, id_, body) for where in subjects]
    return _Order(id_, "user" if topic is None else "topic", names, messages)


def _read_targets(given: Any, at: Path, kind: str) -> tuple[list[str], list[str]]:
    """Names and subjects. Who is named twice is one."""
    if kind == "users":
        names = [text(one, (*at, number)) for number, one in enumerate(listed(given, at, MAX_AT_ONCE))]
        places = {name: (*at, number) for number, name in reversed(list(enumerate(names)))}
        names = list(dict.fromkeys(names))
    else:
        names, places = [text(given, at)], {}
    subjects = []
    for name in names:
        with located(places.get(name, at)):
            subjects.append(subject.notify_topic(name) if kind == "topic" else subject.notify_user(name))
    return names, subjects


def _read_event(given: Any, at: Path, who: Caller, topic: str | None, id_: str) -> tuple[str, bytes]:
    """The event with what it may leave out, and its id."""
    if type(given) is not dict:
        raise Refused("invalid_body", "this must be an object: a CloudEvents 1.0 event", pointer=pointer_to(*at))
    event = {"specversion": "1.0", "id": id_, "source": who.name, "time": datetime.now(UTC).isoformat()}
    with located(at):
        event.update((name, _attribute(name, value)) for name, value in given.items())
    if topic is not None:
        if "topic" in event:
            raise Refused("invalid_body", "the event gets the topic that it goes to", pointer=pointer_to(*at, "topic"))
        event["topic"] = topic
    with located(at):
        try:
            body = orjson.dumps(event)
        except orjson.JSONEncodeError as error:
            raise InvalidNotification(f"the event cannot be written as JSON: {error}") from None
        return notification.check(body).id, body


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
