"""The comparison's parts that need no server: the dialects, the ledger, the report."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import orjson
import pytest
from bench.peers import report
from bench.peers.dialects import Centrifugo, Place, SocketIO, Tidings
from bench.peers.fleet import Ledger
from bench.publisher import EVERYBODY

KEY = "k" * 32


class Said:
    """A device that keeps what it was told to say and what it was given."""

    def __init__(self, *, shared: bool = False, place: Place | None = None) -> None:
        self.number = 7
        self.place = place or Place()
        self.shared = shared
        self.problem = ""
        self.after_s: float | None = None
        self.said: list[bytes] = []
        self.events: list[Any] = []

    def say(self, payload: bytes) -> None:
        self.said.append(payload)

    def ready(self) -> None:
        self.events.append("ready")

    def got(self, data: dict[str, Any]) -> None:
        self.events.append(data)


def test_tidings_acknowledges_a_read_in_one_frame() -> None:
    device, dialect = Said(), Tidings(KEY)
    dialect.opened(device)
    assert orjson.loads(device.said.pop())["t"] == "hello"
    dialect.text(device, b'{"t":"welcome"}')
    for position in ("a", "b"):
        dialect.text(device, b'{"t":"n","items":[{"pos":"%b","n":{"data":{"run":1}}}]}' % position.encode())
    dialect.read(device)
    dialect.read(device)
    assert device.events == ["ready", {"run": 1}, {"run": 1}]
    assert device.said == [b'{"t":"ack","pos":["a","b"]}']
    dialect.text(device, b'{"t":"bye","after_ms":1500}')
    assert device.after_s == 1.5


def test_centrifugo_recovers_from_where_it_was() -> None:
    first, dialect = Said(shared=True), Centrifugo(KEY)
    dialect.opened(first)
    assert b'"channel":"news:crowd"' in first.said[0]
    assert b"recover" not in first.said[0]
    dialect.text(first, b'{"id":1,"connect":{}}\n{"id":2,"subscribe":{"epoch":"e","offset":3}}')
    dialect.text(first, b'{"push":{"pub":{"data":{"run":1},"offset":4}}}\n{}')
    assert first.events == ["ready", {"run": 1}]
    assert first.said[1:] == [b"{}"]
    again = Said(shared=True, place=first.place)
    dialect.opened(again)
    assert orjson.loads(again.said[0].split(b"\n")[1])["subscribe"] == {
        "channel": "news:crowd",
        "recover": True,
        "offset": 4,
        "epoch": "e",
    }
    dialect.text(again, b'{"id":2,"subscribe":{"epoch":"e","offset":6,"publications":[{"data":{"run":2},"offset":5}]}}')
    assert again.events == ["ready", {"run": 2}]
    dialect.text(again, b'{"id":2,"error":{"message":"no"}}')
    assert again.problem == "no"


def test_socketio_recovers_its_session() -> None:
    first, dialect = Said(), SocketIO(KEY)
    dialect.opened(first)
    dialect.text(first, b'0{"sid":"x","pingInterval":25000}')
    assert first.said == [b'40{"room":"bench-7"}']
    dialect.text(first, b'40{"sid":"s","pid":"p"}')
    dialect.text(first, b'42["n",{"run":1},"o1"]')
    dialect.text(first, b"2")
    assert first.events == ["ready", {"run": 1}]
    assert first.said[1:] == [b"3"]
    again = Said(place=first.place)
    dialect.text(again, b'0{"sid":"y"}')
    assert orjson.loads(again.said[0][2:]) == {"room": "bench-7", "pid": "p", "offset": "o1"}


def test_ledger_counts_each_delivery_once() -> None:
    ledger = Ledger(1, 2, 3)
    for device in (0, 1, 1, 5):
        ledger.came({"number": 0, "device": EVERYBODY, "ns": 100}, device, 50, 160)
    ledger.came({"number": 1, "device": EVERYBODY, "ns": 100}, 2, 150, 170)
    assert (ledger.received, ledger.duplicates, ledger.misled) == (3, 1, 1)
    assert (list(ledger.latencies), list(ledger.replays)) == ([60, 60], [20])
    assert ledger.missing(set()) == 3
    assert ledger.missing({1}) == 1
    own = Ledger(1, 2, 0)
    own.came({"number": 0, "device": 4, "ns": 100}, 4, 50, 160)
    own.came({"number": 1, "device": 4, "ns": 100}, 3, 50, 160)
    assert (own.received, own.misled, own.missing(set())) == (1, 1, 1)


FIGURES = report.summary(
    {
        "tidings": [
            {"front_kb": 10.0, "all_kb": 60.0, "jitter_received_percent": 100.0, "broadcast_us": 9.0},
            {"front_kb": 12.0, "all_kb": 60.0, "jitter_received_percent": 100.0, "broadcast_us": 9.0},
        ],
        "centrifugo": [{"front_kb": 50.0, "all_kb": 50.0, "jitter_received_percent": 90.0, "broadcast_us": 9.5}],
    }
)


def test_goals_are_ratios_of_medians() -> None:
    said = report.goals_table(FIGURES)
    assert "| Memory a device, gateway by Centrifugo | 0.22 | ≤ 0.4: met |" in said
    assert "| Broadcast, CPU a delivery, all of ours by Centrifugo | 0.95 | ≤ 0.5: **missed** |" in said
    assert "| Jitter: received | 100.00 % | ≥ 100 %: met |" in said
    assert "| Deploy: received | not measured | ≥ 100 % |" in said


def test_losses_are_said() -> None:
    lines = report.lines((), ())
    assert report.losses(FIGURES, lines) == [
        "- Memory of an idle device, all processes: 60.0 against 50.0 KB (centrifugo)"
    ]
    assert "| Memory of an idle device, the process that it is connected to | KB | 11.0 (10.0 to 12.0) | 50.0 |" in (
        report.table(FIGURES, lines)
    )


@pytest.mark.filterwarnings("default")
def test_plot_is_the_same_for_the_same_figures(tmp_path: Path) -> None:
    files = [tmp_path / "plots" / name for name in ("one.svg", "two.svg")]
    for file in files:
        report.plot(FIGURES, (), file)
    one, two = (file.read_bytes() for file in files)
    assert one == two
    assert b"centrifugo" in one or b"<svg" in one
