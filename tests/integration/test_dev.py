"""`tidings dev`: starts, serves, is found again, recovers and stops."""

from __future__ import annotations

import asyncio
import os
import shutil
import signal
import time
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import aiohttp
import pytest

from support.clock import SCALE, until
from support.command import answer, processes_of, tidings
from support.dev import ANY, Dev, dev, in_inbox
from support.device import Device
from tidings import __version__

STOP_S = 5 * SCALE
"""What a Ctrl-C may take."""


@pytest.fixture(autouse=True)
async def nothing_left(tmp_path: Path) -> AsyncIterator[None]:
    """No test leaves a process of its folder behind."""
    yield
    await until(lambda: not processes_of(tmp_path), f"processes are left: {processes_of(tmp_path)}")


# It runs


async def test_says_where_to_look(tmp_path: Path) -> None:
    """The greeting names page, WebSocket, NATS and state, and what answers there is ready."""
    async with dev(tmp_path / "state") as mesh:
        await mesh.command.said(rf"WebSocket +ws{mesh.url.removeprefix('http')}/v1/ws")
        await mesh.command.said(rf"State +{tmp_path / 'state'}$")
        for path in ("/", "/healthz", "/readyz"):
            async with mesh.http.get(mesh.url + path) as response:
                assert response.status == 200, path
        async with mesh.http.get(f"{mesh.url}/dev/info") as response:
            info = await response.json()
            assert shutil.which(info.pop("program")), "what the page says can be typed"
            assert info == {
                "nats_url": mesh.nats,
                "version": __version__,
                "ack_wait_s": 30,
                "linger_s": 30,
            }


async def test_greeting_lines_work(tmp_path: Path) -> None:
    """The lines to copy do what they say."""
    async with dev(tmp_path / "state") as mesh:
        listen = (await mesh.command.said(r"^ +\S*tidings (listen .*)$"))[1]
        publish = (await mesh.command.said(r"^ +\S*tidings (publish .*)$"))[1].replace("'", "")
        async with tidings(*listen.split()) as listener:
            await listener.said("listening as alice")
            published = await answer(*publish.split())
            assert published.process.returncode == 0, published.lines
            await listener.said(r'social\.like +\{"text":"hi"\}')


async def test_listen_and_token_by_state(tmp_path: Path) -> None:
    """A token that `tidings token` prints opens a connection, and `tidings doctor` finds all well."""
    async with dev(tmp_path / "state") as mesh:
        printed = await answer("token", "--user", "bob", "--state", mesh.state)
        async with Device(f"{mesh.url}/v1/ws", printed.out[0]) as device:
            assert device.welcome["user"] == "bob"
        doctor = await answer("doctor", "--state", mesh.state)
        assert doctor.process.returncode == 0, doctor.lines
        assert not any(line.startswith("FAIL") for line in doctor.out)


async def test_second_start_finds_everything(tmp_path: Path) -> None:
    """What was published and what was acknowledged is there at the next start, for the same token."""
    state = tmp_path / "state"
    async with dev(state) as mesh:
        async with mesh.device("alice") as device:
            await mesh.publish("alice", "seen")
            await device.expect("seen")
            await device.ask("count")
        await mesh.publish("alice", "missed")
        async with mesh.device("alice", "desk") as other:
            await in_inbox(other, "missed", "seen")
        key = (state / "token.key").read_text()
    async with dev(state) as mesh, mesh.device("alice") as device:
        await device.expect("missed")
        assert device.ids == ["missed"]
        await in_inbox(device, "missed", "seen")
        assert (state / "token.key").read_text() == key


async def test_settings_reach_the_agents(tmp_path: Path) -> None:
    """The environment tunes the gateway; server, store, key and partitions are the mesh's own."""
    environment = {
        "TIDINGS_ACK_WAIT_S": "7",
        "TIDINGS_NATS_URL": "nats://192.0.2.1:4222",
        "TIDINGS_STORE_URL": "sqlite:////nowhere/x.db",
        "TIDINGS_PARTITIONS": "64",
        "TIDINGS_REPLICAS": "3",
        "TIDINGS_TOKEN_KEY": "k" * 40,
    }
    async with dev(tmp_path / "state", **environment) as mesh:
        async with mesh.http.get(f"{mesh.url}/dev/info") as response:
            info = await response.json()
        assert (info["ack_wait_s"], info["nats_url"]) == (7, mesh.nats)
        async with mesh.device("alice") as device:
            await mesh.publish("alice", "one")
            await device.expect("one")


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
async def test_stops_in_time(number: signal.Signals, tmp_path: Path) -> None:
    """With devices connected both signals stop all of it within five seconds: status 0, `bye`, no traceback."""
    async with dev(tmp_path / "state") as mesh, mesh.device("alice") as device, mesh.device("bob"):
        began = time.monotonic()
        mesh.command.process.send_signal(number)
        assert await device.closed() == 1012
        assert await mesh.command.ended() == 0
        assert time.monotonic() - began < STOP_S
        assert mesh.command.sentences() == []
        assert not (mesh.state / "runtime.json").exists()
        assert processes_of(tmp_path) == []


