"""The Publisher on a real nats-server: one id is one message, refusals say why, the pipeline survives a crash."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Iterator
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import pytest

from support.clock import PATIENCE_S, SCALE
from support.nats import RunningNats, running_nats
from tidings.publish import (
    BadSubject,
    Event,
    InvalidNotification,
    Publisher,
    PublishRefused,
    PublishUnconfirmed,
    Receipt,
    StreamUnavailable,
)
from tidings.publish import publisher as module
from tidings.runtime.settings import Settings
from tidings.wire import subject
from tidings.wire.errors import TidingsError

PARTITIONS = 4


@pytest.fixture(autouse=True)
async def _no_task_is_left() -> AsyncIterator[None]:
    before = asyncio.all_tasks()
    yield
    left = {task for task in asyncio.all_tasks() - before if task is not asyncio.current_task()}
    assert not left, left


@pytest.fixture
async def nats(tmp_path: Path) -> AsyncIterator[RunningNats]:
    async with running_nats(tmp_path, PARTITIONS) as running:
        yield running


@pytest.fixture
async def publisher(nats: RunningNats) -> AsyncIterator[Publisher]:
    async with Publisher(nats.connection, source="shop") as running:
        yield running


class Deaf(Publisher):
    """Loses the first confirmations, as a network may."""

    def __init__(self, *arguments: Any, lost: int, **options: Any) -> None:
        super().__init__(*arguments, **options)
        self.left = lost

    def _answered(self, where: bytes, reply: bytes, header: bytes | None, payload: bytes) -> None:
        if self.left:
            self.left -= 1
        else:
            super()._answered(where, reply, header, payload)


def partition_of(user: str) -> int:
    return subject.partition(subject.escape(user), PARTITIONS)


def neighbours() -> tuple[str, str]:
    """Two users of one partition."""
    first = "user-0"
    return first, next(
        user for user in (f"user-{n}" for n in range(1, 100)) if partition_of(user) == partition_of(first)
    )


async def _all(receipts: AsyncIterator[Receipt]) -> list[Receipt]:
    return [receipt async for receipt in receipts]


async def only(nats: RunningNats) -> Any:
    """The one message that is stored."""
    (event,) = (await nats.stored()).values()
    return event


# One publish


async def test_publish(nats: RunningNats, publisher: Publisher) -> None:
    """The event has an id, a time, the source, and what was given; the receipt says where it is."""
    receipt = await publisher.publish("a.b@c", "order.sent", {"order": 17}, topic="order.17", priority="high")
    assert (receipt.stream, receipt.seq, receipt.duplicate) == (f"NOTIFY_{partition_of('a.b@c')}", 1, False)
    event = (await nats.stored())[receipt.stream, receipt.seq]
    when = datetime.fromisoformat(event.pop("time"))
    assert abs((datetime.now(UTC) - when).total_seconds()) < PATIENCE_S
    assert event == {
        "specversion": "1.0",
        "id": receipt.id,
        "source": "shop",
        "type": "order.sent",
        "topic": "order.17",
        "priority": "high",
        "data": {"order": 17},
    }
    message = await nats.connection.jetstream().get_msg(receipt.stream, receipt.seq)
    assert message.subject == f"part.{partition_of('a.b@c')}.user.a%2Eb@c"
    assert message.headers == {"Nats-Msg-Id": f"a%2Eb@c/{receipt.id}"}


async def test_one_id_is_one_message(nats: RunningNats, publisher: Publisher) -> None:
    """A service that publishes again under the same id gets the receipt of the first."""
    first = await publisher.publish("alice", "t", id="sale/ 7 é")
    again = await publisher.publish("alice", "t", id="sale/ 7 é")
    assert again == Receipt("sale/ 7 é", first.stream, first.seq, duplicate=True)
    assert (await only(nats))["id"] == "sale/ 7 é"


async def test_one_id_for_two_users(nats: RunningNats, publisher: Publisher) -> None:
    """The same event told to two users of one partition is two notifications."""
    receipts = [await publisher.publish(user, "t", id="sale") for user in neighbours()]
    assert [receipt.duplicate for receipt in receipts] == [False, False]
    assert len(await nats.stored()) == 2


async def test_a_lost_confirmation(nats: RunningNats, monkeypatch: pytest.MonkeyPatch) -> None:
    """What is not confirmed is sent again under the same id, and is one message."""
    monkeypatch.setattr(module, "_ATTEMPT_S", 0.05)
    async with Deaf(nats.url, lost=3) as publisher:
        receipt = await publisher.publish("alice", "t")
        assert publisher.left == 0
    assert receipt.duplicate
    assert (await only(nats))["id"] == receipt.id


async def test_ready_bodies(nats: RunningNats, publisher: Publisher) -> None:
    """`publish_body` stores the bytes as they are, under the id that they have."""
    body = b'{ "specversion":"1.0", "id":"mine", "source":"s", "type":"t" }'
    first = await publisher.publish_body("alice", body)
    assert first.id == "mine"
    assert (await publisher.publish_body("alice", body)).duplicate
    message = await nats.connection.jetstream().get_msg(first.stream, first.seq)
    assert message.data == body


async def test_refused_before_sending(nats: RunningNats, publisher: Publisher) -> None:
    """What is no notification, or for nobody, is not sent."""
    with pytest.raises(BadSubject):
        await publisher.publish("", "t")
    with pytest.raises(BadSubject):
        await publisher.publish_body("x" * 201, b"{}")
    with pytest.raises(InvalidNotification):
        await publisher.publish("alice", "")
    with pytest.raises(InvalidNotification):
        await publisher.publish("alice", "t", {"big": "x" * 20_000})
    with pytest.raises(InvalidNotification):
        await publisher.publish("alice", "t", time=datetime(2026, 1, 1))
    with pytest.raises(InvalidNotification):
        await publisher.publish_body("alice", b"{}")
    assert publisher._waiting == {}
    assert sum(await nats.counts()) == 0


# What the log says


async def test_too_large_for_the_log(nats: RunningNats, publisher: Publisher) -> None:
    """A stream that takes less than the envelope allows refuses, for good, with advice."""
    await nats.limit(partition_of("alice"), max_msg_size=200)
    with pytest.raises(PublishRefused, match="send a reference"):
        await publisher.publish("alice", "t", "x" * 400)


@pytest.mark.parametrize("limit", [{"max_bytes": 2000}, {"max_msgs": 2}])
async def test_a_full_log(nats: RunningNats, publisher: Publisher, limit: dict[str, int]) -> None:
    """A full log refuses at once, says so, and says what to do."""
    await nats.limit(partition_of("alice"), **limit)
    events = [("alice", "t", "x" * 400)] * 10
    async with asyncio.timeout(PATIENCE_S):
        with pytest.raises(PublishRefused, match=r"maximum .* exceeded; the log is full: raise"):
            await _all(publisher.publish_many(events))


async def test_no_stream(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Without a topology a publish is refused with what to do, after the time that an election may take."""
    monkeypatch.setattr(module, "_ELECTION_S", 0.2)
    async with running_nats(tmp_path, apply=False) as nats, Publisher(nats.url) as publisher:
        with pytest.raises(PublishRefused, match="apply the topology"):
            await publisher.publish("alice", "t")
        refused: list[TidingsError] = []
        events = [("alice", "t")] * 5
        assert [r async for r in publisher.publish_many(events, on_error=lambda event, why: refused.append(why))] == []
        assert [type(error) for error in refused] == [PublishRefused] * 5


