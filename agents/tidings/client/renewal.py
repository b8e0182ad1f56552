"""A connection that outlives its token: a fresh one is shown to the gateway before the old one ends."""

from __future__ import annotations

import asyncio
import inspect
import logging
import random
from collections.abc import Awaitable, Callable
from typing import Final

import aiohttp

from tidings.runtime.backoff import Backoff
from tidings.wire.errors import ConnectionLost, RequestRefused

from .link import Frame, Link
from .requests import Requests

__all__ = ["TokenSource", "keep_renewing", "token_of"]

TokenSource = str | Callable[[], str] | Callable[[], Awaitable[str]]

_MARGIN: Final = 0.2
_LONGEST_MARGIN_S: Final = 120.0
_LEAST_S: Final = 0.5
_ANSWER_S: Final = 10.0

log = logging.getLogger("tidings.client")


async def token_of(source: TokenSource) -> str:
    """The token, fresh where there is a function for it; raises what the function raises."""
    token = source() if callable(source) else source
    return await token if inspect.isawaitable(token) else token


async def keep_renewing(source: TokenSource, expires_in: float, link: Link, requests: Requests) -> None:
    """Renew the token of a connection until it ends, each time within the last fifth of its life.

    An attempt that fails is repeated for as long as the token lives; the gateway closes the connection (4401) when that
    is over. What the function raises, beyond a failed connect, comes out of here.
    """
    backoff = Backoff(_LEAST_S, 30.0)
    while True:
        await asyncio.sleep(_when(expires_in))
        while True:
            try:
                async with asyncio.timeout(_ANSWER_S):
                    answer = await requests.ask(link, {"t": "token", "token": await token_of(source)})
            except ConnectionLost:
                # The reader sees the same end.
                return
            except (RequestRefused, OSError, TimeoutError, aiohttp.ClientError) as error:
                log.warning("the token was not renewed: %s", error or type(error).__name__)
                await asyncio.sleep(_LEAST_S + backoff.next())
            else:
                backoff.reset()
                expires_in = _left(answer)
                break


def _left(answer: Frame) -> float:
    return float(answer["expires_in"])


def _when(expires_in: float) -> float:
    """Not all clients at once: somewhere in the first half of the margin."""
    margin = min(_LONGEST_MARGIN_S, _MARGIN * expires_in)
    return max(_LEAST_S, expires_in - margin * random.uniform(0.5, 1.0))
