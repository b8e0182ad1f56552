"""What the api refuses of whoever asks too much, too long, too fast or in no language that it knows."""

from __future__ import annotations

import asyncio
import dataclasses
import json
import signal
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any, Final

import httpx
import pytest

from support.api import LIKE, api, client, refusal, service, user
from support.clock import PATIENCE_S, until
from support.faulty import FaultyStore
from support.mesh import Mesh
from tidings.api.agent import Api
from tidings.telemetry import catalogue
from tidings.telemetry.telemetry import Telemetry

UNREAD: Final = "/v1/users/alice/unread"
PUBLISH: Final = "/v1/publish"
JSON: Final = {"Content-Type": "application/json"}


@asynccontextmanager
async def half_a_request(http: httpx.AsyncClient, headers: dict[str, str]) -> AsyncIterator[asyncio.StreamReader]:
    """A publish whose body never comes: it is under way until the connection ends. Yields where its answer comes."""
    reader, writer = await asyncio.open_connection("127.0.0.1", http.base_url.port)
    lines = [f"POST {PUBLISH} HTTP/1.1", "Host: api", "Content-Type: application/json", "Content-Length: 100"]
    lines += [f"{name}: {value}" for name, value in headers.items()]
    writer.write(("\r\n".join(lines) + "\r\n\r\n{").encode())
    await writer.drain()
    try:
        yield reader
    finally:
        writer.close()


async def until_status(http: httpx.AsyncClient, path: str, headers: dict[str, str], status: int) -> httpx.Response:
    async with asyncio.timeout(PATIENCE_S):
        while (answer := await http.get(path, headers=headers)).status_code != status:
            await asyncio.sleep(0.01)
    return answer


async def to_the_end(reader: asyncio.StreamReader) -> int:
    """How many bytes come before the connection ends, in order or not."""
    count = 0
    try:
        async with asyncio.timeout(PATIENCE_S):
            while some := await reader.read(65_536):
                count += len(some)
    except ConnectionError:
        return count
    return count


async def test_rate_of_a_credential_and_of_a_user(mesh: Mesh) -> None:
    """Each answer names the limits that it counted for; past one it is 429, for that one alone."""
    async with api(mesh, api_requests_per_minute=3, api_user_requests_per_minute=2) as http:
        first = await http.get(UNREAD, headers=service())
        assert first.headers["RateLimit-Policy"] == '"credential";q=3;w=60, "user";q=2;w=60'
        assert first.headers["RateLimit"] == '"credential";r=2;t=20, "user";r=1;t=30'
        assert (await http.get(UNREAD, headers=service())).status_code == 200
        answer = await http.get(UNREAD, headers=service())
        refusal(answer, 429, "too_many_requests")
        assert 25 <= int(answer.headers["Retry-After"]) <= 30
        assert '"user";r=0' in answer.headers["RateLimit"]
        answer = await http.get("/v1/users/bob/unread", headers=service())
        refusal(answer, 429, "too_many_requests")
        assert '"credential";r=0' in answer.headers["RateLimit"]
        # Another service, and the user, have their own.
        assert (await http.get(UNREAD, headers=service(name="till"))).status_code == 200
        assert (await http.get(UNREAD, headers=user("alice"))).status_code == 200
        assert (await http.get(UNREAD, headers=user("alice"))).status_code == 200
        refusal(await http.get(UNREAD, headers=user("alice")), 429, "too_many_requests")


async def test_rate_of_notifications(mesh: Mesh) -> None:
    """Each user and topic of a publish counts; what is over the limit is refused whole."""
    async with api(mesh, api_notifications_per_minute=1000) as http:
        users = [str(number) for number in range(600)]
        answer = await http.post(PUBLISH, json={"users": users, "event": LIKE}, headers=service())
        assert '"notifications";r=400;t=36' in answer.headers["RateLimit"]
        answer = await http.post(PUBLISH, json={"users": users, "event": LIKE}, headers=service())
        refusal(answer, 429, "too_many_requests")
        assert int(answer.headers["Retry-After"]) <= 12
        assert (await http.post(PUBLISH, json={"user": "alice", "event": LIKE}, headers=service())).is_success


async def test_too_many_under_way(mesh: Mesh) -> None:
    """One credential's requests under way are bounded, all together too: what is more is refused at once, and whoever
    looks after the process is answered."""
    async with api(mesh, api_concurrency=3, api_concurrency_per_credential=2) as http:
        async with half_a_request(http, service()), half_a_request(http, service()):
            answer = await until_status(http, UNREAD, service(), 503)
            refusal(answer, 503, "too_many_concurrent")
            assert answer.headers["Retry-After"] == "1"
            assert (await http.get(UNREAD, headers=user("alice"))).status_code == 200
            async with half_a_request(http, service(name="till")):
                answer = await until_status(http, UNREAD, user("alice"), 503)
                refusal(answer, 503, "overloaded")
                assert (await http.get("/healthz")).status_code == 200
                assert (await http.get("/readyz")).status_code == 200
        await until_status(http, UNREAD, service(), 200)


