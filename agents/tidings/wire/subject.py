"""Subjects: the only module that builds or reads one.

User ids and device ids are the caller's own strings. One reversible escape turns
them into subject tokens: every byte of the UTF-8 text outside ``A-Z a-z 0-9`` and
``- _ ~ @ + = , : ! /`` becomes ``%XX`` (upper-case hexadecimal), the scheme of RFC 3986
with a set of its own. Ordinary ids stay as they are, so that any NATS client can
publish to ``notify.user.alice``; a token that is not the escape of its own
meaning is not canonical and names nobody.
"""

from __future__ import annotations

import re
from typing import Final
from urllib.parse import quote_from_bytes, unquote_to_bytes

from .errors import BadSubject, BadTopic
from .topic import check_topic

__all__ = [
    "AGENTS",
    "BROADCAST_WILDCARD",
    "CLAIMED",
    "DEAD_WILDCARD",
    "DECIDED",
    "INBOX_FLOOR",
    "MAX_ID",
    "NOTIFY_WILDCARD",
    "OPERATOR",
    "REVOKED_WILDCARD",
    "TOPICS_WILDCARD",
    "broadcast",
    "broadcast_pull",
    "dead",
    "escape",
    "fanout_pull",
    "gateway_claim",
    "gateway_feed",
    "gateway_session",
    "gateway_topics",
    "gateway_user",
    "gateway_wildcard",
    "inbox_pull",
    "notify_topic",
    "notify_user",
    "part_user",
    "part_wildcard",
    "partition",
    "plane_of_dead",
    "presence",
    "readable",
    "replies",
    "revoked_device",
    "revoked_of",
    "revoked_user",
    "token_of",
    "topic_of",
    "unescape",
]

MAX_ID: Final = 200
"""Longest user or device id, in characters; its escaped token stays below NATS's control line."""

NOTIFY_WILDCARD: Final = "notify.user.*"
TOPICS_WILDCARD: Final = "notify.topic.>"
BROADCAST_WILDCARD: Final = "broadcast.>"
DECIDED: Final = "decided"
"""Where fan-out agents note how a message goes out."""
CLAIMED: Final = "claimed"
"""Where api agents note which body an idempotency key came with."""
DEAD_WILDCARD: Final = "dead.>"
INBOX_FLOOR: Final = "inbox.floor"
REVOKED_WILDCARD: Final = "revoked.>"

AGENTS: Final = ("gateway", "inbox", "fanout", "api")
OPERATOR: Final = "operator"

_LONGEST: Final = 3800
"""What fits into NATS's control line (4,096 bytes) with a reply subject and sizes behind it."""

_SAFE: Final = "-_~@+=,:!/"
_PLAIN: Final = re.compile(rf"[A-Za-z0-9{re.escape(_SAFE)}]{{1,{MAX_ID}}}")
_CANONICAL_TOKEN: Final = re.compile(rf"(?:[A-Za-z0-9{re.escape(_SAFE)}]|%[0-9A-F]{{2}})+")


def escape(text: str, what: str = "user id") -> str:
    """The subject token of an id; raises `BadSubject` when it is empty, too long or not Unicode text."""
    if _PLAIN.fullmatch(text):
        return text
    if not text:
        raise BadSubject(f"{what} is empty: give 1 to {MAX_ID} characters")
    if len(text) > MAX_ID:
        raise BadSubject(f"{what} has {len(text)} characters: at most {MAX_ID} are allowed")
    try:
        raw = text.encode()
    except UnicodeEncodeError:
        raise BadSubject(f"{what} holds half of a surrogate pair: it is not Unicode text") from None
    if 0 in raw:
        raise BadSubject(f"{what} holds a NUL character")
    # quote_from_bytes never quotes "." and "~"; a dot would split the token.
    return quote_from_bytes(raw, safe=_SAFE).replace(".", "%2E")


def unescape(token: str, what: str = "user id") -> str:
    """The id of a token; raises `BadSubject` when the token is not what `escape` makes of it."""
    if "%" not in token and _PLAIN.fullmatch(token):
        return token
    if _CANONICAL_TOKEN.fullmatch(token):
        try:
            text = unquote_to_bytes(token).decode()
        except UnicodeDecodeError:
            text = ""
        if text and len(text) <= MAX_ID and escape(text, what) == token:
            return text
    raise BadSubject(f"{token[:80]!r} is not the escaped form of a {what}: escape it as %XX of its UTF-8 bytes")


def readable(where: bytes) -> str:
    """A subject as text. The server takes any bytes: those that are no UTF-8 become ``\\xff``, which no token of ours
    has."""
    return where.decode(errors="backslashreplace")


def partition(token: str, partitions: int) -> int:
    """The partition of a user's token: FNV-1a (32 bits) modulo P, as nats-server's ``partition()`` computes it."""
    digest = 0x811C9DC5
    for byte in token.encode():
        digest = ((digest ^ byte) * 0x01000193) & 0xFFFFFFFF
    return digest % partitions


