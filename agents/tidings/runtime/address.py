"""Addresses in settings: whether they leave this machine, whether they mean TLS, and how to show them."""

from __future__ import annotations

import ipaddress
import re
from typing import Final
from urllib.parse import urlsplit

__all__ = ["has_login", "has_tls", "is_loopback", "reachable", "servers", "shown"]

_LOGIN: Final = re.compile(r"(?<=//)[^/?#]*@|^[^/?#]*@")


def servers(urls: str) -> list[str]:
    """Of a comma-separated list of NATS servers, each with its scheme."""
    return [url if "://" in url else f"nats://{url}" for part in urls.split(",") if (url := part.strip())]


def has_tls(urls: str) -> bool:
    """Whether one of these NATS servers is to be spoken to with TLS only: then all are."""
    return any(urlsplit(url).scheme in ("tls", "wss") for url in servers(urls))


def has_login(urls: str) -> bool:
    """Whether each of these NATS servers has a user or a token in its address."""
    return all(urlsplit(url).username is not None for url in servers(urls))


def is_loopback(host: str) -> bool:
    """Whether an address or a name is this machine's own: the names are localhost and what ends in it (RFC 6761)."""
    name = host.strip("[]").rstrip(".").lower()
    if name == "localhost" or name.endswith(".localhost"):
        return True
    try:
        return ipaddress.ip_address(name).is_loopback
    except ValueError:
        return False


def reachable(host: str) -> str:
    """As in an URL of this machine's own: where all addresses are listened on, the loopback address."""
    name = host.strip("[]")
    try:
        address = ipaddress.ip_address(name or "0.0.0.0")
    except ValueError:
        return name
    if address.is_unspecified:
        address = ipaddress.ip_address("127.0.0.1" if address.version == 4 else "::1")
    return f"[{address}]" if address.version == 6 else str(address)


def shown(urls: str) -> str:
    """Addresses without user, password or token."""
    return ",".join(_LOGIN.sub("…@", url) for url in urls.split(","))