async def test_bodies(mesh: Mesh) -> None:
    """A body that is too large, of another kind, encoded, no JSON, or endless in depth."""
    async with api(mesh, api_body_max_bytes=32_768) as http:
        headers = {**service(), **JSON}
        for content, changed, status, code in (
            (b"x" * 32_769, {}, 413, "body_too_large"),
            (b"{}", {"Content-Type": "text/plain"}, 415, "unsupported_media_type"),
            (b"{}", {"Content-Encoding": "gzip"}, 415, "unsupported_media_type"),
            (b"{", {}, 400, "malformed_json"),
            (b"", {}, 400, "malformed_json"),
            (b"\xff", {}, 400, "malformed_json"),
            (b'{"user":"\\ud800"}', {}, 400, "malformed_json"),
            (b"[" * 30_000, {}, 400, "malformed_json"),
            (b'{"user":"alice","event":{"type":"a","data":NaN}}', {}, 400, "malformed_json"),
            (
                b'{"user":"a","event":{"type":"a","data":' + b"[" * 300 + b"]" * 300 + b"}}",
                {},
                422,
                "invalid_notification",
            ),
        ):
            refusal(await http.post(PUBLISH, content=content, headers={**headers, **changed}), status, code)

        async def chunks() -> AsyncIterator[bytes]:
            for _ in range(40):
                yield b" " * 1000

        refusal(await http.post(PUBLISH, content=chunks(), headers=headers), 413, "body_too_large")


async def test_slow_body(mesh: Mesh) -> None:
    """A body that does not arrive is waited for as long as is allowed, and the client is told."""
    async with api(mesh, api_body_timeout_s=0.1) as http:
        async with half_a_request(http, service()) as reader, asyncio.timeout(PATIENCE_S):
            head = await reader.readuntil(b"\r\n\r\n")
            assert head.startswith(b"HTTP/1.1 408 ")
            assert b"application/problem+json" in head
            assert b'"body_timeout"' in await reader.readuntil(b"}")


async def test_client_that_does_not_read(mesh: Mesh, caplog: pytest.LogCaptureFixture) -> None:
    """Whoever does not read the answers is dropped, and gives back the room that was taken."""
    caplog.set_level("INFO", "tidings.api")
    await mesh.inbox()
    ids = await mesh.publish("alice", 100, size=15_000)
    await mesh.stored("alice", *ids)
    async with api(mesh, api_write_timeout_s=0.2, api_concurrency=1) as http:
        reader, writer = await asyncio.open_connection("127.0.0.1", http.base_url.port, limit=1024)
        authorization = user("alice")["Authorization"]
        request = f"GET /v1/users/alice/inbox?limit=200 HTTP/1.1\r\nHost: a\r\nAuthorization: {authorization}\r\n\r\n"
        # More than what the kernel keeps for a client that does not read.
        writer.write(request.encode() * 20)
        await until(lambda: "does not read its answer" in caplog.text, "the connection is dropped")
        await until_status(http, UNREAD, user("alice"), 200)
        try:
            assert await to_the_end(reader) < 20 * 100 * 15_000
        finally:
            writer.close()


async def test_addresses(mesh: Mesh) -> None:
    """What is nowhere, asked in another way than it is offered, or named in no text."""
    async with api(mesh) as http:
        refusal(await http.get("/v2/nowhere"), 404, "not_found")
        answer = await http.put(PUBLISH, json={}, headers=service())
        refusal(answer, 405, "method_not_allowed")
        assert answer.headers["Allow"] == "POST"
        answer = await http.patch("/v1/users/alice/subscriptions", headers=service())
        assert answer.headers["Allow"] == "GET, POST"
        path = "/v1/users/%ff/unread"
        refusal(await http.get(path, headers=service()), 400, "bad_parameter", parameter="path")
        for query in ("type=%ff", "%c3=a", "type=a%ed%a0%80"):
            answer = await http.get(f"/v1/users/alice/inbox?{query}", headers=service())
            refusal(answer, 400, "bad_parameter", parameter="query")
        fine = await http.get("/v1/users/alice/inbox?type=caf%C3%A9%EF%BF%BD", headers=service())
        assert fine.status_code == 200
        for bad in ("%00", "a" * 201):
            answer = await http.get(f"/v1/users/{bad}/unread", headers=service())
            refusal(answer, 400, "bad_parameter", parameter="user")
        for name in ("a%2Fb", "%2E%2E", "%F0%9F%8E%89"):
            assert (await http.get(f"/v1/users/{name}/unread", headers=service())).json() == {"unread": 0}


