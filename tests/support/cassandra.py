"""A real CQL server for tests: the one in `TIDINGS_TEST_CQL`, else an Apache Cassandra of our own as a child process.

It is the real server with its real files, made quick: what is set differently from a production node says why below.
The jars come from Maven Central by `infra/cassandra/fetch`; an archive of loaded classes beside them halves the start.
"""

from __future__ import annotations

import atexit
import contextlib
import fcntl
import hashlib
import json
import os
import random
import re
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

from .certificates import Authority
from .clock import SCALE

__all__ = [
    "ADDRESS_VARIABLE",
    "CA_VARIABLE",
    "JAVA_VARIABLE",
    "Cassandra",
    "CqlServer",
    "CqlServerFailed",
    "cql_server",
    "find_java",
]

ADDRESS_VARIABLE: Final = "TIDINGS_TEST_CQL"
"""Environment variable: ``host:port`` of a running CQL server to test against; none is started then."""
CA_VARIABLE: Final = "TIDINGS_TEST_CQL_CA"
"""Environment variable: the CA (PEM) of that server, where it speaks TLS on the same port, with a certificate for
its address and for the name cql.test."""
JAVA_VARIABLE: Final = "TIDINGS_TEST_JAVA"
"""Environment variable: the `java` to run, where neither `JAVA_HOME` nor `PATH` has a Java 17."""

_INFRA: Final = Path(__file__).resolve().parents[2] / "infra" / "cassandra"
_INSTALL: Final = "infra/apt-install openjdk-17-jre-headless maven"
_JVMS: Final = Path("/usr/lib/jvm")
_START_S: Final = 60 * SCALE
_STOP_S: Final = 30 * SCALE
_LOOK_S: Final = 0.02
_TAIL_LINES: Final = 12
# Below the ports that the kernel gives to connections: a killed server's port is still free when it comes back.
_PORTS: Final = range(20_000, 32_000)
_CHATTER: Final = re.compile(r"INFO|WARN|OpenJDK .* warning:|\s+at |\s+\.\.\. ")
_TAKEN: Final = re.compile(r"Address already in use|is in use by another process")

_OPTIONS: Final = bytes([4, 0, 0, 0, 5, 0, 0, 0, 0])
_SUPPORTED: Final = 6

_EXPORTS: Final = (
    "java.base/java.lang.ref",
    "java.base/jdk.internal.misc",
    "java.management.rmi/com.sun.jmx.remote.internal.rmi",
    "java.rmi/sun.rmi.registry",
    "java.rmi/sun.rmi.server",
    "java.sql/java.sql",
    "jdk.attach/sun.tools.attach",
    "jdk.unsupported/sun.misc",
)
_OPENS: Final = (
    "java.base/java.io",
    "java.base/java.lang",
    "java.base/java.lang.module",
    "java.base/java.lang.reflect",
    "java.base/java.util",
    "java.base/jdk.internal.loader",
    "java.base/jdk.internal.math",
    "java.base/jdk.internal.module",
    "java.base/jdk.internal.ref",
    "java.base/jdk.internal.reflect",
    "java.base/jdk.internal.util.jar",
    "java.base/sun.nio.ch",
    "jdk.management/com.sun.management.internal",
)
_JVM: Final = (
    # Memory is locked when the server starts: a small first heap halves what it takes.
    "-Xms128m",
    "-Xmx1g",
    "-Xss512k",
    "-XX:+UseSerialGC",
    # The server lives for seconds: the second compiler would cost more than it gives.
    "-XX:TieredStopAtLevel=1",
    "-XX:-UsePerfData",
    "-XX:+ExitOnOutOfMemoryError",
    # The archive of classes is made, and used, with jamm's agent.
    "-XX:+UnlockDiagnosticVMOptions",
    "-XX:+AllowArchivingWithJavaAgent",
    "-Xlog:disable",
    "-Xlog:all=error:stderr",
)
_PROPERTIES: Final = {
    "cassandra-foreground": "yes",
    # A node that has no neighbours need not wait for them.
    "cassandra.ring_delay_ms": 0,
    "cassandra.superuser_setup_delay_ms": 0,
    "cassandra.skip_wait_for_gossip_to_settle": 0,
    "cassandra.shutdown_announce_in_ms": 0,
    # It is a killed process that tests are about, not a power cut: the kernel keeps what was written.
    "cassandra.skip_sync": "true",
    # Nobody reads the beans, and each table has hundreds.
    "cassandra.disable_mbean_registration": "true",
    # What a row costs in memory is otherwise measured at each start, for seconds.
    "cassandra.memtable.row_overhead_size": 181,
    "io.netty.tryReflectionSetAccessible": "true",
}

