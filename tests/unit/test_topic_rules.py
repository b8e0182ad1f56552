"""Topics, patterns, and who may subscribe to what."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tidings.identity.rules import Entitlement
from tidings.wire import subject
from tidings.wire.errors import BadSettings, BadTopic
from tidings.wire.topic import MAX_LEVELS, MAX_TOPIC, check_pattern, check_topic, covers_all, meet, patterns_of

LEVELS = st.text(st.characters(exclude_characters=".\0", exclude_categories=["Cs"]), min_size=1, max_size=8).filter(
    lambda level: level not in "*>"
)
TOPICS = st.lists(LEVELS, min_size=1, max_size=MAX_LEVELS).map(".".join)
FEW = st.lists(st.sampled_from("ab"), min_size=1, max_size=4).map(".".join)
PATTERNS = FEW | FEW.map(lambda topic: topic + ".>")


@given(topic=TOPICS)
def test_there_and_back(topic: str) -> None:
    """A topic is the topic of its subject, whatever its levels hold; and a subject that NATS takes."""
    assert check_topic(topic) == check_pattern(topic) == topic
    where = subject.notify_topic(topic)
    assert subject.topic_of(where) == topic
    tokens = where.split(".")
    assert len(tokens) == 2 + len(topic.split("."))
    assert all(token and not set(token) & set(" \t\r\n*>") for token in tokens)


@given(topic=FEW, pattern=PATTERNS)
def test_patterns_of_a_topic(topic: str, pattern: str) -> None:
    """They are exactly those that cover it."""
    assert (pattern in patterns_of(topic)) == covers_all(pattern, topic)


@given(one=PATTERNS, other=PATTERNS, topic=FEW)
def test_covering_and_meeting(one: str, other: str, topic: str) -> None:
    """Whatever the one covers it has the topics of; two that do not meet have no topic in common."""
    if covers_all(one, other) and covers_all(other, topic):
        assert covers_all(one, topic)
    if covers_all(one, topic) and covers_all(other, topic):
        assert meet(one, other)
    assert meet(one, other) == meet(other, one)


@pytest.mark.parametrize(
    ("topic", "code"),
    [
        ("", "bad_topic"),
        ("a..b", "bad_topic"),
        ("a.", "bad_topic"),
        (".", "bad_topic"),
        ("a.>", "bad_topic"),
        ("*", "bad_topic"),
        ("\ud800", "bad_topic"),
        ("a\0", "bad_topic"),
        ("x" * (MAX_TOPIC + 1), "topic_too_long"),
        (".".join("a" * (MAX_LEVELS + 1)), "topic_too_deep"),
    ],
)
def test_bad_topics(topic: str, code: str) -> None:
    """Refused with a code, as a topic and as a pattern below it."""
    with pytest.raises(BadTopic) as refused:
        check_topic(topic)
    assert refused.value.code == code
    with pytest.raises(BadTopic):
        check_pattern(topic + ".>")


@pytest.mark.parametrize("where", ["notify.topic.a%2Eb", "notify.topic.a b", "notify.topic.%3E", "notify.topic.a..b"])
def test_subjects_of_no_topic(where: str) -> None:
    """A subject that `notify_topic` would not make names none."""
    with pytest.raises(BadTopic):
        subject.topic_of(where)


RULES = "!admin.>, !post.secret, admin.help, team.{user}.>, post.>, news"


@pytest.mark.parametrize(
    ("pattern", "allowed"),
    [
        ("post.1", True),
        ("post.1.>", True),
        ("post.>", False),
        ("post.secret", False),
        ("post.secret.>", True),
        ("post", False),
        ("admin.help", False),
        ("team.alice.1", True),
        ("team.alice.>", True),
        ("team.>", False),
        ("team.bob.1", False),
        ("news", True),
        ("news.>", False),
        ("user.alice.>", True),
        ("user.alice.x", True),
        ("user.alice", False),
        ("user.bob.x", False),
        ("user.>", False),
        ("other", False),
    ],
)
def test_rules(pattern: str, *, allowed: bool) -> None:
    """The first rule that says something decides; what none allows is refused."""
    assert Entitlement(RULES).may_subscribe("alice", pattern) is allowed


def test_own_topics_of_odd_users() -> None:
    """A user's own level is escaped: nobody gets another's by the dots of an id."""
    everything = Entitlement(">")
    assert everything.may_subscribe("anna.von", "user.anna%2Evon.>")
    assert not everything.may_subscribe("anna", "user.anna%2Evon.>")
    assert not everything.may_subscribe("anna.von", "user.anna.von.>")
    assert everything.refused("anna", ["a", "user.bob.x", "b.>"]) == ["user.bob.x"]


@given(rules=st.lists(st.tuples(st.booleans(), PATTERNS | st.just(">")), max_size=4), pattern=PATTERNS, below=FEW)
def test_nothing_refused_slips_through(rules: list[tuple[bool, str]], pattern: str, below: str) -> None:
    """A subscription that is allowed has no topic that the same rules refuse."""
    entitlement = Entitlement(",".join(("" if allows else "!") + rule for allows, rule in rules))
    topic = pattern[:-1] + below if pattern.endswith(">") else pattern
    assert not entitlement.may_subscribe("alice", pattern) or entitlement.may_subscribe("alice", topic)


@pytest.mark.parametrize("text", ["a..b", "*", "!", "post.*.x", "a.>.b"])
def test_bad_rules(text: str) -> None:
    """A rule that is no pattern is named at the start."""
    with pytest.raises(BadSettings, match="subscribe_rules"):
        Entitlement(f"good, {text}")
