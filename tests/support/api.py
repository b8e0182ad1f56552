"""The HTTP api as a test uses it: an outside client, and tokens for whomever."""

from __future__ import annotations

import dataclasses
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any, Final

import httpx

from tidings.api.agent import Api
from tidings.identity import issue, issue_service

from .clock import PATIENCE_S
from .mesh import KEY, Mesh

EVERYTHING: Final = (
    "publish:user publish:topic:> inbox:read inbox:write subscriptions:read subscriptions:write "
    "deadletters:read deadletters:write revoke"
)
LIKE: Final[dict[str, Any]] = {"type": "social.like", "data": {"text": "hi"}}


def service(scope: str = EVERYTHING, name: str = "shop") -> dict[str, str]:
    """The headers of a service."""
    return {"Authorization": f"Bearer {issue_service(KEY, name, scope)}"}


def user(name: str) -> dict[str, str]:
    """The headers of a user's device."""
    return {"Authorization": f"Bearer {issue(KEY, name)}"}


def refusal(answer: httpx.Response, status: int, code: str, **members: Any) -> dict[str, Any]:
    """The problem that an answer is; it must be this one."""
    assert answer.headers["content-type"] == "application/problem+json", answer.text
    problem: dict[str, Any] = answer.json()
    assert (answer.status_code, problem["status"], problem["code"]) == (status, status, code), problem
    assert problem["type"] == f"urn:tidings:problem:{code}"
    assert {name: problem.get(name) for name in members} == members, problem
    return problem


@asynccontextmanager
async def client(port: int) -> AsyncIterator[httpx.AsyncClient]:
    """An HTTP client of somebody else's."""
    async with httpx.AsyncClient(base_url=f"http://127.0.0.1:{port}", timeout=PATIENCE_S) as http:
        yield http


@asynccontextmanager
async def api(mesh: Mesh, **changed: Any) -> AsyncIterator[httpx.AsyncClient]:
    """An api agent in this process, and a client of it."""
    agent = Api(dataclasses.replace(mesh.settings, **changed), mesh.store)
    await agent.start()
    try:
        async with client(agent.port) as http:
            yield http
    finally:
        await agent.stop()