# Becomes its arguments, and dies with its parent: the wish outlives `exec`.
_BECOME: Final = """
import ctypes, os, signal, sys
PR_SET_PDEATHSIG = 1
ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, int(signal.SIGKILL))
if os.getppid() != int(sys.argv[1]):
    sys.exit("cassandra: its parent is gone")
os.execv(sys.argv[2], sys.argv[2:])
"""


class CqlServerFailed(Exception):
    """There is no CQL server to test with; the message says why, and what to do."""


def find_java() -> tuple[Path, str]:
    """A Java 17 and what it says of itself; raises `CqlServerFailed` when there is none.

    The order is `TIDINGS_TEST_JAVA`, `JAVA_HOME`, `PATH`, then where Debian has them.
    """
    if given := os.environ.get(JAVA_VARIABLE):
        candidates = [given]
    else:
        home, found = os.environ.get("JAVA_HOME"), shutil.which("java")
        candidates = [f"{home}/bin/java"] if home else []
        candidates += [found] if found else []
        candidates += sorted(map(str, _JVMS.glob("*17*/bin/java")))
    others = []
    for candidate in candidates:
        try:
            said = subprocess.run([candidate, "-version"], capture_output=True, text=True, check=False).stderr
        except OSError as error:
            others.append(f"{candidate} cannot be run ({error.strerror})")
            continue
        version = re.search(r'version "([^"]+)"', said)
        if version is None:
            others.append(f"{candidate} does not say its version")
        elif re.match(r"17\b", version[1]):
            return Path(candidate).absolute(), said
        else:
            others.append(f"{candidate} is {version[1]}")
    why = f": {', '.join(others)}" if others else ""
    raise CqlServerFailed(
        f"Apache Cassandra needs Java 17, and there is none here{why}. Install it ({_INSTALL}), name one in "
        f"{JAVA_VARIABLE}, or give the address of a CQL server in {ADDRESS_VARIABLE}"
    )


def answers(host: str, port: int, timeout_s: float = 1) -> bool:
    """Whether somebody speaks CQL there: an OPTIONS frame of the native protocol gets its answer."""
    try:
        with socket.create_connection((host, port), timeout_s) as connection:
            connection.sendall(_OPTIONS)
            header = connection.recv(len(_OPTIONS))
    except OSError:
        return False
    return len(header) > 4 and header[4] == _SUPPORTED


