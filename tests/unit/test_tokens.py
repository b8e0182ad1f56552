"""Tokens: what is accepted, and every way that is known to talk a verifier into what it must refuse."""

from __future__ import annotations

import base64
import json
import logging
from pathlib import Path
from typing import Any, Final

import jwt
import pytest
from cryptography.hazmat.primitives.asymmetric import ec, ed25519, rsa
from cryptography.hazmat.primitives.serialization import (
    Encoding,
    NoEncryption,
    PrivateFormat,
    PublicFormat,
)
from jwt.algorithms import ECAlgorithm, HMACAlgorithm, OKPAlgorithm, RSAAlgorithm

from tidings.identity import Caller, Device, Scopes, Verifier, issue, issue_service
from tidings.runtime.settings import Settings
from tidings.wire.errors import BadScope, BadSettings, NotAuthenticated, StartFailed
from tidings.wire.frames import MAX_TOKEN

NOW: Final = 1_800_000_000
SECRET: Final = "a-secret-for-tests-and-nothing-else-0123456789"
RSA: Final = rsa.generate_private_key(public_exponent=65537, key_size=2048)
EC: Final = ec.generate_private_key(ec.SECP256R1())
ED: Final = ed25519.Ed25519PrivateKey.generate()
PRIVATE: Final[dict[str, Any]] = {"RS256": RSA, "ES256": EC, "EdDSA": ED}


def pem(key: Any) -> bytes:
    found: bytes = key.public_key().public_bytes(Encoding.PEM, PublicFormat.SubjectPublicKeyInfo)
    return found


def jwk(algorithm: str, key: Any = None, **members: Any) -> dict[str, Any]:
    """The public half of a key, as a JWK."""
    makers: dict[str, Any] = {"RS256": RSAAlgorithm, "ES256": ECAlgorithm, "EdDSA": OKPAlgorithm}
    public = (key or PRIVATE[algorithm]).public_key()
    return {**json.loads(makers[algorithm].to_jwk(public)), **members}


def claims(**changed: Any) -> dict[str, Any]:
    """Those of a good token; None leaves one out."""
    made = {"sub": "alice", "iat": NOW, "exp": NOW + 600, **changed}
    return {name: value for name, value in made.items() if value is not None}


def sign(key: Any = SECRET, algorithm: str = "HS256", *, kid: str | None = None, **changed: Any) -> str:
    return jwt.encode(claims(**changed), key, algorithm=algorithm, headers={"kid": kid} if kid else None)


def raw(header: Any, payload: Any, signature: bytes = b"") -> str:
    """A token put together by hand."""
    parts = (json.dumps(part).encode() if not isinstance(part, bytes) else part for part in (header, payload))
    return ".".join(base64.urlsafe_b64encode(part).rstrip(b"=").decode() for part in (*parts, signature))


def signed(header: Any, payload: Any, secret: bytes = SECRET.encode()) -> str:
    """A token put together by hand, with a good HS256 signature, whatever it says of itself."""
    head = raw(header, payload).rpartition(".")[0]
    signature = HMACAlgorithm(HMACAlgorithm.SHA256).sign(head.encode(), secret)
    return f"{head}.{base64.urlsafe_b64encode(signature).rstrip(b'=').decode()}"


async def opened(**settings: Any) -> Verifier:
    verifier = Verifier(Settings(**settings), clock=lambda: NOW)
    await verifier.open()
    return verifier


async def of_file(tmp_path: Path, document: bytes | dict[str, Any], **settings: Any) -> Verifier:
    """A verifier whose only keys are those of a file."""
    file = tmp_path / "keys"
    file.write_bytes(document if isinstance(document, bytes) else json.dumps(document).encode())
    return await opened(token_key_file=str(file), **settings)


async def refusal(verifier: Verifier, token: str) -> str:
    with pytest.raises(NotAuthenticated) as refused:
        await verifier.verify(token)
    assert refused.value.__cause__ is None
    assert refused.value.__suppress_context__ or refused.value.__context__ is None, "a cause could show a token"
    return str(refused.value)


# What is accepted


async def test_a_user_s_token() -> None:
    """It says the user, the device if it is for one, when it ends and when it was issued."""
    verifier = await opened(token_key=SECRET)
    assert await verifier.verify(sign(dev="phone")) == Device("alice", "phone", NOW + 600, NOW)
    assert await verifier.verify(sign(iat=None)) == Device("alice", None, NOW + 600, None)


