"""The contract of the HTTP api: sound, complete, and kept by a real agent on a real log and store."""

from __future__ import annotations

import asyncio
import os
import re
import sys
from html.parser import HTMLParser
from pathlib import Path
from unittest.mock import Mock

import orjson
from openapi_spec_validator import OpenAPIV31SpecValidator, validate

from support.api import api, service
from support.mesh import Mesh
from tidings.api.app import routes
from tidings.api.contract import page_of, read
from tidings.stream import consumers
from tidings.wire import codes
from tidings.wire.notification import build

SUPPORT = Path(__file__).parents[1] / "support"
EXAMPLES = 5
"""Of each operation, beside those that cover every boundary of its schema."""
PLENTY = 10_000_000
LETTERS = 20
LOADS = ("href", "src", "style")


def test_document_is_sound() -> None:
    """`schemas/openapi.json` is OpenAPI 3.1, and says so."""
    document = orjson.loads(read())
    validate(document, cls=OpenAPIV31SpecValidator)
    assert document["openapi"].startswith("3.1")


def test_document_has_every_route() -> None:
    """What the agent answers is what the document describes, no more and no less."""
    document = orjson.loads(read())
    described = {
        (method.upper(), path) for path, item in document["paths"].items() for method in item if method != "parameters"
    }
    open_to_all = {("GET", path) for path in ("/healthz", "/readyz", "/v1/openapi.json", "/v1/docs")}
    assert {(one.method, one.path) for one in routes(Mock(), Mock())} | open_to_all == described


async def test_agent_keeps_it(mesh: Mesh) -> None:
    """Schemathesis finds no request, well-formed or not, whose answer is not what the document says."""
    for number in range(LETTERS):
        _, body = build(type="test.made", id=f"letter-{number}")
        await consumers.bury(
            mesh.connection, "user", body, key=str(number), reason="undelivered", detail="for a test", user="alice"
        )
    agent = await mesh.api(
        api_requests_per_minute=PLENTY, api_user_requests_per_minute=PLENTY, api_notifications_per_minute=PLENTY
    )
    process = await asyncio.create_subprocess_exec(
        str(Path(sys.executable).with_name("schemathesis")),
        "--config-file",
        str(SUPPORT / "schemathesis.toml"),
        "run",
        f"http://127.0.0.1:{agent.port}/v1/openapi.json",
        "--header",
        f"Authorization: {service()['Authorization']}",
        "--phases",
        "examples,coverage,fuzzing",
        "--max-examples",
        str(EXAMPLES),
        "--seed",
        "1",
        "--no-color",
        env={**os.environ, "SCHEMATHESIS_HOOKS": "support.contract_hooks", "PYTHONPATH": str(SUPPORT.parent)},
        cwd=mesh.folder,
        stdout=asyncio.subprocess.PIPE,
        stderr=asyncio.subprocess.STDOUT,
    )
    try:
        output, _ = await process.communicate()
    finally:
        if process.returncode is None:
            process.kill()
            await process.wait()
    assert process.returncode == 0, output.decode()[-8000:]
    tested = re.search(r"(\d+) generated", output.decode())
    assert tested is not None
    assert int(tested[1]) > 500
    assert not [line for line in agent.output if "a request failed" in line]


class Outline(HTMLParser):
    """What a page would load or run."""

    def __init__(self) -> None:
        super().__init__()
        self.tags: list[str] = []
        self.links: list[str] = []

    def handle_starttag(self, tag: str, attributes: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self.links += [
            value or "" for name, value in attributes if name in ("href", "src", "style") or name[:2] == "on"
        ]


async def test_page(mesh: Mesh) -> None:
    """The page shows every operation, loads nothing, runs nothing, and a browser is told so."""
    async with api(mesh) as http:
        page = await http.get("/v1/docs")
        assert (await http.get("/v1/openapi.json")).content == read()
    outline = Outline()
    outline.feed(page.text)
    assert outline.links == ["openapi.json"]
    assert not {"script", "link", "img", "iframe", "form"} & set(outline.tags)
    assert page.text.count("<h2><b>") == sum(
        method != "parameters" for item in orjson.loads(read())["paths"].values() for method in item
    )
    assert "default-src 'none'" in page.headers["Content-Security-Policy"]


def test_page_escapes() -> None:
    """A text of the contract is text on the page, whatever it looks like."""
    document = orjson.loads(read())
    document["paths"]["/v1/publish"]["post"]["summary"] = "<script>alert(1)</script>"
    document["components"]["schemas"]["User"]["description"] = "<img src=x onerror=alert(1)>"
    outline = Outline()
    outline.feed(page_of(document))
    assert not {"script", "img"} & set(outline.tags)


def test_every_refusal_has_a_status_that_is_described() -> None:
    """Each code of the catalogue comes with a status that some operation describes."""
    document = orjson.loads(read())
    described = {
        int(status)
        for item in document["paths"].values()
        for method, operation in item.items()
        if method != "parameters"
        for status in operation["responses"]
    }
    # What no operation answers: an address that is none of them, in another way than they are asked.
    assert {problem.status for problem in codes.PROBLEMS} - described == {405}
