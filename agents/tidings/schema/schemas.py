"""Checking notifications against the schemas of their types.

A schema describes the whole event, envelope included, and is compiled once. Nothing is ever fetched: a ``$ref`` points
into its file, or to the ``$id`` of another file. Patterns run on an engine whose time grows with the text alone (no
backtracking, hence no look-around and no back-references); a body's nesting (250) and its size (16 KiB) are bounded by
the envelope: deeper than 255 the validator cannot say what is wrong. What a violation says names the place and the
rule, never the value: it goes to logs. (`tidings.schema.references` has the one case in which it does not name the
place.)
"""

from __future__ import annotations

import logging
import zlib
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any, Final, Literal, NamedTuple, Self

from jsonschema_rs import Draft202012, Draft202012Validator, ReferencingError, RegexOptions, Registry, ValidationError

from tidings.runtime.settings import Settings
from tidings.wire import notification
from tidings.wire.errors import BadSettings, InvalidNotification, SchemaViolation, Unreadable
from tidings.wire.notification import Envelope
from tidings.wire.pointer import pointer_to

from .folder import Document, own, shipped
from .references import is_locatable

__all__ = ["EventType", "Schemas", "reader"]

_LONGEST: Final = 300
"""Of a violation's text, in characters: a rule that lists what it found may be as long as the body."""
_REGEX_BYTES: Final = 1024 * 1024
"""A pattern that compiles to more is refused."""
_SHARES: Final = 2**32

log = logging.getLogger("tidings.schema")


class EventType(NamedTuple):
    """A type that has a schema."""

    name: str
    title: str
    description: str
    place: str
    """The file."""
    examples: list[Any]


class Schemas:
    """The schemas of all types, compiled. Immutable, and safe to share."""

    def __init__(self, documents: Iterable[Document], *, unknown: Literal["allow", "refuse"] = "allow") -> None:
        """Raises `BadSettings` naming the file that is no JSON Schema 2020-12, or refers to what is not there."""
        self._refuses_unknown = unknown == "refuse"
        # One that comes later replaces one of the same type.
        self._documents = {document.type: document for document in documents}
        by_uri: dict[str, Document] = {}
        for document in self._documents.values():
            other = by_uri.setdefault(document.uri, document)
            if other is not document:
                raise BadSettings(
                    f"{document.place} and {other.place} have one `$id`, {document.uri!r}: give each its own"
                )
        try:
            registry = Registry(
                [(document.uri, document.schema) for document in self._documents.values()], draft=Draft202012
            )
        except (ValueError, ReferencingError) as error:
            raise BadSettings(f"the schemas do not fit together: {_first_line(error)}") from None
        self._unlocated = {name for name, document in self._documents.items() if not is_locatable(document, by_uri)}
        """Types of whose violations it is not said where they are."""
        self._validators = {name: _compile(document, registry) for name, document in self._documents.items()}

    @classmethod
    def load(cls, folder: Path | None = None, *, unknown: Literal["allow", "refuse"] = "allow") -> Self:
        """The shipped schemas and those of a folder, which replace shipped ones of the same type.

        `unknown` says what becomes of a notification whose type has no schema. Raises `BadSettings`.
        """
        return cls([*shipped(), *(own(folder) if folder is not None else ())], unknown=unknown)

    @classmethod
    def of(cls, settings: Settings) -> Self:
        """As the settings ``schema_dir`` and ``schema_unknown`` say; raises `BadSettings`."""
        folder = Path(settings.schema_dir) if settings.schema_dir else None
        return cls.load(folder, unknown="refuse" if settings.schema_unknown == "refuse" else "allow")

    @classmethod
    def checking(cls, settings: Settings) -> Self | None:
        """What a publisher holds its own notifications against; None where ``schema_check`` is ``off``."""
        return None if settings.schema_check == "off" else cls.of(settings)

    def types(self) -> list[EventType]:
        """All types that have a schema, by name."""
        return [
            EventType(
                name,
                str(document.schema.get("title", "")),
                str(document.schema.get("description", "")),
                document.place,
                list(document.schema.get("examples", ())),
            )
            for name, document in sorted(self._documents.items())
        ]

    def check(self, body: bytes) -> Envelope:
        """Read a notification; raises `InvalidNotification`, or `SchemaViolation` for one that its type forbids."""
        envelope, event = notification.read(body)
        self.check_event(envelope.type, event)
        return envelope

    def check_event(self, type: str, event: dict[str, Any]) -> None:
        """Check an event that was read and whose envelope is good; raises `SchemaViolation`."""
        validator = self._validators.get(type)
        if validator is None:
            if self._refuses_unknown:
                raise SchemaViolation("/type", f"no schema is known of the type {type[:80]!r}")
        elif not validator.is_valid(event):
            raise _violation(type, None if type in self._unlocated else validator, event)


def reader(settings: Settings) -> Callable[[bytes], Envelope]:
    """What an agent reads notifications with: their envelope, and their schema as ``schema_check`` says.

    It raises `InvalidNotification` and nothing else: of a message that made an agent fail, every agent would fail, at
    each redelivery. What is sampled follows from the id: every agent checks the same ones. Raises `BadSettings`.
    """
    read = _reader(settings)

    def foolproof(body: bytes) -> Envelope:
        try:
            return read(body)
        except InvalidNotification:
            raise
        except Exception as error:
            log.exception("reading a notification failed")
            raise Unreadable(f"reading it failed: {type(error).__name__}: {error}") from error

    return foolproof


def _reader(settings: Settings) -> Callable[[bytes], Envelope]:
    schemas = Schemas.checking(settings)
    if schemas is None:
        return notification.check
    if settings.schema_check == "always":
        return schemas.check
    share = int(settings.schema_sample * _SHARES)

    def sampled(body: bytes) -> Envelope:
        envelope, event = notification.read(body)
        if zlib.crc32(envelope.id.encode()) < share:
            schemas.check_event(envelope.type, event)
        return envelope

    return sampled


def _compile(document: Document, registry: Registry) -> Draft202012Validator:
    try:
        return Draft202012Validator(
            document.schema,
            registry=registry,
            base_uri=document.uri,
            offline=True,
            validate_formats=True,
            pattern_options=RegexOptions(size_limit=_REGEX_BYTES, dfa_size_limit=_REGEX_BYTES),
            mask="it",
        )
    except ValidationError as error:
        where = "".join(f"/{step}" for step in error.instance_path)
        raise BadSettings(f"{document.place} is no JSON Schema 2020-12: {where} {error.message}".strip()) from None
    except (ValueError, ReferencingError) as error:
        raise BadSettings(f"{document.place} is no JSON Schema 2020-12: {_first_line(error)}") from None


def _first_line(error: Exception) -> str:
    return str(error).partition("\n")[0]


def _violation(type: str, validator: Draft202012Validator | None, event: dict[str, Any]) -> SchemaViolation:
    if validator is None:
        return SchemaViolation("", f"it does not fit the schema of {type[:80]}")
    error = next(validator.iter_errors(event))
    return SchemaViolation(pointer_to(*error.instance_path), f"{error.message[:_LONGEST]} ({type[:80]})")
