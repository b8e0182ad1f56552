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

from .address import shown

__all__ = ["ENVIRONMENT_PREFIX", "INSECURE", "Settings", "listed"]

ENVIRONMENT_PREFIX: Final = "TIDINGS_"

INSECURE: Final = ("gateway", "api", "nats", "nats-credentials", "cql", "token-key")
"""What the setting `insecure` may name; see `runtime.exposure`."""

_LEAST_SECRET: Final = 32
_MOST_SECRETS: Final = 8


def _number(default: float, least: float, most: float, text: str) -> Any:
    return field(default=default, metadata={"least": least, "most": most, "text": text})


def _text(default: str, text: str, *, choices: tuple[str, ...] = (), secret: bool = False) -> Any:
    """A `secret` may hold one: it is not in the text of a `Settings`."""
    return field(default=default, metadata={"choices": choices, "text": text}, repr=not secret)


@dataclass(frozen=True, slots=True, kw_only=True)
class Settings:
    """All settings, checked; raises `BadSettings` naming the setting, its value and its range."""

    # The log
    nats_url: str = _text("nats://127.0.0.1:4222", "servers of the NATS cluster, comma-separated", secret=True)
    nats_credentials: str = _text(
        "", "path of a NATS credentials file, or of an nkey's seed (needs tidings[nkeys]); empty for none"
    )
    nats_ca: str = _text(
        "", "path of the CA certificates (PEM) that NATS servers are checked against; empty for the system's"
    )
    nats_certificate: str = _text("", "path of our certificate (PEM) for NATS servers that ask for one")
    nats_key: str = _text("", "path of its private key (PEM)")
    partitions: int = _number(64, 1, 1024, "partitions of the personal plane; fixed when the topology is created")
    replicas: int = _number(3, 1, 5, "replicas of every stream")
    stream_max_age_s: int = _number(21_600, 1, 2_592_000, "how long the log keeps a notification")
    stream_max_bytes: int = _number(-1, -1, 2**50, "most bytes of one partition's stream; -1 for no limit")
    stream_max_consumers: int = _number(100_000, 10, 1_000_000, "most consumers of one partition's stream")
    dead_max_age_s: int = _number(2_592_000, 60, 31_536_000, "how long dead letters are kept")
    duplicate_window_s: int = _number(120, 1, 3600, "how long JetStream remembers message ids")

    # The store
    store_url: str = _text(
        "sqlite:///tidings.db", "where inbox and cursors live: sqlite:///file.db or cql://host/keyspace", secret=True
    )
    store_timeout_s: float = _number(1, 0.05, 60, "how long the store may take for what a client waits for")
    cql_replication: str = _text("", "copies in each datacenter of a new CQL keyspace, such as dc1:3 or dc1:3,dc2:3")
    retention_days: int = _number(90, 1, 3650, "how long the inbox keeps a notification")

    # The doors: gateway and api
    tls_certificate: str = _text("", "path of the certificate (PEM, with its chain) to serve TLS with; empty for none")
    tls_key: str = _text("", "path of its private key (PEM, not encrypted)")
    tls_check_s: float = _number(5, 0.05, 3600, "how often those files are looked at for renewed ones")

    # The gateway
    host: str = _text("127.0.0.1", "address to listen on")
    port: int = _number(8080, 0, 65_535, "port to listen on; 0 for any")
    token_key: str = _text(
        "",
        "secrets of tokens (HS256), comma-separated, at least 32 characters each: the first signs, all verify",
        secret=True,
    )
    token_key_file: str = _text(
        "", "path of the public keys of tokens: one in PEM, or a JWK Set (needs tidings[crypto])"
    )
    token_jwks_url: str = _text("", "address of the public keys of tokens, a JWK Set (needs tidings[crypto])")
    token_jwks_refresh_s: float = _number(300, 1, 86_400, "how often the keys at token_jwks_url are read")
    token_jwks_pause_s: float = _number(10, 0.05, 3600, "least time between two readings for unknown keys of tokens")
    token_jwks_timeout_s: float = _number(5, 0.1, 60, "how long token_jwks_url may take to answer")
    token_issuer: str = _text("", "what the claim `iss` of every token must be; empty for anything")
    token_audience: str = _text(
        "",
        "names of this mesh, comma-separated: the claim `aud` must have one; where empty, no token may have an `aud`",
    )
    token_leeway_s: float = _number(10, 0, 300, "how far clocks may be apart when the times of a token are checked")
    token_ttl_max_s: int = _number(
        604_800, 60, 31_536_000, "longest life of a token: others are refused; revocations are kept so long"
    )
    allowed_origins: str = _text(
        "",
        "origins whose pages may connect, comma-separated, such as https://app.example.com; * for any; empty for the "
        "gateway's own",
    )
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
    client_frames_per_s: float = _number(
        50, 0.1, 100_000, "frames a second of a user's devices on one gateway; acks of what they were sent are free"
    )
    client_frames_burst: int = _number(300, 10, 1_000_000, "how many of these frames may come at once")
    client_bytes_per_s: float = _number(65_536, 100, 2**30, "bytes a second of a user's devices on one gateway")
    client_bytes_burst: int = _number(1_048_576, 1024, 2**30, "how many of these bytes may come at once")
    devices_max: int = _number(32, 1, 10_000, "most devices of a user on one gateway, lingering ones included")
    strangers_max: int = _number(
        5000, 10, 1_000_000, "most connections that have not said hello; above it the one that has not for longest goes"
    )
    memory_max_bytes: int = _number(
        2_147_483_648, 0, 2**50, "above it, of the whole process, no new session is taken (Linux); 0 for no limit"
    )
    pull_expires_s: float = _number(300, 1, 3600, "how long one pull request waits at the server")
    consumer_idle_s: float = _number(300, 10, 86_400, "how long a killed gateway's consumers stay")
    subscriptions_max: int = _number(10_000, 1, 1_000_000, "most subscriptions of a user")
    subscribe_rules: str = _text(
        ">", "which topics may be subscribed to: patterns, comma-separated, first match first; !pattern refuses"
    )
    subscribe_callback_url: str = _text(
        "", "address that is asked, behind subscribe_rules, which topics a user may have; empty for none"
    )
    subscribe_callback_token: str = _text(
        "", "secret that subscribe_callback_url is sent as a bearer token", secret=True
    )
    subscribe_callback_timeout_s: float = _number(1, 0.05, 60, "how long subscribe_callback_url may take to answer")
    subscribe_callback_ttl_s: float = _number(60, 0, 86_400, "how long its answer counts")
    subscribe_callback_cache: int = _number(100_000, 0, 10_000_000, "most answers of it that are remembered")
    subscribe_callback_at_once: int = _number(32, 1, 10_000, "most questions to it that are under way")
    consumer_starts: int = _number(64, 1, 4096, "most sessions that a gateway starts or mends at a time")
    start_wait_s: float = _number(
        2, 0.1, 10, "how long a device may wait to be started; who would wait longer is told when to come back"
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
        0, 0, 300, "how long a stopping gateway or api is not ready and still serves, for a load balancer to notice"
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

    # The HTTP api agent
    api_host: str = _text("127.0.0.1", "address that the HTTP api listens on")
    api_port: int = _number(8081, 0, 65_535, "port of the HTTP api; 0 for any")
    api_body_max_bytes: int = _number(1_048_576, 32_768, 67_108_864, "largest body of a request")
    api_body_timeout_s: float = _number(10, 0.1, 300, "how long the body of a request may take to arrive")
    api_write_timeout_s: float = _number(10, 0.1, 300, "how long a client may take to read its answer")
    api_publish_timeout_s: float = _number(5, 0.1, 60, "how long a publish over HTTP may wait for the log")
    api_concurrency: int = _number(256, 1, 100_000, "most requests under way in one api agent; more get 503")
    api_concurrency_per_credential: int = _number(64, 1, 100_000, "most requests under way of one user or service")
    api_in_flight: int = _number(10_000, 1000, 1_000_000, "most unconfirmed notifications of one api agent")
    api_requests_per_minute: int = _number(60_000, 1, 100_000_000, "requests of one service at one api agent")
    api_user_requests_per_minute: int = _number(
        1200, 1, 100_000_000, "requests about one user, by the user or by one service, at one api agent"
    )
    api_notifications_per_minute: int = _number(
        600_000, 1000, 1_000_000_000, "notifications that one service publishes at one api agent"
    )

    # Event schemas
    schema_dir: str = _text("", "folder with schemas of your own event types, <type>.json each; empty for none")
    schema_check: str = _text(
        "always",
        "which notifications inbox and fan-out agents hold against their type's schema",
        choices=("always", "sampled", "off"),
    )
    schema_sample: float = _number(0.01, 0, 1, "share of the notifications that are checked where schema_check=sampled")
    schema_unknown: str = _text(
        "allow", "what becomes of a notification whose type has no schema", choices=("allow", "refuse")
    )

    # Telemetry
    telemetry: str = _text("off", "metrics and traces (needs tidings[otel])", choices=("off", "on"))
    metrics_host: str = _text("127.0.0.1", "address that /metrics is served on")
    metrics_port: int = _number(9464, 0, 65_535, "port of /metrics; 0 for any")
    trace_sample_ratio: float = _number(
        0.01, 0, 1, "share of the notifications published here, without a trace of their own, that begin one"
    )
    otlp_endpoint: str = _text(
        "",
        "address that metrics and traces are sent to by OTLP over HTTP, such as http://collector:4318; empty for none",
    )
    otlp_interval_s: float = _number(15, 0.1, 3600, "how often metrics are sent there")

    # All
    insecure: str = _text(
        "", "what may be without protection, comma-separated: gateway, api, nats, nats-credentials, cql, token-key"
    )
    log_level: str = _text("info", "how much is logged", choices=("debug", "info", "warning", "error"))
    log_format: str = _text("text", "a line of text for each event, or an object of JSON", choices=("text", "json"))
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


def listed(text: str) -> list[str]:
    """The values of a setting that has several, with commas between them."""
    return [value for part in text.split(",") if (value := part.strip())]


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
                found["nats_url"] = f"nats_url has the server {shown(server)!r}: it must be like nats://127.0.0.1:4222"
                break
    if not found.keys() & {"window", "window_max"} and values["window"] > values["window_max"]:
        found["window"] = (
            f"window is {values['window']}: it may not be above window_max, which is {values['window_max']}"
        )
    for certificate, key in (("tls_certificate", "tls_key"), ("nats_certificate", "nats_key")):
        if not found.keys() & {certificate, key} and bool(values[certificate]) != bool(values[key]):
            missing = key if values[certificate] else certificate
            found[missing] = f"{missing} is not set: {certificate} and {key} belong together, give both or neither"
    unknown = [] if "insecure" in found else sorted(set(listed(values["insecure"])) - set(INSECURE))
    if unknown:
        found["insecure"] = f"insecure has {unknown[0]!r}: it may have {', '.join(INSECURE)}, comma-separated"
    if "token_key" not in found:
        found.update(_secrets_problem(values["token_key"]))
    if not found.keys() & {"client_bytes_burst", "frame_max_bytes"}:
        burst, frame = values["client_bytes_burst"], values["frame_max_bytes"]
        if burst < frame:
            found["client_bytes_burst"] = (
                f"client_bytes_burst is {burst}: it may not be below frame_max_bytes, which is {frame}"
            )
    return found


def _secrets_problem(text: str) -> dict[str, str]:
    secrets = listed(text)
    if any("-----BEGIN" in secret for secret in secrets):
        return {"token_key": "token_key is a key in PEM: a public one belongs into a file, named by token_key_file"}
    if any(len(secret) < _LEAST_SECRET for secret in secrets):
        return {
            "token_key": f"token_key is too short: give at least {_LEAST_SECRET} characters, such as "
            "`openssl rand -hex 32`"
        }
    if len(secrets) > _MOST_SECRETS:
        return {
            "token_key": f"token_key has {len(secrets)} secrets: each token is tried with all, so at most "
            f"{_MOST_SECRETS} are allowed"
        }
    return {}


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
