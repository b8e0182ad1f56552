"""What the CQL store writes into columns and frames, and how its settings say what is wrong with them."""

from __future__ import annotations

import time
from types import SimpleNamespace
from typing import Any, Final
from urllib.parse import quote

import pytest
from cassandra.cqltypes import Int32Type, UTF8Type
from cassandra.metadata import Murmur3Token
from cassandra.murmur3 import murmur3
from cassandra.query import BoundStatement, PreparedStatement
from hypothesis import given
from hypothesis import strategies as st

from tidings.store.cql.encoding import (
    BEFORE_ALL,
    BEHIND_ALL,
    BLOCK,
    BUCKET_NS,
    Clock,
    DeviceState,
    block_of,
    bucket_key,
    bucket_of,
    delivered_from_text,
    delivered_to_text,
    first_wins,
    pack,
    unpack,
)
from tidings.store.cql.express import Express, Write, int4, int8
from tidings.store.cql.schema import parse_replication
from tidings.store.cql.url import parse_url
from tidings.store.port import Cursor, Delivered, Holder
from tidings.wire.errors import BadSettings
from tidings.wire.position import Position

POSITIONS: Final = st.builds(Position, st.integers(0, 2**48 - 1), st.integers(0, 2**63 - 1))
TEXTS: Final = st.text(st.characters(exclude_categories=["Cs"]), max_size=40)
COUNTS: Final = st.integers(0, 2**31)
OF_CURSOR: Final = (POSITIONS, st.frozensets(POSITIONS, max_size=8), st.dictionaries(POSITIONS, COUNTS, max_size=8))
SECRET: Final = "hunter2-geheim"


# Positions


@given(POSITIONS, POSITIONS)
def test_packed_positions_compare_as_positions_do(one: Position, other: Position) -> None:
    """The order of the bytes, which is the server's, is the order of the positions."""
    assert (pack(one) < pack(other)) == (one < other)
    assert (pack(one) == pack(other)) == (one == other)
    assert len(pack(one)) == 14
    assert unpack(pack(one)) == one
    assert BEFORE_ALL < pack(one) < pack(one) + b"\0" < BEHIND_ALL


@pytest.mark.parametrize("position", [Position(2**48, 0), Position(-1, 0), Position(0, -1), Position(7, -1)])
def test_what_is_no_position_is_not_packed(position: Position) -> None:
    """What does not fit is an error, and no other position."""
    with pytest.raises(OverflowError):
        pack(position)


@given(st.integers(0, 2**62), st.integers(0, 2**62))
def test_buckets_follow_time(one: int, other: int) -> None:
    """A bucket is ten days; what was stored later is in the same one or in a later one."""
    early, late = sorted((one, other))
    assert bucket_of(early) <= bucket_of(late)
    assert bucket_of(early) * BUCKET_NS <= early < (bucket_of(early) + 1) * BUCKET_NS


