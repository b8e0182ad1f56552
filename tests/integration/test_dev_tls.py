"""`tidings dev --tls`: an authority of its own, TLS everywhere, and commands that find it by themselves."""

from __future__ import annotations

import asyncio
import ssl
import stat
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest

from support.certificates import Authority as Other
from support.certificates import serial_of, served
from support.clock import PATIENCE_S
from support.command import answer, tidings
from support.dev import dev
from tidings.dev import authority as module
from tidings.dev.authority import Authority
from tidings.runtime.certificate import good_until
from tidings.wire.errors import StartFailed


def authority_of(state: Path) -> bytes:
    """Its certificate; only the owner may read its key."""
    assert stat.S_IMODE((state / "tls" / "ca.key").stat().st_mode) == 0o600
    return (state / "tls" / "ca.pem").read_bytes()


async def test_everything_has_tls(tmp_path: Path) -> None:
    """The greeting's addresses and its curl line work; listen and publish find mesh and authority; restart keeps it."""
    state = tmp_path / "state"
    async with dev(state, "--tls") as mesh:
        ca = (await mesh.command.said(r"^  CA +(\S+)$"))[1]
        assert mesh.url.startswith("https://127.0.0.1:")
        assert mesh.nats.startswith("tls://127.0.0.1:")
        await mesh.command.said(r"WebSocket +wss://127.0.0.1:\d+/v1/ws$")
        curl = (await mesh.command.said(r"(curl --cacert .*)$"))[1]
        process = await asyncio.create_subprocess_exec(*curl.split(), "-s", stdout=asyncio.subprocess.PIPE)
        said, _ = await process.communicate()
        assert process.returncode == 0
        assert b'"status": "ok"' in said or b'"status":"ok"' in said
        async with tidings("listen", "--user", "alice", "--state", state) as listening:
            await listening.said("listening as alice at wss://")
            ran = await answer(
                "publish", "--user", "alice", "--type", "test.made", "--id", "one", "--state", state, cwd=tmp_path
            )
            assert ran.process.returncode == 0, ran.lines
            await listening.said(r"test.made .*\[one\]")
        ran = await answer("doctor", "--state", state)
        assert ran.process.returncode == 0, ran.lines
    kept = authority_of(state)
    async with dev(state, "--tls") as mesh:
        trust = ssl.create_default_context(cafile=ca)
        with await asyncio.to_thread(served, int(mesh.url.rpartition(":")[2]), trust, "127.0.0.1") as connection:
            assert connection.version() == "TLSv1.3"
    assert authority_of(state) == kept
    async with dev(state) as mesh:
        assert mesh.url.startswith("http://")


def test_renewed_before_the_end(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The pair is made once, and anew a month before its end; by the same authority, whom it is checked against."""
    authority = Authority(tmp_path / "tls", "0.0.0.0")
    assert authority.renew()
    first, ca = serial_of(authority.certificate), authority.ca.read_bytes()
    assert not authority.renew()
    left = good_until(authority.certificate.read_text()) - datetime.now(UTC)
    assert timedelta(days=89) < left <= timedelta(days=90)
    monkeypatch.setattr(module, "_RENEW_BEFORE", timedelta(days=91))
    assert authority.renew()
    assert serial_of(authority.certificate) != first
    assert authority.ca.read_bytes() == ca


def test_an_authority_that_is_damaged(tmp_path: Path) -> None:
    """A key that is none is not replaced in silence: clients trust the one that was."""
    authority = Authority(tmp_path / "tls", "127.0.0.1")
    authority.renew()
    (tmp_path / "tls" / "ca.key").write_text("garbage")
    with pytest.raises(StartFailed, match=r"put a copy of it and of ca\.key back, or delete both"):
        authority.renew(anew=True)


async def test_listen_with_a_ca_of_ones_own(tmp_path: Path) -> None:
    """What is no CA is refused with the option's name, before anything is connected."""
    other = Other(tmp_path / "other")
    given = ("--user", "alice", "--url", "wss://127.0.0.1:1", "--token", "t")
    ran = await answer("listen", *given, "--ca", str(tmp_path / "none.pem"))
    assert "ca is" in ran.sentence()
    async with tidings("listen", *given, "--ca", other.ca) as listening:
        async with asyncio.timeout(PATIENCE_S):
            await listening.said("connecting again")