async def test_stops_in_time_when_nats_hangs(tmp_path: Path) -> None:
    """A frozen nats-server costs no more than the five seconds either, and does not stay behind."""
    async with dev(tmp_path / "state") as mesh, mesh.device("alice"):
        os.kill(mesh.nats_pid, signal.SIGSTOP)
        began = time.monotonic()
        assert await mesh.command.stop() == 0
        assert time.monotonic() - began < STOP_S
        assert processes_of(tmp_path) == []


async def test_second_ctrl_c_forces(tmp_path: Path) -> None:
    """A second Ctrl-C ends it at once, with status 130."""
    async with tidings("dev", *ANY, "--state", tmp_path / "state") as command:
        await command.said("Ctrl-C")
        frozen = int((tmp_path / "state" / "nats" / "nats.pid").read_text())
        os.kill(frozen, signal.SIGSTOP)
        try:
            command.process.send_signal(signal.SIGINT)
            await command.said("stopping")
            assert await command.stop() == 130
        finally:
            os.kill(frozen, signal.SIGCONT)
        await until(lambda: not processes_of(tmp_path), "nats-server follows")


async def test_ctrl_c_while_it_starts(tmp_path: Path) -> None:
    """A Ctrl-C before it is ready stops what was started."""
    async with tidings("dev", *ANY, "--state", tmp_path / "state") as command:
        await until((tmp_path / "state" / "nats" / "nats.log").exists, "nats-server is about to start")
        assert await command.stop() == 0
        assert command.sentences() == []


# Things die


async def test_killed_nats_comes_back(tmp_path: Path) -> None:
    """nats-server is killed: it is started again, and a device that stayed connected gets what comes after."""
    async with dev(tmp_path / "state") as mesh, mesh.device("alice") as device:
        await mesh.publish("alice", "before")
        await device.expect("before")
        os.kill(mesh.nats_pid, signal.SIGKILL)
        await mesh.command.said("answers again")
        await mesh.publish("alice", "after")
        await device.expect("after")
        async with mesh.http.get(f"{mesh.url}/readyz") as response:
            assert response.status == 200


async def test_killed_mesh_starts_again(tmp_path: Path) -> None:
    """SIGKILL of the whole: nats-server ends with it, and the next start, on the same ports, has lost nothing."""
    state = tmp_path / "state"
    async with tidings("dev", *ANY, "--state", state) as command:
        async with aiohttp.ClientSession() as http:
            mesh = Dev(command, state, http)
            await mesh.read_greeting()
            async with mesh.device("alice"):
                pass
            await mesh.publish("alice", "one")
        command.process.kill()
        assert await command.ended() == -signal.SIGKILL
    again = ("--port", mesh.url.rpartition(":")[2], "--nats-port", mesh.nats.rpartition(":")[2])
    async with dev(state, *again) as after, after.device("alice") as device:
        assert (after.url, after.nats) == (mesh.url, mesh.nats)
        await device.expect("one")


async def test_lost_streams_end_it(tmp_path: Path) -> None:
    """Streams that are gone when nats-server comes back are not made anew in silence."""
    async with tidings("dev", *ANY, "--state", tmp_path / "state") as command:
        await command.said("Ctrl-C")
        nats = tmp_path / "state" / "nats"
        shutil.rmtree(nats / "jetstream")
        os.kill(int((nats / "nats.pid").read_text()), signal.SIGKILL)
        assert await command.ended() == 1
        assert "missing NOTIFY_0" in command.sentence()


# What it serves


async def test_page_is_served(tmp_path: Path) -> None:
    """The page's files come with a strict content security policy; nothing else of the package does."""
    async with dev(tmp_path / "state") as mesh:
        async with mesh.http.get(f"{mesh.url}/") as response:
            assert response.content_type == "text/html"
            assert response.headers["Content-Security-Policy"].startswith("default-src 'self'; connect-src 'self' ws:")
            assert "unsafe" not in response.headers["Content-Security-Policy"]
            page = await response.text()
        async with mesh.http.get(f"{mesh.url}/page/app.js") as response:
            assert (response.status, response.content_type) == (200, "text/javascript")
        assert "/page/app.js" in page
        for path in ("/page/none.js", "/page/..%2f__init__.py", "/page/%2e%2e/mesh.py", "/page/", "/page/a%00.js"):
            async with mesh.http.get(aiohttp.client.URL(mesh.url + path, encoded=True)) as response:
                assert response.status == 404, path


@pytest.mark.parametrize("what", ["token", "publish", "crowd"])
async def test_calls_of_other_pages_are_refused(what: str, tmp_path: Path) -> None:
    """Neither another origin, nor a rebound name, nor a form gets a token."""
    async with dev(tmp_path / "state") as mesh:
        port = mesh.url.rpartition(":")[2]
        body = {
            "token": {"user": "alice"},
            "publish": {"user": "alice", "type": "t"},
            "crowd": {"topic": "post.42", "followers": 1},
        }[what]
        for headers, expected in (
            ({"Host": f"evil.example:{port}"}, 403),
            ({"Host": f"127.0.0.1.evil.example:{port}"}, 403),
            ({"Origin": "http://evil.example"}, 403),
            ({"Origin": "null"}, 403),
            ({"Origin": "http://127.0.0.1:1"}, 403),
            ({"Content-Type": "text/plain"}, 415),
            ({"Content-Type": "application/x-www-form-urlencoded"}, 415),
            ({"Origin": mesh.url}, 200),
            ({"Host": f"localhost:{port}", "Origin": f"http://localhost:{port}"}, 200),
            ({"Host": f"[::1]:{port}"}, 200),
            ({}, 200),
        ):
            status, said = await mesh.post(what, body, **headers)
            assert status == expected, (headers, said)
            assert status == 200 or set(said) == {"code", "message"}


