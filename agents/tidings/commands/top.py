"""``tidings top``: a live view of a running mesh."""

from __future__ import annotations

import argparse
import asyncio
import ssl
import time
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Final

from tidings.wire.errors import StartFailed

from .common import Commands, load, run

if TYPE_CHECKING:
    from aiohttp import ClientSession

    from tidings.runtime.settings import Settings
    from tidings.top.readings import Scrape, Span

__all__ = ["register"]

_TIMEOUT_S: Final = 3.0
_MOST_BYTES: Final = 4_000_000
"""An agent's numbers are some tens of thousands of bytes."""
_LEAST_S: Final = 0.2


def register(commands: Commands[argparse.ArgumentParser], common: argparse.ArgumentParser) -> None:
    parser = commands.add_parser("top", parents=[common], help="watch a running mesh", description=_top.__doc__)
    parser.add_argument(
        "urls",
        nargs="*",
        metavar="URL",
        help="an agent's metrics, such as http://10.0.0.7:9464 (default: where the settings say)",
    )
    parser.add_argument(
        "--every", metavar="S", type=_seconds, default=2.0, help="seconds between two looks (default: 2)"
    )
    parser.add_argument("--once", action="store_true", help="look twice, print what was between, and end")
    parser.add_argument("--ca", metavar="FILE", help="what certificates of https:// addresses are checked against")
    parser.set_defaults(run=_run)


def _seconds(text: str) -> float:
    try:
        found = float(text)
    except ValueError:
        found = 0.0
    if not _LEAST_S <= found <= 3600:
        raise argparse.ArgumentTypeError(f"{text!r} is no pause: write seconds from {_LEAST_S:g} to 3600")
    return found


def _run(args: argparse.Namespace) -> int:
    settings = load(args)
    urls = args.urls or [_own(settings)]
    return run(_top(list(map(_address, urls)), args.every, args.ca, once=args.once))


def _own(settings: Settings) -> str:
    """Where an agent with these settings, on this machine, has its metrics."""
    host = f"[{settings.metrics_host}]" if ":" in settings.metrics_host else settings.metrics_host
    return f"http://{host}:{settings.metrics_port}"


def _address(text: str) -> str:
    """An address as it is fetched: of an agent, or of its /metrics."""
    url = text if "://" in text else f"http://{text}"
    if not url.startswith(("http://", "https://")):
        raise StartFailed(f"{text!r} is no address of metrics: write http://HOST:PORT")
    return url if url.endswith("/metrics") else f"{url.rstrip('/')}/metrics"


def _name(url: str) -> str:
    """An address as it is shown."""
    return url.removeprefix("http://").removesuffix("/metrics")


async def _top(urls: Sequence[str], every_s: float, ca: str | None, *, once: bool) -> int:
    """A live view of agents with telemetry (the setting telemetry=on): sessions, rates, latencies, lag, dead letters.

    Exit status 1 with --once when no agent answered.
    """
    try:
        from tidings.top.readings import Span
        from tidings.top.screen import Display
    except ModuleNotFoundError as error:
        raise StartFailed(f"`tidings top` needs {error.name}: pip install 'tidings[top]'") from None
    from aiohttp import ClientSession, ClientTimeout, TCPConnector

    display = Display()
    tls = ssl.create_default_context(cafile=ca)
    before: Mapping[str, Scrape | str] = {}
    async with ClientSession(connector=TCPConnector(ssl=tls), timeout=ClientTimeout(total=_TIMEOUT_S)) as http:

        async def look() -> Mapping[str, Span | str]:
            nonlocal before
            found = dict(zip(urls, await asyncio.gather(*(_scrape(http, url) for url in urls)), strict=True))
            earlier, before = before, found
            return {
                _name(url): said if isinstance(said, str) else Span(said, _scraped(earlier.get(url)))
                for url, said in found.items()
            }

        agents = await look()
        if once:
            await asyncio.sleep(every_s)
            agents = await look()
            display.show(agents)
            return 0 if any(isinstance(said, Span) for said in agents.values()) else 1
        with display.live():
            while True:
                display.show(agents)
                await asyncio.sleep(every_s)
                agents = await look()


def _scraped(said: Scrape | str | None) -> Scrape | None:
    return None if isinstance(said, str) else said


async def _scrape(http: ClientSession, url: str) -> Scrape | str:
    """What an agent says, or why it says nothing."""
    from aiohttp import ClientError

    from tidings.top.readings import read

    try:
        async with http.get(url) as answer:
            if answer.status != 200:
                return f"answers with {answer.status}"
            body = await answer.content.read(_MOST_BYTES)
        return read(body.decode(), time.monotonic())
    except TimeoutError:
        return f"does not answer within {_TIMEOUT_S:g} s"
    except ClientError as error:
        return f"does not answer: {error}"
    except ValueError:
        return "answers with something else than metrics"
