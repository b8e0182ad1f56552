"""Answers that are no refusals."""

from __future__ import annotations

from typing import Any

import orjson
from aiohttp import web

__all__ = ["answer", "json_bytes", "nothing"]


def answer(content: dict[str, Any], status: int = 200) -> web.Response:
    """A JSON object."""
    return json_bytes(orjson.dumps(content), status)


def json_bytes(body: bytes, status: int = 200) -> web.Response:
    """JSON that is written already."""
    return web.Response(body=body, status=status, content_type="application/json")


def nothing() -> web.Response:
    """Done, and nothing to say."""
    return web.Response(status=204)
