"""The whole error tree of Tidings, each class with a stable code.

A code never changes its meaning; messages may. An error is raised where its
cause is known and answered in one place: the gateway turns it into an ``error``
frame, the command line into a sentence and an exit status.
"""

from __future__ import annotations

from collections.abc import Mapping

__all__ = [
    "BadFrame",
    "BadKeys",
    "BadPosition",
    "BadScope",
    "BadSettings",
    "BadSubject",
    "BadTopic",
    "ConnectionLost",
    "EntitlementUnavailable",
    "InvalidNotification",
    "KeysUnavailable",
    "NoSuchLetter",
    "NotAllowed",
    "NotAuthenticated",
    "PublishRefused",
    "PublishUnconfirmed",
    "ReplayRefused",
    "RequestRefused",
    "RowsRefused",
    "SchemaViolation",
    "SessionClosed",
    "StartFailed",
    "StoreUnavailable",
    "StreamUnavailable",
    "TidingsError",
    "TooManySubscriptions",
    "TopologyMismatch",
    "Unreadable",
]


class TidingsError(Exception):
    """Base of every error that Tidings raises on purpose."""

    code = "internal"


class BadSettings(TidingsError):
    """A setting is missing or out of its range; the message names it and its range."""

    code = "bad_settings"


class BadSubject(TidingsError):
    """A user id, device id or topic that cannot become a subject token."""

    code = "bad_subject"


class BadTopic(TidingsError):
    """A topic or subscription that cannot be one; its `code` says if it is too long or too deep."""

    code = "bad_topic"

    def __init__(self, message: str, *, code: str = "bad_topic") -> None:
        super().__init__(message)
        self.code = code


class BadPosition(TidingsError):
    """A position that this mesh never handed out."""

    code = "bad_position"


class BadFrame(TidingsError):
    """A client frame that the protocol does not know, or knows differently."""

    code = "bad_frame"

    def __init__(self, message: str, *, code: str = "bad_frame", ref: int | str | None = None) -> None:
        super().__init__(message)
        self.code = code
        self.ref = ref


class InvalidNotification(TidingsError):
    """A body that is no CloudEvents 1.0 event as Tidings carries it; `pointer` (RFC 6901) is where."""

    code = "invalid_notification"

    def __init__(self, message: str, pointer: str = "") -> None:
        super().__init__(message)
        self.pointer = pointer


class SchemaViolation(InvalidNotification):
    """An event that the schema of its type forbids; `pointer` (RFC 6901) says where."""

    code = "schema_violation"

    def __init__(self, pointer: str, problem: str) -> None:
        super().__init__(f"{f'`{pointer[:200]}`' if pointer else 'the event'}: {problem}")
        self.pointer = pointer


class Unreadable(InvalidNotification):
    """What made reading a notification fail in a way that nobody foresaw: the mistake is ours, and the log has it."""

    code = "unreadable"


class NotAuthenticated(TidingsError):
    """A token that is missing, expired, forged, or for somebody else."""

    code = "not_authenticated"


class NotAllowed(TidingsError):
    """Whoever asks is known, and may not do this."""

    code = "not_allowed"


class KeysUnavailable(NotAuthenticated):
    """The keys that verify tokens could not be read yet: the same token may be good later."""

    code = "keys_unavailable"


class BadKeys(TidingsError):
    """A document of keys that cannot be used; the message never repeats any of it."""

    code = "bad_keys"


class BadScope(TidingsError):
    """A scope that Tidings does not know."""

    code = "bad_scope"


class EntitlementUnavailable(TidingsError):
    """Whoever decides who may subscribe to what did not answer; what was asked may be asked again."""

    code = "entitlement_unavailable"


class StreamUnavailable(TidingsError):
    """NATS or JetStream did not answer; what was asked may be asked again."""

    code = "stream_unavailable"


class TopologyMismatch(TidingsError):
    """The streams or the subject mapping on the server are not those of this mesh."""

    code = "topology_mismatch"


class StoreUnavailable(TidingsError):
    """The inbox store did not answer; what was asked may be asked again."""

    code = "store_unavailable"


class RowsRefused(TidingsError):
    """Rows that no store can keep: storing them again changes nothing. `reasons` is one sentence by row's index."""

    code = "rows_refused"

    def __init__(self, reasons: Mapping[int, str]) -> None:
        super().__init__(f"{len(reasons)} notifications cannot be stored: {next(iter(reasons.values()))}")
        self.reasons = reasons


class TooManySubscriptions(TidingsError):
    """The user has as many subscriptions as one may have."""

    code = "too_many_subscriptions"


class PublishRefused(TidingsError):
    """The mesh refuses this notification for good: publishing it again changes nothing."""

    code = "publish_refused"


class PublishUnconfirmed(TidingsError):
    """No confirmation in time: it may be stored or not. Publish again with the same id."""

    code = "publish_unconfirmed"


class NoSuchLetter(TidingsError):
    """No dead letter has this id: it was replayed or dropped, is past its age, or never was."""

    code = "no_such_letter"


class ReplayRefused(TidingsError):
    """A dead letter that would come back at once, or whose origin names nobody; it is kept."""

    code = "replay_refused"


class ConnectionLost(TidingsError):
    """The gateway's answer to a request did not come: ask again when the client is connected."""

    code = "connection_lost"


class RequestRefused(TidingsError):
    """The gateway refused a request; `code` is the catalogue's, `retry` whether asking later may help."""

    def __init__(self, code: str, message: str, *, retry: bool) -> None:
        super().__init__(message)
        self.code = code
        self.retry = retry


class SessionClosed(TidingsError):
    """The gateway closed the session for good; `close_code` and `name` are the catalogue's."""

    code = "session_closed"

    def __init__(self, close_code: int, name: str, meaning: str) -> None:
        super().__init__(f"the gateway closed the session: {meaning} ({close_code} {name})")
        self.close_code = close_code
        self.name = name


class StartFailed(TidingsError):
    """An agent or the development mesh cannot start; the message says what to do."""

    code = "start_failed"
