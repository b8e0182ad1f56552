"""Telemetry of a process: its numbers at ``/metrics`` and by OTLP, its spans by OTLP.

Off (`telemetry_of` returns None) there is nothing of it: no import of OpenTelemetry, no listener, and one ``if`` on
each path that would be measured.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Callable, Iterable
from typing import TYPE_CHECKING, Any, Final, Protocol

from aiohttp import web
from opentelemetry import trace
from opentelemetry.metrics import CallbackOptions, Observation
from opentelemetry.sdk.metrics import Exemplar, MeterProvider
from opentelemetry.sdk.metrics.export import (
    AggregationTemporality,
    HistogramDataPoint,
    InMemoryMetricReader,
    Metric,
    MetricExporter,
    MetricExportResult,
    MetricsData,
    ResourceMetrics,
    ScopeMetrics,
)
from opentelemetry.sdk.metrics.export import Histogram as HistogramData
from opentelemetry.sdk.resources import Resource
from opentelemetry.sdk.trace import TracerProvider
from opentelemetry.sdk.trace.export import BatchSpanProcessor
from opentelemetry.sdk.trace.sampling import ALWAYS_ON, ParentBased

import tidings
from tidings.runtime.listening import listen
from tidings.runtime.memory import resident_bytes
from tidings.runtime.porch import Porch, Runner
from tidings.runtime.service import Service
from tidings.runtime.settings import Settings

from . import catalogue
from .catalogue import LATENCY_S, Instrument, Kind
from .exposition import CONTENT_TYPE, render
from .numbers import Histogram, Numbers
from .tracing import Tracing

if TYPE_CHECKING:
    from opentelemetry.metrics import Meter

__all__ = ["Telemetry"]

_SCOPE: Final = "tidings"
_EXPORT_TIMEOUT_S: Final = 5.0
_CONNECTIONS: Final = 64
"""To /metrics, whose readers never say who they are: the one that has been there for longest makes room."""


class Connected(Protocol):
    """What is asked of a connection."""

    @property
    def is_connected(self) -> bool: ...

    @property
    def reconnects(self) -> int: ...


class Telemetry(Service):
    """What the agents of one process count, and where it can be had. Agents get `numbers` and `tracing`.

    `agent` names the process in what is exported (``service.name`` is ``tidings-<agent>``).
    """

    name = "telemetry"

    def __init__(self, settings: Settings, agent: str) -> None:
        super().__init__()
        self._settings = settings
        self.numbers = Numbers()
        self._resource = Resource.create({"service.name": f"tidings-{agent}", "service.version": tidings.__version__})
        self._reader = InMemoryMetricReader()
        self._meters = MeterProvider([self._reader], self._resource, shutdown_on_exit=False)
        self._tracers = TracerProvider(ParentBased(ALWAYS_ON), self._resource, shutdown_on_exit=False)
        self._exporter: MetricExporter | None = None
        self._began_ns = time.time_ns()
        self._known: set[str] = set()
        self._now: dict[str, dict[tuple[str, ...], float]] = {}
        self._runner: Runner | None = None
        self.tracing = Tracing(self._tracers.get_tracer(_SCOPE, tidings.__version__), settings.trace_sample_ratio)
        self.port = 0
        """Of ``/metrics``, once started."""
        self.numbers.observe(catalogue.CPU, lambda: [((), time.process_time())])
        self.numbers.observe(catalogue.MEMORY, lambda: [((), used)] if (used := resident_bytes()) is not None else [])

    def watch_connection(self, connection: Connected) -> None:
        """Show whether an agent's connection to NATS is up."""
        self.numbers.observe(catalogue.NATS_CONNECTED, lambda: [((), int(connection.is_connected))])
        self.numbers.observe(catalogue.NATS_RECONNECTS, lambda: [((), connection.reconnects)])

    async def _start(self) -> None:
        settings = self._settings
        if settings.otlp_endpoint:
            self._open_otlp(settings.otlp_endpoint.rstrip("/"))
            self.spawn(self._push())
        _name_traces_in_logs()
        app = web.Application()
        app.router.add_get("/metrics", self._metrics)
        porch = Porch(_CONNECTIONS)
        self._runner = Runner(app, porch, access_log=None, handle_signals=False, shutdown_timeout=1.0)
        where = settings.metrics_host, settings.metrics_port
        self.port = await listen(self, self._runner, settings, where, backlog=64, variable="TIDINGS_METRICS_PORT")
        self.log.info("metrics are at %s:%d/metrics", settings.metrics_host, self.port)

    def _open_otlp(self, endpoint: str) -> None:
        from opentelemetry.exporter.otlp.proto.http.metric_exporter import OTLPMetricExporter
        from opentelemetry.exporter.otlp.proto.http.trace_exporter import OTLPSpanExporter

        self._exporter = OTLPMetricExporter(f"{endpoint}/v1/metrics", timeout=_EXPORT_TIMEOUT_S)
        spans = OTLPSpanExporter(f"{endpoint}/v1/traces", timeout=_EXPORT_TIMEOUT_S)
        every_ms = min(5000.0, self._settings.otlp_interval_s * 1000)
        self._tracers.add_span_processor(BatchSpanProcessor(spans, schedule_delay_millis=every_ms))

    async def _stop(self) -> None:
        if self._runner is not None:
            await self._runner.cleanup()
        exporter, self._exporter = self._exporter, None
        if exporter is not None:
            await self._export(exporter)
            await asyncio.to_thread(exporter.shutdown)
        # It sends what it has, and waits for that.
        await asyncio.to_thread(self._tracers.shutdown)
        self._meters.shutdown()

    # Collecting, always in the thread of the loop: what is counted may not change under the reader.

    def collect(self) -> MetricsData:
        """All metrics as they are now."""
        self._now = {}
        meter = self._meters.get_meter(_SCOPE, tidings.__version__)
        for instrument, values in self.numbers.read():
            self._now[instrument.name] = dict(values)
            if instrument.name not in self._known:
                self._known.add(instrument.name)
                self._show(meter, instrument)
        data = self._reader.get_metrics_data()
        assert data is not None, "the process has metrics of its own"
        return self._with_histograms(data)

    def _show(self, meter: Meter, instrument: Instrument) -> None:
        make = meter.create_observable_counter if instrument.kind is Kind.COUNTER else meter.create_observable_gauge
        make(instrument.name, [self._reading(instrument)], instrument.unit, instrument.text)

    def _reading(self, instrument: Instrument) -> Callable[[CallbackOptions], Iterable[Observation]]:
        names = tuple(instrument.labels)

        def read(options: CallbackOptions) -> Iterable[Observation]:
            now = self._now[instrument.name]
            return [Observation(value, dict(zip(names, values, strict=True))) for values, value in now.items()]

        return read

    def _with_histograms(self, data: MetricsData) -> MetricsData:
        """OpenTelemetry takes no histogram that was counted elsewhere: they are put beside what it collected."""
        now_ns = time.time_ns()
        ours = [self._histogram(one, now_ns) for one in self.numbers.histograms.values()]
        resource = data.resource_metrics[0]
        scope = resource.scope_metrics[0]
        whole = ScopeMetrics(scope.scope, [*scope.metrics, *ours], scope.schema_url)
        return MetricsData([ResourceMetrics(resource.resource, [whole], resource.schema_url)])

    def _histogram(self, histogram: Histogram, now_ns: int) -> Metric:
        instrument = histogram.instrument
        points = [
            HistogramDataPoint(
                attributes=dict(zip(instrument.labels, values, strict=True)),
                start_time_unix_nano=self._began_ns,
                time_unix_nano=now_ns,
                count=sum(bins.counts),
                sum=bins.total,
                bucket_counts=tuple(bins.counts),
                explicit_bounds=LATENCY_S,
                min=float("nan"),
                max=float("nan"),
                exemplars=[
                    Exemplar({}, one.value, one.at_ns, one.span_id, one.trace_id) for one in bins.exemplars.values()
                ],
            )
            for values, bins in histogram.members.items()
        ]
        data = HistogramData(points, AggregationTemporality.CUMULATIVE)
        return Metric(instrument.name, instrument.text, instrument.unit, data)

    async def _metrics(self, request: web.Request) -> web.Response:
        body = render(self.collect()).encode()
        return web.Response(body=body, headers={"Content-Type": CONTENT_TYPE})

    async def _push(self) -> None:
        while self._exporter is not None:
            await asyncio.sleep(self._settings.otlp_interval_s)
            await self._export(self._exporter)

    async def _export(self, exporter: MetricExporter) -> None:
        # The exporter blocks. It is given what it needs, and reads nothing that goes on changing.
        result = await asyncio.to_thread(exporter.export, self.collect())
        if result is not MetricExportResult.SUCCESS:
            self.log.warning("the metrics could not be exported by OTLP to %s", self._settings.otlp_endpoint)


class _TraceIds(logging.Filter):
    """Gives each record the ids of the span around it, for `runtime.logs` to write."""

    def filter(self, record: logging.LogRecord) -> bool:
        around: Any = trace.get_current_span().get_span_context()
        if around.is_valid:
            record.trace_id, record.span_id = f"{around.trace_id:032x}", f"{around.span_id:016x}"
        return True


def _name_traces_in_logs() -> None:
    for handler in logging.getLogger().handlers:
        if not any(isinstance(one, _TraceIds) for one in handler.filters):
            handler.addFilter(_TraceIds())
