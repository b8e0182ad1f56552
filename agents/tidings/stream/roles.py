"""Who may publish and subscribe to what: each agent, the operator, and each service that publishes.

The agents and the operator share an account, in which the streams are. There each has a list of what it may publish
and what it may subscribe to, line by line what its code does, and no more. What is on no list is refused.

A service has an account of its own, into which only the subjects that it may publish to are imported. A list would not
do for it: JetStream sends its confirmation to any reply subject that comes with a message, and a list does not look at
that. With ``revoked.user.alice`` as reply subject a service of the same account would revoke a user's tokens. Across
accounts the confirmation goes to the service's own account, whatever the reply subject.

The mapping of ``notify.user.*`` comes before the list is looked at, so who publishes to users inside of the agents'
account needs ``part.*.user.*``.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Final, NamedTuple, Self

from tidings.wire import subject
from tidings.wire.errors import BadSettings, BadSubject, BadTopic
from tidings.wire.topic import check_pattern

from .topology import BROADCAST, DEAD, DECISIONS, FANOUT, INBOX, KEYS, REVOCATIONS, TOPICS, notify_stream

__all__ = ["NAME", "PUBLISHER_KEY", "SYSTEM", "Line", "Publisher", "Role", "agents"]

NAME: Final = re.compile(r"[a-z0-9][a-z0-9_-]{0,62}")
"""Of a publisher: it names an account and a file."""

SYSTEM: Final = "system"
"""The user of the server's own account, which is none of ours."""

PUBLISHER_KEY: Final = "publisher-"
"""What the name of a publisher's key begins with."""

_ALL_USERS: Final = "*"
_ALL_TOPICS: Final = ">"
_API: Final = "$JS.API."
_ACK: Final = "$JS.ACK."
_NUMBERS: Final = ".*.*.*.*.*"
"""Attempt, sequences, time and pending messages of an acknowledgement. Not ``>``: the longer form that nats-server has
behind ``js_ack_fc_v2`` names the stream further behind, where the list would not see it."""


class Line(NamedTuple):
    """A subject, or a pattern of subjects, and what for."""

    subject: str
    why: str


@dataclass(frozen=True, slots=True)
class Role:
    """What the programs of one kind may do in the agents' account."""

    name: str
    publish: tuple[Line, ...]
    subscribe: tuple[Line, ...]
    never: tuple[Line, ...] = ()
    """What it may not publish, although `publish` has it."""
    answers: bool = False
    """It may answer requests: once, for a moment, to the reply subject that came with each."""


def agents(partitions: int) -> tuple[Role, ...]:
    """All roles of the agents' account, for a mesh of so many partitions."""
    personal = tuple(map(notify_stream, range(partitions)))
    return (_gateway(partitions), _inbox(personal), _fanout(), _api(personal), _operator())


def _gateway(partitions: int) -> Role:
    consumers = f"{_API}CONSUMER."
    publish = [
        Line(f"{_API}STREAM.LIST", "find out which streams there are"),
        *_floors(map(notify_stream, range(partitions))),
        Line(f"{_API}STREAM.MSG.GET.{BROADCAST}", "read a broadcast that the feed no longer has"),
        Line(f"{consumers}CREATE.{BROADCAST}.*", "make the feed's consumer"),
        *_own_consumers(BROADCAST, "of the feed"),
    ]
    for number in range(partitions):
        stream = notify_stream(number)
        where = subject.part_user("*", number)
        publish.append(Line(f"{consumers}CREATE.{stream}.*.{where}", "make a session's consumer, of one user"))
        publish += _own_consumers(stream, "of a session")
        publish.append(Line(f"{_ACK}{stream}.*{_NUMBERS}", "acknowledge what a device has"))
    return Role(
        "gateway",
        publish=(
            *publish,
            *_revocations(),
            Line(subject.dead("user"), "keep what a device does not acknowledge"),
            Line(subject.dead("broadcast"), "the same of broadcasts"),
            Line(subject.presence("*"), "say who comes and goes"),
            Line(subject.gateway_claim("*"), "ask another gateway for a device"),
            Line(subject.gateway_topics("*"), "have another gateway read what a user follows"),
            Line(subject.gateway_user("*"), "tell a user's devices on other gateways"),
        ),
        # The inbox agents' consumers are in the same streams: whoever acknowledges for them loses notifications.
        never=(
            Line(f"{consumers}CREATE.*.{INBOX}", "the inbox agents' consumer stays as it is"),
            Line(f"{consumers}CREATE.*.{INBOX}.>", "the same"),
            Line(f"{consumers}DELETE.*.{INBOX}", "the same"),
            Line(f"{consumers}MSG.NEXT.*.{INBOX}", "what the inbox agents are to store is theirs"),
            Line(f"{_ACK}*.{INBOX}.>", "what is not stored is not acknowledged"),
        ),
        subscribe=(
            _answers("gateway"),
            Line(subject.gateway_wildcard("*"), "receive for its sessions; its name is a new one at each start"),
            Line(subject.INBOX_FLOOR, "learn up to where the store has everything"),
        ),
        answers=True,
    )