async def test_expectations(mesh: Mesh) -> None:
    """100-continue is there; whatever else is expected is refused as everything is, at each address."""
    async with api(mesh) as http:
        for path in ("/v1/users/alice/unread", "/healthz", "/v2/nowhere"):
            answer = await http.get(path, headers={**service(), "Expect": "banana"})
            refusal(answer, 417, "expectation_failed")
            assert "banana" not in answer.text
            assert answer.headers["Server"] == "tidings"
        answer = await http.get("/v1/users/alice/unread", headers={**service(), "Expect": "100-continue"})
        assert answer.json() == {"unread": 0}


async def test_credentials(mesh: Mesh) -> None:
    """A token comes in the Authorization header, once, and nowhere else."""
    good = service()["Authorization"]
    async with api(mesh) as http:
        for headers in (
            {},
            {"Authorization": ""},
            {"Authorization": "Bearer"},
            {"Authorization": "Bearer " + good},
            {"Authorization": good.replace("Bearer", "Basic")},
            {"Authorization": good + "x"},
            [("Authorization", good), ("Authorization", good)],
            {"Cookie": good},
        ):
            answer = await http.get(UNREAD, headers=headers)
            refusal(answer, 401, "not_authenticated")
            assert answer.headers["WWW-Authenticate"].startswith("Bearer ")
        refusal(await http.get(UNREAD, params={"access_token": good.split()[1]}), 401, "not_authenticated")


async def test_origins(mesh: Mesh) -> None:
    """A page of an origin that is listed may ask, with a preflight first; a browser keeps all from any other page."""
    ours, theirs = {"Origin": "https://app.example.com"}, {"Origin": "https://evil.example.com"}
    first = {"Access-Control-Request-Method": "POST", "Access-Control-Request-Headers": "authorization"}
    async with api(mesh, allowed_origins="https://app.example.com, https://b.example.com") as http:
        asked = await http.options(PUBLISH, headers={**ours, **first})
        assert asked.status_code == 204
        assert asked.headers["Access-Control-Allow-Origin"] == ours["Origin"]
        assert "Authorization" in asked.headers["Access-Control-Allow-Headers"]
        answer = await http.get(UNREAD, headers={**ours, **user("alice")})
        assert answer.headers["Access-Control-Allow-Origin"] == ours["Origin"]
        assert answer.headers["Vary"] == "Origin"
        refused = await http.get(UNREAD, headers=ours)
        assert refused.headers["Access-Control-Allow-Origin"] == ours["Origin"]
        refusal(await http.options(PUBLISH, headers={**theirs, **first}), 405, "method_not_allowed")
        assert (
            "Access-Control-Allow-Origin" not in (await http.get(UNREAD, headers={**theirs, **user("alice")})).headers
        )
    async with api(mesh) as http:
        answer = await http.options(PUBLISH, headers={**ours, **first})
        refusal(answer, 405, "method_not_allowed")
        assert "Access-Control-Allow-Origin" not in answer.headers


async def test_store_is_away(mesh: Mesh) -> None:
    """What needs the store says so and when to come again; publishing goes on, and so does all when it is back."""
    faulty = FaultyStore(mesh.store)
    agent = Api(dataclasses.replace(mesh.settings), faulty)  # type: ignore[arg-type]
    await agent.start()
    try:
        async with client(agent.port) as http:
            faulty.down = True
            body: Any = {"topics": ["post.42"]}
            for answer in (
                await http.get(UNREAD, headers=user("alice")),
                await http.get("/v1/users/alice/inbox", headers=user("alice")),
                await http.post("/v1/users/alice/subscriptions", json=body, headers=user("alice")),
            ):
                refusal(answer, 503, "store_unavailable")
                assert int(answer.headers["Retry-After"]) > 0
            assert (await http.get("/readyz")).status_code == 503
            assert (await http.post(PUBLISH, json={"user": "alice", "event": LIKE}, headers=service())).is_success
            faulty.down = False
            await until_status(http, UNREAD, user("alice"), 200)
    finally:
        await agent.stop()


async def test_answers_are_counted(mesh: Mesh) -> None:
    """Each answer, by method and class of status, and never by path: that of a user is the user's."""
    telemetry = Telemetry(dataclasses.replace(mesh.settings, telemetry="on"), "api")
    agent = Api(mesh.settings, mesh.store, telemetry=telemetry)
    await agent.start()
    try:
        async with client(agent.port) as http:
            await http.get(UNREAD, headers=user("alice"))
            await http.get("/nowhere")
            await http.post(PUBLISH)
    finally:
        await agent.stop()
        await telemetry.stop()
    members = telemetry.numbers.histogram(catalogue.REQUESTS).members
    counted = {values: sum(bins.counts) for values, bins in members.items() if any(bins.counts)}
    assert counted == {("GET", "2xx"): 1, ("GET", "4xx"): 1, ("POST", "4xx"): 1}


