"""From a store's URL to the store."""

from __future__ import annotations

import re
from urllib.parse import unquote

from tidings.wire.errors import BadSettings

from .port import Store
from .sqlite import SqliteStore

__all__ = ["is_cql", "open_store_url", "shown"]

_SQLITE = "sqlite:///"
_CQL = "cql://"


def is_cql(url: str) -> bool:
    """Whether a URL names a CQL server, whose schema is applied beforehand."""
    return url.startswith(_CQL)


def shown(url: str) -> str:
    """A store's URL without the password that it may carry."""
    return re.sub(r"(?<=//)([^/@]*?):[^/@]*@", r"\1:…@", url)


def open_store_url(url: str, *, retention_days: int = 90) -> Store:
    """The store that a URL names, not opened yet.

    ``sqlite:///relative.db``, ``sqlite:////absolute.db`` or ``cql://host,host:9042/keyspace`` (see `cql.url`).
    """
    if is_cql(url):
        return _cql_store(url, retention_days)
    path = unquote(url.removeprefix(_SQLITE))
    # Options and fragments would be passed over, and a database in memory is another one for each connection.
    is_file = path.strip("/") and not path.endswith("/") and path != ":memory:" and "\0" not in path
    if url.startswith(_SQLITE) and is_file and not set(url) & set("?#"):
        return SqliteStore(path)
    raise BadSettings(
        f"store_url is {shown(url)!r}: use sqlite:///file.db for a file in this folder, "
        "sqlite:////folder/file.db for any other (in a name, ? is %3F and # is %23), or cql://host:9042/keyspace"
    )


def _cql_store(url: str, retention_days: int) -> Store:
    try:
        from .cql import CqlStore, parse_url
    except ImportError as error:
        raise BadSettings(
            f"store_url is a CQL address, and its driver is not there ({error}): pip install 'tidings[cql]'"
        ) from None
    return CqlStore(parse_url(url), retention_days=retention_days)
