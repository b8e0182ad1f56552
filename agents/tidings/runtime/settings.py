"""Every setting of every agent: its default, unit, range and meaning, in one place.

A value comes from, in this order: the command line, the environment (``TIDINGS_`` and the name in upper
case), a TOML file (flat, the same names in lower case), the default. Units are in the names: ``_s`` seconds,
``_ms`` milliseconds, ``_bytes`` bytes.
"""

from __future__ import annotations

import os
import tomllib
from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any, Final
from urllib.parse import urlsplit

from tidings.wire.errors import BadSettings

__all__ = ["ENVIRONMENT_PREFIX", "Settings"]

ENVIRONMENT_PREFIX: Final = "TIDINGS_"


def _number(default: float, least: float, most: float, text: str) -> Any:
    return field(default=default, metadata={"least": least, "most": most, "text": text})


def _text(default: str, text: str, *, choices: tuple[str, ...] = ()) -> Any:
    return field(default=default, metadata={"choices": choices, "text": text}, repr="secret" not in text)


@dataclass(frozen=True, slots=True, kw_only=True)
class Settings:
    """All settings, checked; raises `BadSettings` naming the setting, its value and its range."""

    # The log
    nats_url: str = _text("nats://127.0.0.1:4222", "servers of the NATS cluster, comma-separated")
    nats_credentials: str = _text("", "path of a NATS credentials file (needs tidings[nkeys]); empty for none")
    partitions: int = _number(64, 1, 1024, "partitions of the personal plane; fixed when the topology is created")
    replicas: int = _number(3, 1, 5, "replicas of every stream")
    stream_max_age_s: int = _number(21_600, 1, 2_592_000, "how long the log keeps a notification")
    stream_max_bytes: int = _number(-1, -1, 2**50, "most bytes of one partition's stream; -1 for no limit")
    stream_max_consumers: int = _number(100_000, 10, 1_000_000, "most consumers of one partition's stream")
    dead_max_age_s: int = _number(2_592_000, 60, 31_536_000, "how long dead letters are kept")
    duplicate_window_s: int = _number(120, 1, 3600, "how long JetStream remembers message ids")

    # The store
    store_url: str = _text(
        "sqlite:///tidings.db", "where inbox and cursors live: sqlite:///file.db or cql://host/keyspace"
    )
    store_timeout_s: float = _number(1, 0.05, 60, "how long the store may take for what a client waits for")
    cql_replication: str = _text("", "copies in each datacenter of a new CQL keyspace, such as dc1:3 or dc1:3,dc2:3")
    retention_days: int = _number(90, 1, 3650, "how long the inbox keeps a notification")

    # The gateway
    host: str = _text("127.0.0.1", "address to listen on")
    port: int = _number(8080, 0, 65_535, "port to listen on; 0 for any")
    token_key: str = _text("", "secret that signs device tokens (HS256), at least 32 characters")
    max_sessions: int = _number(15_000, 1, 1_000_000, "most sessions of one gateway, lingering ones included")
    hello_timeout_s: float = _number(10, 0.1, 300, "how long a connection may take to say hello")
    window: int = _number(64, 1, 1000, "most unacknowledged notifications of a session that asks for no other number")
    window_max: int = _number(256, 1, 1000, "largest window that a client gets")
    ack_wait_s: float = _number(30, 0.5, 3600, "how long a client may take to acknowledge before it is sent again")
    max_deliver: int = _number(10, 1, 1000, "attempts in front of a live client before a notification is a dead letter")
    linger_s: float = _number(30, 0, 600, "how long a session outlives its socket")
    heartbeat_s: float = _number(25, 0.5, 600, "a client silent for so long is pinged; after twice that, dropped")
    frame_max_bytes: int = _number(65_536, 1024, 1_048_576, "largest frame of a client")
    write_buffer_bytes: int = _number(262_144, 4096, 16_777_216, "most unsent bytes of one connection")
    write_stall_s: float = _number(10, 0.1, 600, "how long a client may leave its buffer full before it is closed")
    requests_per_session: int = _number(16, 1, 1000, "most inbox, mark and count requests under way on a connection")
    pull_expires_s: float = _number(300, 1, 3600, "how long one pull request waits at the server")
    consumer_idle_s: float = _number(300, 10, 86_400, "how long a killed gateway's consumers stay")
    subscriptions_max: int = _number(10_000, 1, 1_000_000, "most subscriptions of a user")
    subscribe_rules: str = _text(
        ">", "which topics may be subscribed to: patterns, comma-separated, first match first; !pattern refuses"
    )
    consumer_starts: int = _number(64, 1, 4096, "most sessions that a gateway starts or mends at a time")
    start_wait_s: float = _number(
        2, 0.1, 10, "how long a device may wait to be started; who would wait longer is told when to come back"
    )
    entering_max: int = _number(
        4096, 1, 1_000_000, "most connections that have no session yet; more are refused with HTTP status 503"
    )
    delivery_marks: str = _text(
        "on", "note in the inbox when and where each was delivered first", choices=("on", "off")
    )
    cursor_flush_s: float = _number(5, 0.1, 300, "how often changed cursors are written")
    catchup_cap: int = _number(1000, 1, 100_000, "most missed notifications that are pushed from the inbox")
    overlap_s: float = _number(
        300, 0, 86_400, "how far back a device without a known cursor reads while the store is down"
    )
    claim_timeout_ms: int = _number(100, 1, 10_000, "how long another gateway may take to hand a device over")
    probe_interval_s: float = _number(1, 0.1, 60, "how often a gateway asks each NATS node for one of its consumers")
    drain_notice_s: float = _number(
        0, 0, 300, "how long a stopping gateway is not ready and still serves, so that a load balancer can notice"
    )
    drain_per_s: int = _number(250, 1, 100_000, "how many devices a second a stopping gateway sends away")
    drain_s: float = _number(20, 0, 300, "after how long at most a stopping gateway has closed all its sockets")

    # The inbox agent
    inbox_batch: int = _number(256, 1, 10_000, "most notifications of one write")
    inbox_delay_ms: int = _number(100, 0, 10_000, "how long the first notification of a write waits for company")
    inbox_ack_wait_s: float = _number(60, 1, 3600, "how long a write may take before another inbox agent tries")
    floor_interval_s: float = _number(1, 0.05, 60, "how often the inbox floors are announced")

    # The fan-out agent
    fanout_batch: int = _number(256, 1, 10_000, "most topic messages that one fan-out agent has under way")
    fanout_in_flight: int = _number(1024, 1, 100_000, "most copies that one fan-out agent has unconfirmed")
    fanout_write_max: int = _number(
        1000, 0, 1_000_000, "most subscribers who get a copy each of a topic message; above it goes out as a broadcast"
    )
    fanout_ack_wait_s: float = _number(60, 1, 3600, "how long a topic message may take before another agent tries")

    # All
    log_level: str = _text("info", "how much is logged", choices=("debug", "info", "warning", "error"))
    request_timeout_s: float = _number(5, 0.1, 60, "how long an answer of JetStream may take")
    api_requests: int = _number(64, 1, 4096, "most requests that a process has under way at JetStream's API")

    def __post_init__(self) -> None:
        problems = _problems({item.name: getattr(self, item.name) for item in fields(self)})
        if problems:
            raise BadSettings(next(iter(problems.values())))

    @classmethod
    def load(
        cls,
        environment: Mapping[str, str] | None = None,
        file: Path | None = None,
        **given: Any,
    ) -> Settings:
        """Settings from keyword arguments (None counts as not given), the environment, a TOML file, the defaults."""
        values, problems = _read(environment, file)
        if problems:
            raise BadSettings(problems[0])
        values.update((name, value) for name, value in given.items() if value is not None)
        return cls(**values)

    @classmethod
    def examine(
        cls, environment: Mapping[str, str] | None = None, file: Path | None = None
    ) -> tuple[dict[str, Any], list[str]]:
        """The values of every setting, the default for each bad one, and a sentence for each that `load` refuses."""
        defaults = {item.name: item.default for item in fields(cls)}
        read, problems = _read(environment, file)
        values = {**defaults, **read}
        bad = _problems(values)
        return {**values, **{name: defaults[name] for name in bad}}, [*problems, *bad.values()]

    @classmethod
    def describe(cls) -> list[tuple[str, str, str]]:
        """Environment variable, default and meaning of every setting, in order."""
        return [
            (ENVIRONMENT_PREFIX + item.name.upper(), str(item.default), item.metadata["text"]) for item in fields(cls)
        ]


