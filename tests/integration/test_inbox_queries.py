"""The inbox over the WebSocket, on both stores: pages, filters, badge, marks, and what is refused."""

from __future__ import annotations

from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import pytest

from support.clock import PATIENCE_S
from support.device import Device
from support.mesh import Agent, Mesh, running_mesh
from tidings.wire import subject
from tidings.wire.notification import build

TYPES = ("post.liked", "post.made")
TOPICS = (None, "post.1", "post.2")
UNREAD_CAP = 100


class Inboxes:
    """A mesh with two gateways and an inbox agent."""

    def __init__(self, mesh: Mesh, gateways: tuple[Agent, Agent]) -> None:
        self.mesh = mesh
        self.gateways = gateways

    async def online(self, device: str = "phone", gateway: int = 0, **options: Any) -> Device:
        return await self.mesh.online(self.gateways[gateway], "alice", device, **options)

    async def publish(self, *names: str) -> None:
        """Publish, and wait until the inbox has them; `kind_of` says their type and topic."""
        for name in names:
            type_, topic = kind_of(name)
            id, body = build(type=type_, topic=topic, id=name)
            await self.mesh.connection.store(subject.notify_user("alice"), body, {"Nats-Msg-Id": id})
        await self.mesh.stored("alice", *names)


def kind_of(name: str) -> tuple[str, str | None]:
    number = int(name[1:])
    return TYPES[number % 2], TOPICS[number % 3]


def numbered(count: int, first: int = 0) -> list[str]:
    return [f"n{number}" for number in range(first, first + count)]


@pytest.fixture
async def inboxes(store_url: str, tmp_path: Path) -> AsyncIterator[Inboxes]:
    async with running_mesh(tmp_path, store_url=store_url, store_timeout_s=PATIENCE_S) as mesh:
        await mesh.inbox()
        # Many more pages than anybody looks at in that time.
        unlimited = {"client_frames_per_s": 10_000, "client_frames_burst": 100_000}
        yield Inboxes(mesh, (await mesh.gateway(**unlimited), await mesh.gateway(**unlimited)))


async def page(device: Device, **query: Any) -> tuple[list[dict[str, Any]], str | None]:
    answer = await device.ask("inbox", **query)
    assert answer["t"] == "ok", answer
    return answer["items"], answer["next"]


async def names(device: Device, **query: Any) -> list[str]:
    """Everything that the query asks for, page after page."""
    found: list[str] = []
    way = "after" if "after" in query else "before"
    while True:
        items, following = await page(device, **query)
        assert len(items) <= query.get("limit", 50)
        found += [item["n"]["id"] for item in items]
        if following is None:
            return found
        query[way] = following


async def test_pages_both_ways(inboxes: Inboxes) -> None:
    """Newest first to the end and back again, each once, while new ones arrive."""
    await inboxes.publish(*numbered(23))
    device = await inboxes.online()
    newest, following = await page(device, limit=5)
    assert [item["n"]["id"] for item in newest] == numbered(23)[:-6:-1]
    await inboxes.publish(*numbered(4, 23))
    assert await names(device, limit=5, before=following) == numbered(18)[::-1]
    oldest = (await page(device, limit=200))[0][-1]["pos"]
    assert await names(device, limit=4, after=oldest) == numbered(26, 1)
    assert await names(device, limit=4, after=newest[0]["pos"]) == numbered(4, 23)
    assert await names(device, limit=27) == numbered(27)[::-1]


async def test_filters(inboxes: Inboxes) -> None:
    """By mark, type and topic, alone and together."""
    await inboxes.publish(*numbered(30))
    device = await inboxes.online(auto_ack=False)
    at = {item["n"]["id"]: item["pos"] for item in (await page(device))[0]}
    for as_, marked in (("read", numbered(6)), ("archived", numbered(6, 6)), ("seen", numbered(6, 12))):
        assert (await device.ask("mark", **{"as": as_, "pos": [at[name] for name in marked]}))["t"] == "ok"
    everything = numbered(30)
    wanted = {
        "all": everything[:6] + everything[12:],
        "unread": everything[12:],
        "archived": everything[6:12],
    }
    for filter, of_filter in wanted.items():
        assert await names(device, filter=filter, limit=7) == of_filter[::-1]
        for type_ in (None, *TYPES, "no.such"):
            for topic in (*TOPICS, "post"):
                query = {name: value for name, value in (("type", type_), ("topic", topic)) if value is not None}
                expected = [
                    name
                    for name in of_filter
                    if type_ in (None, kind_of(name)[0]) and topic in (None, kind_of(name)[1])
                ]
                assert await names(device, filter=filter, limit=3, **query) == expected[::-1], query
    marks = {item["n"]["id"]: (item["seen"], item["read"]) for item in (await page(device))[0]}
    assert (marks["n0"], marks["n12"], marks["n29"]) == ((True, True), (True, False), (False, False))


