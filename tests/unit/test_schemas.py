"""Event schemas: what is checked, what is refused with its place, and which files are no schemas."""

from __future__ import annotations

import json
import socket
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from jsonschema_rs import Draft202012Validator

from tidings.runtime.settings import Settings
from tidings.schema import Schemas, reader
from tidings.wire.errors import BadSettings, InvalidNotification, SchemaViolation
from tidings.wire.notification import PRIORITIES, check

ROOT = Path(__file__).parents[2] / "schemas"
ENVELOPE = json.loads((ROOT / "envelope.json").read_text())
SHIPPED = Schemas.load()


def event(type: str = "social.like", **attributes: Any) -> bytes:
    whole = {"specversion": "1.0", "id": "one", "source": "test", "type": type, **attributes}
    return json.dumps(whole).encode()


def folder(path: Path, **schemas: Any) -> Path:
    """A folder of schema files; `__` in a name stands for a dot, and text is written as it is."""
    path.mkdir(exist_ok=True)
    for name, schema in schemas.items():
        text = schema if isinstance(schema, str) else json.dumps(schema)
        (path / f"{name.replace('__', '.')}.json").write_text(text)
    return path


def test_shipped_types() -> None:
    """Each has an id, a title, a description, and examples that are good notifications of its type."""
    types = SHIPPED.types()
    assert [found.name for found in types] == [
        "social.comment",
        "social.friend_request",
        "social.like",
        "social.mention",
        "social.post",
        "system.announcement",
    ]
    for found in types:
        schema = json.loads(Path(found.place).read_text())
        assert schema["$id"] == f"urn:tidings:schema:event:{found.name}"
        assert found.title
        assert found.description
        assert found.examples
        for example in found.examples:
            assert example["type"] == found.name
            assert SHIPPED.check(json.dumps(example).encode()).type == found.name


def test_what_the_readme_publishes() -> None:
    """The tour's commands keep working with the checks on."""
    for type in ("social.like", "social.post"):
        SHIPPED.check(event(type, data={"text": "hi"}))


@pytest.mark.parametrize(
    ("attributes", "pointer"),
    [
        ({}, ""),
        ({"data": "text"}, "/data"),
        ({"data": {"text": 5}}, "/data/text"),
        ({"data": {"text": "x" * 4001}}, "/data/text"),
        ({"data": {"text": "hi", "by": {}}}, "/data/by"),
        ({"data": {"text": "hi", "by": {"id": "bob", "picture": "javascript:alert(1)"}}}, "/data/by/picture"),
        ({"data": {"text": "hi", "on": {"type": "post", "id": "", "url": "http://x"}}}, "/data/on/id"),
    ],
)
def test_violations(attributes: dict[str, Any], pointer: str) -> None:
    """A violation names the place and the type, and never says what stood there."""
    with pytest.raises(SchemaViolation) as caught:
        SHIPPED.check(event(**attributes))
    assert caught.value.pointer == pointer
    assert caught.value.code == "schema_violation"
    assert "social.like" in str(caught.value)
    assert "javascript" not in str(caught.value)


def test_envelope_comes_first() -> None:
    """What is no notification at all is refused as that, whatever its type."""
    with pytest.raises(InvalidNotification) as caught:
        SHIPPED.check(b'{"type":"social.like"}')
    assert caught.value.code == "invalid_notification"


def test_unknown_types(tmp_path: Path) -> None:
    """A type without a schema passes or is refused, as the setting says; known ones are checked either way."""
    assert SHIPPED.check(event("order.sent")).type == "order.sent"
    strict = Schemas.load(unknown="refuse")
    with pytest.raises(SchemaViolation) as caught:
        strict.check(event("order.sent"))
    assert caught.value.pointer == "/type"
    own = Schemas.load(folder(tmp_path, order__sent={"properties": {"data": {"type": "string"}}}), unknown="refuse")
    own.check(event("order.sent", data="17"))
    with pytest.raises(SchemaViolation):
        own.check(event("order.sent", data=17))


def test_own_replaces_shipped(tmp_path: Path) -> None:
    """A file of the own folder counts instead of ours of the same type; the other types stay."""
    own = Schemas.load(folder(tmp_path, social__like={"properties": {"data": {"const": 1}}}))
    own.check(event(data=1))
    with pytest.raises(SchemaViolation):
        own.check(event(data={"text": "hi"}))
    with pytest.raises(SchemaViolation):
        own.check(event("social.comment", data=1))


def test_references(tmp_path: Path) -> None:
    """A schema may refer into itself and to the id of another file of the folder."""
    base = {"$id": "urn:shop:base", "$defs": {"number": {"type": "integer", "minimum": 1}}}
    sent = {"properties": {"data": {"$ref": "urn:shop:base#/$defs/number"}}}
    own = Schemas.load(folder(tmp_path, base=base, order__sent=sent))
    own.check(event("order.sent", data=17))
    with pytest.raises(SchemaViolation) as caught:
        own.check(event("order.sent", data=0))
    assert caught.value.pointer == "/data"


