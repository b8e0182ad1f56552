"""Metrics of real agents, scraped and by OTLP; and a catalogue that says all of them."""

from __future__ import annotations

import asyncio
import json
from itertools import product
from pathlib import Path
from typing import Any, Final

import pytest

from support.api import LIKE
from support.clock import until
from support.collector import scrape
from support.telemetry import watched
from tidings.publish import Publisher
from tidings.telemetry import catalogue
from tidings.telemetry.catalogue import CATALOGUE, Kind
from tidings.telemetry.numbers import Numbers
from tidings.telemetry.tracing import Tracing
from tidings.wire import subject

SECRET: Final = "nobody-may-read-this-payload"


async def test_what_happens_is_counted(tmp_path: Path) -> None:
    """Deliveries, acks, redeliveries, latencies, catch-ups, closes and copies, each where it happens."""
    async with watched(tmp_path, max_deliver=1000) as world:
        mesh, gateway = world.mesh, world.agents["gateway"]
        phone = await mesh.online(gateway, "alice")
        silent = await mesh.online(gateway, "bob", auto_ack=False)
        await phone.ask("sub", topics=["post.1"])
        await mesh.publish("alice", 3)
        (unacked,) = await mesh.publish("bob")
        await until(lambda: silent.ids.count(unacked) >= 2, "a redelivery")
        await world.post({"topic": "post.1", "event": LIKE})
        await phone.until(lambda: len(phone.items) == 4, "a copy")
        await mesh.connection.store(subject.notify_user("alice"), b"no event")
        await mesh.stored("alice", *phone.ids)

        async def counted() -> bool:
            now = await world.scraped()
            gate, inbox, fanout, api = (now[name] for name in ("gateway", "inbox", "fanout", "api"))
            return all(
                (
                    gate.value("tidings_gateway_deliveries_total", plane="personal") == 5,
                    gate.value("tidings_gateway_acks_total", plane="personal") == 4,
                    gate.value("tidings_gateway_redeliveries_total", plane="personal") >= 1,
                    gate.value("tidings_gateway_attempts_total", plane="personal") >= 6,
                    gate.value("tidings_gateway_socket_latency_seconds_count", plane="personal") == 5,
                    gate.value("tidings_gateway_ack_latency_seconds_count", plane="personal") == 4,
                    gate.value("tidings_gateway_sessions", state="live") == 2,
                    gate.value("tidings_gateway_windows", fill="empty") == 1,
                    gate.value("tidings_gateway_windows", fill="to_half") == 1,
                    gate.value("tidings_gateway_under_way") == 1,
                    gate.value("tidings_gateway_consumer_creations_total", cause="start") == 2,
                    gate.value("tidings_gateway_catch_ups_total", way="stream") == 2,
                    gate.value("tidings_store_latency_seconds_count", operation="claim") == 2,
                    gate.value("tidings_store_breaker", state="closed") == 1,
                    gate.value("tidings_nats_connected") == 1,
                    inbox.value("tidings_inbox_stored_total", plane="personal") == 5,
                    inbox.value("tidings_inbox_latency_seconds_count") == 5,
                    inbox.value("tidings_dead_letters_total", agent="inbox", reason="invalid_notification") == 1,
                    inbox.value("tidings_stream_lag", consumer="inbox") == 0,
                    fanout.value("tidings_fanout_messages_total", way="copies") == 1,
                    fanout.value("tidings_fanout_copies_total") == 1,
                    fanout.value("tidings_stream_lag", consumer="fanout") >= 0,
                    api.value("tidings_api_published_total", outcome="stored") == 1,
                    api.value("tidings_api_request_duration_seconds_count", method="POST", status="2xx") == 1,
                )
            )

        async with asyncio.timeout(20):
            while not await counted():
                await asyncio.sleep(0.1)
        await phone.send("not json")
        assert await phone.closed() == 4400
        after = await scrape(gateway)
        assert after.value("tidings_gateway_closes_total", code="4400", by="gateway") == 1


