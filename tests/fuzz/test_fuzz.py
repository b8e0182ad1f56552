"""Hostile frames and bodies against real agents: nothing crashes, leaks or grows, and nothing accepted is lost.

``TIDINGS_TEST_FUZZ_CASES`` says how many (`make fuzz`: 100,000), ``TIDINGS_TEST_FUZZ_SEED`` repeats a run.
"""

from __future__ import annotations

import asyncio
import os
import secrets
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from random import Random
from typing import Any, Final, NamedTuple

from fuzz import hostile
from support.clock import PATIENCE_S
from support.ledger import stored_ids
from support.mesh import KEY, PARTITIONS, Agent, Mesh, running_mesh
from support.rawclient import RawClient, frame
from tidings.identity import issue
from tidings.stream.connection import Connection, connect
from tidings.stream.topology import BROADCAST_PART, notify_stream
from tidings.wire import codes, frames, subject
from tidings.wire.errors import BadFrame, TidingsError
from tidings.wire.notification import check
from tidings.wire.position import Position

CASES: Final = int(os.environ.get("TIDINGS_TEST_FUZZ_CASES", "6000"))
SEED: Final = os.environ.get("TIDINGS_TEST_FUZZ_SEED") or secrets.token_hex(4)
SLICE: Final = 3000
"""Cases between two looks at the agents."""
AT_ONCE: Final = 16
FRAMES_OF_ONE: Final = 40
GROWTH_BYTES: Final = 64 * 2**20
"""An agent may be that much larger at the end than after the first slice."""

KNOWN_ERRORS: Final = {error.code for error in codes.ERRORS} | {close.name for close in codes.CLOSES}
KNOWN_CLOSES: Final = {None, *(close.code for close in codes.CLOSES)}
PROBE: Final = frame('{"t":"count","ref":"probe"}')


class Sent(NamedTuple):
    """A message for the log, and what it was to become."""

    where: bytes
    body: bytes
    user: str | None
    """Whose inbox is to have it if it is valid; None for nobody's."""


