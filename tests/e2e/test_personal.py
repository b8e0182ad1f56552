"""The personal path with real processes: publish, deliver, acknowledge, catch up."""

from __future__ import annotations

import asyncio

import orjson
import pytest

from support.mesh import KEY, Mesh
from tidings.identity import issue
from tidings.wire import subject
from tidings.wire.position import Position


async def test_publish_to_online(mesh: Mesh) -> None:
    """What any NATS client publishes arrives at the device as the bytes that were sent, and in the inbox."""
    gateway, _ = await mesh.gateway(), await mesh.inbox()
    alice = await mesh.online(gateway, "alice")
    body = b'{"specversion":"1.0","id":"first","source":"shop","type":"order.sent","data":{"n": 1.50}}'
    await mesh.connection.jetstream().publish("notify.user.alice", body)
    await alice.expect("first")
    item = alice.items[0]
    assert item["try"] == 1
    assert item["n"] == orjson.loads(body)
    assert await mesh.dead_letters() == []
    await mesh.stored("alice", "first")


async def test_first_ever_device_starts_from_now(mesh: Mesh) -> None:
    """A new device gets its unread count and what comes from now on, not the past."""
    gateway, _ = await mesh.gateway(), await mesh.inbox()
    past = await mesh.publish("alice", 5)
    await mesh.stored("alice", *past)
    alice = await mesh.online(gateway, "alice")
    assert alice.welcome["unread"] == 5
    new = await mesh.publish("alice")
    await alice.expect(*new)
    assert alice.ids == new


async def test_offline_within_the_linger(mesh: Mesh) -> None:
    """A device that is cut and comes back takes its session over, with all that came meanwhile, once."""
    gateway, _ = await mesh.gateway(linger_s=30), await mesh.inbox()
    alice = await mesh.online(gateway, "alice")
    before = await mesh.publish("alice", 3)
    await alice.expect(*before)
    session = alice.welcome["session"]
    await alice.cut()
    meanwhile = await mesh.publish("alice", 5)
    await alice.connect()
    assert alice.welcome["session"] == session
    await alice.expect(*meanwhile)
    mesh.ledger.check_device("alice", "phone", alice.ids, most_copies=1)


async def test_offline_past_the_linger(mesh: Mesh) -> None:
    """A device that comes back later gets what it missed from the inbox, in order, then what is live."""
    gateway, _ = await mesh.gateway(linger_s=0), await mesh.inbox()
    alice = await mesh.online(gateway, "alice")
    await alice.expect(*await mesh.publish("alice", 3))
    session = alice.welcome["session"]
    await alice.leave()
    missed = await mesh.publish("alice", 100)
    await mesh.stored("alice", *missed)
    await mesh.floors_announced()
    await alice.connect()
    assert alice.welcome["session"] != session
    live = await mesh.publish("alice", 3)
    await alice.expect(*missed, *live)
    mesh.ledger.check_device("alice", "phone", alice.ids, most_copies=1)
    assert alice.ids == mesh.ledger.accepted["alice"]


async def test_offline_past_the_stream(mesh: Mesh) -> None:
    """What the stream has forgotten comes from the inbox."""
    gateway, _ = await mesh.gateway(linger_s=0), await mesh.inbox()
    alice = await mesh.online(gateway, "alice")
    await alice.expect(*await mesh.publish("alice"))
    await alice.leave()
    missed = await mesh.publish("alice", 10)
    await mesh.stored("alice", *missed)
    await mesh.floors_announced()
    for partition in range(mesh.settings.partitions):
        await mesh.connection.api(f"STREAM.PURGE.NOTIFY_{partition}")
    await alice.connect()
    await alice.expect(*missed, *await mesh.publish("alice"))
    assert alice.ids == mesh.ledger.accepted["alice"]


async def test_inbox_agent_stopped_while_a_device_is_away(mesh: Mesh) -> None:
    """The inbox agent lags: what it has not stored comes from the stream, without a hole or a copy."""
    gateway, inbox = await mesh.gateway(linger_s=0), await mesh.inbox()
    alice = await mesh.online(gateway, "alice")
    await alice.expect(*await mesh.publish("alice"))
    await alice.leave()
    await mesh.stored("alice", *await mesh.publish("alice", 5))
    await mesh.floors_announced()
    await inbox.stop()
    await mesh.publish("alice", 5)
    await alice.connect()
    await alice.expect(*mesh.ledger.accepted["alice"])
    assert alice.ids == mesh.ledger.accepted["alice"]
    await mesh.inbox()
    await mesh.stored("alice", *mesh.ledger.accepted["alice"])
    await mesh.ledger.check_store(mesh.store)


