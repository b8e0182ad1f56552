"""Who follows what, and who followed it: functions of a connection."""

from __future__ import annotations

import sqlite3
import time
from collections.abc import Sequence
from typing import Final

from tidings.store.port import EndedSubscription, SubscriberPage, Subscription
from tidings.wire.position import Position

__all__ = ["add", "ended_of_user", "expire", "of_topic", "of_user", "remove", "remove_all"]

_END: Final = """
    INSERT INTO ended_subscriptions
    SELECT user, topic, since_incarnation, since_sequence, ?, ?, ? FROM subscriptions
    WHERE user = ? AND topic = ? AND (since_incarnation, since_sequence) < (?, ?)
    ON CONFLICT DO UPDATE SET until_incarnation = excluded.until_incarnation, until_sequence = excluded.until_sequence,
        ended_ns = excluded.ended_ns
        WHERE (excluded.until_incarnation, excluded.until_sequence) > (until_incarnation, until_sequence)"""
_OF_USER: Final = """
    SELECT topic, since_incarnation, since_sequence FROM subscriptions
    WHERE user = ? AND topic > ? ORDER BY topic LIMIT ?"""
_ENDED_OF_USER: Final = """
    SELECT topic, since_incarnation, since_sequence, until_incarnation, until_sequence FROM ended_subscriptions
    WHERE user = ? AND (topic, since_incarnation, since_sequence) > (?, ?, ?)
    ORDER BY topic, since_incarnation, since_sequence LIMIT ?"""
_EXPIRE: Final = """
    DELETE FROM ended_subscriptions WHERE (user, topic, since_incarnation, since_sequence) IN
    (SELECT user, topic, since_incarnation, since_sequence FROM ended_subscriptions WHERE ended_ns < ? LIMIT ?)"""
_BEFORE_ALL: Final = EndedSubscription("", Position(0, 0), Position(0, 0))


def add(db: sqlite3.Connection, user: str, topics: Sequence[str], most: int, since: Position) -> bool:
    """False, and nothing changed, where the user would have more than `most`."""
    (count,) = db.execute("SELECT count(*) FROM subscriptions WHERE user = ?", (user,)).fetchone()
    query = "SELECT 1 FROM subscriptions WHERE user = ? AND topic = ?"
    new = [topic for topic in topics if db.execute(query, (user, topic)).fetchone() is None]
    if new and count + len(new) > most:
        return False
    db.executemany("INSERT INTO subscriptions VALUES (?, ?, ?, ?)", [(user, topic, *since) for topic in new])
    return True


def remove(db: sqlite3.Connection, user: str, topics: Sequence[str], until: Position) -> None:
    now = time.time_ns()
    db.executemany(_END, [(*until, now, user, topic, *until) for topic in topics])
    db.executemany("DELETE FROM subscriptions WHERE user = ? AND topic = ?", [(user, topic) for topic in topics])


def remove_all(db: sqlite3.Connection, user: str) -> None:
    """Also those that ended."""
    db.execute("DELETE FROM subscriptions WHERE user = ?", (user,))
    db.execute("DELETE FROM ended_subscriptions WHERE user = ?", (user,))


def of_user(db: sqlite3.Connection, user: str, after: str | None, limit: int) -> list[Subscription]:
    return [Subscription(topic, Position(*since)) for topic, *since in db.execute(_OF_USER, (user, after or "", limit))]


def ended_of_user(
    db: sqlite3.Connection, user: str, after: EndedSubscription | None, limit: int
) -> list[EndedSubscription]:
    topic, since, _ = after or _BEFORE_ALL
    found = db.execute(_ENDED_OF_USER, (user, topic, *since, limit))
    return [EndedSubscription(row[0], Position(*row[1:3]), Position(*row[3:])) for row in found]


def of_topic(db: sqlite3.Connection, topic: str, after: str | None, limit: int) -> SubscriberPage:
    query = "SELECT user FROM subscriptions WHERE topic = ? AND user > ? ORDER BY user LIMIT ?"
    users = [user for (user,) in db.execute(query, (topic, after or "", limit))]
    return SubscriberPage(users, users[-1] if len(users) == limit else None)


def expire(db: sqlite3.Connection, before_ns: int, limit: int) -> int:
    """One slice of those that ended before that time: how many are gone."""
    return db.execute(_EXPIRE, (before_ns, limit)).rowcount
