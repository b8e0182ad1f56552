"""Dead letters: found in pages, looked at, replayed without loss and without copies, and dropped."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest

from support.clock import until
from support.command import Command, answer, tidings
from support.mesh import Mesh
from support.nats import RunningNats, running_nats
from tidings.stream import consumers, letters, records
from tidings.stream.connection import Connection
from tidings.stream.letters import Filter
from tidings.stream.topology import TOPICS
from tidings.wire import subject
from tidings.wire.errors import NoSuchLetter, ReplayRefused, StreamUnavailable
from tidings.wire.notification import build

MADE = datetime(2026, 1, 31, 12, tzinfo=UTC)


@pytest.fixture
async def nats(tmp_path: Path) -> AsyncIterator[RunningNats]:
    """A nats-server with the topology and nothing in it."""
    async with running_nats(tmp_path) as running:
        yield running


async def bury(nats: RunningNats, plane: str = "user", body: bytes = b"no event", **origin: str | int) -> int:
    """Make a dead letter as the agents do; returns its sequence."""
    before = await letters.newest(nats.connection)
    key = f"key.{before}"
    reason = str(origin.pop("reason", "undelivered"))
    await consumers.bury(nats.connection, plane, body, key=key, reason=reason, detail="for a test", **origin)
    return before + 1


def event(id: str = "like-1") -> bytes:
    return build(type="social.like", data={"text": "hi"}, id=id, time=MADE)[1]


async def count(nats: RunningNats, stream: str) -> int:
    state = (await nats.connection.api(f"STREAM.INFO.{stream}"))["state"]
    return int(state["messages"])


async def for_user(nats: RunningNats, user: str) -> int:
    """How many messages the log has for a user."""
    return len([entry async for entry in records.of_user(nats.connection, user)])


async def test_pages_both_ways(nats: RunningNats) -> None:
    """Newest first and oldest first, each letter once, and the end is known."""
    made = [await bury(nats, user="alice") for _ in range(7)]
    for after, expected in ((None, made[::-1]), (0, made)):
        found: list[int] = []
        place: int | None = after
        while True:
            where = {"before": place} if after is None else {"after": place}
            page = await letters.page(nats.connection, limit=3, **where)
            found += [letter.sequence for letter in page.letters]
            place = page.next
            if place is None:
                break
        assert found == expected
    assert (await letters.page(nats.connection, before=made[0])).letters == []
    assert (await letters.page(nats.connection, after=made[-1])).letters == []


async def test_no_letters(nats: RunningNats) -> None:
    """Of an empty stream a page is empty, and it is the last one."""
    assert await letters.page(nats.connection) == ([], None)
    assert await letters.page(nats.connection, after=0) == ([], None)
    assert [letter async for letter in letters.each(nats.connection)] == []


async def test_holes(nats: RunningNats) -> None:
    """Where many were taken out in a row, what lies before and behind them is found; a batch ends nothing."""
    first = await bury(nats, user="alice")
    for _ in range(600):
        await bury(nats, "topic")
    last = await bury(nats, user="alice")
    everything = [letter.sequence async for letter in letters.each(nats.connection)]
    assert everything == list(range(first, last + 1))
    of_alice = await letters.page(nats.connection, Filter(user="alice"))
    assert [letter.sequence for letter in of_alice.letters] == [last, first]
    await nats.connection.api("STREAM.PURGE.DEAD", {"filter": subject.dead("topic")})
    for where in ({}, {"after": 0}):
        page = await letters.page(nats.connection, **where)
        assert sorted(letter.sequence for letter in page.letters) == [first, last]
        assert page.next is None


async def test_filters(nats: RunningNats) -> None:
    """By plane, reason, user, topic and time: all that is given must apply."""
    of_user = await bury(nats, origin_subject=subject.part_user(subject.escape("zoë.b"), 3), reason="rows_refused")
    of_gateway = await bury(nats, user=subject.escape("zoë.b"), device="phone", attempts=10)
    of_topic = await bury(nats, "topic", origin_subject=subject.notify_topic("post.42"))
    of_broadcast = await bury(nats, "broadcast", origin_subject=subject.broadcast("post.42"))
    later = datetime.now(UTC) + timedelta(hours=1)
    for wanted, expected in (
        (Filter(user="zoë.b"), [of_user, of_gateway]),
        (Filter(user="zoë.b", reason="undelivered"), [of_gateway]),
        (Filter(topic="post.42"), [of_topic, of_broadcast]),
        (Filter(plane="topic"), [of_topic]),
        (Filter(since=later), []),
        (Filter(until=later, plane="user"), [of_user, of_gateway]),
        (Filter(user="post.42"), []),
    ):
        assert [letter.sequence async for letter in letters.each(nats.connection, wanted)] == expected, wanted
    letter = await letters.look(nats.connection, of_gateway)
    assert (letter.user, letter.device, letter.attempts, letter.body) == ("zoë.b", "phone", 10, b"no event")


async def test_replay_to_user(nats: RunningNats) -> None:
    """The original bytes go to the user again, and the letter is gone, which a repeat is told."""
    token = subject.escape("zoë.b")
    for origin in ({"origin_subject": subject.part_user(token, 3)}, {"user": token}):
        before = await for_user(nats, "zoë.b")
        sequence = await bury(nats, body=event(), **origin)
        replayed = await letters.replay(nats.connection, sequence)
        assert not replayed.duplicate
        assert (await nats.stored())[replayed.stream, replayed.sequence] == json.loads(event())
        assert await for_user(nats, "zoë.b") == before + 1
        with pytest.raises(NoSuchLetter):
            await letters.replay(nats.connection, sequence)
        assert await for_user(nats, "zoë.b") == before + 1


async def test_replay_to_topic(nats: RunningNats) -> None:
    """What was a topic's goes to the topic again, a broadcast too; what one device did not acknowledge, to its user."""
    for plane, where in (("topic", subject.notify_topic("post.42")), ("broadcast", subject.broadcast("post.42"))):
        sequence = await bury(nats, plane, event(), origin_subject=where)
        assert (await letters.replay(nats.connection, sequence)).stream == TOPICS
    assert await count(nats, TOPICS) == 2
    sequence = await bury(nats, "broadcast", event(), user="alice", device="phone")
    await letters.replay(nats.connection, sequence)
    assert (await count(nats, TOPICS), await for_user(nats, "alice")) == (2, 1)


