"""Dead letters over HTTP: what was no notification, and what one was in the end."""

from __future__ import annotations

from base64 import b64decode

from support.api import api, refusal, service, user
from support.mesh import Mesh
from tidings.stream import consumers, letters
from tidings.stream.records import of_user
from tidings.wire.notification import build

READ, WRITE = "deadletters:read", "deadletters:write"
PATH = "/v1/deadletters"


async def bury(mesh: Mesh, body: bytes, user: str = "alice") -> int:
    """Make a dead letter as a gateway does; returns its id."""
    before = await letters.newest(mesh.connection)
    key, detail = f"key.{before}", "not acknowledged after 10 attempts"
    await consumers.bury(
        mesh.connection, "user", body, key=key, reason="undelivered", detail=detail, user=user, attempts=10
    )
    return before + 1


async def test_listed_and_looked_at(mesh: Mesh) -> None:
    """Letters come in pages, newest first or oldest first, by reason and user, with the original of each."""
    _, body = build(type="test.made", data={"n": 1}, id="one")
    ids = [await bury(mesh, body), await bury(mesh, b"\xff", "bob"), await bury(mesh, body)]
    async with api(mesh) as http:
        page = (await http.get(PATH, params={"limit": 2}, headers=service(READ))).json()
        assert [letter["id"] for letter in page["letters"]] == ids[:0:-1]
        rest = (await http.get(PATH, params={"before": page["next"]}, headers=service(READ))).json()
        assert ([letter["id"] for letter in rest["letters"]], rest["next"]) == (ids[:1], None)
        oldest = (await http.get(PATH, params={"after": 0, "user": "alice"}, headers=service(READ))).json()
        assert [letter["id"] for letter in oldest["letters"]] == [ids[0], ids[2]]
        assert (await http.get(PATH, params={"reason": "other"}, headers=service(READ))).json()["letters"] == []
        one = (await http.get(f"{PATH}/{ids[0]}", headers=service(READ))).json()
        assert one == rest["letters"][0]
        assert (one["user"], one["reason"], one["attempts"]) == ("alice", "undelivered", 10)
        assert one["notification"]["id"] == "one"
        assert (await http.get(f"{PATH}/{ids[1]}", headers=service(READ))).json()["base64"] == "/w=="


async def test_too_deep_to_be_written(mesh: Mesh) -> None:
    """A body that JSON libraries read and cannot write comes as its bytes, and hides no other letter."""
    deep = b'{"data":' + b"[" * 1000 + b"]" * 1000 + b"}"
    ids = [await bury(mesh, deep), await bury(mesh, b'{"n":1}')]
    async with api(mesh) as http:
        answer = await http.get(PATH, headers=service(READ))
        assert answer.status_code == 200, answer.text
        assert [letter["id"] for letter in answer.json()["letters"]] == ids[::-1]
        one = (await http.get(f"{PATH}/{ids[0]}", headers=service(READ))).json()
        assert b64decode(one["base64"]) == deep


async def test_replayed_and_dropped(mesh: Mesh) -> None:
    """A replay is in the log and the letter is gone; what would come back at once stays; a letter is dropped once."""
    _, body = build(type="test.made", id="one")
    good, bad = await bury(mesh, body), await bury(mesh, b"no event")
    async with api(mesh) as http:
        answer = await http.post(f"{PATH}/{good}/replay", headers=service(WRITE))
        assert answer.json() == {"stored": True, "duplicate": False}
        refusal(await http.post(f"{PATH}/{good}/replay", headers=service(WRITE)), 404, "no_such_letter")
        refusal(await http.post(f"{PATH}/{bad}/replay", headers=service(WRITE)), 409, "replay_refused")
        assert (await http.delete(f"{PATH}/{bad}", headers=service(WRITE))).status_code == 204
        refusal(await http.delete(f"{PATH}/{bad}", headers=service(WRITE)), 404, "no_such_letter")
        refusal(await http.get(f"{PATH}/{bad}", headers=service(READ)), 404, "no_such_letter")
    assert [entry["notification"]["id"] async for entry in of_user(mesh.connection, "alice")] == ["one"]


async def test_refused(mesh: Mesh) -> None:
    """Letters are for services with the scope, not for users; ids and bounds are numbers."""
    id_ = await bury(mesh, b"no event")
    async with api(mesh) as http:
        for headers in (user("alice"), service("inbox:read"), service(WRITE)):
            refusal(await http.get(PATH, headers=headers), 403, "not_allowed")
            refusal(await http.get(f"{PATH}/{id_}", headers=headers), 403, "not_allowed")
        for headers in (user("alice"), service(READ)):
            refusal(await http.post(f"{PATH}/{id_}/replay", headers=headers), 403, "not_allowed")
            refusal(await http.delete(f"{PATH}/{id_}", headers=headers), 403, "not_allowed")
        refusal(await http.get(f"{PATH}/one", headers=service(READ)), 400, "bad_parameter", parameter="id")
        for name in ("before", "after", "limit"):
            answer = await http.get(PATH, params={name: "-1"}, headers=service(READ))
            refusal(answer, 400, "bad_parameter", parameter=name)
        answer = await http.get(PATH, params={"before": 1, "after": 1}, headers=service(READ))
        refusal(answer, 400, "bad_parameter", parameter="after")
