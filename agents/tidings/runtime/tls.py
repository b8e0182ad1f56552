"""TLS of the doors and of the connections to NATS and the store, from files that are renewed while we run.

A server's context cannot be changed half-way: OpenSSL drops the key when it gets a certificate that does not fit. So
each pair becomes a context of its own, complete and checked, and `ServerTls` gives every handshake the newest
(``SSL_set_SSL_CTX`` in the server name callback, which is called with a name or without). Sockets that are open keep
what they have. Files change one after the other: they are read when they have stayed the same for one look, and a pair
that does not fit together is refused as a whole, and the old one goes on.

What connects (`ClientTls`) reads its files again at each connection, if they have changed.
"""

from __future__ import annotations

import asyncio
import logging
import os
import ssl
import stat
from collections.abc import Sequence
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import TYPE_CHECKING, Final

from tidings.wire.errors import BadSettings

from .certificate import good_until

if TYPE_CHECKING:
    from .settings import Settings

__all__ = ["ClientTls", "ServerTls", "end_of", "server_tls"]

_SOON: Final = timedelta(days=14)
_A_DAY_S: Final = 86_400
_CERTIFICATE: Final = "-----BEGIN CERTIFICATE-----"
_KEY: Final = "PRIVATE KEY-----"

log = logging.getLogger("tidings.tls")

_Stamp = tuple[tuple[int, ...] | None, ...]


class ServerTls:
    """A server's side: `context` is good for ever, its certificate is the newest that was good.

    Raises `BadSettings` where the files are no pair. `watch` looks for renewed ones.
    """

    def __init__(self, certificate: str, key: str, check_s: float = 5) -> None:
        self._files = certificate, key
        self._check_s = check_s
        self._stamp = self._seen = _stamp(self._files)
        self._newest = _server_context(*self._files)
        self.context = _server_context(*self._files)
        self.context.sni_callback = self._choose
        _warn_of_end("tls_certificate", certificate)

    def _choose(self, connection: ssl.SSLObject, name: str | None, context: ssl.SSLContext) -> None:
        connection.context = self._newest

    async def watch(self) -> None:
        """Look for a renewed pair, for ever; to be run as a task."""
        next_warning = _A_DAY_S / self._check_s
        while True:
            await asyncio.sleep(self._check_s)
            self._look()
            next_warning -= 1
            if next_warning <= 0:
                next_warning = _A_DAY_S / self._check_s
                _warn_of_end("tls_certificate", self._files[0])

    def _look(self) -> None:
        stamp = _stamp(self._files)
        if stamp == self._stamp:
            return
        if stamp != self._seen:
            # Perhaps it is being written.
            self._seen = stamp
            return
        self._stamp = stamp
        try:
            self._newest = _server_context(*self._files)
        except BadSettings as error:
            log.warning("the renewed certificate is not used, the old one goes on: %s", error)
            return
        log.info("new connections get the renewed certificate %s", self._files[0])
        _warn_of_end("tls_certificate", self._files[0])


class ClientTls:
    """A client's side. The names are the settings' (or options'), for the messages; empty paths are none.

    Without `ca` the system's authorities are trusted. Raises `BadSettings` where a file is not what it must be.
    """

    def __init__(
        self, ca: str = "", certificate: str = "", key: str = "", *, names: tuple[str, str, str] = ("ca", "", "")
    ) -> None:
        self._given = ca, certificate, key
        self._names = names
        self._stamp = _stamp(self._given)
        self._context = _client_context(self._given, names)
        if certificate:
            _warn_of_end(names[1], certificate)

    def context(self) -> ssl.SSLContext:
        """For the next connection; host names are checked. Files that are bad by now are said, the old go on."""
        stamp = _stamp(self._given)
        if stamp != self._stamp:
            self._stamp = stamp
            try:
                self._context = _client_context(self._given, self._names)
            except BadSettings as error:
                log.warning("renewed files are not used, the old ones go on: %s", error)
        return self._context


def server_tls(settings: Settings) -> ServerTls | None:
    """What a door serves TLS with; None where the settings have no certificate."""
    if not settings.tls_certificate:
        return None
    return ServerTls(settings.tls_certificate, settings.tls_key, settings.tls_check_s)


def _stamp(paths: Sequence[str]) -> _Stamp:
    """Something that changes when a file does, or who may read it, also by the symbolic link that leads to it."""
    return tuple(map(_stamp_of, paths))


