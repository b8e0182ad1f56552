"""The tables of the SQLite store, as migrations: number n brings a database from version n to n + 1."""

from __future__ import annotations

from typing import Final

__all__ = ["MIGRATIONS"]

MIGRATIONS: Final = (
    """
    CREATE TABLE inbox (
        user TEXT NOT NULL,
        incarnation INTEGER NOT NULL,
        sequence INTEGER NOT NULL,
        id TEXT,
        type TEXT,
        topic TEXT,
        stored_ns INTEGER NOT NULL,
        seen INTEGER NOT NULL DEFAULT 0,
        read INTEGER NOT NULL DEFAULT 0,
        archived INTEGER NOT NULL DEFAULT 0,
        body BLOB,          -- NULL: marks that wait for their notification
        PRIMARY KEY (user, incarnation, sequence)
    ) WITHOUT ROWID;

    -- The badge and the filter `unread`: as long as what is unread, however long the history.
    CREATE INDEX inbox_unread ON inbox (user, incarnation, sequence)
        WHERE read = 0 AND archived = 0 AND body IS NOT NULL;
    CREATE INDEX inbox_archived ON inbox (user, incarnation, sequence) WHERE archived = 1 AND body IS NOT NULL;
    CREATE INDEX inbox_age ON inbox (stored_ns);

    CREATE TABLE cursors (
        user TEXT NOT NULL,
        device TEXT NOT NULL,
        incarnation INTEGER NOT NULL,
        sequence INTEGER NOT NULL,
        acked TEXT NOT NULL DEFAULT '[]',       -- JSON: [[incarnation, sequence], ...]
        attempts TEXT NOT NULL DEFAULT '[]',    -- JSON: [[incarnation, sequence, count], ...]
        gateway TEXT,
        session TEXT,
        PRIMARY KEY (user, device)
    ) WITHOUT ROWID;

    CREATE TABLE probe (one INTEGER PRIMARY KEY CHECK (one = 1), checks INTEGER NOT NULL);
    INSERT INTO probe VALUES (1, 0);
    """,
    """
    -- What was archived counts as read from now on.
    UPDATE inbox SET seen = 1, read = 1 WHERE archived = 1;

    -- Marked as unread below the watermark of `read`.
    ALTER TABLE inbox ADD COLUMN kept INTEGER NOT NULL DEFAULT 0;
    ALTER TABLE inbox ADD COLUMN delivered_ms INTEGER;
    ALTER TABLE inbox ADD COLUMN delivered_device TEXT;
    ALTER TABLE inbox ADD COLUMN delivered_attempts INTEGER;
    CREATE INDEX inbox_kept ON inbox (user, incarnation, sequence) WHERE kept = 1;

    -- Up to where all is `seen`, `read` or `archived` (each at least as far as the next one), or `erased`.
    CREATE TABLE watermarks (
        user TEXT NOT NULL,
        as_ TEXT NOT NULL,
        incarnation INTEGER NOT NULL,
        sequence INTEGER NOT NULL,
        updated_ns INTEGER NOT NULL,
        PRIMARY KEY (user, as_)
    ) WITHOUT ROWID;
    CREATE INDEX watermarks_age ON watermarks (updated_ns);
    CREATE INDEX watermarks_erased ON watermarks (user) WHERE as_ = 'erased';
    """,
    """
    CREATE TABLE subscriptions (user TEXT NOT NULL, topic TEXT NOT NULL, PRIMARY KEY (user, topic)) WITHOUT ROWID;
    CREATE INDEX subscribers ON subscriptions (topic, user);
    """,
    """
    CREATE TABLE floors (part INTEGER PRIMARY KEY, incarnation INTEGER NOT NULL, sequence INTEGER NOT NULL);
    """,
    """
    -- JSON, see store.cursors: what a device has acknowledged of broadcasts.
    ALTER TABLE cursors ADD COLUMN broadcast TEXT;

    CREATE TABLE broadcasts (
        incarnation INTEGER NOT NULL,
        sequence INTEGER NOT NULL,
        topic TEXT NOT NULL,
        id TEXT NOT NULL,
        type TEXT NOT NULL,
        stored_ns INTEGER NOT NULL,
        body BLOB NOT NULL,
        PRIMARY KEY (incarnation, sequence)
    ) WITHOUT ROWID;
    CREATE INDEX broadcasts_age ON broadcasts (stored_ns);

    -- A row for each pattern that covers the topic of a broadcast.
    CREATE TABLE broadcasts_to (
        pattern TEXT NOT NULL,
        incarnation INTEGER NOT NULL,
        sequence INTEGER NOT NULL,
        PRIMARY KEY (pattern, incarnation, sequence)
    ) WITHOUT ROWID;

    -- Broadcasts above it are the user's.
    ALTER TABLE subscriptions ADD COLUMN since_incarnation INTEGER NOT NULL DEFAULT 0;
    ALTER TABLE subscriptions ADD COLUMN since_sequence INTEGER NOT NULL DEFAULT 0;

    CREATE TABLE ended_subscriptions (
        user TEXT NOT NULL,
        topic TEXT NOT NULL,
        since_incarnation INTEGER NOT NULL,
        since_sequence INTEGER NOT NULL,
        until_incarnation INTEGER NOT NULL,
        until_sequence INTEGER NOT NULL,
        ended_ns INTEGER NOT NULL,
        PRIMARY KEY (user, topic, since_incarnation, since_sequence)
    ) WITHOUT ROWID;
    CREATE INDEX ended_subscriptions_age ON ended_subscriptions (ended_ns);

    -- Up to where the broadcasts of a user's topics are in the user's inbox.
    CREATE TABLE synced (
        user TEXT PRIMARY KEY,
        incarnation INTEGER NOT NULL,
        sequence INTEGER NOT NULL
    ) WITHOUT ROWID;
    """,
)
