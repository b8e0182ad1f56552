"""Publishing over HTTP, with an HTTP client of somebody else's, against a real nats-server."""

from __future__ import annotations

import asyncio
import json
from base64 import b64decode
from pathlib import Path
from typing import Any, Final

import httpx
import pytest

from support.api import LIKE, api, client, refusal, service, user
from support.mesh import Mesh
from tidings.stream.records import of_user
from tidings.stream.topology import TOPICS


async def logged(mesh: Mesh, name: str) -> list[dict[str, Any]]:
    return [entry["notification"] async for entry in of_user(mesh.connection, name)]


async def test_to_a_user(mesh: Mesh) -> None:
    """What was answered is in the log, with what the event left out added, and what it had unchanged."""
    async with api(mesh) as http:
        answer = await http.post("/v1/publish", json={"user": "alice", "event": LIKE}, headers=service())
        given = {**LIKE, "id": "order/1", "source": "till", "time": "2026-01-31T12:00:00Z", "priority": "high"}
        own = await http.post("/v1/publish", json={"user": "alice", "event": given}, headers=service())
    assert answer.status_code == own.status_code == 200, answer.text + own.text
    found, unchanged = await logged(mesh, "alice")
    said = answer.json()
    assert said == {"id": found["id"], "results": [{"user": "alice", "stored": True, "duplicate": False}]}
    assert (found["specversion"], found["source"], found["type"], found["data"]) == (
        "1.0",
        "shop",
        "social.like",
        {"text": "hi"},
    )
    assert found["time"]
    assert unchanged == {"specversion": "1.0", **given}
    assert own.json()["id"] == "order/1"


async def test_to_users_and_to_a_topic(mesh: Mesh) -> None:
    """Each user of a list is answered for, once; a topic's event gets the topic."""
    users = [f"user {number}" for number in range(999)]
    async with api(mesh) as http:
        body = {"users": [*users, "user 0"], "event": LIKE}
        answer = await http.post("/v1/publish", json=body, headers=service())
        body = {"topic": "post.42", "event": LIKE}
        to_topic = await http.post("/v1/publish", json=body, headers=service("publish:topic:post.>"))
    results = answer.json()["results"]
    assert results == [{"user": name, "stored": True, "duplicate": False} for name in users]
    assert to_topic.json()["results"] == [{"topic": "post.42", "stored": True, "duplicate": False}]
    message = await mesh.connection.api(f"STREAM.MSG.GET.{TOPICS}", {"seq": 1})
    event = json.loads(b64decode(message["message"]["data"]))
    assert (event["topic"], event["id"]) == ("post.42", to_topic.json()["id"])


async def test_batch(mesh: Mesh) -> None:
    """A batch is answered in its order; one that has too many users in all is refused before anything is sent."""
    async with api(mesh) as http:
        notifications = [{"user": "alice", "event": LIKE}, {"users": ["bob", "eve"], "event": LIKE}]
        answer = await http.post("/v1/publish/batch", json={"notifications": notifications}, headers=service())
        assert [[one["user"] for one in order["results"]] for order in answer.json()["results"]] == [
            ["alice"],
            ["bob", "eve"],
        ]
        assert len({order["id"] for order in answer.json()["results"]}) == 2
        crowd = {"users": [str(number) for number in range(1000)], "event": LIKE}
        many = await http.post("/v1/publish/batch", json={"notifications": [*notifications, crowd]}, headers=service())
        refusal(many, 422, "invalid_body", pointer="/notifications")
    assert len(await logged(mesh, "alice")) == 1


