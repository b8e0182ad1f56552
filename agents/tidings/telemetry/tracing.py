"""Traces: W3C ``traceparent`` in the event, from the publish to the device's acknowledgement.

Sampling is decided once, where a message is published, and travels in the ``traceparent``: what was not sampled carries
none, or one with the flag 00, and costs everybody behind one search in its bytes. Spans follow OpenTelemetry's semantic
conventions of messaging; they name no user and no device.
"""

from __future__ import annotations

import random
import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any, Final

import orjson
from opentelemetry import trace
from opentelemetry.context import Context
from opentelemetry.trace import Link, NonRecordingSpan, Span, SpanContext, SpanKind, StatusCode, TraceFlags, Tracer

__all__ = ["Parent", "Span", "Tracing"]

Parent = SpanContext
"""Where a span goes on from, in this process or another one."""

_NAME: Final = b"traceparent"
_SAMPLED: Final = re.compile(rb'"traceparent"\s*:\s*"00-[0-9a-f]{32}-[0-9a-f]{16}-[0-9a-f][13579bdf]"')
_TRACEPARENT: Final = re.compile(r"00-([0-9a-f]{32})-([0-9a-f]{16})-([0-9a-f]{2})")


def _parse(text: Any) -> Parent | None:
    """The span that a ``traceparent`` names; None for what is none, or is not sampled."""
    found = _TRACEPARENT.fullmatch(text) if isinstance(text, str) else None
    if found is None or not int(found[3], 16) & 1:
        return None
    parent = SpanContext(int(found[1], 16), int(found[2], 16), is_remote=True, trace_flags=TraceFlags(1))
    return parent if parent.is_valid else None


class Tracing:
    """Begins spans. `tracer` is, where none is given, that of the application's own OpenTelemetry.

    `ratio` is the share of messages published without a trace around them that begin one.
    """

    def __init__(self, tracer: Tracer | None = None, ratio: float = 1.0) -> None:
        self._tracer = trace.get_tracer("tidings") if tracer is None else tracer
        self._ratio = ratio

    @staticmethod
    def sampled(body: bytes) -> Parent | None:
        """Where the trace of a message goes on from; None for one that is not sampled: nearly always, and at once."""
        if _NAME not in body or _SAMPLED.search(body) is None:
            return None
        # It may be somewhere in the payload.
        event = orjson.loads(body)
        return _parse(event.get("traceparent")) if type(event) is dict else None

    def publish(self, template: str, count: int = 1, given: Any = None) -> Span | None:
        """The span of a publish, if it is sampled: as `given` (a ``traceparent``) says, or the span around the call,
        or by chance where there is neither."""
        parent: Parent | None = None
        if given is not None:
            parent = _parse(given)
            if parent is None:
                return None
        else:
            around = trace.get_current_span().get_span_context()
            if around.is_valid:
                if not around.trace_flags.sampled:
                    return None
                parent = around
            elif random.random() >= self._ratio:
                return None
        span = self.start(f"publish {template}", "send", parent=parent, template=template)
        if count > 1:
            span.set_attribute("messaging.batch.message_count", count)
        return span if span.get_span_context().trace_flags.sampled else None

    def start(
        self,
        name: str,
        operation: str,
        *,
        parent: Parent | None = None,
        links: Sequence[Parent] = (),
        template: str = "",
        group: str = "",
        **attributes: str | int,
    ) -> Span:
        """Begin a span of a message: a root where there is no `parent`. `operation` is of the semantic conventions
        (send, receive, process, settle), and its own name is the first word of `name`."""
        kind = SpanKind.PRODUCER if operation == "send" else SpanKind.CONSUMER
        found: dict[str, str | int] = {
            "messaging.system": "nats",
            "messaging.operation.name": name.partition(" ")[0],
            "messaging.operation.type": operation,
            **{f"messaging.{key.replace('__', '.')}": value for key, value in attributes.items()},
        }
        if template:
            found["messaging.destination.template"] = template
        if group:
            found["messaging.consumer.group.name"] = group
        context = Context() if parent is None else trace.set_span_in_context(NonRecordingSpan(parent), Context())
        return self._tracer.start_span(name, context, kind, found, [Link(one) for one in links])

    @staticmethod
    def ids(span: Span) -> tuple[int, int]:
        """Of its trace and of itself, for an exemplar."""
        found = span.get_span_context()
        return found.trace_id, found.span_id

    @staticmethod
    def traceparent(span: Span, *, sampled: bool = True) -> str:
        """The W3C field that names this span."""
        found = span.get_span_context()
        return f"00-{found.trace_id:032x}-{found.span_id:016x}-{'01' if sampled else '00'}"

    @classmethod
    def handed_on(cls, body: bytes, span: Span, *, sampled: bool = True) -> bytes:
        """The event, whose trace goes on from `span`. It had a ``traceparent``, so it does not grow."""
        event = orjson.loads(body)
        event["traceparent"] = cls.traceparent(span, sampled=sampled)
        return orjson.dumps(event)

    @contextmanager
    def within(self, span: Span | None) -> Iterator[None]:
        """What is logged and published in here belongs to the span."""
        if span is None:
            yield
        else:
            with trace.use_span(span, end_on_exit=False, record_exception=False, set_status_on_exception=False):
                yield

    @staticmethod
    def end(span: Span | None, problem: BaseException | str | None = None, **attributes: str | int) -> None:
        """End a span, if there is one. The text of an error may name users: only its kind is kept."""
        if span is None:
            return
        for name, value in attributes.items():
            span.set_attribute(name.replace("__", "."), value)
        if problem is not None:
            kind = problem if isinstance(problem, str) else str(getattr(problem, "code", type(problem).__name__))
            span.set_attribute("error.type", kind)
            span.set_status(StatusCode.ERROR)
        span.end()
