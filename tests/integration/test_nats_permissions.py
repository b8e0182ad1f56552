"""Attacks over NATS with keys that are good: what each may not do is refused by a real server."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import orjson
import pytest
from nats.aio.msg import Msg

from support.clock import PATIENCE_S, until
from support.mesh import QUICK
from support.secured import Outsider, SecuredNats, secured_nats
from tidings.publish import Publisher
from tidings.runtime.settings import Settings
from tidings.stream import consumers, letters, topology
from tidings.stream.connection import connect
from tidings.stream.keys import Keys
from tidings.wire import subject
from tidings.wire.errors import PublishRefused, StreamUnavailable

ALICE = subject.partition("alice", QUICK["partitions"])
STREAM = f"NOTIFY_{ALICE}"
WHERE = f"part.{ALICE}.user.alice"
EVENT = b'{"specversion":"1.0","id":"1","source":"test","type":"test.made"}'

INTERNAL = (
    *(WHERE, "part.0.user.mallory", "broadcast.shop.news", "live.broadcast.shop.news", "decided", "claimed"),
    *("revoked.user.alice", "revoked.device.alice.phone", "dead.user", "dead.topic", "inbox.floor", "presence.alice"),
    *("gw.abcdefgh.user", "gw.abcdefgh.topics", "gw.abcdefgh.claim", "gw.abcdefgh.session.1", "ib.a.0.1", "fo.a.1"),
)
"""What only agents say."""
STREAM_API = (
    *("INFO", "STREAM.LIST", "STREAM.NAMES", "STREAM.CREATE.EVIL", f"STREAM.INFO.{STREAM}", f"STREAM.UPDATE.{STREAM}"),
    *(f"STREAM.DELETE.{STREAM}", f"STREAM.PURGE.{STREAM}", f"STREAM.MSG.GET.{STREAM}", f"STREAM.MSG.DELETE.{STREAM}"),
    *(f"STREAM.SNAPSHOT.{STREAM}", f"STREAM.RESTORE.{STREAM}", f"STREAM.LEADER.STEPDOWN.{STREAM}"),
    *(
        f"DIRECT.GET.{STREAM}",
        f"DIRECT.GET.{STREAM}.{WHERE}",
        "DIRECT.GET.DEAD",
        "STREAM.MSG.GET.REVOCATIONS",
        "STREAM.MSG.GET.KEYS",
    ),
)
CONSUMER_API = (
    *(f"CONSUMER.CREATE.{STREAM}", f"CONSUMER.CREATE.{STREAM}.evil", f"CONSUMER.CREATE.{STREAM}.evil.{WHERE}"),
    *(f"CONSUMER.DURABLE.CREATE.{STREAM}.evil", "CONSUMER.CREATE.DEAD.evil", "CONSUMER.CREATE.TOPICS.evil"),
    *(f"CONSUMER.INFO.{STREAM}.inbox", f"CONSUMER.LIST.{STREAM}", f"CONSUMER.NAMES.{STREAM}"),
    *(f"CONSUMER.DELETE.{STREAM}.inbox", f"CONSUMER.MSG.NEXT.{STREAM}.inbox", "CONSUMER.MSG.NEXT.TOPICS.fanout"),
    *(f"CONSUMER.PAUSE.{STREAM}.inbox", f"CONSUMER.LEADER.STEPDOWN.{STREAM}.inbox"),
)
ACKS = (f"$JS.ACK.{STREAM}.inbox.1.1.1.1.0", "$JS.ACK.TOPICS.fanout.1.1.1.1.0")
SYSTEM = ("$SYS.REQ.USER.INFO", "$SYS.REQ.ACCOUNT.PING.CONNZ", "$SYS.REQ.SERVER.PING", "$SYS.ACCOUNT.SYS.CONNECT")
ANSWERS = tuple(f"_INBOX_{role}.x.1" for role in ("gateway", "inbox", "fanout", "api", "operator"))
LISTENING = (
    *(">", "*", "*.>", "notify.>", "notify.user.*", "notify.topic.>", "part.>", "part.*.user.*", WHERE, "broadcast.>"),
    *("gw.>", "gw.*.*", "presence.*", "dead.>", "revoked.>", "decided", "ib.>", "fo.>", "$JS.>"),
    *("$JS.ACK.>", "$JS.API.>", "$JS.EVENT.>", "$SYS.>", "_INBOX_operator.>", "_R_.>"),
)


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[SecuredNats]:
    """With the streams of a mesh, and one notification to alice."""
    with secured_nats(tmp_path_factory.mktemp("secured")) as running:
        asyncio.run(prepare(running))
        yield running


async def prepare(server: SecuredNats) -> None:
    settings = settings_of(server, "operator")
    connection = await connect(settings, "test")
    try:
        await topology.apply(connection, settings)
        await connection.store(subject.notify_user("alice"), EVENT)
    finally:
        await connection.close()


def settings_of(server: SecuredNats, key: str, **changed: Any) -> Settings:
    return Settings(**{**QUICK, "nats_url": server.url, "nats_credentials": str(server.key(key)), **changed})


@asynccontextmanager
async def role(server: SecuredNats, name: str) -> AsyncIterator[Outsider]:
    """Somebody who has found this role's key."""
    replies = "_INBOX" if name.startswith("publisher-") else f"_INBOX_{name}"
    async with Outsider(server, name, replies) as outsider:
        yield outsider


