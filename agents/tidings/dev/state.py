"""The state folder of a development mesh: what it holds, who may use it, and how it begins anew.

| name | what it is |
|---|---|
| ``tidings.state`` | the marker: format, partitions, whether the streams were made |
| ``lock`` | locked (flock) by the mesh that runs on it, for as long as that lives, however it ends |
| ``token.key`` | the secret that signs device tokens; readable by its owner only |
| ``tidings.db`` | inbox and cursors (SQLite) |
| ``nats/`` | nats-server: its configuration, its log, and the streams in ``jetstream/`` |
| ``tls/`` | the authority and certificates of ``--tls``; see `authority` |
| ``runtime.json`` | where the running mesh listens |
"""

from __future__ import annotations

import fcntl
import logging
import os
import secrets
import shutil
import time
from pathlib import Path
from typing import Any, Final, NamedTuple
from urllib.parse import quote

import orjson

from tidings.runtime.exposure import DEV_KEY_PREFIX
from tidings.wire.errors import StartFailed

__all__ = ["DEFAULT_PARTITIONS", "Marker", "Running", "StateFolder", "read_key", "running"]

DEFAULT_PARTITIONS: Final = 16
FORMAT: Final = 1
"""Of the folder. A version that lays it out differently counts on, and converts or refuses."""

_MARKER: Final = "tidings.state"
_LOCK: Final = "lock"
_KEY: Final = "token.key"
_DATABASE: Final = "tidings.db"
_LEAST_DATABASE: Final = 512
"""Bytes: SQLite's smallest page."""
_NATS: Final = "nats"
_TLS: Final = "tls"
_RUNTIME: Final = "runtime.json"
_LEAST_KEY: Final = 32
_LOCK_TRIES: Final = 5
_LOCK_WAIT_S: Final = 0.02

log = logging.getLogger("tidings.dev")


class Marker(NamedTuple):
    """What ``tidings.state`` says."""

    partitions: int
    streams_made: bool
    """Streams that are missing from now on were lost, and are not to be made anew in silence."""


class Running(NamedTuple):
    """Where a running mesh listens."""

    pid: int
    nats_url: str
    http_url: str
    api_url: str
    store_url: str
    ca: str = ""
    """The path of what its certificates are checked against; empty for one without TLS."""

    @property
    def ws_url(self) -> str:
        return "ws" + self.http_url.removeprefix("http") + "/v1/ws"


