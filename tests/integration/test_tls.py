"""TLS of the gateway and to NATS, with real processes: who is trusted, who is not, and renewed certificates."""

from __future__ import annotations

import asyncio
import os
import re
import ssl
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import httpx
import pytest

from support.certificates import Authority, serial_of, served, settings_for
from support.clock import PATIENCE_S, until
from support.command import answer
from support.mesh import KEY, PARTITIONS, Mesh
from tidings.client import Client
from tidings.identity import issue
from tidings.runtime.settings import Settings
from tidings.runtime.tls import ServerTls, _stamp
from tidings.stream.connection import Connection, connect
from tidings.stream.server import NatsServer, NatsTls
from tidings.wire.errors import BadSettings, StreamUnavailable


@pytest.fixture
def authority(tmp_path: Path) -> Authority:
    """Whom a test trusts."""
    return Authority(tmp_path / "tls")


# The api


async def test_api_over_tls(mesh: Mesh, authority: Authority) -> None:
    """A client that trusts the authority is answered; one that does not sends no token."""
    agent = await mesh.api(**settings_for(authority.pair("api")))
    url = f"https://localhost:{agent.port}/v1/users/alice/unread"
    headers = {"Authorization": f"Bearer {issue(KEY, 'alice')}"}
    async with httpx.AsyncClient(verify=authority.trust()) as http:
        assert (await http.get(url, headers=headers)).json() == {"unread": 0}
    async with httpx.AsyncClient() as http:
        with pytest.raises(httpx.ConnectError, match="CERTIFICATE_VERIFY_FAILED"):
            await http.get(url, headers=headers)


# The gateway


async def test_devices_over_tls(mesh: Mesh, authority: Authority) -> None:
    """The SDK with the CA gets what is published; plain HTTP gets nothing from the same port."""
    await mesh.inbox()
    gateway = await mesh.gateway(**settings_for(authority.pair("gateway")))
    got = []
    async with Client(f"wss://localhost:{gateway.port}", issue(KEY, "alice", "phone"), ca=authority.ca) as client:
        ids = await mesh.publish("alice", 3)
        async for notification in client:
            got.append(notification.id)
            if len(got) == len(ids):
                break
    assert got == ids
    reader, writer = await asyncio.open_connection("127.0.0.1", gateway.port)
    writer.write(b"GET /healthz HTTP/1.1\r\nHost: localhost\r\n\r\n")
    async with asyncio.timeout(PATIENCE_S):
        answered = await reader.read()
    writer.close()
    assert b"HTTP" not in answered


async def test_listen_finds_a_gateway_of_the_settings(mesh: Mesh, authority: Authority) -> None:
    """Without `--url` the settings say whether the gateway has TLS."""
    pair = authority.pair("gateway")
    gateway = await mesh.gateway(**settings_for(pair))
    ran = await answer(
        *("listen", "--user", "alice", "--ca", str(authority.ca), "--token", "none", "--state", str(authority.folder)),
        TIDINGS_HOST="0.0.0.0",  # what no certificate names
        TIDINGS_PORT=str(gateway.port),
        TIDINGS_TLS_CERTIFICATE=str(pair[0]),
        TIDINGS_TLS_KEY=str(pair[1]),
        **_environment(mesh.settings),
    )
    assert "4401" in ran.sentence()


async def test_who_does_not_shake_hands(mesh: Mesh, authority: Authority) -> None:
    """Who connects and says nothing of TLS is dropped as early as who says no hello."""
    gateway = await mesh.gateway(hello_timeout_s=0.5, **settings_for(authority.pair("gateway")))
    reader, writer = await asyncio.open_connection("127.0.0.1", gateway.port)
    try:
        async with asyncio.timeout(PATIENCE_S):
            assert await reader.read() == b""
    except ConnectionResetError:
        pass
    finally:
        writer.close()


