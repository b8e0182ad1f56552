"""Keys at an address: read, cached, rotated, and what happens while it is down."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack, asynccontextmanager
from pathlib import Path
from typing import Any

import aiohttp
import jwt
import pytest
from aiohttp import web
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.serialization import Encoding, PublicFormat

from support.clock import PATIENCE_S, until
from support.device import Device
from support.issuer import Issuer
from support.mesh import Agent, Mesh
from tidings.identity import Verifier
from tidings.runtime.settings import Settings
from tidings.wire.errors import KeysUnavailable, NotAuthenticated


@pytest.fixture
async def issuer() -> AsyncIterator[Issuer]:
    async with Issuer() as running:
        yield running


@asynccontextmanager
async def verifier(issuer: Issuer, **settings: Any) -> AsyncIterator[Verifier]:
    """One that reads the issuer's keys."""
    made = Verifier(Settings(token_jwks_url=issuer.url, **settings))
    await made.open()
    try:
        yield made
    finally:
        await made.close()


async def test_rotation(issuer: Issuer) -> None:
    """A token of a new key has the keys read at once, and those of the old one are refused from then on."""
    async with verifier(issuer, token_jwks_pause_s=0.05) as ours:
        old = issuer.token("alice")
        assert (await ours.verify(old))[0] == "alice"
        issuer.rotate("second")
        new = issuer.token("alice")
        await asyncio.wait_for(_accepted(ours, new), PATIENCE_S)
        with pytest.raises(NotAuthenticated, match="no key"):
            await ours.verify(old)


async def test_rotation_beside_a_file(issuer: Issuer, tmp_path: Path) -> None:
    """A key without a name, such as that of a PEM file, is tried for every token, and is not what a new one names."""
    beside = ec.generate_private_key(ec.SECP256R1())
    pem = beside.public_key().public_bytes(Encoding.PEM, PublicFormat.SubjectPublicKeyInfo)
    (tmp_path / "key.pem").write_bytes(pem)
    async with verifier(issuer, token_jwks_pause_s=0.05, token_key_file=str(tmp_path / "key.pem")) as ours:
        assert (await ours.verify(issuer.token("alice")))[0] == "alice"
        issuer.rotate("second")
        await asyncio.wait_for(_accepted(ours, issuer.token("alice")), PATIENCE_S)
        claims = {"sub": "bob", "exp": int(time.time()) + 60}
        reads = issuer.reads
        for headers in ({}, {"kid": "unknown"}):
            assert (await ours.verify(jwt.encode(claims, beside, algorithm="ES256", headers=headers)))[0] == "bob"
        assert issuer.reads == reads, "a token that is good has nothing read"


async def _accepted(ours: Verifier, token: str) -> None:
    """Return when a token is good: one that comes while the keys were read a moment ago has to come again."""
    while True:
        try:
            await ours.verify(token)
        except NotAuthenticated:
            await asyncio.sleep(0.01)
        else:
            return


async def test_keys_are_read_again_by_the_clock(issuer: Issuer) -> None:
    """A key that was taken away is refused after `token_jwks_refresh_s`, though no token names a new one."""
    async with verifier(issuer, token_jwks_refresh_s=1) as ours:
        old = issuer.token("alice")
        assert (await ours.verify(old))[0] == "alice"
        issuer.rotate("second")

        async def refused() -> None:
            while True:
                try:
                    await ours.verify(old)
                except NotAuthenticated:
                    return
                await asyncio.sleep(0.01)

        await asyncio.wait_for(refused(), PATIENCE_S)


async def test_unknown_keys_cost_one_reading(issuer: Issuer) -> None:
    """However many tokens name keys that are not there, the address is asked once in `token_jwks_pause_s`."""
    async with verifier(issuer, token_jwks_pause_s=3600) as ours:
        forged = [issuer.token("alice", kid=f"unknown-{number}") for number in range(200)]
        answers = await asyncio.gather(*map(ours.verify, forged), return_exceptions=True)
        assert {type(answer) for answer in answers} == {NotAuthenticated}
        assert issuer.reads == 1, "it had been read at the start"


async def test_many_wait_for_one_reading(issuer: Issuer) -> None:
    """Tokens that come while the keys are read wait for that reading."""
    issuer.broken = web.Response(status=500)
    async with verifier(issuer, token_jwks_pause_s=0.05) as ours:
        issuer.broken, issuer.held = None, asyncio.Event()
        issuer.asked.clear()
        before = issuer.reads
        tokens = [issuer.token(f"user{number}") for number in range(50)]
        first = asyncio.ensure_future(_accepted(ours, tokens[0]))
        await asyncio.wait_for(issuer.asked.wait(), PATIENCE_S)
        rest = asyncio.gather(*map(ours.verify, tokens[1:]))
        issuer.held.set()
        await asyncio.wait_for(asyncio.gather(first, rest), PATIENCE_S)
        assert issuer.reads == before + 1


