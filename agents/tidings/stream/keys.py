"""The keys of those who sign in to NATS: nkeys (Ed25519), each one's seed in a file of a folder.

The server's configuration has the public keys alone. A seed is in ``<name>.nk``, for its program to read and nobody
else. While a key is exchanged the one before is in ``<name>.previous.nk``, and the server lets both in.
"""

from __future__ import annotations

import os
import secrets
from pathlib import Path
from types import ModuleType
from typing import Final

from tidings.wire.errors import BadSettings

__all__ = ["Keys"]

_SEED_BYTES: Final = 32
_SUFFIX: Final = ".nk"
_PREVIOUS: Final = ".previous"


class Keys:
    """The seeds in a folder. Nothing that is there is overwritten, except by `rotate`, which keeps it aside."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._nkeys = _library()

    def file(self, name: str) -> Path:
        """Where the seed of a name is."""
        return self._folder / f"{name}{_SUFFIX}"

    def _previous(self, name: str) -> Path:
        return self.file(name + _PREVIOUS)

    def names(self) -> list[str]:
        """Who has a key."""
        found = (file.name.removesuffix(_SUFFIX) for file in self._folder.glob(f"*{_SUFFIX}"))
        return sorted(name for name in found if not name.endswith(_PREVIOUS))

    def make(self, name: str) -> bool:
        """Make a key where there is none; whether it was made."""
        self._folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        seed: bytes = self._nkeys.encode_seed(secrets.token_bytes(_SEED_BYTES), self._nkeys.PREFIX_BYTE_USER)
        try:
            # Never readable to others, not for a moment either.
            file = os.open(self.file(name), os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
        except FileExistsError:
            return False
        with os.fdopen(file, "wb") as out:
            out.write(seed + b"\n")
            out.flush()
            os.fsync(out.fileno())
        return True

    def public(self, name: str) -> list[str]:
        """The public keys that are let in: the current one, and the one before while that was not retired."""
        files = (self.file(name), self._previous(name))
        return [self._public(file) for file in files if file.exists()]

    def _public(self, file: Path) -> str:
        try:
            pair = self._nkeys.from_seed(bytearray(file.read_bytes().strip()))
            public: bytes = pair.public_key
            pair.wipe()
        except (self._nkeys.NkeysError, ValueError):
            raise BadSettings(
                f"the file {file} has no seed of an nkey: put a copy of it back, or delete it, which makes a new key"
            ) from None
        return public.decode()

    def _check(self, name: str) -> None:
        if not self.file(name).exists():
            raise BadSettings(f"there is no key of {name!r} in {self._folder}: it has {', '.join(self.names())}")

    def rotate(self, name: str) -> None:
        """Make a new key. The one before is let in until it is retired, so that programs change one after another."""
        self._check(name)
        if self._previous(name).exists():
            raise BadSettings(
                f"the key of {name} is being exchanged already: when all its programs have {self.file(name)}, "
                f"end that with --retire {name}"
            )
        self.file(name).rename(self._previous(name))
        self.make(name)

    def replace(self, name: str) -> None:
        """Make a new key, and let in neither the current one nor the one before: of a key that was stolen."""
        self._check(name)
        # Never without one: whoever stops half-way does it again.
        if not self._previous(name).exists():
            self.rotate(name)
        else:
            self.file(name).unlink()
            self.make(name)
        self.retire(name)

    def retire(self, name: str) -> None:
        """Let the key before the last rotation in no more."""
        try:
            self._previous(name).unlink()
        except FileNotFoundError:
            raise BadSettings(f"there is no earlier key of {name!r} in {self._folder}: --rotate {name} first") from None

    def remove(self, name: str) -> None:
        """Forget whoever has this name."""
        if not self.public(name):
            raise BadSettings(f"there is no key of {name!r} in {self._folder}: it has {', '.join(self.names())}")
        self.file(name).unlink(missing_ok=True)
        self._previous(name).unlink(missing_ok=True)


def _library() -> ModuleType:
    try:
        import nkeys
    except ImportError as error:
        raise BadSettings(f"what makes keys is not there ({error}): pip install 'tidings[nkeys]'") from None
    library: ModuleType = nkeys
    return library
