"""Event schemas where notifications pass: a violation is one dead letter, the rest flows, and nothing is lost."""

from __future__ import annotations

import asyncio
import json
from pathlib import Path
from typing import Any

import pytest

from support.clock import PATIENCE_S
from support.command import answer
from support.ledger import stored_ids
from support.mesh import Mesh
from tidings.fanout.agent import FanoutAgent
from tidings.inbox.agent import InboxAgent
from tidings.publish import Publisher, SchemaViolation
from tidings.schema import Schemas
from tidings.wire import subject
from tidings.wire.errors import InvalidNotification
from tidings.wire.notification import build
from tidings.wire.position import Position


@pytest.fixture
def own(tmp_path: Path) -> Path:
    """A folder with the schema of one type, whose data is a number."""
    folder = tmp_path / "schemas"
    folder.mkdir()
    schema = {"required": ["data"], "properties": {"data": {"type": "number", "minimum": 1}}}
    (folder / "order.sent.json").write_text(json.dumps(schema))
    return folder


async def store(mesh: Mesh, where: str, id: str, data: Any) -> None:
    """Publish as any NATS client does."""
    body = build(type="order.sent", id=id, data=data)[1]
    await mesh.connection.store(where, body, {"Nats-Msg-Id": id})


async def letters(mesh: Mesh, count: int) -> list[dict[str, Any]]:
    """Wait until there are so many dead letters."""
    async with asyncio.timeout(PATIENCE_S):
        while len(found := await mesh.dead_letters()) < count:
            await asyncio.sleep(0.02)
    return found


async def test_stricter_schema_loses_nothing(mesh: Mesh, own: Path) -> None:
    """What lies in the log when a schema comes is a dead letter with its place; replayed once it fits, it arrives."""
    gateway = await mesh.gateway()
    where = subject.notify_user("alice")
    for id, data in (("good", 5), ("bad", 0), ("late", 6)):
        await store(mesh, where, id, data)
    strict = await mesh.inbox(schema_dir=own)
    await mesh.stored("alice", "good", "late")
    (letter,) = await letters(mesh, 1)
    assert letter["tidings-reason"] == "schema_violation"
    assert letter["tidings-detail"].startswith("`/data`: it is less than the minimum of 1")
    assert json.loads(letter["body"])["data"] == 0
    assert set(await stored_ids(mesh.store, "alice")) == {"good", "late"}
    environment = {"TIDINGS_NATS_URL": mesh.settings.nats_url, "TIDINGS_SCHEMA_DIR": str(own)}
    refused = await answer("deadletters", "replay", "--all", **environment)
    assert refused.process.returncode == 1
    assert "would come back at once: `/data`" in refused.errors[0]
    await strict.stop()
    (own / "order.sent.json").write_text("{}")
    await mesh.inbox(schema_dir=own)
    phone = await mesh.online(gateway, "alice")
    ran = await answer("deadletters", "replay", "--all", **environment)
    assert (ran.process.returncode, ran.out) == (0, ["1 replayed"])
    await phone.expect("bad")
    await mesh.stored("alice", "good", "late", "bad")


async def test_topic_is_judged_once(mesh: Mesh, own: Path) -> None:
    """A violation that was published to a topic is one letter and no copy, however many follow it."""
    gateway, _ = await mesh.gateway(), await mesh.inbox(schema_dir=own)
    await mesh.fanout(schema_dir=own)
    devices = [await mesh.online(gateway, user) for user in ("alice", "bob", "carol")]
    for device in devices:
        assert (await device.ask("sub", topics=["shop.orders"]))["t"] == "ok"
    where = subject.notify_topic("shop.orders")
    await store(mesh, where, "bad", "seventeen")
    await store(mesh, where, "good", 17)
    for device in devices:
        await device.expect("good")
        assert device.ids == ["good"]
    (letter,) = await letters(mesh, 1)
    assert (letter["tidings-reason"], letter["tidings-origin-subject"]) == ("schema_violation", where)
    await mesh.stored("carol", "good")
    assert len(await mesh.dead_letters()) == 1


async def test_deep_events(mesh: Mesh, own: Path) -> None:
    """An event that is nested too deeply is a dead letter, with a schema or without, and stops no agent."""
    gateway, _ = await mesh.gateway(), await mesh.inbox(schema_dir=own)
    await mesh.fanout(schema_dir=own)
    phone = await mesh.online(gateway, "alice")
    assert (await phone.ask("sub", topics=["shop.orders"]))["t"] == "ok"
    deep = b"[" * 900 + b"]" * 900
    for where in (subject.notify_user("alice"), subject.notify_topic("shop.orders")):
        for type in ("order.sent", "other"):
            body = b'{"specversion":"1.0","id":"deep","source":"x","type":"%b","data":%b}' % (type.encode(), deep)
            await mesh.connection.store(where, body)
        await store(mesh, where, f"{where} good", 17)
    await mesh.stored("alice", *(f"{where} good" for where in ("notify.user.alice", "notify.topic.shop.orders")))
    found = await letters(mesh, 4)
    assert {letter["tidings-reason"] for letter in found} == {"invalid_notification"}


