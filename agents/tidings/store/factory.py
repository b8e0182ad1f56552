"""From a store's URL to the store."""

from __future__ import annotations

from urllib.parse import unquote

from tidings.wire.errors import BadSettings

from .port import Store
from .sqlite import SqliteStore

__all__ = ["open_store_url"]

_SQLITE = "sqlite:///"


def open_store_url(url: str) -> Store:
    """The store that a URL names, not opened yet: ``sqlite:///relative.db`` or ``sqlite:////absolute.db``."""
    path = unquote(url.removeprefix(_SQLITE))
    # Options and fragments would be passed over, and a database in memory is another one for each connection.
    is_file = path.strip("/") and not path.endswith("/") and path != ":memory:" and "\0" not in path
    if url.startswith(_SQLITE) and is_file and not set(url) & set("?#"):
        return SqliteStore(path)
    raise BadSettings(
        f"store_url is {url!r}: use sqlite:///file.db for a file in this folder, "
        "or sqlite:////folder/file.db for any other; in a name, ? is %3F and # is %23"
    )