async def test_a_service_s_token() -> None:
    """A scope makes it a service's, also an empty one: such a token is nobody's device."""
    verifier = await opened(token_key=SECRET)
    assert await verifier.verify(sign(sub="shop", scope="inbox:read")) == Caller(
        "shop", Scopes("inbox:read"), NOW + 600
    )
    assert isinstance(await verifier.verify(sign(sub="shop", scope="")), Caller)


async def test_what_we_issue_is_accepted() -> None:
    """`issue` and `issue_service` make what a verifier of the same settings accepts."""
    verifier = Verifier(Settings(token_key=SECRET, token_issuer="us", token_audience="mesh"))
    device = await verifier.verify(issue(SECRET, "alice", "phone", issuer="us", audience="mesh"))
    assert device[:2] == ("alice", "phone")
    caller = await verifier.verify(issue_service(SECRET, "shop", "revoke", issuer="us", audience="mesh"))
    assert isinstance(caller, Caller)
    assert caller.scopes.allows("revoke")


async def test_secrets_rotate() -> None:
    """The first secret signs, all verify, and one that is taken out verifies no more."""
    other = "another-secret-for-tests-and-nothing-else-012"
    both, new = f"{other}, {SECRET}", other
    old_token, new_token = issue(SECRET, "alice"), issue(both, "alice")
    during, after = Verifier(Settings(token_key=both)), Verifier(Settings(token_key=new))
    for token in (old_token, new_token):
        assert (await during.verify(token))[0] == "alice"
    assert (await after.verify(new_token))[0] == "alice"
    assert "no key of this mesh" in await refusal(after, old_token)


@pytest.mark.parametrize("algorithm", PRIVATE)
async def test_public_keys_in_pem(algorithm: str, tmp_path: Path) -> None:
    """A PEM file holds one key, whatever name the token calls it by."""
    verifier = await of_file(tmp_path, pem(PRIVATE[algorithm]))
    for kid in (None, "2026-01"):
        assert (await verifier.verify(sign(PRIVATE[algorithm], algorithm, kid=kid)))[0] == "alice"


async def test_keys_of_a_set(tmp_path: Path) -> None:
    """A JWK Set may hold keys of each kind, and keys for other things, which are passed over."""
    others = [
        {"kty": "EC", "crv": "P-384", "x": "AA", "y": "AA", "kid": "p384"},
        jwk("RS256", kid="encryption", use="enc"),
        jwk("RS256", kid="wrong", alg="RS512"),
        {"kty": "new-kind", "kid": "future"},
        "what is this",
    ]
    keys = [*others, *(jwk(algorithm, kid=algorithm, use="sig") for algorithm in PRIVATE)]
    verifier = await of_file(tmp_path, {"keys": keys})
    for algorithm, private in PRIVATE.items():
        assert (await verifier.verify(sign(private, algorithm, kid=algorithm)))[0] == "alice"
        assert (await verifier.verify(sign(private, algorithm)))[0] == "alice", "the only one of its algorithm"
    for kid in ("encryption", "wrong"):
        assert "no key" in await refusal(verifier, sign(RSA, "RS256", kid=kid))


