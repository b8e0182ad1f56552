"""Who follows what: functions of a connection."""

from __future__ import annotations

import sqlite3
from collections.abc import Sequence

from tidings.store.port import SubscriberPage

__all__ = ["add", "of_topic", "of_user", "remove", "remove_all"]


def add(db: sqlite3.Connection, user: str, topics: Sequence[str], most: int) -> bool:
    """False, and nothing changed, where the user would have more than `most`."""
    (count,) = db.execute("SELECT count(*) FROM subscriptions WHERE user = ?", (user,)).fetchone()
    query = "SELECT 1 FROM subscriptions WHERE user = ? AND topic = ?"
    new = [topic for topic in topics if db.execute(query, (user, topic)).fetchone() is None]
    if new and count + len(new) > most:
        return False
    db.executemany("INSERT INTO subscriptions VALUES (?, ?)", [(user, topic) for topic in new])
    return True


def remove(db: sqlite3.Connection, user: str, topics: Sequence[str]) -> None:
    db.executemany("DELETE FROM subscriptions WHERE user = ? AND topic = ?", [(user, topic) for topic in topics])


def remove_all(db: sqlite3.Connection, user: str) -> None:
    db.execute("DELETE FROM subscriptions WHERE user = ?", (user,))


def of_user(db: sqlite3.Connection, user: str, after: str | None, limit: int) -> list[str]:
    query = "SELECT topic FROM subscriptions WHERE user = ? AND topic > ? ORDER BY topic LIMIT ?"
    return [topic for (topic,) in db.execute(query, (user, after or "", limit))]


def of_topic(db: sqlite3.Connection, topic: str, after: str | None, limit: int) -> SubscriberPage:
    query = "SELECT user FROM subscriptions WHERE topic = ? AND user > ? ORDER BY user LIMIT ?"
    users = [user for (user,) in db.execute(query, (topic, after or "", limit))]
    return SubscriberPage(users, users[-1] if len(users) == limit else None)
