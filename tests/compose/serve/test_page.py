"""The page of `gateskip serve` in headless Chromium: a chat, its counts, stopping, a key."""

from __future__ import annotations

import importlib.util
import os
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from serving import running

NAMES = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable")
CHROMIUM = os.environ.get("CHROMIUM") or next(filter(None, map(shutil.which, NAMES)), None)
MISSING = [
    *([] if CHROMIUM else ["Chromium (apt-get install chromium, or CHROMIUM names one)"]),
    *(
        f"{name} (pip install -e '.[dev]')"
        for name in ("playwright", "axe_playwright_python")
        if importlib.util.find_spec(name) is None
    ),
]
pytestmark = pytest.mark.skipif(bool(MISSING), reason=f"not here: {', '.join(MISSING)}")


@pytest.fixture(scope="module")
def chromium() -> Iterator[Any]:
    """A running browser."""
    from playwright.sync_api import sync_playwright

    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(
            executable_path=CHROMIUM, args=["--no-sandbox", "--disable-dev-shm-usage"]
        )
        yield browser
        browser.close()


def _opened(browser: Any, url: str, theme: str = "light") -> tuple[Any, list[str], list[str]]:
    """A page, what it said, and what it asked for."""
    page = browser.new_page(viewport={"width": 900, "height": 700}, color_scheme=theme)
    said: list[str] = []
    asked: list[str] = []
    page.on("console", lambda said_it: said_it.type == "error" and said.append(said_it.text))
    page.on("pageerror", lambda error: said.append(str(error)))
    page.on("request", lambda request: asked.append(request.url))
    page.goto(url)
    return page, said, asked


def test_a_chat(chromium: Any, make_tiny: Callable[..., Path]) -> None:
    from axe_playwright_python.sync_playwright import Axe

    with running(make_tiny("llama"), name="<b>alias</b>") as server:
        page, said, asked = _opened(chromium, server.url, "dark")
        page.wait_for_selector("h1:text-is('<b>alias</b>')")
        page.fill("#text", "Hello <i>there</i>")
        page.keyboard.press("Enter")
        page.wait_for_selector("article.assistant small", timeout=30_000)
        counts = page.inner_text("article.assistant small")
        assert " tokens, first after " in counts and "tokens/s" in counts
        assert page.inner_text("article.user p") == "Hello <i>there</i>"
        assert page.inner_text("article.assistant p").strip()
        page.fill("#text", "And now?")
        page.click("#send")
        page.wait_for_selector("article:nth-child(4) small")
        assert "was forgotten" in page.inner_text("article:nth-child(4)")
        page.wait_for_selector("#send:text-is('Send')")
        assert page.inner_text("article:nth-child(4) p").strip()
        assert page.query_selector("i, b") is None and page.query_selector(".error") is None
        assert Axe().run(page).violations_count == 0
        page.click("#clear")
        assert page.query_selector("article") is None
        assert len(said) == 1 and "400" in said[0]  # the turn that no longer fitted
        assert all(address.startswith((server.url, "data:")) for address in asked)
        page.close()


def test_stopping_an_answer_and_a_key(chromium: Any, make_tiny: Callable[..., Path]) -> None:
    folder = make_tiny("llama", max_position_embeddings=16384)
    with running(folder, api_key="secret", max_context=16000) as server:
        page, _, _ = _opened(chromium, server.url)
        page.wait_for_selector("#key:not([hidden])")
        page.fill("#text", "Hello")
        page.click("#send")
        page.wait_for_selector(".error")
        assert "API key" in page.inner_text(".error")
        page.fill("#key", "secret")
        page.fill("#text", "Hello")
        page.click("#send")
        page.wait_for_selector("article:nth-child(4)")
        page.wait_for_selector("article.assistant:last-child small")
        server.wait(rows=0, queued=0)
        page.close()
