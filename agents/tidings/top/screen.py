"""What is shown of a mesh: a line for each agent, and what they do together."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from datetime import datetime
from typing import Final

from rich.console import Console, Group, RenderableType
from rich.live import Live
from rich.table import Table
from rich.text import Text

from tidings.telemetry import catalogue

from .readings import Reading, Span

__all__ = ["Display", "facts", "screen"]

_NOTHING: Final = "–"
_OBJECTIVE_S: Final = 0.2
"""What is slower than the service's objective is shown in red."""

Agents = Mapping[str, Span | str]
"""By name: what an agent said, or why it did not."""


class Display:
    """Where pictures go: standard output, one below the other, or on a terminal each in place of the one before."""

    def __init__(self) -> None:
        self._console = Console()
        self._live: Live | None = None

    @contextmanager
    def live(self) -> Iterator[None]:
        """Pictures replace each other for as long as the block lasts, where that can be seen."""
        if not self._console.is_terminal:
            yield
            return
        with Live(console=self._console, auto_refresh=False, screen=True) as self._live:
            yield

    def show(self, agents: Agents) -> None:
        """Show a picture of now."""
        picture = screen(agents, datetime.now())
        if self._live is None:
            self._console.print(picture)
        else:
            self._live.update(picture, refresh=True)


def _number(value: float | None) -> str:
    if value is None:
        return _NOTHING
    return f"{value:,.0f}" if value >= 10 or value == int(value) else f"{value:.1f}"


def _ms(value: float | None) -> Text:
    if value is None:
        return Text(_NOTHING)
    return Text(f"{1000 * value:,.1f} ms", style="red" if value > _OBJECTIVE_S else "")


def _kinds(reading: Reading) -> str:
    """What runs in a process: `tidings dev` is all of them."""
    kinds = {
        "gateway": catalogue.SESSIONS,
        "inbox": catalogue.STORED,
        "fanout": catalogue.FANNED_OUT,
        "api": catalogue.PUBLISHED,
    }
    return "+".join(kind for kind, sign in kinds.items() if reading.has(sign)) or "?"


def screen(agents: Agents, now: datetime) -> RenderableType:
    """One picture."""
    answered = {name: span for name, span in agents.items() if isinstance(span, Span)}
    whole = Reading(answered.values())
    head = Text(f"tidings top  {now:%H:%M:%S}  {len(answered)} of {len(agents)} agents answer", style="bold")
    if len(answered) < len(agents):
        head.stylize("red")
    return Group(head, _agents(agents), _together(whole))


def _agents(agents: Agents) -> Table:
    table = Table(box=None, pad_edge=False)
    for name in ("agent", "is"):
        table.add_column(name, no_wrap=True)
    for name in ("sessions", "deliveries/s", "acks/s", "again/s", "socket p99", "ack p99", "full", "CPU", "MB", "NATS"):
        table.add_column(name, justify="right", no_wrap=True)
    for name, span in agents.items():
        if isinstance(span, str):
            table.add_row(name, Text(span, style="red"))
            continue
        one = Reading([span])
        gateway = one.has(catalogue.SESSIONS)
        cpu = one.rate(catalogue.CPU)
        connected = bool(one.value(catalogue.NATS_CONNECTED))
        table.add_row(
            name,
            _kinds(one),
            *(
                (
                    _number(one.value(catalogue.SESSIONS, state="live")),
                    _number(one.rate(catalogue.DELIVERIES)),
                    _number(one.rate(catalogue.ACKS)),
                    _number(one.rate(catalogue.REDELIVERIES)),
                    _ms(one.quantile(0.99, catalogue.SOCKET_LATENCY)),
                    _ms(one.quantile(0.99, catalogue.ACK_LATENCY)),
                    _number(one.value(catalogue.WINDOWS, fill="full")),
                )
                if gateway
                else (_NOTHING,) * 7
            ),
            _NOTHING if cpu is None else f"{100 * cpu:.0f} %",
            f"{one.value(catalogue.MEMORY) / 1e6:,.0f}",
            Text("up" if connected else "DOWN", style="" if connected else "red"),
        )
    return table