async def test_delivered(inboxes: Inboxes) -> None:
    """Once a device has acknowledged it the item says when, where and at which attempt; before it says nothing."""
    phone = await inboxes.online(auto_ack=False)
    await inboxes.publish("n0", "n1")
    await phone.expect("n0", "n1")
    await phone.ack(next(item["pos"] for item in phone.items if item["n"]["id"] == "n1"))
    found: dict[str, Any] = {}

    async def noted() -> object:
        found.update({item["n"]["id"]: item.get("delivered") for item in (await page(phone))[0]})
        return found["n1"]

    while not await noted():
        pass
    assert found["n0"] is None
    assert (found["n1"]["device"], found["n1"]["try"]) == ("phone", 1)


async def test_badge(inboxes: Inboxes) -> None:
    """Exact to 99, then 100 for more; all read is none, and the next one is one."""
    device = await inboxes.online()
    await inboxes.publish(*numbered(99))
    assert (await device.ask("count"))["unread"] == 99
    for name in ("n99", "n100"):
        await inboxes.publish(name)
        assert (await device.ask("count"))["unread"] == UNREAD_CAP
    assert (await device.ask("mark", **{"as": "read", "pos": "all"}))["t"] == "ok"
    await device.expect_frame("count", unread=0)
    assert await names(device, filter="unread") == []
    await inboxes.publish("n101")
    assert (await device.ask("count"))["unread"] == 1
    assert (await device.ask("mark", **{"as": "archived", "pos": "all"}))["t"] == "ok"
    assert await names(device) == []
    assert await names(device, filter="archived") == numbered(102)[::-1]
    assert (await device.ask("count"))["unread"] == 0


async def test_other_devices_are_told(inboxes: Inboxes) -> None:
    """A mark shows on every other device of the user, on whichever gateway; the badge on all."""
    asking = await inboxes.online()
    others = [await inboxes.online("laptop"), await inboxes.online("watch", gateway=1)]
    await inboxes.publish("n0", "n1", "n2")
    await asking.expect("n0", "n1", "n2")
    one = next(item["pos"] for item in asking.items if item["n"]["id"] == "n1")
    assert (await asking.ask("mark", **{"as": "read", "pos": [one]}))["t"] == "ok"
    for device in others:
        assert (await device.expect_frame("state"))["pos"] == [one]
    for device in (asking, *others):
        await device.expect_frame("count", unread=2)
    done = await asking.ask("mark", **{"as": "seen", "pos": "all"})
    for device in others:
        state = await device.expect_frame("state", **{"as": "seen"})
        assert state["upto"] == done["upto"]
    assert not any(frame["t"] == "state" for frame in asking.frames)


async def test_bad_queries(inboxes: Inboxes) -> None:
    """Each is answered with its code and what is wrong; the connection goes on."""
    device = await inboxes.online()
    queries: list[tuple[dict[str, Any], str]] = [
        ({"limit": 0}, "bad_frame"),
        ({"limit": 201}, "bad_frame"),
        ({"limit": "5"}, "bad_frame"),
        ({"filter": "starred"}, "bad_frame"),
        ({"before": "nonsense"}, "bad_position"),
        ({"after": "1"}, "bad_position"),
        ({"type": ""}, "bad_frame"),
        ({"topic": 5}, "bad_frame"),
    ]
    for query, code in queries:
        answer = await device.ask("inbox", **query)
        assert (answer["t"], answer["code"]) == ("error", code), query
        assert next(iter(query)) in answer["message"] or code == "bad_position", answer
    assert await names(device) == []


async def test_bad_combinations(inboxes: Inboxes) -> None:
    """Both directions at once, and marks of what nobody has: refused, nothing changes, the connection goes on."""
    device = await inboxes.online()
    await inboxes.publish("n0")
    await device.expect("n0")
    here = device.items[0]["pos"]
    answer = await device.ask("inbox", before=here, after=here)
    assert answer["t"] == "error"
    incarnation, _, sequence = here.rpartition(".")
    later = f"{incarnation}.{int(sequence) + 1_000_000}"
    for as_, pos, code in (
        ("read", [later], "bad_position"),
        ("unread", "all", "bad_frame"),
        ("loved", [here], "bad_frame"),
        ("read", here, "bad_frame"),
    ):
        answer = await device.ask("mark", **{"as": as_, "pos": pos})
        assert (answer["t"], answer.get("code")) == ("error", code), (as_, pos)
    assert (await device.ask("count"))["unread"] == 1


async def test_mark_before_it_is_stored(tmp_path: Path) -> None:
    """A user reads within the inbox agent's lag: the mark waits for its notification."""
    async with running_mesh(tmp_path) as mesh:
        gateway = await mesh.gateway()
        device = await mesh.online(gateway, "alice")
        sent = await mesh.publish("alice", 2)
        await device.expect(*sent)
        assert (await device.ask("mark", **{"as": "read", "pos": [device.items[0]["pos"]]}))["t"] == "ok"
        await mesh.inbox()
        await mesh.stored("alice", *sent)
        assert await names(device, filter="unread") == [device.items[1]["n"]["id"]]