async def messages(server: SecuredNats, stream: str) -> int:
    """How many messages a stream has, by the operator's word."""
    async with role(server, "operator") as operator:
        found: int = (await operator.ask(f"$JS.API.STREAM.INFO.{stream}"))["state"]["messages"]
        return found


async def may(server: SecuredNats, name: str, subjects: tuple[str, ...]) -> list[str]:
    """Of these, what a role may publish to."""
    async with role(server, name) as outsider:
        return [where for where in subjects if await outsider.may_publish(where)]


async def may_listen(server: SecuredNats, name: str, subjects: tuple[str, ...]) -> list[str]:
    """Of these, what a role may subscribe to, alone or in a queue."""
    async with role(server, name) as outsider:
        return [
            where
            for where in subjects
            if await outsider.may_subscribe(where) or await outsider.may_subscribe(where, "queue")
        ]


def api(*requests: str) -> tuple[str, ...]:
    return tuple(f"$JS.API.{request}" for request in requests)


# Strangers


@pytest.mark.parametrize("login", ["", "operator:secret@", "token@"])
async def test_nobody_comes_in_without_a_key(server: SecuredNats, login: str) -> None:
    """No anonymous client, no password, no token."""
    url = server.url.replace("//", f"//{login}")
    said = r"^(nobody without credentials|the login in the address) .*authorization violation"
    with pytest.raises(StreamUnavailable, match=said):
        await connect(Settings(nats_url=url, request_timeout_s=1), "test")


async def test_nobody_comes_in_with_a_key_of_their_own(server: SecuredNats, tmp_path: Path) -> None:
    """A key is good because the configuration has it."""
    Keys(tmp_path).make("gateway")
    settings = settings_of(server, "gateway", nats_credentials=str(tmp_path / "gateway.nk"), request_timeout_s=1)
    said = r"^the credentials in .*gateway\.nk are not let in \(authorization violation"
    with pytest.raises(StreamUnavailable, match=said):
        await connect(settings, "test")


# Publishers


@pytest.mark.parametrize("name", ["publisher-shop", "publisher-bank"])
async def test_a_publisher_only_publishes(server: SecuredNats, name: str) -> None:
    """Nothing of the mesh's own, nothing of JetStream's or the server's."""
    everything = (*INTERNAL, *api(*STREAM_API, *CONSUMER_API), *ACKS, *SYSTEM, *ANSWERS)
    assert await may(server, name, everything) == []


