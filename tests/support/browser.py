"""A real browser: the Chromium of the machine, without a window, driven by Playwright."""

from __future__ import annotations

import os
import shutil
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any, Final

from playwright.async_api import Page, async_playwright, expect

from .clock import PATIENCE_S

_PROGRAMS: Final = ("chromium", "chromium-browser", "google-chrome")
_ARGUMENTS: Final = (
    "--no-sandbox",  # a test runs as root in a container
    "--disable-gpu",
    "--disable-quic",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
)


def find_chromium() -> str:
    """The browser's path; fails with what to install."""
    chosen = os.environ.get("TIDINGS_TEST_CHROMIUM") or next(filter(None, map(shutil.which, _PROGRAMS)), None)
    assert chosen is not None, (
        "no Chromium here: install it (infra/apt-install chromium) or name it by TIDINGS_TEST_CHROMIUM"
    )
    return chosen


@asynccontextmanager
async def open_page(url: str, **options: Any) -> AsyncIterator[Page]:
    """The page in a browser of its own, with Playwright's options; it must not complain on its console."""
    expect.set_options(timeout=PATIENCE_S * 1000)
    async with async_playwright() as playwright:
        browser = await playwright.chromium.launch(executable_path=find_chromium(), args=list(_ARGUMENTS))
        page = await browser.new_page(viewport={"width": 1280, "height": 900}, **options)
        page.set_default_timeout(PATIENCE_S * 1000)
        complaints: list[str] = []
        page.on("console", lambda said: complaints.append(said.text) if said.type == "error" else None)
        page.on("pageerror", lambda error: complaints.append(str(error)))
        try:
            await page.goto(url)
            yield page
            assert complaints == []
        finally:
            if folder := os.environ.get("TIDINGS_TEST_SCREENSHOTS"):
                name = os.environ["PYTEST_CURRENT_TEST"].split("::")[-1].split(" ")[0]
                await page.screenshot(path=f"{folder}/{name}.png", full_page=True)
            await browser.close()
