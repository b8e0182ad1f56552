"""`tidings dev` that cannot start: each cause is a sentence that says what to do."""

from __future__ import annotations

import shutil
from collections.abc import AsyncIterator, Callable
from pathlib import Path

import pytest

from support.clock import until
from support.command import processes_of, taken_port
from support.dev import dev, refusal
from tidings.stream.server import BINARY_VARIABLE


@pytest.fixture(autouse=True)
async def nothing_left(tmp_path: Path) -> AsyncIterator[None]:
    """No test leaves a process of its folder behind."""
    yield
    await until(lambda: not processes_of(tmp_path), f"processes are left: {processes_of(tmp_path)}")


@pytest.fixture
async def used(tmp_path: Path) -> Path:
    """A state folder that was in use."""
    async with dev(tmp_path / "state") as mesh:
        await mesh.publish("alice", "before")
    return tmp_path / "state"


async def test_two_at_once(tmp_path: Path) -> None:
    """A second mesh on the same folder is refused, also with --fresh, and the first does not notice."""
    async with dev(tmp_path / "state") as mesh:
        for more in ((), ("--fresh",)):
            sentence = await refusal(mesh.state, *more)
            assert "another `tidings dev` runs on" in sentence
            assert "--state" in sentence
        async with mesh.device("alice") as device:
            await mesh.publish("alice", "one")
            await device.expect("one")


@pytest.mark.parametrize("option", ["--port", "--api-port", "--nats-port"])
async def test_port_in_use(option: str, tmp_path: Path) -> None:
    """A taken port is named, with the option that chooses another."""
    with taken_port() as port:
        sentence = await refusal(tmp_path / "state", option, str(port))
    assert f"127.0.0.1:{port}" in sentence
    assert f"another with {option}" in sentence


@pytest.mark.parametrize("host", ["127.0.0.1", "localhost", "0.0.0.0"])
async def test_one_port_for_both(host: str, tmp_path: Path) -> None:
    """The same port twice: the sentence names both options, and nothing was started or made."""
    with taken_port() as port:
        pass
    sentence = await refusal(tmp_path / "state", "--host", host, "--port", str(port), "--nats-port", str(port))
    assert f"cannot both have port {port}" in sentence
    assert "--port and --nats-port" in sentence
    assert not (tmp_path / "state").exists()


async def test_foreign_host(tmp_path: Path) -> None:
    """An address that is not this machine's is named."""
    assert "192.0.2.1" in await refusal(tmp_path / "state", "--host", "192.0.2.1")


def _write(name: str, content: str) -> Callable[[Path], object]:
    def damage(state: Path) -> object:
        return (state / name).write_text(content)

    return damage


def _replace(name: str) -> Callable[[Path], object]:
    """A file where a folder should be, or the other way round."""

    def damage(state: Path) -> object:
        where = state / name
        if where.is_dir():
            shutil.rmtree(where)
            return where.write_text("")
        where.unlink()
        return where.mkdir()

    return damage


_STREAMS = "nats/jetstream/jetstream/$G/streams"


@pytest.mark.parametrize(
    ("damage", "said", "remedy"),
    [
        (_write("tidings.state", "garbage"), "tidings.state", "--fresh"),
        (_write("tidings.state", '{"format":99,"partitions":16,"streams_made":true}'), "format 99", "--fresh"),
        (_write("token.key", "short"), "too short", "Delete it"),
        (_replace("token.key"), "token.key", "Make it readable"),
        (_write("tidings.db", "garbage" * 1000), "tidings.db", "--fresh"),
        (_replace("tidings.db"), "tidings.db", "--fresh"),
        (_write("tidings.db", "x"), "inbox", "--store"),
        (lambda state: (state / "tidings.db").unlink(), "inbox", "--store"),
        (_replace("nats/jetstream"), "nats/jetstream", "Make it a folder"),
        (_replace("nats"), "nats", "Make it a folder"),
        (_write(f"{_STREAMS}/NOTIFY_3/meta.inf", "garbage"), "missing NOTIFY_3", "--fresh"),
        (_write(f"{_STREAMS}/NOTIFY_3/obs/inbox/o.dat", "garbage"), "NOTIFY_3.inbox", "--fresh"),
    ],
    ids=[
        "marker",
        "format",
        "key",
        "key-folder",
        "db",
        "db-folder",
        "db-cut-off",
        "db-gone",
        "jetstream",
        "nats",
        "stream",
        "consumer",
    ],
)
async def test_damaged_state(damage: Callable[[Path], object], said: str, remedy: str, used: Path) -> None:
    """Each damage is a sentence that names it and says what to do; --fresh begins anew."""
    damage(used)
    sentence = await refusal(used)
    assert str(used) in sentence
    assert said in sentence
    assert remedy in sentence
    async with dev(used, "--fresh") as mesh, mesh.device("alice") as device:
        await mesh.publish("alice", "one")
        await device.expect("one")


async def test_state_is_a_file(tmp_path: Path) -> None:
    """A file in the place of the state folder is named."""
    (tmp_path / "state").write_text("")
    assert str(tmp_path / "state") in await refusal(tmp_path / "state")


async def test_state_cannot_be_written(tmp_path: Path) -> None:
    """A place where nobody may write is named, with what to do."""
    sentence = await refusal(Path("/proc/tidings-test"))
    assert "/proc/tidings-test" in sentence
    assert "--state" in sentence


async def test_folder_of_somebody_else(tmp_path: Path) -> None:
    """A folder with other content is neither used nor emptied."""
    (tmp_path / "work").mkdir()
    (tmp_path / "work" / "thesis.txt").write_text("years")
    for more in ((), ("--fresh",)):
        assert "is no state folder" in await refusal(tmp_path / "work", *more)
    assert [entry.name for entry in (tmp_path / "work").iterdir()] == ["thesis.txt"]


async def test_fresh_deletes_what_is_ours(used: Path) -> None:
    """--fresh begins with nothing, a new key included; a file of somebody else's stays."""
    key = (used / "token.key").read_text()
    (used / "notes.txt").write_text("mine")
    async with dev(used) as mesh, mesh.device("alice") as device:
        await mesh.publish("alice", "one")
        await device.expect("one")
    async with dev(used, "--fresh") as mesh, mesh.device("alice") as device:
        assert (await device.ask("inbox"))["items"] == []
        await mesh.publish("alice", "two")
        await device.expect("two")
        assert device.ids == ["two"]
    assert (used / "token.key").read_text() != key
    assert (used / "notes.txt").read_text() == "mine"


async def test_nats_server_cannot_start(tmp_path: Path) -> None:
    """A nats-server that dies at start: its last words and its log."""
    binary = tmp_path / "fake"
    binary.write_text("#!/bin/sh\necho 'nats-server: out of luck' >&2\nexit 1\n")
    binary.chmod(0o755)
    sentence = await refusal(tmp_path / "state", **{BINARY_VARIABLE: str(binary)})
    assert "out of luck" in sentence
    assert "nats.log" in sentence


def test_key_is_private(used: Path) -> None:
    """Nobody else can read the key, nor enter the folder."""
    assert (used / "token.key").stat().st_mode & 0o777 == 0o600
    assert used.stat().st_mode & 0o777 == 0o700
