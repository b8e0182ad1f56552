"""Schema files: one a type, named after it, ``social.like.json``.

What cannot be one is an error with the file's name when an agent starts, never a type that is silently not checked.
"""

from __future__ import annotations

from collections.abc import Iterator
from importlib import resources
from importlib.resources.abc import Traversable
from pathlib import Path
from typing import Any, Final, NamedTuple

import orjson

from tidings.wire.errors import BadSettings
from tidings.wire.notification import MAX_NAME

__all__ = ["DIALECT", "Document", "own", "shipped"]

DIALECT: Final = "https://json-schema.org/draft/2020-12/schema"
_SUFFIX: Final = ".json"
_MAX_BYTES: Final = 256 * 1024
_MAX_FILES: Final = 1000


class Document(NamedTuple):
    """One schema file."""

    type: str
    uri: str
    """Its ``$id``: what other files of the same folder may refer to."""
    schema: dict[str, Any]
    place: str
    """For people: the file's path."""


def shipped() -> list[Document]:
    """The types that come with Tidings."""
    packaged = resources.files("tidings.schema") / "events"
    # In a checkout the files are at their own place.
    return _read(packaged if packaged.is_dir() else Path(__file__).parents[3] / "schemas" / "events")


def own(folder: Path) -> list[Document]:
    """The types of a user's own folder; raises `BadSettings` naming what cannot be read."""
    if not folder.is_dir():
        raise BadSettings(f"schema_dir is {str(folder)!r}: there is no such folder")
    try:
        return _read(folder)
    except OSError as error:
        raise BadSettings(f"schema_dir: {error.filename or folder} cannot be read: {error.strerror}") from None


def _read(folder: Traversable) -> list[Document]:
    files = sorted((entry for entry in folder.iterdir() if entry.name.endswith(_SUFFIX)), key=lambda file: file.name)
    if len(files) > _MAX_FILES:
        raise BadSettings(f"{folder} has {len(files)} schema files: at most {_MAX_FILES} are read")
    return list(_documents(files))


def _documents(files: list[Traversable]) -> Iterator[Document]:
    for file in files:
        type_ = file.name.removesuffix(_SUFFIX)
        if not 0 < len(type_) <= MAX_NAME:
            raise BadSettings(f"{file}: a schema's file is named after its type, such as order.sent.json")
        text = file.read_bytes()
        if len(text) > _MAX_BYTES:
            raise BadSettings(f"{file} has {len(text)} bytes: a schema has at most {_MAX_BYTES}")
        try:
            schema = orjson.loads(text)
        except orjson.JSONDecodeError as error:
            raise BadSettings(f"{file} is not JSON: {error}") from None
        if type(schema) is not dict:
            raise BadSettings(f"{file} is no JSON Schema: it must be a JSON object")
        if schema.get("$schema", DIALECT) != DIALECT:
            raise BadSettings(f"{file} is written for {schema['$schema']!r}: only {DIALECT} is read")
        properties = schema.get("properties")
        said = properties.get("type") if type(properties) is dict else None
        if type(said) is dict and said.get("const", type_) != type_:
            raise BadSettings(f"{file} is for the type {said['const']!r}: name the file {said['const']}{_SUFFIX}")
        uri = schema.get("$id", f"urn:tidings:schema:own:{type_}")
        if type(uri) is not str:
            raise BadSettings(f"{file}: `$id` must be a string")
        yield Document(type_, uri, schema, str(file))
