"""Logging: one line an event, on standard error, for people or (`form` ``json``) for machines.

``12:31:04 warning stream: the connection to NATS is lost``

``{"time":"2026-01-31T12:31:04.120Z","level":"warning","logger":"stream","message":"the connection to NATS is lost"}``

What is logged within a sampled trace names its ids: ``trace_id`` and ``span_id``.

What is logged names users, positions and subjects at most: never a payload, never a token. A traceback is
printed at level ``debug`` only; otherwise an error is named with the place it came from.
"""

from __future__ import annotations

import logging
import sys
import traceback
from datetime import UTC, datetime
from typing import Final, TextIO

import orjson

__all__ = ["JsonLine", "OneLine", "flat", "set_up"]

_LIBRARIES: Final = ("aiohttp", "asyncio", "nats", "websockets")


class OneLine(logging.Formatter):
    """Formats a record as one line, whatever a message or an error text holds."""

    def __init__(self, *, tracebacks: bool = False) -> None:
        super().__init__()
        self._tracebacks = tracebacks

    def format(self, record: logging.LogRecord) -> str:
        text = record.getMessage()
        error = record.exc_info[1] if record.exc_info else None
        if error is not None:
            text = f"{text}: {_named(error)}"
        clock = self.formatTime(record, "%H:%M:%S")
        line = f"{clock} {record.levelname.lower()} {record.name.removeprefix('tidings.')}: {flat(text)}"
        if hasattr(record, "trace_id"):
            line += f" [trace {record.trace_id}]"
        if error is not None and self._tracebacks:
            line += "\n" + "".join(traceback.format_exception(error)).rstrip()
        return line


class JsonLine(logging.Formatter):
    """Formats a record as one JSON object: ``time``, ``level``, ``logger``, ``message``, and where there are such
    ``error``, ``traceback``, ``trace_id`` and ``span_id``."""

    def __init__(self, *, tracebacks: bool = False) -> None:
        super().__init__()
        self._tracebacks = tracebacks

    def format(self, record: logging.LogRecord) -> str:
        moment = datetime.fromtimestamp(record.created, UTC).isoformat(timespec="milliseconds")
        line: dict[str, str] = {
            "time": moment.replace("+00:00", "Z"),
            "level": record.levelname.lower(),
            "logger": record.name.removeprefix("tidings."),
            "message": record.getMessage(),
        }
        error = record.exc_info[1] if record.exc_info else None
        if error is not None:
            line["error"] = _named(error)
            if self._tracebacks:
                line["traceback"] = "".join(traceback.format_exception(error)).rstrip()
        for name in ("trace_id", "span_id"):
            if hasattr(record, name):
                line[name] = getattr(record, name)
        return orjson.dumps(_writable(line)).decode()


def _writable(line: dict[str, str]) -> dict[str, str]:
    """JSON is UTF-8, and a text may have half a surrogate pair."""
    return {name: text.encode(errors="backslashreplace").decode() for name, text in line.items()}


def _named(error: BaseException) -> str:
    frames = traceback.extract_tb(error.__traceback__)
    place = f" ({frames[-1].filename.rpartition('/')[2]}:{frames[-1].lineno})" if frames else ""
    return f"{type(error).__name__}: {error}{place}"


def flat(text: str) -> str:
    """Without line breaks and escape sequences: a publisher's strings must not write our log, nor steer a terminal."""
    return "".join(char if char.isprintable() else char.encode("unicode_escape").decode() for char in text)


def set_up(level: str, stream: TextIO | None = None, *, form: str = "text") -> None:
    """Send what Tidings logs at `level` and above, and warnings of libraries, to `stream` (standard error), as lines of
    ``text`` or ``json``."""
    debug = level == "debug"
    handler = logging.StreamHandler(stream or sys.stderr)
    handler.setFormatter((JsonLine if form == "json" else OneLine)(tracebacks=debug))
    root = logging.getLogger()
    root.handlers[:] = [handler]
    root.setLevel(logging.WARNING)
    logging.getLogger("tidings").setLevel(level.upper())
    for name in _LIBRARIES:
        logging.getLogger(name).setLevel(logging.INFO if debug else logging.WARNING)
