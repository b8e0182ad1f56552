"""The envelope: a CloudEvents 1.0 event in structured JSON mode, checked and never re-encoded.

Attributes: ``id``, ``source``, ``type``, ``specversion`` (always ``1.0``) are required;
``time``, ``subject``, ``datacontenttype``, ``dataschema`` and ``data`` are the standard's own; ``topic``,
``collapsekey``, ``priority``, ``expires`` and ``traceparent`` are the extensions that Tidings understands;
other extension attributes pass through. The body is UTF-8 JSON of at most 16 KiB, nested no deeper than 250 levels.

Source: CloudEvents 1.0.2, sections "Context Attributes" and "Type System".
"""

from __future__ import annotations

import re
from datetime import UTC, datetime
from typing import Any, Final, NamedTuple
from uuid import uuid4

import orjson

from .errors import InvalidNotification
from .pointer import pointer_to

__all__ = ["MAX_BODY_BYTES", "MAX_DEPTH", "MAX_NAME", "PRIORITIES", "Envelope", "build", "check", "read"]

MAX_BODY_BYTES: Final = 16 * 1024
MAX_DEPTH: Final = 250
"""Most levels of objects and lists, the event itself included: JSON libraries end at 255 and more."""
MAX_NAME: Final = 256
"""Longest ``id``, ``source`` and ``type``, in characters."""
PRIORITIES: Final = ("low", "normal", "high", "urgent")

_REQUIRED: Final = ("id", "source", "type")
_OPTIONAL_TEXT: Final = ("subject", "datacontenttype", "dataschema", "topic", "collapsekey", "traceparent")
_TIMES: Final = ("time", "expires")
_KNOWN: Final = frozenset((*_REQUIRED, *_OPTIONAL_TEXT, *_TIMES, "specversion", "data", "priority"))
_CHECKED: Final = frozenset((*_REQUIRED, "specversion", "data"))
_EXTENSION: Final = re.compile(r"[a-z0-9]{1,64}")


class Envelope(NamedTuple):
    """What the mesh reads of a notification; the body itself is passed on as it came."""

    id: str
    type: str
    topic: str | None


def check(body: bytes) -> Envelope:
    """Read the envelope of `body`; raises `InvalidNotification` with what is wrong and where."""
    return read(body)[0]


def read(body: bytes) -> tuple[Envelope, dict[str, Any]]:
    """Read the envelope of `body`, and the event as a whole; errors as `check`."""
    if len(body) > MAX_BODY_BYTES:
        raise InvalidNotification(f"the body has {len(body)} bytes: at most {MAX_BODY_BYTES} are allowed")
    try:
        event = orjson.loads(body)
    except orjson.JSONDecodeError as error:
        raise InvalidNotification(f"the body is not UTF-8 JSON: {error}") from None
    if type(event) is not dict:
        raise InvalidNotification("the body is not a JSON object")
    if body.count(b"[") + body.count(b"{") > MAX_DEPTH and _is_deep(event):
        raise InvalidNotification(f"the body is nested too deeply: at most {MAX_DEPTH} levels are allowed")
    if event.get("specversion") != "1.0":
        raise InvalidNotification(
            '`specversion` must be "1.0": send a CloudEvents 1.0 event in structured JSON mode', "/specversion"
        )
    for name in _REQUIRED:
        value = event.get(name)
        if type(value) is not str or not 0 < len(value) <= MAX_NAME:
            raise InvalidNotification(f"`{name}` must be a string of 1 to {MAX_NAME} characters", f"/{name}")
    # Most events hold nothing but the required attributes, `time` and `data`.
    for name in event.keys() - _CHECKED:
        if name in _KNOWN:
            _check_optional(name, event[name])
        else:
            _check_extension(name, event[name])
    return Envelope(event["id"], event["type"], event.get("topic")), event


def _is_deep(event: dict[str, Any]) -> bool:
    """If there are more than `MAX_DEPTH` levels."""
    level: list[Any] = [event]
    for _ in range(MAX_DEPTH):
        inner = (value for outer in level for value in (outer.values() if type(outer) is dict else outer))
        level = [value for value in inner if type(value) in (dict, list)]
        if not level:
            return False
    return True


def _check_optional(name: str, value: Any) -> None:
    if name in _TIMES:
        try:
            moment = datetime.fromisoformat(value) if type(value) is str else None
        except ValueError:
            moment = None
        if moment is None or moment.tzinfo is None:
            raise InvalidNotification(
                f"`{name}` must be an RFC 3339 time with its zone, such as 2026-01-31T12:00:00Z", f"/{name}"
            )
    elif name == "priority":
        if value not in PRIORITIES:
            raise InvalidNotification(f"`priority` must be one of {', '.join(PRIORITIES)}", "/priority")
    elif type(value) is not str or not value:
        raise InvalidNotification(f"`{name}` must be a string that is not empty", f"/{name}")


def _check_extension(name: str, value: Any) -> None:
    if name == "data_base64":
        if type(value) is not str:
            raise InvalidNotification("`data_base64` must be a string", "/data_base64")
    elif not _EXTENSION.fullmatch(name):
        raise InvalidNotification(
            f"{name[:80]!r} is no attribute name: CloudEvents allows a to z and 0 to 9; payload belongs under `data`",
            pointer_to(name),
        )
    elif value is not None and type(value) not in (str, int, bool):
        raise InvalidNotification(
            f"extension attribute `{name}` must be a string, integer or boolean; payload belongs under `data`",
            f"/{name}",
        )


def build(
    *,
    type: str,
    data: Any = None,
    source: str = "tidings",
    id: str | None = None,
    time: datetime | None = None,
    **attributes: Any,
) -> tuple[str, bytes]:
    """Make a notification's id and body; raises `InvalidNotification` before anything is sent.

    `id` defaults to a fresh UUID, `time` to now in UTC. `attributes` are extension attributes; those
    that are None are left out.
    """
    event: dict[str, Any] = {
        "specversion": "1.0",
        "id": str(uuid4()) if id is None else id,
        "source": source,
        "type": type,
        "time": (time or datetime.now(UTC)).isoformat(),
    }
    event.update((name, value) for name, value in attributes.items() if value is not None)
    if data is not None:
        event["data"] = data
    try:
        body = orjson.dumps(event)
    except orjson.JSONEncodeError as error:
        raise InvalidNotification(f"`data` cannot be written as JSON: {error}") from None
    check(body)
    return event["id"], body