async def test_since_ahead_of_and_behind_the_cursor(mesh: Mesh) -> None:
    """`since` raises the cursor; one that is behind, foreign or of the future changes nothing."""
    gateway, _ = await mesh.gateway(linger_s=0), await mesh.inbox()
    alice = await mesh.online(gateway, "alice", auto_ack=False)
    sent = await mesh.publish("alice", 6)
    await alice.expect(*sent)
    positions = [item["pos"] for item in alice.items]
    await alice.leave()
    alice.items.clear()
    await alice.connect(since=positions[3])
    assert alice.welcome["pos"] == positions[3]
    await alice.expect(*sent[4:])
    assert alice.ids == sent[4:]
    await alice.ack(positions[4], positions[5])
    await alice.ask("count")
    await alice.leave()
    alice.items.clear()
    future = Position.parse(positions[5])._replace(sequence=10**9)
    for since in (positions[0], "from another mesh", str(future), str(future._replace(incarnation=2**47))):
        await alice.connect(since=since)
        assert alice.welcome["pos"] == positions[5]
        new = await mesh.publish("alice")
        await alice.expect(*new)
        positions[5] = alice.items[-1]["pos"]
        await alice.ack(positions[5])
        await alice.ask("count")
        await alice.leave()
    assert len(alice.ids) == 4


async def test_two_devices_have_independent_positions(mesh: Mesh) -> None:
    """What one device acknowledges, the other one still gets."""
    gateway, _ = await mesh.gateway(linger_s=0), await mesh.inbox()
    phone = await mesh.online(gateway, "alice", "phone")
    laptop = await mesh.online(gateway, "alice", "laptop")
    await laptop.leave()
    sent = await mesh.publish("alice", 4)
    await phone.expect(*sent)
    await laptop.connect()
    await laptop.expect(*sent)
    assert phone.ids == laptop.ids == sent


async def test_no_ack_is_redelivered_and_then_a_dead_letter(mesh: Mesh) -> None:
    """An unacknowledged notification comes again with its count, and after `max_deliver` is a dead letter."""
    gateway, _ = await mesh.gateway(max_deliver=2, ack_wait_s=0.5), await mesh.inbox()
    alice = await mesh.online(gateway, "alice", auto_ack=False)
    (id,) = await mesh.publish("alice")
    await alice.until(lambda: [item["try"] for item in alice.items] == [1, 2], "try 1 and 2")
    await gateway.said("is a dead letter now")
    (letter,) = await mesh.dead_letters()
    assert letter["tidings-reason"] == "undelivered"
    assert letter["tidings-attempts"] == "2"
    assert orjson.loads(letter["body"])["id"] == id
    # The plane goes on behind it, and the inbox keeps it.
    alice.auto_ack = True
    await alice.expect(*await mesh.publish("alice"))
    assert len(alice.items) == 3
    await mesh.stored("alice", id)


async def test_attempts_are_counted_over_sessions(mesh: Mesh) -> None:
    """A client that dies of a notification meets it with a growing count, wherever it comes back."""
    gateway, _ = await mesh.gateway(linger_s=0, max_deliver=3, ack_wait_s=30), await mesh.inbox()
    alice = await mesh.online(gateway, "alice", auto_ack=False)
    (id,) = await mesh.publish("alice")
    for attempt in (1, 2, 3):
        await alice.until(lambda attempt=attempt: alice.items and alice.items[-1]["try"] == attempt, f"try {attempt}")
        await alice.cut()
        await alice.connect()
    await gateway.said("is a dead letter now")
    assert alice.ids == [id] * 3


async def test_window_holds_back(mesh: Mesh) -> None:
    """No more than the window is under way; each ack lets one more come."""
    gateway, _ = await mesh.gateway(ack_wait_s=30), await mesh.inbox()
    alice = await mesh.online(gateway, "alice", auto_ack=False, window=4)
    assert alice.welcome["window"] == 4
    sent = await mesh.publish("alice", 10)
    await alice.expect(*sent[:4])
    await alice.ask("count")
    assert alice.ids == sent[:4]
    await alice.ack(alice.items[1]["pos"])
    await alice.expect(sent[4])
    await alice.send({"t": "ack", "upto": alice.items[4]["pos"]})
    await alice.expect(*sent[5:9])
    await alice.ask("count")
    assert alice.ids == sent[:9]


async def test_full_window_is_redelivered(mesh: Mesh) -> None:
    """With the window full of unacknowledged notifications, they still come again."""
    gateway, _ = await mesh.gateway(ack_wait_s=0.5), await mesh.inbox()
    alice = await mesh.online(gateway, "alice", auto_ack=False, window=3)
    sent = await mesh.publish("alice", 5)
    await alice.until(lambda: [item["try"] for item in alice.items[:6]] == [1, 1, 1, 2, 2, 2], "each of three twice")
    assert set(alice.ids) == set(sent[:3])


