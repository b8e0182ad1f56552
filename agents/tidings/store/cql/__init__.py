"""The store on CQL: ScyllaDB, or Apache Cassandra 4.1 and newer. Its schema is in ``schemas/cql``."""

from .database import Where
from .store import CqlStore
from .url import parse_url

__all__ = ["CqlStore", "Where", "parse_url"]
