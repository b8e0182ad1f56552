"""The load tests for operators, run as one runs them: a short one that is good, and those that must fail.

Nothing here is timed: latencies of a shared machine prove nothing.
"""

from __future__ import annotations

import asyncio
import os
import re
import socket
import sys
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Final

import aiohttp
import orjson
import pytest
import pytest_asyncio
from aiohttp import WSMsgType, web

from support.dev import Dev, dev
from tidings.dev.state import read_key
from tidings.wire.frames import SUBPROTOCOL

FILES: Final = Path(__file__).parents[2] / "locustfiles"
PATIENCE_S: Final = 180


class Run:
    """A Locust that has ended."""

    def __init__(self, status: int, text: str) -> None:
        self.status = status
        self.text = text

    @property
    def ledger(self) -> dict[str, int]:
        """Its last line of counts."""
        found = re.findall(r"ledger: (published .*)", self.text)
        assert found, self.text
        return {name: int(count) for name, count in (pair.split() for pair in found[-1].split(", "))}

    def requests(self, row: str) -> int:
        """The number of requests of a row of its statistics."""
        found = re.search(rf"^{row} +(\d+) ", self.text, re.MULTILINE)
        return int(found[1]) if found else 0


@asynccontextmanager
async def process(*arguments: str | Path, **environment: str) -> AsyncIterator[asyncio.subprocess.Process]:
    """A Locust; nothing of it is left at the end of the block."""
    inherited = {name: value for name, value in os.environ.items() if not name.startswith(("TIDINGS_", "LOCUST_"))}
    started = await asyncio.create_subprocess_exec(
        *(sys.executable, "-m", "locust", *map(str, arguments)),
        stdin=asyncio.subprocess.DEVNULL,
        stdout=asyncio.subprocess.PIPE,
        stderr=asyncio.subprocess.STDOUT,
        env={**inherited, **environment},
    )
    try:
        yield started
    finally:
        if started.returncode is None:
            started.kill()
        await started.communicate()


async def locust(*arguments: str | Path, **environment: str) -> Run:
    """A headless run, to its end."""
    async with process("--headless", "--only-summary", *arguments, **environment) as started:
        async with asyncio.timeout(PATIENCE_S):
            out, _ = await started.communicate()
        assert started.returncode is not None
        return Run(started.returncode, out.decode(errors="replace"))


def free_port() -> str:
    with socket.create_server(("127.0.0.1", 0)) as free:
        return str(free.getsockname()[1])


def scenario(*names: str) -> tuple[str, str]:
    return "-f", ",".join(str(FILES / f"{name}.py") for name in names)


@pytest_asyncio.fixture(loop_scope="module", scope="module")
async def mesh(tmp_path_factory: pytest.TempPathFactory) -> AsyncIterator[Dev]:
    """A `tidings dev` of the module's own."""
    async with dev(tmp_path_factory.mktemp("load") / "state") as running:
        yield running


pytestmark = pytest.mark.asyncio(loop_scope="module")


def check_good(run: Run) -> None:
    assert run.status == 0, run.text
    counts = run.ledger
    assert counts["owed"] == counts["received"] > 0, run.text
    assert counts["published"] > 0
    assert "Traceback" not in run.text, run.text


async def test_the_everyday_mix_loses_nothing(mesh: Dev) -> None:
    """Devices come and go under publishers of both kinds; each delivery is an event with its latency."""
    quick = ("-u", "24", "-r", "24", "-t", "8s", "--online", "2", "--offline", "1")
    run = await locust(*scenario("everyday"), "--state", mesh.state, *quick)
    check_good(run)
    rows = ("NATS +publish", "POST +/v1/publish", "DELIVER +user", "DELIVER +topic", "CONNECT +first", "CONNECT +again")
    assert all(map(run.requests, rows)), run.text


async def test_storms_on_several_workers_are_one_ledger(mesh: Dev) -> None:
    """Two processes, whose devices follow the same topics and lose their connections together."""
    port = free_port()
    workers = ("--processes", "2", "--master-bind-port", port, "--master-port", port)
    many = ("-u", "27", "-r", "27", "-t", "8s", "--storm-every", "3")
    run = await locust(*scenario("storm"), "--state", mesh.state, *many, *workers)
    check_good(run)
    assert run.requests("CONNECT +again"), run.text


