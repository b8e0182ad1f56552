"""A notification that no store can keep is a dead letter, and the rest of its batch is stored."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from support.mesh import Mesh
from tidings.inbox.agent import InboxAgent
from tidings.store.port import InboxRow, Store
from tidings.wire.errors import RowsRefused


class Picky:
    """A store that refuses one id, and keeps all others before it says so, as the port demands."""

    def __init__(self, store: Store, refused: str) -> None:
        self._store = store
        self._refused = refused
        self.asked = 0

    def __getattr__(self, name: str) -> Any:
        return getattr(self._store, name)

    async def append(self, rows: Sequence[InboxRow]) -> None:
        self.asked += 1
        await self._store.append([row for row in rows if row.id != self._refused])
        reasons = {index: "it is too much" for index, row in enumerate(rows) if row.id == self._refused}
        if reasons:
            raise RowsRefused(reasons)


async def test_refused_row(mesh: Mesh) -> None:
    """Its dead letter says why, its message is terminated, and nothing waits for it."""
    sent = await mesh.publish("alice", 5)
    agent = InboxAgent(mesh.settings, Picky(mesh.store, sent[2]))  # type: ignore[arg-type]
    await agent.start()
    try:
        await mesh.stored("alice", sent[0], sent[1], sent[3], sent[4])
        while not (letters := await mesh.dead_letters()):
            pass
        (letter,) = letters
        assert letter["tidings-reason"] == "rows_refused"
        assert letter["tidings-detail"] == "it is too much"
        assert f'"id":"{sent[2]}"'.encode() in letter["body"]
        owed: list[int] = []

        async def settled() -> bool:
            infos = [
                await mesh.connection.api(f"CONSUMER.INFO.NOTIFY_{number}.inbox")
                for number in range(mesh.settings.partitions)
            ]
            owed[:] = [info["num_pending"] + info["num_ack_pending"] for info in infos]
            return not any(owed)

        while not await settled():
            pass
        later = await mesh.publish("alice", 1)
        await mesh.stored("alice", *later)
        assert len(await mesh.dead_letters()) == 1
    finally:
        await agent.stop()
