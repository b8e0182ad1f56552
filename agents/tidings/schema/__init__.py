"""Event types: what a notification of a type holds, as JSON Schema 2020-12, and whether one does."""

from .schemas import EventType, Schemas, reader

__all__ = ["EventType", "Schemas", "reader"]