def _together(whole: Reading) -> Table:
    table = Table(box=None, pad_edge=False, show_header=False)
    table.add_column(style="dim", no_wrap=True)
    table.add_column()
    for name, text in facts(whole).items():
        table.add_row(name, text)
    return table


def facts(whole: Reading) -> dict[str, Text]:
    """What the agents do together, by what it is called; only what an agent that answers has."""
    found: dict[str, Text] = {}

    def add(name: str, sign: catalogue.Instrument, text: Callable[[], str], *, alarm: bool = False) -> None:
        if whole.has(sign):
            found[name] = Text(text(), style="red" if alarm else "")

    def ms(share: float, instrument: catalogue.Instrument, **labels: str) -> str:
        return _ms(whole.quantile(share, instrument, **labels)).plain

    def listed(instrument: catalogue.Instrument, label: str) -> str:
        rates = sorted(whole.rates(instrument, label).items(), key=lambda item: -item[1])
        return ", ".join(f"{value} {_number(rate)}/s" for value, rate in rates) or "none"

    add(
        "sessions",
        catalogue.SESSIONS,
        lambda: ", ".join(
            f"{_number(whole.value(catalogue.SESSIONS, state=state))} {state}"
            for state in catalogue.SESSIONS.labels["state"]
        ),
    )
    add(
        "to the socket",
        catalogue.SOCKET_LATENCY,
        lambda: (
            f"p50 {ms(0.5, catalogue.SOCKET_LATENCY)}, p99 {ms(0.99, catalogue.SOCKET_LATENCY)}; "
            f"acknowledged p99 {ms(0.99, catalogue.ACK_LATENCY)}"
        ),
    )
    add("caught up", catalogue.CATCH_UPS, lambda: listed(catalogue.CATCH_UPS, "way"))
    add("closed", catalogue.CLOSES, lambda: listed(catalogue.CLOSES, "code"))
    add(
        "fan-out",
        catalogue.FANNED_OUT,
        lambda: (
            f"{listed(catalogue.FANNED_OUT, 'way')}; {_number(whole.rate(catalogue.COPIES))} copies/s; "
            f"p99 {ms(0.99, catalogue.FANOUT_LATENCY)}"
        ),
    )
    add(
        "inbox",
        catalogue.STORED,
        lambda: f"{_number(whole.rate(catalogue.STORED))} stored/s, p99 {ms(0.99, catalogue.INBOX_LATENCY)}",
    )
    add(
        "lag",
        catalogue.STREAM_LAG,
        lambda: ", ".join(
            f"{consumer} {_number(whole.value(catalogue.STREAM_LAG, consumer=consumer))}"
            for consumer in catalogue.STREAM_LAG.labels["consumer"]
        ),
    )
    add("published over HTTP", catalogue.PUBLISHED, lambda: listed(catalogue.PUBLISHED, "outcome"))
    refused = whole.value(catalogue.BREAKER, state="open") + whole.value(catalogue.BREAKER, state="half_open")
    add(
        "store",
        catalogue.BREAKER,
        lambda: (
            f"p99 {ms(0.99, catalogue.STORE_LATENCY)}, {_number(whole.rate(catalogue.STORE_FAILURES))} failures/s, "
            + (f"down for {_number(refused)} agents" if refused else "up")
        ),
        alarm=bool(refused),
    )
    dead = whole.rate(catalogue.DEAD_LETTERS) or 0.0
    add(
        "dead letters",
        catalogue.DEAD_LETTERS,
        lambda: (
            f"{_number(whole.value(catalogue.DEAD_LETTERS))} since the agents began, "
            f"{listed(catalogue.DEAD_LETTERS, 'reason')}"
        ),
        alarm=dead > 0,
    )
    return found
