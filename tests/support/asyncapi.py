"""`schemas/asyncapi.yaml`, and whether a message is what it says.

`asyncapi-3.0.0.json` is the JSON Schema of AsyncAPI 3.0.0 from github.com/asyncapi/spec-json-schemas (Apache-2.0),
without its descriptions and examples.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import yaml
from jsonschema_rs import Draft7Validator, Draft202012, Draft202012Validator, Registry

__all__ = ["CLIENT", "DOCUMENT", "SERVER", "SUBJECTS", "accepts", "kind", "problems"]

_FOLDER = Path(__file__).parents[2] / "schemas"
_BASE = "file:///schemas/"
DOCUMENT: dict[str, Any] = yaml.safe_load((_FOLDER / "asyncapi.yaml").read_text())


def _files() -> list[tuple[str, Any]]:
    files = [(path, json.loads(path.read_text())) for path in _FOLDER.rglob("*.json")]
    # Under their addresses here, not their own names.
    return [
        (_BASE + path.relative_to(_FOLDER).as_posix(), {name: value for name, value in schema.items() if name != "$id"})
        for path, schema in files
    ]


_REGISTRY = Registry([(f"{_BASE}asyncapi.yaml", DOCUMENT), *_files()], draft=Draft202012)
_VALIDATORS = {
    name: Draft202012Validator(
        {"$ref": f"{_BASE}asyncapi.yaml#/components/messages/{name}/payload"},
        registry=_REGISTRY,
        offline=True,
        validate_formats=True,
    )
    for name in DOCUMENT["components"]["messages"]
}


def _of_socket(action: str) -> list[str]:
    found: list[str] = []
    for operation in DOCUMENT["operations"].values():
        if operation["channel"]["$ref"] != "#/channels/socket":
            continue
        if operation["action"] == action:
            found += _names(operation["messages"])
        if action == "send":
            found += _names(operation.get("reply", {}).get("messages", []))
    return list(dict.fromkeys(found))


def _names(references: list[dict[str, str]]) -> list[str]:
    return [reference["$ref"].rpartition("/")[2] for reference in references]


CLIENT = _of_socket("receive")
"""Messages that a client sends over the WebSocket."""
SERVER = _of_socket("send")
"""Messages that a gateway sends."""
SUBJECTS = {name: channel["address"] for name, channel in DOCUMENT["channels"].items() if name != "socket"}


def kind(message: str) -> str:
    """The `t` of a message of the WebSocket."""
    return str(DOCUMENT["components"]["messages"][message]["payload"]["properties"]["t"]["const"])


def accepts(payload: Any, *messages: str) -> list[str]:
    """Which of these messages it may be."""
    return [name for name in messages if _VALIDATORS[name].is_valid(payload)]


def problems() -> list[str]:
    """Why the document is no AsyncAPI 3.0.0."""
    schema = json.loads(Path(__file__).with_name("asyncapi-3.0.0.json").read_text())
    return [
        f"{error.instance_path}: {error.message}"
        for error in Draft7Validator(schema, offline=True).iter_errors(DOCUMENT)
    ]
