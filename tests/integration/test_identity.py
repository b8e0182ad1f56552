"""Who may be at a gateway, and for how long: expiry, renewal, revocation, origins. Real gateways and nats-server."""

from __future__ import annotations

import asyncio
import time
from typing import Any

import aiohttp
import jwt
import pytest

from support.clock import PATIENCE_S, SCALE, until
from support.command import answer
from support.device import Device, Frame
from support.mesh import KEY, Agent, Mesh
from support.proxy import Proxy
from tidings.client import Client
from tidings.identity import issue, issue_service
from tidings.stream import topology
from tidings.stream.revocations import revoke
from tidings.wire.frames import SUBPROTOCOL

STRICT: dict[str, Any] = {"token_leeway_s": 0}
"""A gateway on the machine that signs needs no leeway."""
SHORT_S = round(3 * SCALE)
"""A token that ends in a test."""
LATER_S = 120
"""A token that was issued so much later than now is issued after whatever the test does."""


def token(user: str, device: str | None = None, ttl_s: int = 3600, *, later_s: int = 0) -> str:
    """A token that was issued so much later than now; within the leeway of clocks that is no fault."""
    now = int(time.time()) + later_s
    claims = {"sub": user, "iat": now, "exp": now + ttl_s, **({"dev": device} if device else {})}
    return jwt.encode(claims, KEY, algorithm="HS256")


async def come(mesh: Mesh, gateway: Agent, signed: str, name: str | None = None) -> tuple[Device, Frame]:
    """A device with this token that calls itself so, and the first frame that it gets."""
    device = await mesh.device(gateway, "nobody")
    return device, await device.connect(token=signed, **({"device": name} if name else {}))


async def status_of(gateway: Agent, path: str) -> tuple[int, dict[str, Any]]:
    async with aiohttp.ClientSession() as http, http.get(gateway.url.replace("/v1/ws", path)) as got:
        return got.status, await got.json(content_type=None)


# Expiry and renewal


async def test_a_session_ends_with_its_token(mesh: Mesh) -> None:
    """The socket is closed with 4401; within the linger time a new token takes the same session over, acks owed."""
    gateway = await mesh.gateway(linger_s=PATIENCE_S, ack_wait_s=2 * PATIENCE_S, **STRICT)
    phone, welcome = await come(mesh, gateway, token("alice", "phone", SHORT_S))
    phone.auto_ack = False
    assert (welcome["t"], 0 <= welcome["expires_in"] <= SHORT_S) == ("welcome", True)
    [id] = await mesh.publish("alice")
    await phone.expect(id)
    assert await phone.closed() == 4401
    assert (await phone.expect_frame("error"))["message"] == "the token has expired: get a new one"
    assert (await phone.connect(token=token("alice", "phone", -1)))["code"] == "not_authenticated"
    again = await phone.connect(token=token("alice", "phone"))
    assert again["session"] == welcome["session"]
    await phone.until(lambda: phone.ids == [id, id], "what was not acknowledged comes again")


async def test_a_token_is_renewed_without_a_reconnect(mesh: Mesh) -> None:
    """A `token` frame lets a session outlive its first token; one that did not renew shows that the time has passed."""
    gateway = await mesh.gateway(**STRICT)
    phone, welcome = await come(mesh, gateway, token("alice", None, SHORT_S), "phone")
    witness, _ = await come(mesh, gateway, token("alice", None, SHORT_S), "laptop")
    renewed = await phone.ask("token", token=token("alice", "phone", 60))
    assert (renewed["t"], 58 <= renewed["expires_in"] <= 60) == ("ok", True)
    assert await witness.closed() == 4401
    assert (await phone.ask("count"))["t"] == "ok"
    assert phone.close_code is None
    # A shorter one counts as well: the newest is the one that the client has.
    assert (await phone.ask("token", token=token("alice", "phone", SHORT_S)))["t"] == "ok"
    assert await phone.closed() == 4401
    assert (await phone.connect(token=token("alice"), device="phone"))["session"] == welcome["session"]


