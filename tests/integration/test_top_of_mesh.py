"""`tidings top` of real agents."""

from __future__ import annotations

import asyncio
import re
import sys
from pathlib import Path

import pytest

from support.clock import PATIENCE_S
from support.mesh import Agent, running_mesh


async def top(*arguments: str) -> tuple[int | None, str, str]:
    process = await asyncio.create_subprocess_exec(
        *(sys.executable, "-m", "tidings", "top", *arguments),
        stdout=asyncio.subprocess.PIPE,
        stderr=asyncio.subprocess.PIPE,
        env={"COLUMNS": "200"},
    )
    async with asyncio.timeout(PATIENCE_S):
        out, err = await process.communicate()
    return process.returncode, out.decode(), err.decode()


async def metrics_of(agent: Agent) -> str:
    return (await agent.said(r"metrics are at (\S+)/metrics"))[1]


async def test_a_mesh_at_work(tmp_path: Path) -> None:
    """Sessions, rates and who does not answer are of the mesh as it is."""
    async with running_mesh(tmp_path, telemetry="on", metrics_port=0) as mesh:
        gateway, inbox = await mesh.gateway(), await mesh.inbox()
        phone = await mesh.online(gateway, "alice")
        urls = [await metrics_of(agent) for agent in (gateway, inbox)]
        looking = asyncio.ensure_future(top("--once", "--every", "3", *urls, "127.0.0.1:1"))
        while not looking.done():
            await phone.expect(*await mesh.publish("alice"))
            await asyncio.sleep(0.05)
        status, said, errors = looking.result()
        assert (status, errors) == (0, "")
        assert "2 of 3 agents answer" in said
        assert re.search(r"sessions +0 starting, 1 live, 0 lingering", said)
        (line,) = (line for line in said.splitlines() if line.startswith(urls[0]))
        assert line.split()[1:3] == ["gateway", "1"]
        assert float(line.split()[3].replace(",", "")) > 0
        assert re.search(r"inbox +[\d.,]*[1-9]", said)
        assert "127.0.0.1:1 " in said
        await inbox.stop()
        await gateway.stop()


@pytest.mark.parametrize(
    ("arguments", "status", "words"),
    [
        (["--every", "0"], 2, "is no pause"),
        (["ftp://x"], 1, "is no address of metrics"),
        (["--once", "--every", "0.2", "127.0.0.1:1"], 1, ""),
    ],
)
async def test_bad_input(arguments: list[str], status: int, words: str) -> None:
    done, _, errors = await top(*arguments)
    assert done == status
    assert words in errors
