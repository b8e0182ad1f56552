"""The command line: what it prints, what it refuses, and with which exit status."""

from __future__ import annotations

import asyncio
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import AsyncIterator
from pathlib import Path

import pytest

from support.clock import until
from support.command import answer, processes_of, tidings
from support.device import Device
from support.mesh import KEY, Mesh
from tidings import __version__
from tidings.identity import Device as DeviceToken
from tidings.identity import Verifier, issue
from tidings.runtime.settings import Settings
from tidings.stream.server import NatsServer
from tidings.wire import subject
from tidings.wire.notification import build

PARTITIONS = 4


@pytest.fixture(autouse=True)
async def nothing_left(tmp_path: Path) -> AsyncIterator[None]:
    """No test leaves a process of its folder behind."""
    yield
    await until(lambda: not processes_of(tmp_path), f"processes are left: {processes_of(tmp_path)}")


@pytest.fixture
def state(tmp_path: Path) -> Path:
    """A state folder with a key."""
    folder = tmp_path / "state"
    folder.mkdir()
    (folder / "token.key").write_text(KEY)
    (folder / "token.key").chmod(0o600)
    return folder


@pytest.fixture
async def nats(tmp_path: Path) -> AsyncIterator[NatsServer]:
    """An empty nats-server."""
    server = NatsServer(tmp_path / "nats", partitions=PARTITIONS)
    await server.start()
    yield server
    await server.stop()


def small(server: NatsServer) -> dict[str, str]:
    """The environment of a small mesh on a server."""
    return {
        "TIDINGS_NATS_URL": server.url,
        "TIDINGS_PARTITIONS": str(PARTITIONS),
        "TIDINGS_REPLICAS": "1",
        "TIDINGS_PORT": "0",
        "TIDINGS_TOKEN_KEY": KEY,
    }


async def test_version() -> None:
    """--version prints name and version."""
    ran = await answer("--version")
    assert (ran.process.returncode, ran.out) == (0, [f"tidings {__version__}"])


@pytest.mark.parametrize(
    "arguments",
    [(), ("fly",), ("token",), ("token", "--user", "alice", "--ttl", "soon"), ("dev", "--nats-port", "-1")],
    ids=" ".join,
)
async def test_wrong_usage(arguments: tuple[str, ...]) -> None:
    """Wrong usage ends with status 2 and says how it is meant."""
    ran = await answer(*arguments)
    assert ran.process.returncode == 2
    assert ran.errors[0].startswith("usage: tidings")


async def test_settings_lists_all() -> None:
    """`tidings settings` has every variable with its default and meaning."""
    ran = await answer("settings")
    assert ran.process.returncode == 0
    assert len(ran.out) == len(Settings.describe()) + 1
    assert any(line.split()[:2] == ["TIDINGS_ACK_WAIT_S", "30"] for line in ran.out)


async def test_settings_names_each_bad_value(tmp_path: Path) -> None:
    """`tidings settings` lists them all the same, and says of each bad value what it must be, with status 1."""
    file = tmp_path / "tidings.toml"
    file.write_text('window = 300\nhost = 5\nhots = "x"\nretention_days = "90"\n')
    bad = {
        "TIDINGS_REPLICAS": "9",
        "TIDINGS_PARTITIONS": "many",
        "TIDINGS_RETENTION_DAYS": "30",
        "TIDINGS_NATS_URL": "nats://a,,nats://b",
        "TIDINGS_TOKEN_KEY": "short",
        "TIDINGS_LOG_LEVEL": "loud",
        "TIDINGS_STORE_URL": "mysql://somewhere",
        "TIDINGS_SUBSCRIBE_RULES": "!..",
    }
    ran = await answer("settings", "--config", file, **bad)
    assert ran.process.returncode == 1
    assert len(ran.out) == len(Settings.describe()) + 1
    said = ran.sentences()
    wrong = [
        "hots",
        "TIDINGS_PARTITIONS is 'many'",
        "nats_url",
        "replicas is 9",
        "host is 5",
        "token_key is too short",
        "log_level is 'loud'",
        "window is 300",
        "store_url is 'mysql://somewhere'",
        "subscribe_rules",
    ]
    for words in wrong:
        assert sum(words in sentence for sentence in said) == 1, (words, said)
    assert len(said) == len(wrong), said


