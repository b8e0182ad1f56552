"""`tidings dev` and `tidings topology` with the inbox on a real CQL server."""

from __future__ import annotations

import secrets
from pathlib import Path

from support.command import answer
from support.cql import query
from support.dev import dev, in_inbox, refusal
from support.mesh import Mesh
from tidings.store.cql import parse_url


def _new_keyspace(cql_url: str) -> str:
    return f"{cql_url.rpartition('/')[0]}/made_{secrets.token_hex(4)}"


async def test_dev_on_cql(tmp_path: Path, cql_url: str) -> None:
    """The keyspace is made, everything works on it, and a second start finds it all again."""
    url = _new_keyspace(cql_url)
    async with dev(tmp_path / "state", "--store", url) as mesh, mesh.device("alice") as phone:
        await mesh.publish("alice", "one")
        await phone.expect("one")
        await in_inbox(phone, "one")
        assert (await phone.ask("mark", **{"as": "read", "pos": "all"}))["t"] == "ok"
        assert (await phone.ask("count"))["unread"] == 0
    async with dev(tmp_path / "state", "--store", url) as mesh, mesh.device("alice") as phone:
        await in_inbox(phone, "one")
        await mesh.publish("alice", "two")
        await in_inbox(phone, "two", "one")
        assert (await phone.ask("count"))["unread"] == 1


async def test_no_server_there(tmp_path: Path) -> None:
    """A sentence that names the address."""
    said = await refusal(tmp_path / "state", "--store", "cql://127.0.0.1:1/tidings")
    assert "cql://127.0.0.1:1/tidings" in said


async def test_topology_makes_the_schema(mesh: Mesh, cql_url: str) -> None:
    """`plan` names what `apply` does, which does it once; SimpleStrategy is for development."""
    url = _new_keyspace(cql_url)

    async def topology(action: str, replication: str) -> list[str]:
        ran = await answer(
            "topology",
            action,
            TIDINGS_NATS_URL=mesh.settings.nats_url,
            TIDINGS_STORE_URL=url,
            TIDINGS_CQL_REPLICATION=replication,
            TIDINGS_PARTITIONS=str(mesh.settings.partitions),
            TIDINGS_REPLICAS="1",
        )
        return ran.out if ran.process.returncode == 0 else [ran.sentence()]

    for action in ("plan", "apply"):
        (said,) = await topology(action, "")
        assert "cql_replication is not set" in said
        (said,) = await topology(action, "simple:1")
        assert "development" in said
    assert any("0001_inbox.cql" in line for line in await topology("plan", "datacenter1:1"))
    assert any("0001_inbox.cql" in line for line in await topology("apply", "datacenter1:1"))
    assert (await topology("apply", "datacenter1:1"))[-1] == "nothing to do"
    where = parse_url(url)
    found = await query(
        where, "SELECT replication FROM system_schema.keyspaces WHERE keyspace_name = %s", where.keyspace
    )
    assert "NetworkTopologyStrategy" in str(found[0][0])
