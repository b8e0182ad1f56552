"""The one thing of a certificate that the standard library does not tell: until when it is good.

X.509 (RFC 5280, section 4.1) in DER (X.690): a value is a tag, a length and its content, and
``Certificate = SEQ { SEQ { [0] version OPTIONAL, serial, signature, issuer, validity = SEQ { from, to } … } … }``.
"""

from __future__ import annotations

import ssl
from datetime import UTC, datetime
from typing import Final

__all__ = ["good_until"]

_VERSION: Final = 0xA0
_UTC_TIME: Final = 0x17
_FOOTER: Final = "-----END CERTIFICATE-----"
_HEADER: Final = "-----BEGIN CERTIFICATE-----"


def good_until(pem: str) -> datetime:
    """The end of the first certificate's validity (notAfter), in UTC; raises `ValueError` where there is none."""
    start = pem.find(_HEADER)
    end = pem.find(_FOOTER, start)
    if start < 0 or end < 0:
        raise ValueError("it has no certificate in PEM")
    try:
        return _not_after(ssl.PEM_cert_to_DER_cert(pem[start : end + len(_FOOTER)]))
    except (IndexError, UnicodeDecodeError):
        raise ValueError("its certificate cannot be read") from None


def _not_after(der: bytes) -> datetime:
    _, at, _ = _value(der, 0)
    _, at, _ = _value(der, at)
    tag, _, end = _value(der, at)
    # The version is left out where it is the first; what follows are serial, signature and issuer.
    for _ in range(3 if tag == _VERSION else 2):
        _, _, end = _value(der, end)
    _, at, _ = _value(der, end)
    _, _, end = _value(der, at)
    tag, at, end = _value(der, end)
    text = der[at:end].decode("ascii")
    if tag == _UTC_TIME:
        # Two digits: 50 to 99 are of the twentieth century (RFC 5280, section 4.1.2.5.1).
        text = ("19" if int(text[:2]) >= 50 else "20") + text
    return datetime.strptime(text, "%Y%m%d%H%M%SZ").replace(tzinfo=UTC)


def _value(der: bytes, at: int) -> tuple[int, int, int]:
    """Tag, start and end of the content of the value at a place."""
    size, start = der[at + 1], at + 2
    if size & 0x80:
        long = size & 0x7F
        size, start = int.from_bytes(der[start : start + long], "big"), start + long
    return der[at], start, start + size