@given(POSITIONS, POSITIONS)
def test_blocks_follow_positions(one: Position, other: Position) -> None:
    """A block is a run of one incarnation; what lies above is in the same one or in a higher one."""
    early, late = sorted((one, other))
    assert block_of(early) <= block_of(late)
    begin = Position(one.incarnation, one.sequence // BLOCK * BLOCK)
    assert block_of(begin) == block_of(one) == block_of(begin._replace(sequence=begin.sequence + BLOCK - 1))
    assert block_of(begin) != block_of(begin._replace(sequence=begin.sequence + BLOCK))


# Partition keys


def prepared(query_id: bytes = b"id") -> PreparedStatement:
    """`append`, reduced to its partition key and one more value."""
    columns = [
        SimpleNamespace(keyspace_name="k", table_name="inbox", name=name, type=type_)
        for name, type_ in (("user", UTF8Type), ("bucket", Int32Type), ("id", UTF8Type))
    ]
    return PreparedStatement(columns, query_id, [0, 1], "INSERT", "k", 4, None, None)


@given(TEXTS.filter(bool), st.integers(-(2**31), 2**31 - 1))
def test_a_bucket_s_key_is_the_driver_s(user: str, bucket: int) -> None:
    """A write goes where the driver would send it: the key and its token are the driver's own."""
    bound = BoundStatement(prepared()).bind((user, bucket, "x"))
    key = bucket_key(user.encode(), int4(bucket))
    assert key == bound.routing_key
    assert murmur3(key) == Murmur3Token.from_key(bound.routing_key).value


@given(st.integers(-(2**31), 2**31 - 1), st.integers(-(2**63), 2**63 - 1))
def test_integers_are_as_the_protocol_has_them(small: int, large: int) -> None:
    """Big-endian, with a sign."""
    assert int4(small) == small.to_bytes(4, "big", signed=True)
    assert int8(large) == large.to_bytes(8, "big", signed=True)


@given(st.lists(st.one_of(st.none(), st.binary(max_size=1100)), min_size=1, max_size=12), st.integers(0, 2**15 - 1))
def test_a_frame_is_the_protocol_s(values: list[bytes | None], stream: int) -> None:
    """The bytes of an EXECUTE, read as the protocol's specification says, are the statement and its values."""
    express = Express(SimpleNamespace(cluster=SimpleNamespace(metadata=None)), "k")
    frame = express._frame(stream, Write(prepared(b"\1\2\3"), values, b""))
    assert frame[:2] == b"\4\0"
    assert int.from_bytes(frame[2:4], "big") == stream
    assert frame[4] == 0x0A
    body = frame[9:]
    assert int.from_bytes(frame[5:9], "big") == len(body)
    # The statement's id, LOCAL_QUORUM, values and no metadata in the answer, how many values.
    assert body[:5] == b"\0\3\1\2\3"
    assert body[5:8] == b"\0\6\3"
    assert int.from_bytes(body[8:10], "big") == len(values)
    at, read = 10, []
    for _ in values:
        size = int.from_bytes(body[at : at + 4], "big", signed=True)
        at += 4 + max(0, size)
        read.append(None if size < 0 else body[at - size : at])
    assert read == values
    assert at == len(body)


# Devices


@given(
    st.builds(Cursor, *OF_CURSOR, st.none() | st.builds(Cursor, *OF_CURSOR)),
    st.none() | st.builds(Holder, TEXTS, TEXTS),
    st.integers(0, 2**53),
)
def test_a_device_s_state_survives(cursor: Cursor, holder: Holder | None, written: int) -> None:
    """What is written of a device is what is read."""
    state = DeviceState(cursor, holder, written)
    loaded = DeviceState.load(state.dump())
    assert loaded == state
    assert loaded.dump() == state.dump()


def test_a_device_s_state_before_there_were_broadcasts() -> None:
    """What an earlier version wrote is read."""
    text = b'{"floor":[7,3],"written":9,"holder":["g","s"],"acked":[[7,5]],"attempts":[[7,4,2]]}'
    cursor = Cursor(Position(7, 3), frozenset({Position(7, 5)}), {Position(7, 4): 2})
    assert DeviceState.load(text) == DeviceState(cursor, Holder("g", "s"), 9)


@given(st.builds(Delivered, st.integers(0, 2**53), TEXTS, COUNTS))
def test_a_delivery_survives(delivered: Delivered) -> None:
    """What is noted of a delivery is what is read."""
    assert delivered_from_text(delivered_to_text(delivered).decode()) == delivered
    assert delivered_from_text(None) is None


@given(st.integers(0, 2**45), st.integers(0, 2**45))
def test_the_earliest_delivery_wins(one: int, other: int) -> None:
    """Of two deliveries the earlier one has the higher timestamp, which is what the server keeps."""
    assert (first_wins(one) > first_wins(other)) == (one < other)


def test_a_delivery_is_not_in_the_future() -> None:
    """The timestamp of a delivery of now lies in the past, which ScyllaDB insists on."""
    now_ms = time.time_ns() // 1_000_000
    assert 0 < first_wins(now_ms) < now_ms * 1000


# Time


@given(st.lists(st.integers(-(10**12), 10**12), min_size=1, max_size=50))
def test_the_clock_never_repeats(steps: list[int]) -> None:
    """Timestamps grow strictly while the machine's time stands still, goes back or jumps, and follow it forward."""
    now = time.time_ns()
    clock, last, highest = Clock(), 0, 0
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(time, "time_ns", lambda: now)
        for step in (0, 0, *steps):
            now += step
            stamp = clock.now()
            assert stamp > last
            highest = max(highest, now // 1000)
            assert highest <= stamp <= highest + len(steps) + 2
            last = stamp


# Addresses


@pytest.mark.parametrize(
    ("url", "expected"),
    [
        ("cql://db/tidings", (["db"], 9042, "tidings", None, None, None, 2.0)),
        ("cql://a,b,c:9142/k1", (["a", "b", "c"], 9142, "k1", None, None, None, 2.0)),
        ("cql://me:pw@db/k?datacenter=dc1&timeout_s=0.5", (["db"], 9042, "k", "me", "pw", "dc1", 0.5)),
        ("cql://me@db/k_2?timeout_s=60", (["db"], 9042, "k_2", "me", None, None, 60.0)),
        ("cql://m%40e:p%2F%3A%40%3F%23%25@10.0.0.1:1/k", (["10.0.0.1"], 1, "k", "m@e", "p/:@?#%", None, 2.0)),
        ("cql://me:p:w@db/k?datacenter=", (["db"], 9042, "k", "me", "p:w", None, 2.0)),
    ],
)
def test_good_addresses(url: str, expected: tuple[Any, ...]) -> None:
    """Hosts, port, keyspace, credentials and options are found where they belong."""
    assert tuple(parse_url(url))[:7] == expected


@given(TEXTS.filter(bool), TEXTS.filter(bool))
def test_credentials_survive(username: str, password: str) -> None:
    """Whatever a name and a password are made of, they may be written with percent signs, and are never shown."""
    where = parse_url(f"cql://{quote(username, safe='')}:{quote(password, safe='')}@db/k")
    assert (where.username, where.password) == (username, password)
    assert str(where) == "cql://db:9042/k"


@pytest.mark.parametrize(
    ("rest", "sentence"),
    [
        ("/tidings", "names no host"),
        (",/tidings", "names no host"),
        (":9042/tidings", "names no host"),
        ("db", "keyspace is ''"),
        ("db/", "keyspace is ''"),
        ("db/Tidings", "keyspace is 'Tidings'"),
        ("db/1st", "keyspace is '1st'"),
        ("db/a-b", "keyspace is 'a-b'"),
        ("db/a/b", "keyspace is 'a/b'"),
        (f"db/{'k' * 49}", "keyspace is 'kkk"),
        ("db:0/k", "port is"),
        ("db:65536/k", "port is"),
        ("db:cql/k", "port is"),
        ("db:-1/k", "port is"),
        ("a:1,b:2/k", "port is"),
        ("db/k?timeout=2", "no option 'timeout'"),
        ("db/k?datacenter=d&ssl", "no option 'ssl'"),
        ("db/k#part", "no option '#part'"),
        ("db/k?timeout_s=", "timeout_s is ''"),
        ("db/k?timeout_s=-1", "timeout_s is '-1'"),
        ("db/k?timeout_s=0", "timeout_s is '0'"),
        ("db/k?timeout_s=61", "timeout_s is '61'"),
        ("db/k?timeout_s=1e1", "timeout_s is '1e1'"),
        ("db/k?timeout_s=nan", "timeout_s is 'nan'"),
        ("[::1/k", "CQL address"),
    ],
)
@pytest.mark.parametrize("credentials", ["", f"me:{SECRET}@"])
def test_bad_addresses(credentials: str, rest: str, sentence: str) -> None:
    """A sentence says what is wrong and how an address is written, without the password."""
    with pytest.raises(BadSettings) as caught:
        parse_url(f"cql://{credentials}{rest}")
    assert sentence in str(caught.value)
    assert "store_url is no CQL address" in str(caught.value)
    assert "cql://[user:password@]host" in str(caught.value)
    assert SECRET not in str(caught.value)


@pytest.mark.parametrize(
    "url",
    [
        f"cql://me:a/{SECRET}@db/k",
        f"cql://me:{SECRET}/a@db/k",
        f"cql://me:{SECRET}?a@db/k",
        f"cql://me:a?{SECRET}@db/k",
        f"cql://me:a#{SECRET}@db/k",
        f"cql://me:{SECRET}#a@db/k",
        f"cql://me:1/k?{SECRET}@db/k",
        f"cql://me:1/k#{SECRET}@db/k",
        f"cql://me:{SECRET}/k",
        f"cql://me:{SECRET}@/k",
        f"cql://me:[{SECRET}@db/k",
        f"cql://me:{SECRET}\N{ACCOUNT OF}@db/k",
        f"cql://me:a@{SECRET}@db:x/k",
    ],
)
def test_a_password_that_is_not_written_as_it_must_be_is_not_shown(url: str) -> None:
    """Also where its own characters cut the address in two, which is how an operator gets to see the sentence."""
    with pytest.raises(BadSettings) as caught:
        parse_url(url)
    assert SECRET not in str(caught.value)


# Copies


@pytest.mark.parametrize(
    ("text", "cql"),
    [
        ("dc1:3", "{'class': 'NetworkTopologyStrategy', 'dc1': 3}"),
        ("dc1:3,dc2:2", "{'class': 'NetworkTopologyStrategy', 'dc1': 3, 'dc2': 2}"),
        (" dc1:3 , Dc_2:9 ", "{'class': 'NetworkTopologyStrategy', 'dc1': 3, 'Dc_2': 9}"),
    ],
)
@pytest.mark.parametrize("development", [True, False])
def test_good_replication(text: str, cql: str, development: bool) -> None:
    """Each datacenter and its copies, everywhere."""
    assert parse_replication(text, development=development) == cql


def test_simple_replication_is_for_development() -> None:
    """One node on a desk knows no datacenters; in production the sentence says what to write."""
    simple = "{'class': 'SimpleStrategy', 'replication_factor': 1}"
    assert parse_replication("simple:1", development=True) == simple
    with pytest.raises(BadSettings, match=r"for development.*dc1:3.*nodetool status"):
        parse_replication("simple:1", development=False)


@pytest.mark.parametrize(
    "text",
    [
        *("dc1", "dc1:", ":3", "dc1:0", "dc1:10", "dc1:-1", "dc1:x", "dc1:1.5", "dc1:3:3", "dc1:3,", ",", "a b:3"),
        *("dc1:3;dc2:3", "dc1:3,simple:1", "1a:3", "'dc1':3", "dc1:3, 'x': 1}; DROP", f"{'d' * 49}:3"),
    ],
)
@pytest.mark.parametrize("development", [True, False])
def test_bad_replication(text: str, development: bool) -> None:
    """What is no list of datacenters is shown, with an example, and none of it reaches the server."""
    with pytest.raises(BadSettings, match="give each datacenter its copies") as caught:
        parse_replication(text, development=development)
    assert repr(text) in str(caught.value)


@pytest.mark.parametrize("development", [True, False])
def test_no_replication(development: bool) -> None:
    """A keyspace is never made with copies that nobody chose."""
    with pytest.raises(BadSettings, match="cql_replication is not set"):
        parse_replication("", development=development)
