"""Who may subscribe to what: one function, over a list of rules.

A rule is a pattern (see `tidings.wire.topic`), ``>`` for everything, or either with ``!`` before it to refuse;
``{user}`` stands for the user's own id, escaped as in a subject. The first rule that says something of a subscription
decides: one that allows has to cover all of it, one that refuses has to touch it. What no rule allows is refused. Ahead
of all rules ``user.<own id>.>`` is the user's own, and nobody else's.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Final

from tidings.wire.errors import BadSettings, BadTopic
from tidings.wire.subject import escape
from tidings.wire.topic import check_pattern, covers_all, meet

__all__ = ["Entitlement", "is_own"]

_EVERYTHING: Final = ">"
_OWN: Final = "user.>"


def is_own(user: str, pattern: str) -> bool:
    """If a subscription is to what is the user's own, which nobody else decides on."""
    return covers_all(f"user.{escape(user)}.>", pattern)


class Entitlement:
    """The rules of a mesh, from their text: separated by commas, first match first. Raises `BadSettings`."""

    def __init__(self, text: str) -> None:
        self._rules: list[tuple[bool, str]] = []
        for part in filter(None, (part.strip() for part in text.split(","))):
            pattern = part.removeprefix("!")
            try:
                if pattern != _EVERYTHING:
                    check_pattern(pattern.replace("{user}", "someone"))
            except BadTopic as error:
                raise BadSettings(f"subscribe_rules has the rule {part!r}: {error}") from None
            self._rules.append((pattern == part, pattern))

    def may_subscribe(self, user: str, pattern: str) -> bool:
        """If the user may have this subscription, whole."""
        if is_own(user, pattern):
            return True
        own = escape(user)
        if meet(_OWN, pattern):
            return False
        for allows, rule in self._rules:
            rule = rule.replace("{user}", own)
            if rule == _EVERYTHING or (covers_all(rule, pattern) if allows else meet(rule, pattern)):
                return allows
        return False

    def refused(self, user: str, patterns: Sequence[str]) -> list[str]:
        """Those that the user may not have."""
        return [pattern for pattern in patterns if not self.may_subscribe(user, pattern)]
