"""Fixtures of every suite that needs a mesh."""

from __future__ import annotations

from collections.abc import AsyncIterator
from pathlib import Path

import pytest

from support.mesh import Mesh, running_mesh


@pytest.fixture
async def mesh(tmp_path: Path) -> AsyncIterator[Mesh]:
    """nats-server, topology and store; the test starts the agents that it needs."""
    async with running_mesh(tmp_path) as running:
        yield running