def _is_server(text: str) -> bool:
    try:
        parts = urlsplit(text if "://" in text else f"nats://{text}")
        return bool(parts.hostname) and (parts.port is None or parts.port > 0)
    except ValueError:
        return False


_TYPES: Final[dict[str, type]] = {
    item.name: float if item.type == "float" else int if item.type == "int" else str for item in fields(Settings)
}


def _problems(values: Mapping[str, Any]) -> dict[str, str]:
    """A sentence for each setting whose value is not what it must be, by its name."""
    found = {
        item.name: problem
        for item in fields(Settings)
        if (problem := _problem(item.name, values[item.name], item.metadata)) is not None
    }
    if "nats_url" not in found:
        for server in values["nats_url"].split(","):
            if not _is_server(server):
                found["nats_url"] = f"nats_url has the server {server!r}: it must be like nats://127.0.0.1:4222"
                break
    if not found.keys() & {"window", "window_max"} and values["window"] > values["window_max"]:
        found["window"] = (
            f"window is {values['window']}: it may not be above window_max, which is {values['window_max']}"
        )
    if "token_key" not in found and 0 < len(values["token_key"]) < 32:
        found["token_key"] = "token_key is too short: give at least 32 characters, such as `openssl rand -hex 32`"
    return found


def _problem(name: str, value: Any, rule: Mapping[str, Any]) -> str | None:
    wanted = _TYPES[name]
    if wanted is str:
        if not isinstance(value, str):
            return f"{name} is {value!r}: it must be text"
        if rule["choices"] and value not in rule["choices"]:
            return f"{name} is {value!r}: it must be one of {', '.join(rule['choices'])}"
        return None
    if isinstance(value, bool) or not isinstance(value, int if wanted is int else (int, float)):
        return f"{name} is {value!r}: it must be {'an integer' if wanted is int else 'a number'}"
    if not rule["least"] <= value <= rule["most"]:
        return f"{name} is {value}: it must be from {rule['least']} to {rule['most']} ({rule['text']})"
    return None


