"""The page of `gateskip serve` in headless Chromium: a chat, its counts, a key, token colours."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest
from browser import launched, needs_chromium
from serving import running
from tiny_models import save_gated

ROOT = Path(__file__).resolve().parents[3]
pytestmark = needs_chromium


@pytest.fixture(scope="module")
def chromium() -> Iterator[Any]:
    """A running browser."""
    with launched() as browser:
        yield browser


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


@pytest.fixture(scope="module")
def gated(make_tiny: Callable[..., Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_gated(make_tiny("llama"), tmp_path_factory.mktemp("gated") / "shipped", (0.5, 0.8))


COLOURS = """() => [...document.querySelectorAll("article.assistant .tokens span")].map(
  (token) => [token.textContent, token.title, getComputedStyle(token).backgroundColor])"""


@pytest.mark.parametrize("theme", ["light", "dark"])
def test_tokens_are_coloured_by_their_compute(chromium: Any, gated: Path, theme: str) -> None:
    """As the server says, at the budget of the slider; and nothing is coloured without one."""
    from axe_playwright_python.sync_playwright import Axe

    with running(gated) as server:
        page, said, _ = _opened(chromium, server.url, theme)
        page.wait_for_selector("#skipping:not([hidden])")
        assert page.inner_text("#share") == "all"
        page.focus("#budget")
        page.keyboard.press("Home")
        assert page.inner_text("#share") == "50 %"
        assert page.get_attribute("#budget", "aria-valuetext") == "50 %"
        page.fill("#text", "Hello there")
        page.keyboard.press("Enter")
        page.wait_for_selector("article.assistant small:has-text('compute of a token')")
        said_it = {"role": "user", "content": "Hello there"}
        asked = {"messages": [said_it], "gateskip": {"budget": 0.5, "token_shares": True}}
        done = httpx.post(f"{server.url}/v1/chat/completions", json=asked, timeout=60).json()
        shares = done["choices"][0]["gateskip"]["token_shares"]
        seen = page.evaluate(COLOURS)
        assert [text for text, _, _ in seen] == [share["text"] for share in shares]
        computed = [share["compute"] for share in shares]
        known = [share for share in computed if share is not None]
        low, high = min(known), max(known)
        for share, (_, title, colour) in zip(computed, seen, strict=True):
            unknown = share is None  # of a token that was chosen with the prompt
            assert title == (
                "chosen with the prompt" if unknown else f"{100 * (1 - share):.0f} % skipped"
            )
            wanted = 0 if unknown else 0.7 * (share - low) / (high - low)
            assert _alpha(colour) == pytest.approx(wanted, abs=0.01)
        assert low < 0.9 * high
        assert Axe().run(page).violations_count == 0
        page.wait_for_selector("#send:text-is('Send')")
        page.click("#clear")
        page.focus("#budget")
        page.keyboard.press("End")
        page.fill("#text", "And now?")
        page.click("#send")
        page.wait_for_selector("article.assistant small")
        assert not page.query_selector_all("article span") and not said
        page.close()


def _alpha(colour: str) -> float:
    """The opacity of a computed colour."""
    numbers = re.findall(r"[\d.]+", colour)
    return float(numbers[3]) if len(numbers) == 4 else 1.0


def test_a_model_without_gates_has_no_slider(chromium: Any, make_tiny: Callable[..., Path]) -> None:
    with running(make_tiny("llama"), name="plain") as server:
        page, _, _ = _opened(chromium, server.url)
        page.wait_for_selector("h1:text-is('plain')")
        assert not page.is_visible("#skipping")
        page.close()


def test_the_colours_are_those_of_insight() -> None:
    scale = re.compile(r"linear-gradient\(90deg, .*?%\)\)")
    pages = (ROOT / "compose/templates/serve.html", ROOT / "reports/templates/insight.html.j2")
    of_serve, of_insight = (scale.findall(page.read_text("utf-8")) for page in pages)
    assert of_serve == of_insight and len(of_serve) == 1