async def test_settings_of_a_file_that_is_missing(tmp_path: Path) -> None:
    """A settings file that cannot be read is a bad value, too."""
    ran = await answer("settings", "--config", tmp_path / "none.toml")
    assert ran.process.returncode == 1
    assert len(ran.out) == len(Settings.describe()) + 1
    assert str(tmp_path / "none.toml") in ran.sentence()


async def test_settings_out_of_range() -> None:
    """A setting out of its range is named, with its range."""
    ran = await answer("inbox", TIDINGS_REPLICAS="9")
    assert ran.process.returncode == 1
    assert ran.sentence() == "replicas is 9: it must be from 1 to 5 (replicas of every stream)"


@pytest.mark.parametrize("where", ["before", "after"])
async def test_config_file_is_missing(where: str, tmp_path: Path) -> None:
    """--config works before and after the command; a file that cannot be read is named."""
    option = ("--config", tmp_path / "none.toml")
    ran = await answer(*(option if where == "before" else ()), "inbox", *(option if where == "after" else ()))
    assert ran.process.returncode == 1
    assert str(tmp_path / "none.toml") in ran.sentence()


async def test_token_prints_a_token(state: Path) -> None:
    """`tidings token` prints a token that the state folder's key verifies, and nothing else."""
    before = int(time.time())
    ran = await answer("token", "--user", "alice", "--device", "phone", "--ttl", "15m", "--state", state)
    assert (ran.process.returncode, len(ran.lines)) == (0, 1)
    token = await Verifier(Settings(token_key=KEY)).verify(ran.out[0])
    assert isinstance(token, DeviceToken)
    assert token[:2] == ("alice", "phone")
    assert before + 900 <= token.expires <= time.time() + 900


async def test_token_for_nobody(state: Path) -> None:
    """An empty user id is refused with a sentence."""
    ran = await answer("token", "--user", "", "--state", state)
    assert ran.process.returncode == 1
    assert "user id is empty" in ran.sentence()


async def test_token_without_state(tmp_path: Path) -> None:
    """Without a state folder the sentence says what makes one."""
    ran = await answer("token", "--user", "alice", cwd=tmp_path)
    assert ran.process.returncode == 1
    assert "tidings dev" in ran.sentence()


async def test_reader_leaves_early(tmp_path: Path) -> None:
    """A reader that has enough (`| head`) ends the command without a word."""
    read, write = os.pipe()
    os.close(read)
    with os.fdopen(write, "wb") as closed:
        ran = await asyncio.to_thread(
            subprocess.run,
            [sys.executable, "-m", "tidings", "settings"],
            stdout=closed,
            stderr=subprocess.PIPE,
            check=False,
        )
    assert (ran.returncode, ran.stderr) == (141, b"")


async def test_topology_plan_apply_show(nats: NatsServer) -> None:
    """plan says what apply does, apply does it once, show shows it."""
    environment = small(nats)
    planned = await answer("topology", "plan", **environment)
    assert planned.out[0] == "create stream NOTIFY_0"
    # A stream and a consumer a partition, for topics and for broadcasts; decisions, keys, revocations, dead letters.
    assert planned.out[-1].startswith(f"{2 * PARTITIONS + 8} to do")
    applied = await answer("topology", "apply", **environment)
    assert applied.process.returncode == 0
    assert applied.out == [*planned.out[:-1], f"{2 * PARTITIONS + 8} done"]
    again = await answer("topology", "apply", **environment)
    assert again.out == ["nothing to do"]
    shown = await answer("topology", "show", "--nats", nats.url)
    assert shown.out[0] == f"{PARTITIONS} partitions"
    assert [line.split()[0] for line in shown.out[2:]] == [
        *(f"NOTIFY_{n}" for n in range(PARTITIONS)),
        "TOPICS",
        "DECISIONS",
        "KEYS",
        "BROADCAST",
        "REVOCATIONS",
        "DEAD",
    ]


async def test_topology_of_other_partitions(nats: NatsServer) -> None:
    """Streams of another number of partitions: plan and apply name the setting, and the value to give it."""
    assert (await answer("topology", "apply", **small(nats))).process.returncode == 0
    for action in ("plan", "apply"):
        ran = await answer("topology", action, **{**small(nats), "TIDINGS_PARTITIONS": "64"})
        assert ran.process.returncode == 1
        assert "TIDINGS_PARTITIONS is 64" in ran.sentence()
        assert ran.sentence().endswith(f"Set TIDINGS_PARTITIONS={PARTITIONS}")
    assert (await answer("topology", "plan", **small(nats))).out == ["nothing to do"]