async def test_mistakes_tell_nothing(mesh: Mesh, caplog: pytest.LogCaptureFixture) -> None:
    """An error that nobody thought of is 500 without a word of it, and is in the log."""
    faulty = FaultyStore(mesh.store)

    async def fail(name: str) -> None:
        raise RuntimeError("a secret of the database")

    faulty.before = fail
    agent = Api(mesh.settings, faulty)  # type: ignore[arg-type]
    await agent.start()
    try:
        async with client(agent.port) as http:
            answer = await http.get(UNREAD, headers=user("alice"))
    finally:
        await agent.stop()
    refusal(answer, 500, "internal")
    assert "secret" not in answer.text
    assert "a secret of the database" in caplog.text


async def test_silent_connections_keep_nobody_out(mesh: Mesh, monkeypatch: pytest.MonkeyPatch) -> None:
    """Above the limit of connections that ask nothing the one that is silent for longest goes; requests are served."""
    monkeypatch.setattr("tidings.runtime.porch._FAIR_S", 0.0)
    async with api(mesh, strangers_max=10) as http:
        silent = [await asyncio.open_connection("127.0.0.1", http.base_url.port) for _ in range(10)]
        try:
            assert (await http.get(UNREAD, headers=user("alice"))).status_code == 200
            async with asyncio.timeout(PATIENCE_S):
                assert await silent[0][0].read() == b""
        finally:
            for _, writer in silent:
                writer.close()


async def test_a_request_without_a_token_is_no_way_in(mesh: Mesh, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whoever asks for what needs no token stays one of the strangers; who shows a good one does not."""
    monkeypatch.setattr("tidings.runtime.porch._FAIR_S", 0.0)
    async with api(mesh, strangers_max=10) as http:
        assert (await http.get(UNREAD, headers=user("alice"))).status_code == 200
        strangers = [await asyncio.open_connection("127.0.0.1", http.base_url.port) for _ in range(15)]
        try:
            for reader, writer in strangers[5:]:
                writer.write(b"GET /healthz HTTP/1.1\r\nHost: x\r\n\r\n")
                await reader.readuntil(b"}")
            more = [await asyncio.open_connection("127.0.0.1", http.base_url.port) for _ in range(10)]
            async with asyncio.timeout(PATIENCE_S):
                for reader, _ in strangers:
                    assert await reader.read() == b""
            strangers += more
            assert (await http.get(UNREAD, headers=user("alice"))).status_code == 200
        finally:
            for _, writer in strangers:
                writer.close()


async def test_leaving(mesh: Mesh) -> None:
    """An api that is told to stop is not ready at once, and serves until a load balancer has had the time to see it."""
    agent = await mesh.api(drain_notice_s=5)
    async with client(agent.port) as http:
        agent.process.send_signal(signal.SIGTERM)
        await until_status(http, "/readyz", {}, 503)
        answer = await http.post("/v1/publish", json={"user": "alice", "event": LIKE}, headers=service())
        assert answer.status_code == 200
        async with asyncio.timeout(PATIENCE_S):
            assert await agent.process.wait() == 0
        with pytest.raises(httpx.ConnectError):
            await http.get("/healthz")


@pytest.mark.parametrize(
    "request_",
    [
        b"GET /healthz HTTP/1.1\r\nHost: x\r\nAuthorization : Bearer a.secret.token\r\n\r\n",
        b"GET /" + b"secret" * 2000 + b" HTTP/1.1\r\nHost: x\r\n\r\n",
        b"secret\r\n\r\n",
        b"POST /v1/publish HTTP/1.1\r\nHost: x\r\nContent-Length: 1\r\nTransfer-Encoding: chunked\r\n\r\n",
    ],
)
async def test_no_http(mesh: Mesh, request_: bytes) -> None:
    """What cannot be read as a request is refused as everything is, and nothing of it is repeated."""
    async with api(mesh) as http:
        reader, writer = await asyncio.open_connection("127.0.0.1", http.base_url.port)
        writer.write(request_)
        async with asyncio.timeout(PATIENCE_S):
            answer = await reader.read()
        writer.close()
    head, _, body = answer.partition(b"\r\n\r\n")
    assert head.startswith(b"HTTP/1.0 400 ")
    assert b"Content-Type: application/problem+json" in head
    assert b"Server: tidings" in head
    assert json.loads(body)["code"] == "bad_request"
    assert b"secret" not in answer