async def test_a_stream_that_comes_late(tmp_path: Path) -> None:
    """A stream that has no leader for a moment costs a retry."""
    async with running_nats(tmp_path, apply=False) as nats, Publisher(nats.url) as publisher:
        publishing = asyncio.create_task(publisher.publish("alice", "t"))
        async with asyncio.timeout(PATIENCE_S):
            while not publisher._waiting:
                await asyncio.sleep(0)
        config = {"name": "NOTIFY_0", "subjects": ["part.*.user.*"], "storage": "file"}
        await nats.connection.api("STREAM.CREATE.NOTIFY_0", config)
        assert (await publishing).stream == "NOTIFY_0"


async def test_a_stream_that_nobody_reads(tmp_path: Path) -> None:
    """A confirmation of a stream that is none of the mesh is no receipt."""
    async with running_nats(tmp_path, apply=False) as nats, Publisher(nats.url) as publisher:
        await nats.connection.api("STREAM.CREATE.ALL", {"name": "ALL", "subjects": ["part.>"], "storage": "file"})
        with pytest.raises(PublishRefused, match="ALL stored it, from which no device reads"):
            await publisher.publish("alice", "t")


@pytest.mark.parametrize(
    ("error", "final"),
    [
        ({"code": 503, "err_code": 10008, "description": "JetStream system temporarily unavailable"}, False),
        ({"code": 503, "err_code": 10077, "description": "store is closed"}, False),
        ({"code": 409, "err_code": 10158, "description": "duplicate message id is in process"}, False),
        ({"code": 429, "err_code": 10167, "description": "too many requests"}, False),
        ({"code": 503, "err_code": 10023, "description": "insufficient resources"}, True),
        ({"code": 400, "err_code": 10109, "description": "invalid operation on sealed stream"}, True),
    ],
)
def test_what_may_be_tried_again(error: dict[str, Any], final: bool) -> None:
    """Refusals that are hard to provoke: which of them end a publish."""
    verdict = module.read_answer(None, b'{"error":%b}' % str(error).replace("'", '"').encode())
    assert verdict is not None
    assert (verdict.final, verdict.stream) == (final, None)
    assert error["description"] in verdict.problem