async def test_the_catalogue_is_what_is_scraped(tmp_path: Path) -> None:
    """Each metric at /metrics is in the catalogue with its kind, labels and their values, and each of those is there:
    the number of series is the same whatever happens."""
    async with watched(tmp_path) as world:
        await until(lambda: world.collector.metrics, "metrics by OTLP")
        known = {one.prometheus: one for one in CATALOGUE.values()}
        seen: set[str] = set()
        for text in (await world.scraped()).values():
            for name, family in text.families.items():
                instrument = known[name]
                seen.add(name)
                assert family.type == instrument.kind.value
                assert family.documentation == instrument.text
                series = {
                    tuple(sample.labels[label] for label in instrument.labels)
                    for sample in family.samples
                    if set(sample.labels) - {"le"} == set(instrument.labels)
                }
                assert series <= set(product(*instrument.labels.values())), name
                if instrument.kind is not Kind.GAUGE:
                    assert series == set(product(*instrument.labels.values())), name
                assert len({tuple(sorted(one.labels)) for one in family.samples}) <= 2, name
        assert seen == set(known)
        await until(lambda: set(world.collector.metrics) == set(CATALOGUE), "all of them by OTLP")
        sent = world.collector.metrics[catalogue.SOCKET_LATENCY.name]
        assert list(sent.histogram.data_points[0].explicit_bounds) == list(catalogue.LATENCY_S)


async def test_a_trace_from_publish_to_ack(tmp_path: Path) -> None:
    """One notification: the request's trace, the publish, its store in the inbox, its delivery up to the ack."""
    around = "00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01"
    async with watched(tmp_path) as world:
        phone = await world.mesh.online(world.agents["gateway"], "alice", auto_ack=False)
        await world.post({"user": "alice", "event": LIKE}, traceparent=around)
        await phone.until(lambda: phone.items, "the notification")
        (publish,) = await world.collector.named("publish notify.user.{user}")
        (store,) = await world.collector.named("store notify.user.{user}")
        assert not [span for span in world.collector.spans if span.name.startswith("deliver")]
        await phone.ack(phone.items[0]["pos"])
        (deliver,) = await world.collector.named("deliver notify.user.{user}")
        event = phone.items[0]["n"]
        assert (publish.service, publish.trace, publish.parent) == ("tidings-api", around[3:35], around[36:52])
        assert event["traceparent"] == f"00-{publish.trace}-{publish.id}-01"
        assert (deliver.service, deliver.trace, deliver.parent) == ("tidings-gateway", publish.trace, publish.id)
        assert (store.service, store.links) == ("tidings-inbox", [(publish.trace, publish.id)])
        assert (publish.kind, store.kind, deliver.kind) == (4, 5, 5)
        assert deliver.events == ["sent"]
        assert publish.attributes["messaging.system"] == "nats"
        assert publish.attributes["messaging.operation.type"] == "send"
        assert publish.attributes["messaging.message.id"] == event["id"]
        assert store.attributes["messaging.consumer.group.name"] == "inbox"
        assert store.attributes["messaging.batch.message_count"] == 1
        latency = await scrape(world.agents["gateway"])
        assert {"trace_id": deliver.trace, "span_id": deliver.id} in latency.exemplars(catalogue.ACK_LATENCY.prometheus)
        named = [span for span in world.collector.spans if "alice" in str(span) or "phone" in str(span)]
        assert not named, "spans name no users"


@pytest.mark.parametrize(("most", "plane"), [(1000, "copies"), (1, "broadcast")])
async def test_one_becomes_many(tmp_path: Path, most: int, plane: str) -> None:
    """A topic's message: its fan-out goes on in its trace; what each subscriber gets is linked to that."""
    async with watched(tmp_path, fanout_write_max=most) as world:
        mesh, gateway = world.mesh, world.agents["gateway"]
        devices = [await mesh.online(gateway, name) for name in ("alice", "bob")]
        for device in devices:
            await device.ask("sub", topics=["post.1"])
        async with Publisher(mesh.settings, tracing=Tracing(_application_tracer())) as publisher:
            await publisher.publish_topic("post.1", "social.post", {"text": SECRET})
        for device in devices:
            await device.until(lambda device=device: device.items, "the message")
        (fan_out,) = await world.collector.named("fan-out notify.topic.{topic}")
        if plane == "copies":
            ones = await world.collector.named("publish notify.user.{user}", 2)
            deliveries = await world.collector.named("deliver notify.user.{user}", 2)
            assert {one.links[0] for one in ones} == {(fan_out.trace, fan_out.id)}
            assert {one.parent for one in deliveries} == {one.id for one in ones}
        else:
            (received,) = await world.collector.named("receive broadcast.{topic}")
            deliveries = await world.collector.named("deliver broadcast.{topic}", 2)
            assert (received.trace, received.parent) == (fan_out.trace, fan_out.id)
            assert {one.links[0] for one in deliveries} == {(received.trace, received.id)}
        assert len({one.trace for one in deliveries} | {fan_out.trace}) == 3
        assert all(one.events == ["sent"] for one in deliveries)