async def test_who_is_not_trusted(mesh: Mesh, authority: Authority, tmp_path: Path) -> None:
    """A client refuses another authority's certificate, and one for another name; TLS before 1.2 gets no handshake."""
    gateway = await mesh.gateway(**settings_for(authority.pair("gateway", "push.example.com")))
    with pytest.raises(ssl.SSLCertVerificationError, match="Hostname mismatch"):
        await asyncio.to_thread(served, gateway.port, authority.trust())
    stranger = Authority(tmp_path / "stranger")
    with pytest.raises(ssl.SSLCertVerificationError, match="unable to get local issuer"):
        await asyncio.to_thread(served, gateway.port, stranger.trust(), "push.example.com")
    old = authority.trust()
    with pytest.warns(DeprecationWarning, match="TLSv1_1"):
        old.minimum_version = old.maximum_version = ssl.TLSVersion.TLSv1_1
    old.set_ciphers("ALL:@SECLEVEL=0")
    with pytest.raises(ssl.SSLError, match=r"PROTOCOL_VERSION|EOF"):
        await asyncio.to_thread(served, gateway.port, old, "push.example.com")
    (await asyncio.to_thread(served, gateway.port, authority.trust(), "push.example.com")).close()


async def test_a_renewed_certificate_is_taken(mesh: Mesh, authority: Authority) -> None:
    """Handshakes get the new one, with and without a server name; a socket that is open stays, and works."""
    gateway = await mesh.gateway(tls_check_s=0.1, **settings_for(authority.pair("gateway")))
    url = f"https://localhost:{gateway.port}/v1/ws"
    device = await mesh.device(gateway, "alice", trust=authority.trust())
    device.url = url
    await device.connect()
    certificate, _ = authority.pair("gateway")
    await gateway.said("new connections get the renewed certificate")
    for trust, host in ((authority.trust(), "localhost"), (_nameless(authority), None)):
        with await asyncio.to_thread(served, gateway.port, trust, host) as connection:
            assert (connection.getpeercert() or {})["serialNumber"] == serial_of(certificate)
    await device.expect(*await mesh.publish("alice"))
    assert device.close_code is None


async def test_a_broken_pair_is_not_taken(mesh: Mesh, authority: Authority, tmp_path: Path) -> None:
    """Half of a swap, then a file that is no key: the old pair goes on; when the swap is whole the new one is used."""
    certificate, key = authority.pair("gateway")
    first = serial_of(certificate)
    gateway = await mesh.gateway(tls_check_s=0.1, **settings_for((certificate, key)))

    async def serial() -> str:
        with await asyncio.to_thread(served, gateway.port, authority.trust()) as connection:
            return str((connection.getpeercert() or {})["serialNumber"])

    renewed, renewed_key = authority.pair("renewed")
    certificate.write_bytes(renewed.read_bytes())
    await gateway.said(r"not used, the old one goes on: the key .* is not that of the certificate")
    assert await serial() == first
    key.write_text("garbage")
    await gateway.said("not used, the old one goes on: tls_key is .*, which has no private key in PEM")
    assert await serial() == first
    os.replace(renewed_key, key)
    await gateway.said("new connections get the renewed certificate")
    assert await serial() == serial_of(renewed)


@pytest.mark.parametrize(
    ("spoil", "words"),
    [
        ("missing", "tls_certificate is .*, which cannot be read: No such file"),
        ("half", "tls_key is not set: tls_certificate and tls_key belong together"),
        ("other", "is not that of the certificate"),
        ("swapped", "tls_certificate is .*, which has no certificate in PEM"),
        ("encrypted", "tls_key is .*, which is encrypted"),
    ],
)
async def test_a_gateway_that_cannot_have_its_pair(mesh: Mesh, authority: Authority, spoil: str, words: str) -> None:
    """What is wrong with the files is said with the setting's name, and the gateway does not start."""
    certificate, key = authority.pair("gateway")
    settings = {"TIDINGS_TLS_CERTIFICATE": str(certificate), "TIDINGS_TLS_KEY": str(key)}
    if spoil == "missing":
        certificate.unlink()
    elif spoil == "half":
        del settings["TIDINGS_TLS_KEY"]
    elif spoil == "other":
        key.write_bytes(authority.pair("other")[1].read_bytes())
    elif spoil == "swapped":
        settings["TIDINGS_TLS_CERTIFICATE"] = str(key)
    else:
        key.write_text(key.read_text().replace("BEGIN", "BEGIN ENCRYPTED"))
    ran = await answer("gateway", "--port", "0", **settings, **_environment(mesh.settings))
    assert ran.process.returncode == 1
    assert re.search(words, ran.sentence()), ran.sentence()


