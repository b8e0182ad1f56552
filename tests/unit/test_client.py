"""The client against a scripted gateway: acknowledgement, copies, reconnects, requests, callbacks, its end."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

import pytest

from support.clock import PATIENCE_S
from support.fake_gateway import FakeGateway, Peer, at, item
from tidings.client import Client, ConnectionLost, Notification, RequestRefused, SessionClosed
from tidings.runtime.backoff import Backoff
from tidings.wire import codes
from tidings.wire.errors import BadPosition, BadSettings


@pytest.fixture(autouse=True)
async def _no_task_is_left() -> AsyncIterator[None]:
    before = asyncio.all_tasks()
    yield
    left = {task for task in asyncio.all_tasks() - before if task is not asyncio.current_task()}
    assert not left, left


@pytest.fixture
async def gateway() -> AsyncIterator[FakeGateway]:
    async with FakeGateway() as running:
        yield running


def make(gateway: FakeGateway, token: Any = "token", **options: Any) -> Client:
    return Client(gateway.url, token, backoff=Backoff(0.001, 0.005), **options)


@asynccontextmanager
async def connected(gateway: FakeGateway, *, welcome: dict[str, Any] | None = None, **options: Any) -> Any:
    """A client that is open, and the gateway's side of its first connection."""
    client = make(gateway, **options)
    async with asyncio.TaskGroup() as both:
        peer = both.create_task(gateway.welcomed(**(welcome or {})))
        both.create_task(client.open())
    try:
        yield client, peer.result()
    finally:
        await client.close()


def broadcast(number: int) -> str:
    return f"b{at(number)[1:]}"


async def take(client: Client, count: int) -> list[Notification]:
    """So many notifications; with `auto_ack` the last one stays unacknowledged."""
    taken: list[Notification] = []
    async with asyncio.timeout(PATIENCE_S):
        async for notification in client:
            taken.append(notification)
            if len(taken) == count:
                return taken
    raise AssertionError(f"the client ended after {len(taken)}")


async def in_step(client: Client, peer: Peer) -> None:
    """Everything that either side sent before has arrived: a question went there, its answer came back."""
    async with asyncio.TaskGroup() as both:
        both.create_task(client.count())
        both.create_task(peer.answer("count", unread=0))


# Acknowledgement


async def test_hello_and_notification(gateway: FakeGateway) -> None:
    """The hello names device and window and no `since`; a notification has the event's attributes."""
    async with connected(gateway, device="desk", window=7) as (client, peer):
        assert peer.hello == {"t": "hello", "token": "token", "device": "desk", "window": 7}
        assert client.welcome["user"] == "alice"
        await peer.push(item(1, attempt=3, time="2026-01-31T12:00:00Z", topic="post.1"))
        (notification,) = await take(client, 1)
        assert notification.raw["specversion"] == "1.0"
        assert (notification.id, notification.type, notification.source) == ("n1", "test.made", "test")
        assert (notification.data, notification.time, notification.topic) == (1, "2026-01-31T12:00:00Z", "post.1")
        assert (notification.position, notification.attempt) == (at(1), 3)


async def test_acknowledged_when_the_body_has_run(gateway: FakeGateway) -> None:
    """The ack leaves when the next notification is asked for, and not before."""
    async with connected(gateway) as (client, peer):
        await peer.push(item(1), item(2))
        loop = aiter(client)
        assert (await anext(loop)).id == "n1"
        await in_step(client, peer)
        assert (await anext(loop)).id == "n2"
        await peer.expect_acks(1)
        await loop.aclose()


async def test_acks_are_joined(gateway: FakeGateway) -> None:
    """What is acknowledged in one turn of the event loop leaves in one frame."""
    async with connected(gateway) as (client, peer):
        await peer.push(*(item(number) for number in range(1, 9)))
        await take(client, 8)
        await peer.expect_acks(*range(1, 8))