def _inbox(personal: tuple[str, ...]) -> Role:
    publish = [Line(f"{_API}STREAM.LIST", "find out which streams there are")]
    for stream in (*personal, BROADCAST):
        publish += (
            *_shared_consumer(stream, INBOX, "store"),
            Line(f"{_API}STREAM.INFO.{stream}", "compare its end with what the store has"),
            Line(f"{_API}STREAM.UPDATE.{stream}", "give it a new incarnation when it lost its end"),
        )
    return Role(
        "inbox",
        publish=(
            *publish,
            Line(subject.dead("user"), "keep what cannot be stored"),
            Line(subject.dead("broadcast"), "the same of broadcasts"),
            Line(subject.INBOX_FLOOR, "say up to where the store has everything"),
        ),
        subscribe=(
            _answers("inbox"),
            Line(subject.inbox_pull("*", "*", "*"), "receive what it asked for"),
            Line(subject.broadcast_pull("*", "*"), "the same of broadcasts"),
            Line(subject.INBOX_FLOOR, "hear whether another one has said it"),
        ),
    )


def _fanout() -> Role:
    return Role(
        "fanout",
        publish=(
            Line(f"{_API}STREAM.LIST", "find out which streams there are"),
            *_shared_consumer(TOPICS, FANOUT, "copy"),
            Line(f"{_API}STREAM.MSG.GET.{DECISIONS}", "read what another one has decided"),
            Line(subject.DECIDED, "decide how a message goes out"),
            Line(subject.part_user("*", "*"), "make the copies: notify.user.* is mapped to this"),
            Line(subject.BROADCAST_WILDCARD, "make broadcasts"),
            Line(subject.dead("topic"), "keep what cannot be sent"),
        ),
        subscribe=(_answers("fanout"), Line(subject.fanout_pull("*", "*"), "receive what it asked for")),
    )


def _api(personal: tuple[str, ...]) -> Role:
    return Role(
        "api",
        publish=(
            Line(f"{_API}STREAM.LIST", "find out which streams there are"),
            Line(f"{_API}CONSUMER.INFO.{TOPICS}.{FANOUT}", "see that topics are served"),
            *_floors(personal),
            *_revocations(),
            *_letters(),
            Line(subject.part_user("*", "*"), "publish to users: notify.user.* is mapped to this"),
            Line(subject.TOPICS_WILDCARD, "publish to topics"),
            Line(subject.CLAIMED, "note what an idempotency key came with"),
            Line(f"{_API}STREAM.MSG.GET.{KEYS}", "read what it came with first"),
            Line(subject.REVOKED_WILDCARD, "revoke tokens, for services with that scope"),
            Line(subject.gateway_topics("*"), "have gateways read what a user follows"),
            Line(subject.gateway_user("*"), "tell a user's devices of marks"),
        ),
        subscribe=(_answers("api"), Line(subject.INBOX_FLOOR, "learn up to where the store has everything")),
    )


def _operator() -> Role:
    return Role(
        "operator",
        publish=(
            Line(f"{_API}>", "make and change streams, look at them, erase users"),
            Line(
                subject.part_user("*", "*"), "replay dead letters, probe the mapping: notify.user.* is mapped to this"
            ),
            Line(subject.NOTIFY_WILDCARD, "see that a mapping is missing"),
            Line(subject.TOPICS_WILDCARD, "replay dead letters of topics"),
            Line(subject.REVOKED_WILDCARD, "revoke tokens"),
        ),
        subscribe=(
            _answers(subject.OPERATOR),
            Line(subject.part_user("*", "*"), "see where a probe of the mapping goes"),
            Line(subject.NOTIFY_WILDCARD, "see that it goes nowhere"),
            Line(subject.INBOX_FLOOR, "see that inbox agents say up to where the store has everything"),
        ),
    )


def _answers(role: str) -> Line:
    return Line(f"{subject.replies(role)}.>", "get the answers to its own requests")


def _floors(personal: Iterator[str] | tuple[str, ...]) -> Iterator[Line]:
    for stream in (*personal, BROADCAST):
        yield Line(f"{_API}STREAM.INFO.{stream}", "learn its last sequence")
        yield Line(f"{_API}CONSUMER.INFO.{stream}.{INBOX}", "learn up to where the store has it")


