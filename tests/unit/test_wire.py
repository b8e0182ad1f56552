"""Properties of the protocol core."""

from __future__ import annotations

import re

import orjson
import pytest
from hypothesis import given
from hypothesis import strategies as st

from tidings.wire import frames, notification, subject
from tidings.wire.errors import BadFrame, BadPosition, BadSubject, InvalidNotification
from tidings.wire.position import Position

JSON = st.recursive(
    st.none() | st.booleans() | st.integers(-(2**53), 2**53) | st.text(max_size=20),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=8), inner, max_size=4),
    max_leaves=8,
)
IDS = st.text(st.characters(exclude_categories=["Cs"], exclude_characters="\0"), min_size=1, max_size=200)
POSITIONS = st.builds(Position, st.integers(0, 2**48 - 1), st.integers(0, 2**63 - 1))


@given(IDS)
def test_escape_round_trip(text: str) -> None:
    """Every id becomes one legal token, and comes back."""
    token = subject.escape(text)
    assert re.fullmatch(r"[!-~]+", token)
    assert not set(token) & set(".*> ")
    assert subject.unescape(token) == text


@given(st.text(max_size=40))
def test_only_canonical_tokens_name_somebody(token: str) -> None:
    """What unescapes is what escape would have made."""
    try:
        text = subject.unescape(token)
    except BadSubject:
        return
    assert subject.escape(text) == token


@pytest.mark.parametrize("text", ["", "x" * 201, "\ud800", "a\0b"])
def test_ids_that_are_refused(text: str) -> None:
    """Empty, too long, half a surrogate pair, and with a NUL, which sets keys of the store apart."""
    with pytest.raises(BadSubject):
        subject.escape(text)


def test_partition_is_fnv_1a() -> None:
    """Known vectors of FNV-1a, 32 bits."""
    assert subject.partition("a", 2**32) == 0xE40C292C
    assert subject.partition("foobar", 2**32) == 0xBF9CF968


@given(POSITIONS, POSITIONS)
def test_positions_round_trip_and_order(one: Position, other: Position) -> None:
    """The text is the position; order is incarnation, then sequence."""
    assert Position.parse(str(one)) == one
    assert (one < other) == ((one.incarnation, one.sequence) < (other.incarnation, other.sequence))


@given(st.text(max_size=40) | JSON)
def test_positions_refuse_everything_else(text: object) -> None:
    """What parses was written by a mesh."""
    try:
        found = Position.parse(text)
    except BadPosition:
        return
    assert str(found) == text


@pytest.mark.parametrize(
    "text", ["u1.01", "u01.1", "uA.1", "u1.+1", "u1.1_0", "u1. 1", "u-1.1", "u1.\u0661", "p1.1", "u.1"]
)
def test_positions_that_are_nearly_right(text: str) -> None:
    """Only the canonical form counts."""
    with pytest.raises(BadPosition):
        Position.parse(text)


@given(st.binary(max_size=300) | JSON.map(orjson.dumps))
def test_any_body_is_valid_or_refused(body: bytes) -> None:
    """No body makes the check raise anything else."""
    try:
        notification.check(body)
    except InvalidNotification:
        pass


@given(st.text(min_size=1, max_size=256).filter(lambda t: t.isprintable()), JSON)
def test_what_is_built_is_valid(kind: str, data: object) -> None:
    """`build` makes what `check` takes."""
    id, body = notification.build(type=kind, data=data)
    assert notification.check(body) == notification.Envelope(id, kind, None)


@pytest.mark.parametrize(("opens", "shuts"), [(b"[", b"]"), (b'{"a":', b"}"), (b'[{"":[],"a":', b"}]")])
def test_depth(opens: bytes, shuts: bytes) -> None:
    """As many levels as JSON libraries can write, whatever they are made of; brackets in a text are none."""
    levels = notification.MAX_DEPTH - 1

    def event(count: int) -> bytes:
        data = opens * count + b'"%b"' % (b"[{" * 300) + shuts * count
        return b'{"specversion":"1.0","id":"i","source":"s","type":"t","data":%b}' % data

    per_piece = opens.count(b"[{") + 1
    notification.check(event(levels // per_piece))
    with pytest.raises(InvalidNotification, match="250 levels"):
        notification.check(event(levels // per_piece + 1))


@pytest.mark.parametrize(
    ("change", "told"),
    [
        ({"specversion": "0.3"}, "specversion"),
        ({"id": ""}, "`id`"),
        ({"source": 5}, "`source`"),
        ({"type": None}, "`type`"),
        ({"time": "yesterday"}, "`time`"),
        ({"expires": "2026-01-01T00:00:00"}, "`expires`"),
        ({"priority": "top"}, "`priority`"),
        ({"topic": ""}, "`topic`"),
        ({"Bad-Name": 1}, "Bad-Name"),
        ({"ext": {"a": 1}}, "`ext`"),
    ],
)
def test_each_rule_of_the_envelope(change: dict[str, object], told: str) -> None:
    """Each broken rule is named."""
    event = {"specversion": "1.0", "id": "i", "source": "s", "type": "t", **change}
    with pytest.raises(InvalidNotification, match=re.escape(told)):
        notification.check(orjson.dumps(event))


@given(st.binary(max_size=100) | st.text(max_size=100) | JSON.map(orjson.dumps))
def test_any_client_frame_is_read_or_refused(frame: str | bytes) -> None:
    """Nothing that a client sends raises anything but a BadFrame."""
    code = None
    try:
        frames.decode(frame)
    except BadFrame as error:
        code = error.code
    assert code in {None, "bad_frame", "unknown_type", "bad_position"}


@given(st.lists(POSITIONS, max_size=4))
def test_an_ack_takes_any_position(positions: list[Position]) -> None:
    """Of whichever incarnation, and in the words of the client."""
    texts = [str(position) for position in positions]
    assert frames.decode(orjson.dumps({"t": "ack", "pos": texts})) == frames.Ack(texts, None)


@pytest.mark.parametrize("member", [{"pos": ["zzz"]}, {"pos": ["u1.1", ""]}, {"upto": "zzz"}, {"upto": None}])
def test_an_ack_of_no_position(member: dict[str, object]) -> None:
    """What is no position is refused alike, in the list and as `upto`, and with it the whole frame."""
    with pytest.raises(BadFrame, match="echo the `pos`") as refused:
        frames.decode(orjson.dumps({"t": "ack", **member}))
    assert refused.value.code == "bad_position"


@given(POSITIONS, st.integers(1, 100), JSON)
def test_a_body_goes_into_its_frame_unchanged(position: Position, attempt: int, data: object) -> None:
    """The frame is JSON and holds the publisher's bytes."""
    _, body = notification.build(type="t", data=data)
    frame = frames.notifications([frames.notification_item(str(position), attempt, body)])
    assert body in frame
    assert orjson.loads(frame)["items"][0] == {"pos": str(position), "try": attempt, "n": orjson.loads(body)}