class Cassandra:
    """An Apache Cassandra child with all its files in `folder`. It listens on 127.0.0.1 only, on ports it keeps.

    Everything blocks. A write that was acknowledged outlives `kill`. The child dies with this process.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder.absolute()
        self.log_file = self.folder / "cassandra.log"
        self.ca = self.folder / "tls" / "ca.pem"
        """Whom its certificate is from."""
        self._ports: tuple[int, int] | None = None
        self._process: subprocess.Popen[bytes] | None = None

    @property
    def contact_point(self) -> str:
        """``host:port`` for clients; known once the server has started, and the same after each restart."""
        return f"127.0.0.1:{self.port}"

    @property
    def port(self) -> int:
        if self._ports is None:
            raise CqlServerFailed("Apache Cassandra was not started yet: it has no port")
        return self._ports[0]

    @property
    def pid(self) -> int | None:
        """The process, while it runs."""
        return self._process.pid if self._process is not None and self._process.poll() is None else None

    def start(self) -> None:
        """Start, and wait until CQL answers; fine when it runs already. Raises `CqlServerFailed`.

        The first start on a machine fetches the jars and makes the archive of classes, which takes a minute.
        """
        if self.pid is not None:
            return
        java, version = find_java()
        jars = _fetch_jars()
        self._launch(java, jars, f"-XX:SharedArchiveFile={_class_archive(java, version, jars)}")

    def stop(self) -> None:
        """Stop in order, which takes 3 s; fine when it does not run."""
        if self.pid is None:
            return
        assert self._process is not None
        self.thaw()
        self._process.terminate()
        try:
            self._process.wait(_STOP_S)
        except subprocess.TimeoutExpired:
            self.kill()

    def kill(self) -> None:
        """SIGKILL; returns when the process is gone."""
        if self._process is not None:
            self._process.kill()
            self._process.wait()

    def freeze(self) -> None:
        """SIGSTOP: connections stay, nothing answers. Raises `CqlServerFailed` when nothing runs."""
        if self.pid is None:
            raise CqlServerFailed("Apache Cassandra does not run: there is nothing to freeze")
        self._signal(signal.SIGSTOP)

    def thaw(self) -> None:
        """SIGCONT."""
        self._signal(signal.SIGCONT)

    def restart(self) -> None:
        """Stop, if it runs, and start again with the same files and the same ports."""
        self.stop()
        self.start()

    def last_words(self) -> str | None:
        """How it ended, if it did so by itself or was killed by others; None while it runs."""
        status = None if self._process is None else self._process.poll()
        if status is None:
            return None
        return f"Apache Cassandra died (exit status {status}). The end of its log:\n{self._tail(0)}"

    def answers(self, timeout_s: float = 1) -> bool:
        """Whether CQL answers right now."""
        return answers("127.0.0.1", self.port, timeout_s)

    def _signal(self, number: signal.Signals) -> None:
        if self._process is not None:
            self._process.send_signal(number)

    def _launch(self, java: Path, jars: Path, *options: str) -> None:
        first = self._ports is None
        for attempt in range(3):
            if first:
                self._ports = _free_port(), _free_port()
            try:
                self._launch_once(java, jars, *options)
            except CqlServerFailed as error:
                # Somebody may have been quicker; where clients know the port, another one is no help.
                if attempt < 2 and first and _TAKEN.search(str(error)):
                    shutil.rmtree(self.folder / "data", ignore_errors=True)
                    continue
                raise
            return

    def _launch_once(self, java: Path, jars: Path, *options: str) -> None:
        temporary = self.folder / "tmp"
        temporary.mkdir(parents=True, exist_ok=True)
        if not self.ca.exists():
            self._make_certificate()
        config = self.folder / "cassandra.yaml"
        config.write_text(json.dumps(self._configuration(), indent=2))
        properties = {
            **_PROPERTIES,
            "cassandra.config": config.as_uri(),
            "cassandra.storagedir": self.folder / "data",
            "logback.configurationFile": _INFRA / "logback.xml",
            # Native parts are unpacked here, and go with the folder.
            "java.io.tmpdir": temporary,
            "jna.tmpdir": temporary,
        }
        command = [
            str(java),
            *(f"--add-exports={package}=ALL-UNNAMED" for package in _EXPORTS),
            *(f"--add-opens={package}=ALL-UNNAMED" for package in _OPENS),
            f"-javaagent:{_only(jars, 'jamm-*.jar')}",
            *_JVM,
            *options,
            *(f"-D{name}={value}" for name, value in properties.items()),
            "-cp",
            # The archive of classes is good for this list, in this order.
            ":".join(map(str, sorted(jars.glob("*.jar")))),
            "org.apache.cassandra.service.CassandraDaemon",
        ]
        if sys.platform == "linux" and threading.current_thread() is threading.main_thread():
            # The kernel means the thread that forked: any other one may end before the tests do.
            command = [sys.executable, "-I", "-S", "-c", _BECOME, str(os.getpid()), *command]
        with self.log_file.open("ab") as log:
            start = log.tell()
            self._process = subprocess.Popen(
                command, stdin=subprocess.DEVNULL, stdout=log, stderr=log, cwd=self.folder, start_new_session=True
            )
        atexit.register(self._process.kill)
        self._wait(start)

    def _wait(self, log_start: int) -> None:
        assert self._process is not None
        deadline = time.monotonic() + _START_S
        while not self.answers():
            status = self._process.poll()
            if status is not None:
                raise CqlServerFailed(
                    f"Apache Cassandra died at its start (exit status {status}). The end of its log, "
                    f"{self.log_file}:\n{self._tail(log_start)}"
                )
            if time.monotonic() > deadline:
                self.kill()
                raise CqlServerFailed(
                    f"Apache Cassandra did not answer within {_START_S:g} s (TIDINGS_TEST_SCALE stretches that). "
                    f"The end of its log, {self.log_file}:\n{self._tail(log_start)}"
                )
            time.sleep(_LOOK_S)

    def _tail(self, start: int) -> str:
        lines = self.log_file.read_bytes()[start:].decode(errors="replace").splitlines()
        # A stack trace, or an orderly end, would push out the lines that say what happened.
        causes = [line for line in lines if line.strip() and not _CHATTER.match(line)]
        return "\n".join((causes or lines)[-_TAIL_LINES:]) or "(nothing)"

    def _make_certificate(self) -> None:
        certificate, key = Authority(self.ca.parent).pair("cql", "127.0.0.1", "cql.test")
        (self.ca.parent / "server.pem").write_bytes(key.read_bytes() + certificate.read_bytes())

    def _configuration(self) -> dict[str, Any]:
        assert self._ports is not None
        native, storage = self._ports
        data = self.folder / "data"
        return {
            "cluster_name": "tidings-test",
            "partitioner": "org.apache.cassandra.dht.Murmur3Partitioner",
            "endpoint_snitch": "SimpleSnitch",
            "seed_provider": [
                {
                    "class_name": "org.apache.cassandra.locator.SimpleSeedProvider",
                    "parameters": [{"seeds": f"127.0.0.1:{storage}"}],
                }
            ],
            "listen_address": "127.0.0.1",
            "rpc_address": "127.0.0.1",
            "native_transport_port": native,
            "storage_port": storage,
            "num_tokens": 1,
            "initial_token": "0",
            "data_file_directories": [str(data / "tables")],
            "commitlog_directory": str(data / "commitlog"),
            "saved_caches_directory": str(data / "saved_caches"),
            "hints_directory": str(data / "hints"),
            "cdc_raw_directory": str(data / "cdc_raw"),
            # `periodic` acknowledges up to 100 ms before a write is where a replay finds it: kill -9 would lose it.
            "commitlog_sync": "batch",
            "commitlog_segment_size": "8MiB",
            "commitlog_total_space": "64MiB",
            "commit_failure_policy": "die",
            "disk_failure_policy": "die",
            # A write waits for its batch: more of them at a time.
            "concurrent_writes": 128,
            "concurrent_compactors": 1,
            "key_cache_size": "1MiB",
            "counter_cache_size": "0MiB",
            "networking_cache_size": "16MiB",
            # DROP and TRUNCATE are quicker without.
            "auto_snapshot": False,
            "hinted_handoff_enabled": False,
            # TLS for who begins with a handshake, on the port of everybody.
            "client_encryption_options": {
                "enabled": True,
                "optional": True,
                "ssl_context_factory": {"class_name": "org.apache.cassandra.security.PEMBasedSslContextFactory"},
                "keystore": str(self.ca.parent / "server.pem"),
            },
            # A busy machine is no fault: tests that want one freeze the server.
            "read_request_timeout": "10s",
            "range_request_timeout": "10s",
            "write_request_timeout": "10s",
        }


@dataclass(frozen=True, slots=True)
class CqlServer:
    """The server of a test run."""

    contact_point: str
    """``host:port``."""
    child: Cassandra | None
    """None for a server that was given by address, which no test may kill."""
    ca: Path | None
    """What its certificate is checked against; None for a server that speaks no TLS, as far as we know."""

    @property
    def host(self) -> str:
        return self.contact_point.rpartition(":")[0]

    @property
    def port(self) -> int:
        return int(self.contact_point.rpartition(":")[2])


@contextlib.contextmanager
def cql_server() -> Iterator[CqlServer]:
    """The server in `TIDINGS_TEST_CQL`, else a child of our own, which is gone with its files at the end.

    Raises `CqlServerFailed`: a test run without its database fails, it skips nothing.
    """
    if given := os.environ.get(ADDRESS_VARIABLE):
        host, _, port = given.rpartition(":")
        if not host or not port.isdecimal():
            raise CqlServerFailed(f"{ADDRESS_VARIABLE} is {given!r}: write it as host:port")
        if not answers(host, int(port), 5 * SCALE):
            raise CqlServerFailed(f"No CQL server answers at {given}, the address in {ADDRESS_VARIABLE}")
        ca = os.environ.get(CA_VARIABLE)
        yield CqlServer(given, None, Path(ca) if ca else None)
        return
    with own_cql_server() as server:
        yield server


@contextlib.contextmanager
def own_cql_server() -> Iterator[CqlServer]:
    """A child of our own, which speaks TLS as well; gone with its files at the end."""
    with tempfile.TemporaryDirectory(prefix="tidings-cassandra-", ignore_cleanup_errors=True) as folder:
        child = Cassandra(Path(folder))
        try:
            child.start()
            yield CqlServer(child.contact_point, child, child.ca)
        finally:
            child.kill()


def _fetch_jars() -> Path:
    """The folder of the jars, which are fetched if this machine has none."""
    done = subprocess.run([sys.executable, str(_INFRA / "fetch")], capture_output=True, text=True, check=False)
    if done.returncode != 0:
        raise CqlServerFailed(done.stderr.strip().rpartition("\n")[2])
    return Path(done.stdout.strip())


def _class_archive(java: Path, version: str, jars: Path) -> Path:
    """What the JVM remembers of the classes it loaded in a first start: later ones take half the time.

    The JVM itself looks whether an archive is there and fits, and does without it otherwise.
    """
    made_for = hashlib.sha256("\n".join([str(java), version, *_JVM, *_EXPORTS, *_OPENS]).encode()).hexdigest()[:12]
    archive = jars / f"classes-{made_for}.jsa"
    if archive.exists():
        return archive
    with (jars.parent / f"{jars.name}.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not archive.exists():
            partial = archive.with_suffix(".partial")
            with tempfile.TemporaryDirectory(prefix="tidings-cassandra-", ignore_cleanup_errors=True) as folder:
                trained = Cassandra(Path(folder))
                try:
                    trained._launch(java, jars, f"-XX:ArchiveClassesAtExit={partial}")
                    trained.stop()
                finally:
                    trained.kill()
            if partial.exists():
                partial.rename(archive)
    return archive


def _free_port() -> int:
    for port in random.sample(_PORTS, 100):
        with contextlib.suppress(OSError), socket.create_server(("127.0.0.1", port)):
            return port
    raise CqlServerFailed(f"No port from {_PORTS.start} to {_PORTS.stop - 1} is free on 127.0.0.1")


def _only(folder: Path, pattern: str) -> Path:
    found = sorted(folder.glob(pattern))
    if len(found) != 1:
        raise CqlServerFailed(f"{folder} has no {pattern}: remove that folder, and it is fetched again")
    return found[0]
