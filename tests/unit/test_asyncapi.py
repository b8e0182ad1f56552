"""`schemas/asyncapi.yaml` is AsyncAPI, and says what the code does: every frame, every subject, every code."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from typing import Any

import pytest

from support import asyncapi
from tidings.schema import Schemas
from tidings.wire import codes, frames, subject
from tidings.wire.errors import BadFrame

BODY = b'{"specversion":"1.0","id":"i","source":"s","type":"t"}'
DELIVERED = (1_769_860_800_123, "phone", 1)
WELCOME = {"session": "s", "user": "alice", "device": "phone", "window": 64, "heartbeat": 25, "expires_in": 3600}
SENT = {
    "welcome": [frames.welcome(**WELCOME, pos="u1.1", unread=3), frames.welcome(**WELCOME, pos=None, unread=None)],
    "n": [frames.notifications([frames.notification_item("u1.1", 1, BODY), frames.notification_item("b1.1", 2, BODY)])],
    "ok": [frames.ok(1), frames.ok(None), frames.ok("r")],
    "okPage": [
        frames.page(1, [], None),
        frames.page(
            "r", [("u1.1", True, False, True, DELIVERED, BODY), ("b1.1", *[False] * 3, None, BODY)], "u1.1~b1.1"
        ),
    ],
    "okMarkAll": [frames.ok(1, upto="u1.1~b1.1")],
    "okCount": [frames.ok(1, unread=100)],
    "okTopics": [frames.ok(1, topics=["post.42", "a.>"], next="post.42"), frames.ok(1, topics=[], next=None)],
    "okToken": [frames.ok(1, expires_in=3600)],
    "error": [frames.error("bad_frame", "why"), frames.error("bad_frame", "why", "r")],
    "countChanged": [frames.count(4)],
    "state": [frames.state(["u1.1", "b1.1"], "unread")],
    "stateAll": [frames.state(None, "read", "u1.1")],
    "gap": [frames.gap(5, "u1.1"), frames.gap(None, None)],
    "bye": [frames.bye(1200), frames.bye(0, reconnect=False)],
    "pong": [frames.pong(None), frames.pong(1)],
}


def examples(names: list[str]) -> Iterator[tuple[str, Any]]:
    for name in names:
        for example in asyncapi.DOCUMENT["components"]["messages"][name].get("examples", ()):
            yield name, example["payload"]


def test_it_is_asyncapi() -> None:
    """The document is valid, and its references are there."""
    assert asyncapi.problems() == []

    def references(value: Any) -> Iterator[str]:
        if isinstance(value, dict):
            if isinstance(value.get("$ref"), str):
                yield value["$ref"]
            for below in value.values():
                yield from references(below)
        elif isinstance(value, list):
            for below in value:
                yield from references(below)

    for reference in references(asyncapi.DOCUMENT):
        if reference.startswith("#/"):
            found = asyncapi.DOCUMENT
            for step in reference.split("/")[1:]:
                assert step in found, reference
                found = found[step]


def test_client_frames_are_all_there() -> None:
    """What the document says a client may send is what the code reads."""
    assert sorted(map(asyncapi.kind, asyncapi.CLIENT)) == sorted(frames._READERS)


@pytest.mark.parametrize(("name", "payload"), list(examples(asyncapi.CLIENT)), ids=str)
def test_client_examples(name: str, payload: dict[str, Any]) -> None:
    """Each example is what its schema says, and is read by the code as that frame."""
    assert asyncapi.accepts(payload, *asyncapi.CLIENT) == [name]
    read = frames.decode(json.dumps(payload))
    plain = {field: getattr(read, field) for field in read._fields if isinstance(payload.get(field), (str, int))}
    assert {field: str(value) for field, value in plain.items()} == {field: str(payload[field]) for field in plain}


@pytest.mark.parametrize(
    "frame",
    [
        {"t": "hello", "window": 0},
        {"t": "hello", "device": ""},
        {"t": "hello", "token": "x" * 8193},
        {"t": "ack"},
        {"t": "ack", "pos": ["one"]},
        {"t": "ack", "upto": "x1.1"},
        {"t": "ack", "pos": ["u1.1"] * 1001},
        {"t": "inbox", "limit": 201},
        {"t": "inbox", "filter": "some"},
        {"t": "inbox", "before": "u1.1", "after": "u1.1"},
        {"t": "inbox", "ref": 1.5},
        {"t": "inbox", "ref": "x" * 65},
        {"t": "mark", "as": "eaten", "pos": []},
        {"t": "mark", "as": "unread", "pos": "all"},
        {"t": "mark", "as": "read"},
        {"t": "sub"},
        {"t": "sub", "topics": []},
        {"t": "unsub", "topics": ["x" * 201]},
        {"t": "subs", "limit": 501},
        {"t": "token"},
        {"t": "dance"},
    ],
    ids=str,
)
def test_bad_client_frames(frame: dict[str, Any]) -> None:
    """What the code refuses, the document does not allow."""
    with pytest.raises(BadFrame):
        frames.decode(json.dumps(frame))
    assert asyncapi.accepts(frame, *asyncapi.CLIENT) == []


def test_server_frames_are_all_there() -> None:
    """Every function that makes a frame is in the table above, and the table is the document."""
    assert sorted(SENT) == sorted(asyncapi.SERVER)
    makers = {
        name
        for name in frames.__all__
        if callable(getattr(frames, name))
        and name.islower()
        and name not in ("decode", "notification_item", "page_members")
    }
    assert makers == {
        "bye", "count", "error", "gap", "notifications", "ok", "page", "pong", "state", "welcome",
    }, "a new frame belongs into SENT, and into schemas/asyncapi.yaml"  # fmt: skip


@pytest.mark.parametrize("name", asyncapi.SERVER)
def test_server_frames(name: str) -> None:
    """What the code writes is this message and no other; one member more is not allowed; the examples are like it."""
    for frame in map(json.loads, SENT[name]):
        assert asyncapi.accepts(frame, *asyncapi.SERVER) == [name]
        assert asyncapi.accepts({**frame, "more": 1}, *asyncapi.SERVER) == []
    for _, payload in examples([name]):
        assert asyncapi.accepts(payload, *asyncapi.SERVER) == [name]


def test_codes() -> None:
    """Closes and refused handshakes are those of the catalogue: a new one belongs into schemas/asyncapi.yaml."""
    socket = asyncapi.DOCUMENT["channels"]["socket"]
    assert socket["x-closes"] == [
        {"code": close.code, "name": close.name, "reconnect": close.reconnect} for close in codes.CLOSES
    ]
    assert socket["x-handshake"] == [{"status": one.status, "code": one.code} for one in codes.REFUSALS]


MADE = {
    "notify_user": ("notifyUser", subject.notify_user("zoë.b")),
    "notify_topic": ("notifyTopic", subject.notify_topic("post.42")),
    "part_user": ("part", subject.part_user("alice", 3)),
    "broadcast": ("broadcast", subject.broadcast("post.42")),
    "DECIDED": ("decided", subject.DECIDED),
    "CLAIMED": ("claimed", subject.CLAIMED),
    "dead": ("dead", subject.dead("user")),
    "revoked_user": ("revokedUser", subject.revoked_user("alice")),
    "revoked_device": ("revokedDevice", subject.revoked_device("alice", "phone")),
    "presence": ("presence", subject.presence("alice")),
    "INBOX_FLOOR": ("inboxFloor", subject.INBOX_FLOOR),
    "gateway_session": ("gatewaySession", subject.gateway_session("g", "s")),
    "gateway_feed": ("gatewayFeed", subject.gateway_feed("g", 1)),
    "gateway_claim": ("gatewayClaim", subject.gateway_claim("g")),
    "gateway_topics": ("gatewayTopics", subject.gateway_topics("g")),
    "gateway_user": ("gatewayUser", subject.gateway_user("g")),
    "fanout_pull": ("fanoutPull", subject.fanout_pull("a", 1)),
    "inbox_pull": ("inboxPull", subject.inbox_pull("a", 1, 2)),
    "broadcast_pull": ("broadcastPull", subject.broadcast_pull("a", 1)),
}
"""What of `tidings.wire.subject` makes a subject: the channel that it is, and one of them."""
OTHER = {
    *("escape", "unescape", "readable", "partition", "plane_of_dead", "token_of", "topic_of", "revoked_of"),
    *("MAX_ID", "AGENTS", "OPERATOR", "replies"),
}
"""What makes none."""


def test_subjects() -> None:
    """Every subject that the code makes is a channel, under its address; a wildcard covers channels."""
    wildcards = {name for name in subject.__all__ if name.lower().endswith("wildcard")}
    assert set(subject.__all__) - OTHER - wildcards == set(MADE), (
        "a new subject belongs into MADE and, as a channel, into schemas/asyncapi.yaml; what is none into OTHER"
    )
    assert sorted(channel for channel, _ in MADE.values()) == sorted(asyncapi.SUBJECTS)
    for channel, where in MADE.values():
        address = re.escape(asyncapi.SUBJECTS[channel]).replace(r"\{topic\}", ".+")
        assert re.fullmatch(re.sub(r"\\\{\w+\\\}", "[^.]+", address), where), (channel, where)


def test_parameters_are_named() -> None:
    """A channel names exactly the parameters of its address."""
    for name, channel in asyncapi.DOCUMENT["channels"].items():
        assert sorted(re.findall(r"\{(\w+)\}", channel["address"])) == sorted(channel.get("parameters", ())), name


def test_event_types() -> None:
    """Each shipped type is a message of what services publish to, and its examples are good ones."""
    types = {found.name: found.examples for found in Schemas.load().types()}
    for channel in ("notifyUser", "notifyTopic"):
        assert set(asyncapi.DOCUMENT["channels"][channel]["messages"]) == {"notification", *types}
    for name, shown in types.items():
        for example in shown:
            assert asyncapi.accepts(example, name, "notification") == [name, "notification"]
        assert asyncapi.accepts({**shown[0], "type": "other"}, name) == []