async def test_topology_show_of_nothing(nats: NatsServer) -> None:
    """A server without streams: the sentence says which command makes them."""
    ran = await answer("topology", "show", "--nats", nats.url)
    assert ran.process.returncode == 1
    assert "tidings topology apply" in ran.sentence()


async def test_topology_apply_without_mapping(nats: NatsServer) -> None:
    """Streams for another number of partitions than the server maps to: the missing configuration is printed."""
    ran = await answer("topology", "apply", **{**small(nats), "TIDINGS_PARTITIONS": "1"})
    assert ran.process.returncode == 1
    assert "mappings:" in ran.sentence()
    assert "TIDINGS_PARTITIONS, now 1," in ran.sentence()


async def test_no_nats_server(tmp_path: Path) -> None:
    """Commands that need NATS say that none is there."""
    for arguments in (("publish", "--user", "a", "--type", "t"), ("topology", "show"), ("inbox",)):
        ran = await answer(*arguments, cwd=tmp_path, TIDINGS_NATS_URL="nats://127.0.0.1:1")
        assert ran.process.returncode == 1
        assert "nats://127.0.0.1:1" in ran.sentence()


@pytest.mark.parametrize(
    "arguments",
    [
        ("publish", "--user", "a", "--type", "t"),
        ("topology", "plan"),
        ("gateway",),
        ("inbox",),
        ("fanout",),
        ("user", "export", "--user", "a"),
    ],
    ids=lambda arguments: arguments[0],
)
async def test_credentials_are_missing(arguments: tuple[str, ...], tmp_path: Path) -> None:
    """Commands that sign in to NATS name the credentials file that is not there, and its setting."""
    file = tmp_path / "none.creds"
    ran = await answer(*arguments, cwd=tmp_path, TIDINGS_NATS_CREDENTIALS=str(file), TIDINGS_TOKEN_KEY=KEY)
    assert ran.process.returncode == 1
    assert str(file) in ran.sentence()
    assert "TIDINGS_NATS_CREDENTIALS" in ran.sentence()


async def test_publish_twice(mesh: Mesh) -> None:
    """publish prints id, stream and sequence; the same id again is the same notification."""
    arguments = ("publish", "--user", "alice", "--type", "test.made", "--data", '{"n":1}', "--id", "one")
    first = await answer(*arguments, "--nats", mesh.nats.url)
    assert first.process.returncode == 0, first.lines
    assert first.out[0].split()[0] == "one"
    again = await answer(*arguments, "--nats", mesh.nats.url)
    assert again.process.returncode == 0
    assert again.out == [f"{first.out[0]} (it was there already)"]


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (("--user", "", "--type", "t"), "user id is empty"),
        (("--user", "alice", "--type", ""), "`type`"),
        (("--user", "alice", "--type", "t", "--data", "{hi"), "--data is not JSON"),
        (("--user", "alice", "--type", "t", "--data", json.dumps("x" * 20_000)), "16384"),
    ],
    ids=["user", "type", "json", "size"],
)
async def test_publish_refuses(arguments: tuple[str, ...], said: str, mesh: Mesh) -> None:
    """What is no notification is refused before it is sent, with the reason."""
    ran = await answer("publish", *arguments, "--nats", mesh.nats.url)
    assert ran.process.returncode == 1
    assert said in ran.sentence()


async def test_publish_without_streams(nats: NatsServer) -> None:
    """A server that stores nothing: a sentence, not silence."""
    ran = await answer("publish", "--user", "alice", "--type", "t", "--nats", nats.url)
    assert ran.process.returncode == 1
    assert ran.sentence()


async def test_listen_prints_what_arrives(mesh: Mesh, state: Path) -> None:
    """A published notification is printed as a line, and acknowledged: the next listener does not get it."""
    gateway = await mesh.gateway()
    url = gateway.url.replace("http", "ws")
    arguments = ("--user", "alice", "--device", "shell", "--url", url, "--state", state)
    async with tidings("listen", *arguments) as listener:
        await listener.said("listening as alice")
        await mesh.publish("alice")
        await listener.said(r"test\.made .*\[n1\]")
        assert await listener.stop() == 130
    await mesh.publish("alice")
    async with tidings("listen", *arguments, "--json") as listener:
        await listener.said("n2")
        item = json.loads(listener.out[0])
        assert (item["n"]["id"], item["try"], item["n"]["data"]["number"]) == ("n2", 1, 2)
        assert item["pos"]
        assert await listener.stop() == 130
    assert listener.sentences() == []


