"""What `docs/api.md` tells people to type works on a `tidings dev`."""

from __future__ import annotations

import re
import shlex
from pathlib import Path

import httpx

from support.api import client
from support.command import answer
from support.dev import Dev, dev

PAGE = Path(__file__).parents[2] / "docs" / "api.md"
OPTIONS_WITH_VALUE = {"-H", "-X", "--json"}


async def variables(mesh: Dev, lines: list[str]) -> dict[str, str]:
    """The assignments of the page's first block, with the tokens of this mesh."""
    found = {"API": mesh.api}
    for line in lines:
        name, _, value = line.partition("=")
        if match := re.fullmatch(r'"(.*)\$\(tidings (.*)\)"', value):
            ran = await answer(*shlex.split(match[2]), "--state", str(mesh.state))
            found[name] = match[1] + ran.out[0]
    return found


async def curl(http: httpx.AsyncClient, words: list[str]) -> httpx.Response:
    """As curl does with these arguments."""
    headers: dict[str, str] = {}
    method, body, url = "GET", None, ""
    rest = iter(words)
    for word in rest:
        value = next(rest) if word in OPTIONS_WITH_VALUE else word
        if word == "-H":
            name, _, text = value.partition(": ")
            headers[name] = text
        elif word == "-X":
            method = value
        elif word == "--json":
            method, body = "POST", value
            headers["Content-Type"] = "application/json"
        else:
            url = value
    return await http.request(method, url, headers=headers, content=body)


async def test_every_line_works(tmp_path: Path) -> None:
    """Each curl line of the page gets an answer that is no refusal."""
    blocks = re.findall(r"```sh\n(.*?)```", PAGE.read_text(), re.DOTALL)
    lines = [line for block in blocks[1:] for line in block.splitlines()]
    assert len(lines) > 8
    async with dev(tmp_path / "state") as mesh, client(0) as http:
        given = await variables(mesh, blocks[0].splitlines())
        assert set(given) == {"API", "SHOP", "ALICE"}
        for line in lines:
            words = [re.sub(r"\$(\w+)", lambda name: given[name[1]], word) for word in shlex.split(line)]
            assert words[0] == "curl"
            answered = await curl(http, words[1:])
            assert answered.is_success, (line, answered.text)
