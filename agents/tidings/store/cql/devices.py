"""Devices: who has one, and what it has acknowledged; `store` says how that is kept."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Sequence
from typing import Final

from cassandra.query import PreparedStatement

from tidings.store.port import ANONYMOUS, DEVICES_CAP, Claimed, Cursor, CursorUpdate, DeviceCursor, Holder, Lost
from tidings.wire.position import Position

from .database import Database
from .encoding import Clock, DeviceState
from .express import Write, int4, int8

__all__ = ["Devices"]

_READ_BACK: Final = 50
"""Users of one read: each is a partition that the node asked has to fetch."""


def _worth(one: tuple[str, DeviceState]) -> tuple[bool, bool, Position]:
    """Which devices are kept before others: the greater."""
    device, state = one
    return state.holder is not None, not device.startswith(ANONYMOUS), state.cursor.floor


class _Held:
    """A device that this process claimed: the timestamp of its last write, and its floor."""

    __slots__ = ("floor", "holder", "written_us")

    def __init__(self, holder: Holder, written_us: int, floor: Position) -> None:
        self.holder = holder
        self.written_us = written_us
        self.floor = floor


class Devices:
    """The cursor half of the store. Remembers 0.3 KB for each device that it claimed and did not release."""

    def __init__(self, database: Database, sql: dict[str, PreparedStatement], clock: Clock, ttl_s: int) -> None:
        self._database = database
        self._sql = sql
        self._clock = clock
        self._ttl_s = ttl_s
        self._held: dict[tuple[str, str], _Held] = {}
        self._claiming: dict[tuple[str, str], asyncio.Lock] = {}

    async def claim(self, user: str, device: str, holder: Holder, floor: Position) -> Claimed:
        # Among processes the timestamps decide; within one, claims come one after the other.
        lock = self._claiming.setdefault((user, device), asyncio.Lock())
        try:
            async with lock:
                return await self._claim(user, device, holder, floor)
        finally:
            if not lock.locked() and self._claiming.get((user, device)) is lock:
                del self._claiming[user, device]

    async def _claim(self, user: str, device: str, holder: Holder, floor: Position) -> Claimed:
        before = await self._state(user, device)
        cursor = Cursor(floor) if before is None else before.cursor
        # Above all that the holder until now has written: a clock that is behind claims as well as any.
        at = max(self._clock.now(), 0 if before is None else before.written_us + 1)
        await self._write(user, device, DeviceState(cursor, holder, at))
        after = await self._state(user, device)
        self._held[user, device] = _Held(holder, at, cursor.floor)
        if before is None:
            await self._forget_some(user, device)
        lost = after is None or after.holder != holder
        return Claimed(cursor, before is None, None if before is None else before.holder, lost)

    async def _forget_some(self, user: str, new: str) -> None:
        """Keep the user's devices within `DEVICES_CAP`. Who has written one meanwhile keeps it, by the timestamp."""
        others = [(device, state) async for _, device, state in self._states([user]) if device != new]
        if len(others) < DEVICES_CAP:
            return
        others.sort(key=_worth, reverse=True)
        for device, state in others[DEVICES_CAP - 1 :]:
            await self._database.write(self._sql["forget_cursor"].bind((state.written_us, user, device)))

    async def _state(self, user: str, device: str) -> DeviceState | None:
        found = await self._database.read(self._sql["cursor"], user, device)
        return DeviceState.load(found[0][0]) if found and found[0][0] is not None else None

    async def _write(self, user: str, device: str, state: DeviceState) -> None:
        statement = self._sql["save"].bind((self._ttl_s, state.written_us, state.dump(), user, device))
        await self._database.write(statement)

    async def save(self, updates: Sequence[CursorUpdate]) -> list[Lost]:
        writes = []
        written: dict[tuple[str, str, Holder], bool] = {}
        for update in updates:
            held = self._held.get((update.user, update.device))
            is_ours = held is not None and held.holder == update.holder
            written[update.user, update.device, update.holder] = is_ours
            if held is not None and is_ours:
                state, partition = self._next(held, update), update.user.encode()
                values = int4(self._ttl_s), int8(state.written_us), state.dump(), partition, update.device.encode()
                writes.append(Write(self._sql["save"], values, partition))
        await self._database.write_all(writes)
        now_held = await self._holders_of(sorted({update.user for update in updates}))
        lost: list[Lost] = []
        for update in updates:
            key, holder = (update.user, update.device), update.holder
            now = now_held.get(key)
            wanted = None if update.release else holder
            has_lost = not written[*key, holder] or key not in now_held or now != wanted
            if has_lost:
                lost.append(Lost(holder, now))
            held = self._held.get(key)
            if held is not None and held.holder == holder and (has_lost or update.release):
                del self._held[key]
        return lost

    def _next(self, held: _Held, update: CursorUpdate) -> DeviceState:
        """The state to write, one microsecond above the last one."""
        held.written_us += 1
        cursor = update.cursor
        if cursor.floor < held.floor:
            acked = frozenset(position for position in cursor.acked if position > held.floor)
            attempts = {position: count for position, count in cursor.attempts.items() if position > held.floor}
            cursor = Cursor(held.floor, acked, attempts, cursor.broadcast)
        held.floor = cursor.floor
        return DeviceState(cursor, None if update.release else update.holder, held.written_us)

    async def _states(self, users: Sequence[str]) -> AsyncIterator[tuple[str, str, DeviceState]]:
        for at in range(0, len(users), _READ_BACK):
            for user, device, state in await self._database.read(self._sql["cursors"], users[at : at + _READ_BACK]):
                if state is not None:
                    yield user, device, DeviceState.load(state)

    async def _holders_of(self, users: Sequence[str]) -> dict[tuple[str, str], Holder | None]:
        return {(user, device): state.holder async for user, device, state in self._states(users)}

    async def holders(self, user: str) -> list[Holder]:
        found = await self._holders_of([user])
        return [holder for holder in found.values() if holder is not None]

    async def devices(self, user: str) -> list[DeviceCursor]:
        return [DeviceCursor(device, state.cursor, state.holder) async for _, device, state in self._states([user])]

    async def erase(self, user: str) -> None:
        """Sessions of these devices lose them with their next write."""
        await self._database.write(self._sql["erase_cursors"].bind((self._clock.now(), user)))