@pytest.mark.parametrize(
    ("schema", "says"),
    [
        ("{", "is not JSON"),
        ("[]", "must be a JSON object"),
        ({"type": "nonsense"}, "no JSON Schema 2020-12"),
        ({"properties": {"data": {"pattern": "(a"}}}, "/properties/data/pattern"),
        ({"properties": {"data": {"pattern": "(?=a)b"}}}, "/properties/data/pattern"),
        ({"properties": {"data": {"pattern": "[a-z]{1,1000}{1,1000}"}}}, "/properties/data/pattern"),
        ({"$ref": "#/$defs/missing"}, "/$defs/missing"),
        ({"$schema": "http://json-schema.org/draft-07/schema#"}, "draft-07"),
        ({"$id": 5}, "`$id`"),
        ({"properties": {"type": {"const": "order.lost"}}}, "order.lost.json"),
        (json.dumps({"description": "x" * 300_000}), "300"),
    ],
)
def test_no_schema(tmp_path: Path, schema: Any, says: str) -> None:
    """A file that is no schema is refused by name when it is loaded."""
    with pytest.raises(BadSettings) as caught:
        Schemas.load(folder(tmp_path, order__sent=schema))
    assert says in str(caught.value)


def test_nothing_is_fetched(tmp_path: Path) -> None:
    """A reference that leads out is refused, be it to a server that listens or to a file that is there."""
    outside = tmp_path / "outside.json"
    outside.write_text("{}")
    with socket.create_server(("127.0.0.1", 0)) as server:
        server.setblocking(False)
        port = server.getsockname()[1]
        for where in (f"http://127.0.0.1:{port}/a.json", f"https://127.0.0.1:{port}/a.json", outside.as_uri()):
            for schema in ({"$ref": where}, {"$schema": where}, {"$id": where, "$ref": "b.json"}):
                with pytest.raises(BadSettings):
                    Schemas.load(folder(tmp_path / "own", order__sent=schema))
        with pytest.raises(BlockingIOError):
            server.accept()


def test_two_of_one_id(tmp_path: Path) -> None:
    """Two files of one `$id` are refused, both by name: a reference to it would mean either."""
    with pytest.raises(BadSettings) as caught:
        Schemas.load(folder(tmp_path, order__sent={"$id": "urn:shop:order"}, order__lost={"$id": "urn:shop:order"}))
    assert "order.sent.json" in str(caught.value)
    assert "order.lost.json" in str(caught.value)


def test_no_folder(tmp_path: Path) -> None:
    """A folder that is not there is a sentence that names the setting."""
    with pytest.raises(BadSettings, match="schema_dir"):
        Schemas.load(tmp_path / "missing")


NEST = {
    "anyOf": [{"type": "array", "items": {"$ref": "#/$defs/nest"}}, {"items": {"$ref": "#/$defs/nest"}, "const": 1}]
}


@pytest.mark.parametrize(
    ("schema", "data"),
    [
        pytest.param({"pattern": "^(a+)+$"}, json.dumps("a" * 16_000 + "b"), id="pattern"),
        pytest.param({"$ref": "#/$defs/nest"}, "[" * 249 + "]" * 249, id="recursion that fits"),
        pytest.param({"$ref": "#/$defs/nest"}, "[" * 249 + "5" + "]" * 249, id="recursion that does not"),
        pytest.param({"uniqueItems": True}, json.dumps([*([n] for n in range(1800)), [0]]), id="unique"),
    ],
)
def test_bombs(tmp_path: Path, schema: dict[str, Any], data: str) -> None:
    """What doubles with each character or level never comes back here: a full body is judged all the same."""
    whole = {"properties": {"data": schema}, "$defs": {"nest": NEST}}
    own = Schemas.load(folder(tmp_path, order__sent=whole))
    body = event("order.sent", data=None).replace(b"null", data.encode())
    fits = "5" not in data and "b" not in data and "1799" not in data
    assert _refuses(own.check, body) != fits


def test_recursive_schemas_are_not_located(tmp_path: Path) -> None:
    """Where finding the place may take for ever, only the type is named; what merely shares a definition is located."""
    node = {"type": "object", "additionalProperties": {"$ref": "#/$defs/node"}}
    tree = {"properties": {"data": {"$ref": "#/$defs/node"}}, "$defs": {"node": node}}
    shared = {
        "properties": {"a": {"$ref": "#/$defs/n"}, "data": {"$ref": "#/$defs/n"}},
        "$defs": {"n": {"type": "null"}},
    }
    anchor = {"properties": {"data": {"$ref": "#n"}}, "$defs": {"n": {"$anchor": "n", "type": "null"}}}
    own = Schemas.load(folder(tmp_path, a__tree=tree, a__shared=shared, a__anchor=anchor))
    for type, pointer in (("a.tree", ""), ("a.shared", "/data"), ("a.anchor", "")):
        with pytest.raises(SchemaViolation) as caught:
            own.check(event(type, data=5))
        assert caught.value.pointer == pointer


