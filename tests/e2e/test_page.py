"""The page in a real browser, on a mesh that `tidings dev` runs."""

from __future__ import annotations

import os
import re
import shlex
import shutil
import signal
from collections import Counter
from collections.abc import AsyncIterator
from pathlib import Path

import orjson
import pytest
from playwright.async_api import Locator, Page, Route, WebSocket, expect

from support.browser import open_page
from support.clock import PATIENCE_S, until
from support.command import answer
from support.dev import Dev, dev, in_inbox
from tidings.dev.state import read_key
from tidings.identity import issue
from tidings.publish import Publisher


@pytest.fixture
async def mesh(tmp_path: Path) -> AsyncIterator[Dev]:
    async with dev(tmp_path / "state", TIDINGS_ACK_WAIT_S="1") as running:
        yield running


class Card:
    """One device on the page."""

    def __init__(self, page: Page, number: int) -> None:
        self.root = page.get_by_test_id(f"card-{number}")

    def part(self, name: str) -> Locator:
        return self.root.get_by_test_id(name)

    @property
    def items(self) -> Locator:
        return self.part("item")

    async def is_online(self) -> None:
        await expect(self.part("state")).to_have_attribute("data-state", "online")

    async def has_unread(self, count: str) -> None:
        await expect(self.part("badge")).to_have_text(count)

    async def follow(self, topic: str) -> None:
        """As typed; returns at once."""
        await self.part("topic-input").fill(topic)
        await self.part("follow").click()

    async def follows(self, *topics: str) -> None:
        """Wait until it shows exactly these."""
        await expect(self.part("topics").locator("li > span")).to_have_text(topics)

    async def ids(self) -> list[str]:
        found: list[str] = await self.items.evaluate_all("items => items.map((item) => item.dataset.id)")
        return found


async def cards(page: Page) -> tuple[Card, Card, Card]:
    """Alice's phone, her laptop, Bob's phone: online, and past the moment in which news count as caught up."""
    phone, laptop, bob = (Card(page, number) for number in range(3))
    for card in (phone, laptop, bob):
        await card.is_online()
        await card.has_unread("0")
        await expect(card.root).to_have_attribute("data-live", "true")
    return phone, laptop, bob


async def publish(page: Page, text: str, id: str) -> None:
    """By the page's form."""
    await page.get_by_test_id("pub-text").fill(text)
    await page.get_by_test_id("pub-id").fill(id)
    await page.get_by_test_id("pub-submit").click()


async def test_publish_see_read(mesh: Dev) -> None:
    """What the form publishes is on both devices of the user, acknowledged, as text; read on one is read on both."""
    async with open_page(mesh.url) as page:
        phone, laptop, bob = await cards(page)
        await publish(page, "<img src=x onerror=alert(1)>", "one")
        for card in (phone, laptop):
            item = card.items
            await expect(item).to_have_count(1)
            await expect(item).to_have_attribute("data-id", "one")
            await expect(item).to_have_attribute("data-acked", "true")
            await expect(item).to_have_attribute("data-read", "false")
            await expect(item).to_have_attribute("data-caughtup", "false")
            await expect(item).to_contain_text("<img src=x onerror=alert(1)>")
            await card.has_unread("1")
        await expect(page.get_by_test_id("pub-result")).to_contain_text("phone")
        await phone.part("mark-read").click()
        for card in (phone, laptop):
            await expect(card.items).to_have_attribute("data-read", "true")
            await card.has_unread("0")
        await laptop.part("archive").click()
        await expect(phone.items).to_have_count(0)
        await bob.has_unread("0")
        await expect(bob.items).to_have_count(0)


MARKUP = '<img src=x onerror="ran=1"><script>ran=1</script>'