@pytest.mark.parametrize("name", ["publisher-shop", "publisher-bank"])
async def test_a_publisher_hears_nothing(server: SecuredNats, name: str) -> None:
    """No wildcard, no notification, nobody's answers."""
    assert await may_listen(server, name, LISTENING) == []


async def test_a_publisher_keeps_to_its_users_and_topics(server: SecuredNats) -> None:
    """One may publish to all users and its own topics, the other to one user and one topic."""
    asked = (
        *("notify.user.alice", "notify.user.bob", "notify.user.alice.x", "notify.topic.shop.news", "notify.topic.shop"),
        *("notify.topic.bank.rates", "notify.topic.bank.rates.x", "notify.topic.bank.>", "notify.topic.>"),
    )
    assert await may(server, "publisher-shop", asked) == [
        "notify.user.alice",
        "notify.user.bob",
        "notify.topic.shop.news",
    ]
    assert await may(server, "publisher-bank", asked) == ["notify.user.alice", "notify.topic.bank.rates"]


async def test_what_a_publisher_may_not_do_is_said(server: SecuredNats, caplog: pytest.LogCaptureFixture) -> None:
    """The SDK says at the server's word, not at its deadline, which subject it may not publish to and what to do."""
    before = await messages(server, "TOPICS")
    async with Publisher(settings_of(server, "publisher-bank"), timeout_s=10 * PATIENCE_S) as publisher:
        allowed = asyncio.ensure_future(publisher.publish("alice", "test.made"))
        refused = r"may not publish to notify\.topic\.shop\.news: .*TIDINGS_NATS_CREDENTIALS"
        async with asyncio.timeout(PATIENCE_S):
            with pytest.raises(PublishRefused, match=refused):
                await publisher.publish_topic("shop.news", "test.made")
        assert (await allowed).stream.startswith("NOTIFY_")
    assert "these NATS credentials do not allow what is needed" in caplog.text
    assert await messages(server, "TOPICS") == before


@pytest.mark.parametrize(
    "reply",
    [
        *("revoked.user.alice", "dead.user", "broadcast.shop.news", "decided", "notify.user.bob", "gw.abcdefgh.user"),
        *("inbox.floor", "_INBOX_gateway.x.1", f"$JS.API.STREAM.PURGE.{STREAM}", f"$JS.ACK.{STREAM}.inbox.1.1.1.1.0"),
    ],
)
async def test_a_confirmation_goes_nowhere_else(server: SecuredNats, reply: str) -> None:
    """JetStream confirms to whatever reply subject it is given, and that is one of the publisher's account."""
    streams = (
        "REVOCATIONS",
        "DEAD",
        "BROADCAST",
        "DECISIONS",
        f"NOTIFY_{subject.partition('bob', QUICK['partitions'])}",
    )
    before = [await messages(server, stream) for stream in streams]
    stored = await messages(server, STREAM)
    async with role(server, "gateway") as gateway, role(server, "publisher-shop") as publisher:
        assert await gateway.may_subscribe("gw.*.>")
        assert await gateway.may_subscribe("inbox.floor")
        assert await gateway.may_subscribe("_INBOX_gateway.>")
        await publisher.may_publish("notify.user.alice", EVENT, reply=reply)
        # Its next one is confirmed after that, to itself.
        await publisher.client.request("notify.user.alice", EVENT, timeout=PATIENCE_S)
        await gateway.settle()
        assert gateway.seen == []
    assert [await messages(server, stream) for stream in streams] == before
    # The server does not take every reply subject; the confirmed one is stored at least.
    assert await messages(server, STREAM) > stored


async def test_publishers_do_not_hear_each_other(server: SecuredNats) -> None:
    """Both have the same reply subjects, each in an account of its own."""
    async with role(server, "publisher-shop") as shop, role(server, "publisher-bank") as bank:
        assert await bank.may_subscribe("_INBOX.>")
        await shop.client.request("notify.user.alice", EVENT, timeout=PATIENCE_S)
        assert await shop.may_publish("_INBOX.x", b"hello") is False
        await bank.settle()
        assert bank.seen == []


