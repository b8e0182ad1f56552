"""One dead letter: what its headers say, and whether it is meant."""

from __future__ import annotations

import base64
from collections.abc import Mapping
from datetime import datetime
from typing import Any, Final, NamedTuple

import orjson

from tidings.wire import subject
from tidings.wire.errors import BadSubject, BadTopic

__all__ = ["EVERYTHING", "Filter", "Letter", "readable"]


class Letter(NamedTuple):
    """A dead letter as it lies in ``DEAD``."""

    sequence: int
    """Its id."""
    plane: str
    """``user`` for one user's, ``topic`` for what could not be sent out, ``broadcast`` for what could not be kept."""
    stored: str
    """When it became a dead letter: RFC 3339, UTC, to the nanosecond."""
    headers: Mapping[str, str]
    body: bytes
    """The original bytes."""

    @property
    def reason(self) -> str:
        """A code: ``invalid_notification``, ``bad_subject``, ``bad_topic``, ``rows_refused``, ``undelivered`` …"""
        return self.headers.get("Tidings-Reason", "unknown")

    @property
    def detail(self) -> str:
        return self.headers.get("Tidings-Detail", "")

    @property
    def attempts(self) -> int:
        return _number(self.headers.get("Tidings-Attempts")) or 0

    @property
    def origin(self) -> str | None:
        """The subject under which the log had it; None for a broadcast that one device did not acknowledge."""
        return self.headers.get("Tidings-Origin-Subject")

    @property
    def user(self) -> str | None:
        """Whose it was; None for a topic's, and where the subject names nobody."""
        return _named(self.headers.get("Tidings-User") or subject.token_of(self.origin or ""))

    @property
    def device(self) -> str | None:
        """The device that did not acknowledge it, of ``undelivered`` ones."""
        return _named(self.headers.get("Tidings-Device"))

    @property
    def topic(self) -> str | None:
        """The topic that it was published to; None for a user's, and where the subject names none."""
        try:
            return None if self.origin is None or subject.token_of(self.origin) else subject.topic_of(self.origin)
        except BadTopic:
            return None

    def describe(self, *, body: bool = True) -> dict[str, Any]:
        """As a JSON-ready object; the bytes as `readable` has them."""
        return {
            "id": self.sequence,
            "plane": self.plane,
            "reason": self.reason,
            "detail": self.detail,
            "stored": self.stored,
            "user": self.user,
            "topic": self.topic,
            "device": self.device,
            "origin": self.origin,
            "stream": self.headers.get("Tidings-Stream"),
            "sequence": _number(self.headers.get("Tidings-Sequence")),
            "attempts": self.attempts,
            **(readable(self.body) if body else {}),
        }


def _named(token: str | None) -> str | None:
    try:
        return subject.unescape(token) if token else None
    except BadSubject:
        return None


def _number(text: str | None) -> int | None:
    return int(text) if text is not None and text.isdecimal() else None


def readable(body: bytes) -> dict[str, Any]:
    """A message's bytes in a JSON-ready object: as ``notification`` where they are JSON, else as ``base64``.

    JSON that is nested too deeply to be written again comes as ``base64`` too.
    """
    try:
        content = orjson.loads(body)
        orjson.dumps([[[content]]])
    except (orjson.JSONDecodeError, orjson.JSONEncodeError):
        return {"base64": base64.b64encode(body).decode()}
    return {"notification": content}


class Filter(NamedTuple):
    """Which letters are meant: those to which all that is given applies."""

    plane: str | None = None
    reason: str | None = None
    user: str | None = None
    topic: str | None = None
    since: datetime | None = None
    """Not older than this; with a time zone."""
    until: datetime | None = None
    """Older than this; with a time zone."""

    def matches(self, letter: Letter) -> bool:
        wanted = ((self.plane, "plane"), (self.reason, "reason"), (self.user, "user"), (self.topic, "topic"))
        if any(value is not None and getattr(letter, name) != value for value, name in wanted):
            return False
        if self.since is None and self.until is None:
            return True
        stored = datetime.fromisoformat(letter.stored)
        return (self.since is None or stored >= self.since) and (self.until is None or stored < self.until)


EVERYTHING: Final = Filter()
