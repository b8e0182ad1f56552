"""The command line as a user has it: processes of ``tidings``, what they print, and what they leave behind."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
import re
import signal
import socket
import sys
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager
from pathlib import Path

from tidings.cli import main

from .clock import PATIENCE_S


class Command:
    """A running ``tidings …``: its lines as they come, its exit status."""

    def __init__(self, process: asyncio.subprocess.Process, program: str) -> None:
        self.process = process
        self.lines: list[str] = []
        """Standard output and standard error, in the order of arrival."""
        self.out: list[str] = []
        self.errors: list[str] = []
        self._program = program
        self._news = asyncio.Condition()
        assert process.stdout is not None
        assert process.stderr is not None
        self._readers = asyncio.gather(self._read(process.stdout, self.out), self._read(process.stderr, self.errors))

    async def _read(self, stream: asyncio.StreamReader, kept: list[str]) -> None:
        async for line in stream:
            async with self._news:
                text = line.decode(errors="replace").rstrip("\n")
                kept.append(text)
                self.lines.append(text)
                self._news.notify_all()

    async def said(self, pattern: str) -> re.Match[str]:
        """Wait for a line that matches; fails when the process ends without one."""

        def found() -> re.Match[str] | None:
            return next((match for line in self.lines if (match := re.search(pattern, line))), None)

        async def wait() -> None:
            async with self._news:
                await self._news.wait_for(found)

        waiting = asyncio.ensure_future(wait())
        try:
            await asyncio.wait({waiting, self._readers}, timeout=PATIENCE_S, return_when=asyncio.FIRST_COMPLETED)
        finally:
            waiting.cancel()
        match = found()
        assert match is not None, f"{self._program} did not say {pattern!r}: {self.lines[-8:]}"
        return match

    async def ended(self, patience_s: float = PATIENCE_S) -> int:
        """Wait for the end; returns the exit status."""
        try:
            async with asyncio.timeout(patience_s):
                await self.process.wait()
                await self._readers
        except TimeoutError:
            raise AssertionError(f"{self._program} runs on: {self.lines[-8:]}") from None
        assert self.process.returncode is not None
        return self.process.returncode

    async def stop(self, number: signal.Signals = signal.SIGINT, patience_s: float = PATIENCE_S) -> int:
        """Send a signal and wait for the end."""
        if self.process.returncode is None:
            self.process.send_signal(number)
        return await self.ended(patience_s)

    async def end_anyway(self) -> None:
        """Whatever the test left running."""
        if self.process.returncode is None:
            with contextlib.suppress(ProcessLookupError):
                self.process.kill()
        await self.ended()

    def sentences(self) -> list[str]:
        """What the command says of itself; a traceback is an error of its own."""
        assert not any("Traceback" in line for line in self.lines), self.lines
        return [line.removeprefix("tidings: ") for line in self.errors if line.startswith("tidings: ")]

    def sentence(self) -> str:
        """The one sentence of a command that failed."""
        said = self.sentences()
        assert len(said) == 1, self.lines
        return said[0]


@asynccontextmanager
async def tidings(
    *arguments: str | Path, cwd: Path | None = None, python: str = sys.executable, **environment: str
) -> AsyncIterator[Command]:
    """Run ``tidings`` with these arguments; nothing of it is left at the end of the block."""
    inherited = {name: value for name, value in os.environ.items() if not name.startswith("TIDINGS_")}
    process = await asyncio.create_subprocess_exec(
        python,
        "-m",
        "tidings",
        *map(str, arguments),
        stdin=asyncio.subprocess.DEVNULL,
        stdout=asyncio.subprocess.PIPE,
        stderr=asyncio.subprocess.PIPE,
        env={**inherited, **environment},
        cwd=cwd,
    )
    command = Command(process, f"tidings {arguments[0] if arguments else ''}")
    try:
        yield command
    finally:
        await command.end_anyway()


async def answer(*arguments: str | Path, cwd: Path | None = None, **environment: str) -> Command:
    """Run ``tidings`` to its end."""
    async with tidings(*arguments, cwd=cwd, **environment) as command:
        await command.ended()
        return command


def run_here(*arguments: str | Path) -> int:
    """Run ``tidings`` in this process, outside of any event loop; returns its exit status."""
    root, ours = logging.getLogger(), logging.getLogger("tidings")
    before = root.handlers[:], root.level, ours.level
    try:
        return main([str(word) for word in arguments])
    finally:
        root.handlers[:] = before[0]
        root.setLevel(before[1])
        ours.setLevel(before[2])


def processes_of(folder: Path) -> list[str]:
    """Command lines of processes that work in a folder (named in their arguments)."""
    found = []
    for entry in Path("/proc").glob("[0-9]*/cmdline"):
        try:
            words = entry.read_bytes().split(b"\0")
        except (FileNotFoundError, ProcessLookupError):
            continue
        if any(os.fsencode(folder) in word for word in words) and entry.parent.name != str(os.getpid()):
            found.append(b" ".join(words).decode(errors="replace"))
    return found


@contextlib.contextmanager
def taken_port() -> Iterator[int]:
    """A port that somebody else listens on."""
    with socket.create_server(("127.0.0.1", 0)) as server:
        yield server.getsockname()[1]
