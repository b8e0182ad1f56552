"""The command ``tidings``: its arguments, and the one place where an error becomes a sentence.

Exit status: 0 done, 1 failed (one sentence on standard error), 2 wrong usage, 130 interrupted.
A command's module in `tidings.commands` brings its arguments and its function; what it needs beyond the
standard library it imports when it runs, so that ``tidings token`` does not wait for NATS and HTTP.
"""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Final

import tidings
from tidings.commands import (
    agents,
    deadletters,
    dev,
    devices,
    doctor,
    explain,
    publish,
    schemas,
    settings,
    tokens,
    top,
    topology,
    user,
)
from tidings.wire.errors import TidingsError

__all__ = ["main", "parser"]

_CONFIG: Final[dict[str, Any]] = {"metavar": "FILE", "type": Path, "help": "TOML file with settings"}
_FAILED: Final = 1
_INTERRUPTED: Final = 130
_READER_LEFT: Final = 141


def parser() -> argparse.ArgumentParser:
    """All commands and their arguments."""
    program = argparse.ArgumentParser(
        prog="tidings",
        description="A self-hosted event mesh for real-time notifications.",
        epilog="Settings come from the command line, the environment (TIDINGS_…), --config, the defaults: "
        "`tidings settings` lists them.",
    )
    program.add_argument("--config", default=None, **_CONFIG)
    # Before or after the command. The one after has no default, which would undo the one before.
    common = argparse.ArgumentParser(add_help=False)
    common.add_argument("--config", default=argparse.SUPPRESS, **_CONFIG)
    program.add_argument("--version", action="version", version=f"tidings {tidings.__version__}")
    commands = program.add_subparsers(title="commands", metavar="COMMAND", required=True)
    for module in (
        dev,
        tokens,
        devices,
        publish,
        topology,
        agents,
        user,
        top,
        explain,
        deadletters,
        schemas,
        doctor,
        settings,
    ):
        module.register(commands, common)
    return program


def main(arguments: Sequence[str] | None = None) -> int:
    """Run a command; returns its exit status."""
    args = parser().parse_args(arguments)
    try:
        status: int = args.run(args)
        sys.stdout.flush()
        return status
    except TidingsError as error:
        return _fail(str(error))
    except BrokenPipeError:
        # Whoever read the output has enough (`| head`). The interpreter's own flush at exit must find no pipe.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return _READER_LEFT
    except OSError as error:
        return _fail(f"{error.strerror or error}{f': {error.filename}' if error.filename else ''}")
    except KeyboardInterrupt:
        return _INTERRUPTED


def _fail(sentence: str) -> int:
    print(f"tidings: {sentence}", file=sys.stderr)
    return _FAILED