async def test_markup_is_text(mesh: Dev) -> None:
    """Markup in each name and value is shown as text; nothing of it runs, even without the policy of the page."""
    async with open_page(mesh.url, bypass_csp=True) as page:
        phone, _, bob = await cards(page)
        for name in ("user-input", "device-input"):
            await phone.part(name).fill(MARKUP)
            await phone.part(name).press("Enter")
        await phone.is_online()
        await phone.follow(MARKUP)
        await phone.follows(MARKUP)
        await bob.follow("<b>*.*</b>.*")
        await expect(bob.part("topic-error")).to_be_visible()
        await phone.part("log").locator("summary").click()
        await page.get_by_test_id("pub-user").fill(MARKUP)
        await page.get_by_test_id("pub-type").fill(MARKUP)
        await publish(page, MARKUP, MARKUP)
        await expect(phone.items).to_have_count(1)
        await expect(page.get_by_test_id("pub-result")).to_contain_text("<img src=x")
        await publish_topic(page, MARKUP, f"to {MARKUP}")
        async with Publisher(mesh.nats, source=MARKUP) as publisher:
            await publisher.publish(MARKUP, MARKUP, {MARKUP: [MARKUP]}, id="nested", collapsekey=MARKUP)
            await publisher.publish(MARKUP, MARKUP, MARKUP, id="plain")
        await expect(phone.items).to_have_count(4)
        for item in await phone.items.all():
            await expect(item.locator(".type")).to_have_text(MARKUP)
            await expect(item.locator(".words")).to_contain_text("<script>ran=1</script>")
        await expect(phone.items.locator(".topic:visible")).to_have_text(MARKUP)
        assert MARKUP in await phone.ids()
        await expect(phone.part("log")).to_contain_text("<img src=x")
        assert await page.evaluate("typeof ran") == "undefined"
        assert await page.locator("[onerror], script:not([src])").count() == 0


async def test_offline_and_catch_up(mesh: Dev) -> None:
    """A device that is switched off misses nothing: switched on, it shows what came, as caught up, in order."""
    async with open_page(mesh.url) as page:
        phone, laptop, _ = await cards(page)
        await publish(page, "before", "before")
        await expect(phone.items).to_have_count(1)
        await phone.part("switch").uncheck()
        await expect(phone.part("state")).to_have_attribute("data-state", "offline")
        await page.get_by_test_id("pub-id").fill("away")
        await page.get_by_test_id("pub-burst").click()
        await expect(laptop.items).to_have_count(11)
        await expect(phone.items).to_have_count(1)
        await phone.part("switch").check()
        await phone.is_online()
        await expect(phone.items).to_have_count(11)
        await expect(phone.root.locator("[data-caughtup=true]")).to_have_count(10)
        await expect(phone.root.locator("[data-acked=true]")).to_have_count(11)
        assert await phone.ids() == await laptop.ids()
        await phone.has_unread("11")
        await laptop.part("read-all").click()
        await phone.has_unread("0")
        await expect(phone.root.locator("[data-read=true]")).to_have_count(11)


async def test_unacknowledged_comes_again(mesh: Dev) -> None:
    """Without its ack a notification comes a second time, until the button acknowledges it."""
    async with open_page(mesh.url) as page:
        phone, _, _ = await cards(page)
        await phone.part("autoack").uncheck()
        await publish(page, "by hand", "hand")
        await expect(phone.items).to_have_attribute("data-acked", "false")
        await expect(phone.items).to_have_attribute("data-try", "2")
        await phone.part("ack").click()
        await expect(phone.items).to_have_attribute("data-acked", "true")


async def test_comes_back_by_itself(mesh: Dev) -> None:
    """nats-server is killed under the page: it goes on without a reload, and a reload finds everything again."""
    async with open_page(mesh.url) as page:
        phone, laptop, _ = await cards(page)
        await publish(page, "first", "first")
        await expect(phone.items).to_have_count(1)
        os.kill(mesh.nats_pid, signal.SIGKILL)
        # The page's own request waits for nats-server as any publisher would.
        await publish(page, "second", "second")
        await expect(laptop.items).to_have_count(2)
        await expect(phone.items).to_have_count(2)
        # What is shown after a reload comes out of the inbox, which follows the delivery.
        async with mesh.device("alice", "desk") as desk:
            await in_inbox(desk, "second", "first")
        await page.reload()
        await phone.is_online()
        await expect(phone.items).to_have_count(2)
        await phone.has_unread("2")