async def test_a_file_is_read_again(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """A file that is replaced has the new key at once; one that is damaged or gone leaves the last one."""
    file = tmp_path / "keys"
    verifier = await of_file(tmp_path, pem(RSA))
    new = tmp_path / "new"
    new.write_bytes(pem(EC))
    new.rename(file)
    assert (await verifier.verify(sign(EC, "ES256")))[0] == "alice"
    assert "no key" in await refusal(verifier, sign(RSA, "RS256"))
    file.write_bytes(b"half of")
    assert (await verifier.verify(sign(EC, "ES256")))[0] == "alice"
    file.unlink()
    assert (await verifier.verify(sign(EC, "ES256")))[0] == "alice"
    assert [record.levelname for record in caplog.records if "last keys stay" in record.message] == ["WARNING"] * 2


# Attacks


async def test_none_is_no_algorithm(tmp_path: Path) -> None:
    """A token that says `none`, in any case, is refused whatever its signature."""
    for verifier in (await opened(token_key=SECRET), await of_file(tmp_path, pem(RSA))):
        for algorithm in ("none", "None", "NONE", "", None, 0, ["HS256"], {"a": 1}):
            assert "signed with one of" in await refusal(verifier, raw({"alg": algorithm}, claims()))


async def test_a_public_key_is_no_secret(tmp_path: Path) -> None:
    """HS256 with the public key as secret, in each form in which an attacker may have it, is refused."""
    document = {"keys": [jwk("RS256", kid="one")]}
    for form in (pem(RSA), pem(RSA).strip(), json.dumps(document).encode(), json.dumps(document["keys"][0]).encode()):
        token = signed({"alg": "HS256", "typ": "JWT", "kid": "one"}, claims(), form)
        for keys in (pem(RSA), document):
            assert "no key" in await refusal(await of_file(tmp_path, keys), token)
            assert "no key" in await refusal(await of_file(tmp_path, keys, token_key=SECRET), token)


@pytest.mark.parametrize("claimed", ["RS256", "ES256", "EdDSA", "HS256"])
@pytest.mark.parametrize("algorithm", PRIVATE)
async def test_each_key_has_one_algorithm(algorithm: str, claimed: str, tmp_path: Path) -> None:
    """A good signature under another algorithm's name is no signature."""
    verifier = await of_file(tmp_path, {"keys": [jwk(algorithm, kid="one")]}, token_key=SECRET)
    head, _, signature = sign(PRIVATE[algorithm], algorithm, kid="one").rpartition(".")
    renamed = raw({"alg": claimed, "kid": "one"}, claims()).rpartition(".")[0]
    if claimed == algorithm:
        assert (await verifier.verify(f"{head}.{signature}"))[0] == "alice"
    else:
        assert "no key" in await refusal(verifier, f"{renamed}.{signature}")


async def test_names_of_keys(tmp_path: Path) -> None:
    """The name of another key, of none, or no name where two could be meant, is refused."""
    other = ec.generate_private_key(ec.SECP256R1())
    verifier = await of_file(tmp_path, {"keys": [jwk("ES256", kid="a"), jwk("ES256", other, kid="b")]})
    assert (await verifier.verify(sign(EC, "ES256", kid="a")))[0] == "alice"
    for kid in ("b", "c", None, "../../dev/null", "a\0"):
        assert "no key" in await refusal(verifier, sign(EC, "ES256", kid=kid))
    assert "no JSON Web Token" in await refusal(verifier, raw({"alg": "ES256", "kid": 7}, claims()))


async def test_a_token_brings_no_key(tmp_path: Path) -> None:
    """A key, or an address of one, in a token's header counts for nothing."""
    mine = ec.generate_private_key(ec.SECP256R1())
    verifier = await of_file(tmp_path, pem(EC))
    for header in ({"jwk": jwk("ES256", mine)}, {"jku": "http://127.0.0.1:1/keys"}, {"x5u": "http://127.0.0.1:1/"}):
        token = jwt.encode(claims(), mine, algorithm="ES256", headers=header)
        assert "no key" in await refusal(verifier, token)


async def test_what_must_be_understood() -> None:
    """A header that says that something must be understood is refused (RFC 7515, section 4.1.11)."""
    verifier = await opened(token_key=SECRET)
    for header in (
        {"crit": ["exp"], "exp": NOW},
        {"crit": []},
        {"crit": ["b64"], "b64": True},
        {"crit": ["b64"], "b64": False},
        {"b64": False},
    ):
        assert "is not valid" in await refusal(verifier, signed({"alg": "HS256", **header}, claims()))


@pytest.mark.parametrize(
    "token",
    [
        "",
        "x",
        "...",
        "a.b.c",
        "é.é.é",
        "\ud800.a.b",
        "x" * (MAX_TOKEN + 1),
        raw(b"[" * 5000, b"{}"),
        raw({"alg": "HS256"}, b"[" * 5000),
        raw([], {}),
        raw(b'"HS256"', {}),
        raw({"alg": "HS256"}, claims()),
        raw(b"\xff\xfe", {}),
        f"Bearer {sign()}",
        f"{sign()}.{sign()}",
        sign()[:-1],
        sign() + "A",
    ],
)
async def test_what_is_no_token(token: str) -> None:
    """Garbage of every kind gets a sentence, and the sentence repeats none of it."""
    told = await refusal(await opened(token_key=SECRET), token)
    assert told.startswith("the token is not valid")
    assert not token or token not in told or len(token) < 4


async def test_signed_nonsense() -> None:
    """Claims of the wrong kind are refused, with a good signature too."""
    verifier = await opened(token_key=SECRET)
    bad: list[dict[str, Any]] = [
        *({"exp": value} for value in ("soon", "1e400", True, [NOW + 60], {}, -1, 2**70, float("inf"), float("nan"))),
        *({"iat": value} for value in ("then", True, [1], float("-inf"))),
        *({"nbf": value} for value in ("then", True, [1])),
        *({"sub": value} for value in ("", "x" * 201, 7, ["alice"], {"a": 1}, "a\0b", "\ud800")),
        *({"dev": value} for value in ("", "x" * 201, 7, ["phone"], False)),
        *({"scope": value} for value in (7, ["inbox:read"], {}, True)),
        {"scope": "inbox:read", "dev": "phone"},
    ]
    for changed in bad:
        await refusal(verifier, signed({"alg": "HS256"}, json.dumps(claims(**changed)).encode()))
    for payload in (b"[" * 5000, b"[]", b"7", b"\xff", b""):
        assert "no JSON Web Token" in await refusal(verifier, signed({"alg": "HS256"}, payload))
    assert f"over {MAX_TOKEN}" in await refusal(verifier, sign(filler="x" * MAX_TOKEN))
    for name in ("sub", "exp"):
        assert name in await refusal(verifier, sign(**{name: None}))


# Times


async def test_times() -> None:
    """Expired, not yet valid, issued in the future: each within the leeway of clocks, and not beyond."""
    verifier = await opened(token_key=SECRET, token_leeway_s=10)
    for good in ({"exp": NOW - 9}, {"nbf": NOW + 10}, {"iat": NOW + 10}):
        assert (await verifier.verify(sign(**good)))[0] == "alice"
    assert "expired" in await refusal(verifier, sign(exp=NOW - 10))
    assert "not valid yet" in await refusal(verifier, sign(nbf=NOW + 11))
    assert "in the future" in await refusal(verifier, sign(iat=NOW + 11))


async def test_no_token_lives_for_ever() -> None:
    """What outlives `token_ttl_max_s`, after which a revocation is forgotten, is refused."""
    verifier = await opened(token_key=SECRET, token_ttl_max_s=3600, token_leeway_s=0)
    assert (await verifier.verify(sign(exp=NOW + 3600)))[0] == "alice"
    for long in ({"exp": NOW + 3601}, {"exp": NOW + 3601, "iat": None}, {"exp": NOW + 60, "iat": NOW - 3600}):
        assert "lives too long" in await refusal(verifier, sign(**long))


async def test_issuer_and_audience() -> None:
    """Where they are set a token must have them; a token for some audience is none for a mesh that has no name."""
    verifier = await opened(token_key=SECRET, token_issuer="https://id", token_audience="tidings, mesh")
    good = {"iss": "https://id", "aud": "mesh"}
    assert (await verifier.verify(sign(**good)))[0] == "alice"
    assert (await verifier.verify(sign(**{**good, "aud": ["other", "tidings"]})))[0] == "alice"
    for changed in ({"iss": None}, {"iss": "https://id/"}, {"aud": None}, {"aud": "other"}, {"aud": []}, {"aud": 7}):
        await refusal(verifier, sign(**{**good, **changed}))
    nameless = await opened(token_key=SECRET)
    assert (await nameless.verify(sign(iss="anybody")))[0] == "alice"
    assert "token_audience" in await refusal(nameless, sign(aud="mesh"))


# Settings and files that are refused


def test_some_key_is_needed() -> None:
    """Without any key nothing starts, and the sentence names the settings."""
    with pytest.raises(StartFailed, match="TIDINGS_TOKEN_KEY, "):
        Verifier(Settings())


@pytest.mark.parametrize(
    "text, said",
    [
        (f"{SECRET},short", "too short"),
        (pem(RSA).decode(), "token_key_file"),
        (",".join([SECRET] * 9), "at most 8"),
    ],
)
def test_secrets_that_are_none(text: str, said: str) -> None:
    """A short one, a public key, too many; the message repeats none."""
    with pytest.raises(BadSettings, match=said) as refused:
        Settings(token_key=text)
    assert SECRET not in str(refused.value)


PRIVATE_PEM = EC.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, NoEncryption())


