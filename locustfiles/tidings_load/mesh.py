"""The mesh under load: where it listens, and tokens for it."""

from __future__ import annotations

import argparse
import ssl
from functools import cache
from pathlib import Path
from typing import Final, NamedTuple, Self

from tidings.dev.state import read_key, running
from tidings.identity import issue, issue_service
from tidings.runtime.settings import Settings, listed
from tidings.wire.errors import StartFailed

__all__ = ["Mesh"]

_TTL_S: Final = 3600
"""Of a token: each connection gets a new one."""


class Mesh(NamedTuple):
    """Addresses and the secret. Made from options, else from the `tidings dev` that runs on a state folder."""

    gateway: str
    api: str
    nats: str
    nats_ca: str
    page: str
    """Of `tidings dev`, which gathers crowds; empty for any other mesh."""
    ca: str
    """What certificates are checked against; empty for the system's authorities."""
    key: str
    issuer: str
    audience: str

    @classmethod
    def find(cls, options: argparse.Namespace) -> Self:
        """Raises `StartFailed` or `BadSettings`, which say what to give."""
        if not options.gateway:
            state = Path(options.state)
            found = running(state)
            if found is None:
                raise StartFailed(
                    f"no `tidings dev` runs on {state}: start it (`make dev`), name its folder with --state, or give "
                    "the addresses of another mesh with --gateway, --api and --nats"
                )
            urls = (found.ws_url, found.api_url, found.nats_url, found.ca, found.http_url)
            return cls(*urls, found.ca, read_key(state), "", "")
        settings = Settings.load()
        if not settings.token_key:
            raise StartFailed("set TIDINGS_TOKEN_KEY: devices of the load sign their own tokens with the mesh's secret")
        audience = next(iter(listed(settings.token_audience)), "")
        nats = options.nats or settings.nats_url
        urls = (options.gateway, options.api, nats, settings.nats_ca, "")
        return cls(*urls, options.ca, settings.token_key, settings.token_issuer, audience)

    def token(self, user: str, device: str) -> str:
        return issue(self.key, user, device, _TTL_S, issuer=self.issuer, audience=self.audience)

    def service_token(self, name: str) -> str:
        """For publishing to users, and to topics under ``load``."""
        scope = "publish:user publish:topic:load.>"
        return issue_service(self.key, name, scope, _TTL_S, issuer=self.issuer, audience=self.audience)

    def tls(self) -> ssl.SSLContext:
        return _context(self.ca)


@cache
def _context(ca: str) -> ssl.SSLContext:
    """One for all devices: reading the system's authorities takes longer than connecting."""
    return ssl.create_default_context(cafile=ca or None)
