"""What a user of the wheel does first: `tidings dev`, a listener, a notification, Ctrl-C.

Run by the Python that the wheel is installed in, away from the sources: ``python tests/wheel_smoke.py``.
"""

from __future__ import annotations

import contextlib
import json
import os
import queue
import re
import signal
import subprocess
import sys
import tempfile
import threading
import time
import urllib.request
from collections.abc import Iterator
from importlib import resources
from pathlib import Path
from typing import IO

import tidings

PATIENCE_S = 30
STOP_S = 5
CHECKOUT = Path(__file__).resolve().parent.parent
COMMAND = Path(sys.executable).parent / "tidings"


class Running:
    """A command and its lines."""

    def __init__(self, *arguments: str) -> None:
        self.process = subprocess.Popen(
            [str(COMMAND), *arguments], stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
        )
        self._lines: queue.Queue[str | None] = queue.Queue()
        assert self.process.stdout is not None
        threading.Thread(target=self._read, args=(self.process.stdout,), daemon=True).start()

    def _read(self, output: IO[str]) -> None:
        for line in output:
            self._lines.put(line.rstrip())
        self._lines.put(None)

    def said(self, pattern: str) -> str:
        """Wait for a line; returns its first group."""
        seen = []
        until = time.monotonic() + PATIENCE_S
        while True:
            line = self._lines.get(timeout=max(0.01, until - time.monotonic()))
            if line is None:
                raise SystemExit(f"{self.process.args} ended without {pattern!r}: {seen}")
            if found := re.search(pattern, line):
                return found[1] if found.re.groups else line
            seen.append(line)


@contextlib.contextmanager
def running(*arguments: str) -> Iterator[Running]:
    command = Running(*arguments)
    try:
        yield command
    finally:
        if command.process.poll() is None:
            command.process.kill()
        command.process.wait()


def main() -> None:
    installed = Path(tidings.__file__).resolve()
    assert "site-packages" in installed.parts, f"this is no installed wheel: {installed}"
    assert not installed.is_relative_to(CHECKOUT / "agents"), f"these are the sources: {installed}"
    assert resources.files("tidings").joinpath("py.typed").is_file(), "the wheel has no types"

    with tempfile.TemporaryDirectory() as folder:
        os.chdir(folder)
        listed = subprocess.run([str(COMMAND), "schemas", "list"], check=True, capture_output=True, text=True).stdout
        assert "social.like" in listed, "the wheel has no event schemas"
        with running("dev", "--port", "0", "--api-port", "0", "--nats-port", "0") as mesh:
            page = mesh.said(r"Page +(http://\S+)")
            api = mesh.said(r"HTTP api +(http://\S+)")
            nats = mesh.said(r"NATS +(nats://\S+)")
            with urllib.request.urlopen(page, timeout=PATIENCE_S) as answer:
                assert b"<title>Tidings</title>" in answer.read(), "the wheel has no page"
            with urllib.request.urlopen(api, timeout=PATIENCE_S) as answer:
                assert b"/v1/publish" in answer.read(), "the wheel has no contract of the HTTP api"
            with running("listen", "--user", "alice", "--json") as listener:
                listener.said("listening as alice")
                sent = ("--user", "alice", "--type", "wheel.smoke", "--data", '{"text":"hi"}', "--id", "one")
                subprocess.run([str(COMMAND), "publish", *sent, "--nats", nats], check=True, timeout=PATIENCE_S)
                item = json.loads(listener.said('^{.*"one".*'))
                assert item["n"]["data"] == {"text": "hi"}, item
                listener.process.send_signal(signal.SIGINT)
                listener.process.wait(timeout=PATIENCE_S)
            began = time.monotonic()
            mesh.process.send_signal(signal.SIGINT)
            status = mesh.process.wait(timeout=PATIENCE_S)
            took = time.monotonic() - began
            assert status == 0, f"tidings dev ended with {status}"
            assert took < STOP_S, f"tidings dev took {took:.1f} s to stop"
        os.chdir("/")
    print(f"tidings {tidings.__version__} from {installed.parent} works")


if __name__ == "__main__":
    main()