class StateFolder:
    """A state folder in use. Every trouble is a `StartFailed` that says what to do."""

    def __init__(self, path: Path) -> None:
        self.path = path.absolute()
        self.marker = Marker(DEFAULT_PARTITIONS, streams_made=False)
        self._lock: int | None = None

    @property
    def nats(self) -> Path:
        return self.path / _NATS

    @property
    def tls(self) -> Path:
        return self.path / _TLS

    @property
    def store_url(self) -> str:
        return f"sqlite:///{quote(str(self.path / _DATABASE))}"

    def inbox_is_empty(self) -> bool:
        """No inbox was stored here, or it is gone."""
        file = self.path / _DATABASE
        return not file.exists() or (file.is_file() and file.stat().st_size < _LEAST_DATABASE)

    def open(self, *, fresh: bool = False) -> None:
        """Take the folder for this process, make it if need be, and check it; `fresh` empties it first."""
        try:
            self.path.mkdir(mode=0o700, parents=True, exist_ok=True)
            self._take()
            try:
                self._check_owner()
                if fresh:
                    self._empty()
                if (self.path / _MARKER).exists():
                    self._read_marker()
                else:
                    self._write_marker()
            except BaseException:
                self.close()
                raise
        except OSError as error:
            raise self._unusable(error) from None

    def look(self) -> None:
        """Read what the marker says, without taking the folder."""
        try:
            self._read_marker()
        except OSError as error:
            raise self._unusable(error) from None

    def close(self) -> None:
        """Let the folder go; closing twice is fine."""
        if self._lock is not None:
            (self.path / _RUNTIME).unlink(missing_ok=True)
            os.close(self._lock)
            self._lock = None

    def key(self) -> str:
        """The secret that signs tokens, made at the first use."""
        file = self.path / _KEY
        try:
            with open(os.open(file, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), "w") as new:
                new.write(f"{DEV_KEY_PREFIX}{secrets.token_hex(_LEAST_KEY)}\n")
        except FileExistsError:
            pass
        except OSError as error:
            raise self._unusable(error) from None
        return read_key(self.path)

    def note_streams_made(self) -> None:
        """Record that the streams are there."""
        if not self.marker.streams_made:
            self.marker = self.marker._replace(streams_made=True)
            self._write_marker()

    def note_running(self, running: Running) -> None:
        """Tell other commands where the mesh listens, where its inbox is, and whom they are to trust."""
        self._write(_RUNTIME, running._asdict())

    def _take(self) -> None:
        self._lock = os.open(self.path / _LOCK, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
        for _ in range(_LOCK_TRIES):
            try:
                fcntl.flock(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                # `running` holds it for a moment when it looks.
                time.sleep(_LOCK_WAIT_S)
            else:
                return
        os.close(self._lock)
        self._lock = None
        raise StartFailed(
            f"another `tidings dev` runs on the state folder {self.path}: stop it, or name another folder with --state"
        )

    def _check_owner(self) -> None:
        """A folder with content of somebody else's is not taken: `--fresh` would delete there one day."""
        if not (self.path / _MARKER).exists() and any(entry.name != _LOCK for entry in self.path.iterdir()):
            (self.path / _LOCK).unlink()
            raise StartFailed(
                f"the folder {self.path} is no state folder of Tidings (it has no file {_MARKER}) and is not empty: "
                "name an empty or a new folder with --state"
            )

    def _empty(self) -> None:
        # The marker goes last: a deletion that is cut short leaves a folder that can be emptied again.
        for pattern in (_NATS, _TLS, _KEY, f"{_DATABASE}*", _RUNTIME, _MARKER):
            for file in self.path.glob(pattern):
                if file.is_dir() and not file.is_symlink():
                    shutil.rmtree(file)
                else:
                    file.unlink()

    def _read_marker(self) -> None:
        file = self.path / _MARKER
        try:
            said: dict[str, Any] = orjson.loads(file.read_bytes())
            found, marker = int(said["format"]), Marker(int(said["partitions"]), bool(said["streams_made"]))
        except (ValueError, KeyError, TypeError):
            raise StartFailed(
                f"the state folder {self.path} is damaged ({_MARKER} cannot be read): put a copy back, "
                "or begin anew with --fresh, which deletes what is stored there"
            ) from None
        if found != FORMAT:
            raise StartFailed(
                f"the state folder {self.path} has format {found} and this version of Tidings knows {FORMAT}: "
                "use the version that made it, name another folder with --state, or begin anew with --fresh"
            )
        self.marker = marker

    def _write_marker(self) -> None:
        self._write(_MARKER, {"format": FORMAT, **self.marker._asdict()})

    def _write(self, name: str, content: dict[str, Any]) -> None:
        temporary = self.path / f"{name}.new"
        try:
            temporary.write_bytes(orjson.dumps(content) + b"\n")
            temporary.replace(self.path / name)
        except OSError as error:
            raise self._unusable(error) from None

    def _unusable(self, error: OSError) -> StartFailed:
        return StartFailed(
            f"the state folder {self.path} cannot be used: {error.strerror}"
            + (f" ({error.filename})" if error.filename not in (None, str(self.path), self.path) else "")
            + ". Make it a folder that you may write, or name another with --state"
        )


def read_key(folder: Path) -> str:
    """The secret of a state folder; raises `StartFailed` when there is none or it is no secret."""
    file = folder / _KEY
    try:
        key = file.read_text(encoding="ascii").strip()
    except FileNotFoundError:
        raise StartFailed(
            f"the folder {folder} has no {_KEY}: start `tidings dev` there first, or name its folder with --state"
        ) from None
    except (OSError, UnicodeDecodeError) as error:
        reason = error.strerror if isinstance(error, OSError) else "it is not text"
        raise StartFailed(
            f"the secret {file} cannot be read: {reason}. Make it readable, or delete it to have a new one made "
            "(tokens of the old one end with it)"
        ) from None
    if len(key) < _LEAST_KEY:
        raise StartFailed(
            f"the secret {file} is too short: it needs at least {_LEAST_KEY} characters. "
            "Delete it to have a new one made (tokens of the old one end with it)"
        )
    if file.stat().st_mode & 0o077:
        log.warning("others may read the secret %s: `chmod 600` it", file)
    return key


def running(folder: Path) -> Running | None:
    """Where the mesh on a state folder listens; None when none runs there."""
    try:
        lock = os.open(folder / _LOCK, os.O_RDWR | os.O_CLOEXEC)
    except OSError:
        return None
    try:
        fcntl.flock(lock, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except BlockingIOError:
        try:
            return Running(**orjson.loads((folder / _RUNTIME).read_bytes()))
        except (OSError, ValueError, TypeError):
            return None  # it is about to start, or to end
    finally:
        os.close(lock)
    return None  # nobody holds the lock: what runtime.json says is left from a mesh that was killed