async def test_bad_requests(tmp_path: Path) -> None:
    """A request that is not as it should be is a 4xx with a code and a message."""
    async with dev(tmp_path / "state") as mesh:
        for what, body, expected in (
            ("token", b"{", 400),
            ("token", [], 400),
            ("token", {}, 400),
            ("token", {"user": 1}, 400),
            ("token", {"user": ""}, 400),
            ("token", {"user": "x" * 201}, 400),
            ("token", {"user": "alice", "device": ""}, 400),
            ("token", {"user": "alice", "role": "root"}, 400),
            ("token", b" " * 65_537, 413),
            ("publish", {"user": "alice"}, 400),
            ("publish", {"user": "alice", "type": 1}, 400),
            ("publish", {"user": "alice", "type": "t", "id": ""}, 400),
            ("publish", {"user": "alice", "type": "t", "data": "x" * 20_000}, 400),
            ("publish", {"type": "t"}, 400),
            ("publish", {"user": "alice", "topic": "post.42", "type": "t"}, 400),
            ("publish", {"topic": 42, "type": "t"}, 400),
            ("publish", {"topic": "post..42", "type": "t"}, 400),
            ("publish", {"topic": "post.>", "type": "t"}, 400),
            ("publish", {"topic": "x" * 201, "type": "t"}, 400),
            ("crowd", b"{", 400),
            ("crowd", {}, 400),
            ("crowd", {"followers": 10}, 400),
            ("crowd", {"topic": ""}, 400),
            ("crowd", {"topic": "post.>"}, 400),
            ("crowd", {"topic": "post..42", "followers": 0}, 400),
            ("crowd", {"topic": "post.42", "followers": -1}, 400),
            ("crowd", {"topic": "post.42", "followers": 10_001}, 400),
            ("crowd", {"topic": "post.42", "followers": 1.5}, 400),
            ("crowd", {"topic": "post.42", "followers": True}, 400),
            ("crowd", {"topic": "post.42", "followers": "2000"}, 400),
            ("crowd", {"topic": "post.42", "followers": None}, 400),
            ("crowd", {"topic": "post.42", "most": 1}, 400),
            ("crowd", {"topic": "user.alice.likes"}, 403),
        ):
            status, said = await mesh.post(what, body)
            assert status == expected, (what, body, said)
            assert set(said) == {"code", "message"}


async def test_publish_says_what_was_stored(tmp_path: Path) -> None:
    """The answer has id, stream and sequence; the same id again is a duplicate."""
    async with dev(tmp_path / "state") as mesh:
        body = {"user": "carol", "type": "test.made", "data": [1], "id": "one"}
        status, first = await mesh.post("publish", body)
        assert status == 200
        assert (first["id"], first["seq"], first["duplicate"]) == ("one", 1, False)
        assert first["stream"].startswith("NOTIFY_")
        status, again = await mesh.post("publish", body)
        assert (status, again) == (200, {**first, "duplicate": True})


async def test_crowd(tmp_path: Path) -> None:
    """A crowd comes once, shrinks, goes again, leaves other followers alone, and gets what is published."""
    async with dev(tmp_path / "state") as mesh, mesh.device("alice") as alice:
        for topics in (["post.>"], ["post.42"]):
            assert (await alice.ask("sub", topics=topics))["t"] == "ok"

        async def gather(**asked: Any) -> tuple[int, ...]:
            status, said = await mesh.post("crowd", {"topic": "post.42", **asked})
            assert status == 200, said
            assert said.pop("topic") == "post.42"
            return tuple(said[name] for name in ("followers", "crowd", "added", "removed"))

        assert await gather() == (2001, 2000, 2000, 0)
        assert await gather() == (2001, 2000, 0, 0)
        assert await gather(followers=120) == (121, 120, 0, 1880)
        at_once = await asyncio.gather(gather(followers=200), gather(followers=200))
        assert sorted(at_once) == [(201, 200, 0, 0), (201, 200, 80, 0)]
        status, said = await mesh.post("publish", {"topic": "post.42", "type": "test.made", "id": "one"})
        assert (status, said["stream"]) == (200, "TOPICS")
        await alice.expect("one")
        async with mesh.device("crowd-200") as member:
            await in_inbox(member, "one")
        assert await gather(followers=0) == (1, 0, 0, 200)
        assert await gather(followers=0) == (1, 0, 0, 0)
        assert (await alice.ask("subs"))["topics"] == ["post.42", "post.>"]