async def test_listen_lets_no_text_steer_the_terminal(mesh: Mesh, state: Path) -> None:
    """Escape sequences in a notification are shown as text."""
    gateway = await mesh.gateway()
    url = gateway.url.replace("http", "ws")
    async with tidings("listen", "--user", "alice", "--url", url, "--state", state) as listener:
        await listener.said("listening as alice")
        id, body = build(type="t\x1b[2J", data={"text": "\x9b2J"}, id="n\r1")
        await mesh.connection.store(subject.notify_user("alice"), body, {"Nats-Msg-Id": id})
        await listener.said("2J.*2J")
        assert listener.out[0].endswith(r't\x1b[2J  {"text":"\x9b2J"}  [n\r1]')


async def test_listen_with_a_bad_token(mesh: Mesh) -> None:
    """A token that is refused ends the command with the gateway's reason; it does not try for ever."""
    gateway = await mesh.gateway()
    url = gateway.url.replace("http", "ws")
    ran = await answer("listen", "--user", "alice", "--url", url, "--token", issue("x" * 32, "alice"))
    assert ran.process.returncode == 1
    assert "token" in ran.sentence()


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
@pytest.mark.parametrize("kind", ["gateway", "inbox"])
async def test_agents_stop_cleanly(kind: str, number: signal.Signals, mesh: Mesh) -> None:
    """Both signals end an agent with status 0 and without a traceback."""
    agent = await (mesh.gateway() if kind == "gateway" else mesh.inbox())
    agent.process.send_signal(number)
    async with asyncio.timeout(10):
        assert await agent.process.wait() == 0
    await agent.stop()
    assert not any("Traceback" in line or "error" in line for line in agent.output)


async def test_gateway_sends_clients_away(mesh: Mesh) -> None:
    """A gateway that is told to stop closes its sockets with `bye` and 1012."""
    gateway = await mesh.gateway()
    device: Device = await mesh.online(gateway, "alice")
    gateway.process.send_signal(signal.SIGTERM)
    assert await device.closed() == 1012
    assert any(frame["t"] == "bye" for frame in device.frames)
    assert await gateway.stop() == 0


async def test_gateway_without_key() -> None:
    """A gateway without a key says how to make one."""
    ran = await answer("gateway", TIDINGS_TOKEN_KEY="")
    assert ran.process.returncode == 1
    assert "TIDINGS_TOKEN_KEY" in ran.sentence()


async def test_gateway_without_streams(nats: NatsServer, tmp_path: Path) -> None:
    """A gateway on a server without streams says which command makes them."""
    ran = await answer("gateway", cwd=tmp_path, **small(nats))
    assert ran.process.returncode == 1
    assert "tidings topology apply" in ran.sentence()


async def test_agent_configured_by_file(mesh: Mesh, tmp_path: Path) -> None:
    """A TOML file does what the environment does."""
    file = tmp_path / "tidings.toml"
    file.write_text(f'nats_url = "{mesh.nats.url}"\nstore_url = "{mesh.settings.store_url}"\nlog_level = "info"\n')
    async with tidings("inbox", "--config", file) as inbox:
        await inbox.said(f"reads {PARTITIONS} partitions")
        assert await inbox.stop() == 0


async def test_log_level(mesh: Mesh) -> None:
    """At level warning an agent that is well says nothing."""
    environment = {"TIDINGS_NATS_URL": mesh.nats.url, "TIDINGS_STORE_URL": mesh.settings.store_url}
    async with tidings("inbox", TIDINGS_LOG_LEVEL="warning", **environment) as inbox:
        await mesh.publish("alice")
        await mesh.stored("alice", "n1")
        assert await inbox.stop() == 0
        assert inbox.lines == []


