"""`tidings user export|erase`: everything kept of one user, and of nobody else."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from support.command import Command, answer
from support.cql import empty_store
from support.mesh import Mesh, running_mesh

USERS = ("alice", "anna.von@example.org with blanks", "zoë > *")


async def user(mesh: Mesh, action: str, name: str) -> Command:
    return await answer(
        "user",
        action,
        "--user",
        name,
        TIDINGS_NATS_URL=mesh.settings.nats_url,
        TIDINGS_STORE_URL=mesh.settings.store_url,
    )


async def exported(mesh: Mesh, name: str) -> dict[str, list[dict[str, Any]]]:
    """What the command prints, by kind."""
    ran = await user(mesh, "export", name)
    assert ran.process.returncode == 0, ran.lines
    found: dict[str, list[dict[str, Any]]] = {}
    for line in ran.out:
        entry = json.loads(line)
        found.setdefault(entry["kind"], []).append(entry)
    return found


async def is_erased_alone(mesh: Mesh, name: str) -> None:
    """Export, erase and go on, beside another user to whom nothing happens."""
    gateway, _ = await mesh.gateway(linger_s=0), await mesh.inbox()
    phone = await mesh.online(gateway, name)
    sent = await mesh.publish(name, 3)
    others = await mesh.publish("somebody", 2)
    await phone.expect(*sent)
    await mesh.stored(name, *sent)
    await mesh.stored("somebody", *others)
    assert (await phone.ask("mark", **{"as": "read", "pos": [phone.items[0]["pos"]]}))["t"] == "ok"
    await phone.leave()
    before = await exported(mesh, name)
    assert [entry["notification"]["id"] for entry in before["notification"]] == sent
    assert [entry["read"] for entry in before["notification"]] == [True, False, False]
    assert [entry["notification"]["id"] for entry in before["logged"]] == sent
    assert all(entry["until"] > entry["stored"][:19] for entry in before["logged"])
    assert [entry["device"] for entry in before["cursor"]] == ["phone"]
    ran = await user(mesh, "erase", name)
    assert ran.process.returncode == 0, ran.lines
    assert any("inbox: 3 notifications deleted" in line for line in ran.out)
    assert any("log: 3 notifications deleted" in line for line in ran.out)
    assert await exported(mesh, name) == {}
    assert [entry["notification"]["id"] for entry in (await exported(mesh, "somebody"))["notification"]] == others
    assert (await phone.connect())["unread"] == 0
    again = await mesh.publish(name, 1)
    await phone.expect(*again)
    await mesh.stored(name, *again)
    assert [entry["notification"]["id"] for entry in (await exported(mesh, name))["notification"]] == again


@pytest.mark.parametrize("name", USERS)
async def test_export_and_erase(mesh: Mesh, name: str) -> None:
    """All is shown, all is deleted, and what comes afterwards is kept as ever."""
    await is_erased_alone(mesh, name)


async def test_export_and_erase_on_cql(tmp_path: Path, cql_url: str) -> None:
    """The same where the inbox is on a CQL server."""
    async with empty_store(cql_url):
        pass
    async with running_mesh(tmp_path, store_url=cql_url) as mesh:
        await is_erased_alone(mesh, "alice")


async def test_what_is_on_its_way_stays_away(mesh: Mesh) -> None:
    """An inbox agent that comes later, with what it had taken from the log before, brings nothing back."""
    stuck = await mesh.stuck_inbox()
    sent = await mesh.publish("alice", 3)
    await mesh.stored("alice", *sent)
    ran = await user(mesh, "erase", "alice")
    assert ran.process.returncode == 0, ran.lines
    await stuck.kill_agent()
    await mesh.inbox()
    later = await mesh.publish("alice", 1)
    await mesh.stored("alice", *later)
    assert [entry["notification"]["id"] for entry in (await exported(mesh, "alice"))["notification"]] == later


async def test_dead_letters_are_erased(mesh: Mesh) -> None:
    """The user's dead letters go, those of others stay."""
    await mesh.inbox()
    for name in ("alice", "bob"):
        await mesh.connection.jetstream().publish(f"notify.user.{name}", b"no event")
    while len(await mesh.dead_letters()) < 2:
        pass
    ran = await user(mesh, "erase", "alice")
    assert any("dead letters: 1" in line for line in ran.out), ran.lines
    assert (await user(mesh, "erase", "alice")).out[1].endswith("dead letters: 0")


async def test_dead_letters_of_a_gateway(mesh: Mesh) -> None:
    """What no device of the user acknowledged is shown, and erased with the rest; another user's stays."""
    name, other = USERS[1], "bob"
    gateway, _ = await mesh.gateway(max_deliver=1, ack_wait_s=0.5), await mesh.inbox()
    for user_ in (name, other):
        await mesh.online(gateway, user_, auto_ack=False)
    sent = {user_: (await mesh.publish(user_))[0] for user_ in (name, other)}
    while len(await mesh.dead_letters()) < 2:
        pass
    for user_, id in sent.items():
        (letter,) = (await exported(mesh, user_))["dead"]
        assert letter["notification"]["id"] == id
        assert (letter["headers"]["Tidings-Reason"], letter["headers"]["Tidings-Device"]) == ("undelivered", "phone")
    ran = await user(mesh, "erase", name)
    assert any("dead letters: 1" in line for line in ran.out), ran.lines
    assert "dead" not in await exported(mesh, name)
    assert len((await exported(mesh, other))["dead"]) == 1


async def test_unknown_user(mesh: Mesh) -> None:
    """Of whom nothing is kept nothing is shown, and erasing that is no error."""
    assert await exported(mesh, "nobody") == {}
    assert (await user(mesh, "erase", "nobody")).process.returncode == 0


async def test_nothing_answers(mesh: Mesh, tmp_path: Path) -> None:
    """Without NATS, without the store, or without a running mesh: a sentence, and nothing is deleted."""
    store = mesh.settings.store_url
    ran = await answer(
        "user", "erase", "--user", "a", TIDINGS_NATS_URL="nats://127.0.0.1:1", TIDINGS_STORE_URL=store, cwd=tmp_path
    )
    assert ran.process.returncode == 1
    assert "nats://127.0.0.1:1" in ran.sentence()
    there = mesh.settings.nats_url
    ran = await answer(
        "user", "erase", "--user", "a", TIDINGS_NATS_URL=there, TIDINGS_STORE_URL="cql://127.0.0.1:1/k", cwd=tmp_path
    )
    assert ran.process.returncode == 1
    assert "cql://127.0.0.1:1/k" in ran.sentence()
    ran = await answer("user", "export", "--user", "a", "--state", tmp_path / "none", cwd=tmp_path)
    assert ran.process.returncode == 1
    assert "tidings dev" in ran.sentence()
