"""A production start without protection is refused, with the setting's name, unless exactly that is allowed."""

from __future__ import annotations

import secrets
from collections.abc import Mapping
from pathlib import Path
from typing import Final

import pytest

from support.certificates import Authority
from support.command import answer
from tidings.dev.state import StateFolder
from tidings.runtime.exposure import check_exposures, exposures
from tidings.runtime.settings import Settings
from tidings.wire.errors import BadSettings, StartFailed

KEY: Final = secrets.token_hex(32)
REMOTE: Final = {
    "TIDINGS_NATS_URL": "nats://user:hunter2@nats.example.com:4222",
    "TIDINGS_STORE_URL": "cql://user:hunter2@s1.example.com,s2.example.com:9042/tidings",
    "TIDINGS_HOST": "0.0.0.0",
    "TIDINGS_API_HOST": "0.0.0.0",
    "TIDINGS_TOKEN_KEY": "changeme-changeme-changeme-changeme",
}
DOORS: Final = ("tls_certificate and tls_key", "token_key can be guessed")


@pytest.mark.parametrize("agent", ["gateway", "inbox", "fanout", "api"])
async def test_each_agent_refuses(agent: str, tmp_path: Path) -> None:
    """Each says all that is wrong for it in one sentence, and never a password."""
    ran = await answer(agent, cwd=tmp_path, **REMOTE)
    assert ran.process.returncode == 1
    said = ran.sentence()
    for words in ("nats_url) is spoken to without TLS", "store_url) is spoken to without TLS"):
        assert words in said
    for words in DOORS:
        assert (words in said) is (agent in ("gateway", "api")), words
    assert "hunter2" not in "\n".join(ran.lines)


async def test_what_is_allowed_is_warned_of(tmp_path: Path) -> None:
    """With all of it allowed the start goes on, to a server that is not there; each exception is logged."""
    allowed = "gateway, nats,nats-credentials,token-key"
    settings = {
        "TIDINGS_NATS_URL": "nats://192.0.2.1:4222",
        "TIDINGS_STORE_URL": f"sqlite:///{tmp_path}/inbox.db",
        "TIDINGS_REQUEST_TIMEOUT_S": "0.2",
    }
    ran = await answer("gateway", cwd=tmp_path, **{**REMOTE, **settings, "TIDINGS_INSECURE": allowed})
    assert "no connection to NATS" in ran.sentence()
    for name in ("gateway", "nats", "nats-credentials", "token-key"):
        assert any(f"insecure={name} allows it: " in line for line in ran.errors), ran.errors


def names(**settings: object) -> list[str]:
    return [name for name, _ in exposures(Settings(**{"token_key": KEY, **settings}))]  # type: ignore[arg-type]


@pytest.mark.parametrize("host", ["127.0.0.1", "127.8.9.1", "localhost", "::1"])
def test_this_machine_is_no_exposure(host: str) -> None:
    """Addresses that nobody else reaches need nothing."""
    bracketed = f"[{host}]" if ":" in host else host
    stores = {} if ":" in host else {"store_url": f"cql://{host}/tidings"}
    assert names(host=host, nats_url=f"nats://{bracketed}:4222", **stores) == []


@pytest.mark.parametrize("host", ["", "0.0.0.0", "::", "192.0.2.1", "2001:db8::1", "localhost.example.com"])
def test_everything_else_is(host: str) -> None:
    """Also what listens everywhere, and names that only look like this machine's."""
    assert names(host=host) == ["gateway"]


def test_tls_and_credentials_are_protection(tmp_path: Path) -> None:
    """TLS in the address or a CA, a login, a credentials file or a certificate; one server without is too many."""
    certificate, key = map(str, Authority(tmp_path).pair("any"))
    mine = {"nats_certificate": certificate, "nats_key": key}
    assert names(host="0.0.0.0", tls_certificate=certificate, tls_key=key) == []
    assert names(nats_url="nats://n1.example.com") == ["nats", "nats-credentials"]
    assert names(nats_url="127.0.0.1,n1.example.com") == ["nats", "nats-credentials"]
    assert names(nats_url="tls://n1.example.com") == ["nats-credentials"]
    assert names(nats_url="tls://n1.example.com", nats_credentials="/a.creds") == []
    assert names(nats_url="nats://n1.example.com", nats_ca="/ca.pem", nats_credentials="/a.creds") == []
    assert names(nats_url="tls://u:p@n1.example.com") == []
    assert names(nats_url="nats://n1.example.com", **mine) == []
    assert names(store_url="cql://u:p@s1.example.com,127.0.0.1/tidings?datacenter=dc1") == ["cql"]
    assert names(store_url="cql://s1.example.com/tidings?tls=on&ca=/ca.pem") == []


@pytest.mark.parametrize(
    "key", ["0" * 40, "my-secret-my-secret-my-secret-0123456", "an-example-key-of-the-docs-4711-0815"]
)
def test_keys_that_can_be_guessed(key: str) -> None:
    """Few different characters, or words of documentation."""
    assert names(token_key=key) == ["token-key"]
    assert names(token_key=f"{KEY},{key}") == ["token-key"]


def test_the_key_of_a_development_mesh(tmp_path: Path) -> None:
    """It was made to be handed out: no gateway takes it."""
    folder = StateFolder(tmp_path / "state")
    folder.open()
    try:
        with pytest.raises(StartFailed, match="token_key is that of a `tidings dev`"):
            check_exposures(Settings(token_key=folder.key()), "gateway")
    finally:
        folder.close()
    check_exposures(Settings(token_key=folder.key(), insecure="token-key"), "gateway")


def test_exceptions_must_be_known() -> None:
    """A slip of the pen allows nothing."""
    with pytest.raises(BadSettings, match="insecure has 'gatway': it may have gateway, api, nats"):
        Settings(insecure="nats,gatway")


async def test_a_gateway_behind_a_proxy(tmp_path: Path) -> None:
    """The sentence names the exception that the operator is to make, together with those that there are."""
    environment = {**REMOTE, "TIDINGS_TOKEN_KEY": KEY, "TIDINGS_NATS_URL": "nats://127.0.0.1:1"}
    environment["TIDINGS_STORE_URL"] = f"sqlite:///{tmp_path}/inbox.db"
    ran = await answer("gateway", cwd=tmp_path, **environment, TIDINGS_INSECURE="cql")
    assert ran.sentence().endswith("insecure=cql,gateway (TIDINGS_INSECURE)")


def _environment_of(values: Mapping[str, str]) -> dict[str, str]:
    return {f"TIDINGS_{name.upper()}": value for name, value in values.items()}


async def test_the_doctor_names_exposures(tmp_path: Path) -> None:
    """What agents would refuse fails, what is allowed is a warning, and the certificate's end is told."""
    certificate, key = map(str, Authority(tmp_path).expired("old"))
    values = {"tls_certificate": certificate, "tls_key": key, "nats_url": "nats://192.0.2.1", "insecure": "nats"}
    values |= {"request_timeout_s": "0.2", "token_key": KEY}
    ran = await answer("doctor", "--nats", "nats://192.0.2.1", cwd=tmp_path, **_environment_of(values))
    assert ran.process.returncode == 1
    said = "\n".join(ran.out)
    assert "warn  insecure=nats: NATS at 192.0.2.1" in said
    assert "FAIL  agents do not start: NATS at 192.0.2.1 (nats_url) asks nobody" in said
    assert "is good until 2021-01-01 00:00 UTC: renew it" in said
