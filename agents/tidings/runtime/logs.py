"""Logging for people: one line an event, on standard error.

``12:31:04 warning stream: the connection to NATS is lost``

What is logged names users, positions and subjects at most: never a payload, never a token. A traceback is
printed at level ``debug`` only; otherwise an error is named with the place it came from.
"""

from __future__ import annotations

import logging
import sys
import traceback
from typing import Final, TextIO

__all__ = ["OneLine", "flat", "set_up"]

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
        if error is not None and self._tracebacks:
            line += "\n" + "".join(traceback.format_exception(error)).rstrip()
        return line


def _named(error: BaseException) -> str:
    frames = traceback.extract_tb(error.__traceback__)
    place = f" ({frames[-1].filename.rpartition('/')[2]}:{frames[-1].lineno})" if frames else ""
    return f"{type(error).__name__}: {error}{place}"


def flat(text: str) -> str:
    """Without line breaks and escape sequences: a publisher's strings must not write our log, nor steer a terminal."""
    return "".join(char if char.isprintable() else char.encode("unicode_escape").decode() for char in text)


def set_up(level: str, stream: TextIO | None = None) -> None:
    """Send what Tidings logs at `level` and above, and warnings of libraries, to `stream` (standard error)."""
    debug = level == "debug"
    handler = logging.StreamHandler(stream or sys.stderr)
    handler.setFormatter(OneLine(tracebacks=debug))
    root = logging.getLogger()
    root.handlers[:] = [handler]
    root.setLevel(logging.WARNING)
    logging.getLogger("tidings").setLevel(level.upper())
    for name in _LIBRARIES:
        logging.getLogger(name).setLevel(logging.INFO if debug else logging.WARNING)