REFUSED_BODIES: Final[list[tuple[Any, str, str]]] = [
    ([], "invalid_body", ""),
    ({"user": "alice"}, "invalid_body", ""),
    ({"event": LIKE}, "invalid_body", ""),
    ({"user": "alice", "topic": "post", "event": LIKE}, "invalid_body", ""),
    ({"user": "alice", "event": LIKE, "urgent": True}, "invalid_body", "/urgent"),
    ({"user": 7, "event": LIKE}, "invalid_body", "/user"),
    ({"user": "", "event": LIKE}, "bad_subject", "/user"),
    ({"users": ["alice", "a" * 201], "event": LIKE}, "bad_subject", "/users/1"),
    ({"users": [], "event": LIKE}, "invalid_body", "/users"),
    ({"topic": "post..42", "event": LIKE}, "bad_topic", "/topic"),
    ({"topic": ".".join("abcdefghi"), "event": LIKE}, "topic_too_deep", "/topic"),
    ({"topic": "post.42", "event": {**LIKE, "topic": "post.42"}}, "invalid_body", "/event/topic"),
    ({"user": "alice", "event": "hi"}, "invalid_body", "/event"),
    ({"user": "alice", "event": {}}, "invalid_notification", "/event/type"),
    ({"user": "alice", "event": {**LIKE, "id": ""}}, "invalid_notification", "/event/id"),
    ({"user": "alice", "event": {**LIKE, "time": "today"}}, "invalid_notification", "/event/time"),
    ({"user": "alice", "event": {**LIKE, "count": 1.5}}, "invalid_notification", "/event/count"),
    ({"user": "alice", "event": {**LIKE, "a/b~c": 1}}, "invalid_notification", "/event/a~1b~0c"),
    ({"user": "alice", "event": {**LIKE, "data": "x" * 16_384}}, "invalid_notification", "/event"),
]


async def test_refused_bodies(mesh: Mesh) -> None:
    """What is wrong is named, with its place."""
    async with api(mesh) as http:
        for body, code, pointer in REFUSED_BODIES:
            refusal(await http.post("/v1/publish", json=body, headers=service()), 422, code, pointer=pointer)


async def test_place_in_a_batch(mesh: Mesh) -> None:
    """One bad notification of a batch is named, and none of the batch is sent."""
    async with api(mesh) as http:
        body = {"notifications": [{"user": "alice", "event": LIKE}, {"user": "alice", "event": {"type": ""}}]}
        answer = await http.post("/v1/publish/batch", json=body, headers=service())
    refusal(answer, 422, "invalid_notification", pointer="/notifications/1/event/type")
    assert await logged(mesh, "alice") == []


async def test_scopes(mesh: Mesh) -> None:
    """A service publishes where its scopes let it, and a user's token publishes nowhere."""
    to_user, to_topic = {"user": "alice", "event": LIKE}, {"topic": "post.42", "event": LIKE}
    async with api(mesh) as http:
        for headers, body in (
            (service("publish:topic:>"), to_user),
            (service("publish:user"), to_topic),
            (service("publish:topic:team.>"), to_topic),
            (user("alice"), to_user),
        ):
            refusal(await http.post("/v1/publish", json=body, headers=headers), 403, "not_allowed")
            batch = {"notifications": [body]}
            refusal(await http.post("/v1/publish/batch", json=batch, headers=headers), 403, "not_allowed")
    assert await logged(mesh, "alice") == []


async def test_idempotency_key(mesh: Mesh) -> None:
    """A retry under a key is one message, at any api agent; another request under it is refused; another service's
    key is another."""
    body = {"users": ["alice", "bob"], "event": LIKE}
    headers = {**service(), "Idempotency-Key": "a-key"}
    async with api(mesh) as http, api(mesh) as other:
        first = await http.post("/v1/publish", json=body, headers=headers)
        again = await other.post(
            "/v1/publish",
            content=b'{"event": {"data": {"text": "hi"}, "type": "social.like"}, "users": ["alice", "bob"]}',
            headers={**headers, "Idempotency-Key": '"a-key"', "Content-Type": "application/json"},
        )
        assert first.json()["id"] == again.json()["id"]
        assert [one["duplicate"] for one in again.json()["results"]] == [True, True]
        changed = await other.post("/v1/publish", json={"user": "alice", "event": LIKE}, headers=headers)
        refusal(changed, 422, "idempotency_key_reused", parameter="Idempotency-Key")
        batch = await http.post("/v1/publish/batch", json={"notifications": [body]}, headers=headers)
        refusal(batch, 422, "idempotency_key_reused")
        theirs = {**service(name="till"), "Idempotency-Key": "a-key"}
        assert (await http.post("/v1/publish", json=body, headers=theirs)).json()["id"] != first.json()["id"]
        bad = await http.post("/v1/publish", json=body, headers={**service(), "Idempotency-Key": "a key"})
        refusal(bad, 400, "bad_parameter", parameter="Idempotency-Key")
    assert len(await logged(mesh, "alice")) == 2


