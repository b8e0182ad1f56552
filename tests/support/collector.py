"""A collector of OTLP over HTTP, which keeps what it is sent; and a scrape of ``/metrics``."""

from __future__ import annotations

import gzip
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any, NamedTuple

import aiohttp
from aiohttp import web
from opentelemetry.proto.collector.metrics.v1.metrics_service_pb2 import ExportMetricsServiceRequest
from opentelemetry.proto.collector.trace.v1.trace_service_pb2 import ExportTraceServiceRequest
from prometheus_client import Metric
from prometheus_client.openmetrics.parser import text_string_to_metric_families

from .clock import until
from .mesh import Agent


class Span(NamedTuple):
    """One exported span; ids in hexadecimal."""

    service: str
    name: str
    kind: int
    trace: str
    id: str
    parent: str
    links: list[tuple[str, str]]
    attributes: dict[str, Any]
    events: list[str]
    ok: bool


class Collector:
    """Made by `collecting`."""

    def __init__(self) -> None:
        self.url = ""
        self.spans: list[Span] = []
        self.metrics: dict[str, Any] = {}
        """The last of each name."""

    async def named(self, name: str, count: int = 1) -> list[Span]:
        """Wait until so many spans of this name have come."""

        def found() -> list[Span]:
            return [span for span in self.spans if span.name == name]

        await until(lambda: len(found()) >= count, f"{count} spans {name!r} of {sorted({s.name for s in self.spans})}")
        return found()

    async def _traces(self, request: web.Request) -> web.Response:
        message = ExportTraceServiceRequest.FromString(await _body(request))
        for resource in message.resource_spans:
            service = _attributes(resource.resource.attributes)["service.name"]
            for scope in resource.scope_spans:
                for span in scope.spans:
                    self.spans.append(
                        Span(
                            service,
                            span.name,
                            span.kind,
                            span.trace_id.hex(),
                            span.span_id.hex(),
                            span.parent_span_id.hex(),
                            [(link.trace_id.hex(), link.span_id.hex()) for link in span.links],
                            _attributes(span.attributes),
                            [event.name for event in span.events],
                            span.status.code != 2,
                        )
                    )
        return web.Response()

    async def _metrics(self, request: web.Request) -> web.Response:
        message = ExportMetricsServiceRequest.FromString(await _body(request))
        for resource in message.resource_metrics:
            for scope in resource.scope_metrics:
                self.metrics.update((metric.name, metric) for metric in scope.metrics)
        return web.Response()


async def _body(request: web.Request) -> bytes:
    body = await request.read()
    return gzip.decompress(body) if body[:2] == b"\x1f\x8b" else body


def _attributes(pairs: Any) -> dict[str, Any]:
    return {pair.key: getattr(pair.value, pair.value.WhichOneof("value")) for pair in pairs}


@asynccontextmanager
async def collecting() -> AsyncIterator[Collector]:
    """A collector on a free port."""
    collector = Collector()
    app = web.Application()
    app.router.add_post("/v1/traces", collector._traces)
    app.router.add_post("/v1/metrics", collector._metrics)
    runner = web.AppRunner(app, access_log=None)
    await runner.setup()
    try:
        await web.TCPSite(runner, "127.0.0.1", 0).start()
        collector.url = f"http://127.0.0.1:{runner.addresses[0][1]}"
        yield collector
    finally:
        await runner.cleanup()


class Scrape:
    """What an agent's ``/metrics`` said."""

    def __init__(self, text: str) -> None:
        self.text = text
        self.families: dict[str, Metric] = {one.name: one for one in text_string_to_metric_families(text)}

    def value(self, sample: str, **labels: str) -> float:
        """The sum of the samples of a name whose labels are these, or more."""
        found = [
            one.value
            for family in self.families.values()
            for one in family.samples
            if one.name == sample and labels.items() <= one.labels.items()
        ]
        assert found, f"no sample {sample} with {labels}"
        return sum(found)

    def exemplars(self, family: str) -> list[dict[str, str]]:
        """Their labels."""
        return [one.exemplar.labels for one in self.families[family].samples if one.exemplar is not None]


async def scrape(agent: Agent) -> Scrape:
    """Ask an agent's ``/metrics``, as Prometheus does."""
    port = (await agent.said(r"metrics are at .*:(\d+)"))[1]
    async with aiohttp.ClientSession() as http, http.get(f"http://127.0.0.1:{port}/metrics") as answer:
        assert answer.status == 200
        assert answer.headers["Content-Type"].startswith("application/openmetrics-text")
        return Scrape(await answer.text())
