"""What a real gateway sends is what `schemas/asyncapi.yaml` says."""

from __future__ import annotations

from support import asyncapi
from support.mesh import KEY, Mesh
from tidings.identity import issue


async def test_every_frame_is_documented(mesh: Mesh) -> None:
    """A conversation with every kind of frame: each answer is the documented one, and nothing else was sent."""
    gateway, _, _ = await mesh.gateway(linger_s=0, catchup_cap=2), await mesh.inbox(), await mesh.fanout()
    phone, laptop = await mesh.online(gateway, "alice"), await mesh.online(gateway, "alice", "laptop")
    expected = {
        "sub": ("ok", {"topics": ["post.42", "team.7.>"]}),
        "subs": ("okTopics", {}),
        "unsub": ("ok", {"topics": ["team.7.>"]}),
        "count": ("okCount", {}),
        "token": ("okToken", {"token": issue(KEY, "alice", "phone")}),
        "inbox": ("okPage", {"limit": 10}),
    }
    for kind, (answer, members) in expected.items():
        assert asyncapi.accepts(await phone.ask(kind, **members), *asyncapi.SERVER) == [answer], kind
    sent = [*(await mesh.publish("alice", 2)), *(await mesh.publish_topic("post.42", "alice"))]
    for device in (phone, laptop):
        await device.expect(*sent)
    await mesh.stored("alice", *sent)
    marked = await phone.ask("mark", **{"as": "read", "pos": [phone.items[0]["pos"]]})
    assert asyncapi.accepts(marked, *asyncapi.SERVER) == ["ok"]
    await laptop.expect_frame("state", **{"as": "read"})
    page = await phone.ask("inbox")
    assert {item["n"]["id"] for item in page["items"]} == set(sent)
    everything = await phone.ask("mark", **{"as": "seen", "pos": "all"})
    assert asyncapi.accepts(everything, *asyncapi.SERVER) == ["okMarkAll"]
    await laptop.expect_frame("state", pos="all")
    refused = await phone.ask("inbox", before="nonsense")
    assert asyncapi.accepts(refused, *asyncapi.SERVER) == ["error"]
    await phone.send({"t": "ping"})
    await phone.expect_frame("pong")
    await laptop.leave()
    await mesh.stored("alice", *await mesh.publish("alice", 5))
    await mesh.floors_announced()
    await laptop.connect()
    await laptop.expect_frame("gap")
    await gateway.stop()
    for device in (phone, laptop):
        await device.expect_frame("bye")
    frames = [*phone.frames, *laptop.frames]
    seen = [asyncapi.accepts(frame, *asyncapi.SERVER) for frame in frames]
    for frame, found in zip(frames, seen, strict=True):
        assert len(found) == 1, (frame, found)
    assert {name for (name,) in seen} == set(asyncapi.SERVER)