@pytest.mark.parametrize(
    "document, said",
    [
        (b"", "neither"),
        (b"{}", "neither"),
        (b"[" * 100_000, "neither"),
        (b"-----BEGIN PUBLIC KEY-----\nAAAA\n-----END PUBLIC KEY-----\n", "no PEM"),
        (PRIVATE_PEM, "private key"),
        (pem(rsa.generate_private_key(public_exponent=65537, key_size=1024)), "1024 bits"),
        (pem(ec.generate_private_key(ec.SECP384R1())), "another kind"),
        ({"keys": "x"}, "a list"),
        ({"keys": [{}] * 101}, "at most 100"),
        ({"keys": []}, "no key for"),
        ({"keys": [{"kty": "oct", "k": "c2VjcmV0", "kid": "s"}]}, "shared secret"),
        ({"keys": [jwk("ES256", kid="a", d="AA")]}, "private"),
        ({"keys": [jwk("ES256", kid="a"), jwk("EdDSA", kid="a")]}, "the `kid` 'a'"),
        ({"keys": [jwk("ES256"), jwk("EdDSA")]}, "have no `kid`"),
        ({"keys": [jwk("ES256", kid=7)]}, "a `kid` must be"),
        ({"keys": [jwk("ES256", kid="")]}, "a `kid` must be"),
        (b" " * 262_145, "over 262144 bytes"),
    ],
)
async def test_files_that_are_none(document: bytes | dict[str, Any], said: str, tmp_path: Path) -> None:
    """What cannot be used stops the start, with a reason."""
    with pytest.raises(BadSettings, match=said):
        await of_file(tmp_path, document)


