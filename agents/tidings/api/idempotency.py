"""The header ``Idempotency-Key``: a request that is sent again under its key does nothing twice.

Nothing is kept in this process. The ids of events without one follow from service and key, so that JetStream knows the
messages of a retry, whichever api agent it comes to; and the log has what each key came with first, so that another
request under it is refused. Both hold for `duplicate_window_s`.

Source: draft-ietf-httpapi-idempotency-key-header-06, sections 2.1 to 2.7. The key may come with the quotes of a
structured field (RFC 8941) or without.
"""

from __future__ import annotations

import hashlib
import re
from base64 import urlsafe_b64encode
from typing import Any, Final, NamedTuple

import orjson

from tidings.stream import once
from tidings.stream.connection import Connection
from tidings.stream.topology import KEYS
from tidings.wire.subject import CLAIMED

from .gate import Call
from .problems import Refused

__all__ = ["HEADER", "Idempotency", "IdempotencyKey"]

HEADER: Final = "Idempotency-Key"
_KEY: Final = re.compile(r"[\x21\x23-\x5b\x5d-\x7e]{1,255}")
"""Visible ASCII without quotes and backslashes, which would have two spellings."""


class IdempotencyKey(NamedTuple):
    """A key of one service."""

    service: str
    key: str

    def id_of(self, number: int) -> str:
        """The id of the event with this number in the request, if it brings none."""
        return self._digest(f"event {number}")

    @property
    def name(self) -> str:
        """What the log knows it by."""
        return self._digest("request")

    def _digest(self, what: str) -> str:
        # No part of it has a NUL: two keys never make one text.
        text = "\0".join((self.service, self.key, what))
        return urlsafe_b64encode(hashlib.sha256(text.encode()).digest()[:24]).decode()


class Idempotency:
    """Reads keys, and claims them in the log."""

    def __init__(self, connection: Connection) -> None:
        self._connection = connection

    def key_of(self, call: Call) -> IdempotencyKey | None:
        """The key of a request, if it has one; raises `Refused`."""
        given = call.request.headers.getall(HEADER, [])
        if not given:
            return None
        text = given[0].strip()
        if len(text) >= 2 and text[0] == text[-1] == '"':
            text = text[1:-1]
        if len(given) > 1 or not _KEY.fullmatch(text):
            raise Refused(
                "bad_parameter",
                "an idempotency key has 1 to 255 visible ASCII characters, no quotes, no backslashes: such as a UUID",
                parameter=HEADER,
            )
        return IdempotencyKey(call.service.name, text)

    async def claim(self, key: IdempotencyKey, path: str, document: Any) -> None:
        """Note durably what the key is for; raises `Refused` where it is for something else."""
        # The order of members and blanks between them say nothing.
        content = orjson.dumps([path, document], option=orjson.OPT_SORT_KEYS)
        fingerprint = hashlib.sha256(content).hexdigest().encode()
        if await once.first(self._connection, KEYS, CLAIMED, key.name, fingerprint) != fingerprint:
            raise Refused(
                "idempotency_key_reused",
                "this key came with another request a while ago: each request has a key of its own",
                parameter=HEADER,
            )
