"""What TLS costs a gateway's socket: memory of a connection, CPU of a send and of a handshake, with and without.

    .venv/bin/python -m bench.tls [--devices 2000] [--rounds 50]

The server is aiohttp on uvloop with the gateway's own `Socket`; it and its devices are a process each, and with and
without TLS are two servers, one after the other, as memory that was freed is not asked of the system again. A frame has
400 bytes. Without the rest of a gateway: a delivery there costs some 80 µs more, a session 2 KB more.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import ssl
import sys
import tempfile
import time
from asyncio.subprocess import PIPE
from pathlib import Path
from typing import Any, Final

import trustme
import uvloop
from aiohttp import web

from bench.system import memory, raise_open_files
from tidings.gateway.meter import Limits
from tidings.gateway.socket import Socket, Turns
from tidings.runtime.tls import ServerTls
from tidings.wire.frames import SUBPROTOCOL

__all__: list[str] = []

_PAYLOAD: Final = b"x" * 396
_AT_ONCE: Final = 32
_UNLIMITED: Final = Limits(1e9, 10**9, 1e12, 10**12)
_REQUEST: Final = (
    "GET /v1/ws HTTP/1.1\r\nHost: localhost\r\nUpgrade: websocket\r\nConnection: Upgrade\r\n"
    "Sec-WebSocket-Version: 13\r\nSec-WebSocket-Key: dGhlIHNhbXBsZSBub25jZQ==\r\n"
    f"Sec-WebSocket-Protocol: {SUBPROTOCOL}\r\n\r\n"
).encode()


async def serve(folder: str, devices: int, rounds: int) -> None:
    """Take the devices, measure, send each round to all; the figures go to standard output as JSON."""
    tls = ServerTls(f"{folder}/server.pem", f"{folder}/server.key") if folder else None
    open_sockets: list[Socket] = []
    enough, turns = asyncio.Event(), Turns()

    async def handle(request: web.Request) -> web.StreamResponse:
        socket = Socket(65_536, 262_144, _UNLIMITED, turns)
        response = await socket.accept(request)
        open_sockets.append(socket)
        if len(open_sockets) == devices:
            enough.set()
        await socket.serve(lambda text: None)
        return response

    app = web.Application()
    app.router.add_get("/v1/ws", handle)
    runner = web.AppRunner(app, access_log=None)
    await runner.setup()
    await web.TCPSite(runner, "127.0.0.1", 0, backlog=4096, ssl_context=None if tls is None else tls.context).start()
    before, cpu = memory(os.getpid()).pss, time.process_time()
    print(runner.addresses[0][1], flush=True)
    await enough.wait()
    connect_us = (time.process_time() - cpu) / devices * 1e6
    await asyncio.sleep(1)
    idle_kb = (memory(os.getpid()).pss - before) / devices
    cpu = time.process_time()
    for _ in range(rounds):
        for at, socket in enumerate(open_sockets):
            socket.send(_PAYLOAD)
            if at % 100 == 99:
                await asyncio.sleep(0)
        await asyncio.sleep(0.05)
    send_us = (time.process_time() - cpu) / devices / rounds * 1e6
    busy_kb = (memory(os.getpid()).pss - before) / devices
    figures = {"connect_us": connect_us, "idle_kb": idle_kb, "send_us": send_us, "busy_kb": busy_kb}
    print(json.dumps(figures), flush=True)


class _Device(asyncio.Protocol):
    def __init__(self, shaken: asyncio.Future[None]) -> None:
        self._shaken = shaken

    def connection_made(self, transport: Any) -> None:
        transport.write(_REQUEST)

    def data_received(self, data: bytes) -> None:
        if not self._shaken.done():
            self._shaken.set_result(None)


async def connect(folder: str, port: int, devices: int) -> None:
    """Be the devices, until standard input ends."""
    loop = asyncio.get_running_loop()
    trust = ssl.create_default_context(cafile=f"{folder}/ca.pem") if folder else None
    places = asyncio.Semaphore(_AT_ONCE)
    kept = []

    async def one() -> None:
        async with places:
            shaken = loop.create_future()
            made = await loop.create_connection(
                lambda: _Device(shaken), "127.0.0.1", port, ssl=trust, server_hostname="localhost" if trust else None
            )
            await shaken
            kept.append(made)

    await asyncio.gather(*(one() for _ in range(devices)))
    await asyncio.to_thread(sys.stdin.read)


async def compare(devices: int, rounds: int) -> None:
    """Both halves, and their ratio, as a table."""
    with tempfile.TemporaryDirectory() as folder:
        _make_pair(Path(folder))
        plain, secured = [await _half(where, devices, rounds) for where in ("", folder)]
    print(f"{'':12}{'plain':>10}{'TLS':>10}{'ratio':>8}")
    for name, value in plain.items():
        print(f"{name:12}{value:10.1f}{secured[name]:10.1f}{secured[name] / value:8.2f}")


def _make_pair(folder: Path) -> None:
    authority = trustme.CA()
    pair = authority.issue_cert("localhost")
    authority.cert_pem.write_to_path(str(folder / "ca.pem"))
    (folder / "server.pem").write_bytes(pair.cert_chain_pems[0].bytes())
    (folder / "server.key").touch(mode=0o600)
    (folder / "server.key").write_bytes(pair.private_key_pem.bytes())


async def _half(folder: str, devices: int, rounds: int) -> dict[str, float]:
    command = (sys.executable, "-m", "bench.tls", "--devices", str(devices), "--rounds", str(rounds))
    server = await asyncio.create_subprocess_exec(*command, "--serve", folder, stdout=PIPE)
    assert server.stdout is not None
    port = (await server.stdout.readline()).decode().strip()
    client = await asyncio.create_subprocess_exec(*command, "--connect", folder, "--port", port, stdin=PIPE)
    figures: dict[str, float] = json.loads(await server.stdout.readline())
    server.kill()
    assert client.stdin is not None
    client.stdin.close()
    await asyncio.gather(server.wait(), client.wait())
    return figures


def main() -> None:
    """The command line; the two halves' processes are started with the hidden options."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--devices", type=int, default=2000)
    parser.add_argument("--rounds", type=int, default=50)
    for option in ("--serve", "--connect"):
        parser.add_argument(option, help=argparse.SUPPRESS)
    parser.add_argument("--port", type=int, help=argparse.SUPPRESS)
    args = parser.parse_args()
    raise_open_files()
    if args.serve is not None:
        uvloop.run(serve(args.serve, args.devices, args.rounds))
    elif args.connect is not None:
        uvloop.run(connect(args.connect, args.port, args.devices))
    else:
        asyncio.run(compare(args.devices, args.rounds))


if __name__ == "__main__":
    main()
