"""Hostile clients: every broken frame has its code, closes nobody else, and leaves nothing behind."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator

import aiohttp
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from support.clock import until
from support.device import Device
from support.faulty import FaultyStore
from support.mesh import KEY, Mesh
from tidings.gateway import session as session_module
from tidings.gateway.agent import Gateway
from tidings.identity import issue
from tidings.stream import consumers
from tidings.wire import codes, subject
from tidings.wire.position import Position

KNOWN_ERRORS = {error.code for error in codes.ERRORS} | {close.name for close in codes.CLOSES}
KNOWN_CLOSES = {close.code for close in codes.CLOSES}


@pytest.fixture
async def gateway(mesh: Mesh) -> AsyncIterator[Gateway]:
    """A gateway in this process: what a client leaves behind can be counted."""
    changed = {name: getattr(mesh.settings, name) for name in type(mesh.settings).__slots__}
    running = Gateway(
        type(mesh.settings)(**{**changed, "hello_timeout_s": 0.3, "linger_s": 0, "frame_max_bytes": 2048}), mesh.store
    )
    await running.start()
    yield running
    await running.stop()


def client(gateway: Gateway, user: str = "mallory", **options: object) -> Device:
    return Device(f"http://127.0.0.1:{gateway.port}/v1/ws", issue(KEY, user), device="d", **options)


@pytest.mark.parametrize(
    ("frame", "close", "code"),
    [
        ("not json", 4400, "bad_frame"),
        ("[]", 4400, "bad_frame"),
        ("{}", 4400, "unknown_type"),
        ('{"t":"dance"}', 4400, "unknown_type"),
        ('{"t":"hello","token":"x"}', 4400, "bad_frame"),
        ('{"t":"ack","pos":"one"}', 4400, "bad_frame"),
        ('{"t":"ack","pos":["zzz"]}', 4400, "bad_position"),
        ('{"t":"ack","upto":"x"}', 4400, "bad_position"),
        ('{"t":"ack","pos":["u1.1"]}', None, None),
        (b"\x00\x01", 4400, "bad_frame"),
        ('{"t":"ping","pad":"' + "x" * 3000 + '"}', 4413, None),
        ('{"t":"inbox","ref":99,"limit":0}', None, "bad_frame"),
        ('{"t":"inbox","ref":99,"before":"zzz"}', None, "bad_position"),
        ('{"t":"mark","ref":99,"as":"eaten","pos":[]}', None, "bad_frame"),
        ('{"t":"dance","ref":"r"}', None, "unknown_type"),
    ],
)
async def test_each_mistake_has_its_code(gateway: Gateway, frame: str | bytes, close: int | None, code: str) -> None:
    """A frame without a ref ends the connection with its code; a request with one gets an error and goes on."""
    device = client(gateway)
    await device.connect()
    await device.send(frame)
    if close is not None:
        assert await device.closed() == close
    if code is not None:
        await device.expect_frame("error", code=code)
    if close is None:
        assert (await device.ask("count"))["t"] == "ok"
    await device.close()


@pytest.mark.parametrize(
    ("first", "close"),
    [("{", 4400), ('{"t":"ping"}', 4400), ('{"t":"hello","token":5}', 4400), ('{"t":"hello","device":""}', 4400)],
)
async def test_each_bad_beginning_has_its_code(gateway: Gateway, first: str, close: int) -> None:
    """Before the hello nothing else is allowed."""
    device = client(gateway)
    await raw(device)
    await device.send(first)
    assert await device.closed() == close
    await device.close()


async def test_no_hello_in_time(gateway: Gateway) -> None:
    """Who says nothing is sent away."""
    device = client(gateway)
    await raw(device)
    assert await device.closed() == 4408
    await device.close()


async def raw(device: Device) -> None:
    """Connect without a hello."""
    device._http = aiohttp.ClientSession()
    device._socket = await device._http.ws_connect(device.url)
    device._reader = asyncio.create_task(device._read(device._socket))


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text(max_size=20),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=8), inner, max_size=3),
    max_leaves=6,
)
POSITION = st.builds(lambda i, s: str(Position(i, s)), st.integers(0, 2**48), st.integers(0, 2**63)) | JSON
FRAME = st.one_of(
    st.binary(max_size=200),
    st.text(max_size=200),
    JSON.map(json.dumps),
    st.fixed_dictionaries(
        {"t": st.sampled_from(["ack", "inbox", "mark", "count", "ping", "sub", "hello", "n"])},
        optional={
            "ref": st.integers(-(2**40), 2**40) | st.text(max_size=8) | JSON,
            "pos": st.lists(POSITION, max_size=4) | st.just("all") | JSON,
            "upto": POSITION,
            "before": POSITION,
            "limit": st.integers(-5, 500) | JSON,
            "filter": st.sampled_from(["all", "unread", "archived", "none"]) | JSON,
            "as": st.sampled_from(["seen", "read", "unread", "archived", "none"]) | JSON,
            "since": POSITION,
        },
    ).map(json.dumps),
)


async def test_hostile_frames_cost_nobody_else(gateway: Gateway, mesh: Mesh) -> None:
    """Whatever a client sends: the answer is in the catalogue, a bystander is served, and no session is left."""
    bystander = client(gateway, "bystander")
    await bystander.connect()
    frames: list[str | bytes] = []

    @settings(max_examples=300, deadline=None, suppress_health_check=list(HealthCheck), database=None)
    @given(FRAME)
    def collect(frame: str | bytes) -> None:
        frames.append(frame)

    collect()
    assert len(frames) >= 200
    for number, frame in enumerate(frames):
        # Each of a user of its own: what one may send is counted, over all its connections.
        hostile = client(gateway, f"mallory-{number}")
        await hostile.connect()
        await hostile.send(frame)
        if not hostile._socket or not hostile._socket.closed:
            try:
                await hostile.send('{"t":"count","ref":"probe"}')
            except ConnectionError:
                pass
        await hostile.until(
            lambda hostile=hostile: (
                hostile.close_code is not None or any(f.get("ref") == "probe" for f in hostile.frames)
            ),
            f"an answer after {frame!r}",
        )
        assert hostile.close_code is None or hostile.close_code in KNOWN_CLOSES, frame
        assert {f["code"] for f in hostile.frames if f["t"] == "error"} <= KNOWN_ERRORS, frame
        await hostile.close()
    await bystander.expect(*await mesh.publish("bystander", 3))
    await until(lambda: len(gateway.hub) == 1, "only the bystander's session is left")
    await bystander.close()


async def test_requests_without_end(mesh: Mesh) -> None:
    """Who goes on asking while too many requests are under way is refused, and then sent away to come back later."""
    store = FaultyStore(mesh.store)
    changed = {name: getattr(mesh.settings, name) for name in type(mesh.settings).__slots__}
    gateway = Gateway(type(mesh.settings)(**changed), store)  # type: ignore[arg-type]
    await gateway.start()
    mallory = client(gateway)
    try:
        await mallory.connect()
        released = asyncio.Event()

        async def held(name: str) -> None:
            if name == "page":
                await released.wait()

        store.before = held
        most = gateway.hub.settings.requests_per_session
        for number in range(most + 50):
            await mallory.send({"t": "inbox", "ref": number})
        refused = await mallory.expect_frame("error", ref=most + 49)
        assert refused["code"] == "too_many_requests"
        released.set()
        await mallory.expect_frame("ok", ref=most - 1)
        released.clear()
        for number in range(most + 100):
            await mallory.send({"t": "inbox", "ref": 1000 + number})
        assert await mallory.closed() == 4429
        assert codes.reconnects(4429)
    finally:
        released.set()
        await mallory.close()
        await gateway.stop()


async def test_refused_pulls(gateway: Gateway, mesh: Mesh, monkeypatch: pytest.MonkeyPatch) -> None:
    """A pull that the consumer has no room for is made again after a while, not at once and for ever."""
    monkeypatch.setattr(session_module, "_PULL_AGAIN_S", 0.3)
    phone = client(gateway, "alice")
    await phone.connect()
    (session,) = gateway.hub.by_id.values()
    pulls = 0

    def count(where: bytes, reply: bytes, header: bytes | None, body: bytes) -> None:
        nonlocal pulls
        pulls += reply.startswith(b"gw.")

    # Pulls of somebody else that wait at the server, as those of a broken connection do.
    other = await mesh.connection.listen("other.*", lambda *message: None)
    watch = await mesh.connection.listen(f"$JS.API.CONSUMER.MSG.NEXT.*.{session.consumer}", count)
    started = asyncio.get_running_loop().time()
    for number in range(4):
        consumers.pull(mesh.connection, session.stream, session.consumer, f"other.{number}", batch=1, expires_ns=10**9)
    await mesh.connection.flush()
    session.pull()
    await asyncio.sleep(1)
    await mesh.connection.flush()
    assert 2 <= pulls <= 2 + (asyncio.get_running_loop().time() - started) / 0.3
    await phone.expect(*await mesh.publish("alice"))
    await watch.unsubscribe()
    await other.unsubscribe()
    await phone.close()


async def test_asked_by_nobody(gateway: Gateway, mesh: Mesh) -> None:
    """Who asks without a reply subject is nobody: a claimed session stays, and so does the gateway's connection."""
    phone = client(gateway, "alice")
    await phone.connect()
    (session,) = gateway.hub.by_id.values()
    claim = json.dumps({"user": "alice", "device": "d", "session": session.id}).encode()
    mesh.connection.send(subject.gateway_claim(gateway.hub.gateway), claim)
    mesh.connection.send(subject.gateway_topics(gateway.hub.gateway), b"alice")
    await phone.expect(*await mesh.publish("alice"))
    # An answer to nobody would be a command that the server does not understand: it hangs up.
    await gateway.hub.connection.flush()
    assert gateway.hub.connection.stats["reconnects"] == 0
    assert list(gateway.hub.by_id.values()) == [session]
    assert phone.close_code is None
    await phone.close()
