"""The operator's own service decides who may subscribe: asked, remembered, slow, down."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

import orjson
import pytest
from aiohttp import web

from support.clock import PATIENCE_S, until
from support.mesh import Mesh
from tidings.identity.entitlement import TopicEntitlement
from tidings.runtime.settings import Settings
from tidings.wire.errors import BadSettings, EntitlementUnavailable


class Service:
    """Allows what is in `allowed`; `answer` is an answer of another kind, `held` holds every answer back."""

    def __init__(self) -> None:
        self.asked: list[dict[str, Any]] = []
        self.headers: list[str | None] = []
        self.allowed: set[str] = set()
        self.answer: tuple[int, bytes] | None = None
        self.held: asyncio.Event | None = None
        self.url = ""

    async def serve(self, request: web.Request) -> web.Response:
        question = orjson.loads(await request.read())
        self.asked.append(question)
        self.headers.append(request.headers.get("Authorization"))
        if self.held is not None:
            await self.held.wait()
        if self.answer is not None:
            status, body = self.answer
            return web.Response(status=status, body=body)
        return web.json_response({"allowed": [one for one in question["topics"] if one in self.allowed]})


@pytest.fixture
async def service() -> AsyncIterator[Service]:
    made = Service()
    app = web.Application()
    app.router.add_post("/may", made.serve)
    runner = web.AppRunner(app, shutdown_timeout=0.1)
    await runner.setup()
    await web.TCPSite(runner, "127.0.0.1", 0).start()
    made.url = f"http://127.0.0.1:{runner.addresses[0][1]}/may"
    try:
        yield made
    finally:
        if made.held is not None:
            made.held.set()
        await runner.cleanup()


@asynccontextmanager
async def asking(
    service: Service, clock: list[float] | None = None, **settings: Any
) -> AsyncIterator[TopicEntitlement]:
    now = clock or [0.0]
    made = TopicEntitlement(Settings(subscribe_callback_url=service.url, **settings), clock=lambda: now[0])
    await made.open()
    try:
        yield made
    finally:
        await made.close()


async def test_both_must_allow(service: Service) -> None:
    """The rules first, then the service; a user's own topics are nobody else's to refuse."""
    service.allowed = {"post.1", "secret.1"}
    async with asking(service, subscribe_rules="!secret.>,>", subscribe_callback_token="a-word") as guard:
        assert await guard.refused("alice", ["post.1", "user.alice.>"]) == []
        assert await guard.refused("alice", ["post.1", "post.2", "post.3"]) == ["post.2", "post.3"]
        assert await guard.refused("alice", ["secret.1", "post.4"]) == ["secret.1"]
        assert await guard.refused("alice", ["user.bob.x"]) == ["user.bob.x"]
    assert service.asked == [
        {"user": "alice", "topics": ["post.1"]},
        {"user": "alice", "topics": ["post.2", "post.3"]},
    ]
    assert set(service.headers) == {"Bearer a-word"}


async def test_answers_are_remembered(service: Service) -> None:
    """For their time, per user, yes and no alike; and no more than so many."""
    clock = [0.0]
    service.allowed = {"a"}
    async with asking(service, clock, subscribe_callback_ttl_s=60, subscribe_callback_cache=3) as guard:
        for _ in range(3):
            assert await guard.refused("alice", ["a", "b"]) == ["b"]
        assert len(service.asked) == 1
        await guard.refused("bob", ["a"])
        assert len(service.asked) == 2
        clock[0] = 59.9
        service.allowed = {"b"}
        assert await guard.refused("alice", ["a", "b"]) == ["b"]
        clock[0] = 60
        assert await guard.refused("alice", ["a", "b"]) == ["a"]
        assert len(service.asked) == 3
        await guard.refused("carol", ["x", "y", "z"])
        await guard.refused("alice", ["a"])
        assert len(service.asked) == 5, "what is beyond the bound is forgotten, the oldest first"


@pytest.mark.parametrize(
    "answer",
    [
        (500, b""),
        (204, b""),
        (302, b""),
        (200, b"yes"),
        (200, b"{}"),
        (200, b"[]"),
        (200, b'{"allowed":"a"}'),
        (200, b'{"allowed":[1]}'),
        (200, b'{"allowed":null}'),
        (200, b" " * 300_000),
    ],
)
async def test_no_answer_is_no_permission(
    service: Service, answer: tuple[int, bytes], caplog: pytest.LogCaptureFixture
) -> None:
    """Whatever is no answer refuses, is not remembered, and is said once in the log."""
    service.allowed = {"a"}
    async with asking(service) as guard:
        service.answer = answer
        for _ in range(2):
            with pytest.raises(EntitlementUnavailable):
                await guard.refused("alice", ["a"])
        assert sum("nobody can subscribe" in record.message for record in caplog.records) == 1
        service.answer = None
        assert await guard.refused("alice", ["a"]) == []


async def test_a_slow_service_is_bounded(service: Service) -> None:
    """So many questions are under way, so many wait, the rest is refused at once; all end with the time."""
    service.held = asyncio.Event()
    async with asking(service, subscribe_callback_at_once=2, subscribe_callback_timeout_s=60) as guard:
        asked = [asyncio.ensure_future(guard.refused(f"user{number}", ["a"])) for number in range(30)]
        done, waiting = await asyncio.wait(asked, return_when=asyncio.FIRST_COMPLETED)
        while len(done) < 12:
            more, waiting = await asyncio.wait(waiting, return_when=asyncio.FIRST_COMPLETED)
            done |= more
        assert {type(task.exception()) for task in done} == {EntitlementUnavailable}
        await until(lambda: len(service.asked) == 2, "two are under way")
        assert (len(done), len(waiting)) == (12, 18)
        service.held.set()
        assert await asyncio.wait_for(asyncio.gather(*waiting), PATIENCE_S) == [["a"]] * 18
        service.held = asyncio.Event()
    async with asking(service, subscribe_callback_at_once=1, subscribe_callback_timeout_s=0.05) as guard:
        answers = await asyncio.gather(
            *(guard.refused(f"user{number}", ["a"]) for number in range(5)), return_exceptions=True
        )
        assert {type(answer) for answer in answers} == {EntitlementUnavailable}


def test_an_address_must_be_safe() -> None:
    """Who may read what is asked over https, or on this machine."""
    with pytest.raises(BadSettings, match="subscribe_callback_url"):
        TopicEntitlement(Settings(subscribe_callback_url="http://elsewhere.example/may"))


async def test_at_a_gateway(mesh: Mesh, service: Service) -> None:
    """A refused topic subscribes to nothing; a service that does not answer is to be asked again, and then allows."""
    gateway = await mesh.gateway(subscribe_callback_url=service.url, subscribe_callback_timeout_s=0.5)
    phone = await mesh.online(gateway, "alice")
    service.allowed = {"post.1"}
    assert (await phone.ask("sub", topics=["post.1"]))["t"] == "ok"
    assert (await phone.ask("sub", topics=["post.1", "post.2"]))["code"] == "not_allowed"
    service.answer = (503, b"")
    assert (await phone.ask("sub", topics=["post.3"]))["code"] == "entitlement_unavailable"
    service.answer, service.held = None, asyncio.Event()
    assert (await phone.ask("sub", topics=["post.3"]))["code"] == "entitlement_unavailable"
    service.held.set()
    service.held, service.allowed = None, {"post.3"}
    assert (await phone.ask("sub", topics=["post.3"]))["t"] == "ok"
    assert (await phone.ask("unsub", topics=["post.1"]))["t"] == "ok", "leaving needs nobody's permission"
    assert (await phone.ask("subs"))["topics"] == ["post.3"]
