"""The comparison runs with our own servers under every load, and nothing of theirs is lost. Nothing here is timed."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any, Final

import pytest

ROOT: Final = Path(__file__).parents[2]
PATIENCE_S: Final = 300


def compare(*arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "bench.peers", "--quick", *arguments],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=PATIENCE_S,
        check=False,
    )


@pytest.fixture(scope="module")
def figures(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """Of one quick run, by peer."""
    file = tmp_path_factory.mktemp("peers") / "peers.json"
    done = compare("--peers", "tidings,tidings-no-inbox", "--json", str(file))
    assert done.returncode == 0, done.stderr
    return json.loads(file.read_text())["figures"]


@pytest.mark.parametrize("peer", ["tidings", "tidings-no-inbox"])
def test_nothing_is_lost(figures: Any, peer: str) -> None:
    """Steady, cut, restarted and stormed: every notification comes, and every device comes back."""
    shares = {key: found["min"] for key, found in figures[peer].items() if "received_percent" in key or "back" in key}
    assert {"personal_100_received_percent", "jitter_received_percent", "deploy_received_percent"} <= set(shares)
    assert set(shares.values()) == {100.0}, shares
    assert figures[peer]["jitter_replayed"]["min"] > 0


def test_a_peer_that_is_not_here(tmp_path: Path) -> None:
    """Asked for by name and not found, it is an error that says what is missing."""
    done = compare("--peers", "centrifugo-redis", "--redis", "no-such-redis", "--json", str(tmp_path / "x.json"))
    assert done.returncode == 2
    assert "no-such-redis is not here" in done.stderr