def _stamp_of(path: str) -> tuple[int, ...] | None:
    try:
        found = os.stat(path)
    except (OSError, ValueError):
        return None
    return found.st_dev, found.st_ino, found.st_size, found.st_mtime_ns, found.st_mode, found.st_uid, found.st_gid


def _server_context(certificate: str, key: str) -> ssl.SSLContext:
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.minimum_version = ssl.TLSVersion.TLSv1_2
    # WebSockets begin in HTTP/1.1 (RFC 6455); renegotiation is work that a client may ask for at no cost of its own.
    context.set_alpn_protocols(["http/1.1"])
    context.options |= ssl.OP_NO_RENEGOTIATION
    _load_pair(context, certificate, key, ("tls_certificate", "tls_key"))
    return context


def _client_context(given: tuple[str, str, str], names: tuple[str, str, str]) -> ssl.SSLContext:
    ca, certificate, key = given
    if ca:
        _read(names[0], ca, _CERTIFICATE, "certificate")
    try:
        context = ssl.create_default_context(cafile=ca or None)
    except (OSError, ValueError) as error:
        raise BadSettings(f"{names[0]} is {ca}, which has no certificates that can be read: {_reason(error)}") from None
    context.minimum_version = ssl.TLSVersion.TLSv1_2
    if certificate:
        _load_pair(context, certificate, key, (names[1], names[2]))
    return context


def _load_pair(context: ssl.SSLContext, certificate: str, key: str, names: tuple[str, str]) -> None:
    _read(names[0], certificate, _CERTIFICATE, "certificate")
    if "ENCRYPTED" in _read(names[1], key, _KEY, "private key"):
        raise BadSettings(
            f"{names[1]} is {key}, which is encrypted: an agent starts without anybody at hand, decrypt it"
        )
    try:
        # Without a function OpenSSL would ask the terminal for a password.
        context.load_cert_chain(certificate, key, password=_no_password)
    except ssl.SSLError as error:
        if error.reason == "KEY_VALUES_MISMATCH":
            why = f"the key {key} ({names[1]}) is not that of the certificate {certificate} ({names[0]})"
            raise BadSettings(f"{why}: give the two that were made together") from None
        raise BadSettings(
            f"{certificate} ({names[0]}) and {key} ({names[1]}) cannot be used: {_reason(error)}"
        ) from None
    except OSError as error:
        raise BadSettings(f"{certificate} or {key} cannot be read: {error.strerror}") from None
    _warn_of_readers(names[1], key)


def _no_password() -> str:
    raise BadSettings("a private key is encrypted: an agent starts without anybody at hand, decrypt it")


def _read(name: str, path: str, mark: str, what: str) -> str:
    """The text of a PEM file that has the mark of what it must have."""
    try:
        text = Path(path).read_text(encoding="ascii", errors="replace")
    except (OSError, ValueError) as error:
        reason = error.strerror if isinstance(error, OSError) else error
        remedy = (
            "give this user the right to read it"
            if isinstance(error, PermissionError)
            else "set it to one that is there"
        )
        raise BadSettings(f"{name} is {path}, which cannot be read: {reason}; {remedy}") from None
    if mark not in text:
        raise BadSettings(f"{name} is {path}, which has no {what} in PEM (a block that begins with -----BEGIN)")
    return text


def _reason(error: Exception) -> str:
    return str(getattr(error, "reason", None) or getattr(error, "strerror", None) or error)


def _warn_of_readers(name: str, key: str) -> None:
    try:
        mode = os.stat(key).st_mode
    except OSError:
        # Replaced a moment after it was read: the next look finds the one that took its place.
        return
    if mode & stat.S_IRWXO:
        log.warning("everybody on this machine may read the private key %s (%s): `chmod o-rwx` it", key, name)


def end_of(certificate: str) -> datetime:
    """Until when the certificate in a file is good; raises `ValueError` or `OSError` where it cannot be read."""
    return good_until(Path(certificate).read_text(encoding="ascii", errors="replace"))


def _warn_of_end(name: str, certificate: str) -> None:
    try:
        end = end_of(certificate)
    except (OSError, ValueError) as error:
        log.warning("%s is %s, of which it is not known how long it is good: %s", name, certificate, error)
        return
    now = datetime.now(UTC)
    if end <= now:
        log.warning("%s is %s, which expired on %s: nobody will trust it, renew it", name, certificate, _day(end))
    elif end - now < _SOON:
        log.warning("%s is %s, which expires on %s: renew it", name, certificate, _day(end))


def _day(moment: datetime) -> str:
    return f"{moment:%Y-%m-%d %H:%M} UTC"
