"""A user's inbox, marks and subscriptions over HTTP, beside devices on real gateways."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable
from pathlib import Path
from typing import Any, Final
from urllib.parse import quote

import httpx
import pytest

from support.api import api, refusal, service, user
from support.clock import PATIENCE_S
from support.mesh import Mesh, running_mesh
from tidings.stream import topology


@pytest.fixture
async def broadcasting(tmp_path: Path) -> AsyncIterator[Mesh]:
    """A mesh where whatever goes to a topic is broadcast."""
    async with running_mesh(tmp_path, fanout_write_max=0) as running:
        yield running


async def comes_true(ask: Callable[[], Awaitable[bool]]) -> None:
    async with asyncio.timeout(PATIENCE_S):
        while not await ask():
            await asyncio.sleep(0.02)


async def items(http: httpx.AsyncClient, path: str, headers: dict[str, str]) -> list[dict[str, Any]]:
    answer = await http.get(path, headers=headers)
    assert answer.status_code == 200, answer.text
    found: list[dict[str, Any]] = answer.json()["items"]
    return found


async def test_pages_are_those_of_a_device(mesh: Mesh) -> None:
    """Pages, their ends and their filters are what a device gets over the WebSocket, with the same positions."""
    await mesh.inbox()
    gateway = await mesh.gateway()
    ids = await mesh.publish("a/b@c", 5)
    await mesh.stored("a/b@c", *ids)
    device = await mesh.online(gateway, "a/b@c", auto_ack=False)
    path = f"/v1/users/{quote('a/b@c', safe='')}/inbox"
    async with api(mesh) as http:
        whole = await items(http, path, user("a/b@c"))
        assert whole == (await device.ask("inbox"))["items"]
        assert [item["n"]["id"] for item in whole] == ids[::-1]
        page = (await http.get(path, params={"limit": 2}, headers=service("inbox:read"))).json()
        assert page["items"] == whole[:2]
        assert page["next"] == (await device.ask("inbox", limit=2))["next"]
        rest = {"before": page["next"], "limit": 200}
        assert (await http.get(path, params=rest, headers=service("inbox:read"))).json() == {
            "items": whole[2:],
            "next": None,
        }
        newer = {"after": whole[-1]["pos"], "type": "test.made"}
        assert (await http.get(path, params=newer, headers=user("a/b@c"))).json()["items"] == whole[-2::-1]
        assert await items(http, f"{path}?filter=archived", user("a/b@c")) == []
        assert (await http.get("/v1/users/nobody/inbox", headers=service())).json() == {"items": [], "next": None}
        assert (await http.get("/v1/users/nobody/unread", headers=service())).json() == {"unread": 0}


REFUSED_QUERIES: Final[list[tuple[Any, str]]] = [
    ({"limit": "201"}, "limit"),
    ({"limit": "-1"}, "limit"),
    ({"limit": "²"}, "limit"),
    ({"filter": "new"}, "filter"),
    ({"before": "yesterday"}, "before"),
    ({"before": "u1.1", "after": "u1.1"}, "after"),
    ({"type": ""}, "type"),
    ({"page": "2"}, "page"),
    ([("limit", "1"), ("limit", "2")], "limit"),
]


async def test_refused_queries(mesh: Mesh) -> None:
    """A parameter that is wrong, unknown or given twice is named."""
    async with api(mesh) as http:
        for query, parameter in REFUSED_QUERIES:
            answer = await http.get("/v1/users/alice/inbox", params=query, headers=user("alice"))
            refusal(answer, 400, "bad_parameter", parameter=parameter)


async def test_who_may(mesh: Mesh) -> None:
    """A user's token opens that user's own and nothing else; a service's needs the scope, of reading or of writing."""
    read = ("inbox", "unread", "subscriptions")
    async with api(mesh) as http:
        for what in read:
            path = f"/v1/users/alice/{what}"
            scope = f"{'subscriptions' if what == 'subscriptions' else 'inbox'}:"
            assert (await http.get(path, headers=user("alice"))).status_code == 200
            assert (await http.get(path, headers=service(scope + "read"))).status_code == 200
            for headers in (user("bob"), service(scope + "write"), service("publish:user"), service("", "alice")):
                refusal(await http.get(path, headers=headers), 403, "not_allowed")
        marks, topics = {"as": "read", "pos": "all"}, {"topics": ["post.42"]}
        for path, body, scope in (
            ("/v1/users/alice/marks", marks, "inbox"),
            ("/v1/users/alice/subscriptions", topics, "subscriptions"),
        ):
            for headers in (user("alice"), service(f"{scope}:write")):
                assert (await http.post(path, json=body, headers=headers)).is_success
            for headers in (user("bob"), service(f"{scope}:read")):
                refusal(await http.post(path, json=body, headers=headers), 403, "not_allowed")
        for headers in (user("alice"), service("inbox:write")):
            refusal(await http.post("/v1/revocations", json={"user": "alice"}, headers=headers), 403, "not_allowed")