@pytest.mark.parametrize("leave", ["raise", "break"])
async def test_a_body_that_is_left_is_not_acknowledged(gateway: FakeGateway, leave: str) -> None:
    """A body that raises, or breaks, has not handled its notification: the gateway's next attempt is delivered."""
    async with connected(gateway) as (client, peer):
        await peer.push(item(1))
        try:
            async for notification in client:
                if leave == "break":
                    break
                raise ValueError(notification.id)
        except ValueError:
            assert leave == "raise"
        await in_step(client, peer)
        await peer.push(item(1, attempt=2), item(2))
        assert [(n.id, n.attempt) for n in await take(client, 2)] == [("n1", 2), ("n2", 1)]
        await peer.expect_acks(1)


async def test_an_exception_that_leaves_the_block(gateway: FakeGateway) -> None:
    """It closes the client with a goodbye and without an ack."""

    async def device() -> None:
        async with make(gateway) as client:
            async for notification in client:
                raise ValueError(notification.id)

    task = asyncio.create_task(_error_of(device()))
    peer = await gateway.welcomed()
    await peer.push(item(1))
    assert isinstance(await task, ValueError)
    assert await peer.gone() == codes.NORMAL.code
    assert peer.unexpected == []


async def test_the_last_ack_leaves_before_the_goodbye(gateway: FakeGateway) -> None:
    """An explicit ack right before the end of the block still reaches the gateway."""
    async with connected(gateway) as (client, peer):
        await peer.push(item(1), item(2))
        async for notification in client:
            if notification.id == "n2":
                await client.ack(notification)
                break
    await peer.expect_acks(1, 2)
    assert await peer.gone() == codes.NORMAL.code


async def test_several_loops_acknowledge_their_own(gateway: FakeGateway) -> None:
    """Two loops over one client share its notifications; neither acknowledges what the other works on."""
    async with connected(gateway) as (client, peer):
        await peer.push(item(1), item(2), item(3))
        slow, quick = aiter(client), aiter(client)
        assert (await anext(slow)).id == "n1"
        assert (await anext(quick)).id == "n2"
        assert (await anext(quick)).id == "n3"
        await peer.expect_acks(2)
        await peer.push(item(1, attempt=2), item(4))
        assert (await anext(quick)).id == "n4"
        await peer.expect_acks(3)
        await slow.aclose()
        await quick.aclose()


async def test_explicit_acks(gateway: FakeGateway) -> None:
    """Without `auto_ack` only `ack` and `ack_upto` acknowledge, and what `ack_upto` covers leaves the queue."""
    async with connected(gateway, auto_ack=False) as (client, peer):
        await peer.push(*(item(number) for number in range(1, 6)))
        first, second = await take(client, 2)
        await in_step(client, peer)
        await client.ack(second)
        await peer.expect_acks(2)
        await client.ack_upto(at(4))
        await peer.expect("ack", upto=at(4))
        assert [n.id for n in await take(client, 1)] == ["n5"]
        await client.ack(first)
        await in_step(client, peer)
        with pytest.raises(BadPosition):
            await client.ack_upto("nonsense")


async def test_run(gateway: FakeGateway) -> None:
    """`run` acknowledges what its handler returned from; what it raised goes to `on_error` and stays unacknowledged."""
    failed: list[str] = []

    async def handle(notification: Notification) -> None:
        if notification.id == "n2":
            raise ValueError("no")

    async with connected(gateway, auto_ack=False) as (client, peer):
        work = asyncio.create_task(client.run(handle, on_error=lambda notification, error: failed.append(str(error))))
        await peer.push(item(1), item(2), item(3))
        await peer.expect_acks(1, 3)
        await peer.push(item(2, attempt=2), item(4))
        await peer.expect_acks(4)
        assert failed == ["no", "no"]
        await client.close()
        await work


