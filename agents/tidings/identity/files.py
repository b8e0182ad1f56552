"""Public keys in a file, which may be replaced while agents run."""

from __future__ import annotations

import logging
import os
from collections.abc import Sequence
from pathlib import Path

from tidings.wire.errors import BadKeys, BadSettings

from .keys import MAX_DOCUMENT_BYTES, Key, need_crypto, read_document

__all__ = ["FileKeys"]

log = logging.getLogger("tidings.identity")


class FileKeys:
    """A PEM public key, or a JWK Set. `current` looks at the file, and reads it again when it was replaced."""

    def __init__(self, path: str) -> None:
        need_crypto()
        self._path = Path(path)
        self._seen: tuple[int, int, int] | None = None
        self._keys: list[Key] = []

    def open(self) -> None:
        """Read it for the first time; raises `BadSettings`."""
        try:
            self._seen = self._look()
            self._keys = self._read()
        except (OSError, BadKeys) as error:
            raise BadSettings(f"token_key_file {self._path} cannot be used: {_reason(error)}") from None

    def current(self) -> Sequence[Key]:
        """The keys of now; of before, while the file is gone or is none."""
        try:
            seen = self._look()
        except OSError:
            seen = None
        if seen == self._seen:
            return self._keys
        self._seen = seen
        try:
            self._keys = self._read()
        except (OSError, BadKeys) as error:
            log.warning("token_key_file %s: %s; its last keys stay", self._path, _reason(error))
        else:
            log.info("token_key_file %s has %d keys now", self._path, len(self._keys))
        return self._keys

    def _look(self) -> tuple[int, int, int]:
        found = os.stat(self._path)
        return found.st_mtime_ns, found.st_ino, found.st_size

    def _read(self) -> list[Key]:
        with self._path.open("rb") as file:
            return read_document(file.read(MAX_DOCUMENT_BYTES + 1))


def _reason(error: OSError | BadKeys) -> str:
    return (error.strerror or str(error)) if isinstance(error, OSError) else str(error)