async def test_marks_reach_devices(mesh: Mesh) -> None:
    """What is marked over HTTP is seen by the user's devices on every gateway, and counts for all."""
    await mesh.inbox()
    gateways = [await mesh.gateway(), await mesh.gateway()]
    ids = await mesh.publish("alice", 3)
    await mesh.stored("alice", *ids)
    devices = [await mesh.online(gateway, "alice", f"phone-{n}") for n, gateway in enumerate(gateways)]
    path = "/v1/users/alice/marks"
    async with api(mesh) as http:
        newest = (await items(http, "/v1/users/alice/inbox", user("alice")))[0]["pos"]
        answer = await http.post(path, json={"as": "read", "pos": [newest]}, headers=user("alice"))
        assert answer.json() == {"upto": None, "unread": 2}
        for device in devices:
            await device.expect_frame("state", pos=[newest], **{"as": "read"})
            await device.expect_frame("count", unread=2)
        answer = await http.post(path, json={"as": "archived", "pos": "all"}, headers=service("inbox:write"))
        assert answer.json()["unread"] == 0
        for device in devices:
            await device.expect_frame("state", pos="all", upto=answer.json()["upto"], **{"as": "archived"})
            await device.expect_frame("count", unread=0)
        assert await items(http, "/v1/users/alice/inbox", user("alice")) == []
        assert len(await items(http, "/v1/users/alice/inbox?filter=archived", user("alice"))) == 3


async def test_refused_marks(mesh: Mesh) -> None:
    """A position of the future would mark what nobody has seen yet; all at once is not made unread."""
    path = "/v1/users/alice/marks"
    head = await mesh.connection.api("STREAM.INFO.NOTIFY_0")
    incarnation = int(head["config"]["metadata"]["tidings_incarnation"])
    async with api(mesh) as http:
        for body, code, pointer in (
            ({"as": "read", "pos": [f"u{incarnation + 1_000_000:x}.1"]}, "bad_position", "/pos/0"),
            ({"as": "read", "pos": [f"b{1:x}.1", f"u{incarnation:x}.1000000"]}, "bad_position", "/pos/1"),
            ({"as": "read", "pos": ["mine"]}, "bad_position", "/pos/0"),
            ({"as": "unread", "pos": "all"}, "invalid_body", "/as"),
            ({"as": "done", "pos": "all"}, "invalid_body", "/as"),
            ({"as": "read", "pos": []}, "invalid_body", "/pos"),
            ({"as": "read"}, "invalid_body", ""),
        ):
            refusal(await http.post(path, json=body, headers=user("alice")), 422, code, pointer=pointer)


