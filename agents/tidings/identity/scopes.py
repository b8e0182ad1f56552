"""What a service may do: the scopes of its token (RFC 8693, section 4.2: names with spaces between them)."""

from __future__ import annotations

from typing import Final

from tidings.wire.errors import BadScope, BadTopic
from tidings.wire.topic import check_pattern, covers_all

__all__ = ["SCOPES", "Scopes"]

SCOPES: Final = (
    "publish:user",
    "inbox:read",
    "inbox:write",
    "subscriptions:read",
    "subscriptions:write",
    "deadletters:read",
    "deadletters:write",
    "revoke",
)
"""All but ``publish:topic:<pattern>``, which there are many of."""

_TOPIC: Final = "publish:topic:"
_EVERYTHING: Final = ">"


class Scopes:
    """The scopes of one token. Those that Tidings does not know allow nothing, as other systems put theirs beside."""

    __slots__ = ("_names", "_patterns", "text")

    def __init__(self, text: str) -> None:
        self.text = text
        self._names = frozenset(text.split())
        self._patterns = tuple(name.removeprefix(_TOPIC) for name in self._names if name.startswith(_TOPIC))

    def allows(self, scope: str) -> bool:
        """If the token has this scope, such as ``publish:user``. Topics are `allows_topic`'s."""
        return scope in self._names

    def allows_topic(self, topic: str) -> bool:
        """If the token may publish to this topic: ``publish:topic:`` with it, a subtree that it is in, or ``>``."""
        return any(pattern == _EVERYTHING or covers_all(pattern, topic) for pattern in self._patterns)

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Scopes) and other._names == self._names

    def __hash__(self) -> int:
        return hash(self._names)

    def __repr__(self) -> str:
        return f"Scopes({self.text!r})"

    @classmethod
    def checked(cls, text: str) -> Scopes:
        """For a token that is about to be made: raises `BadScope` for a name that would allow nothing."""
        for name in text.split():
            if name.startswith(_TOPIC):
                _check_pattern(name)
            elif name not in SCOPES:
                raise BadScope(f"{name!r} is no scope: there are {', '.join(SCOPES)} and {_TOPIC}<pattern>")
        return cls(text)


def _check_pattern(name: str) -> None:
    pattern = name.removeprefix(_TOPIC)
    if pattern == _EVERYTHING:
        return
    try:
        check_pattern(pattern)
    except BadTopic as error:
        raise BadScope(f"the scope {name!r} names no topics: {error}") from None
