"""The contract, OpenAPI 3.1 of ``schemas/openapi.json``: as it is, and as a page to read.

The page is made here, of the contract and nothing else: no script, no address of anybody else's, and every text of it
escaped. A browser is told to hold it to that.
"""

from __future__ import annotations

import hashlib
from base64 import b64encode
from html import escape
from importlib import resources
from pathlib import Path
from typing import Any, Final

import orjson
from aiohttp import web

from .answers import json_bytes

__all__ = ["Contract", "page_of", "read"]

_METHODS: Final = ("get", "post", "delete")
_STYLE: Final = """
:root { color-scheme: light dark; font: 16px/1.5 system-ui, sans-serif }
body { max-width: 56rem; margin: 2rem auto; padding: 0 1rem }
code, pre { font: 0.875rem/1.5 ui-monospace, monospace }
pre { overflow-x: auto; padding: 0.75rem; border: 1px solid #8884; border-radius: 6px }
h2 { margin-top: 2.5rem; border-top: 1px solid #8884; padding-top: 1rem; font-size: 1.1rem }
h2 b { display: inline-block; min-width: 4rem }
table { border-collapse: collapse; width: 100% }
td, th { text-align: left; vertical-align: top; padding: 0.25rem 0.75rem 0.25rem 0 }
"""
_STYLE_HASH: Final = b64encode(hashlib.sha256(_STYLE.encode()).digest()).decode()
_HEADERS: Final = {
    "Content-Security-Policy": f"default-src 'none'; style-src 'sha256-{_STYLE_HASH}'; base-uri 'none'; "
    "form-action 'none'; frame-ancestors 'none'",
    "Referrer-Policy": "no-referrer",
}


def read() -> bytes:
    """The contract, out of the wheel or the checkout."""
    packaged = resources.files("tidings.api") / "openapi.json"
    if packaged.is_file():
        return packaged.read_bytes()
    return (Path(__file__).parents[3] / "schemas" / "openapi.json").read_bytes()


class Contract:
    """The handlers; both answers are made once."""

    def __init__(self) -> None:
        self._json = read()
        self._page = page_of(orjson.loads(self._json)).encode()

    async def document(self, request: web.Request) -> web.Response:
        """The contract itself."""
        return json_bytes(self._json)

    async def page(self, request: web.Request) -> web.Response:
        """The contract, to read."""
        return web.Response(body=self._page, content_type="text/html", charset="utf-8", headers=_HEADERS)


def page_of(contract: dict[str, Any]) -> str:
    """A contract as HTML."""
    info = contract["info"]
    operations = [
        _operation(contract, method, path, item[method])
        for path, item in contract["paths"].items()
        for method in _METHODS
        if method in item
    ]
    return "\n".join(
        (
            f'<!doctype html><html lang="en"><head><meta charset="utf-8"><title>{escape(info["title"])}</title>',
            '<meta name="viewport" content="width=device-width, initial-scale=1">',
            f"<style>{_STYLE}</style></head><body><h1>{escape(info['title'])}</h1>",
            _paragraphs(info["description"]),
            '<p>As a document for tools: <a href="openapi.json">openapi.json</a></p>',
            *operations,
            "<h2>Shapes</h2>",
            *(_shape(name, shape) for name, shape in contract["components"]["schemas"].items()),
            "</body></html>",
        )
    )


def _operation(contract: dict[str, Any], method: str, path: str, operation: dict[str, Any]) -> str:
    parts = [
        f"<h2><b>{method.upper()}</b> <code>{escape(path)}</code></h2>",
        f"<p>{escape(operation['summary'])}</p>",
        _paragraphs(operation.get("description", "")),
    ]
    parameters = [_resolved(contract, one) for one in operation.get("parameters", ())]
    if parameters:
        rows = (
            f"<tr><td><code>{escape(one['name'])}</code></td><td>{escape(one['in'])}</td>"
            f"<td>{escape(one.get('description', ''))}</td></tr>"
            for one in parameters
        )
        parts.append(f"<table>{''.join(rows)}</table>")
    body = operation.get("requestBody")
    if body is not None:
        examples = body["content"]["application/json"]["examples"].values()
        parts += [f"<pre>{_pretty(example['value'])}</pre>" for example in examples]
    answers = (
        f"<tr><td><code>{escape(status)}</code></td><td>{escape(_resolved(contract, one)['description'])}</td></tr>"
        for status, one in operation["responses"].items()
    )
    parts.append(f"<table>{''.join(answers)}</table>")
    return "\n".join(parts)


def _shape(name: str, shape: dict[str, Any]) -> str:
    return f"<details><summary><code>{escape(name)}</code></summary><pre>{_pretty(shape)}</pre></details>"


def _pretty(value: Any) -> str:
    return escape(orjson.dumps(value, option=orjson.OPT_INDENT_2).decode())


def _paragraphs(text: str) -> str:
    return "\n".join(f"<p>{escape(part)}</p>" for part in text.split("\n\n") if part)


def _resolved(contract: dict[str, Any], value: dict[str, Any]) -> dict[str, Any]:
    """What a reference into the contract means."""
    where = value.get("$ref")
    if where is None:
        return value
    found: Any = contract
    for step in where.removeprefix("#/").split("/"):
        found = found[step]
    return found  # type: ignore[no-any-return]
