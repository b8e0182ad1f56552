"""From ``cql://[user:password@]host[,host…][:port]/keyspace[?option=…&…]`` to a `Where`.

| option | |
|---|---|
| ``datacenter`` | the datacenter of these agents |
| ``timeout_s`` | how long a request may take |
| ``tls=on`` | speak TLS, and check that each node's certificate is for the address that it is asked at |
| ``ca`` | path of the CA certificates (PEM) that the nodes are checked against; without it the system's |
| ``certificate``, ``key`` | paths of ours, for nodes that ask for one |
| ``name`` | what all nodes' certificates are for, where they have no addresses: the driver asks nodes at addresses |
"""

from __future__ import annotations

import re
from typing import Final
from urllib.parse import parse_qsl, unquote, urlsplit

from tidings.wire.errors import BadSettings

from .database import Tls, Where

__all__ = ["parse_url"]

_KEYSPACE: Final = re.compile(r"[a-z][a-z0-9_]{0,47}")
_FORM: Final = "cql://[user:password@]host[,host...][:9042]/keyspace[?datacenter=dc1&timeout_s=2&tls=on&ca=/etc/ca.pem]"


def parse_url(url: str) -> Where:
    """Raises `BadSettings` with what is wrong; a password is never in the message."""
    try:
        parts = urlsplit(url)
    except ValueError:
        raise BadSettings(f"store_url is no CQL address: it cannot be read. Write it as {_FORM}") from None
    credentials, _, hosts_text = parts.netloc.rpartition("@")
    username, _, password = credentials.partition(":")
    hosts_text, _, port = hosts_text.partition(":")
    hosts = [host for host in hosts_text.split(",") if host]
    keyspace = parts.path.removeprefix("/")
    options = dict(parse_qsl(parts.query, keep_blank_values=True))
    datacenter, timeout = options.pop("datacenter", None), options.pop("timeout_s", "2")
    tls_options = {name: options.pop(name) for name in ("ca", "certificate", "key", "name") if options.get(name)}
    tls = options.pop("tls", "off")
    wrong = None
    if "@" in parts.path + parts.query + parts.fragment:
        wrong = "in a user and a password / is %2F, ? is %3F, # is %23 and @ is %40"
    elif not hosts:
        wrong = "it names no host"
    elif not _KEYSPACE.fullmatch(keyspace):
        wrong = f"its keyspace is {keyspace!r}; use a-z, 0-9 and _, beginning with a letter"
    elif port and not (port.isdecimal() and 0 < int(port) < 65_536):
        wrong = "its port is no number from 1 to 65535"
    elif options or parts.fragment:
        wrong = f"it knows no option {next(iter(options), '#' + parts.fragment)!r}"
    elif not re.fullmatch(r"\d+(\.\d+)?", timeout) or not 0.05 <= float(timeout) <= 60:
        wrong = f"its timeout_s is {timeout!r}; use a number from 0.05 to 60"
    elif tls not in ("on", "off"):
        wrong = f"its tls is {tls!r}; use on or off"
    elif tls_options and tls == "off":
        wrong = f"its {next(iter(tls_options))} is for TLS: add tls=on"
    elif ("certificate" in tls_options) != ("key" in tls_options):
        wrong = "its certificate and key belong together: give both or neither"
    if wrong:
        raise BadSettings(f"store_url is no CQL address: {wrong}. Write it as {_FORM}")
    return Where(
        hosts,
        int(port or 9042),
        keyspace,
        unquote(username) or None,
        unquote(password) or None,
        datacenter or None,
        float(timeout),
        tls=Tls(**tls_options) if tls == "on" else None,
    )