@pytest.mark.parametrize("payload", [b"", b"+OK", b"[]", b'{"stream":7}', b'{"error":"no"}', b'{"stream":"NOTIFY_1"}'])
def test_answers_of_others(payload: bytes) -> None:
    """What is no answer of JetStream is none at all."""
    assert module.read_answer(None, payload) is None


# Away and back


async def test_nobody_there() -> None:
    """A server that is not there is a sentence at `open`, and nothing is left."""
    with pytest.raises(StreamUnavailable):
        await Publisher(Settings(nats_url="nats://127.0.0.1:1", request_timeout_s=0.3)).open()


async def test_unconfirmed(nats: RunningNats) -> None:
    """A server that stays away: the error says so, and names the id under which to try again."""
    async with Publisher(nats.url, timeout_s=0.5) as publisher:
        await nats.server.stop()
        with pytest.raises(PublishUnconfirmed, match="order-17 was not confirmed"):
            await publisher.publish("alice", "t", id="order-17")
        assert publisher._waiting == {}


async def test_unheard(nats: RunningNats, monkeypatch: pytest.MonkeyPatch) -> None:
    """A server that takes messages and never confirms: the publish ends at its deadline, not later."""
    monkeypatch.setattr(module, "_ATTEMPT_S", 0.1)
    loop = asyncio.get_running_loop()
    async with Deaf(nats.url, lost=1_000_000, timeout_s=0.4) as publisher:
        start = loop.time()
        with pytest.raises(PublishUnconfirmed, match="no confirmation came"):
            await publisher.publish("alice", "t")
        assert loop.time() - start < 0.5 + SCALE


async def test_close_while_publishing(nats: RunningNats) -> None:
    """What is under way when the publisher closes is unconfirmed at once; after that nothing is sent."""
    publisher = Deaf(nats.url, lost=1_000_000)
    await publisher.open()
    publishing = asyncio.create_task(publisher.publish("alice", "t", id="late"))
    while not publisher._waiting:
        await asyncio.sleep(0)
    await publisher.close()
    async with asyncio.timeout(1 * SCALE):
        with pytest.raises(PublishUnconfirmed, match="the publisher was closed"):
            await publishing
    await publisher.close()
    with pytest.raises(StreamUnavailable, match="not open"):
        await publisher.publish("alice", "t")


async def test_a_given_connection_stays(nats: RunningNats) -> None:
    """A publisher leaves no subscription on a connection that is not its own."""
    handlers = dict(nats.connection.handlers)
    async with Publisher(nats.connection) as publisher:
        await publisher.publish("alice", "t")
    assert nats.connection.handlers == handlers
    assert nats.connection.is_connected


# The pipeline


async def test_pipeline_in_order(nats: RunningNats, publisher: Publisher) -> None:
    """Receipts come in the order of the events, with never more under way than allowed."""
    most = 0

    def events() -> Iterator[Event | tuple[Any, ...]]:
        nonlocal most
        for number in range(500):
            most = max(most, len(publisher._waiting))
            plain = (f"user-{number % 7}", "t", number)
            yield plain if number % 2 else Event(*plain, id=f"n{number}", attributes={"topic": "post.1"})

    receipts = [receipt async for receipt in publisher.publish_many(events(), in_flight=16)]
    stored = await nats.stored()
    assert [stored[receipt.stream, receipt.seq]["data"] for receipt in receipts] == list(range(500))
    assert [stored[r.stream, r.seq]["id"] for r in receipts] == [r.id for r in receipts]
    assert stored[receipts[0].stream, receipts[0].seq]["topic"] == "post.1"
    assert most == 16
    assert publisher._waiting == {}