async def test_a_pair_that_may_be_read_at_last(authority: Authority, monkeypatch: pytest.MonkeyPatch) -> None:
    """A renewed key that the agent may not read: once it may, which changes nothing in the file, it is used."""
    certificate, key = authority.pair("gateway")
    tls = ServerTls(str(certificate), str(key), 0.02)
    first = tls._newest
    read_text = Path.read_text

    def read_as_nobody_special(path: Path, *args: Any, **options: Any) -> str:
        if not path.stat().st_mode & 0o400:
            raise PermissionError(13, "Permission denied")
        return read_text(path, *args, **options)

    monkeypatch.setattr(Path, "read_text", read_as_nobody_special)
    authority.pair("gateway")
    key.chmod(0)
    watching = asyncio.create_task(tls.watch())
    try:
        await until(lambda: tls._stamp == tls._seen == _stamp(tls._files), "the new pair was looked at")
        assert tls._newest is first
        key.chmod(0o600)
        await until(lambda: tls._newest is not first, "the new pair is used")
    finally:
        watching.cancel()


async def test_a_key_that_goes_while_it_is_read(authority: Authority, monkeypatch: pytest.MonkeyPatch) -> None:
    """Files are replaced at any moment, also between the reading of a key and the look at its permissions."""
    certificate, key = authority.pair("gateway")
    tls = ServerTls(str(certificate), str(key))
    load = ssl.SSLContext.load_cert_chain

    def load_and_lose(context: ssl.SSLContext, *args: Any, **options: Any) -> None:
        load(context, *args, **options)
        key.unlink()

    authority.pair("gateway")
    monkeypatch.setattr(ssl.SSLContext, "load_cert_chain", load_and_lose)
    tls._look()
    tls._look()
    assert not key.exists()


async def test_what_is_warned_of(mesh: Mesh, authority: Authority) -> None:
    """An expired certificate, and a key that everybody may read: the gateway starts, and says so."""
    certificate, key = authority.expired("gateway")
    key.chmod(0o644)
    gateway = await mesh.gateway(**settings_for((certificate, key)))
    await gateway.said("which expired on 2021-01-01 00:00 UTC: nobody will trust it, renew it")
    await gateway.said("everybody on this machine may read the private key")


# NATS


@asynccontextmanager
async def nats_with_tls(folder: Path, tls: NatsTls | None) -> AsyncIterator[NatsServer]:
    server = NatsServer(folder, partitions=PARTITIONS, tls=tls)
    await server.start()
    try:
        yield server
    finally:
        await server.stop()


async def refused(**settings: Any) -> str:
    with pytest.raises(StreamUnavailable) as caught:
        await connect(Settings(**settings), "test")
    return str(caught.value)


def peer_serial(connection: Connection) -> str:
    """Of the certificate that the server showed on this connection."""
    transport: Any = connection._transport
    return str(transport._io_writer.get_extra_info("peercert")["serialNumber"])


