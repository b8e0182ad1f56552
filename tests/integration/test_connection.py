"""The connection's fast parser against nats-py's own, however the bytes are cut."""

from __future__ import annotations

import asyncio
import random
import sys
from pathlib import Path
from types import ModuleType

import pytest

from support.clock import until
from support.mesh import Mesh
from tidings.runtime.settings import Settings
from tidings.stream.connection import Connection, connect
from tidings.wire.errors import BadSettings

STREAM = (
    b"MSG a.b 1 5\r\nhello\r\n"
    b"PING\r\n"
    b"MSG a.c 1 reply.to 0\r\n\r\n"
    b"HMSG a.d 1 reply.to 12 15\r\nNATS/1.0\r\n\r\nabc\r\n"
    b"HMSG a.e 1 31 31\r\nNATS/1.0 408 Request Timeout\r\n\r\n\r\n"
    b"+OK\r\n"
    b"MSG a.f 1 6\r\nMSG \r\n\r\n"
)
EXPECTED = [
    (b"a.b", b"", None, b"hello"),
    (b"a.c", b"reply.to", None, b""),
    (b"a.d", b"reply.to", b"NATS/1.0\r\n\r\n", b"abc"),
    (b"a.e", b"", b"NATS/1.0 408 Request Timeout\r\n\r\n", b""),
    (b"a.f", b"", None, b"MSG \r\n"),
]


async def test_every_cut_gives_the_same_messages() -> None:
    """Cut anywhere, in two or in many pieces: the same subjects, replies, headers and payloads, in order."""
    random.seed(1)
    stream = STREAM.replace(b"31 31", b"32 32")
    cuts = [[at] for at in range(1, len(stream))]
    cuts += [sorted(random.sample(range(1, len(stream)), 12)) for _ in range(200)]
    for cut in cuts:
        connection, seen = Connection(), []
        pings = []

        async def ping(pings: list[int] = pings) -> None:
            pings.append(1)

        connection._process_ping = ping
        connection.handlers[b"1"] = lambda *message, seen=seen: seen.append(message)
        for start, end in zip([0, *cut], [*cut, len(stream)], strict=True):
            await connection._ps.parse(stream[start:end])
        assert seen == EXPECTED, cut
        assert pings == [1], cut


async def test_handlers_survive_a_restart_of_the_server(mesh: Mesh) -> None:
    """A subscription by `listen` is there again after nats-server was killed."""
    heard = asyncio.Event()
    await mesh.connection.listen("test.again", lambda *message: heard.set())
    await mesh.connection.flush()
    mesh.nats.kill()
    await mesh.nats.answering()
    async with asyncio.timeout(20):
        while not heard.is_set():
            mesh.connection.send("test.again", b"")
            await asyncio.sleep(0.05)


async def test_gulps(mesh: Mesh) -> None:
    """A connection that reads in gulps gets everything, in order, in fewer reads; also while the server restarts."""
    connection = await connect(mesh.settings, "gulps")
    seen: list[bytes] = []
    reads = 0
    parse = connection._ps.parse

    async def counted(data: bytes = b"") -> None:
        nonlocal reads
        reads += 1
        await parse(data)

    connection._ps.parse = counted
    await connection.listen("test.gulps", lambda where, reply, header, body: seen.append(body))
    await connection.flush()
    connection.gulp_s = 0.05
    sent = [b"%d" % number for number in range(200)]
    for body in sent:
        mesh.connection.send("test.gulps", body)
        await mesh.connection.flush()
    await until(lambda: len(seen) == len(sent), "all have come")
    assert seen == sent
    assert reads < len(sent) / 2
    mesh.nats.kill()
    await mesh.nats.answering()
    await until(lambda: connection.is_connected and mesh.connection.is_connected, "both are connected again")
    await connection.flush()
    mesh.connection.send("test.gulps", b"again")
    await until(lambda: seen[-1] == b"again", "the message behind the restart has come")
    await connection.close()


async def test_closed_before_it_was_connected() -> None:
    """A connection that never came to connecting can be closed."""
    connection = Connection()
    await connection.close()
    assert not connection.is_connected


CREDENTIALS = """-----BEGIN NATS USER JWT-----
one.two.three
------END NATS USER JWT------

-----BEGIN USER NKEY SEED-----
{seed}
------END USER NKEY SEED------
"""


class Pair:
    """A key pair that nkeys would have made."""

    def wipe(self) -> None:
        pass


def fake_nkeys() -> ModuleType:
    """nkeys as far as credentials are looked at: it is an extra, which need not be there."""

    class NkeysError(Exception):
        pass

    def from_seed(seed: bytearray) -> Pair:
        if len(seed) < 4 or not seed.isalnum():
            raise NkeysError
        return Pair()

    module = ModuleType("nkeys")
    module.NkeysError, module.from_seed = NkeysError, from_seed
    return module


@pytest.mark.parametrize(
    ("content", "said"),
    [
        (None, "cannot be read: No such file or directory"),
        ("", "is no NATS credentials file"),
        ("garbage\n" * 100, "is no NATS credentials file"),
        (CREDENTIALS.format(seed=""), "is no NATS credentials file"),
        (CREDENTIALS.format(seed="!?"), "is no NATS credentials file"),
        (CREDENTIALS.format(seed="SUAB\r"), "is no NATS credentials file"),
        (CREDENTIALS[:30], "is no NATS credentials file"),
        ("SU", "is no NATS credentials file"),
        ("SUAB!\n", "is no NATS credentials file"),
        ("SUAB\nSUAC\n", "is no NATS credentials file"),
        ("SAAB\n", "is no NATS credentials file"),
    ],
    ids=[
        *("missing", "empty", "garbage", "no seed", "bad seed", "other line ends", "cut off"),
        *("half a seed", "a bad seed alone", "two seeds", "an account's seed"),
    ],
)
async def test_credentials_that_are_none(
    content: str | None, said: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A file that holds no credentials is named, with its setting, and no server is asked."""
    monkeypatch.setitem(sys.modules, "nkeys", fake_nkeys())
    file = tmp_path / "user.creds"
    if content is not None:
        file.write_text(content, newline="")
    with pytest.raises(BadSettings, match=said) as refused:
        await connect(Settings(nats_url="nats://127.0.0.1:1", nats_credentials=str(file)), "test")
    assert str(file) in str(refused.value)
    assert "TIDINGS_NATS_CREDENTIALS" in str(refused.value)


async def test_credentials_of_a_folder(tmp_path: Path) -> None:
    """A folder is no file."""
    with pytest.raises(BadSettings, match="cannot be read: Is a directory"):
        await connect(Settings(nats_url="nats://127.0.0.1:1", nats_credentials=str(tmp_path)), "test")


async def test_credentials_without_what_signs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Where the extra is not installed, it is named."""
    monkeypatch.setitem(sys.modules, "nkeys", None)
    file = tmp_path / "user.creds"
    file.write_text(CREDENTIALS.format(seed="SUAB"))
    with pytest.raises(BadSettings, match=r"pip install 'tidings\[nkeys\]'"):
        await connect(Settings(nats_url="nats://127.0.0.1:1", nats_credentials=str(file)), "test")


async def test_credentials_that_nobody_asks_for(mesh: Mesh, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A server that wants none is connected to all the same."""
    monkeypatch.setitem(sys.modules, "nkeys", fake_nkeys())
    file = tmp_path / "user.creds"
    file.write_text(CREDENTIALS.format(seed="SUAB"))
    connection = await connect(Settings(nats_url=mesh.nats.url, nats_credentials=str(file)), "test")
    assert connection.is_connected
    await connection.close()