async def test_run_raises_what_its_handler_raised(gateway: FakeGateway) -> None:
    """Without `on_error` the handler's exception ends `run`."""
    async with connected(gateway) as (client, peer):
        await peer.push(item(1))
        with pytest.raises(ZeroDivisionError):
            await client.run(lambda notification: print(1 // 0))
        await in_step(client, peer)


# Copies and order


async def test_copies(gateway: FakeGateway) -> None:
    """A copy of what was acknowledged is acknowledged again and not delivered; of what is being handled, neither."""
    async with connected(gateway) as (client, peer):
        await peer.push(item(1), item(2))
        loop = aiter(client)
        await anext(loop)
        await anext(loop)
        await peer.expect_acks(1)
        await peer.push(item(1, attempt=2))
        await peer.expect_acks(1)
        await peer.push(item(2, attempt=2), item(9, id="n2"), item(3))
        await in_step(client, peer)
        assert (await anext(loop)).id == "n3"
        await peer.expect_acks(2, 9)
        await loop.aclose()


async def test_redelivered_to_an_application_that_forgot(gateway: FakeGateway) -> None:
    """Without `auto_ack`: a copy on a new connection changes nothing, a second attempt on it is delivered."""
    async with connected(gateway, auto_ack=False) as (client, peer):
        await peer.push(item(1))
        await take(client, 1)
        peer.end()
        peer = await gateway.welcomed()
        await peer.push(item(1, attempt=2), item(2))
        assert [n.id for n in await take(client, 1)] == ["n2"]
        await peer.push(item(1, attempt=3))
        (again,) = await take(client, 1)
        assert (again.id, again.attempt) == ("n1", 3)


async def test_position_and_since(gateway: FakeGateway) -> None:
    """`position` never passes what is unacknowledged; a client that was given a `since` says how far it is."""
    async with connected(gateway, auto_ack=False, since=at(5), welcome={"pos": at(7)}) as (client, peer):
        assert peer.hello["since"] == at(5)
        assert client.position == at(7)
        await peer.push(item(10), item(11), item(12))
        taken = await take(client, 3)
        await client.ack(taken[1])
        assert client.position == at(7)
        await client.ack(taken[0])
        assert client.position == at(11)
        await peer.expect("ack")
        peer.end()
        assert (await gateway.welcomed()).hello["since"] == at(11)


async def test_position_stands_still_in_blindness(gateway: FakeGateway) -> None:
    """While the gateway does not know the cursor, nothing is concluded from what arrives."""
    async with connected(gateway, since=at(5), welcome={"pos": None}) as (client, peer):
        await peer.push(item(10), item(11))
        await take(client, 2)
        await peer.expect_acks(10)
        assert client.position == at(5)


# Reconnecting


async def test_comes_back_when_the_gateway_dies(gateway: FakeGateway) -> None:
    """A connection that ends without a close is made again, with the device that the gateway gave."""
    async with connected(gateway) as (client, peer):
        assert "device" not in peer.hello
        await peer.push(item(1))
        await take(client, 1)
        peer.end()
        peer = await gateway.welcomed()
        assert peer.hello["device"] == "given-by-gateway"
        await peer.push(item(1, attempt=2))
        assert [n.attempt for n in await take(client, 1)] == [2]


async def test_acks_without_a_connection_leave_at_the_next(gateway: FakeGateway) -> None:
    """What is acknowledged between two connections is told to the second."""
    async with connected(gateway, auto_ack=False) as (client, peer):
        await peer.push(item(1))
        (notification,) = await take(client, 1)
        peer.end()
        peer = await gateway.accepted()
        await client.ack(notification)
        await peer.welcome()
        await peer.expect_acks(1)


@pytest.mark.parametrize("close", [close for close in codes.CLOSES if close.reconnect], ids=lambda close: close.name)
async def test_codes_that_say_come_back(gateway: FakeGateway, close: codes.Close) -> None:
    """The client connects again after these."""
    async with connected(gateway) as (client, peer):
        await peer.close(close.code)
        await in_step(client, await gateway.welcomed())


@pytest.mark.parametrize("close", [close for close in codes.CLOSES if not close.reconnect], ids=lambda c: c.name)
async def test_codes_that_say_stay_away(gateway: FakeGateway, close: codes.Close) -> None:
    """The loop raises these, with what the gateway said, and nobody connects again. 1000 that we did not say, too."""
    async with connected(gateway) as (client, peer):
        await peer.push(item(1))
        await peer.send({"t": "error", "ref": None, "code": close.name, "message": "because"})
        await peer.close(close.code)
        with pytest.raises(SessionClosed, match="because") as caught:
            await client.run(lambda notification: None)
        assert (caught.value.close_code, caught.value.name) == (close.code, close.name)
        with pytest.raises(SessionClosed):
            await take(client, 1)
        with pytest.raises(ConnectionLost):
            await client.count()
    assert gateway.handshakes == 1


async def test_refused_at_the_door(gateway: FakeGateway) -> None:
    """A refusal for good comes out of `open`, and leaves nothing open."""
    client = make(gateway)
    async with asyncio.TaskGroup() as both:
        accepted = both.create_task(gateway.accepted())
        opening = both.create_task(_error_of(client.open()))
        await (await accepted).close(codes.NOT_ALLOWED.code)
    assert isinstance(opening.result(), SessionClosed)


async def _error_of(work: Any) -> BaseException | None:
    return (await asyncio.gather(work, return_exceptions=True))[0]


async def test_bye_says_when(gateway: FakeGateway, monkeypatch: pytest.MonkeyPatch) -> None:
    """The pause that a `bye` asks for is kept, with up to a tenth more; one that says not to come back is obeyed."""
    async with connected(gateway) as (client, peer):
        pauses: list[float] = []
        sleep = asyncio.sleep

        async def noted(seconds: float) -> None:
            pauses.append(seconds)
            await sleep(0)

        monkeypatch.setattr("tidings.client.connection.asyncio.sleep", noted)
        await peer.send({"t": "bye", "reconnect": True, "after_ms": 1200})
        await peer.close(codes.RESTART.code)
        peer = await gateway.welcomed()
        (pause,) = pauses
        assert 1.2 <= pause <= 1.32
        await peer.send({"t": "bye", "reconnect": False, "after_ms": 0})
        await peer.close(codes.RESTART.code)
        with pytest.raises(SessionClosed):
            await take(client, 1)


async def test_pauses_grow_while_connections_are_short(gateway: FakeGateway) -> None:
    """A gateway that welcomes its clients and throws them out is not a success: the back-off goes on."""
    backoff = Backoff(0.0001, 0.0001 * 2**20)
    client = Client(gateway.url, "token", backoff=backoff)
    opening = asyncio.create_task(client.open())
    for _ in range(4):
        peer = await gateway.welcomed()
        await peer.close(codes.OVERLOADED.code)
    await gateway.welcomed()
    assert backoff.failures == 4
    await opening
    await client.close()


async def test_fresh_tokens(gateway: FakeGateway) -> None:
    """A token function is asked at each connect, and once more at 4401; a second refusal in a row is final."""
    asked: list[int] = []

    async def token() -> str:
        asked.append(len(asked))
        return f"token-{len(asked)}"

    async with connected(gateway, token=token) as (client, peer):
        assert peer.hello["token"] == "token-1"
        await peer.close(codes.NOT_AUTHENTICATED.code)
        peer = await gateway.welcomed()
        assert peer.hello["token"] == "token-2"
        await peer.close(codes.NOT_AUTHENTICATED.code)
        peer = await gateway.accepted()
        assert peer.hello["token"] == "token-3"
        await peer.close(codes.NOT_AUTHENTICATED.code)
        with pytest.raises(SessionClosed):
            await take(client, 1)
    assert gateway.handshakes == 3


async def test_a_token_is_renewed(gateway: FakeGateway) -> None:
    """Before its token ends the client shows a fresh one on the same connection, again and again."""
    asked: list[int] = []

    def token() -> str:
        asked.append(len(asked))
        return f"token-{len(asked)}"

    async with connected(gateway, token=token, welcome={"expires_in": 0.01}) as (client, peer):
        assert (await peer.answer("token", expires_in=0.01))["token"] == "token-2"
        assert (await peer.answer("token", expires_in=3600))["token"] == "token-3"
        await in_step(client, peer)
    assert gateway.handshakes == 1


async def test_a_renewal_that_fails_is_tried_again(gateway: FakeGateway) -> None:
    """A function without network, and a gateway that refuses, are asked again while the token lives."""
    answers: list[Any] = ["first", OSError("no network"), "second", "third"]

    def token() -> str:
        answer = answers.pop(0)
        if isinstance(answer, OSError):
            raise answer
        return str(answer)

    async with connected(gateway, token=token, welcome={"expires_in": 0.01}) as (client, peer):
        request = await peer.expect("token", token="second")
        await peer.send({"t": "error", "ref": request["ref"], "code": "keys_unavailable", "message": "later"})
        await peer.answer("token", expires_in=3600)
        await in_step(client, peer)
    assert (gateway.handshakes, answers) == (1, [])


async def test_a_mistake_while_renewing_ends_the_client(gateway: FakeGateway) -> None:
    """Any other exception of the function comes out of the loop."""
    answers = ["first"]
    async with connected(gateway, token=lambda: answers.pop(), welcome={"expires_in": 0.01}) as (client, peer):
        with pytest.raises(IndexError):
            await take(client, 1)
        assert await peer.gone() == 1001


async def test_a_fixed_token_is_not_renewed(gateway: FakeGateway) -> None:
    """Without a function there is nothing fresher: the gateway closes when it is over, and that is final."""
    async with connected(gateway, welcome={"expires_in": 0}) as (client, peer):
        await in_step(client, peer)
        await peer.close(codes.NOT_AUTHENTICATED.code)
        with pytest.raises(SessionClosed):
            await take(client, 1)
        assert not peer.unexpected


async def test_a_token_function_that_fails(gateway: FakeGateway) -> None:
    """A network error of the token function is a failed connect; its mistakes come out of `open`."""
    answers: list[Any] = [OSError("no network"), KeyError("mistake")]

    def token() -> str:
        raise answers.pop(0)

    with pytest.raises(KeyError):
        await make(gateway, token=token).open()
    assert not answers


async def test_a_silent_gateway_is_left(gateway: FakeGateway) -> None:
    """After two heartbeats without a frame the client asks; without an answer it connects again."""
    async with connected(gateway, welcome={"heartbeat": 0.02}) as (client, peer):
        await peer.expect("ping")
        await peer.send({"t": "pong"})
        await peer.expect("ping")
        successor = await gateway.welcomed()
        assert await peer.gone() == 1001
        await in_step(client, successor)


@pytest.mark.parametrize(
    "nonsense",
    [
        "{",
        "[]",
        '{"t":"n"}',
        '{"t":"n","items":[{}]}',
        '{"t":"n","items":[{"pos":"u1.1","try":1,"n":7}]}',
        '{"t":"gap"}',
    ],
)
async def test_nonsense_is_no_reason_to_end(gateway: FakeGateway, nonsense: str) -> None:
    """A gateway that talks nonsense is left for another; what nobody knows yet is passed over."""
    async with connected(gateway) as (client, peer):
        await peer.send('{"t":"from-the-future"}', nonsense)
        assert await peer.gone() in (1001, 1008)
        await in_step(client, await gateway.welcomed())


async def test_more_than_the_window(gateway: FakeGateway) -> None:
    """A gateway that sends more than twice the window of each plane is left; what waits here already is kept."""
    async with connected(gateway, welcome={"window": 2}) as (client, peer):
        await peer.push(*(item(number) for number in range(1, 10)))
        assert await peer.gone() == 1008
        await gateway.welcomed(window=2)
        assert [n.id for n in await take(client, 8)] == [f"n{number}" for number in range(1, 9)]


async def test_nobody_there(gateway: FakeGateway, caplog: pytest.LogCaptureFixture) -> None:
    """A server that refuses the handshake is tried again, and named; a bound on `open` leaves nothing behind."""
    gateway.refuse_with = 404
    client = make(gateway)
    with caplog.at_level(logging.WARNING, "tidings.client"), pytest.raises(TimeoutError):
        async with asyncio.timeout(0.2):
            await client.open()
    assert gateway.handshakes > 1
    assert "404" in caplog.text


async def test_another_protocol() -> None:
    """A WebSocket server that does not speak ours gets no hello, thus no token."""
    async with FakeGateway(protocols=()) as other:
        with pytest.raises(TimeoutError):
            async with asyncio.timeout(0.1):
                await make(other).open()
        assert other.handshakes
        assert other._peers.empty()


# Requests


async def test_requests(gateway: FakeGateway) -> None:
    """`inbox`, `mark` and `count` send what they say and read what they get, whatever the order of the answers."""
    async with connected(gateway) as (client, peer), asyncio.TaskGroup() as work:
        page = work.create_task(client.inbox(before=at(9), limit=2, filter="unread"))
        marked = work.create_task(client.mark([at(1)], "read"))
        unread = work.create_task(client.count())
        inbox = await peer.expect("inbox", before=at(9), limit=2, filter="unread")
        mark = await peer.expect("mark", **{"as": "read", "pos": [at(1)]})
        await peer.answer("count", unread=4)
        assert await unread == 4
        await peer.send({"t": "ok", "ref": mark["ref"]})
        await marked
        row = {"pos": at(8), "seen": True, "read": False, "archived": False, "n": item(8)["n"]}
        await peer.send({"t": "ok", "ref": inbox["ref"], "items": [row], "next": at(8)})
        found = await page
        assert (found.next, found.items[0].notification["id"], found.items[0].seen) == (at(8), "n8", True)
        all_marked = work.create_task(client.mark("all", "seen"))
        assert (await peer.answer("mark"))["pos"] == "all"
        await all_marked


async def test_a_refused_request(gateway: FakeGateway) -> None:
    """An error answer is raised with its code and whether to try again; the connection stays."""
    async with connected(gateway) as (client, peer):
        for code, retry in (("store_unavailable", True), ("bad_position", False)):
            asking = asyncio.create_task(_error_of(client.count()))
            request = await peer.expect("count")
            await peer.send({"t": "error", "ref": request["ref"], "code": code, "message": "why"})
            error = await asking
            assert isinstance(error, RequestRefused)
            assert (error.code, str(error), error.retry) == (code, "why", retry)
        await in_step(client, peer)


async def test_requests_under_way_when_the_connection_breaks(gateway: FakeGateway) -> None:
    """They fail at once; one that is made while there is no connection waits for the next."""
    async with connected(gateway, timeout_s=PATIENCE_S) as (client, peer):
        asking = asyncio.create_task(_error_of(client.count()))
        await peer.expect("count")
        peer.end()
        assert isinstance(await asking, ConnectionLost)
        peer = await gateway.accepted()
        waiting = asyncio.create_task(client.count())
        await peer.welcome()
        await peer.answer("count", unread=5)
        assert await waiting == 5


async def test_an_answer_that_does_not_come(gateway: FakeGateway) -> None:
    """A request has a time limit; its late answer harms nobody."""
    async with connected(gateway, timeout_s=0.05) as (client, peer):
        with pytest.raises(ConnectionLost, match="no answer to `count`"):
            await client.count()
        request = await peer.expect("count")
        await peer.send({"t": "ok", "ref": request["ref"], "unread": 1})
        await peer.push(item(1))
        await take(client, 1)


# Callbacks


async def test_a_gap_is_acknowledged_after_its_callback(gateway: FakeGateway) -> None:
    """`on_gap` may page the inbox; the gap is acknowledged when it returned, and `position` waits for that."""
    pages: list[Any] = []
    client: Client

    async def on_gap(missed: int | None) -> None:
        pages.append((missed, await client.inbox()))

    async with connected(gateway, on_gap=on_gap) as (client, peer):
        await peer.send({"t": "gap", "missed": 1234, "pos": at(50)})
        await peer.answer("inbox", items=[], next=None)
        await peer.expect("ack", upto=at(50))
        assert pages[0][0] == 1234
        assert client.position == at(50)


async def test_gaps_of_both_planes(gateway: FakeGateway) -> None:
    """Two that come while the callback is busy with the first are both announced, and each acknowledged."""
    told: list[int | None] = []
    go_on = asyncio.Event()

    async def on_gap(missed: int | None) -> None:
        told.append(missed)
        await go_on.wait()

    async with connected(gateway, on_gap=on_gap) as (client, peer):
        await peer.send({"t": "gap", "missed": 1, "pos": at(40)})
        await in_step(client, peer)
        await peer.send({"t": "gap", "missed": 2, "pos": at(50)}, {"t": "gap", "missed": 3, "pos": broadcast(7)})
        await in_step(client, peer)
        go_on.set()
        acknowledged: set[str] = set()
        while not {at(50), broadcast(7)} <= acknowledged:
            acknowledged.add((await peer.expect("ack"))["upto"])
        assert sorted(filter(None, told)) == [1, 2, 3]
        assert client.position == at(50)


async def test_upto_is_of_one_plane(gateway: FakeGateway) -> None:
    """A position of a broadcast acknowledges broadcasts, and the other way round."""
    async with connected(gateway, auto_ack=False) as (client, peer):
        await peer.push(item(1), {**item(2), "pos": broadcast(1)}, {**item(3), "pos": broadcast(2)}, item(4))
        await take(client, 4)
        await client.ack_upto(broadcast(2))
        await peer.expect("ack", upto=broadcast(2))
        assert client.position == at(0)
        await client.ack_upto(at(4))
        await peer.expect("ack", upto=at(4))
        assert client.position == at(4)


async def test_a_gap_whose_callback_gets_no_answer(gateway: FakeGateway) -> None:
    """The connection breaks while the inbox is paged: nothing is acknowledged, the next connection announces anew."""
    client: Client

    async def on_gap(missed: int | None) -> None:
        await client.inbox()

    async with connected(gateway, on_gap=on_gap) as (client, peer):
        await peer.send({"t": "gap", "missed": 9, "pos": at(50)})
        await peer.expect("inbox")
        peer.end()
        peer = await gateway.welcomed()
        await in_step(client, peer)
        await peer.send({"t": "gap", "missed": 9, "pos": at(60)})
        request = await peer.expect("inbox")
        await peer.send({"t": "error", "ref": request["ref"], "code": "store_unavailable", "message": "later"})
        await in_step(client, peer)
        await peer.send({"t": "gap", "missed": None, "pos": None})
        await peer.answer("inbox", items=[], next=None)
        await in_step(client, peer)


async def test_a_gap_is_acknowledged_where_it_was_announced(gateway: FakeGateway) -> None:
    """On a later connection the ack would cover what is pushed there instead, and not handled yet."""
    paged = asyncio.Event()

    async def on_gap(missed: int | None) -> None:
        await paged.wait()

    async with connected(gateway, on_gap=on_gap) as (client, peer):
        await peer.send({"t": "gap", "missed": 9, "pos": at(50)})
        await in_step(client, peer)
        peer.end()
        peer = await gateway.welcomed()
        await peer.push(item(50), item(51))
        await take(client, 1)
        paged.set()
        await in_step(client, peer)
        assert client.position == at(0)


async def test_a_gap_nobody_waits_for(gateway: FakeGateway, caplog: pytest.LogCaptureFixture) -> None:
    """Without a callback a gap is a warning, and acknowledged."""
    async with connected(gateway) as (_, peer):
        await peer.send({"t": "gap", "missed": 12, "pos": at(50)})
        await peer.expect("ack", upto=at(50))
    assert "12 notifications were missed" in caplog.text


async def test_badge_and_marks(gateway: FakeGateway) -> None:
    """`on_count` and `on_state` hear of the other devices; plain functions do."""
    heard: list[Any] = []
    done = asyncio.Event()

    def on_count(unread: int) -> None:
        heard.append(unread)
        done.set()

    async with connected(gateway, on_count=on_count, on_state=lambda *marks: heard.append(marks)) as (_, peer):
        await peer.send({"t": "state", "pos": [at(1)], "as": "read"}, {"t": "state", "pos": "all", "as": "seen"})
        await peer.send({"t": "count", "unread": 3})
        async with asyncio.timeout(PATIENCE_S):
            await done.wait()
    assert heard == [([at(1)], "read"), ("all", "seen"), 3]


async def test_a_callback_that_fails(gateway: FakeGateway) -> None:
    """A callback's mistake ends the loop with its exception; nothing is swallowed."""
    async with connected(gateway, on_count=lambda unread: print(1 // unread)) as (client, peer):
        await peer.send({"t": "count", "unread": 0})
        with pytest.raises(ZeroDivisionError):
            await take(client, 1)


async def test_a_callback_may_close(gateway: FakeGateway) -> None:
    """Closing from a callback ends the loop quietly."""
    client: Client

    async def on_count(unread: int) -> None:
        await client.close()

    async with connected(gateway, on_count=on_count) as (client, peer):
        await peer.send({"t": "count", "unread": 0})
        await client.run(lambda notification: None)
        assert await peer.gone() == codes.NORMAL.code


# The end


async def test_close(gateway: FakeGateway) -> None:
    """`close` ends the loop quietly, fails what waits, and may be called twice; what waits unhandled stays so."""
    async with connected(gateway) as (client, peer):
        looping = asyncio.create_task(client.run(lambda notification: None))
        asking = asyncio.create_task(_error_of(client.count()))
        await peer.expect("count")
        await client.close()
        await looping
        assert isinstance(await asking, ConnectionLost)
        assert await peer.gone() == codes.NORMAL.code
        await client.close()
        assert [n async for n in client] == []
        with pytest.raises(RuntimeError):
            await client.open()


async def test_close_while_it_waits_to_reconnect(gateway: FakeGateway) -> None:
    """A client in the pause between two connections ends at once."""
    async with connected(gateway) as (client, peer):
        await peer.send({"t": "bye", "reconnect": True, "after_ms": 3_600_000})
        await peer.close(codes.RESTART.code)
        with pytest.raises(ConnectionLost):
            async with asyncio.timeout(PATIENCE_S):
                # It fails when the client has seen the end.
                await asyncio.gather(client.count(), _close_when_alone(client))


async def _close_when_alone(client: Client) -> None:
    while client._connection.link is not None:
        await asyncio.sleep(0)
    await client.close()


async def test_cancelled_in_the_loop(gateway: FakeGateway) -> None:
    """A task that is cancelled at work still says goodbye through the block, and leaves its notification."""
    at_work = asyncio.Event()

    async def device() -> None:
        async with make(gateway) as client:
            async for _ in client:
                at_work.set()
                await asyncio.Event().wait()

    task = asyncio.create_task(device())
    peer = await gateway.welcomed()
    await peer.push(item(1))
    await at_work.wait()
    task.cancel()
    assert isinstance(await _error_of(task), asyncio.CancelledError)
    assert await peer.gone() == codes.NORMAL.code
    assert peer.unexpected == []


@pytest.mark.parametrize("url", ["", "127.0.0.1:8080", "ftp://host", "ws://"])
def test_bad_urls(url: str) -> None:
    """What is no address of a gateway is refused at once."""
    with pytest.raises(BadSettings):
        Client(url, "token")


@pytest.mark.parametrize(
    ("given", "used"),
    [
        ("ws://h:1", "ws://h:1/v1/ws"),
        ("ws://h:1/", "ws://h:1/v1/ws"),
        ("http://h:1/v1/ws", "http://h:1/v1/ws"),
        ("wss://h/push", "wss://h/push/v1/ws"),
    ],
)
def test_urls(given: str, used: str) -> None:
    """The path is added where it is missing."""
    assert Client(given, "token")._connection._url == used


async def test_not_open(gateway: FakeGateway) -> None:
    """A client that was not opened says so instead of waiting for ever."""
    with pytest.raises(RuntimeError, match="async with"):
        await take(make(gateway), 1)