async def test_deep_events(mesh: Mesh) -> None:
    """An event as deep as may be is published in every way, also under a key; one that is deeper is refused."""
    async with api(mesh) as http:
        for depth in (249, 250, 500):
            order = b'{"user":"alice","event":{"type":"deep","data":%b}}' % (b"[" * depth + b"]" * depth)
            for path, body in (("/v1/publish", order), ("/v1/publish/batch", b'{"notifications":[%b]}' % order)):
                for key in ({}, {"Idempotency-Key": f"{path}-{depth}"}):
                    headers = {**service(), **key, "Content-Type": "application/json"}
                    answer = await http.post(path, content=body, headers=headers)
                    if depth == 249:
                        assert answer.status_code == 200, answer.text
                    else:
                        refusal(answer, 422, "invalid_notification")
    assert len(await logged(mesh, "alice")) == 4


async def test_killed_between_store_and_answer(mesh: Mesh) -> None:
    """An api agent is killed when the log has all of it and nobody was told: the retry elsewhere adds nothing."""
    program = ["-P", str(Path(__file__).parents[1] / "support" / "stuck_api.py")]
    agent = await mesh._start("api", {}, program=program)
    port = int((await agent.said(r"listens on .*:(\d+)"))[1])
    users = [f"user {number}" for number in range(50)]
    request: dict[str, Any] = {
        "json": {"users": users, "event": LIKE},
        "headers": {**service(), "Idempotency-Key": "once"},
    }
    async with client(port) as http:
        asking = asyncio.create_task(http.post("/v1/publish", **request))
        await agent.said("stored 50")
        await agent.kill_agent()
        with pytest.raises(httpx.HTTPError):
            await asking
    async with api(mesh) as http:
        answer = await http.post("/v1/publish", **request)
    assert [one["duplicate"] for one in answer.json()["results"]] == [True] * 50
    for name in users[:3]:
        assert [event["id"] for event in await logged(mesh, name)] == [answer.json()["id"]]


async def test_log_is_away(mesh: Mesh) -> None:
    """Without the log nothing is confirmed: 503 with when to come again, and for each that it may be stored or not."""
    async with api(mesh, api_publish_timeout_s=0.5, request_timeout_s=0.5) as http:
        await mesh.stop_nats()
        answer = await http.post("/v1/publish", json={"users": ["alice", "bob"], "event": LIKE}, headers=service())
        problem = refusal(answer, 503, "publish_unconfirmed")
        assert int(answer.headers["Retry-After"]) > 0
        assert problem["id"]
        assert [(one["user"], one["stored"], one["code"]) for one in problem["results"]] == [
            ("alice", None, "publish_unconfirmed"),
            ("bob", None, "publish_unconfirmed"),
        ]
        keyed = {**service(), "Idempotency-Key": "later"}
        answer = await http.post("/v1/publish", json={"user": "alice", "event": LIKE}, headers=keyed)
        refusal(answer, 503, "stream_unavailable")
        ready = await http.get("/readyz")
        assert ready.status_code == 503
        assert ready.json()["problems"] == ["it is not known which tokens are revoked", "no connection to NATS"]
        assert (await http.get("/healthz")).status_code == 200
        await mesh.start_nats()


async def test_log_is_full(mesh: Mesh) -> None:
    """A log that refuses some of it: the answer says which are stored, and which are not."""
    async with api(mesh) as http:
        users = [f"user {number}" for number in range(20)]
        config = (await mesh.connection.api("STREAM.INFO.NOTIFY_0"))["config"]
        await mesh.connection.api("STREAM.UPDATE.NOTIFY_0", {**config, "max_msgs": 1})
        answer = await http.post("/v1/publish", json={"users": users, "event": LIKE}, headers=service())
    problem = refusal(answer, 503, "publish_refused")
    stored = {one["user"] for one in problem["results"] if one["stored"]}
    refused = {one["user"] for one in problem["results"] if one["stored"] is False}
    assert stored
    assert refused
    assert stored | refused == set(users)
    assert {name for name in users if await logged(mesh, name)} == stored