@pytest.mark.parametrize(
    "signed, said",
    [
        (issue(KEY, "bob", "phone"), "not_allowed"),
        (issue(KEY, "alice", "laptop"), "not_allowed"),
        (issue_service(KEY, "alice", "inbox:read"), "not_allowed"),
        (issue(KEY, "alice", "phone", -60), "not_authenticated"),
        (issue("another-key-of-at-least-32-characters!!", "alice"), "not_authenticated"),
        ("no token", "not_authenticated"),
    ],
)
async def test_tokens_that_renew_nothing(mesh: Mesh, signed: str, said: str) -> None:
    """Somebody else's token closes with 4403; one that is not good leaves the session as it was."""
    gateway = await mesh.gateway(**STRICT)
    phone, _ = await come(mesh, gateway, token("alice", "phone"))
    refused = await phone.ask("token", token=signed)
    assert refused["code"] == said
    if said == "not_allowed":
        assert await phone.closed() == 4403
    else:
        assert (await phone.ask("count"))["t"] == "ok"
        await phone.send({"t": "token", "token": signed})
        assert await phone.closed() == 4401, "without a ref nobody could tell what was refused"


async def test_a_token_frame_without_one(mesh: Mesh) -> None:
    """It is a bad frame, and is told so."""
    gateway = await mesh.gateway()
    phone, _ = await come(mesh, gateway, token("alice"))
    assert (await phone.ask("token"))["code"] == "bad_frame"
    assert (await phone.ask("token", token="x" * 9000))["code"] == "bad_frame"
    assert (await phone.ask("count"))["t"] == "ok"


async def test_a_service_is_no_device(mesh: Mesh) -> None:
    """A service's token opens no session."""
    gateway = await mesh.gateway()
    phone, refused = await come(mesh, gateway, issue_service(KEY, "shop", "publish:user"))
    assert refused["code"] == "not_allowed"
    assert await phone.closed() == 4403


async def test_the_client_stays_connected(mesh: Mesh) -> None:
    """The client SDK renews its tokens in time: its session outlives several of them, as another that cannot shows."""
    gateway = await mesh.gateway(**STRICT)
    given: list[str] = []

    async def fresh() -> str:
        given.append(token("alice", "phone", 2 * SHORT_S))
        return given[-1]

    async with Client(gateway.url.replace("/v1/ws", ""), fresh) as client:
        welcome = client.welcome
        witness, _ = await come(mesh, gateway, token("alice", "laptop", 2 * SHORT_S + 1))
        assert await witness.closed() == 4401
        await client.count()
        assert client.welcome is welcome, "a new connection would have brought a new one"
        assert len(given) >= 2


# Revocation


async def test_a_user_is_revoked_everywhere(mesh: Mesh) -> None:
    """`tidings revoke` ends all sessions of the user on two gateways, one that lingers included, and nobody else's.

    Tokens of before are refused, tokens of after are good.
    """
    patient = {"linger_s": 60, "token_leeway_s": 2 * LATER_S}
    one, two = await mesh.gateway(**patient), await mesh.gateway(**patient)
    before = token("alice")
    phone, _ = await come(mesh, one, before, "phone")
    laptop, _ = await come(mesh, two, before, "laptop")
    tablet, lingering = await come(mesh, two, token("alice", "tablet"))
    bob, _ = await come(mesh, one, token("bob"))
    later, _ = await come(mesh, two, token("alice", "watch", later_s=LATER_S))
    await tablet.cut()
    started = time.monotonic()
    ran = await answer("revoke", "--user", "alice", "--nats", mesh.nats.url)
    assert (ran.process.returncode, len(ran.out)) == (0, 1)
    assert (await phone.closed(), await laptop.closed()) == (4401, 4401)
    assert time.monotonic() - started < PATIENCE_S
    assert (await laptop.expect_frame("error"))["message"] == "the token was revoked: sign in again"
    await until(lambda: sum("was revoked" in line for line in two.output) == 2, "the lingering one ends too")
    for gateway in (one, two):
        device, refused = await come(mesh, gateway, before, "phone")
        assert (refused["code"], await device.closed()) == ("not_authenticated", 4401)
    unknown_age = jwt.encode({"sub": "alice", "exp": int(time.time()) + 60}, KEY, algorithm="HS256")
    assert (await come(mesh, one, unknown_age))[1]["code"] == "not_authenticated"
    assert (await come(mesh, one, token("alice", later_s=LATER_S), "phone"))[1]["t"] == "welcome"
    again = await tablet.connect(token=token("alice", "tablet", later_s=LATER_S))
    assert (again["t"], again["session"] != lingering["session"]) == ("welcome", True)
    for spared in (bob, later):
        assert (await spared.ask("count"))["t"] == "ok"
    refused = await later.ask("token", token=before)
    assert refused["code"] == "not_authenticated"