async def test_window_counts_the_inbox_part(mesh: Mesh) -> None:
    """While a catch-up is unacknowledged, stream and inbox together stay within the window."""
    gateway, _ = await mesh.gateway(linger_s=0, ack_wait_s=30), await mesh.inbox()
    alice = await mesh.online(gateway, "alice", auto_ack=False, window=4)
    await alice.leave()
    missed = await mesh.publish("alice", 6)
    await mesh.stored("alice", *missed)
    await mesh.floors_announced()
    await alice.connect()
    live = await mesh.publish("alice", 6)
    await alice.expect(*missed[:4])
    await alice.ask("count")
    assert alice.ids == missed[:4]
    alice.auto_ack = True
    await alice.ack(*(item["pos"] for item in alice.items))
    await alice.expect(*live)
    assert alice.ids == [*missed, *live]


async def test_gap_past_the_cap(mesh: Mesh) -> None:
    """More missed than the cap is announced with its count, again and again until the client has noted it."""
    gateway, _ = await mesh.gateway(linger_s=0, catchup_cap=20), await mesh.inbox()
    alice = await mesh.online(gateway, "alice")
    await alice.leave()
    missed = await mesh.publish("alice", 21)
    await mesh.stored("alice", *missed)
    await mesh.floors_announced()
    await alice.connect()
    gap = await alice.expect_frame("gap", missed=21)
    live = await mesh.publish("alice", 2)
    await alice.expect(*live)
    assert alice.ids == live
    await alice.cut()
    await mesh.stored("alice", *live)
    await mesh.floors_announced()
    alice.frames.clear()
    await alice.connect()
    gap = await alice.expect_frame("gap", missed=23)
    page = await alice.ask("inbox", limit=200)
    assert len(page["items"]) == 23
    await alice.send({"t": "ack", "upto": gap["pos"]})
    await alice.ask("count")
    await alice.leave()
    alice.frames.clear()
    await alice.connect()
    await alice.ask("count")
    assert not [frame for frame in alice.frames if frame["t"] == "gap"]


async def test_publisher_retries_the_same_id(mesh: Mesh) -> None:
    """One id is one notification: by JetStream within its window, by the gateway's memory past it."""
    gateway, _ = await mesh.gateway(), await mesh.inbox()
    alice = await mesh.online(gateway, "alice")
    js = mesh.connection.jetstream()
    body = b'{"specversion":"1.0","id":"once","source":"s","type":"t"}'
    first = await js.publish("notify.user.alice", body, headers={"Nats-Msg-Id": "once"})
    again = await js.publish("notify.user.alice", body, headers={"Nats-Msg-Id": "once"})
    assert again.duplicate
    assert again.seq == first.seq
    await js.publish("notify.user.alice", body)
    last = await mesh.publish("alice")
    await alice.expect("once", *last)
    assert alice.ids == ["once", *last]


@pytest.mark.parametrize(
    "user",
    [
        "alice@example.com",
        "a b",
        "*",
        ">",
        "a.b.>",
        "%",
        "ünï-çødé 😀",
        "用户",
        "$SYS",
        "x" * 200,
        "😀" * 200,
        "a\tb\n",
    ],
)
async def test_odd_user_ids(mesh: Mesh, user: str) -> None:
    """Any text of 1 to 200 characters is a user id, and nobody else's notifications come with it."""
    gateway, _ = await mesh.gateway(), await mesh.inbox()
    odd, other = await mesh.online(gateway, user), await mesh.online(gateway, "other")
    assert odd.welcome["user"] == user
    sent = await mesh.publish(user, 2)
    await odd.expect(*sent)
    await mesh.stored(user, *sent)
    marker = await mesh.publish("other")
    await other.expect(*marker)
    assert other.ids == marker


async def test_refused_identities(mesh: Mesh) -> None:
    """No token, an expired, forged or foreign one, an empty user, another device: each closes with its code."""
    gateway = await mesh.gateway()
    import jwt

    wrong = {
        "": 4401,
        "no token at all": 4401,
        issue("another-key-of-at-least-32-characters!!", "alice"): 4401,
        issue(KEY, "alice", ttl_s=-60): 4401,
        jwt.encode({"sub": "", "exp": 2**31}, KEY, algorithm="HS256"): 4401,
        jwt.encode({"sub": "alice", "exp": 2**31}, "", algorithm="none"): 4401,
        issue(KEY, "alice", "laptop"): 4403,
    }
    for token, code in wrong.items():
        device = await mesh.device(gateway, "alice")
        await device.connect(token=token or None, device="phone")
        assert await device.closed() == code, token