async def test_the_same_from_a_terminal(mesh: Dev, tmp_path: Path) -> None:
    """The command line under the form publishes what the form would have published."""
    async with open_page(mesh.url) as page:
        phone, _, _ = await cards(page)
        await page.get_by_test_id("pub-text").fill('it\'s "quoted" {{.ID}} $HOME')
        shown = await page.get_by_test_id("cmd-tidings").text_content()
        assert shown is not None
        program, *words = shlex.split(shown)
        assert shutil.which(program), "it is found wherever it is typed"
        ran = await answer(*words, cwd=tmp_path)
        assert ran.process.returncode == 0, ran.lines
        await expect(phone.items).to_contain_text('it\'s "quoted" {{.ID}} $HOME')
        assert "Nats-Msg-Id:alice/" in (await page.get_by_test_id("cmd-nats").text_content() or "")


async def publish_topic(page: Page, topic: str, id: str) -> None:
    """By the page's form."""
    await page.get_by_test_id("to-topic").check()
    await page.get_by_test_id("pub-topic").fill(topic)
    await publish(page, f"to {topic}", id)


async def test_follow(mesh: Dev) -> None:
    """What one device follows the user's others show, and get; a subtree too; what is unfollowed comes no more."""
    async with open_page(mesh.url) as page:
        phone, laptop, bob = await cards(page)
        await phone.follow("post.42")
        await bob.follow("post.>")
        await bob.follows("post.>")
        for card in (phone, laptop):
            await card.follows("post.42")
        await publish_topic(page, "post.42", "exact")
        for card in (phone, laptop, bob):
            await expect(card.items).to_have_attribute("data-id", "exact")
            await expect(card.items).to_have_attribute("data-acked", "true")
            await expect(card.items.locator(".topic")).to_have_text("post.42")
        for name in ("alice·phone", "alice·laptop", "bob·phone"):
            await expect(page.get_by_test_id("pub-result")).to_contain_text(name)
        await publish_topic(page, "post.42.likes", "below")
        await expect(bob.items).to_have_count(2)
        await laptop.part("unfollow").click()
        for card in (phone, laptop):
            await card.follows()
        await publish_topic(page, "post.42", "later")
        await expect(bob.items).to_have_count(3)
        for card in (phone, laptop):
            assert await card.ids() == ["exact"]


async def test_followed_elsewhere(mesh: Dev) -> None:
    """What another device changes is shown to who comes back to the page, or online."""
    async with open_page(mesh.url) as page, mesh.device("alice", "tablet") as tablet:
        phone, laptop, bob = await cards(page)
        await tablet.ask("sub", topics=["post.42", "<b>.>"])
        await page.evaluate("dispatchEvent(new Event('focus'))")
        for card in (phone, laptop):
            await card.follows("<b>.>", "post.42")
        await phone.part("switch").uncheck()
        await expect(phone.part("follow")).to_be_disabled()
        await tablet.ask("unsub", topics=["<b>.>"])
        await phone.part("switch").check()
        await phone.follows("post.42")
        await bob.follows()
        await bob.part("user-input").fill("alice")
        await bob.part("user-input").press("Enter")
        await bob.follows("post.42")


async def test_topics_refused(mesh: Dev) -> None:
    """What cannot be followed is said by message and code, until something else is typed."""
    async with open_page(mesh.url) as page:
        phone, _, _ = await cards(page)
        error = phone.part("topic-error")
        for topic, said in (
            ("post..42", "has an empty level: give names with single dots between them, such as post.42 (bad_topic)"),
            ("post.*", "only a subscription may end in `.>` (bad_topic)"),
            ("x" * 201, "(topic_too_long)"),
            ("user.bob.likes", "'user.bob.likes' is not open to this user (not_allowed)"),
        ):
            await phone.follow(topic)
            await expect(error).to_contain_text(said)
        await phone.part("topic-input").fill("post.42")
        await expect(error).to_be_hidden()
        await phone.follows()