async def test_a_device_is_revoked(mesh: Mesh) -> None:
    """Its session ends, and it is refused by whatever token of before; the user's other devices stay."""
    gateway = await mesh.gateway()
    any_device = token("alice")
    phone, _ = await come(mesh, gateway, token("alice", "phone"))
    laptop, _ = await come(mesh, gateway, any_device, "laptop")
    ran = await answer("revoke", "--user", "alice", "--device", "phone", "--nats", mesh.nats.url)
    assert ran.out[0].startswith("revoked: what was issued to alice on phone")
    assert await phone.closed() == 4401
    assert (await come(mesh, gateway, any_device, "phone"))[1]["code"] == "not_authenticated"
    assert (await laptop.ask("count"))["t"] == "ok"


async def test_revocations_outlive_restarts(mesh: Mesh) -> None:
    """After a restart of nats-server and of the gateway what was revoked is revoked, as with many others."""
    gateway = await mesh.gateway()
    others = [f"user{number}" for number in range(1200)]
    old = [token(user) for user in ("alice", others[0], others[-1])]
    await asyncio.gather(*(revoke(mesh.connection, user) for user in others))
    await revoke(mesh.connection, "alice", "phone")
    await gateway.stop()
    await mesh.stop_nats()
    await mesh.start_nats()
    await until(lambda: mesh.connection.is_connected, "the test's own connection is back")
    gateway = await mesh.gateway()
    for signed in old:
        assert (await come(mesh, gateway, signed, "phone"))[1]["code"] == "not_authenticated"
    assert (await come(mesh, gateway, token("bob")))[1]["t"] == "welcome"


async def test_revoked_while_a_gateway_was_cut_off(mesh: Mesh) -> None:
    """A gateway that was cut off from NATS has missed nothing when it is back."""
    async with Proxy(mesh.nats.port) as proxy:
        gateway = await mesh.gateway(nats_url=f"nats://127.0.0.1:{proxy.port}")
        phone, _ = await come(mesh, gateway, token("alice", "phone"))
        bob, _ = await come(mesh, gateway, token("bob", "phone"))
        proxy.cut()
        await revoke(mesh.connection, "alice")
        assert phone.close_code is None
        await proxy.mend()
        assert await phone.closed() == 4401
        assert (await bob.ask("count"))["t"] == "ok"
        await gateway.stop()


async def test_nobody_is_let_in_blindly(mesh: Mesh) -> None:
    """A gateway does not start where revocations cannot be read, and is not ready while they cannot; what it knows
    counts on."""
    gateway = await mesh.gateway()
    old = token("alice")
    await revoke(mesh.connection, "alice")
    phone, _ = await come(mesh, gateway, token("bob"))
    await until_revoked(mesh, gateway, old)
    await mesh.connection.api(f"STREAM.DELETE.{topology.REVOCATIONS}")
    await gateway.said("revocations cannot be read")
    assert (await status_of(gateway, "/readyz"))[0] == 503
    with pytest.raises(AssertionError, match="tidings topology apply"):
        await mesh.gateway()
    await topology.apply(mesh.connection, mesh.settings)
    await gateway.said("revocations are read again")
    assert (await status_of(gateway, "/readyz"))[0] == 200
    assert (await come(mesh, gateway, old))[1]["code"] == "not_authenticated"
    # The new stream counts from the beginning.
    await revoke(mesh.connection, "bob")
    assert await phone.closed() == 4401


