"""Dead letters: what could not be understood or delivered, listed, looked at, replayed and dropped."""

from __future__ import annotations

from typing import Final

from aiohttp import web

from tidings.stream import letters
from tidings.stream.letters import Filter

from .answers import answer, nothing
from .backing import Backing
from .bodies import parameters, whole_number
from .gate import Call
from .problems import Refused

__all__ = ["DeadLetters"]

_MOST: Final = 200
_DEFAULT: Final = 50
_LARGEST: Final = 2**53 - 1
"""Ids are sequences of a stream, and numbers in JSON."""


class DeadLetters:
    """The handlers. What a letter holds is somebody's: the scopes for it are a person's who looks after the mesh."""

    def __init__(self, backing: Backing) -> None:
        self._backing = backing

    async def page(self, call: Call) -> web.Response:
        """Some of them, newest first; ``after`` turns it round."""
        given = parameters(call.request, "before", "after", "limit", "plane", "reason", "user", "topic")
        if "before" in given and "after" in given:
            raise Refused("bad_parameter", "give one of `before` and `after`", parameter="after")
        page = await letters.page(
            self._backing.connection,
            Filter(given.get("plane"), given.get("reason"), given.get("user"), given.get("topic")),
            limit=whole_number(given, "limit", 1, _MOST, _DEFAULT),
            before=_bound(given, "before"),
            after=_bound(given, "after"),
        )
        return answer({"letters": [letter.describe() for letter in page.letters], "next": page.next})

    async def look(self, call: Call) -> web.Response:
        """One of them, with its original bytes."""
        parameters(call.request)
        return answer((await letters.look(self._backing.connection, _id_of(call))).describe())

    async def replay(self, call: Call) -> web.Response:
        """Publish it once more and take it out; safe to repeat."""
        parameters(call.request)
        backing = self._backing
        replayed = await letters.replay(backing.connection, _id_of(call), check=backing.check)
        return answer({"stored": True, "duplicate": replayed.duplicate})

    async def drop(self, call: Call) -> web.Response:
        """Delete it."""
        parameters(call.request)
        await letters.drop(self._backing.connection, _id_of(call))
        return nothing()


def _bound(given: dict[str, str], name: str) -> int | None:
    return whole_number(given, name, 0, _LARGEST, 0) if name in given else None


def _id_of(call: Call) -> int:
    return whole_number(dict(call.request.match_info), "id", 1, _LARGEST, 0)