async def test_crowd(mesh: Dev) -> None:
    """A crowd comes once, gets what is published together with the devices on the page, and goes again."""
    async with open_page(mesh.url) as page:
        phone, laptop, bob = await cards(page)
        await phone.follow("post.42")
        await laptop.follows("post.42")
        said = page.get_by_test_id("crowd-result")
        await expect(page.get_by_test_id("crowd")).to_be_hidden()
        await page.get_by_test_id("to-topic").check()
        for change in ("2,000 more", "nobody new"):
            await page.get_by_test_id("crowd-gather").click()
            await expect(said).to_contain_text(f"2,001 users follow post.42 now: {change}, in ")
        await page.get_by_test_id("pub-id").fill("famous")
        await page.get_by_test_id("crowd-publish").click()
        for card in (phone, laptop):
            await expect(card.items).to_have_attribute("data-id", "famous")
        result = page.get_by_test_id("pub-result")
        await expect(result).to_contain_text(re.compile(r"Stored in \d+ ms: TOPICS"))
        for name in ("alice·phone", "alice·laptop"):
            await expect(result).to_contain_text(re.compile(rf"{name} \d+ ms"))
        async with mesh.device("crowd-2000") as member:
            await in_inbox(member, "famous")
        await expect(bob.items).to_have_count(0)
        await page.get_by_test_id("crowd-remove").click()
        await expect(said).to_contain_text("1 user follows post.42 now: 2,000 fewer, in ")
        await expect(page.get_by_test_id("crowd-publish")).to_be_hidden()
        await page.get_by_test_id("pub-topic").fill("post.43")
        await expect(said).to_be_empty()


async def test_the_same_topic_from_a_terminal(mesh: Dev, tmp_path: Path) -> None:
    """The command line publishes to the topic of the form, and the other one names its escaped subject."""
    async with open_page(mesh.url) as page:
        phone, laptop, _ = await cards(page)
        await phone.follow("fête.4 2")
        await laptop.follows("fête.4 2")
        await page.get_by_test_id("to-topic").check()
        await page.get_by_test_id("pub-topic").fill("fête.4 2")
        shown = await page.get_by_test_id("cmd-tidings").text_content()
        assert shown is not None
        ran = await answer(*shlex.split(shown)[1:], cwd=tmp_path)
        assert ran.process.returncode == 0, ran.lines
        await expect(phone.items.locator(".topic")).to_have_text("fête.4 2")
        nats = await page.get_by_test_id("cmd-nats").text_content() or ""
        assert "nats pub --jetstream notify.topic.f%C3%AAte.4%202 " in nats
        assert "Nats-Msg-Id:notify.topic.f%C3%AAte.4%202/" in nats


async def test_tokens_are_renewed(mesh: Dev, tmp_path: Path) -> None:
    """The page shows a fresh token before the last one ends, twice, on the connection that it has."""
    key, renewed, sockets = read_key(tmp_path / "state"), Counter[WebSocket](), list[WebSocket]()

    async def short(route: Route) -> None:
        asked = route.request.post_data_json
        await route.fulfill(json={"token": issue(key, asked["user"], asked["device"], ttl_s=5)})

    def watch(socket: WebSocket) -> None:
        def received(payload: str | bytes) -> None:
            if "expires_in" in orjson.loads(payload):
                renewed[socket] += 1

        sockets.append(socket)
        socket.on("framereceived", received)

    async with open_page(mesh.url) as page:
        # All of what the page opens at first has come before anybody looks.
        await cards(page)
        await page.route("**/dev/token", short)
        page.on("websocket", watch)
        await page.reload()
        await cards(page)
        # The welcome says it first.
        await until(
            lambda: len(renewed) == 3 and min(renewed.values()) >= 3,
            "every device has renewed its token twice",
            2 * PATIENCE_S,
        )
        assert len(sockets) == 3