async def test_a_file_that_is_not_there(tmp_path: Path) -> None:
    """Its name is in the sentence."""
    with pytest.raises(BadSettings, match="No such file"):
        await opened(token_key_file=str(tmp_path / "none"))


@pytest.mark.parametrize(
    "url",
    [
        "http://id.example.com/keys",
        "ftp://id/keys",
        "id.example.com",
        "https://",
        "https://a:b@id/keys",
        "http://0.0.0.0/",
    ],
)
def test_addresses_that_are_refused(url: str) -> None:
    """Keys come over https, or from this machine."""
    with pytest.raises(BadSettings, match="token_jwks_url"):
        Verifier(Settings(token_jwks_url=url))


# Scopes


def test_scopes() -> None:
    """A scope allows itself; topics are allowed by pattern; what is not known allows nothing."""
    scopes = Scopes("publish:user publish:topic:post.42 publish:topic:team.7.> openid *")
    assert scopes.allows("publish:user")
    for scope in ("inbox:read", "publish", "publish:topic", "", "publish:user inbox:read"):
        assert not scopes.allows(scope)
    for topic, allowed in {"post.42": True, "post.43": False, "team.7.a.b": True, "team.7": False, "x": False}.items():
        assert scopes.allows_topic(topic) is allowed
    assert Scopes("publish:topic:>").allows_topic("anything.at.all")
    assert not Scopes("publish:topic: publish:topic:*").allows_topic("a")


@pytest.mark.parametrize("scope", ["publish", "publish:topic:", "publish:topic:a.*", "inbox:reed", "*"])
def test_scopes_that_are_not_issued(scope: str) -> None:
    """A name that would allow nothing is a mistake of whoever asks for it."""
    with pytest.raises(BadScope):
        issue_service(SECRET, "shop", f"publish:user {scope}")


async def test_tokens_are_not_logged(caplog: pytest.LogCaptureFixture, tmp_path: Path) -> None:
    """At any level, accepted or refused, a log has nothing of a token."""
    caplog.set_level(logging.DEBUG)
    verifier = await of_file(tmp_path, pem(EC))
    good, bad = sign(EC, "ES256"), sign()
    await verifier.verify(good)
    await refusal(verifier, bad)
    assert not any(part in caplog.text for token in (good, bad) for part in token.split("."))