@pytest.mark.parametrize(
    ("header", "value"),
    [("Nats-Rollup", "all"), ("Nats-Rollup", "sub"), ("Nats-TTL", "1s"), ("Nats-Schedule", "@at 2030-01-01T00:00:00Z")],
)
async def test_headers_delete_and_hide_nothing(server: SecuredNats, header: str, value: str) -> None:
    """No header of a publisher takes others' notifications out of the log."""
    before = await messages(server, STREAM)
    async with role(server, "publisher-shop") as publisher:
        answer = await publisher.client.request("notify.user.alice", EVENT, timeout=PATIENCE_S, headers={header: value})
    assert "error" in orjson.loads(answer.data)
    assert await messages(server, STREAM) == before


async def test_a_trace_goes_nowhere(server: SecuredNats) -> None:
    """A message that asks to be traced does not make the server publish where its sender may not."""
    before = await messages(server, "REVOCATIONS")
    for name, where in (("publisher-shop", "notify.user.alice"), ("gateway", "presence.alice")):
        async with role(server, name) as outsider:
            headers = {"Nats-Trace-Dest": "revoked.user.alice"}
            await outsider.client.publish(where, EVENT, headers=headers)
            await outsider.settle()
    assert await messages(server, "REVOCATIONS") == before


async def test_a_body_above_the_limit(server: SecuredNats) -> None:
    """Nobody fills the log with what no notification can be."""
    before = await messages(server, STREAM)
    async with role(server, "publisher-shop") as publisher:
        await publisher.client.publish("notify.user.alice", b"x" * 20_481)
        await until(lambda: publisher.client.is_closed, "the server ends the connection")
    assert await messages(server, STREAM) == before


# Gateways


GATEWAY_FORBIDDEN = (
    *("notify.user.alice", WHERE, "part.0.user.mallory", "notify.topic.shop.news", "broadcast.shop.news"),
    *("revoked.user.alice", "decided", "claimed", "inbox.floor", "dead.topic", "live.broadcast.shop.news"),
    *("gw.abcdefgh.session.1", "ib.a.0.1", "fo.a.1"),
)


async def test_a_gateway_publishes_nothing_as_a_service(server: SecuredNats) -> None:
    """No notification, no broadcast, no revocation, no floor of an inbox agent."""
    assert await may(server, "gateway", GATEWAY_FORBIDDEN) == []


async def test_a_gateway_changes_no_stream(server: SecuredNats) -> None:
    """It lists the streams and reads their last sequences; it reads no message but through a consumer of one user."""
    open_to_it = ("STREAM.LIST", f"STREAM.INFO.{STREAM}", "STREAM.MSG.GET.REVOCATIONS")
    assert await may(server, "gateway", api(*STREAM_API)) == list(api(*open_to_it))


async def test_a_gateway_has_only_consumers_of_one_user(server: SecuredNats) -> None:
    """It makes none without a filter, none of other streams, and does nothing to the inbox agents' consumer."""
    open_to_it = (f"CONSUMER.CREATE.{STREAM}.evil.{WHERE}", f"CONSUMER.INFO.{STREAM}.inbox")
    assert await may(server, "gateway", api(*CONSUMER_API)) == list(api(*open_to_it))
    more = (
        *(f"CONSUMER.CREATE.{STREAM}.inbox.{WHERE}", "CONSUMER.CREATE.BROADCAST.inbox"),
        *("CONSUMER.CREATE.BROADCAST.inbox.broadcast.x", f"CONSUMER.CREATE.{STREAM}.evil.part.{ALICE}.>"),
        *("CONSUMER.DELETE.BROADCAST.inbox", "CONSUMER.DELETE.TOPICS.fanout", "CONSUMER.MSG.NEXT.BROADCAST.inbox"),
    )
    assert await may(server, "gateway", api(*more)) == []
    assert await may(server, "gateway", (*ACKS, "$JS.ACK.BROADCAST.inbox.1.1.1.1.0", "$JS.ACK.DEAD.x.1.1.1.1.0")) == []


