"""The life of one notification, as it was found; and what it comes to, in a word and a sentence."""

from __future__ import annotations

from dataclasses import asdict, dataclass, field
from typing import Any, Final, Literal

__all__ = ["DeviceState", "InInbox", "Looked", "OnDevice", "StoredAt", "Story", "Verdict"]

Verdict = Literal["delivered", "dead_letter", "under_way", "past", "stored", "unknown"]

DeviceState = Literal["acknowledged", "past", "given_up", "under_way", "waiting", "offline"]
"""``past``: acknowledged, or stored before the device's first connection ever, which the cursor does not tell apart."""

_WORDS: Final[dict[DeviceState, str]] = {
    "acknowledged": "has acknowledged it",
    "past": "is past it: acknowledged, or stored before the device's first connection",
    "given_up": "did not acknowledge it, in as many attempts as it gets: it is a dead letter",
    "under_way": "was sent it and has not acknowledged it yet",
    "waiting": "is online and was not sent it yet",
    "offline": "is offline and gets it when it connects",
}


@dataclass(frozen=True, slots=True)
class StoredAt:
    """Where the log has it."""

    stream: str
    sequence: int
    pos: str | None
    """The position that clients know; None in the stream of what services publish to topics, which has none."""
    user: str | None
    topic: str | None
    type: str | None
    stored: str
    """When: RFC 3339, UTC."""
    until: str | None
    """Until when the log keeps it; None for as long as it is."""
    message_id: str | None
    """`Nats-Msg-Id`: what made a publisher's retry one message."""


@dataclass(frozen=True, slots=True)
class InInbox:
    """The row of the user's inbox."""

    pos: str
    stored: str
    type: str | None
    topic: str | None
    seen: bool
    read: bool
    archived: bool
    delivered: dict[str, Any] | None
    """The first acknowledgement: ``at``, ``device``, ``attempts``; None of broadcasts, and while there is none."""


@dataclass(frozen=True, slots=True)
class OnDevice:
    """How far one device of the user is with it."""

    device: str
    pos: str
    state: DeviceState
    attempts: int
    """In front of a live client, as far as they were written down."""
    session: str | None
    gateway: str | None
    consumer: dict[str, int] | None
    """Of the session, where it has one: see `tidings.stream.consumers.Progress`."""

    @property
    def words(self) -> str:
        return _WORDS[self.state]


@dataclass(slots=True)
class Looked:
    """One place that was searched, and what that took."""

    where: str
    since: str | None
    """From when on; None where `where` says from which sequence."""
    messages: int
    complete: bool = True
    """False where the limit of messages ended the search before its end."""


@dataclass(slots=True)
class Story:
    """Everything that was found of one id."""

    id: str
    user: str | None
    since: str
    topics: list[StoredAt] = field(default_factory=list)
    """As services published it to a topic."""
    broadcasts: list[StoredAt] = field(default_factory=list)
    """As it went out to a topic's many subscribers at once."""
    log: list[StoredAt] = field(default_factory=list)
    """In users' own streams: published to them, or copies of what went to a topic."""
    copies: int = 0
    """How many of these there are: `log` has the first ones only."""
    inbox: list[InInbox] = field(default_factory=list)
    devices: list[OnDevice] = field(default_factory=list)
    dead: list[dict[str, Any]] = field(default_factory=list)
    """Dead letters, as `Letter.describe` has them, without the body."""
    looked: list[Looked] = field(default_factory=list)

    @property
    def verdict(self) -> Verdict:
        if any(row.delivered for row in self.inbox) or any(one.state == "acknowledged" for one in self.devices):
            return "delivered"
        if self.dead:
            return "dead_letter"
        if any(one.state == "under_way" for one in self.devices):
            return "under_way"
        if any(one.state == "past" for one in self.devices):
            return "past"
        if self.topics or self.broadcasts or self.log or self.inbox:
            return "stored"
        return "unknown"

    @property
    def summary(self) -> str:
        match self.verdict:
            case "delivered":
                return self._delivered()
            case "dead_letter":
                letter = self.dead[-1]
                return (
                    f"a dead letter, {letter['id']}, for {letter['reason']}: `tidings deadletters show {letter['id']}`"
                )
            case "under_way":
                return "sent to a device, which has not acknowledged it yet"
            case "past":
                names = ", ".join(one.device for one in self.devices if one.state == "past")
                return f"stored, and {names} {_WORDS['past']}"
            case "stored":
                return self._stored()
            case _:
                limited = "" if all(look.complete for look in self.looked) else ", as far as was looked"
                return f"not found{limited}: see below where, and since when. It was never accepted, or is past its age"

    def _delivered(self) -> str:
        for row in self.inbox:
            if row.delivered:
                at, device, attempts = (row.delivered[name] for name in ("at", "device", "attempts"))
                return f"delivered: {device} acknowledged it first, at {at}, at attempt {attempts}"
        names = ", ".join(one.device for one in self.devices if one.state == "acknowledged")
        return f"delivered: acknowledged by {names}"

    def _stored(self) -> str:
        if self.user is None:
            if self.broadcasts:
                return "stored, and broadcast to the topic's subscribers; --user says how far one of them is"
            if self.copies == 1:
                return f"stored for {self.log[0].user}; --user says how far that is"
            if self.log:
                return f"stored for {self.copies} users; --user says how far one of them is"
            return "stored for a topic: nobody had subscribed, or it waits for the fan-out agents"
        if not self.log and not self.inbox:
            return f"stored for a topic, and not for {self.user}: not subscribed, or it waits for the fan-out agents"
        where = "in the inbox" if self.inbox else "in the log, and waits for the inbox agents"
        if not self.devices:
            return f"stored, {where}; the user has no device"
        return f"stored, {where}; no device is known to have acknowledged it"

    def describe(self) -> dict[str, Any]:
        """As a JSON-ready object."""
        return {"verdict": self.verdict, "summary": self.summary, **asdict(self)}