@pytest.mark.parametrize(
    ("body", "origin"),
    [
        (b"no event", {"origin_subject": "part.3.user.alice"}),
        (event(), {"origin_subject": "part.3.user.%zz"}),
        (event(), {"origin_subject": "notify.topic.a.b.c.d.e.f.g.h.i"}),
        (event(), {}),
    ],
)
async def test_replay_refused(nats: RunningNats, body: bytes, origin: dict[str, str]) -> None:
    """What would come back at once, or came from nowhere, is refused and kept."""
    sequence = await bury(nats, body=body, **origin)
    with pytest.raises(ReplayRefused):
        await letters.replay(nats.connection, sequence)
    assert (await letters.look(nats.connection, sequence)).body == body
    assert await nats.stored() == {}


async def test_replay_that_died_half_way(nats: RunningNats, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whoever dies between the log's word and taking the letter out has lost nothing, and the repeat adds nothing."""
    sequence = await bury(nats, body=event(), user="alice")

    async def died(connection: Connection, sequence: int) -> bool:
        raise StreamUnavailable("died here")

    with monkeypatch.context() as patch:
        patch.setattr(letters, "discard", died)
        with pytest.raises(StreamUnavailable):
            await letters.replay(nats.connection, sequence)
    assert await for_user(nats, "alice") == 1
    assert (await letters.replay(nats.connection, sequence)).duplicate
    assert await for_user(nats, "alice") == 1
    with pytest.raises(NoSuchLetter):
        await letters.look(nats.connection, sequence)


async def test_replays_at_once(nats: RunningNats) -> None:
    """Several who replay the same letter at once publish it once."""
    sequence = await bury(nats, body=event(), user="alice")
    work = (letters.replay(nats.connection, sequence) for _ in range(5))
    results = await asyncio.gather(*work, return_exceptions=True)
    assert await for_user(nats, "alice") == 1
    done = [result for result in results if isinstance(result, letters.Replayed)]
    assert sum(not result.duplicate for result in done) == 1, results
    with pytest.raises(NoSuchLetter):
        await letters.look(nats.connection, sequence)


async def test_log_refuses(nats: RunningNats) -> None:
    """A log that does not take it: the letter is kept, and replayed when it does."""
    sequence = await bury(nats, body=event(), user="alice")
    number = subject.partition("alice", nats.settings.partitions)
    await nats.limit(number, max_msgs=1)
    await nats.connection.jetstream().publish(subject.notify_user("alice"), event("other"))
    with pytest.raises(StreamUnavailable):
        await letters.replay(nats.connection, sequence)
    assert (await letters.look(nats.connection, sequence)).sequence == sequence
    await nats.limit(number, max_msgs=-1)
    await letters.replay(nats.connection, sequence)
    assert await for_user(nats, "alice") == 2


async def test_drop(nats: RunningNats) -> None:
    """It is gone, and only it; dropping it again says so."""
    sequence, other = await bury(nats), await bury(nats)
    await letters.drop(nats.connection, sequence)
    with pytest.raises(NoSuchLetter):
        await letters.drop(nats.connection, sequence)
    assert [letter.sequence async for letter in letters.each(nats.connection)] == [other]


async def test_foreign_messages(nats: RunningNats) -> None:
    """What somebody else left in the stream is shown as far as it goes, and is never replayed to a guess."""
    await nats.connection.store("dead.user", event(), {"Tidings-Attempts": "many", "Tidings-User": "%zz"})
    await nats.connection.store("dead.user", b"")
    strange, empty = [letter async for letter in letters.each(nats.connection)]
    assert (strange.attempts, strange.user, strange.describe()["notification"]["id"]) == (0, None, "like-1")
    assert (empty.reason, empty.origin, empty.body, empty.describe()["base64"]) == ("unknown", None, b"", "")
    assert await letters.look(nats.connection, strange.sequence) == strange
    for letter in (strange, empty):
        with pytest.raises(ReplayRefused):
            await letters.replay(nats.connection, letter.sequence)
    for nowhere in (0, -1, 10**30):
        with pytest.raises(NoSuchLetter):
            await letters.look(nats.connection, nowhere)


async def deadletters(nats_url: str, *arguments: str) -> Command:
    return await answer("deadletters", *arguments, TIDINGS_NATS_URL=nats_url)


async def test_killed_half_way(nats: RunningNats) -> None:
    """A replay of many that is killed, and started again, brings each of them exactly once."""
    sent = [f"like-{number}" for number in range(400)]
    for id in sent:
        await bury(nats, body=event(id), user="alice")
    async with tidings("deadletters", "replay", "--all", "--json", TIDINGS_NATS_URL=nats.url) as command:
        await command.said('"id":2,')
        command.process.kill()
        await command.ended()
    left = await count(nats, "DEAD")
    assert 0 < left < len(sent)
    ran = await deadletters(nats.url, "replay", "--all")
    assert (ran.process.returncode, ran.out) == (0, [f"{left} replayed"])
    found = [entry["notification"]["id"] async for entry in records.of_user(nats.connection, "alice")]
    assert found == sent
    assert await count(nats, "DEAD") == 0


async def test_undelivered_comes_again(mesh: Mesh) -> None:
    """What no attempt brought to a device is brought to it by a replay, as the command line does it."""
    gateway, _ = await mesh.gateway(max_deliver=1, ack_wait_s=0.5), await mesh.inbox()
    phone = await mesh.online(gateway, "alice", auto_ack=False)
    (sent,) = await mesh.publish("alice")
    await phone.expect(sent)
    while not await mesh.dead_letters():
        pass
    url = mesh.settings.nats_url
    (entry,) = map(json.loads, (await deadletters(url, "list", "--json", "--user", "alice")).out)
    assert (entry["reason"], entry["device"], entry["attempts"]) == ("undelivered", "phone", 1)
    assert (entry["origin"].split(".")[2:], entry["sequence"]) == (["user", "alice"], 1)
    shown = json.loads((await deadletters(url, "show", str(entry["id"]), "--json")).out[0])
    assert shown["notification"]["id"] == sent
    phone.auto_ack = True
    ran = await deadletters(url, "replay", str(entry["id"]))
    assert (ran.process.returncode, ran.out) == (0, ["1 replayed"])
    await until(lambda: phone.ids.count(sent) == 2, "the replayed notification")
    again = await deadletters(url, "replay", str(entry["id"]))
    assert again.process.returncode == 1
    assert "there is no dead letter" in again.errors[0]


async def test_commands(nats: RunningNats) -> None:
    """Tables and JSON, filters and bounds, raw bytes, counts and exit statuses."""
    raw = b"\x00\xff\x1b[31m no event"
    broken = await bury(nats, body=raw, origin_subject="part.3.user.alice", reason="invalid_notification")
    good = [await bury(nats, body=event(f"like-{n}"), user="alice", device="phone") for n in range(3)]
    listed = await deadletters(nats.url, "list", "--limit", "2")
    assert [line.split()[0] for line in listed.out] == ["id", str(good[2]), str(good[1])]
    assert listed.errors == [f"more with --before {good[1]}"]
    oldest = await deadletters(nats.url, "list", "--after", "0", "--json")
    assert [json.loads(line)["id"] for line in oldest.out] == [broken, *good]
    shown = await deadletters(nats.url, "show", str(broken))
    assert "\x1b" not in "".join(shown.out)
    assert f"id        {broken}" in shown.out
    assert (await deadletters(nats.url, "show", str(broken), "--raw")).out == [raw.decode(errors="replace")]
    nothing = await deadletters(nats.url, "replay")
    assert (nothing.process.returncode, nothing.out) == (2, [])
    assert (await deadletters(nats.url, "drop", str(broken), "--all")).process.returncode == 2
    bounded = await deadletters(nats.url, "replay", "--reason", "undelivered", "--limit", "1")
    assert (bounded.out, bounded.process.returncode) == (["1 replayed"], 0)
    rest = await deadletters(nats.url, "replay", "--all", "--json")
    assert [json.loads(line)["id"] for line in rest.out] == good[1:]
    assert rest.process.returncode == 1
    assert f"letter {broken} would come back at once" in rest.errors[0]
    assert await for_user(nats, "alice") == 3
    dropped = await deadletters(nats.url, "drop", "--all")
    assert (dropped.out, dropped.process.returncode) == (["1 dropped"], 0)
    assert (await deadletters(nats.url, "drop", "--all")).out == ["0 dropped"]
    assert (await deadletters(nats.url, "drop", str(broken))).process.returncode == 1