async def test_a_gateway_hears_no_other_agent(server: SecuredNats) -> None:
    """Its own kind's subjects, and no answer to anybody else."""
    listening = tuple(where for where in LISTENING if where != "gw.*.*")
    assert (
        await may_listen(server, "gateway", (*listening, *(where for where in ANSWERS if "gateway" not in where))) == []
    )
    assert await may(server, "gateway", (*ANSWERS, *SYSTEM)) == []


@pytest.mark.parametrize(
    ("config", "stream"),
    [
        ({"durable_name": "inbox", "filter_subject": WHERE}, STREAM),
        ({"durable_name": "evil", "filter_subject": f"part.{ALICE}.user.*"}, STREAM),
        ({"durable_name": "evil", "filter_subject": ""}, STREAM),
        ({"durable_name": "evil"}, STREAM),
        ({"durable_name": "evil", "filter_subjects": [f"part.{ALICE}.user.*"]}, STREAM),
        ({"durable_name": "evil", "filter_subject": "dead.>"}, "DEAD"),
    ],
    ids=["another name", "another filter", "empty filter", "no filter", "filters", "another stream"],
)
async def test_a_body_that_says_something_else(server: SecuredNats, config: dict[str, Any], stream: str) -> None:
    """The list sees the subject alone: a consumer that is another one in the body is refused by JetStream."""
    async with role(server, "gateway") as gateway:
        answer = await gateway.ask(
            f"$JS.API.CONSUMER.CREATE.{STREAM}.evil.{WHERE}",
            {"stream_name": stream, "config": {"ack_policy": "explicit", **config}, "action": ""},
        )
        assert "error" in answer, answer


async def test_an_answer_is_given_once(server: SecuredNats) -> None:
    """A gateway answers who asked it, once, and may publish to nobody's reply subjects otherwise."""
    async with role(server, "gateway") as gateway, role(server, "api") as asker:
        assert await gateway.may_subscribe("gw.abcdefgh.>")
        assert await asker.may_subscribe("_INBOX_api.>")
        assert await asker.may_publish("gw.abcdefgh.topics", b"alice", reply="_INBOX_api.x.1")
        await gateway.settle()
        assert [message.reply for message in gateway.seen] == ["_INBOX_api.x.1"]
        assert await gateway.may_publish("_INBOX_api.x.1", b"ok")
        assert not await gateway.may_publish("_INBOX_api.x.1", b"again")
        assert not await gateway.may_publish("_INBOX_api.x.2", b"ok")


@pytest.mark.parametrize("verdict", [b"", b"+TERM", b"-NAK", b"+NXT", b"+WPI"])
async def test_nobody_acknowledges_for_the_inbox_agents(server: SecuredNats, verdict: bytes) -> None:
    """What is not stored stays unacknowledged, in whatever form of reply subject a gateway says otherwise."""
    async with role(server, "inbox") as inbox, role(server, "gateway") as gateway:
        await inbox.ask("$JS.API.STREAM.LIST", {})
        arrived = asyncio.get_running_loop().create_future()

        async def come(message: Msg) -> None:
            if message.reply:
                arrived.set_result(message.reply)

        await inbox.client.subscribe("ib.attacked.0.1", cb=come)
        await inbox.client.publish(f"$JS.API.CONSUMER.MSG.NEXT.{STREAM}.inbox", b"1", reply="ib.attacked.0.1")
        async with asyncio.timeout(PATIENCE_S):
            own = await arrived
        behind = own.removeprefix("$JS.ACK.")
        assert behind.startswith(f"{STREAM}.inbox.")
        forms = (
            own,
            *(f"$JS.ACK.{domain}.{hash}.{behind}" for domain in ("_", STREAM) for hash in ("x", "inbox", "0")),
        )
        for form in (*forms, *(f"{form}.token" for form in forms)):
            await gateway.may_publish(form, verdict)
        info = await inbox.ask(f"$JS.API.CONSUMER.INFO.{STREAM}.inbox")
        assert info["num_ack_pending"] == 1
        await inbox.client.publish(own, b"-NAK")
        await inbox.settle()


