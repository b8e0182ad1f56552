"""The CQL server of the test runs: what is acknowledged outlives it, it comes back, and it says what is missing."""

from __future__ import annotations

import re
import socket
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
from cassandra.cluster import Cluster, Session

from support import cassandra
from support.cassandra import ADDRESS_VARIABLE, JAVA_VARIABLE, Cassandra, CqlServerFailed, cql_server
from support.clock import PATIENCE_S
from support.command import processes_of, taken_port

ROWS = 200


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Blanks and quotes in the name survive the configuration."""
    return tmp_path_factory.mktemp("cassandra") / 'it\'s "odd"'


@pytest.fixture(scope="module")
def server(folder: Path) -> Iterator[Cassandra]:
    """One child for all tests here; nothing of it is left."""
    child = Cassandra(folder)
    try:
        child.start()
        yield child
    finally:
        child.kill()
    assert not processes_of(folder)


@contextmanager
def session_with(child: Cassandra) -> Iterator[Session]:
    cluster = Cluster(["127.0.0.1"], port=child.port, connect_timeout=PATIENCE_S)
    try:
        session = cluster.connect()
        session.default_timeout = PATIENCE_S
        yield session
    finally:
        cluster.shutdown()


def script(path: Path, text: str) -> str:
    path.write_text(f"#!/bin/sh\n{text}\n")
    path.chmod(0o755)
    return str(path)


def test_kill_keeps_what_was_acknowledged(server: Cassandra) -> None:
    """A table and the rows in it, the last of them acknowledged just before SIGKILL, are there after the restart."""
    with session_with(server) as session:
        session.execute("CREATE KEYSPACE kept WITH replication = {'class': 'SimpleStrategy', 'replication_factor': 1}")
        session.execute("CREATE TABLE kept.rows (key text, number int, PRIMARY KEY (key, number))")
        insert = session.prepare("INSERT INTO kept.rows (key, number) VALUES ('a', ?)")
        for number in range(ROWS):
            session.execute(insert, (number,))
        contact_point, pid = server.contact_point, server.pid
        assert server.last_words() is None
        server.kill()
    assert server.pid is None
    assert "died (exit status -9)" in (server.last_words() or "")
    server.restart()
    assert server.contact_point == contact_point
    assert server.pid not in (None, pid)
    with session_with(server) as session:
        assert [row.number for row in session.execute("SELECT number FROM kept.rows WHERE key = 'a'")] == [*range(ROWS)]


def test_frozen_server_is_silent(server: Cassandra) -> None:
    """A frozen server takes connections and answers none; thawed, it goes on."""
    server.freeze()
    try:
        assert not server.answers(timeout_s=0.2)
        with socket.create_connection(("127.0.0.1", server.port), PATIENCE_S):
            pass
    finally:
        server.thaw()
    assert server.answers(PATIENCE_S)


def test_no_java(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Without Java the sentence says what to install, and how to do without."""
    monkeypatch.delenv("JAVA_HOME", raising=False)
    monkeypatch.delenv(JAVA_VARIABLE, raising=False)
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.setattr(cassandra, "_JVMS", tmp_path)
    with pytest.raises(CqlServerFailed, match=r"needs Java 17.*openjdk-17-jre-headless.*TIDINGS_TEST_CQL"):
        Cassandra(tmp_path / "data").start()


def test_wrong_java(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Another Java is named, with its version."""
    monkeypatch.setenv(JAVA_VARIABLE, script(tmp_path / "java", "echo 'openjdk version \"21.0.1\" 2023-10-17' >&2"))
    with pytest.raises(CqlServerFailed, match=r"java is 21\.0\.1"):
        Cassandra(tmp_path / "data").start()


def test_no_maven(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Where the jars are not here yet and Maven is missing, the sentence says what to install."""
    monkeypatch.setenv(JAVA_VARIABLE, script(tmp_path / "java", "echo 'openjdk version \"17.0.1\" 2021-10-19' >&2"))
    monkeypatch.setenv("TIDINGS_TEST_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(CqlServerFailed, match=r"no mvn here.*openjdk-17-jre-headless maven"):
        Cassandra(tmp_path / "data").start()


def test_port_is_taken(tmp_path: Path, server: Cassandra) -> None:
    """A server whose known port is somebody else's now dies, and its last words say so."""
    other = Cassandra(tmp_path)
    with taken_port() as port:
        other._ports = port, port + 1
        with pytest.raises(CqlServerFailed, match="died at its start") as caught:
            other.start()
    assert re.search(r"Failed to bind port|in use by another process", str(caught.value))
    assert str(other.log_file) in str(caught.value)
    assert other.pid is None


def test_given_address(server: Cassandra, monkeypatch: pytest.MonkeyPatch) -> None:
    """A server that is given by address is used, and no child is started."""
    monkeypatch.setenv(ADDRESS_VARIABLE, server.contact_point)
    with cql_server() as given:
        assert (given.host, given.port, given.child) == ("127.0.0.1", server.port, None)


@pytest.mark.parametrize(("address", "sentence"), [("127.0.0.1:1", "answers at 127.0.0.1:1"), ("here", "host:port")])
def test_nothing_at_the_given_address(address: str, sentence: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """A given server that is not there is a failure: nothing is skipped, and no child takes its place."""
    monkeypatch.setenv(ADDRESS_VARIABLE, address)
    with pytest.raises(CqlServerFailed, match=sentence), cql_server():
        pass
