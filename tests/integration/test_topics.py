"""Topics: who has subscribed gets what is published from then on, and nobody else."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import pytest

from support.clock import PATIENCE_S
from support.device import Device
from support.ledger import stored_ids
from support.mesh import KEY, Mesh, running_mesh
from tidings.client import Client
from tidings.identity import issue
from tidings.publish import Publisher
from tidings.wire import subject
from tidings.wire.errors import RequestRefused
from tidings.wire.notification import build
from tidings.wire.topic import MAX_LEVELS, MAX_TOPIC


@pytest.fixture
async def topics(store_url: str, tmp_path: Path) -> AsyncIterator[Mesh]:
    """A mesh with fan-out and inbox agent, on either store."""
    async with running_mesh(tmp_path, store_url=store_url, store_timeout_s=PATIENCE_S) as mesh:
        await mesh.inbox()
        await mesh.fanout()
        yield mesh


async def follow(device: Device, *topics: str) -> None:
    answer = await device.ask("sub", topics=list(topics))
    assert answer["t"] == "ok", answer


async def followed(device: Device) -> list[str]:
    answer = await device.ask("subs")
    assert answer["next"] is None
    topics: list[str] = answer["topics"]
    return topics


async def test_subscribers_get_it(topics: Mesh) -> None:
    """Exact and subtree, each user once however often covered; on every device, at once or later, and in the inbox."""
    gateway = await topics.gateway(linger_s=0)
    alice, tablet = await topics.online(gateway, "alice"), await topics.online(gateway, "alice", "tablet")
    bob, carol = await topics.online(gateway, "bob"), await topics.online(gateway, "carol")
    await follow(alice, "post.42.likes", "post.42.>", "post.>")
    await follow(bob, "post.42.>")
    await follow(carol, "post.42", "post.43.>")
    assert await followed(tablet) == ["post.42.>", "post.42.likes", "post.>"]
    await bob.leave()
    both = await topics.publish_topic("post.42.likes", "alice", "bob", count=3)
    (own,) = await topics.publish_topic("post.42", "alice", "carol")
    (none,) = await topics.publish_topic("video.1")
    (deep,) = await topics.publish_topic("post.43.likes.7", "alice", "carol")
    for device in (alice, tablet):
        await device.expect(*both, own, deep)
    await carol.expect(own, deep)
    await bob.connect()
    await bob.expect(*both)
    for user in ("alice", "bob", "carol"):
        await topics.stored(user, *topics.ledger.accepted[user])
        assert sorted(await stored_ids(topics.store, user)) == sorted(topics.ledger.accepted[user])
    assert [item["n"]["id"] for item in alice.items if item["n"]["topic"] == "post.42.likes"] == both
    assert none not in [*alice.ids, *bob.ids, *carol.ids]
    for device in (alice, tablet, bob, carol):
        assert len(device.ids) == len(set(device.ids))


async def test_in_force_with_the_answer(topics: Mesh) -> None:
    """What is accepted after the `ok` arrives, and what is accepted after the `ok` to `unsub` does not; raced."""
    gateway = await topics.gateway()
    await topics.fanout()
    devices = [await topics.online(gateway, f"user{number}") for number in range(8)]

    async def race(device: Device, user: str) -> None:
        for turn in range(15):
            topic = f"race.{user}.{turn}"
            await follow(device, topic)
            await device.expect(*await topics.publish_topic(topic, user))
            assert (await device.ask("unsub", topics=[topic]))["t"] == "ok"
            await topics.publish_topic(topic)

    await asyncio.gather(*(race(device, f"user{number}") for number, device in enumerate(devices)))
    async with asyncio.timeout(PATIENCE_S):
        while (await topics.connection.api("CONSUMER.INFO.TOPICS.fanout"))["num_ack_pending"]:
            await asyncio.sleep(0.02)
    for device in devices:
        await follow(device, "the.end")
    await topics.publish_topic("the.end", *(f"user{number}" for number in range(8)))
    for number, device in enumerate(devices):
        accepted = topics.ledger.accepted[f"user{number}"]
        await device.expect(*accepted)
        assert sorted(device.ids) == sorted(accepted)


async def test_subscriptions_are_the_users(topics: Mesh) -> None:
    """They survive the devices, the gateway and the fan-out agent, and belong to nobody else."""
    gateway = await topics.gateway(linger_s=0)
    phone = await topics.online(gateway, "alice")
    await follow(phone, *(f"topic.{number:04}" for number in range(500)))
    await follow(phone, *(f"topic.{number:04}" for number in range(400, 700)))
    await phone.leave()
    await gateway.kill_agent()
    other = await topics.gateway()
    laptop = await topics.online(other, "alice", "laptop")
    page = await laptop.ask("subs")
    assert page["topics"] == [f"topic.{number:04}" for number in range(500)]
    rest = await laptop.ask("subs", after=page["next"])
    assert (rest["topics"], rest["next"]) == ([f"topic.{number:04}" for number in range(500, 700)], None)
    assert (await laptop.ask("subs", after="topic.0698"))["topics"] == ["topic.0699"]
    bob = await topics.online(other, "bob")
    assert await followed(bob) == []
    assert (await laptop.ask("unsub", topics=["topic.0000", "never"]))["t"] == "ok"
    assert (await laptop.ask("subs", limit=1))["topics"] == ["topic.0001"]


BAD: list[tuple[Any, str]] = [
    ([], "bad_frame"),
    ("post", "bad_frame"),
    ([5], "bad_frame"),
    (["t"] * 501, "bad_frame"),
    ([""], "bad_topic"),
    (["a..b"], "bad_topic"),
    ([".a"], "bad_topic"),
    ([">"], "bad_topic"),
    (["*"], "bad_topic"),
    (["a.*.b"], "bad_topic"),
    (["a.>.b"], "bad_topic"),
    (["a\0"], "bad_topic"),
    (["x" * (MAX_TOPIC + 1)], "topic_too_long"),
    ([".".join("x" * (MAX_LEVELS + 1))], "topic_too_deep"),
    (["good", "user.bob.>"], "not_allowed"),
    (["user.>"], "not_allowed"),
    (["admin.alarms"], "not_allowed"),
    (["team.>"], "not_allowed"),
]


async def test_what_is_refused(mesh: Mesh) -> None:
    """Each with its code, all of the list or none; the connection goes on."""
    gateway = await mesh.gateway(subscribe_rules="!admin.>, !team.secret.>, post.>, team.>, good", subscriptions_max=4)
    alice = await mesh.online(gateway, "alice")
    for listed, code in BAD:
        answer = await alice.ask("sub", topics=listed)
        assert (answer["t"], answer.get("code")) == ("error", code), listed
    await follow(alice, "user.alice.>", "team.open.>", "post.1")
    answer = await alice.ask("sub", topics=["post.2", "post.3"])
    assert (answer["t"], answer["code"]) == ("error", "too_many_subscriptions")
    await follow(alice, "post.2", "post.1")
    assert await followed(alice) == ["post.1", "post.2", "team.open.>", "user.alice.>"]


async def test_what_cannot_be_copied(topics: Mesh) -> None:
    """What is no notification, or on no topic, is a dead letter with its reason; what comes behind arrives."""
    gateway = await topics.gateway()
    alice = await topics.online(gateway, "alice")
    await follow(alice, "post.>")
    good = b'{"specversion":"1.0","id":"i","source":"s","type":"t"}'
    bad = {"notify.topic.post.1": b"nonsense", "notify.topic.post.%3E": good, "notify.topic.post.al%69ce": good}
    for where, body in bad.items():
        await topics.connection.store(where, body)
    (id,) = await topics.publish_topic("post.1", "alice")
    await alice.expect(id)
    async with asyncio.timeout(PATIENCE_S):
        while len(letters := await topics.dead_letters()) < len(bad):
            await asyncio.sleep(0.02)
    assert {letter["tidings-origin-subject"]: letter["body"] for letter in letters} == bad
    reasons = {letter["tidings-origin-subject"]: letter["tidings-reason"] for letter in letters}
    assert list(reasons.values()).count("bad_topic") == 2
    assert reasons["notify.topic.post.1"] == "invalid_notification"
    assert alice.ids == [id]


async def test_any_client_may_publish(mesh: Mesh) -> None:
    """Without the topic in the event the copy gets it; odd names and odd users are escaped and come back."""
    gateway, _, _ = await mesh.gateway(), await mesh.inbox(), await mesh.fanout()
    name, topic = "anna.von@example.org with blanks", "Straße.a b.>x"
    device = await mesh.online(gateway, name)
    await follow(device, topic)
    id, body = build(type="test.made", id="plain")
    js = mesh.connection.jetstream()
    for _ in range(2):
        await js.publish(subject.notify_topic(topic), body, headers={"Nats-Msg-Id": id})
    await device.expect(id)
    assert device.items[0]["n"]["topic"] == topic
    async with Publisher(mesh.connection) as publisher:
        receipt = await publisher.publish_topic(topic, "test.made", id="sdk")
        assert (receipt.stream, receipt.duplicate) == ("TOPICS", False)
        assert (await publisher.publish_topic(topic, "test.made", id="sdk")).duplicate
        assert not (await publisher.publish_topic("another", "test.made", id="sdk")).duplicate
    await device.expect("sdk")
    await mesh.stored(name, "plain", "sdk")
    answer = await device.ask("inbox", topic=topic)
    assert [item["n"]["id"] for item in answer["items"]] == ["sdk", "plain"]
    assert device.ids == ["plain", "sdk"]


async def test_python_client(mesh: Mesh) -> None:
    """The client follows, lists and lets go; what is refused is an error with its code."""
    gateway, _ = await mesh.gateway(subscribe_rules="post.>"), await mesh.fanout()
    async with Client(gateway.url, issue(KEY, "alice", "phone")) as client:
        await client.subscribe(*(f"post.{number:04}" for number in range(500)))
        await client.subscribe(*(f"post.{number:04}" for number in range(500, 510)), "post.0509.>")
        expected = [*(f"post.{number:04}" for number in range(510)), "post.0509.>"]
        assert [topic async for topic in client.subscriptions()] == expected
        await client.unsubscribe("post.0000")
        assert [topic async for topic in client.subscriptions()] == expected[1:]
        with pytest.raises(RequestRefused) as refused:
            await client.subscribe("video.1")
        assert (refused.value.code, refused.value.retry) == ("not_allowed", False)
        await mesh.publish_topic("post.0001")
        async for notification in client:
            assert notification.topic == "post.0001"
            break