async def make_consumer(gateway: Outsider, name: str, **config: Any) -> None:
    answer = await gateway.ask(
        f"$JS.API.CONSUMER.CREATE.{STREAM}.{name}.{WHERE}",
        {
            "stream_name": STREAM,
            "config": {
                "durable_name": name,
                "filter_subject": WHERE,
                "ack_policy": "none",
                "mem_storage": True,
                **config,
            },
            "action": "",
        },
    )
    assert "error" not in answer, answer


@pytest.mark.parametrize(
    "where", ["revoked.user.alice", f"$JS.API.STREAM.PURGE.{STREAM}", "notify.user.bob", "dead.user"]
)
async def test_a_consumer_that_pushes(server: SecuredNats, where: str) -> None:
    """A gateway may have one push, as only the body says so: to streams and to JetStream itself it pushes nothing."""
    streams = ("REVOCATIONS", STREAM, "DEAD", f"NOTIFY_{subject.partition('bob', QUICK['partitions'])}")
    before = [await messages(server, stream) for stream in streams]
    async with role(server, "gateway") as gateway:
        await make_consumer(gateway, "pushes", deliver_subject=where)
        # One that has a listener delivers at once; it was made later, and the other would have been first.
        assert await gateway.may_subscribe("gw.evil.pushed")
        await make_consumer(gateway, "heard", deliver_subject="gw.evil.pushed")
        await until(lambda: gateway.seen, "the one with a listener has pushed")
        for name in ("pushes", "heard"):
            await gateway.ask(f"$JS.API.CONSUMER.DELETE.{STREAM}.{name}")
    assert [await messages(server, stream) for stream in streams] == before


async def test_a_limit_of_all_agents(server: SecuredNats) -> None:
    """JetStream answers a pull wherever it is told to. So an agent that was broken into can have a message that it may
    read stored elsewhere, as a revocation too (docs/nats-permissions.md): no list can forbid that.
    """
    before = await messages(server, "REVOCATIONS")
    async with role(server, "gateway") as gateway:
        await make_consumer(gateway, "reflects")
        pull = f"$JS.API.CONSUMER.MSG.NEXT.{STREAM}.reflects"
        assert await gateway.may_publish(pull, b'{"batch":1,"no_wait":true}', reply="revoked.user.eve")
        await gateway.ask(f"$JS.API.CONSUMER.DELETE.{STREAM}.reflects")
    assert await messages(server, "REVOCATIONS") == before + 1


async def test_no_answer_of_jetstream_is_a_request(server: SecuredNats) -> None:
    """With a request of JetStream as reply subject, an agent does not get done what it may not ask for."""
    before = await messages(server, STREAM)
    async with role(server, "gateway") as gateway:
        for request in (f"STREAM.PURGE.{STREAM}", f"STREAM.DELETE.{STREAM}", f"CONSUMER.DELETE.{STREAM}.inbox"):
            await gateway.may_publish(f"$JS.API.STREAM.INFO.{STREAM}", reply=f"$JS.API.{request}")
        await gateway.ask("$JS.API.STREAM.LIST", {})
    assert await messages(server, STREAM) == before
    async with role(server, "operator") as operator:
        assert "error" not in await operator.ask(f"$JS.API.CONSUMER.INFO.{STREAM}.inbox")


# The other agents


