"""Keys that verify tokens, each with the one algorithm that it is for.

An algorithm is a property of the key and never of the token: a token's ``alg`` only chooses among the keys. So a public
key is never taken for a shared secret (RFC 8725, sections 2.1 and 3.1), and ``none`` finds no key.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Final, NamedTuple

import jwt
import orjson
from jwt.algorithms import has_crypto

from tidings.runtime.settings import listed
from tidings.wire.errors import BadKeys, StartFailed

__all__ = ["ALGORITHMS", "MAX_DOCUMENT_BYTES", "Key", "candidates", "need_crypto", "read_document", "secret_keys"]

ALGORITHMS: Final = ("HS256", "RS256", "ES256", "EdDSA")
MAX_DOCUMENT_BYTES: Final = 262_144
_MAX_KEYS: Final = 100
_MAX_KID: Final = 200
_LEAST_RSA_BITS: Final = 2048
_PRIVATE_MEMBERS: Final = frozenset(("d", "p", "q", "dp", "dq", "qi", "oth", "k"))


class Key(NamedTuple):
    """One key: its name (None for one without), its only algorithm, and what PyJWT verifies with."""

    kid: str | None
    algorithm: str
    material: Any


def need_crypto() -> None:
    """Raise `StartFailed` where the library for public keys is not installed."""
    if not has_crypto:
        raise StartFailed("keys from a file or an address need a library: pip install 'tidings[crypto]'")


def secret_keys(text: str) -> list[Key]:
    """The shared secrets of the setting `token_key`; one without a name each."""
    return [Key(None, "HS256", secret) for secret in listed(text)]


def candidates(keys: Sequence[Key], algorithm: str, kid: str | None) -> list[Key]:
    """The keys that may have signed such a token, few in number.

    A key with a name answers to that name only, unless the token names none and it is the only one of its algorithm; a
    key without a name is tried whatever the token calls it, as a PEM file knows no names.
    """
    able = [key for key in keys if key.algorithm == algorithm]
    if kid is None and len(able) == 1:
        return able
    return [key for key in able if key.kid is None or key.kid == kid]


def read_document(document: bytes) -> list[Key]:
    """The keys of a PEM public key or a JWK Set (RFC 7517); raises `BadKeys` with what is wrong, and none of it."""
    if len(document) > MAX_DOCUMENT_BYTES:
        raise BadKeys(f"it is over {MAX_DOCUMENT_BYTES} bytes")
    return [_of_pem(document)] if document.lstrip().startswith(b"-----BEGIN") else read_jwks(document)


def _of_pem(document: bytes) -> Key:
    from cryptography.exceptions import UnsupportedAlgorithm
    from cryptography.hazmat.primitives.serialization import load_pem_public_key

    if b"PRIVATE KEY" in document:
        raise BadKeys("it is a private key: keep that where tokens are signed, and give its public key")
    try:
        public = load_pem_public_key(document)
    except (ValueError, UnsupportedAlgorithm):
        raise BadKeys("it is no PEM public key (-----BEGIN PUBLIC KEY-----)") from None
    return Key(None, _algorithm_of(public), public)


def _algorithm_of(public: Any) -> str:
    """The one algorithm of a public key; raises `BadKeys` for a key that Tidings does not verify with."""
    from cryptography.hazmat.primitives.asymmetric.ec import SECP256R1, EllipticCurvePublicKey
    from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PublicKey
    from cryptography.hazmat.primitives.asymmetric.rsa import RSAPublicKey

    if isinstance(public, RSAPublicKey):
        if public.key_size < _LEAST_RSA_BITS:
            raise BadKeys(f"an RSA key has {public.key_size} bits: at least {_LEAST_RSA_BITS} are needed")
        return "RS256"
    if isinstance(public, EllipticCurvePublicKey) and isinstance(public.curve, SECP256R1):
        return "ES256"
    if isinstance(public, Ed25519PublicKey):
        return "EdDSA"
    raise BadKeys("a key is of another kind: use RSA, EC on the curve P-256, or Ed25519")


def read_jwks(document: bytes) -> list[Key]:
    """The keys of a JWK Set that are for signatures of ours; raises `BadKeys` when it is none or has none."""
    try:
        entries = orjson.loads(document)["keys"]
    except (orjson.JSONDecodeError, KeyError, TypeError):
        raise BadKeys('it is neither a PEM public key nor a JWK Set ({"keys":[…]})') from None
    if not isinstance(entries, list) or len(entries) > _MAX_KEYS:
        raise BadKeys(f"`keys` must be a list of at most {_MAX_KEYS} keys")
    found: dict[str | None, Key] = {}
    for entry in entries:
        key = _of_jwk(entry)
        if key is None:
            continue
        if key.kid in found:
            name = "have no `kid`" if key.kid is None else f"have the `kid` {key.kid!r}"
            raise BadKeys(f"two of its keys {name}: which one a token means must be plain")
        found[key.kid] = key
    if not found:
        raise BadKeys("it has no key for RS256, ES256 or EdDSA signatures")
    return list(found.values())


def _of_jwk(entry: Any) -> Key | None:
    """None for a key that is for something else: a set may have such (RFC 7517, section 5)."""
    if not isinstance(entry, dict):
        return None
    if _PRIVATE_MEMBERS & entry.keys():
        raise BadKeys("one of its keys is private or a shared secret: only public keys belong there")
    operations = entry.get("key_ops", ["verify"])
    if entry.get("use", "sig") != "sig" or not isinstance(operations, list) or "verify" not in operations:
        return None
    kid = entry.get("kid")
    if kid is not None and (not isinstance(kid, str) or not 0 < len(kid) <= _MAX_KID):
        raise BadKeys(f"a `kid` must be a string of 1 to {_MAX_KID} characters")
    declared = entry.get("alg")
    if declared is not None and declared not in ALGORITHMS:
        return None
    try:
        material = jwt.PyJWK.from_dict(entry).key
        algorithm = _algorithm_of(material)
    except (jwt.PyJWTError, BadKeys, TypeError, ValueError):
        # PyJWT's message would repeat the key.
        return None
    return Key(kid, algorithm, material) if declared in (None, algorithm) else None