async def test_positions_do_not_follow_clocks(mesh: Mesh) -> None:
    """Order is the stream's, whatever time the publisher claims; a position of the same message never changes."""
    gateway, _ = await mesh.gateway(linger_s=0), await mesh.inbox()
    alice = await mesh.online(gateway, "alice")
    times = ["2031-01-01T00:00:00Z", "1999-12-31T23:59:59Z", "2026-06-01T12:00:00+02:00"]
    for number, time in enumerate(times):
        body = {"specversion": "1.0", "id": f"t{number}", "source": "s", "type": "t", "time": time}
        await mesh.connection.store(subject.notify_user("alice"), orjson.dumps(body))
    await alice.expect("t0", "t1", "t2")
    assert alice.ids == ["t0", "t1", "t2"]
    positions = [Position.parse(item["pos"]) for item in alice.items]
    assert positions == sorted(positions)
    await mesh.stored("alice", "t0", "t1", "t2")
    page = await alice.ask("inbox")
    assert [item["pos"] for item in page["items"]] == [str(position) for position in reversed(positions)]


async def test_inbox_verbs_and_frames_for_the_other_devices(mesh: Mesh) -> None:
    """Marks made on one device reach the others, on whichever gateway they are, and the badge is exact."""
    one, two, _ = await mesh.gateway(), await mesh.gateway(), await mesh.inbox()
    phone = await mesh.online(one, "alice", "phone")
    laptop = await mesh.online(two, "alice", "laptop")
    tablet = await mesh.online(one, "alice", "tablet")
    sent = await mesh.publish("alice", 5)
    await phone.expect(*sent)
    await mesh.stored("alice", *sent)
    positions = [item["pos"] for item in phone.items]
    assert (await phone.ask("mark", **{"as": "read", "pos": positions[:2]}))["t"] == "ok"
    for device in (phone, laptop, tablet):
        await device.expect_frame("count", unread=3)
    for device in (laptop, tablet):
        await device.expect_frame("state", pos=positions[:2], **{"as": "read"})
    assert (await laptop.ask("count"))["unread"] == 3
    assert (await laptop.ask("mark", **{"as": "archived", "pos": positions[4:]}))["t"] == "ok"
    unread = await tablet.ask("inbox", filter="unread", limit=1)
    assert [item["pos"] for item in unread["items"]] == [positions[3]]
    rest = await tablet.ask("inbox", filter="unread", limit=1, before=unread["next"])
    assert [item["pos"] for item in rest["items"]] == [positions[2]]
    assert rest["next"] is None
    archived = await tablet.ask("inbox", filter="archived")
    assert [(item["pos"], item["archived"]) for item in archived["items"]] == [(positions[4], True)]
    marked = await phone.ask("mark", **{"as": "read", "pos": "all"})
    assert marked["t"] == "ok"
    await laptop.expect_frame("count", unread=0)
    await laptop.expect_frame("state", pos="all", upto=marked["upto"], **{"as": "read"})


async def test_invalid_bodies_are_dead_letters_and_block_nobody(mesh: Mesh) -> None:
    """What is no notification goes to DEAD with the reason; what comes behind it arrives."""
    gateway, _ = await mesh.gateway(), await mesh.inbox()
    alice = await mesh.online(gateway, "alice")
    js = mesh.connection.jetstream()
    bad = [b"", b"\xff\xfe", b"[]", b"{}", b'{"specversion":"1.0","id":"","source":"s","type":"t"}', b"x" * 17_000]
    for body in bad:
        await js.publish("notify.user.alice", body)
    # Not the escape of its own meaning; in another partition, whose letter may come first.
    stray = b'{"specversion":"1.0","id":"i","source":"s","type":"t"}'
    await js.publish("notify.user.al%69ce", stray)
    good = await mesh.publish("alice")
    await alice.expect(*good)
    await mesh.stored("alice", *good)
    assert alice.ids == good

    async def all_dead() -> list[dict[str, object]]:
        async with asyncio.timeout(10):
            while len(letters := await mesh.dead_letters()) < len(bad) + 1:
                await asyncio.sleep(0.05)
        return letters

    letters = await all_dead()
    assert sorted(letter["body"] for letter in letters) == sorted([*bad, stray])
    assert all((letter["tidings-reason"] == "bad_subject") == (letter["body"] == stray) for letter in letters)


async def test_empty_user_is_refused() -> None:
    """Nobody can publish to nobody: the id is refused with a sentence."""
    with pytest.raises(Exception, match="user id is empty"):
        subject.notify_user("")
