"""What a program signs in to NATS with: a credentials file, or the seed of an nkey, looked at before it is used.

nats-py reads it in the middle of the handshake: a file that is missing looks like a server that is, and in one
without its parts it looks for them for ever.
"""

from __future__ import annotations

from pathlib import Path
from typing import Final

from tidings.wire.errors import BadSettings

__all__ = ["login"]

_JWT: Final = b"BEGIN NATS USER JWT"
_SEED: Final = b"BEGIN USER NKEY SEED"
_USER_SEED: Final = b"SU"
"""How the seed of a user's nkey begins."""


def login(path: str) -> dict[str, str]:
    """The options of nats-py that sign in with a file: a user's JWT and seed, or a user's nkey seed alone.

    Raises `BadSettings` unless the file can be read, has either, and there is what signs with it.
    """
    file = Path(path).absolute()
    try:
        # As nats-py does: what another end of line leaves on a line is part of it.
        content = file.read_bytes()
    except (OSError, ValueError) as error:
        reason = error.strerror if isinstance(error, OSError) else error
        raise BadSettings(
            f"the NATS credentials file {file} cannot be read: {reason}. Set nats_credentials "
            "(TIDINGS_NATS_CREDENTIALS) to one that this user may read, or to nothing for none"
        ) from None
    lines = content.split(b"\n")
    alone = content.strip().startswith(_USER_SEED)
    seed = content.strip() if alone else _after(lines, _SEED)
    if not seed or not (alone or _after(lines, _JWT)):
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
    return {"nkeys_seed" if alone else "user_credentials": path}


def _after(lines: list[bytes], title: bytes) -> bytes:
    """The line below a title; nothing when there is none."""
    at = next((number for number, line in enumerate(lines, 1) if title in line), len(lines))
    return lines[at] if at < len(lines) else b""


def _no_credentials(file: Path) -> BadSettings:
    return BadSettings(
        f"the file {file}, which nats_credentials (TIDINGS_NATS_CREDENTIALS) names, is no NATS credentials file: "
        "it must have a user's JWT and seed, as `nsc generate creds` writes them, or a user's nkey seed alone, as "
        "`tidings topology nats-config` writes it"
    )
