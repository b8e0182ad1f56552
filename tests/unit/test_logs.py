"""What the log looks like, and what never gets into it."""

from __future__ import annotations

import io
import json
import logging
import re
from collections.abc import Iterator

import pytest

from tidings.runtime import logs

log = logging.getLogger("tidings.gateway")


@pytest.fixture(autouse=True)
def as_before() -> Iterator[None]:
    """Put the process's logging back."""
    root, ours = logging.getLogger(), logging.getLogger("tidings")
    kept = root.handlers[:], root.level, ours.level
    yield
    root.handlers[:], root.level, ours.level = kept
    # Levels are cached by logger.
    logging.getLogger("tidings").setLevel(kept[2])


def written(level: str) -> io.StringIO:
    stream = io.StringIO()
    logs.set_up(level, stream)
    return stream


def test_one_line_an_event() -> None:
    """Time, level, part, text."""
    stream = written("info")
    log.info("gateway %s listens", "g1")
    assert re.fullmatch(r"\d\d:\d\d:\d\d info gateway: gateway g1 listens\n", stream.getvalue())


def test_level_is_kept() -> None:
    """What is below the level is not written, nor are the libraries' notes."""
    stream = written("warning")
    log.info("no")
    logging.getLogger("nats.aio.client").info("no")
    log.warning("yes")
    assert stream.getvalue().count("\n") == 1


def test_foreign_text_stays_on_its_line() -> None:
    """Line breaks and escape sequences of a publisher's strings are written out; other scripts are left."""
    stream = written("info")
    log.info("subject %s", "a\r\n12:00:00 error fake: \x1b[31mred\u2028é")
    assert stream.getvalue().count("\n") == 1
    assert r"a\r\n12:00:00 error fake: \x1b[31mred\u2028é" in stream.getvalue()


@pytest.mark.parametrize(("level", "traceback"), [("info", False), ("debug", True)])
def test_errors_are_named(level: str, traceback: bool) -> None:
    """An error is named with its place; its traceback is for level debug."""
    stream = written(level)
    try:
        raise ValueError("two\nlines")
    except ValueError:
        log.exception("it failed")
    assert re.search(r"error gateway: it failed: ValueError: two\\nlines \(test_logs\.py:\d+\)\n", stream.getvalue())
    assert ("Traceback" in stream.getvalue()) is traceback


def test_a_line_of_json() -> None:
    """Each event is one object on one line, whatever its text holds; errors and traces are named."""
    stream = io.StringIO()
    logs.set_up("info", stream, form="json")
    log = logging.getLogger("tidings.gateway")
    log.warning("two\nlines of %s", "\ud83d")
    try:
        raise ValueError("bad")
    except ValueError:
        log.exception("it failed", extra={"trace_id": "ab", "span_id": "cd"})
    first, second = map(json.loads, stream.getvalue().splitlines())
    assert (first["level"], first["logger"], first["message"]) == ("warning", "gateway", "two\nlines of \\ud83d")
    assert "trace_id" not in first
    assert second["error"].startswith("ValueError: bad (test_logs.py:")
    assert (second["trace_id"], second["span_id"]) == ("ab", "cd")
    assert "traceback" not in second