async def until_revoked(mesh: Mesh, gateway: Agent, signed: str) -> None:
    async with asyncio.timeout(PATIENCE_S):
        while (await come(mesh, gateway, signed))[1]["t"] == "welcome":
            await asyncio.sleep(0.05)


async def test_a_stream_that_forgets_too_soon(mesh: Mesh) -> None:
    """A gateway whose tokens may outlive a revocation does not start, and says what to do."""
    with pytest.raises(AssertionError, match="TIDINGS_TOKEN_TTL_MAX_S"):
        await mesh.gateway(token_ttl_max_s=2_000_000)


# The handshake


async def shake(gateway: Agent, query: str = "", **headers: str) -> tuple[int, str]:
    """The status of a WebSocket handshake with these headers, and the code of a refusal."""
    offer = {
        "Connection": "Upgrade",
        "Upgrade": "websocket",
        "Sec-WebSocket-Version": "13",
        "Sec-WebSocket-Key": "dGhlIHNhbXBsZSBub25jZQ==",
        "Sec-WebSocket-Protocol": SUBPROTOCOL,
    }
    async with aiohttp.ClientSession() as http:
        async with http.get(f"{gateway.url}{query}", headers={**offer, **headers}) as got:
            if got.status == 101:
                return 101, ""
            assert got.content_type == "application/problem+json"
            return got.status, (await got.json(content_type=None))["code"]


async def test_pages_of_others(mesh: Mesh) -> None:
    """Without a list a page must be of the gateway's own origin; who names none is no browser."""
    gateway = await mesh.gateway()
    host = f"127.0.0.1:{gateway.port}"
    for origin in (f"http://{host}", f"https://{host}", f"HTTP://{host}"):
        assert await shake(gateway, Origin=origin) == (101, "")
    assert await shake(gateway) == (101, "")
    for origin in ("https://evil.example", "null", "", f"http://{host}.evil.example", "http://127.0.0.1", "*", host):
        assert await shake(gateway, Origin=origin) == (403, "foreign_origin")


async def test_listed_origins(mesh: Mesh) -> None:
    """With a list, exactly those."""
    gateway = await mesh.gateway(allowed_origins="https://app.example.com, https://b.example:8443")
    for origin in ("https://app.example.com", "https://b.example:8443"):
        assert await shake(gateway, Origin=origin) == (101, "")
    for origin in ("http://app.example.com", "https://b.example", f"http://127.0.0.1:{gateway.port}", "*", "null"):
        assert await shake(gateway, Origin=origin) == (403, "foreign_origin")
    anybody = await mesh.gateway(allowed_origins="*")
    assert await shake(anybody, Origin="https://evil.example") == (101, "")


async def test_tokens_in_addresses(mesh: Mesh) -> None:
    """A token in the query is refused, also a good one, and no log has it."""
    gateway = await mesh.gateway(log_level="debug")
    signed = token("alice")
    for name in ("token", "access_token", "TOKEN", "jwt"):
        assert await shake(gateway, f"?{name}={signed}") == (400, "token_in_url")
    assert (await come(mesh, gateway, signed))[1]["t"] == "welcome"
    async with aiohttp.ClientSession() as http:
        socket = await http.ws_connect(
            gateway.url, protocols=(SUBPROTOCOL,), headers={"Authorization": f"Bearer {signed}"}
        )
        await socket.send_json({"t": "hello"})
        assert (await socket.receive_json())["t"] == "welcome"
        await socket.close()
    await gateway.stop()
    assert not any(part in line for part in signed.split(".")[1:] for line in gateway.output)
