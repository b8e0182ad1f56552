"""The embedded store on one SQLite file."""

from .store import SqliteStore

__all__ = ["SqliteStore"]