async def test_unknown_and_off(mesh: Mesh, own: Path) -> None:
    """An agent refuses unknown types where it is told to; with the checks off it takes any notification."""
    await store(mesh, subject.notify_user("alice"), "bad", "x")
    await mesh.publish("alice")
    strict = await mesh.inbox(schema_dir=own, schema_unknown="refuse")
    found = await letters(mesh, 2)
    assert {letter["tidings-detail"].split(":")[0] for letter in found} == {"`/data`", "`/type`"}
    await strict.stop()
    await mesh.inbox(schema_dir=own, schema_unknown="refuse", schema_check="off")
    await store(mesh, subject.notify_user("alice"), "also bad", "x")
    await mesh.stored("alice", "also bad")


async def test_publisher(mesh: Mesh, own: Path) -> None:
    """A publisher that was given schemas refuses before it sends; one without sends."""
    async with Publisher(mesh.connection, schemas=Schemas.load(own)) as publisher:
        for publish in (publisher.publish, publisher.publish_topic):
            with pytest.raises(SchemaViolation):
                await publish("alice", "order.sent", 0)
        with pytest.raises(InvalidNotification):
            await publisher.publish_body("alice", build(type="order.sent", data=0)[1])
        failed: list[str] = []
        events = [("alice", "order.sent", 0, "bad"), ("alice", "order.sent", 1, "good")]
        stream = publisher.publish_many(events, on_error=lambda event, error: failed.append(error.code))
        assert [receipt.id async for receipt in stream] == ["good"]
        assert failed == ["schema_violation"]
    async with Publisher(mesh.connection) as publisher:
        assert (await publisher.publish("alice", "order.sent", 0)).seq == 2


async def test_commands(own: Path, tmp_path: Path) -> None:
    """`tidings schemas` lists what there is and judges files; a bad folder is named by each command."""
    listed = await answer("schemas", "list", "--dir", str(own))
    assert {line.split()[0] for line in listed.out} >= {"order.sent", "social.like"}
    as_json = await answer("schemas", "list", "--json")
    assert all(json.loads(line)["examples"] for line in as_json.out)
    good, bad = tmp_path / "good.json", tmp_path / "bad.json"
    good.write_bytes(build(type="order.sent", data=5)[1])
    bad.write_bytes(build(type="order.sent", data=0)[1])
    ran = await answer("schemas", "check", str(good), str(bad), TIDINGS_SCHEMA_DIR=str(own))
    assert (ran.process.returncode, ran.out) == (1, [f"{good}: a good order.sent"])
    assert "`/data`" in ran.errors[0]
    (own / "order.lost.json").write_text('{"$ref": "https://127.0.0.1:1/schema"}')
    for command in (("schemas", "list"), ("settings",), ("inbox",)):
        ran = await answer(*command, TIDINGS_SCHEMA_DIR=str(own))
        assert ran.process.returncode == 1
        assert "127.0.0.1" in ran.errors[-1]


async def test_publish_command(mesh: Mesh) -> None:
    """`tidings publish` says at once what is wrong with the data of a known type."""
    sent = ("publish", "--user", "alice", "--type", "social.like", "--data")
    ran = await answer(*sent, '{"text":5}', TIDINGS_NATS_URL=mesh.settings.nats_url)
    assert ran.process.returncode == 1
    assert "`/data/text`" in ran.errors[0]
    ran = await answer(*sent, '{"text":"hi"}', TIDINGS_NATS_URL=mesh.settings.nats_url)
    assert ran.process.returncode == 0


async def test_mistakes_of_ours(mesh: Mesh, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    """A notification on which an agent fails is one dead letter, at whichever agent, and the rest flows."""

    def judge(schemas: Schemas, type: str, event: dict[str, Any]) -> None:
        if event["data"] == "strange":
            raise RuntimeError("nobody foresaw it")

    monkeypatch.setattr(Schemas, "check_event", judge)
    await mesh.store.subscribe("alice", ["post.42"], 100, Position(0, 0))
    agents = InboxAgent(mesh.settings, mesh.store), FanoutAgent(mesh.settings, mesh.store)
    try:
        for agent in agents:
            await agent.start()
        for where in (subject.notify_user("alice"), subject.notify_topic("post.42")):
            await store(mesh, where, f"bad {where}", "strange")
            await store(mesh, where, f"good {where}", "ordinary")
        found = await letters(mesh, 2)
        await mesh.stored("alice", "good notify.user.alice", "good notify.topic.post.42")
    finally:
        for agent in agents:
            await agent.stop()
    assert {(letter["tidings-reason"], letter["tidings-detail"]) for letter in found} == {
        ("unreadable", "reading it failed: RuntimeError: nobody foresaw it")
    }
    assert sorted(json.loads(letter["body"])["id"] for letter in found) == [
        "bad notify.topic.post.42",
        "bad notify.user.alice",
    ]
    assert len(await stored_ids(mesh.store, "alice")) == 2
    assert "reading a notification failed" in caplog.text