async def test_nats_servers_are_checked(tmp_path: Path, authority: Authority) -> None:
    """The CA and the name must be right; a server that offers no TLS is not spoken to where the settings want it."""
    tls = NatsTls(*authority.pair("nats", "127.0.0.1"))
    async with nats_with_tls(tmp_path / "nats", tls) as server:
        connection = await connect(Settings(nats_url=server.url, nats_ca=str(authority.ca)), "test")
        assert (await connection.api("INFO"))["streams"] == 0
        await connection.finish()
        assert "does nats_ca (TIDINGS_NATS_CA) name its CA?" in await refused(nats_url=server.url)
        elsewhere = server.url.replace("127.0.0.1", "localhost")
        assert "Hostname mismatch" in await refused(nats_url=elsewhere, nats_ca=str(authority.ca))
    async with nats_with_tls(tmp_path / "plain", None) as server:
        wanted = "the server has no TLS, and the settings want it"
        assert wanted in await refused(nats_url=server.url.replace("nats://", "tls://u:secret@"))
        assert wanted in await refused(nats_url=server.url, nats_ca=str(authority.ca))


async def test_a_nats_server_that_goes(tmp_path: Path, authority: Authority, caplog: pytest.LogCaptureFixture) -> None:
    """The end of a server is no warning of asyncio's: the connection is closed on both ways, as TLS has to be."""
    async with nats_with_tls(tmp_path / "nats", NatsTls(*authority.pair("nats", "127.0.0.1"))) as server:
        connection = await connect(Settings(nats_url=server.url, nats_ca=str(authority.ca)), "test")
        await server.stop()
        await until(lambda: not connection.is_connected, "the loss is noticed")
        await connection.close()
    assert "eof_received" not in caplog.text


async def test_nats_wants_a_certificate(tmp_path: Path, authority: Authority) -> None:
    """A server that verifies its clients takes those with a certificate of its CA, and nobody else."""
    certificate, key = authority.pair("agent")
    async with nats_with_tls(tmp_path / "nats", NatsTls(*authority.pair("nats"), authority.ca)) as server:
        given = {"nats_url": server.url, "nats_ca": str(authority.ca)}
        await refused(**given)
        ours = Settings(**given, nats_certificate=str(certificate), nats_key=str(key))
        connection = await connect(ours, "test")
        assert (await connection.api("INFO"))["streams"] == 0
        await connection.finish()
    with pytest.raises(BadSettings, match=r"nats_ca is .*, which cannot be read"):
        await connect(Settings(nats_url="tls://127.0.0.1:1", nats_ca=str(tmp_path / "none.pem")), "test")


async def test_nats_renews_its_certificate(tmp_path: Path) -> None:
    """Another authority takes over: what is connected goes on, and comes back when its CA file has the new one."""
    old, new = Authority(tmp_path / "old"), Authority(tmp_path / "new")
    ca = tmp_path / "ca.pem"
    ca.write_bytes(old.ca.read_bytes())
    certificate, key = old.pair("nats")
    async with nats_with_tls(tmp_path / "nats", NatsTls(certificate, key)) as server:
        connection = await connect(Settings(nats_url=server.url, nats_ca=str(ca)), "test")
        watching = await connect(Settings(nats_url=server.url, nats_ca=str(ca)), "watching")
        try:
            heard = asyncio.Event()
            await connection.listen("test.again", lambda *message: heard.set())
            await connection.confirm()
            for mine, theirs in zip((certificate, key), new.pair("nats"), strict=True):
                mine.write_bytes(theirs.read_bytes())
            ca.write_bytes(old.ca.read_bytes() + new.ca.read_bytes())
            server.reload()
            await until(lambda: "Reloaded: tls" in server.log_file.read_text(), "the server has read the new files")
            assert watching.send("test.again")
            async with asyncio.timeout(PATIENCE_S):
                await heard.wait()
            assert connection.reconnects == 0
            await connection.force_reconnect()
            await until(lambda: connection.is_connected and peer_serial(connection) == serial_of(certificate), "back")
        finally:
            await watching.close()
            await connection.close()


def _nameless(authority: Authority) -> ssl.SSLContext:
    """A client that sends no server name, as an address in digits has none."""
    trust = authority.trust()
    trust.check_hostname = False
    return trust


def _environment(settings: Settings) -> dict[str, str]:
    return {"TIDINGS_NATS_URL": settings.nats_url, "TIDINGS_STORE_URL": settings.store_url, "TIDINGS_TOKEN_KEY": KEY}
