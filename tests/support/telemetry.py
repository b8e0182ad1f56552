"""A mesh whose agents have telemetry on."""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

from .api import client, service
from .collector import Collector, Scrape, collecting, scrape
from .mesh import Agent, Mesh, running_mesh


class Watched:
    """A mesh with telemetry, one agent of each kind, and the collector of what they send."""

    def __init__(self, mesh: Mesh, collector: Collector) -> None:
        self.mesh = mesh
        self.collector = collector
        self.agents: dict[str, Agent] = {}

    async def start(self) -> None:
        mesh = self.mesh
        self.agents["inbox"] = await mesh.inbox()
        self.agents["fanout"] = await mesh.fanout()
        self.agents["gateway"] = await mesh.gateway()
        self.agents["api"] = await mesh.api()

    async def scraped(self) -> dict[str, Scrape]:
        return {name: await scrape(agent) for name, agent in self.agents.items()}

    async def post(self, body: dict[str, Any], **headers: str) -> None:
        """Publish over HTTP."""
        async with client(self.agents["api"].port) as http:
            answer = await http.post("/v1/publish", json=body, headers={**service(), **headers})
        assert answer.status_code == 200, answer.text


@asynccontextmanager
async def watched(folder: Path, **settings: Any) -> AsyncIterator[Watched]:
    async with collecting() as collector:
        telemetry = {
            "telemetry": "on",
            "metrics_port": 0,
            "otlp_endpoint": collector.url,
            "otlp_interval_s": 0.2,
            "trace_sample_ratio": 1,
            "log_format": "json",
            "log_level": "debug",
        }
        async with running_mesh(folder, **{**telemetry, **settings}) as mesh:
            found = Watched(mesh, collector)
            await found.start()
            yield found