BROKEN = {
    "an error": web.Response(status=500),
    "no answer of ours": web.Response(body=b"<html>sign in</html>"),
    "no keys": web.json_response({"keys": []}),
    "secrets": web.json_response({"keys": [{"kty": "oct", "k": "c2VjcmV0", "kid": "first"}]}),
    "too much": web.Response(body=b" " * 300_000),
    "a redirect": web.Response(status=302, headers={"Location": "http://127.0.0.1:1/"}),
}


@pytest.mark.parametrize("what", BROKEN)
async def test_last_good_keys_go_on(issuer: Issuer, what: str, caplog: pytest.LogCaptureFixture) -> None:
    """Whatever the address says instead of keys, the last ones count, and the log says so once."""
    async with verifier(issuer, token_jwks_pause_s=0.05) as ours:
        good = issuer.token("alice")
        issuer.broken = BROKEN[what]
        unknown = issuer.token("alice", kid="unknown")

        async def asked_twice() -> None:
            while issuer.reads < 3:
                with pytest.raises(NotAuthenticated, match="no key"):
                    await ours.verify(unknown)
                await asyncio.sleep(0.01)

        await asyncio.wait_for(asked_twice(), PATIENCE_S)
        assert (await ours.verify(good))[0] == "alice"
        assert sum("its last keys stay" in record.message for record in caplog.records) == 1


async def test_an_address_that_was_never_read(issuer: Issuer) -> None:
    """Nobody gets in, and is told to come again; a slow one is given up in time."""
    await issuer.stop()
    async with verifier(issuer, token_jwks_pause_s=0.05) as ours:
        token = issuer.token("alice")
        with pytest.raises(KeysUnavailable):
            await ours.verify(token)
        assert ours.problem is not None
        await issuer.start()
        await asyncio.wait_for(_accepted(ours, token), PATIENCE_S)
        assert ours.problem is None
    issuer.held = asyncio.Event()
    async with verifier(issuer, token_jwks_timeout_s=0.1) as ours:
        with pytest.raises(KeysUnavailable):
            await ours.verify(token)
        assert (issuer.asked.is_set(), ours.problem is not None) == (True, True)


async def test_closing_while_it_reads(issuer: Issuer) -> None:
    """`close` ends a reading that is under way, and leaves no task."""
    async with AsyncExitStack() as stack:
        ours = await stack.enter_async_context(verifier(issuer, token_jwks_refresh_s=1, token_jwks_timeout_s=60))
        issuer.asked.clear()
        issuer.held = asyncio.Event()
        await asyncio.wait_for(issuer.asked.wait(), PATIENCE_S)
        await ours.close()
    assert not [task for task in asyncio.all_tasks() if "UrlKeys" in repr(task)]


async def ready(gateway: Agent) -> tuple[int, dict[str, Any]]:
    async with aiohttp.ClientSession() as http, http.get(gateway.url.replace("/v1/ws", "/readyz")) as answer:
        return answer.status, await answer.json()


async def test_a_gateway_without_keys(mesh: Mesh, issuer: Issuer) -> None:
    """A gateway whose keys cannot be read is not ready and sends devices away for a while; then it lets them in.

    No token is in its log, at level debug.
    """
    await issuer.stop()
    gateway = await mesh.gateway(
        token_key="", token_jwks_url=issuer.url, token_jwks_pause_s=0.05, token_jwks_refresh_s=1, log_level="debug"
    )
    token = issuer.token("alice", dev="phone")
    async with AsyncExitStack() as stack:
        phone = await stack.enter_async_context(_closing(Device(gateway.url, token)))
        assert (await phone.connect())["code"] == "keys_unavailable"
        assert await phone.closed() == 4503
        status, said = await ready(gateway)
        assert (status, said["problems"]) == (503, ["the keys at token_jwks_url could not be read yet"])
        await issuer.start()
        await until_ready(gateway)
        assert (await phone.connect())["t"] == "welcome"
        forged = await stack.enter_async_context(_closing(Device(gateway.url, issuer.token("alice", kid="x"))))
        assert (await forged.connect())["code"] == "not_authenticated"
        assert await forged.closed() == 4401
    await until(lambda: any("refused" in line for line in gateway.output), "it says that it refused somebody")
    assert not any(part in line for part in token.split(".") for line in gateway.output)


@asynccontextmanager
async def _closing(device: Device) -> AsyncIterator[Device]:
    try:
        yield device
    finally:
        await device.close()


async def until_ready(gateway: Agent) -> None:
    deadline = time.monotonic() + PATIENCE_S
    while (await ready(gateway))[0] != 200:
        assert time.monotonic() < deadline, await ready(gateway)
        await asyncio.sleep(0.02)
