"""Appending rows, all at once, and the listing of the partitions that they lie in."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from itertools import islice
from struct import error as StructError
from typing import Final, TypeVar

from .database import Database, StatementRefused
from .encoding import Clock
from .express import Write

__all__ = ["Listed", "write_rows"]

Row = TypeVar("Row")

_AGAIN_US: Final = 600_000_000
"""A table that was restored from a backup, or truncated, has forgotten it."""
_MOST: Final = 50_000
"""About a hundred bytes each."""


class Listed:
    """The partitions that this process has listed, by a key of theirs: most rows go to one of them."""

    def __init__(self, clock: Clock) -> None:
        self._clock = clock
        self._at: dict[bytes, int] = {}

    def __contains__(self, key: bytes) -> bool:
        return self._at.get(key, 0) > self._clock.now() - _AGAIN_US

    def remember(self, keys: Iterable[bytes]) -> None:
        """These are listed, durably; the oldest of too many are forgotten, and listed again."""
        self._at.update(dict.fromkeys(keys, self._clock.now()))
        for key in list(islice(self._at, max(0, len(self._at) - _MOST))):
            del self._at[key]


async def write_rows(
    database: Database, rows: Sequence[Row], writes_of: Callable[[Row], Sequence[Write]]
) -> dict[int, str]:
    """Write all but the rows that can never be stored; returns why not, by index."""
    refused: dict[int, str] = {}
    writes: list[Write] = []
    owners: list[int] = []
    for index, row in enumerate(rows):
        try:
            made = writes_of(row)
        except (UnicodeEncodeError, OverflowError, StructError) as error:
            refused[index] = f"its values cannot be written: {error}"
            continue
        writes += made
        owners += [index] * len(made)
    try:
        await database.write_all(writes)
    except StatementRefused as error:
        if not error.too_large:
            # A missing table or grant is nothing that a row could help.
            raise
        # One of them, or more: each by itself.
        for index, write in zip(owners, writes, strict=True):
            try:
                await database.write_all([write])
            except StatementRefused as error:
                if not error.too_large:
                    raise
                refused[index] = f"the store refuses it: {error}"
    return refused
