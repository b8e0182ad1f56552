"""A python-socketio server as its documentation shows it, with Redis between its processes: ``PORT REDIS_URL``."""

from __future__ import annotations

import sys
from typing import Any

import orjson
import socketio  # type: ignore[import-not-found,unused-ignore]
import uvloop
from aiohttp import web


def application(redis_url: str) -> web.Application:
    """A device joins the room that it names; ``POST /api/batch`` emits to rooms."""
    server = socketio.AsyncServer(
        async_mode="aiohttp", transports=["websocket"], client_manager=socketio.AsyncRedisManager(redis_url)
    )

    @server.event  # type: ignore[untyped-decorator,unused-ignore]
    async def connect(sid: str, environ: dict[str, Any], auth: dict[str, Any]) -> None:
        del environ
        await server.enter_room(sid, auth["room"])

    async def batch(request: web.Request) -> web.Response:
        for command in orjson.loads(await request.read())["commands"]:
            await server.emit("n", command["publish"]["data"], room=command["publish"]["channel"])
        return web.json_response({})

    made = web.Application(client_max_size=2**24)
    made.router.add_post("/api/batch", batch)
    server.attach(made)
    return made


if __name__ == "__main__":
    uvloop.install()
    web.run_app(
        application(sys.argv[2]),
        host="127.0.0.1",
        port=int(sys.argv[1]),
        backlog=4096,
        access_log=None,
        shutdown_timeout=1,
    )