def doubling(kind: str, levels: int) -> dict[str, Any]:
    """A schema in which each definition refers to the one before by both of its alternatives."""
    definitions: dict[str, Any] = {"d0": {"type": "integer"}}
    for level in range(levels):
        definitions[f"d{level + 1}"] = {kind: [{"$ref": f"#/$defs/d{level}"}] * 2}
    return {"properties": {"data": {"$ref": f"#/$defs/d{levels}"}}, "$defs": definitions}


@pytest.mark.parametrize("kind", ["allOf", "anyOf", "oneOf"])
def test_many_ways_are_not_located(tmp_path: Path, kind: str) -> None:
    """On a few hundred ways through a schema the place is looked for; on the millions of 24 levels it is not."""
    own = Schemas.load(folder(tmp_path, a__few=doubling(kind, 7), a__many=doubling(kind, 24)))
    for type, pointer in (("a.few", "/data"), ("a.many", "")):
        with pytest.raises(SchemaViolation) as caught:
            own.check(event(type, data="x"))
        assert caught.value.pointer == pointer


def test_long_chains_of_references(tmp_path: Path) -> None:
    """What refers to what refers, 1,500 times, is refused when it is read; 200 times is fine."""

    def chain(links: int) -> dict[str, Any]:
        definitions = {f"d{link}": {"$ref": f"#/$defs/d{link + 1}"} for link in range(links)}
        return {
            "properties": {"data": {"$ref": "#/$defs/d0"}},
            "$defs": {**definitions, f"d{links}": {"type": "integer"}},
        }

    good = Schemas.load(folder(tmp_path / "good", a__chain=chain(200)))
    with pytest.raises(SchemaViolation) as caught:
        good.check(event("a.chain", data="x"))
    assert caught.value.pointer == "/data"
    with pytest.raises(BadSettings, match=r"a\.chain\.json: more than 250 references"):
        Schemas.load(folder(tmp_path / "bad", a__chain=chain(1500)))


def test_reader() -> None:
    """`schema_check` says what is held against the schemas; of what is sampled, the id decides."""
    bad = event(data=5)
    assert reader(Settings(schema_check="off"))(bad).id == "one"
    with pytest.raises(SchemaViolation):
        reader(Settings(schema_check="always"))(bad)
    assert reader(Settings(schema_check="sampled", schema_sample=0))(bad).id == "one"
    with pytest.raises(SchemaViolation):
        reader(Settings(schema_check="sampled", schema_sample=1))(bad)
    first, second = (reader(Settings(schema_check="sampled", schema_sample=0.3)) for _ in range(2))
    refused = [id for id in map(str, range(1000)) if _refuses(first, event(id=id, data=5))]
    assert 200 < len(refused) < 400
    assert refused == [id for id in map(str, range(1000)) if _refuses(second, event(id=id, data=5))]


def _refuses(read: Callable[[bytes], object], body: bytes) -> bool:
    try:
        read(body)
    except SchemaViolation:
        return True
    return False


GOOD = [
    {"data": {"text": "hi"}},
    {"time": "2026-01-31T12:00:00Z", "expires": "2026-01-31T12:00:00.5+01:00"},
    *({"priority": priority} for priority in PRIORITIES),
    {"topic": "post.42", "collapsekey": "a", "traceparent": "b", "subject": "c", "dataschema": "d"},
    {"other": "x", "n1": 5, "flag": True, "nothing": None, "data_base64": "eA=="},
]
BAD = [
    {"specversion": "0.3"},
    {"id": ""},
    {"id": 5},
    {"source": "x" * 257},
    {"type": None},
    {"time": "2026-01-31T12:00:00"},
    {"time": "yesterday"},
    {"priority": "huge"},
    {"topic": ""},
    {"subject": 5},
    {"data_base64": 5},
    {"With-Capitals": "x"},
    {"other": {"an": "object"}},
    {"other": 1.5},
]


@pytest.mark.parametrize("attributes", [*GOOD, *BAD], ids=str)
def test_the_envelope_schema_is_the_code(attributes: dict[str, Any]) -> None:
    """`schemas/envelope.json` and `wire/notification.py` agree about what a notification is."""
    body = event(**attributes) if "type" not in attributes else event(attributes["type"])
    schema = Draft202012Validator(ENVELOPE, offline=True, validate_formats=True)
    try:
        check(body)
        agreed = attributes in GOOD
    except InvalidNotification:
        agreed = attributes in BAD
    assert agreed
    assert schema.is_valid(json.loads(body)) == (attributes in GOOD)


def test_the_envelope_schema_has_good_examples() -> None:
    """Its examples are notifications."""
    for example in ENVELOPE["examples"]:
        check(json.dumps(example).encode())
