"""What a user follows: in force on every gateway that has a device of the user when a change is answered."""

from __future__ import annotations

from collections.abc import Sequence

from aiohttp import web

from tidings.stream import gateways
from tidings.stream.topology import BROADCAST_PART
from tidings.wire.errors import BadTopic
from tidings.wire.frames import MAX_TOPICS
from tidings.wire.topic import check_pattern

from .answers import answer, nothing
from .backing import Backing
from .bodies import json_body, listed, members, parameters, text, whole_number
from .gate import Call
from .problems import Refused, located

__all__ = ["Subscriptions"]


class Subscriptions:
    """The handlers."""

    def __init__(self, backing: Backing) -> None:
        self._backing = backing

    async def page(self, call: Call) -> web.Response:
        """Some of them, in their order; ``next`` goes on as ``after``."""
        given = parameters(call.request, "after", "limit")
        limit = whole_number(given, "limit", 1, MAX_TOPICS, MAX_TOPICS)
        after = given.get("after")
        if after is not None:
            _checked(after, "after")
        found = await self._backing.store.subscriptions(call.user, after, limit)
        topics = [one.topic for one in found]
        return answer({"topics": topics, "next": topics[-1] if len(topics) == limit else None})

    async def add(self, call: Call) -> web.Response:
        """All of them or none."""
        parameters(call.request)
        backing = self._backing
        given = members(await json_body(call.request, backing.settings), (), required=("topics",))
        topics = _read_topics(given["topics"])
        refused = await backing.entitlement.refused(call.user, topics)
        if refused:
            raise Refused("not_allowed", f"{refused[0]!r} is not open to this user")
        # Before it is stored: what is broadcast from here on is the user's.
        since = await backing.end(BROADCAST_PART)
        await backing.store.subscribe(call.user, topics, backing.settings.subscriptions_max, since)
        return await self._in_force(call.user)

    async def remove(self, call: Call) -> web.Response:
        """One that is none is no error."""
        parameters(call.request)
        topic = _checked(call.request.match_info["topic"], "topic")
        await self._backing.store.unsubscribe(call.user, [topic], await self._backing.end(BROADCAST_PART))
        return await self._in_force(call.user)

    async def _in_force(self, user: str) -> web.Response:
        backing = self._backing
        await gateways.reload(backing.connection, await backing.gateways(user), user)
        return nothing()


def _read_topics(given: object) -> Sequence[str]:
    topics = []
    for number, one in enumerate(listed(given, ("topics",), MAX_TOPICS)):
        with located(("topics", number)):
            topics.append(check_pattern(text(one, ("topics", number))))
    return list(dict.fromkeys(topics))


def _checked(topic: str, parameter: str) -> str:
    try:
        return check_pattern(topic)
    except BadTopic as error:
        raise Refused("bad_parameter", str(error), parameter=parameter) from None
