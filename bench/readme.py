"""Tables in ``bench/README.md`` that the suites write themselves, between two markers each."""

from __future__ import annotations

from pathlib import Path
from typing import Final

from .host import BenchFailed

__all__ = ["write"]

_FILE: Final = Path(__file__).with_name("README.md")


def write(text: str, begin: str, end: str) -> None:
    """Put `text` between the markers, in place of what is there."""
    head, found, rest = _FILE.read_text().partition(begin)
    _, ended, tail = rest.partition(end)
    if not found or not ended:
        raise BenchFailed(f"{_FILE.name} has lost its markers: {begin} and {end}")
    _FILE.write_text(f"{head}{begin}\n\n{text}\n\n{end}{tail}")
