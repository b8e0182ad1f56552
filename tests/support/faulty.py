"""A store that can be told to be down: it refuses as an adapter does whose database does not answer."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from tidings.store.port import Store
from tidings.wire.errors import StoreUnavailable


class FaultyStore:
    """Passes every call on to a real store, unless `down`; `hold` may delay one by name."""

    def __init__(self, store: Store) -> None:
        self._store = store
        self.down = False
        self.before: Callable[[str], Any] | None = None
        """Awaited with the method's name before each call, to stop a coroutine exactly there."""

    def __getattr__(self, name: str) -> Any:
        method = getattr(self._store, name)

        async def call(*arguments: Any, **options: Any) -> Any:
            if self.before is not None:
                await self.before(name)
            if self.down:
                raise StoreUnavailable("the store is down, as the test wants it")
            return await method(*arguments, **options)

        return call
