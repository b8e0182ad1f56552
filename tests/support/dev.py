"""`tidings dev` as a test runs it: on free ports, in a folder of its own."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import aiohttp

from .clock import PATIENCE_S
from .command import Command, answer, tidings
from .device import Device

ANY = ("--port", "0", "--api-port", "0", "--nats-port", "0")
"""Free ports, whatever they are."""


class Dev:
    """A running `tidings dev`."""

    def __init__(self, command: Command, state: Path, http: aiohttp.ClientSession) -> None:
        self.command = command
        self.state = state
        self.http = http
        self.url = ""
        self.nats = ""
        self.api = ""

    async def read_greeting(self) -> None:
        self.url = (await self.command.said(r"Page +(https?://\S+)/$"))[1]
        self.api = (await self.command.said(r"HTTP api +(https?://\S+)/v1/docs$"))[1]
        self.nats = (await self.command.said(r"NATS +((?:nats|tls)://\S+)$"))[1]
        await self.command.said("Ctrl-C")

    @property
    def nats_pid(self) -> int:
        return int((self.state / "nats" / "nats.pid").read_text())

    async def post(self, what: str, body: Any, **headers: str) -> tuple[int, dict[str, Any]]:
        data = body if isinstance(body, bytes) else json.dumps(body).encode()
        async with self.http.post(
            f"{self.url}/dev/{what}", data=data, headers={"Content-Type": "application/json", **headers}
        ) as response:
            return response.status, await response.json()

    async def publish(self, user: str, id: str) -> None:
        status, said = await self.post("publish", {"user": user, "type": "test.made", "data": {"id": id}, "id": id})
        assert status == 200, said

    @asynccontextmanager
    async def device(self, user: str, name: str = "phone") -> AsyncIterator[Device]:
        _, said = await self.post("token", {"user": user, "device": name})
        async with Device(f"{self.url}/v1/ws", said["token"], device=name) as device:
            assert device.welcome.get("t") == "welcome", device.welcome
            yield device


@asynccontextmanager
async def dev(state: Path, *arguments: str, **environment: str) -> AsyncIterator[Dev]:
    """A mesh that is ready, on free ports."""
    async with tidings("dev", *ANY, "--state", state, *arguments, **environment) as command:
        async with aiohttp.ClientSession() as http:
            mesh = Dev(command, state, http)
            await mesh.read_greeting()
            yield mesh
        assert await command.stop() == 0, command.lines


async def refusal(state: Path, *arguments: str, **environment: str) -> str:
    """The sentence of a mesh that does not start."""
    ran = await answer("dev", *ANY, "--state", state, *arguments, **environment)
    assert ran.process.returncode == 1
    assert not any("Page" in line for line in ran.out)
    return ran.sentence()


async def in_inbox(device: Device, *ids: str) -> None:
    """Wait until the user's inbox has exactly these, newest first."""
    found: list[str] = []
    async with asyncio.timeout(PATIENCE_S):
        while found != list(ids):
            # Not as fast as it can: a user may ask for so many pages a second and no more.
            await asyncio.sleep(0.1)
            found = [item["n"]["id"] for item in (await device.ask("inbox", limit=len(ids) + 1))["items"]]
