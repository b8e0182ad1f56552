"""Certificates of a test: an authority of its own, pairs that it issues, and files to renew."""

from __future__ import annotations

import socket
import ssl
from datetime import UTC, datetime
from pathlib import Path

import trustme
from cryptography import x509
from cryptography.hazmat.primitives.serialization import Encoding, NoEncryption, PrivateFormat, load_pem_private_key

LOCAL = ("localhost", "127.0.0.1")


class Authority:
    """A CA with its files in `folder`; each pair is a certificate with its chain, and a key."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.folder.mkdir(parents=True, exist_ok=True)
        self._ca = trustme.CA()
        self.ca = folder / "ca.pem"
        self._ca.cert_pem.write_to_path(str(self.ca))

    def pair(self, name: str, *identities: str, expires: datetime | None = None) -> tuple[Path, Path]:
        """Write ``<name>.pem`` and ``<name>.key``, over those that are there; returns their paths."""
        made = self._ca.issue_cert(*(identities or LOCAL), common_name=name, not_after=expires)
        certificate, key = self.folder / f"{name}.pem", self.folder / f"{name}.key"
        certificate.write_bytes(b"".join(pem.bytes() for pem in made.cert_chain_pems))
        key.touch(mode=0o600)
        # PKCS 8, which Java reads, too.
        private = load_pem_private_key(made.private_key_pem.bytes(), None)
        key.write_bytes(private.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, NoEncryption()))
        return certificate, key

    def expired(self, name: str) -> tuple[Path, Path]:
        """A pair that nobody trusts any more."""
        return self.pair(name, expires=datetime(2021, 1, 1, tzinfo=UTC))

    def trust(self) -> ssl.SSLContext:
        """What a client trusts: this authority and nobody else."""
        return ssl.create_default_context(cafile=str(self.ca))


def settings_for(pair: tuple[Path, Path]) -> dict[str, str]:
    """The settings of a door that serves with this pair."""
    return {"tls_certificate": str(pair[0]), "tls_key": str(pair[1])}


def serial_of(pem: Path) -> str:
    """The serial number of the first certificate in a file, as `ssl.SSLSocket.getpeercert` writes it."""
    number = x509.load_pem_x509_certificates(pem.read_bytes())[0].serial_number
    text = f"{number:X}"
    return text if len(text) % 2 == 0 else f"0{text}"


def served(port: int, trust: ssl.SSLContext, host: str | None = "localhost") -> ssl.SSLSocket:
    """A TLS connection to a door of this machine, shaken hands with."""
    return trust.wrap_socket(socket.create_connection(("127.0.0.1", port), 10), server_hostname=host)