async def test_subscriptions_are_in_force(broadcasting: Mesh) -> None:
    """Behind the answer everything that is broadcast comes, on all gateways, until behind the answer that ends it."""
    mesh = broadcasting
    await mesh.inbox()
    await mesh.fanout()
    gateways = [await mesh.gateway(), await mesh.gateway()]
    devices = [await mesh.online(gateway, "alice", f"phone-{n}") for n, gateway in enumerate(gateways)]
    path = "/v1/users/alice/subscriptions"
    async with api(mesh) as http:
        for number in range(5):
            topic = f"post.{number}"
            answer = await http.post(path, json={"topics": [topic, f"{topic}.>"]}, headers=service())
            assert answer.status_code == 204, answer.text
            came = await mesh.publish_topic(topic, "alice")
            for device in devices:
                await device.expect(*came)
            answer = await http.delete(f"{path}/{topic}", headers=user("alice"))
            assert answer.status_code == 204, answer.text
            stayed_away = await mesh.publish_topic(topic)
            last = await mesh.publish_topic(f"{topic}.likes", "alice")
            for device in devices:
                # Broadcasts come in their order: what did not come before this one never does.
                await device.expect(*last)
                assert stayed_away[0] not in device.ids
        page = (await http.get(path, params={"limit": 2}, headers=user("alice"))).json()
        assert page == {"topics": ["post.0.>", "post.1.>"], "next": "post.1.>"}
        rest = await http.get(path, params={"after": page["next"]}, headers=service("subscriptions:read"))
        assert rest.json() == {"topics": ["post.2.>", "post.3.>", "post.4.>"], "next": None}
        await mesh.broadcasts_stored()
        found = await items(http, "/v1/users/alice/inbox", user("alice"))
        assert {item["n"]["id"] for item in found} == set(devices[0].ids)
        # One of them is marked like any other.
        body = {"as": "read", "pos": [found[0]["pos"]]}
        assert (await http.post("/v1/users/alice/marks", json=body, headers=user("alice"))).json()["unread"] == 9


async def test_refused_subscriptions(mesh: Mesh) -> None:
    """All topics of a request or none: the rules and the limit hold for services too."""
    path = "/v1/users/alice/subscriptions"
    async with api(mesh, subscribe_rules="!secret.>,>", subscriptions_max=3) as http:
        for topics, status, code, pointer in (
            (["post.1", "secret.plans"], 403, "not_allowed", None),
            (["user.bob.messages"], 403, "not_allowed", None),
            (["a", "b", "c", "d"], 422, "too_many_subscriptions", None),
            (["post.1", "post.*"], 422, "bad_topic", "/topics/1"),
            (["post.1", 7], 422, "invalid_body", "/topics/1"),
            ([], 422, "invalid_body", "/topics"),
        ):
            answer = await http.post(path, json={"topics": topics}, headers=service())
            refusal(answer, status, code, pointer=pointer)
        assert (await http.get(path, headers=service())).json()["topics"] == []
        refusal(await http.delete(f"{path}/post.*", headers=service()), 400, "bad_parameter", parameter="topic")


async def test_not_ready_blindly(mesh: Mesh) -> None:
    """An api agent that cannot read what is revoked is not ready, and is again when it can."""
    async with api(mesh) as http:
        assert (await http.get("/readyz")).status_code == 200
        await mesh.connection.api(f"STREAM.DELETE.{topology.REVOCATIONS}")

        async def unready() -> bool:
            return (await http.get("/readyz")).status_code == 503

        await comes_true(unready)
        assert (await http.get("/readyz")).json()["problems"] == ["it is not known which tokens are revoked"]
        await topology.apply(mesh.connection, mesh.settings)

        async def ready() -> bool:
            return (await http.get("/readyz")).status_code == 200

        await comes_true(ready)


async def test_revocation(mesh: Mesh) -> None:
    """A revoked user's session is closed, and the token is refused by every api agent; others go on."""
    gateway = await mesh.gateway()
    alice, bob = user("alice"), user("bob")
    device = await mesh.online(gateway, "alice")
    async with api(mesh) as http, api(mesh) as other:
        answer = await http.post("/v1/revocations", json={"user": "alice"}, headers=service("revoke"))
        assert answer.status_code == 204, answer.text
        assert await device.closed() == 4401
        for client in (http, other):

            async def refused(client: httpx.AsyncClient = client) -> bool:
                return (await client.get("/v1/users/alice/unread", headers=alice)).status_code == 401

            await comes_true(refused)
            refusal(await client.get("/v1/users/alice/unread", headers=alice), 401, "not_authenticated")
            assert (await client.get("/v1/users/bob/unread", headers=bob)).status_code == 200
        bad = await http.post("/v1/revocations", json={"user": "bob", "device": ""}, headers=service("revoke"))
        refusal(bad, 422, "bad_subject", pointer="/device")
