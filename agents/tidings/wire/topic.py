"""Topics: what a service publishes to, and what users subscribe to.

A topic is a name of levels with dots between them, ``post.42.likes``. A subscription is *exact*, or a *subtree*:
``post.42.>`` has everything below ``post.42``, at any depth, and not ``post.42`` itself (as in NATS). Any text may be a
level, except the wildcards of NATS.
"""

from __future__ import annotations

from typing import Final

from .errors import BadTopic

__all__ = ["MAX_LEVELS", "MAX_TOPIC", "check_pattern", "check_topic", "covers_all", "meet", "patterns_of"]

MAX_LEVELS: Final = 8
MAX_TOPIC: Final = 200
"""Characters, dots included; as a subject it stays below NATS's control line."""

_SUBTREE: Final = ".>"
_WILDCARDS: Final = frozenset("*>")


def check_topic(topic: str) -> str:
    """Return a topic that may be published to; raises `BadTopic` with what is wrong."""
    if len(topic) > MAX_TOPIC:
        raise BadTopic(f"the topic has {len(topic)} characters: at most {MAX_TOPIC} are allowed", code="topic_too_long")
    levels = topic.split(".")
    if len(levels) > MAX_LEVELS:
        raise BadTopic(f"{topic!r} has {len(levels)} levels: at most {MAX_LEVELS} are allowed", code="topic_too_deep")
    for level in levels:
        if not level:
            raise BadTopic(f"{topic!r} has an empty level: give names with single dots between them, such as post.42")
        if level in _WILDCARDS:
            raise BadTopic(f"{topic!r} has the level {level!r}: only a subscription may end in `.>`")
    try:
        topic.encode()
    except UnicodeEncodeError:
        raise BadTopic("the topic holds half of a surrogate pair: it is not Unicode text") from None
    if "\0" in topic:
        raise BadTopic("the topic holds a NUL character")
    return topic


def check_pattern(pattern: str) -> str:
    """Return a pattern that may be subscribed to: a topic, or one with ``.>`` behind it; raises `BadTopic`."""
    check_topic(pattern.removesuffix(_SUBTREE))
    if len(pattern) > MAX_TOPIC:
        raise BadTopic(
            f"the topic has {len(pattern)} characters: at most {MAX_TOPIC} are allowed", code="topic_too_long"
        )
    return pattern


def patterns_of(topic: str) -> tuple[str, ...]:
    """Every pattern that covers a topic: itself, and each subtree that it lies in."""
    levels = topic.split(".")
    return (topic, *(".".join(levels[:depth]) + _SUBTREE for depth in range(1, len(levels))))


def covers_all(pattern: str, other: str) -> bool:
    """If a pattern has every topic of another pattern (or that one topic)."""
    return other == pattern or (pattern.endswith(_SUBTREE) and other.startswith(pattern[:-1]))


def meet(one: str, other: str) -> bool:
    """If there is a topic that both patterns have."""
    return covers_all(one, other) or covers_all(other, one)
