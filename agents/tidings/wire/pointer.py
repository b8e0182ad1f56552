"""JSON pointers (RFC 6901): where in a document something is."""

from __future__ import annotations

__all__ = ["pointer_to", "steps_of"]


def pointer_to(*path: str | int) -> str:
    """The pointer to a member; empty for the whole document. "~" and "/" in a name are escaped."""
    return "".join("/" + str(step).replace("~", "~0").replace("/", "~1") for step in path)


def steps_of(pointer: str) -> list[str]:
    """The names, and numbers as text, on the way to where a pointer points."""
    return [step.replace("~1", "/").replace("~0", "~") for step in pointer.split("/")[1:]]
