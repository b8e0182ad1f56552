"""Rules of the architecture, each with its reason."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2] / "agents" / "tidings"
BELOW = {
    "wire": set(),
    "runtime": {"wire"},
    "telemetry": {"wire", "runtime"},
    "stream": {"wire", "runtime"},
    "schema": {"wire", "runtime"},
    "store": {"wire", "runtime", "telemetry"},
    # Tokens and who may do what: it knows HTTP, for keys and answers that live elsewhere.
    "identity": {"wire", "runtime"},
    "publish": {"wire", "runtime", "telemetry", "stream", "store", "schema"},
    "gateway": {"wire", "runtime", "telemetry", "stream", "store", "identity"},
    "inbox": {"wire", "runtime", "telemetry", "stream", "store", "schema"},
    # Its copies are published as any service's notifications are.
    "fanout": {"wire", "runtime", "telemetry", "stream", "store", "schema", "publish"},
    "api": {"wire", "runtime", "telemetry", "stream", "store", "schema", "identity", "publish"},
    "client": {"wire", "runtime"},
    "top": {"wire", "runtime", "telemetry"},
    "explain": {"wire", "runtime", "stream", "store"},
    "dev": {
        "wire",
        "runtime",
        "telemetry",
        "stream",
        "store",
        "schema",
        "identity",
        "publish",
        "gateway",
        "inbox",
        "fanout",
        "api",
    },
}
OWNERS = {
    "nats": "stream",
    "sqlite3": "store",
    "cassandra": "store",
    "jwt": "identity",
    "jsonschema_rs": "schema",
    "opentelemetry": "telemetry",
    "prometheus_client": "top",
    "rich": "top",
}
FORBIDDEN_IN_WIRE = {"asyncio", "socket", "time", "threading", "aiohttp", "nats", "sqlite3"}
MODULES = sorted(path for path in ROOT.rglob("*.py"))


def package_of(path: Path) -> str:
    parts = path.relative_to(ROOT).parts
    return parts[0] if len(parts) > 1 else ""


def imports(path: Path) -> Iterator[str]:
    """Dotted names that a module imports, relative ones made absolute."""
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            if node.level:
                here = ("tidings", *path.relative_to(ROOT).parts)[: -node.level]
                yield ".".join((*here, node.module or ""))
            elif node.module == "tidings":
                yield from (f"tidings.{alias.name}" for alias in node.names)
            else:
                yield node.module or ""


@pytest.mark.parametrize("path", MODULES, ids=lambda path: str(path.relative_to(ROOT)))
def test_imports_point_down(path: Path) -> None:
    """Layers know what is below them only, and agents never each other: they meet on the stream."""
    package = package_of(path)
    if package not in BELOW:
        return
    for name in imports(path):
        if name.startswith("tidings."):
            other = name.split(".")[1]
            assert other in BELOW[package] | {package, "__version__"}, (
                f"{package} imports {name}: allowed are {sorted(BELOW[package])}, so that each layer can be "
                "understood, tested and replaced without those above it"
            )


@pytest.mark.parametrize("path", MODULES, ids=lambda path: str(path.relative_to(ROOT)))
def test_one_package_knows_each_system(path: Path) -> None:
    """NATS and databases have one owner each, so that another version or database is one package's work."""
    for name in imports(path):
        owner = OWNERS.get(name.split(".")[0])
        assert owner is None or package_of(path) == owner, f"{path} imports {name}: only tidings.{owner} may"


def test_the_core_does_no_io() -> None:
    """wire takes bytes and returns values: it must be testable without a clock, a loop or a socket."""
    for path in (ROOT / "wire").glob("*.py"):
        used = {name.split(".")[0] for name in imports(path)} & FORBIDDEN_IN_WIRE
        assert not used, f"{path.name} imports {used}"


def test_nothing_is_swallowed() -> None:
    """No bare except, and no handler that does nothing: an error that is hidden is found at night."""
    for path in MODULES:
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.ExceptHandler):
                assert node.type is not None, f"{path}:{node.lineno}: bare except"
                broad = isinstance(node.type, ast.Name) and node.type.id in ("Exception", "BaseException")
                empty = all(isinstance(line, ast.Pass) for line in node.body)
                assert not (broad and empty), f"{path}:{node.lineno}: every error is swallowed here"


@pytest.mark.parametrize("agent", ["gateway", "inbox", "fanout", "api"])
def test_agents_say_what_a_crash_costs(agent: str) -> None:
    """Each agent's module opens with what it reads, writes, acknowledges and loses."""
    text = ast.get_docstring(ast.parse((ROOT / agent / "agent.py").read_text())) or ""
    for word in ("Reads:", "Writes:", "Acks when:", "Crash costs:"):
        assert word in text, f"{agent}/agent.py does not say {word!r}"
