"""The ledger: what was accepted against what arrived and what is stored. At-least-once, counted."""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Iterable

import orjson

from tidings.store.port import PageQuery, Store


class Ledger:
    """Fed with every accepted id; at the end each device and the inbox must have all of their user's."""

    def __init__(self) -> None:
        self.accepted: dict[str, list[str]] = defaultdict(list)

    def accept(self, user: str, id: str) -> None:
        """The mesh confirmed this notification."""
        self.accepted[user].append(id)

    def check_device(self, user: str, name: str, received: Iterable[str], *, most_copies: int | None = None) -> None:
        """Everything accepted for the user arrived at the device; nothing that was not accepted did."""
        counts = Counter(received)
        missing = [id for id in self.accepted[user] if id not in counts]
        assert not missing, f"{user} on {name} lost {len(missing)} of {len(self.accepted[user])}: {missing[:5]}"
        if most_copies is not None:
            often = {id: count for id, count in counts.items() if count > most_copies}
            assert not often, f"{user} on {name} got copies: {dict(list(often.items())[:5])}"

    async def check_store(self, store: Store) -> None:
        """Every accepted notification is in the inbox of its user, once."""
        for user, accepted in self.accepted.items():
            stored = Counter(await stored_ids(store, user))
            missing = [id for id in accepted if id not in stored]
            assert not missing, f"the inbox of {user} lacks {len(missing)} of {len(accepted)}: {missing[:5]}"
            assert set(stored.values()) <= {1}, f"the inbox of {user} has copies: {stored.most_common(3)}"


async def stored_ids(store: Store, user: str) -> list[str]:
    """All ids in a user's inbox, newest first."""

    ids: list[str] = []
    before = None
    while True:
        page = await store.page(user, PageQuery(limit=200, before=before))
        ids.extend(orjson.loads(item.body)["id"] for item in page.items)
        if page.next is None:
            return ids
        before = page.next
