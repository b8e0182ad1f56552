"""The configuration of a nats-server for a mesh: accounts, users and permissions, as `roles` has them.

::

    account TIDINGS          streams, agents, operator, the mapping of users to partitions
      exports notify.user.* and notify.topic.>   to those who import it:
    account PUBLISHER_shop   one service, which imports what it may publish to
    account SYS              the server's own, with a user to look at it
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Final

import orjson

from tidings.wire import subject
from tidings.wire.notification import MAX_BODY_BYTES

from .roles import SYSTEM, Line, Publisher, Role, agents
from .topology import HEADER_ROOM, mapping

__all__ = ["accounts", "server"]

_ACCOUNT: Final = "TIDINGS"
_SYSTEM_ACCOUNT: Final = "SYS"
_ANSWER_S: Final = 10
_SERVER: Final = """\
# A nats-server of a Tidings mesh: a beginning. It is yours: `tidings topology nats-config` never writes it again.

server_name: "tidings-1"
listen: "0.0.0.0:4222"

# TLS for all clients; agents check it with TIDINGS_NATS_CA.
# tls {
#   cert_file: "/etc/tidings/nats.pem"
#   key_file: "/etc/tidings/nats.key"
# }

# TIDINGS_REPLICAS=3 needs three servers, each with this file, a server_name of its own, and the same accounts.
# cluster {
#   name: "tidings"
#   listen: "0.0.0.0:6222"
#   routes: ["nats://n1:6222", "nats://n2:6222", "nats://n3:6222"]
# }

jetstream {
  store_dir: "jetstream"
  # All sessions' consumers are in memory: 40 KB each on one server, 24 KB on each of three.
  max_memory_store: 4GB
  max_file_store: 64GB
  # A killed server loses nothing; a lost machine loses at most this, of what no other replica has.
  sync_interval: "1s"
}

max_payload: 1MB
# Longer than nats-server's own 4096 no client would read.
max_control_line: 4096
write_deadline: "10s"

# Who may do what. Made anew by each `tidings topology nats-config`; `nats-server --signal reload` reads it.
include "accounts.conf"
"""


def server() -> str:
    """A server's configuration that includes `accounts`: a beginning, for the operator to change."""
    return _SERVER


def accounts(partitions: int, publishers: Sequence[Publisher], keys: Mapping[str, Sequence[str]]) -> str:
    """The accounts of a mesh. `keys` has the public keys of each role, of `SYSTEM`, and of `Publisher.key` names."""
    roles = agents(partitions)
    text = [
        "# Who may do what in a Tidings mesh. Made by `tidings topology nats-config`, and made anew each time.",
        "",
        *(line for role in roles for line in (*_variable(_variable_name(role.name), _permissions(role)), "")),
        "accounts {",
        *_indent(_agents_account(partitions, roles, publishers, keys)),
        *(line for publisher in publishers for line in _indent(_publisher_account(publisher, keys))),
        *_indent(_block(_SYSTEM_ACCOUNT, _block("users", _users(keys[SYSTEM]), "[]"))),
        "}",
        f"system_account: {_SYSTEM_ACCOUNT}",
        "",
    ]
    return "\n".join(text)


def _agents_account(
    partitions: int, roles: Sequence[Role], publishers: Sequence[Publisher], keys: Mapping[str, Sequence[str]]
) -> Iterator[str]:
    source, destination = mapping(partitions)
    users: list[str] = []
    for role in roles:
        users += (f"# {role.name}", *_users(keys[role.name], f"permissions: ${_variable_name(role.name)}"))
    lines = ["jetstream: enabled", *_block("mappings", [f"{_quoted(source)}: {_quoted(destination)}"])]
    exports = list(_exports(publishers))
    if exports:
        lines += _block("exports", exports, "[]")
    return _block(_ACCOUNT, [*lines, *_block("users", users, "[]")])


def _exports(publishers: Sequence[Publisher]) -> Iterator[str]:
    for where in (subject.NOTIFY_WILDCARD, subject.TOPICS_WILDCARD):
        beginning = where.rstrip("*>")
        importers = [
            _quoted(publisher.account)
            for publisher in publishers
            if any(line.subject.startswith(beginning) for line in publisher.subjects())
        ]
        if importers:
            yield f"{{ service: {_quoted(where)}, accounts: [{', '.join(importers)}] }}"


def _publisher_account(publisher: Publisher, keys: Mapping[str, Sequence[str]]) -> Iterator[str]:
    lines = publisher.subjects()
    imports = [
        f"{{ service: {{ account: {_ACCOUNT}, subject: {_quoted(line.subject)} }} }}  # {_comment(line.why)}"
        for line in lines
    ]
    # The account has nothing else in it; the list keeps the server's own services away as well.
    rules = _lists(publish=lines, subscribe=(Line("_INBOX.>", "get the confirmations"),))
    largest = MAX_BODY_BYTES + HEADER_ROOM
    body = [
        f"limits {{ max_payload: {largest} }}",
        *_block("imports", imports, "[]"),
        *_block("users", _users(keys[publisher.key], *_block("permissions", rules)), "[]"),
    ]
    return _block(publisher.account, body)


def _users(public: Sequence[str], *permissions: str) -> Iterator[str]:
    for key in public:
        yield from _block("", [f"nkey: {key}", 'allowed_connection_types: ["STANDARD"]', *permissions])


def _permissions(role: Role) -> Iterator[str]:
    yield from _lists(publish=role.publish, never=role.never, subscribe=role.subscribe)
    if role.answers:
        yield f'allow_responses: {{ max: 1, expires: "{_ANSWER_S}s" }}'


def _lists(publish: Iterable[Line], subscribe: Iterable[Line], never: Sequence[Line] = ()) -> Iterator[str]:
    denied = _block("deny", _lines(never), "[]") if never else ()
    yield from _block("publish", [*_block("allow", _lines(publish), "[]"), *denied])
    yield from _block("subscribe", _block("allow", _lines(subscribe), "[]"))


def _lines(lines: Iterable[Line]) -> Iterator[str]:
    for line in lines:
        yield f"{_quoted(line.subject)}  # {_comment(line.why)}"


def _block(name: str, lines: Iterable[str], brackets: str = "{}") -> Iterator[str]:
    yield f"{name} {brackets[0]}".lstrip()
    yield from _indent(lines)
    yield brackets[1]


def _variable(name: str, lines: Iterable[str]) -> Iterator[str]:
    return _block(f"{name}:", lines)


def _variable_name(role: str) -> str:
    return f"{role.upper()}_MAY"


def _indent(lines: Iterable[str]) -> Iterator[str]:
    return (f"  {line}" for line in lines)


def _quoted(text: str) -> str:
    return orjson.dumps(text).decode()


def _comment(text: str) -> str:
    """On one line, whatever is in a user's id."""
    return _quoted(text)[1:-1]