async def test_a_worker_that_is_killed_fails_the_run(mesh: Dev) -> None:
    """Nobody knows what its devices were owed. The other one's are counted."""
    port = free_port()
    worker = (*scenario("everyday"), "--worker", "--master-port", port)
    many = ("-u", "48", "-r", "48", "-t", "8s", "--expect-workers", "2", "--master-bind-port", port)
    async with process(*worker), process(*worker, "--loglevel", "DEBUG") as killed:
        running = asyncio.create_task(locust(*scenario("everyday"), "--state", mesh.state, "--master", *many))
        assert killed.stdout is not None
        async with asyncio.timeout(PATIENCE_S):
            while b"users spawned" not in await killed.stdout.readline():
                assert not running.done()
        killed.kill()
        run = await running
    assert run.status == 1, run.text
    assert "ledger: 1 workers did not report" in run.text
    assert run.ledger["owed"] == run.ledger["received"] > 0


async def test_a_celebritys_posts_are_broadcasts(mesh: Dev) -> None:
    """With a crowd beside the devices; under a shape, in which devices are stopped and are owed what comes."""
    options = ("-u", "20", "-t", "8s", "--crowd", "1500")
    run = await locust(*scenario("celebrity", "spike"), "--state", mesh.state, *options)
    check_good(run)
    assert run.requests("DELIVER +broadcast"), run.text


@asynccontextmanager
async def losing_gateway(target: str) -> AsyncIterator[str]:
    """Between devices and gateway: acknowledges some deliveries itself, and hands them to nobody."""
    count = 0

    async def accept(request: web.Request) -> web.WebSocketResponse:
        down = web.WebSocketResponse(protocols=(SUBPROTOCOL,))
        await down.prepare(request)
        async with aiohttp.ClientSession() as http, http.ws_connect(target, protocols=(SUBPROTOCOL,)) as up:

            async def upwards() -> None:
                async for message in down:
                    await up.send_str(message.data)
                await up.close()

            back = asyncio.create_task(upwards())
            try:
                await downwards(down, up)
            finally:
                back.cancel()
        return down

    async def downwards(down: web.WebSocketResponse, up: aiohttp.ClientWebSocketResponse) -> None:
        nonlocal count
        async for message in up:
            frame = orjson.loads(message.data) if message.type is WSMsgType.TEXT else {}
            count += frame.get("t") == "n"
            if frame.get("t") == "n" and count % 10 == 0:
                await up.send_json({"t": "ack", "pos": [item["pos"] for item in frame["items"]]})
            elif not down.closed:
                await down.send_str(message.data)
        await down.close(code=up.close_code or 1006)

    app = web.Application()
    app.router.add_get("/v1/ws", accept)
    runner = web.AppRunner(app, shutdown_timeout=1)
    await runner.setup()
    try:
        site = web.TCPSite(runner, "127.0.0.1", 0)
        await site.start()
        yield f"ws://127.0.0.1:{runner.addresses[0][1]}/v1/ws"
    finally:
        await runner.cleanup()


async def test_a_mesh_that_loses_fails_the_run(mesh: Dev) -> None:
    """What was acknowledged and reached no device is missing, whatever Locust is told about other failures.

    A soak says so before its end.
    """
    options = ("-u", "12", "-r", "12", "-t", "6s", "--settle", "2", "--rate", "5", "--overdue", "1")
    async with losing_gateway(f"ws{mesh.url.removeprefix('http')}/v1/ws") as gateway:
        elsewhere = ("--gateway", gateway, "--api", mesh.api, "--nats", mesh.nats)
        run = await locust(
            *scenario("soak"), *elsewhere, *options, "--exit-code-on-error", "0", TIDINGS_TOKEN_KEY=read_key(mesh.state)
        )
    assert run.status == 1, run.text
    assert run.ledger["owed"] > run.ledger["received"] > 0
    assert re.search(r"LEDGER verdict: .*\d+ deliveries missing", run.text), run.text
    assert "did not come to load-" in run.text
    assert run.requests("LEDGER +overdue"), run.text


async def test_a_run_that_publishes_nothing_fails(mesh: Dev) -> None:
    """It has shown nothing."""
    run = await locust(*scenario("everyday"), "Devices", "--state", mesh.state, "-u", "2", "-r", "2", "-t", "2s")
    assert run.status == 1, run.text
    assert "nothing was published to a device" in run.text


async def test_a_latency_above_the_limit_fails(mesh: Dev) -> None:
    """Any delivery takes longer than a thousandth of a millisecond."""
    options = ("-u", "12", "-r", "12", "-t", "3s", "--max-p99-ms", "0.001")
    run = await locust(*scenario("everyday"), "--state", mesh.state, *options)
    assert run.status == 1, run.text
    assert re.search(r"p99 of user deliveries is \S+ ms, more than 0.001", run.text), run.text


async def test_without_a_mesh_it_says_what_to_do(tmp_path: Path) -> None:
    """One sentence, no traceback."""
    run = await locust(*scenario("everyday"), "--state", tmp_path / "none", "-u", "12", "-t", "2s")
    assert run.status == 1
    assert "no `tidings dev` runs on" in run.text
    assert "Traceback" not in run.text