class Attack:
    """One run of a mesh under fire."""

    def __init__(self, mesh: Mesh, gateway: Agent, agents: dict[str, Agent], publisher: Connection) -> None:
        self.mesh = mesh
        self.gateway = gateway
        self.agents = agents
        self.publisher = publisher
        self.draw = Random(SEED)
        self.cases = 0
        self.connections = 0
        self.dead: set[bytes] = set()
        """Bodies of all dead letters so far."""
        self._dead_read = 0
        self._number = 0
        self._answers: dict[bytes, asyncio.Future[bytes]] = {}
        self.base: dict[str, int] = {}
        self.files = 0

    # Frames

    async def clients(self, cases: int) -> None:
        """Connections, some at a time, until so many frames were sent."""
        end = self.cases + cases

        async def attack() -> None:
            while self.cases < end:
                await self._one()

        async with asyncio.TaskGroup() as group:
            for _ in range(AT_ONCE):
                group.create_task(attack())

    async def _one(self) -> None:
        draw = Random(self.draw.getrandbits(64))
        self.connections += 1
        token = issue(KEY, f"fuzz-{self.connections % 64}")
        kind = draw.random()
        async with RawClient(self.gateway.port) as client:
            if kind < 0.08:
                self.cases += 1
                client.send(hostile.handshakes(draw) + b"\r\n\r\n")
                await client.answered()
                return
            if kind < 0.25:
                self.cases += 1
                text = hostile.broken(draw, hostile.hellos(draw, token))
                await client.upgrade()
                client.send(frame(text) + PROBE)
                await self._probed(client)
                self._look_at(client, text)
                return
            welcome = await client.hello(token, device=f"d{self.connections}")
            assert welcome["t"] == "welcome", welcome
            if kind < 0.5:
                sent = [hostile.raw_frames(draw) for _ in range(draw.randrange(1, 4))]
                self.cases += len(sent)
                client.send(b"".join(sent) + PROBE)
                await self._probed(client)
                return
            sent = _conversation(draw)
            self.cases += len(sent)
            client.send(b"".join(map(frame, sent)) + PROBE)
            await self._probed(client)
            self._look_at(client, sent)

    async def _probed(self, client: RawClient) -> None:
        """Read up to the probe's answer, or to the end. Who waits for the rest of a frame is told that none comes."""
        asyncio.get_running_loop().call_later(0.1, client.finish)
        while (answer := await client.read()) is not None and answer.get("ref") != "probe":
            pass

    def _look_at(self, client: RawClient, sent: object) -> None:
        assert client.close_code in KNOWN_CLOSES, (client.close_code, sent)
        unknown = {told["code"] for told in client.frames if told["t"] == "error"} - KNOWN_ERRORS
        assert not unknown, (unknown, sent)

    # Bodies

    async def bodies(self, count: int) -> None:
        """Messages for users and topics; all that the log accepts is in an inbox or among the dead letters."""
        follower = f"follower-{self._number}"
        await self.mesh.store.subscribe(follower, ["fuzz.>"], 10, Position(0, 0))
        accepted: list[Sent] = []
        for at in range(0, count, 200):
            some = [self._message(follower) for _ in range(min(200, count - at))]
            answers = await asyncio.gather(*map(self._publish, some))
            accepted += [sent for sent, answer in zip(some, answers, strict=True) if b'"error"' not in answer]
        self.cases += count
        assert len(accepted) > count / 2
        await self._settled()
        await self._read_dead()
        inboxes = {follower: set(await stored_ids(self.mesh.store, follower))}
        for sent in accepted:
            user = sent.user
            if user is not None and user not in inboxes:
                inboxes[user] = set(await stored_ids(self.mesh.store, user))
            is_kept = user is not None and _id(sent.body) in inboxes[user]
            assert is_kept or sent.body in self.dead, f"lost: {sent}"
        await self.mesh.store.unsubscribe(follower, ["fuzz.>"], Position(0, 0))

    def _message(self, follower: str) -> Sent:
        self._number += 1
        body = hostile.bodies(self.draw, f"fuzz-{SEED}-{self._number}")
        if self.draw.random() < 0.3:
            return Sent(hostile.topic_subjects(self.draw), body, follower)
        where = hostile.user_subjects(self.draw, self._number)
        try:
            user = subject.unescape(where.decode().removeprefix("notify.user."))
        except (TidingsError, UnicodeDecodeError):
            user = None
        return Sent(where, body, user)

    async def _publish(self, sent: Sent) -> bytes:
        self._number += 1
        reply = f"fuzzack.{self._number}".encode()
        answer = self._answers[reply] = asyncio.get_running_loop().create_future()
        header = hostile.headers(self.draw, f"{SEED}-{self._number}")
        size = len(header), len(header) + len(sent.body)
        # A subject is bytes to the server, and `send` takes text.
        self.publisher._queue(b"HPUB %b %b %d %d\r\n%b%b\r\n" % (sent.where, reply, *size, header, sent.body))
        async with asyncio.timeout(PATIENCE_S):
            return await answer

    def answered(self, where: bytes, reply: bytes, header: bytes | None, body: bytes) -> None:
        """A confirmation of the log, or a refusal."""
        self._answers.pop(where).set_result(body)

    async def _settled(self) -> None:
        """Wait until fan-out and inbox agents have done with everything."""
        async with asyncio.timeout(PATIENCE_S):
            streams = (notify_stream(part) for part in (*range(PARTITIONS), BROADCAST_PART))
            for name in ("TOPICS.fanout", *(f"{stream}.inbox" for stream in streams)):
                while True:
                    info = await self.mesh.connection.api(f"CONSUMER.INFO.{name}")
                    if not info["num_pending"] + info["num_ack_pending"]:
                        break
                    await asyncio.sleep(0.05)

    async def _read_dead(self) -> None:
        last = (await self.mesh.connection.api("STREAM.INFO.DEAD"))["state"]["last_seq"]
        stream = self.mesh.connection.jetstream()
        for sequence in range(self._dead_read + 1, last + 1):
            self.dead.add((await stream.get_msg("DEAD", sequence)).data or b"")
        self._dead_read = last

    # What must hold after each slice

    async def look(self) -> None:
        """The agents live, speak of no mistake, hold no session, file or memory of it, and serve a good client."""
        async with asyncio.timeout(3 * PATIENCE_S):
            while (sessions := await self._consumers()) or (self.files and self._files() > self.files):
                await asyncio.sleep(0.05)
        assert not sessions
        good = await self.mesh.online(self.gateway, "good", f"phone-{self.cases}")
        await good.expect(*await self.mesh.publish("good", 3))
        assert (await good.ask("count"))["t"] == "ok"
        await good.leave()
        await good.close()
        for name, agent in self.agents.items():
            assert agent.process.returncode is None, f"{name} died: {agent.output[-5:]}"
            bad = [line for line in agent.output if any(word in line for word in ("Traceback", "ERROR", "mistake"))]
            assert not bad, f"{name} said: {bad[:3]}"
            agent.output.clear()
            size = _resident(agent)
            assert size < self.base.setdefault(name, size) + GROWTH_BYTES, (
                f"{name} grew from {self.base[name]} to {size}"
            )

    def _files(self) -> int:
        return len(os.listdir(f"/proc/{self.gateway.process.pid}/fd"))

    async def _consumers(self) -> int:
        counts = 0
        for part in range(PARTITIONS):
            info = await self.mesh.connection.api(f"STREAM.INFO.{notify_stream(part)}")
            counts += info["state"]["consumer_count"] - 1
        return counts


