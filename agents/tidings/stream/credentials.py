"""A NATS credentials file, looked at before it is used.

nats-py reads it in the middle of the handshake: a file that is missing looks like a server that is, and in one
without its two parts it looks for them for ever.
"""

from __future__ import annotations

from pathlib import Path
from typing import Final

from tidings.wire.errors import BadSettings

__all__ = ["check_credentials"]

_JWT: Final = b"BEGIN NATS USER JWT"
_SEED: Final = b"BEGIN USER NKEY SEED"


def check_credentials(path: str) -> None:
    """Raise `BadSettings` unless the file can be read, has a user's JWT and seed, and there is what signs with it."""
    file = Path(path).absolute()
    try:
        # As nats-py does: what another end of line leaves on a line is part of it.
        lines = file.read_bytes().split(b"\n")
    except (OSError, ValueError) as error:
        reason = error.strerror if isinstance(error, OSError) else error
        raise BadSettings(
            f"the NATS credentials file {file} cannot be read: {reason}. Set nats_credentials "
            "(TIDINGS_NATS_CREDENTIALS) to one that this user may read, or to nothing for none"
        ) from None
    seed = _after(lines, _SEED)
    if not _after(lines, _JWT) or not seed:
        raise _no_credentials(file)
    try:
        import nkeys
    except ImportError as error:
        raise BadSettings(
            f"nats_credentials (TIDINGS_NATS_CREDENTIALS) is set, and what signs with it is not there ({error}): "
            "pip install 'tidings[nkeys]'"
        ) from None
    try:
        nkeys.from_seed(bytearray(seed)).wipe()
    except (nkeys.NkeysError, ValueError):
        raise _no_credentials(file) from None


def _after(lines: list[bytes], title: bytes) -> bytes:
    """The line below a title; nothing when there is none."""
    at = next((number for number, line in enumerate(lines, 1) if title in line), len(lines))
    return lines[at] if at < len(lines) else b""


def _no_credentials(file: Path) -> BadSettings:
    return BadSettings(
        f"the file {file}, which nats_credentials (TIDINGS_NATS_CREDENTIALS) names, is no NATS credentials file: "
        "it must have a user's JWT and seed, as `nsc generate creds` writes them"
    )
