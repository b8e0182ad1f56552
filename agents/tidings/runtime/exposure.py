"""What a production start would leave without protection, and what the operator has said may be so.

Addresses of this machine alone are no exposure. Neither is what a proxy in front protects, but that is for the operator
to say: ``insecure=gateway``. A name in `insecure` allows exactly that, and is logged at each start.
"""

from __future__ import annotations

import logging
import re
from collections.abc import Iterator, Mapping
from typing import Final, NamedTuple
from urllib.parse import parse_qsl, urlsplit

from tidings.wire.errors import StartFailed

from .address import has_login, has_tls, is_loopback, servers
from .settings import Settings, listed

__all__ = ["DEV_KEY_PREFIX", "Exposure", "check_exposures", "exposures"]

DEV_KEY_PREFIX: Final = "dev-"
"""Secrets that `tidings dev` makes begin so: its page hands out tokens of them to everybody."""

_DOORS: Final[Mapping[str, str]] = {"gateway": "host", "api": "api_host"}
"""By agent: the setting with the address that it listens on."""
_FEWEST_CHARACTERS: Final = 8
"""Different ones in a secret; 32 random hexadecimal digits have fewer with a probability below 1e-6."""
_KNOWN: Final = re.compile(r"change.?me|example|secret|password|openssl rand", re.IGNORECASE)

log = logging.getLogger("tidings.runtime")


class Exposure(NamedTuple):
    """One thing without protection."""

    name: str
    """What `insecure` calls it."""
    text: str
    """A sentence that names the setting; without any password."""


def exposures(settings: Settings, *agents: str) -> list[Exposure]:
    """What these agents (``gateway``, ``inbox`` …; none for all) would leave without protection, allowed or not."""
    doors = [agent for agent in agents or _DOORS if agent in _DOORS]
    found = [exposure for agent in doors for exposure in _door(settings, agent)]
    found += _nats(settings)
    found += _cql(settings)
    if doors:
        found += _token_key(settings)
    return found


def check_exposures(settings: Settings, agent: str) -> None:
    """Raise `StartFailed` for an exposure that `insecure` does not name; warn of each that it does."""
    allowed = set(listed(settings.insecure))
    refused = []
    for exposure in exposures(settings, agent):
        if exposure.name in allowed:
            log.warning("insecure=%s allows it: %s", exposure.name, exposure.text)
        else:
            refused.append(exposure)
    if refused:
        names = ",".join([*sorted(allowed), *dict.fromkeys(exposure.name for exposure in refused)])
        raise StartFailed(
            f"{'. '.join(exposure.text for exposure in refused)}. Where something else protects it, say so: "
            f"insecure={names} (TIDINGS_INSECURE)"
        )


def _door(settings: Settings, agent: str) -> Iterator[Exposure]:
    name = _DOORS[agent]
    host: str = getattr(settings, name)
    if not settings.tls_certificate and not is_loopback(host):
        yield Exposure(
            agent,
            f"the {agent} listens on {host or 'every address'} ({name}) without TLS, and tokens would travel in the "
            "clear: set tls_certificate and tls_key",
        )


def _nats(settings: Settings) -> Iterator[Exposure]:
    remote = sorted(
        {host for url in servers(settings.nats_url) if not is_loopback(host := urlsplit(url).hostname or "")}
    )
    if not remote:
        return
    where = ", ".join(remote)
    if not (has_tls(settings.nats_url) or settings.nats_ca or settings.nats_certificate):
        yield Exposure(
            "nats",
            f"NATS at {where} (nats_url) is spoken to without TLS: write tls:// there, and set nats_ca to its CA",
        )
    if not (settings.nats_credentials or settings.nats_certificate or has_login(settings.nats_url)):
        yield Exposure(
            "nats-credentials",
            f"NATS at {where} (nats_url) asks nobody who he is: set nats_credentials, or nats_certificate and nats_key",
        )


def _cql(settings: Settings) -> Iterator[Exposure]:
    # `store.cql` reads the address in full, where its driver is installed.
    parts = urlsplit(settings.store_url)
    if parts.scheme != "cql" or dict(parse_qsl(parts.query)).get("tls") == "on":
        return
    hosts = parts.netloc.rpartition("@")[2].partition(":")[0].split(",")
    remote = [host for host in hosts if not is_loopback(host)]
    if remote:
        yield Exposure(
            "cql",
            f"the store at {', '.join(remote)} (store_url) is spoken to without TLS: add ?tls=on&ca=… to its address",
        )


def _token_key(settings: Settings) -> Iterator[Exposure]:
    for secret in listed(settings.token_key):
        if secret.startswith(DEV_KEY_PREFIX):
            why = "is that of a `tidings dev`, whose page gives tokens to everybody"
        elif len(set(secret)) < _FEWEST_CHARACTERS or _KNOWN.search(secret):
            why = "can be guessed"
        else:
            continue
        yield Exposure("token-key", f"token_key {why}: make one with `openssl rand -hex 32`")