def _conversation(draw: Random) -> list[bytes]:
    """Frames up to the first that ends the connection: of these only some, so that there is a conversation."""
    made: list[bytes] = []
    while len(made) < FRAMES_OF_ONE:
        text = hostile.broken(draw, hostile.valid_frames(draw))
        if not _ends(text):
            made.append(text)
        elif draw.random() < 0.15:
            return [*made, text]
    return made


def _ends(text: bytes) -> bool:
    try:
        frames.decode(text.decode())
    except BadFrame as error:
        return error.ref is None
    except UnicodeDecodeError:
        return True
    return False


def _id(body: bytes) -> str | None:
    try:
        return check(body).id
    except TidingsError:
        return None


def _resident(agent: Agent) -> int:
    return int(Path(f"/proc/{agent.process.pid}/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")


@asynccontextmanager
async def under_attack(folder: Path) -> AsyncIterator[Attack]:
    """All agents as processes, with limits that do not end the fuzz early."""
    async with running_mesh(folder) as mesh:
        wide: dict[str, Any] = {"client_frames_per_s": 100_000, "client_frames_burst": 1_000_000}
        gateway = await mesh.gateway(**wide, linger_s=0.0, hello_timeout_s=0.5, devices_max=10_000)
        agents = {"gateway": gateway, "inbox": await mesh.inbox(), "fanout": await mesh.fanout()}
        publisher = await connect(mesh.settings, "fuzz")
        attack = Attack(mesh, gateway, agents, publisher)
        await publisher.listen("fuzzack.*", attack.answered)
        await publisher.confirm()
        try:
            yield attack
        finally:
            await publisher.close()


async def test_fuzz(tmp_path: Path) -> None:
    """Frames, hellos, handshakes and bodies; after each slice everything is as it was."""
    print(f"TIDINGS_TEST_FUZZ_SEED={SEED} TIDINGS_TEST_FUZZ_CASES={CASES}")
    async with under_attack(tmp_path) as attack:
        await attack.look()
        attack.files = attack._files()
        attack.base.clear()
        while attack.cases < CASES:
            size = min(SLICE, CASES - attack.cases)
            await attack.clients(size * 9 // 10)
            await attack.bodies(max(20, size // 10))
            await attack.look()
            print(f"{attack.cases} cases, {attack.connections} connections, {len(attack.dead)} dead letters")
        assert attack.connections > CASES / 100
        assert len(attack.dead) > CASES / 100
