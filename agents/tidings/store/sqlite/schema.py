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
)
