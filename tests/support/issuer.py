"""An identity provider: it signs tokens with keys of its own, and serves their public halves as a JWK Set."""

from __future__ import annotations

import asyncio
import json
import time
from types import TracebackType
from typing import Any, Self

import jwt
from aiohttp import web
from cryptography.hazmat.primitives.asymmetric import ec
from jwt.algorithms import ECAlgorithm


class Issuer:
    """Has the key ``first``; `rotate` makes another. `broken` is answered instead of its keys, `held` holds it back."""

    def __init__(self) -> None:
        self.reads = 0
        """How often its keys were asked for."""
        self.broken: web.Response | None = None
        self.held: asyncio.Event | None = None
        self.asked = asyncio.Event()
        """Somebody asks now."""
        self.url = ""
        self._keys: dict[str, ec.EllipticCurvePrivateKey] = {}
        self._runner: web.AppRunner | None = None
        self._port = 0
        self.rotate("first")

    def rotate(self, kid: str) -> None:
        """Sign with this key alone from now on."""
        self._keys = {kid: ec.generate_private_key(ec.SECP256R1())}

    def token(self, user: str, *, ttl_s: int = 3600, kid: str | None = None, **claims: Any) -> str:
        """A token, signed with the newest key, whatever it calls that."""
        (name, key), now = next(iter(self._keys.items())), int(time.time())
        content = {"sub": user, "iat": now, "exp": now + ttl_s, **claims}
        return jwt.encode(content, key, algorithm="ES256", headers={"kid": kid or name})

    async def start(self) -> None:
        app = web.Application()
        app.router.add_get("/keys", self._serve)
        self._runner = web.AppRunner(app, shutdown_timeout=0.1)
        await self._runner.setup()
        site = web.TCPSite(self._runner, "127.0.0.1", self._port)
        await site.start()
        self._port = self._runner.addresses[0][1]
        self.url = f"http://127.0.0.1:{self._port}/keys"

    async def stop(self) -> None:
        """Nobody listens there, until `start`."""
        if self._runner is not None:
            await self._runner.cleanup()
            self._runner = None

    async def _serve(self, request: web.Request) -> web.Response:
        self.reads += 1
        self.asked.set()
        if self.held is not None:
            await self.held.wait()
        if self.broken is not None:
            return web.Response(status=self.broken.status, body=self.broken.body, headers=self.broken.headers)
        keys = [{**json.loads(ECAlgorithm.to_jwk(key.public_key())), "kid": kid} for kid, key in self._keys.items()]
        return web.json_response({"keys": keys})

    async def __aenter__(self) -> Self:
        await self.start()
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self.held is not None:
            self.held.set()
        await self.stop()
