"""A password in an address is in no message: not where it fails, not where settings are shown."""

from __future__ import annotations

import asyncio
import logging

import pytest

from support.command import run_here
from tidings.publish import Publisher
from tidings.runtime.settings import Settings
from tidings.wire.errors import BadSettings, StreamUnavailable

PASSWORD = "hunter2-geheim"
NOWHERE = f"nats://shop:{PASSWORD}@127.0.0.1:1,nats://{PASSWORD}@127.0.0.1:1"


@pytest.mark.parametrize(
    "command",
    [
        *(["topology", "show"], ["topology", "apply"], ["doctor"], ["settings"], ["deadletters", "list"]),
        *(["user", "export", "--user", "alice"], ["revoke", "--user", "alice"]),
        *(["publish", "--user", "alice", "--type", "test.made"], ["inbox"], ["fanout"], ["gateway"], ["api"]),
    ],
    ids=" ".join,
)
def test_no_command_shows_it(
    command: list[str], tmp_path: object, capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each says where it has tried, without the login, also where it logs all that it can."""
    for name, value in {
        "NATS_URL": NOWHERE,
        "STORE_URL": f"sqlite:///{tmp_path}/inbox.db",
        "TOKEN_KEY": "a-key-for-tests-and-nothing-else-0123456789",
        "LOG_LEVEL": "debug",
        "REQUEST_TIMEOUT_S": "0.2",
    }.items():
        monkeypatch.setenv(f"TIDINGS_{name}", value)
    status = run_here(*command)
    said = "".join(capfd.readouterr())
    assert PASSWORD not in said
    if command != ["settings"]:
        assert status == 1
        assert "127.0.0.1:1" in said


def test_settings_that_are_wrong() -> None:
    """Also where the address is refused, and where settings are printed whole."""
    with pytest.raises(BadSettings) as refused:
        Settings(nats_url=f"nats://shop:{PASSWORD}@127.0.0.1:0")
    assert PASSWORD not in str(refused.value)
    assert PASSWORD not in repr(Settings(nats_url=NOWHERE, store_url=f"cql://a:{PASSWORD}@h/k"))


def test_the_sdk(caplog: pytest.LogCaptureFixture) -> None:
    """The error of a publisher that cannot connect, and its log."""
    caplog.set_level(logging.DEBUG)

    async def publish() -> None:
        async with Publisher(Settings(nats_url=NOWHERE, request_timeout_s=0.2)):
            raise AssertionError("nobody is there")

    with pytest.raises(StreamUnavailable, match="no connection to NATS") as failed:
        asyncio.run(publish())
    assert PASSWORD not in str(failed.value) + caplog.text