def _application_tracer() -> Any:
    from opentelemetry.sdk.trace import TracerProvider

    return TracerProvider(shutdown_on_exit=False).get_tracer("a service")


async def test_an_unsampled_message_has_no_trace(tmp_path: Path) -> None:
    """Flag 00, and no traceparent at all: nobody begins a span."""
    async with watched(tmp_path, trace_sample_ratio=0) as world:
        phone = await world.mesh.online(world.agents["gateway"], "alice")
        unsampled = "00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-00"
        await world.post({"user": "alice", "event": {**LIKE, "id": "1", "traceparent": unsampled}})
        await world.post({"user": "alice", "event": {**LIKE, "id": "2"}})
        sampled = {**LIKE, "id": "3", "traceparent": f"{unsampled[:-2]}01"}
        await world.post({"user": "alice", "event": sampled})
        await phone.expect("1", "2", "3")
        (deliver,) = await world.collector.named("deliver notify.user.{user}")
        assert [one["n"].get("traceparent") for one in phone.items] == [unsampled, None, sampled["traceparent"]]
        assert deliver.parent == unsampled[36:52]
        await world.mesh.stored("alice", "1", "2", "3")
        await asyncio.gather(*(agent.stop() for agent in world.agents.values()))
        assert {span.name for span in world.collector.spans} == {
            "publish notify.user.{user}",
            "store notify.user.{user}",
            "deliver notify.user.{user}",
        }


async def test_logs_are_structured_and_say_nothing_secret(tmp_path: Path) -> None:
    """Every line is JSON, what is logged within a trace names it, and no payload or token is in any."""
    async with watched(tmp_path, max_deliver=1) as world:
        gateway = world.agents["gateway"]
        phone = await world.mesh.online(gateway, "alice", auto_ack=False)
        event = {"type": "social.like", "data": {"text": SECRET}}
        await world.post({"user": "alice", "event": event})
        await gateway.said("it is a dead letter now")
        (deliver,) = await world.collector.named("deliver notify.user.{user}")
        assert not deliver.ok
        letter = await scrape(gateway)
        assert letter.value("tidings_dead_letters_total", agent="gateway", reason="undelivered") == 1
        for agent in world.agents.values():
            lines = [json.loads(line) for line in agent.output]
            assert {"time", "level", "logger", "message"} <= set(lines[0])
            told = "\n".join(agent.output)
            assert SECRET not in told
            assert phone._hello["token"] not in told
        (line,) = [one for one in map(json.loads, gateway.output) if "dead letter now" in one["message"]]
        assert (line["trace_id"], line["span_id"]) == (deliver.trace, deliver.id)


async def test_off_there_is_nothing_of_it(tmp_path: Path) -> None:
    """No OpenTelemetry in the process, and no listener."""
    code = (
        "import sys\nfrom tidings.runtime.settings import Settings\nfrom tidings.telemetry import telemetry_of\n"
        "import tidings.gateway.agent, tidings.inbox.agent, tidings.fanout.agent, tidings.api.agent\n"
        "assert telemetry_of(Settings(), 'gateway') is None\n"
        "assert not [name for name in sys.modules if name.startswith('opentelemetry')]"
    )
    import sys

    process = await asyncio.create_subprocess_exec(sys.executable, "-c", code)
    assert await process.wait() == 0


def test_a_label_has_a_value_of_its_list() -> None:
    """What is unknown is `other` where there is that, and a mistake where there is not."""
    numbers = Numbers()
    closes = numbers.counter(catalogue.CLOSES)
    assert closes.of("4999", "gateway") is closes.of("other", "gateway")
    with pytest.raises(ValueError, match="no label value 'somebody'"):
        numbers.counter(catalogue.ACKS).of("somebody")