async def test_doctor_on_a_good_mesh(mesh: Mesh) -> None:
    """All is well: status 0 and no FAIL."""
    environment = {
        **small(mesh.nats),
        "TIDINGS_STORE_URL": mesh.settings.store_url,
        "TIDINGS_INBOX_ACK_WAIT_S": str(mesh.settings.inbox_ack_wait_s),
        "TIDINGS_FANOUT_ACK_WAIT_S": str(mesh.settings.fanout_ack_wait_s),
        "TIDINGS_MAX_SESSIONS": "10",
    }
    ran = await answer("doctor", cwd=mesh.folder, **environment)
    assert ran.process.returncode == 0, ran.lines
    assert {line.split()[0] for line in ran.out} == {"ok"}
    for word in ("NATS", "JetStream", "mapping", "streams", "clock", "store", "open files", "token_key"):
        assert any(word in line for line in ran.out), word


async def test_doctor_names_what_is_wrong(nats: NatsServer, tmp_path: Path) -> None:
    """No streams, a mapping to other partitions, a store that is none, too few files, no key: each is a line."""
    (tmp_path / "garbage.db").write_text("garbage" * 1000)
    environment = {
        **small(nats),
        "TIDINGS_PARTITIONS": "64",
        "TIDINGS_STORE_URL": f"sqlite:///{tmp_path}/garbage.db",
        "TIDINGS_MAX_SESSIONS": "1000000",
        "TIDINGS_TOKEN_KEY": "",
    }
    ran = await answer("doctor", cwd=tmp_path, **environment)
    assert ran.process.returncode == 1
    wrong = [line for line in ran.out if not line.startswith("ok")]
    assert len(wrong) == 6, ran.out
    for words in ("mapping", "clock", "tidings topology apply", "garbage.db", "ulimit|limit", "TIDINGS_TOKEN_KEY"):
        assert any(word in line for line in wrong for word in words.split("|")), words


async def test_doctor_names_other_partitions(mesh: Mesh) -> None:
    """A mesh of another number of partitions: it is the setting that is wrong, not the server's mapping."""
    environment = {**small(mesh.nats), "TIDINGS_STORE_URL": mesh.settings.store_url, "TIDINGS_PARTITIONS": "64"}
    ran = await answer("doctor", cwd=mesh.folder, **environment)
    assert ran.process.returncode == 1
    wrong = [line for line in ran.out if line.startswith("FAIL")]
    assert [line.split()[1] for line in wrong] == ["subject", "streams:"], ran.out
    for line in wrong:
        assert f"TIDINGS_PARTITIONS={PARTITIONS}" in line
        assert "mappings:" not in line


async def test_doctor_without_nats(tmp_path: Path) -> None:
    """No server: one FAIL for NATS, and the rest is still looked at."""
    ran = await answer("doctor", "--nats", "nats://127.0.0.1:1", cwd=tmp_path, TIDINGS_TOKEN_KEY=KEY)
    assert ran.process.returncode == 1
    assert [line.split()[0] for line in ran.out].count("FAIL") == 1
    assert "nats://127.0.0.1:1" in ran.out[0]
    assert any("token_key" in line for line in ran.out)


async def test_doctor_without_credentials(tmp_path: Path) -> None:
    """No credentials file: one FAIL that names it and its setting, and the rest is still looked at."""
    file = tmp_path / "none.creds"
    ran = await answer("doctor", cwd=tmp_path, TIDINGS_NATS_CREDENTIALS=str(file), TIDINGS_TOKEN_KEY=KEY)
    assert ran.process.returncode == 1
    assert [line.split()[0] for line in ran.out].count("FAIL") == 1
    assert str(file) in ran.out[0]
    assert "TIDINGS_NATS_CREDENTIALS" in ran.out[0]
    assert any("token_key" in line for line in ran.out)


async def test_doctor_without_a_running_mesh(state: Path) -> None:
    """--state of a mesh that does not run: the sentence says so."""
    ran = await answer("doctor", "--state", state)
    assert ran.process.returncode == 1
    assert str(state) in ran.sentence()


@pytest.mark.parametrize(
    "url", ["", "nats://127.0.0.1:notaport", "nats://127.0.0.1:99999", "nats://a,,nats://b", "nats://[::1"]
)
async def test_no_address_of_a_server(url: str) -> None:
    """An address that is none is named, with one that would be."""
    ran = await answer("publish", "--user", "alice", "--type", "t", "--nats", url)
    assert ran.process.returncode == 1
    assert "nats://127.0.0.1:4222" in ran.sentence()