def _own_consumers(stream: str, whose: str) -> tuple[Line, ...]:
    return (
        Line(f"{_API}CONSUMER.INFO.{stream}.*", f"see that the consumer {whose} is there"),
        Line(f"{_API}CONSUMER.MSG.NEXT.{stream}.*", f"pull from the consumer {whose}"),
        Line(f"{_API}CONSUMER.DELETE.{stream}.*", f"forget the consumer {whose}"),
    )


def _shared_consumer(stream: str, name: str, what_for: str) -> tuple[Line, ...]:
    return (
        Line(f"{_API}CONSUMER.INFO.{stream}.{name}", "see that the shared consumer is there, and its ack floor"),
        Line(f"{_API}CONSUMER.MSG.NEXT.{stream}.{name}", f"pull what is to {what_for}"),
        Line(f"{_ACK}{stream}.{name}{_NUMBERS}", "acknowledge it"),
    )


def _revocations() -> tuple[Line, ...]:
    return (
        Line(f"{_API}STREAM.INFO.{REVOCATIONS}", "see that revocations are kept for long enough"),
        Line(f"{_API}STREAM.MSG.GET.{REVOCATIONS}", "see that none is missing"),
        Line(f"{_API}DIRECT.GET.{REVOCATIONS}", "follow them"),
    )


def _letters() -> tuple[Line, ...]:
    return (
        Line(f"{_API}STREAM.INFO.{DEAD}", "count dead letters"),
        Line(f"{_API}STREAM.MSG.GET.{DEAD}", "show one"),
        Line(f"{_API}DIRECT.GET.{DEAD}", "list them"),
        Line(f"{_API}STREAM.MSG.DELETE.{DEAD}", "drop one, and take out what was replayed"),
    )


@dataclass(frozen=True, slots=True)
class Publisher:
    """A service that publishes over NATS, and to whom."""

    name: str
    users: tuple[str, ...] = ()
    """User ids, or ``*`` for all users."""
    topics: tuple[str, ...] = ()
    """Topics and subtrees (``shop.>``), or ``>`` for all topics."""

    def __post_init__(self) -> None:
        if not NAME.fullmatch(self.name):
            raise BadSettings(
                f"{self.name!r} is no name of a publisher: give 1 to 63 of a-z, 0-9, - and _, beginning with a letter "
                "or a digit"
            )
        if self.name in (*subject.AGENTS, subject.OPERATOR, SYSTEM):
            raise BadSettings(f"a publisher cannot be named {self.name}: that is a role of the mesh's own")
        if not self.users and not self.topics:
            raise BadSettings(
                f"the publisher {self.name} may publish to nobody: give users or topics, such as {self.name}:user:* or "
                f"{self.name}:topic:{self.name}.>"
            )
        self.subjects()

    @classmethod
    def parse(cls, text: str) -> Self:
        """A publisher of a text like ``shop:user:*,topic:shop.>``; raises `BadSettings`."""
        name, _, rest = text.partition(":")
        found: dict[str, list[str]] = {"user": [], "topic": []}
        for item in rest.split(","):
            kind, colon, pattern = item.partition(":")
            if kind not in found or not colon:
                raise BadSettings(
                    f"{text!r} is no publisher: write NAME:user:USER or NAME:topic:TOPIC, and more of them behind "
                    "commas, such as shop:user:*,topic:shop.> (what has a comma in it goes into the file)"
                )
            found[kind].append(pattern)
        return cls(name, tuple(found["user"]), tuple(found["topic"]))

    @property
    def key(self) -> str:
        """What its key is named."""
        return f"{PUBLISHER_KEY}{self.name}"

    @property
    def account(self) -> str:
        return f"PUBLISHER_{self.name}"

    def subjects(self) -> tuple[Line, ...]:
        """What it may publish to, and nothing else; raises `BadSettings` for what is no user or topic."""
        try:
            return (
                *(Line(_user_subject(user), f"user {user}") for user in self.users),
                *(Line(_topic_subject(topic), f"topic {topic}") for topic in self.topics),
            )
        except (BadSubject, BadTopic) as error:
            raise BadSettings(f"the publisher {self.name}: {error}") from None


def _user_subject(user: str) -> str:
    return subject.NOTIFY_WILDCARD if user == _ALL_USERS else subject.notify_user(user)


def _topic_subject(pattern: str) -> str:
    if pattern == _ALL_TOPICS:
        return subject.TOPICS_WILDCARD
    check_pattern(pattern)
    topic = pattern.removesuffix(".>")
    return subject.notify_topic(topic) + (".>" if topic != pattern else "")