async def test_pipeline_does_not_wait_for_its_source(publisher: Publisher) -> None:
    """A receipt comes when its event is stored, though an asynchronous source has no other event yet."""
    more = asyncio.Event()

    async def events() -> AsyncIterator[Event]:
        yield Event("alice", "t", id="first")
        await more.wait()
        yield Event("alice", "t", id="second")

    receipts = publisher.publish_many(events())
    async with asyncio.timeout(PATIENCE_S):
        assert (await anext(receipts)).id == "first"
        more.set()
        assert (await anext(receipts)).id == "second"
        with pytest.raises(StopAsyncIteration):
            await anext(receipts)


async def test_pipeline_raises_in_turn(publisher: Publisher) -> None:
    """An event's error comes where its receipt would be, and names the event."""
    receipts = publisher.publish_many([("alice", "t"), ("", "t", None, "nobody's"), ("bob", "t")])
    assert (await anext(receipts)).seq
    with pytest.raises(BadSubject) as caught:
        await anext(receipts)
    assert caught.value.__notes__ == ["in publish_many: event 1, to '', id \"nobody's\""]
    assert publisher._waiting == {}


async def test_pipeline_goes_on(nats: RunningNats, publisher: Publisher) -> None:
    """With `on_error` the failed go there, with their ids, and the others are published."""
    await nats.limit(partition_of("alice"), max_msg_size=200)
    events = [("alice", "t", "x" * 400), ("bob", "bad type" * 50), Event("user-0", "t", id="good")]
    failed: list[tuple[Event, TidingsError]] = []

    async def note(event: Event, error: TidingsError) -> None:
        failed.append((event, error))

    assert [receipt.id async for receipt in publisher.publish_many(events, on_error=note)] == ["good"]
    assert [(event.user, type(error)) for event, error in failed] == [
        ("alice", PublishRefused),
        ("bob", InvalidNotification),
    ]
    assert failed[0][0].id is not None
    assert failed[0][0].id in str(failed[0][1])


async def test_pipeline_whose_source_fails(publisher: Publisher) -> None:
    """What the source gave before it failed is confirmed; then its error is raised."""

    def events() -> Iterator[Event]:
        yield Event("alice", "t", id="before")
        raise OSError("the source is gone")

    receipts = publisher.publish_many(events())
    assert (await anext(receipts)).id == "before"
    with pytest.raises(OSError, match="the source is gone"):
        await anext(receipts)


async def test_pipeline_that_is_left(publisher: Publisher) -> None:
    """A loop that is left early leaves nothing waiting."""
    receipts = publisher.publish_many([("alice", "t")] * 100, in_flight=10)
    async for _ in receipts:
        break
    await receipts.aclose()
    assert publisher._waiting == {}
    with pytest.raises(ValueError, match="in_flight"):
        await anext(publisher.publish_many([], in_flight=0))


async def test_server_killed_under_a_pipeline(nats: RunningNats, monkeypatch: pytest.MonkeyPatch) -> None:
    """2,000 notifications over two crashes of the server: each has a receipt, and is stored once, where it says."""
    monkeypatch.setattr(module, "_ATTEMPT_S", 0.3)
    receipts: list[Receipt] = []
    async with Publisher(nats.url, timeout_s=2 * PATIENCE_S) as publisher:
        async for receipt in publisher.publish_many((f"user-{n % 50}", "t", n) for n in range(2000)):
            receipts.append(receipt)
            if len(receipts) in (600, 1300):
                nats.server.kill()
    assert nats.server.restarts == 2
    async with asyncio.timeout(PATIENCE_S):
        await nats.server.answering()
        while not nats.connection.is_connected:
            await asyncio.sleep(0.01)
    stored = await nats.stored()
    assert [stored[receipt.stream, receipt.seq]["data"] for receipt in receipts] == list(range(2000))
    assert [stored[receipt.stream, receipt.seq]["id"] for receipt in receipts] == [receipt.id for receipt in receipts]
    assert len(stored) == 2000