def notify_user(user: str) -> str:
    """Where services publish for a user."""
    return f"notify.user.{escape(user)}"


def notify_topic(topic: str) -> str:
    """Where services publish for a topic; raises `BadTopic`. Each level is escaped by itself."""
    return "notify.topic." + _topic_tokens(topic)


def broadcast(topic: str) -> str:
    """Where fan-out agents publish what goes to a topic's subscribers as one message."""
    return "broadcast." + _topic_tokens(topic)


def _topic_tokens(topic: str) -> str:
    return ".".join(escape(level, "topic") for level in check_topic(topic).split("."))


def topic_of(where: str) -> str:
    """The topic of a subject that `notify_topic` or `broadcast` made; raises `BadTopic` for any other one."""
    tokens = where.removeprefix("notify.topic.").removeprefix("broadcast.").split(".")
    try:
        topic = ".".join(unescape(token, "topic") for token in tokens)
    except BadSubject as error:
        raise BadTopic(str(error)) from None
    if topic.count(".") != len(tokens) - 1:
        raise BadTopic(f"{where!r} has an escaped dot in a level: dots are what separates levels")
    return check_topic(topic)


def part_user(token: str, number: int | str) -> str:
    """What the server maps `notify_user` to; `number` may be a mapping function."""
    return f"part.{number}.user.{token}"


def token_of(where: str) -> str | None:
    """The user's token of a subject that `part_user` made; None for any other one."""
    words = where.split(".")
    return words[3] if len(words) == 4 and (words[0], words[2]) == ("part", "user") else None


def part_wildcard(number: int) -> str:
    """All that one partition's stream stores."""
    return f"part.{number}.user.*"


def dead(plane: str) -> str:
    """Where a dead letter of a plane goes."""
    return f"dead.{plane}"


def plane_of_dead(where: str) -> str:
    """The plane of a subject that `dead` made."""
    return where.removeprefix("dead.")


def revoked_user(user: str) -> str:
    """Where it is written that the tokens of a user are revoked."""
    return f"revoked.user.{escape(user)}"


def revoked_device(user: str, device: str) -> str:
    """The same of one device; raises `BadSubject` for two ids that are too long for one subject."""
    where = f"revoked.device.{escape(user)}.{escape(device, 'device id')}"
    if len(where) > _LONGEST:
        raise BadSubject("user id and device id are too long to be revoked together: revoke the user")
    return where


def revoked_of(where: str) -> tuple[str, str | None]:
    """User and device (None: all of them) of a subject of `revoked_user` or `revoked_device`; raises `BadSubject`."""
    match where.split("."):
        case ["revoked", "user", user]:
            return unescape(user), None
        case ["revoked", "device", user, device]:
            return unescape(user), unescape(device, "device id")
    raise BadSubject(f"{where[:80]!r} is no subject of a revocation")


def presence(token: str) -> str:
    """Core NATS: a device of this user connected or disconnected."""
    return f"presence.{token}"


def replies(program: str) -> str:
    """What the reply subjects of a program's requests begin with: each agent's own, for nobody else to read.

    `program` is the name of its connection. A publisher's is NATS's own; all that are no agents are the operator's.
    """
    role = program.removeprefix("tidings-")
    if role == "publisher":
        return "_INBOX"
    return f"_INBOX_{role if role in AGENTS else OPERATOR}"


def gateway_wildcard(gateway: str) -> str:
    """All that is sent to one gateway: pull replies, claims, frames for a user."""
    return f"gw.{gateway}.>"


def gateway_session(gateway: str, session: str) -> str:
    """Reply subject of a session's pulls."""
    return f"gw.{gateway}.{session}"


def gateway_feed(gateway: str, number: int) -> str:
    """Reply subject of the pulls of a gateway's feed of broadcasts."""
    return f"gw.{gateway}.feed.{number}"


def gateway_deleted(gateway: str, consumer: str) -> str:
    """Reply subject of the deletion of a consumer."""
    return f"gw.{gateway}.deleted.{consumer}"


def gateway_topics(gateway: str) -> str:
    """Asks a gateway to read a user's subscriptions again; it answers when they are in force there."""
    return f"gw.{gateway}.topics"


def gateway_claim(gateway: str) -> str:
    """Asks a gateway to give a device's session up."""
    return f"gw.{gateway}.claim"


def fanout_pull(agent: str, number: int | str) -> str:
    """Reply subject of a fan-out agent's pulls; ``*`` subscribes to all of them."""
    return f"fo.{agent}.{number}"


def inbox_pull(agent: str, partition: int | str, number: int | str) -> str:
    """Reply subject of an inbox agent's pulls; ``*`` for both numbers subscribes to all of them."""
    return f"ib.{agent}.{partition}.{number}"


def broadcast_pull(agent: str, number: int | str) -> str:
    """Reply subject of an inbox agent's pulls of broadcasts; ``*`` subscribes to all of them."""
    return f"ibb.{agent}.{number}"


def gateway_user(gateway: str) -> str:
    """Frames for every session of a user on a gateway."""
    return f"gw.{gateway}.user"
