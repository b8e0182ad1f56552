"""Whether a schema leads back into itself.

Judging an event is quick for any schema: the validator remembers what it judged. Saying where it went wrong is not: of
a schema that recurses through alternatives (``anyOf``) each level of the event doubles the work, and a body of 16 KiB
may have 250 levels. So of those it is said only that they do not fit.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from tidings.wire.pointer import steps_of

from .folder import Document

__all__ = ["leads_back"]

_REFERENCES = ("$ref", "$dynamicRef")
_Place = tuple[str, str]
"""A file's id, and a JSON pointer in it."""


def leads_back(document: Document, documents: Mapping[str, Document]) -> bool:
    """Whether following the references of a schema comes to a place twice; `documents` are by id.

    A reference that is no JSON pointer (an anchor, a dynamic one) counts as leading back, as it may.
    """
    done: set[_Place] = set()
    open_: set[_Place] = set()

    def visit(place: _Place) -> bool:
        if place in open_:
            return True
        if place in done:
            return False
        uri, pointer = place
        target = _at(documents[uri].schema, pointer) if uri in documents else None
        if target is None:
            return True
        open_.add(place)
        for reference in _references(target):
            base, _, fragment = reference.partition("#")
            if (fragment and not fragment.startswith("/")) or visit((base or uri, fragment)):
                return True
        open_.remove(place)
        done.add(place)
        return False

    return visit((document.uri, ""))


def _at(schema: Any, pointer: str) -> Any:
    for name in steps_of(pointer):
        if isinstance(schema, dict):
            schema = schema.get(name)
        elif isinstance(schema, list) and name.isdigit() and int(name) < len(schema):
            schema = schema[int(name)]
        else:
            return None
    return schema


def _references(schema: Any) -> Iterator[str]:
    """All references in a schema and below; those in examples and the like too, which errs to the safe side."""
    waiting = [schema]
    while waiting:
        found = waiting.pop()
        if isinstance(found, dict):
            yield from (found[name] for name in _REFERENCES if isinstance(found.get(name), str))
            # What is only defined is followed when it is referred to.
            waiting += [value for name, value in found.items() if name != "$defs"]
        elif isinstance(found, list):
            waiting += found
