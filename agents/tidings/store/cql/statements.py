"""The statements, by name. All are idempotent: writes carry their timestamp (see `store`)."""

from __future__ import annotations

import re
from typing import Final

__all__ = ["ARCHIVED", "SEEN", "UNREAD", "statements"]

UNREAD: Final = 1
SEEN: Final = 2
ARCHIVED: Final = 3

_ROW: Final = "position, stored, body, type, topic"
_INBOX: Final = "FROM inbox WHERE user = ? AND bucket = ? AND position"
_BROADCAST: Final = "position, topic, id, type, stored"
_STATE: Final = "FROM inbox_state WHERE user = ? AND kind = "
_HEAD: Final = "WHERE user = ? AND kind = 0 AND position = 0x"

_STATEMENTS: Final = {
    # The inbox
    "append": "INSERT INTO inbox (user, bucket, position, id, type, topic, stored, body) "
    "VALUES (?, ?, ?, ?, ?, ?, ?, ?) USING TTL ? AND TIMESTAMP ?",
    "list": "UPDATE inbox_state USING TTL ? AND TIMESTAMP ? SET bucket = ? "
    f"WHERE user = ? AND kind = {UNREAD} AND position = ?",
    "list_bucket": f"UPDATE inbox_state USING TTL ? AND TIMESTAMP ? SET buckets = buckets + ? {_HEAD}",
    "delivered": "UPDATE deliveries USING TTL ? AND TIMESTAMP ? SET delivered = ? "
    "WHERE user = ? AND bucket = ? AND position = ?",
    "deliveries": "SELECT position, delivered FROM deliveries WHERE user = ? AND bucket = ? "
    "AND position >= ? AND position <= ?",
    "newest": f"SELECT {_ROW} {_INBOX} > ? AND position < ? LIMIT ?",
    "oldest": f"SELECT {_ROW} {_INBOX} > ? AND position < ? ORDER BY position ASC LIMIT ?",
    "these": f"SELECT {_ROW} {_INBOX} IN ?",
    "positions": f"SELECT position {_INBOX} > ? AND position < ? ORDER BY position ASC LIMIT ?",
    "count": f"SELECT count(*) {_INBOX} <= ?",
    # What the user did
    "head": f"SELECT buckets, seen_all, archived_all FROM inbox_state {_HEAD}",
    "marks": f"SELECT kind, position FROM inbox_state WHERE user = ? AND kind IN ({UNREAD}, {SEEN}, {ARCHIVED}) "
    "AND position >= ? AND position <= ?",
    "unread": f"SELECT position, bucket, early {_STATE} {UNREAD} AND position > ? AND position < ? LIMIT ?",
    "unread_oldest": f"SELECT position, bucket, early {_STATE} {UNREAD} AND position > ? AND position < ? "
    "ORDER BY kind DESC, position ASC LIMIT ?",
    "archived": f"SELECT position {_STATE} {ARCHIVED} AND position IN ?",
    "mark": "INSERT INTO inbox_state (user, kind, position) VALUES (?, ?, ?) USING TTL ? AND TIMESTAMP ?",
    "mark_unread": "INSERT INTO inbox_state (user, kind, position, bucket, early) "
    f"VALUES (?, {UNREAD}, ?, ?, ?) USING TTL ? AND TIMESTAMP ?",
    "unlist": f"DELETE FROM inbox_state USING TIMESTAMP ? WHERE user = ? AND kind = {UNREAD} AND position IN ?",
    "unmark_upto": "DELETE FROM inbox_state USING TIMESTAMP ? WHERE user = ? AND kind = ? AND position <= ?",
    "seen_all": f"UPDATE inbox_state USING TTL ? AND TIMESTAMP ? SET seen_all = seen_all + ? {_HEAD}",
    "archived_all": f"UPDATE inbox_state USING TTL ? AND TIMESTAMP ? SET archived_all = archived_all + ? {_HEAD}",
    "seen_less": f"UPDATE inbox_state USING TIMESTAMP ? SET seen_all = seen_all - ? {_HEAD}",
    "archived_less": f"UPDATE inbox_state USING TIMESTAMP ? SET archived_all = archived_all - ? {_HEAD}",
    "floors": "SELECT part, floor FROM inbox_floors WHERE plane = 'user'",
    "note_floor": "UPDATE inbox_floors USING TIMESTAMP ? SET floor = ? WHERE plane = 'user' AND part = ?",
    # Devices
    "cursor": "SELECT state FROM cursors WHERE user = ? AND device = ?",
    "cursors": "SELECT user, device, state FROM cursors WHERE user IN ?",
    "save": "UPDATE cursors USING TTL ? AND TIMESTAMP ? SET state = ? WHERE user = ? AND device = ?",
    # Subscriptions
    "follow": "INSERT INTO subscriptions (user, topic, is_on) VALUES (?, ?, ?) USING TIMESTAMP ?",
    "unfollow": "DELETE FROM subscriptions USING TIMESTAMP ? WHERE user = ? AND topic = ?",
    "followed": "SELECT topic, is_on FROM subscriptions WHERE user = ? AND topic > ? LIMIT ?",
    "follows": "SELECT topic, is_on FROM subscriptions WHERE user = ? AND topic IN ?",
    "begin": "INSERT INTO subscription_starts (user, topic, since) VALUES (?, ?, ?) USING TIMESTAMP ?",
    "forget_start": "DELETE FROM subscription_starts USING TIMESTAMP ? WHERE user = ? AND topic = ?",
    "starts": "SELECT topic, since FROM subscription_starts WHERE user = ? AND topic > ? AND topic <= ?",
    "starts_of": "SELECT topic, since FROM subscription_starts WHERE user = ? AND topic IN ?",
    "end": "INSERT INTO ended_subscriptions (user, topic, since, until) VALUES (?, ?, ?, ?) "
    "USING TTL ? AND TIMESTAMP ?",
    "ended": "SELECT topic, since, until FROM ended_subscriptions WHERE user = ? AND (topic, since) > (?, ?) LIMIT ?",
    "join": "INSERT INTO subscribers (topic, level, shard, user) VALUES (?, ?, ?, ?) USING TIMESTAMP ?",
    "leave": "DELETE FROM subscribers USING TIMESTAMP ? WHERE topic = ? AND level = ? AND shard = ? AND user = ?",
    "members": "SELECT user FROM subscribers WHERE topic = ? AND level = ? AND shard = ? AND user > ? LIMIT ?",
    "crowd": "SELECT count(*) FROM subscribers WHERE topic = ? AND level = ? AND shard = ?",
    "levels": "SELECT levels FROM topic_levels WHERE topic = ?",
    "add_level": "UPDATE topic_levels USING TIMESTAMP ? SET levels = levels + ? WHERE topic = ?",
    # Broadcasts
    "broadcast": "INSERT INTO broadcasts (block, position, topic, id, type, stored, body) "
    "VALUES (?, ?, ?, ?, ?, ?, ?) USING TTL ? AND TIMESTAMP ?",
    "list_block": "INSERT INTO broadcast_blocks (plane, block) VALUES ('broadcast', ?) USING TTL ? AND TIMESTAMP ?",
    "refer": "INSERT INTO broadcasts_to (pattern, bucket, position, topic, id, type, stored) "
    "VALUES (?, ?, ?, ?, ?, ?, ?) USING TTL ? AND TIMESTAMP ?",
    "list_pattern": "UPDATE pattern_buckets USING TTL ? AND TIMESTAMP ? SET buckets = buckets + ? WHERE pattern = ?",
    "blocks": "SELECT block FROM broadcast_blocks WHERE plane = 'broadcast' AND block > ? AND block <= ? LIMIT ?",
    "broadcasts": f"SELECT {_BROADCAST}, body FROM broadcasts "
    "WHERE block = ? AND position > ? AND position <= ? LIMIT ?",
    "pattern": "SELECT buckets FROM pattern_buckets WHERE pattern = ?",
    "references": f"SELECT {_BROADCAST} FROM broadcasts_to "
    "WHERE pattern = ? AND bucket IN ? AND position > ? AND position <= ? ORDER BY position ASC LIMIT ?",
    "bodies": "SELECT position, body FROM broadcasts WHERE block = ? AND position IN ?",
    "synced": "SELECT upto FROM synced WHERE user = ?",
    "note_synced": "INSERT INTO synced (user, upto) VALUES (?, ?) USING TTL ? AND TIMESTAMP ?",
    # Erasing
    "erase_rows": "DELETE FROM inbox USING TIMESTAMP ? WHERE user = ? AND bucket = ? AND position <= ?",
    "erase_deliveries": "DELETE FROM deliveries USING TIMESTAMP ? WHERE user = ? AND bucket = ? AND position <= ?",
    "unlist_buckets": f"UPDATE inbox_state USING TIMESTAMP ? SET buckets = buckets - ? {_HEAD}",
    "erase_watermarks": f"DELETE seen_all, archived_all FROM inbox_state USING TIMESTAMP ? {_HEAD}",
    "forget_cursor": "DELETE FROM cursors USING TIMESTAMP ? WHERE user = ? AND device = ?",
    "erase_cursors": "DELETE FROM cursors USING TIMESTAMP ? WHERE user = ?",
    "erase_starts": "DELETE FROM subscription_starts USING TIMESTAMP ? WHERE user = ?",
    "erase_synced": "DELETE FROM synced USING TIMESTAMP ? WHERE user = ?",
    "erase_ended": "DELETE FROM ended_subscriptions USING TIMESTAMP ? WHERE user = ?",
    # Health
    "probe": "UPDATE probe USING TIMESTAMP ? SET at = ? WHERE name = 'check'",
    "probed": "SELECT at FROM probe WHERE name = 'check'",
}

_TABLE: Final = re.compile(r"\b(FROM|INTO|UPDATE) (\w+)")


def statements(keyspace: str) -> dict[str, str]:
    """All of them, with the keyspace at each table: a session's own is no part of a prepared statement."""
    return {name: _TABLE.sub(rf"\1 {keyspace}.\2", text) for name, text in _STATEMENTS.items()}
