"""A certificate authority of a state folder's own, for ``tidings dev --tls``.

| name in ``tls/`` | what it is |
|---|---|
| ``ca.pem`` | the authority's certificate: what clients are to trust |
| ``ca.key`` | its key, for its owner only: whoever has it can be any server to those clients |
| ``server.pem``, ``server.key`` | for page, gateway and NATS; good for 90 days, made anew 30 days before the end |
"""

from __future__ import annotations

import os
import socket
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import TYPE_CHECKING, Final

from tidings.runtime.certificate import good_until
from tidings.wire.errors import StartFailed

if TYPE_CHECKING:
    import trustme

__all__ = ["Authority"]

_GOOD_FOR: Final = timedelta(days=90)
_RENEW_BEFORE: Final = timedelta(days=30)
_OWN_NAMES: Final = ("localhost", "127.0.0.1", "::1")
_WILDCARDS: Final = ("", "0.0.0.0", "::")


class Authority:
    """The files in a folder, which is made if need be; `renew` before they are used."""

    def __init__(self, folder: Path, host: str) -> None:
        self._folder = folder
        self.ca = folder / "ca.pem"
        self.certificate = folder / "server.pem"
        self.key = folder / "server.key"
        self._names = (*_OWN_NAMES, socket.gethostname() if host in _WILDCARDS else host)

    def renew(self, *, anew: bool = False) -> bool:
        """Make what is missing or about to expire, `anew` in any case the servers' pair; whether anything was made.

        Raises `StartFailed` where it cannot.
        """
        if not anew and self._is_good():
            return False
        try:
            self._folder.mkdir(mode=0o700, exist_ok=True)
            made = self._authority().issue_cert(
                *dict.fromkeys(self._names), common_name="tidings dev", not_after=datetime.now(UTC) + _GOOD_FOR
            )
            # Each whole or not at all; a pair that does not fit together is passed over by who serves with it.
            _write(self.key, made.private_key_pem.bytes())
            _write(self.certificate, b"".join(pem.bytes() for pem in made.cert_chain_pems))
        except OSError as error:
            raise StartFailed(f"the folder {self._folder} cannot be used: {error.strerror}") from None
        return True

    def _is_good(self) -> bool:
        try:
            end = good_until(self.certificate.read_text(encoding="ascii"))
        except (OSError, ValueError):
            return False
        return self.key.exists() and self.ca.exists() and end - datetime.now(UTC) > _RENEW_BEFORE

    def _authority(self) -> trustme.CA:
        try:
            import trustme
        except ImportError as error:
            raise StartFailed(f"what makes certificates is not there ({error}): pip install 'tidings[dev]'") from None
        key = self._folder / "ca.key"
        if self.ca.exists() and key.exists():
            try:
                return trustme.CA.from_pem(self.ca.read_bytes(), key.read_bytes())
            except ValueError:
                raise StartFailed(
                    f"the authority {self.ca} cannot be read: put a copy of it and of {key.name} back, or delete both "
                    "to have a new one made (which every client is to trust anew)"
                ) from None
        made = trustme.CA(organization_name="tidings dev", organization_unit_name=str(self._folder.parent)[:64])
        _write(key, made.private_key_pem.bytes())
        _write(self.ca, made.cert_pem.bytes(), mode=0o644)
        return made


def _write(file: Path, content: bytes, mode: int = 0o600) -> None:
    temporary = file.with_name(f"{file.name}.new")
    temporary.unlink(missing_ok=True)
    with open(os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_EXCL, mode), "wb") as new:
        new.write(content)
    temporary.replace(file)
