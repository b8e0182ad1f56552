"""``POST /v1/publish`` and ``/v1/publish/batch``: answered when the log has stored it, durably.

All of a request is checked before any of it is sent. What is sent is sent at once, and each message is answered for
by itself: one that is not confirmed in time may be stored or not, and a retry with the same ids adds nothing to it.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from aiohttp import web

from tidings.publish import PublishRefused, Receipt
from tidings.wire.errors import TidingsError

from .answers import answer
from .backing import Backing
from .bodies import json_body, listed, members, parameters
from .gate import Call, Gate
from .idempotency import Idempotency, IdempotencyKey
from .limits import Room
from .orders import MAX_AT_ONCE, Order, OrderReader
from .problems import Refused

__all__ = ["Publishing"]


class Publishing:
    """The handlers; `gate` limits how much a service publishes."""

    def __init__(self, backing: Backing, gate: Gate) -> None:
        self._backing = backing
        self._gate = gate
        self._idempotency = Idempotency(backing.connection)
        self._room = Room(backing.settings.api_in_flight, "overloaded", "unconfirmed notifications")

    async def one(self, call: Call) -> web.Response:
        """One event, to a user, to several, or to a topic."""
        document, key = await self._read(call)
        order = self._reader(call, key).read(document)
        (content,), failures = await self._publish(call, key, document, [order])
        return _answer(content, failures)

    async def batch(self, call: Call) -> web.Response:
        """Several events, each to its own."""
        document, key = await self._read(call)
        given = members(document, (), required=("notifications",))["notifications"]
        reader = self._reader(call, key)
        orders = [
            reader.read(item, ("notifications", number), number)
            for number, item in enumerate(listed(given, ("notifications",), MAX_AT_ONCE))
        ]
        contents, failures = await self._publish(call, key, document, orders)
        return _answer({"results": contents}, failures)

    def _reader(self, call: Call, key: IdempotencyKey | None) -> OrderReader:
        around = call.request.headers.get("traceparent")
        return OrderReader(self._backing.check, call.service, key, self._backing.tracing, around)

    async def _read(self, call: Call) -> tuple[Any, IdempotencyKey | None]:
        parameters(call.request)
        key = self._idempotency.key_of(call)
        return await json_body(call.request, self._backing.settings), key

    async def _publish(
        self, call: Call, key: IdempotencyKey | None, document: Any, orders: Sequence[Order]
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
            outcomes = await self._backing.publisher.publish_ready(messages)
        self._record(orders, outcomes)
        failures = [outcome for outcome in outcomes if isinstance(outcome, TidingsError)]
        left = iter(outcomes)
        contents = [
            {"id": order.id, "results": [{order.kind: name, **_outcome(next(left))} for name in order.names]}
            for order in orders
        ]
        return contents, failures

    def _record(self, orders: Sequence[Order], outcomes: Sequence[Receipt | TidingsError]) -> None:
        backing = self._backing
        if backing.published is not None:
            backing.published(outcomes)
        if backing.tracing is None:
            return
        at = 0
        for order in orders:
            its = outcomes[at : at + len(order.messages)]
            at += len(its)
            problem = next((outcome for outcome in its if isinstance(outcome, TidingsError)), None)
            backing.tracing.end(order.span, problem, messaging__message__id=order.id)


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
