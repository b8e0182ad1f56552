"""From a store's URL to the store."""

from __future__ import annotations

from urllib.parse import unquote, urlsplit

from tidings.wire.errors import BadSettings

from .port import Store
from .sqlite import SqliteStore

__all__ = ["open_store_url"]


def open_store_url(url: str) -> Store:
    """The store that a URL names, not opened yet: ``sqlite:///relative.db`` or ``sqlite:////absolute.db``."""
    parts = urlsplit(url)
    if parts.scheme == "sqlite" and not parts.netloc and len(parts.path) > 1:
        return SqliteStore(unquote(parts.path[1:]))
    raise BadSettings(
        f"store_url is {url!r}: use sqlite:///file.db for a file in this folder, "
        "or sqlite:////folder/file.db for any other"
    )