@pytest.mark.parametrize(
    ("name", "allowed"),
    [
        (
            "inbox",
            {
                *("dead.user", "inbox.floor", ACKS[0]),
                *api("STREAM.LIST", f"STREAM.INFO.{STREAM}", f"STREAM.UPDATE.{STREAM}"),
                *api(f"CONSUMER.INFO.{STREAM}.inbox", f"CONSUMER.MSG.NEXT.{STREAM}.inbox"),
            },
        ),
        (
            "fanout",
            {
                *(WHERE, "part.0.user.mallory", "broadcast.shop.news", "decided", "dead.topic", ACKS[1]),
                *api("STREAM.LIST", "CONSUMER.MSG.NEXT.TOPICS.fanout"),
            },
        ),
        (
            "api",
            {
                *(WHERE, "part.0.user.mallory", "revoked.user.alice", "revoked.device.alice.phone"),
                *("gw.abcdefgh.user", "gw.abcdefgh.topics", "claimed", "$JS.API.STREAM.MSG.GET.KEYS"),
                *api("STREAM.LIST", f"STREAM.INFO.{STREAM}", "STREAM.MSG.GET.REVOCATIONS", "DIRECT.GET.DEAD"),
                *api(f"CONSUMER.INFO.{STREAM}.inbox"),
            },
        ),
    ],
)
async def test_each_agent_does_its_own_work_alone(server: SecuredNats, name: str, allowed: set[str]) -> None:
    """Of all that this file tries, an agent may do what its code does."""
    everything = (*INTERNAL, *api(*STREAM_API, *CONSUMER_API), *ACKS, *SYSTEM, *ANSWERS)
    # Not sent for real: nothing is to be changed by what is allowed.
    harmless = tuple(where for where in everything if where not in allowed)
    assert await may(server, name, harmless) == []
    assert await may_listen(server, name, tuple(where for where in LISTENING if where not in ("ib.>", "fo.>"))) == []


async def test_an_agents_key_for_the_operators_work(server: SecuredNats) -> None:
    """Whoever takes the wrong key is told that it is the key."""
    connection = await connect(settings_of(server, "fanout", request_timeout_s=0.5), "tidings-fanout")
    try:
        with pytest.raises(StreamUnavailable, match="credentials do not allow it"):
            await connection.ask(f"$JS.API.STREAM.PURGE.{STREAM}")
    finally:
        await connection.close()


async def test_an_agent_with_the_key_of_another(server: SecuredNats) -> None:
    """It may ask, and does not hear the answer: it is told that, too."""
    connection = await connect(settings_of(server, "inbox", request_timeout_s=0.5), "tidings-gateway")
    try:
        with pytest.raises(StreamUnavailable, match="Are they those of another program"):
            await topology.discover(connection)
    finally:
        await connection.close()


@pytest.mark.parametrize("header", [b"NATS/1.0 404 Gone\r\n\r\n", b"NATS/1.0 204 EOB\r\n\r\n"])
async def test_what_looks_like_the_end(server: SecuredNats, header: bytes) -> None:
    """Of revocations and dead letters: one with the status of an end, which a broken agent stored, ends no reading."""
    operator = await connect(settings_of(server, "operator"), "test")
    gateway = await connect(settings_of(server, "gateway"), "tidings-gateway")
    try:
        assert operator.send("revoked.user.nobody", header=header)
        await operator.confirm()
        assert gateway.send("dead.user", b"first", header=header)
        await gateway.confirm()
        answers: list[int] = []

        def arrived(where: bytes, reply: bytes, header: bytes | None, body: bytes) -> None:
            assert header is not None
            answers.append(consumers.direct_get_status(header))

        inbox = gateway.new_inbox()
        await gateway.listen(inbox, arrived)
        wanted = orjson.dumps({"seq": 1, "batch": 1, "next_by_subj": "revoked.user.nobody"})
        gateway.send("$JS.API.DIRECT.GET.REVOCATIONS", wanted, inbox)
        await until(lambda: len(answers) == 2, "the message and the end")
        assert answers == [0, 204]
        await gateway.store("dead.user", b"second")
        found = [letter.body async for letter in letters.each(operator)]
        assert found[-2:] == [b"first", b"second"]
    finally:
        await operator.close()
        await gateway.close()
