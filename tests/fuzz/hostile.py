"""What hostile clients and publishers send: valid frames and bodies, broken by the rules of their own grammar.

Everything is drawn from one `random.Random`: the same seed makes the same bytes.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from random import Random
from typing import Any, Final

from support.rawclient import BINARY, CLOSE, PING, PONG, TEXT, UPGRADE, frame

TOPICS: Final = ("post.42", "team.7.>", "a", "a..b", ">", "*", "", "x" * 300, ".".join("abcdefghij"), "post.é", "p q")
POSITIONS: Final = ("u1.1", "u0.0", "b1.1", "u1.1.b1.1", "u99999999999999.1", "", "zzz", "u-1.1", "u1", "u1.1x", "b")
TEXTS: Final = (
    "",
    "x",
    "\0",
    "\ud800",
    "\udfff\ud800",
    "\u202e",
    "é" * 200,
    "x" * 5000,
    "'; DROP TABLE inbox; --",
    "{{7*7}}",
    "../../etc/passwd",
    "\r\nX: y",
    "a.b.*.>",
    "%00",
    "null",
)
NUMBERS: Final = (0, -1, 1, 2**31, 2**53 + 1, 2**63, 2**64, -(2**63) - 1, 10**40, 1e308, 0.1, -0.0)
RAW: Final = (
    "1e999",
    "-",
    "00",
    "NaN",
    "Infinity",
    "1" * 400,
    "[" * 2000,
    '{"a":' * 1500,
    "[" * 200 + "]" * 200,
    '"\\ud800"',
)
"""JSON that no value makes, or none that can be read."""
ATTRIBUTES: Final = (
    "source", "type", "specversion", "time", "expires", "priority", "topic", "data", "collapsekey", "traceparent",
    "subject", "datacontenttype", "data_base64", "extension", "Bad-Name", "x" * 100,
)  # fmt: skip
TIMES: Final = ("2026-01-31T12:00:00Z", "9999-99-99T00:00:00Z", "0001-01-01T00:00:00+23:59", "high", "1.0")
LEVELS: Final = (
    b"post",
    b"x" * 250,
    b"%00",
    b"%zz",
    b"A",
    "é".encode(),
    b"{}",
    b"$JS",
    b"_",
    b"%",
    b"a%2Eb",
    b"\xff\xfe",
)
ENDINGS: Final = (
    b"",
    b"",
    b"",
    b"%zz",
    b"%",
    "é".encode(),
    b"{}",
    b"%2E",
    b"x" * 300,
    b"=",
    b"%00",
    b"\xff",
    b"\xed\xa0\x80",
)

Frame = dict[str, Any]


def _position(draw: Random) -> Any:
    return draw.choice(POSITIONS) if draw.random() < 0.8 else any_value(draw)


def valid_frames(draw: Random) -> Frame:
    """A frame of the protocol, nearly always without a mistake."""
    kind = draw.choice(("ack", "ack", "inbox", "mark", "count", "sub", "unsub", "subs", "ping"))
    made: Frame = {"t": kind, "ref": draw.choice((draw.randrange(1000), f"r{draw.randrange(1000)}"))}
    if kind == "ack":
        made["pos" if draw.random() < 0.7 else "upto"] = "u1.1"
        if "pos" in made:
            made["pos"] = ["u1.1"] * draw.choice((0, 1, 1, 5, 999, 1001))
    elif kind == "inbox":
        made.update(limit=draw.choice((1, 50, 200)), filter=draw.choice(("all", "unread", "archived")))
        if draw.random() < 0.5:
            made[draw.choice(("before", "after"))] = _position(draw)
    elif kind == "mark":
        made["as"] = draw.choice(("seen", "read", "unread", "archived"))
        made["pos"] = "all" if draw.random() < 0.2 else [_position(draw) for _ in range(draw.choice((0, 1, 4)))]
    elif kind in ("sub", "unsub"):
        made["topics"] = [draw.choice(TOPICS) for _ in range(draw.choice((1, 2, 5, 501)))]
    elif kind == "subs":
        made.update(after=draw.choice(TOPICS), limit=draw.choice((1, 500)))
    return made


def hellos(draw: Random, token: str) -> Frame:
    """A hello that may be right."""
    made: Frame = {"t": "hello", "token": token, "device": f"d{draw.randrange(4)}"}
    if draw.random() < 0.5:
        made["window"] = draw.choice((1, 64, 1000))
    if draw.random() < 0.5:
        made["since"] = _position(draw)
    return made


def any_value(draw: Random, depth: int = 0) -> Any:
    """A JSON value that was not asked for."""
    kind = draw.randrange(7 if depth < 3 else 5)
    if kind < 2:
        return draw.choice(TEXTS)
    if kind < 4:
        return draw.choice((*NUMBERS, True, False, None))
    if kind == 4:
        return draw.choice(POSITIONS)
    if kind == 5:
        return [any_value(draw, depth + 1) for _ in range(draw.randrange(4))]
    return {draw.choice(TEXTS)[:20]: any_value(draw, depth + 1) for _ in range(draw.randrange(4))}


def broken(draw: Random, members: Frame) -> bytes:
    """The text of an object with one to three mistakes in members, in JSON, or in bytes."""
    members = dict(members)
    for _ in range(draw.randrange(3)):
        name = draw.choice((*members, "t", "ref", draw.choice(TEXTS)[:20])) if members else "t"
        if draw.random() < 0.3:
            members.pop(name, None)
        else:
            members[name] = any_value(draw)
    text = json.dumps(members, ensure_ascii=draw.random() < 0.5).encode("utf-8", "surrogatepass")
    return draw.choice(_BYTES)(draw, text) if draw.random() < 0.4 else text


def _raw_value(draw: Random, text: bytes) -> bytes:
    return text[:-1] + b',"raw":' + draw.choice(RAW).encode() + b"}"


def _twice(draw: Random, text: bytes) -> bytes:
    return text[:-1] + b',"t":"ping","t":"ack","pos":["u1.1"],"pos":7,"id":"twice"}'


def _cut(draw: Random, text: bytes) -> bytes:
    return text[: draw.randrange(len(text) + 1)]


def _flip(draw: Random, text: bytes) -> bytes:
    at = draw.randrange(len(text))
    return text[:at] + bytes((draw.randrange(256),)) + text[at + 1 :]


def _insert(draw: Random, text: bytes) -> bytes:
    at = draw.randrange(len(text))
    return (
        text[:at]
        + draw.choice((b"\0", b"\xff\xfe", b"\xed\xa0\x80", b"\xc0\xaf", b"\xef\xbb\xbf", b"\\u0000"))
        + text[at:]
    )


def _wrapped(draw: Random, text: bytes) -> bytes:
    return draw.choice((b"[%b]", b" \n%b\n ", b"%b%b" % (text, b"%b"), b'"%b"')) % text if b"%" not in text else text


_BYTES: Final[tuple[Callable[[Random, bytes], bytes], ...]] = (_raw_value, _twice, _cut, _flip, _insert, _wrapped)


def raw_frames(draw: Random) -> bytes:
    """Bytes in the place of a WebSocket frame: opcodes, lengths, masks, fragments, reserved bits and closes."""
    text = broken(draw, valid_frames(draw))
    pieces = [text[at : at + 7] for at in range(0, min(len(text), 200), 7)] or [b""]
    return draw.choice(
        (
            lambda: frame(text, draw.randrange(16)),
            lambda: frame(text, TEXT, reserved=draw.randrange(8)),
            lambda: frame(text, BINARY),
            lambda: frame(text[:125], draw.choice((PING, PONG))),
            lambda: frame(text, draw.choice((PING, PONG, CLOSE)), final=False),
            lambda: frame(draw.randrange(65_536).to_bytes(2, "big") + text[:120], CLOSE),
            lambda: frame(text[:1], CLOSE),
            lambda: b"\x81" + bytes((len(text) & 0x7F,)) + text,
            lambda: b"\x81\xff" + draw.choice((2**63, 2**64 - 1, 2**40, 70_000)).to_bytes(8, "big") + bytes(4) + text,
            lambda: b"\x81\xfe\x00\x01" + bytes(4) + text,
            lambda: frame(pieces[0], TEXT, final=False) + b"".join(frame(one, 0, final=False) for one in pieces[1:]),
            lambda: frame(pieces[0], TEXT, final=False) + frame(b"", PING) + frame(pieces[-1], 0),
            lambda: frame(text, TEXT, final=False) + frame(text, TEXT),
            lambda: frame(text, 0),
            lambda: frame(b"", TEXT, final=False) * draw.choice((1, 500)),
            lambda: frame(b"", PING) * draw.choice((1, 500)),
            lambda: draw.randbytes(draw.randrange(1, 400)),
        )
    )()


def handshakes(draw: Random) -> bytes:
    """An HTTP request in the place of the upgrade."""
    lines = UPGRADE.split(b"\r\n")
    for _ in range(draw.randrange(1, 4)):
        at = draw.randrange(len(lines))
        lines[at] = draw.choice(
            (
                b"",
                lines[at] * 2,
                lines[at][: draw.randrange(len(lines[at]) + 1)],
                lines[at].replace(b":", b""),
                b"X-Long: " + b"x" * draw.choice((10, 9000)),
                b"Content-Length: " + draw.choice((b"5", b"-1", b"99999999999999999999")),
                b"Transfer-Encoding: chunked",
                b"Sec-WebSocket-Extensions: permessage-deflate; client_max_window_bits=99",
                b"Authorization: Bearer " + draw.choice((b"", b"x", b"\xff\xff", b"a.b.c", b"x" * 7000)),
                b"Sec-WebSocket-Version: " + draw.choice((b"8", b"0", b"13, 8", b"x")),
                b"Sec-WebSocket-Key: " + draw.choice((b"", b"x", b"=" * 100)),
                b"Upgrade: h2c",
                b"GET /v1/ws?token=x HTTP/1.0",
                b"POST /v1/ws HTTP/1.1",
                b"GET * HTTP/9.9",
                draw.randbytes(20).replace(b"\n", b""),
            )
        )
    return b"\r\n".join(lines)


def bodies(draw: Random, id: str) -> bytes:
    """A CloudEvents body with `id`, which may have become none. Its id is either this one or none that is valid."""
    event: Frame = {"specversion": "1.0", "id": id, "source": "fuzz", "type": "test.made", "data": {"n": 1}}
    for _ in range(draw.randrange(3)):
        name = draw.choice(ATTRIBUTES)
        event[name] = any_value(draw) if draw.random() < 0.3 else draw.choice(TIMES)
    if draw.random() < 0.1:
        del event[draw.choice(tuple(event))]
    if draw.random() < 0.05:
        event["data"] = "x" * draw.choice((16_000, 16_250, 16_384, 60_000))
    text = json.dumps(event, ensure_ascii=draw.random() < 0.5).encode("utf-8", "surrogatepass")
    if draw.random() < 0.3:
        text = draw.choice((_raw_value, _cut, _insert, _wrapped))(draw, text)
    return text


def headers(draw: Random, id: str) -> bytes:
    """A block of NATS headers, as the server takes it, with an id that makes a retry one message."""
    lines = [b"NATS/1.0", b"Nats-Msg-Id: " + id.encode()]
    for _ in range(draw.randrange(4)):
        lines.append(
            draw.choice(
                (
                    b"X:",
                    b"X: " + b"y" * draw.choice((1, 3000)),
                    b": nothing",
                    b"no colon",
                    b"Tidings-Reason: forged",
                    b"Nats-Subject: notify.user.somebody",
                    b"Nats-Sequence: 1",
                    b"Status: 503",
                    b"X: \xff\xfe\x00\xed\xa0\x80",
                    b"traceparent: 00-zz-zz-zz",
                )
            )
        )
    draw.shuffle(rest := lines[2:])
    return b"\r\n".join((*lines[:2], *rest)) + b"\r\n\r\n"


def topic_subjects(draw: Random) -> bytes:
    """A subject that the stream of topics takes, of a topic that may be none."""
    levels = [draw.choice(LEVELS) for _ in range(draw.choice((1, 2, 3, 12)))]
    return b".".join((b"notify.topic.fuzz", *levels))


def user_subjects(draw: Random, number: int) -> bytes:
    """A subject of a user whom nobody else has, whose token may be none of ours."""
    return b"notify.user.fuzz%d" % number + draw.choice(ENDINGS)
