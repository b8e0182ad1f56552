"""What `tidings top` makes of two scrapes."""

from __future__ import annotations

from datetime import datetime

import pytest
from rich.console import Console

from tidings.telemetry import catalogue
from tidings.top.readings import Reading, Span, read
from tidings.top.screen import screen


def text(*lines: str) -> str:
    return "\n".join([*lines, "# EOF\n"])


def deliveries(personal: float, broadcast: float) -> str:
    name = catalogue.DELIVERIES.prometheus
    return text(
        f"# TYPE {name} counter",
        f'{name}_total{{plane="personal"}} {personal}',
        f'{name}_total{{plane="broadcast"}} {broadcast}',
    )


def latency(*counts: int) -> str:
    name = catalogue.SOCKET_LATENCY.prometheus
    bounds = ("0.1", "0.2", "+Inf")
    return text(
        f"# TYPE {name} histogram",
        *(f'{name}_bucket{{plane="personal",le="{le}"}} {n}' for le, n in zip(bounds, counts, strict=True)),
        f'{name}_count{{plane="personal"}} {counts[-1]}',
        f'{name}_sum{{plane="personal"}} 1.0',
    )


def test_rates_are_per_second_and_summed() -> None:
    first = Span(read(deliveries(110, 5), 12.0), read(deliveries(100, 5), 10.0))
    second = Span(read(deliveries(20, 0), 12.0), read(deliveries(10, 0), 7.0))
    both = Reading([first, second])
    assert both.rate(catalogue.DELIVERIES) == 5.0 + 2.0
    assert both.rate(catalogue.DELIVERIES, plane="broadcast") == 0.0
    assert both.rates(catalogue.DELIVERIES, "plane") == {"personal": 7.0}
    assert both.value(catalogue.DELIVERIES) == 135.0
    assert Reading([Span(first.now, None)]).rate(catalogue.DELIVERIES) is None


def test_a_counter_that_fell_began_anew() -> None:
    """An agent that was restarted counts from nothing."""
    assert (
        Reading([Span(read(deliveries(4, 0), 2.0), read(deliveries(1000, 0), 1.0))]).rate(catalogue.DELIVERIES) == 4.0
    )


@pytest.mark.parametrize(
    ("counts", "share", "expected"),
    [((10, 10, 10), 0.5, 0.05), ((10, 20, 20), 0.75, 0.15), ((0, 0, 8), 0.5, 0.2), ((0, 0, 0), 0.5, None)],
)
def test_quantiles_lie_in_their_bin(counts: tuple[int, int, int], share: float, expected: float | None) -> None:
    found = Reading([Span(read(latency(*counts), 2.0), read(latency(0, 0, 0), 1.0))])
    assert found.quantile(share, catalogue.SOCKET_LATENCY) == pytest.approx(expected)


def test_what_is_no_metrics_is_refused() -> None:
    with pytest.raises(ValueError, match=r"\S"):
        read("<html>", 1.0)


def test_an_agent_that_does_not_answer_is_shown() -> None:
    console = Console(width=200, record=True, file=None, force_terminal=False, quiet=False)
    agents = {"one": Span(read(deliveries(1, 0), 1.0), None), "two": "does not answer"}
    with console.capture() as capture:
        console.print(screen(agents, datetime(2026, 1, 31, 12, 0, 0)))
    said = capture.get()
    assert "12:00:00  1 of 2 agents answer" in said
    assert "does not answer" in said
