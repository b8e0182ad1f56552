"""Where a schema's references lead: what that costs, and what is refused for it.

Judging an event is quick for any schema: the validator remembers what it judged. Saying where it went wrong is not: of
a schema that recurses through alternatives (``anyOf``) each level of the event doubles the work, and a body of 16 KiB
may have 250 levels; of definitions that refer twice to the next one, each definition does. So where there are many
ways through a schema it is said only that an event does not fit.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any, Final

from tidings.wire.errors import BadSettings
from tidings.wire.pointer import steps_of

from .folder import Document

__all__ = ["MOST_WAYS", "is_locatable"]

MOST_WAYS: Final = 1000
"""The most ways along a schema's references on which the place of a violation is looked for."""
_LONGEST: Final = 250
"""References that lead one to the next: compiler and validator go down each of them."""
_REFERENCES = ("$ref", "$dynamicRef")
_Place = tuple[str, str]
"""A file's id, and a JSON pointer in it."""


def is_locatable(document: Document, documents: Mapping[str, Document]) -> bool:
    """Whether a schema never leads back into itself, on at most `MOST_WAYS`; `documents` are by id.

    A reference that is no JSON pointer (an anchor, a dynamic one) counts as leading back, as it may. Raises
    `BadSettings` where more than 250 references lead one to the next.
    """
    first = (document.uri, "")
    # Of the places on the way to where this looks: where they lead that was not looked at yet, the last one next.
    path = {first: _targets(first, documents)}
    ways: dict[_Place, int] = {first: 1}
    chains: dict[_Place, int] = {first: 1}
    done: set[_Place] = set()
    while path:
        place = next(reversed(path))
        if not path[place]:
            del path[place]
            done.add(place)
            continue
        target = path[place][-1]
        below = 0
        if target is None or target in path:
            ways[place] = MOST_WAYS + 1
        elif target in done:
            below = chains[target]
            ways[place] = min(ways[place] + ways[target], MOST_WAYS + 1)
            chains[place] = max(chains[place], 1 + below)
        else:
            # It is found done when this place is looked at again.
            path[target] = _targets(target, documents)
            ways[target] = chains[target] = 1
            continue
        path[place].pop()
        if len(path) + below > _LONGEST:
            raise BadSettings(
                f"{document.place}: more than {_LONGEST} references (`$ref`) lead one to the next: let them lead to "
                "what is meant"
            )
    return ways[first] <= MOST_WAYS


def _targets(place: _Place, documents: Mapping[str, Document]) -> list[_Place | None]:
    """Where the references below a place lead; None for somewhere that is not known."""
    uri, pointer = place
    schema = _at(documents[uri].schema, pointer) if uri in documents else None
    if schema is None:
        return [None]
    targets: list[_Place | None] = []
    for reference in _references(schema):
        base, _, fragment = reference.partition("#")
        targets.append(None if fragment and not fragment.startswith("/") else (base or uri, fragment))
    return targets


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