def _read(environment: Mapping[str, str] | None, file: Path | None) -> tuple[dict[str, Any], list[str]]:
    """What the file and the environment say, and a sentence for each thing there that cannot be read."""
    values, problems = _from_file(file) if file else ({}, [])
    of_environment, more = _from_environment(os.environ if environment is None else environment)
    return {**values, **of_environment}, [*problems, *more]


def _from_environment(environment: Mapping[str, str]) -> tuple[dict[str, Any], list[str]]:
    values: dict[str, Any] = {}
    problems: list[str] = []
    for name, wanted in _TYPES.items():
        variable = ENVIRONMENT_PREFIX + name.upper()
        text = environment.get(variable)
        if text is None:
            continue
        try:
            values[name] = wanted(text)
        except ValueError:
            problems.append(f"{variable} is {text!r}: it must be {'an integer' if wanted is int else 'a number'}")
    return values, problems


def _from_file(file: Path) -> tuple[dict[str, Any], list[str]]:
    try:
        values = tomllib.loads(file.read_text())
    except OSError as error:
        return {}, [f"the settings file {file} cannot be read: {error.strerror}"]
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        return {}, [f"the settings file {file} is not TOML: {error}"]
    unknown = sorted(set(values) - set(_TYPES))
    if not unknown:
        return values, []
    known = {name: value for name, value in values.items() if name in _TYPES}
    return known, [f"the settings file {file} has unknown settings: {', '.join(unknown)}"]
