"""The report in headless Chromium: sorting, filtering, deep links, pictures, accessibility.

No network is used: any request but that of the file itself fails a test. Where there is no
Chromium, or Playwright is not installed, the tests are skipped and say so.
"""

from __future__ import annotations

import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from browser import launched, needs_chromium
from report_data import made_up_results, many_cells, with_evidence

from compose.results.io import save_results
from compose.results.schema import Results
from reports.render import render

pytestmark = needs_chromium


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A rendered report with everything in it."""
    return _rendered(tmp_path_factory.mktemp("report"), with_evidence(made_up_results()))


def _rendered(folder: Path, data: dict[str, Any]) -> Path:
    save_results(Results.model_validate(data), folder / "results.json")
    render(folder, folder)
    return folder


@pytest.fixture(scope="module")
def chromium() -> Iterator[Any]:
    """A running browser."""
    with launched() as browser:
        yield browser


class Opened:
    """A page with what it said and what it asked for."""

    def __init__(self, browser: Any, width: int = 1280, theme: str = "light") -> None:
        self.page = browser.new_page(
            viewport={"width": width, "height": 900}, color_scheme=theme, reduced_motion="reduce"
        )
        self.said: list[str] = []
        self.asked: list[str] = []
        self.page.on("console", lambda message: self.said.append(message.text))
        self.page.on("pageerror", lambda error: self.said.append(str(error)))
        self.page.on("request", lambda request: self.asked.append(request.url))

    def open(self, folder: Path, hash: str = "") -> Any:
        self.page.goto(f"{(folder / 'report.html').as_uri()}{hash}")
        return self.page

    def names(self, table: str = "#all-cells") -> list[str]:
        """The cells that a table shows, from top to bottom."""
        rows = self.page.locator(f"{table} tbody tr:visible")
        return list(rows.evaluate_all("rows => rows.map(row => row.dataset.cell)"))

    def values(self, place: int) -> list[float]:
        """What the rows of the first table sort by in a column, without those that lack it."""
        rows = self.page.locator("#all-cells tbody tr:visible")
        script = f"rows => rows.map(row => row.cells[{place}].dataset.sort)"
        return [float(each) for each in rows.evaluate_all(script) if each is not None]


@pytest.fixture
def opened(chromium: Any) -> Iterator[Opened]:
    own = Opened(chromium)
    yield own
    own.page.close()
    assert own.said == []
    assert {url.partition("#")[0].rpartition("/")[2] for url in own.asked} <= {"report.html"}
    assert all(url.startswith("file:") for url in own.asked)


def _heading(page: Any, name: str) -> Any:
    return page.locator("#all-cells thead button", has_text=name).first


def test_a_click_on_a_heading_sorts_and_says_so(opened: Opened, folder: Path) -> None:
    page = opened.open(folder)
    before = opened.names()
    _heading(page, "Decode").click()
    head = page.locator('#all-cells th[aria-sort="descending"]')
    assert head.count() == 1
    place = head.evaluate("head => head.cellIndex")
    assert opened.values(place) == sorted(opened.values(place), reverse=True)
    assert "Sorted by Decode" in page.locator("#status").inner_text()
    _heading(page, "Decode").click()
    assert page.locator('#all-cells th[aria-sort="ascending"]').count() == 1
    assert opened.values(place) == sorted(opened.values(place))
    assert sorted(opened.names()) == sorted(before)
    _heading(page, "#").click()
    assert opened.names() == before


def test_sorting_and_filtering_work_by_the_keyboard_alone(opened: Opened, folder: Path) -> None:
    page = opened.open(folder)
    _heading(page, "Size").focus()
    page.keyboard.press("Enter")
    assert page.locator('#all-cells th[aria-sort="descending"]', has_text="Size").count() == 1
    page.get_by_label("Name").focus()
    page.keyboard.type("spec nf4")
    assert opened.names() == ["gates+nf4+spec"]
    page.locator('#all-cells tr[data-cell="gates+nf4+spec"] a').focus()
    page.keyboard.press("Enter")
    assert page.locator("dialog[open] h2").inner_text() == "gates+nf4+spec"
    page.keyboard.press("Escape")
    assert page.locator("dialog[open]").count() == 0
    focused = page.evaluate("document.activeElement.closest('tr')?.dataset.cell")
    assert focused == "gates+nf4+spec"


@pytest.mark.parametrize(
    ("label", "choice", "attribute"),
    [
        ("Verdict", "TRADE-OFF", "verdict"),
        ("Family", "llama.cpp", "family"),
        ("Quantizer", "nf4", "quantizer"),
    ],
)
def test_filters_hold_in_every_table_and_picture(
    opened: Opened, folder: Path, label: str, choice: str, attribute: str
) -> None:
    page = opened.open(folder)
    page.get_by_label(label, exact=True).select_option(choice)
    shown = opened.names()
    wanted = page.locator(f'#all-cells tr[data-{attribute}="{choice}"]')
    assert shown == wanted.evaluate_all("rows => rows.map(row => row.dataset.cell)") != []
    assert f"{len(shown)} of 19 variants" in page.locator(".filters output").inner_text()
    assert set(opened.names("#speed table")) == set(shown)
    clear = page.locator(".drawn.wide .mark:not(.out)")
    assert set(clear.evaluate_all("marks => marks.map(mark => mark.dataset.cell)")) == set(shown)
    page.get_by_role("button", name="Clear").click()
    page.locator("#all-cells tr.out").first.wait_for(state="detached")
    assert len(opened.names()) == 19


@pytest.mark.parametrize("name", ["gates+spec", "llama.cpp:q8_0", "shipped"])
def test_a_deep_link_opens_its_cell(opened: Opened, folder: Path, name: str) -> None:
    page = opened.open(folder, f"#cell={name}")
    called = {"shipped": "narrow+heal+gates+gptq4+spec"}.get(name, name)
    assert page.locator("dialog[open] h2").inner_text() == called
    here = page.locator("#all-cells tr.here")
    assert here.get_attribute("data-cell") == called
    assert page.locator("dialog[open] dt", has_text="Decode").count() > 0
    page.get_by_role("button", name="Close").click()
    assert page.evaluate("location.hash") == ""


def test_a_deep_link_to_a_failure_opens_its_traceback(opened: Opened, folder: Path) -> None:
    page = opened.open(folder, "#cell=drop3+gates")
    assert page.locator("details.failure[open] pre").is_visible()


@pytest.mark.parametrize("hash", ["#cell=nobody", "#cell=%"])
def test_a_deep_link_to_nothing_says_so(opened: Opened, folder: Path, hash: str) -> None:
    page = opened.open(folder, hash)
    assert "No variant is called" in page.locator("#status").inner_text()
    assert page.locator("dialog[open]").count() == 0


def test_a_mark_opens_its_cell_and_the_panel_says_why(opened: Opened, folder: Path) -> None:
    page = opened.open(folder)
    # Marks of equal numbers lie on each other, so the event goes to this one.
    page.locator('#plot-front-decode .drawn.wide .mark[data-cell="nf4"]').dispatch_event("click")
    assert page.locator("dialog[open] h2").inner_text() == "nf4"
    assert page.locator("dialog[open] .verdict").count() == 1
    assert page.locator("dialog[open] .why").inner_text().endswith(".")


@pytest.mark.parametrize("width", [1400, 400])
def test_the_first_screen_holds_the_answer(chromium: Any, folder: Path, width: int) -> None:
    own = Opened(chromium, width)
    page = own.open(folder)
    cards = page.locator(".card")
    assert cards.count() >= 1
    for place in range(cards.count()):
        box = cards.nth(place).bounding_box()
        assert box is not None and box["y"] + box["height"] <= 900
        assert cards.nth(place).locator(".price").inner_text().endswith(".")
    assert page.locator("main section").first.get_attribute("class") == "summary"
    page.close()


def test_on_a_phone_a_verdict_s_reason_is_whole_and_as_wide_as_the_screen(
    chromium: Any, folder: Path
) -> None:
    own = Opened(chromium, 400)
    page = own.open(folder)
    reasons = page.locator("#verdicts td.words")
    assert reasons.count() == 15
    for place in range(reasons.count()):
        reasons.nth(place).scroll_into_view_if_needed()
        box = reasons.nth(place).bounding_box()
        assert box is not None and box["width"] > 300
        assert box["x"] >= 0 and box["x"] + box["width"] <= 400
    size = reasons.first.evaluate("cell => parseFloat(getComputedStyle(cell).fontSize)")
    assert size >= 14
    page.close()


def test_on_a_phone_the_marks_of_a_picture_are_named_below_it(chromium: Any, folder: Path) -> None:
    for width, shown in ((400, True), (1400, False)):
        own = Opened(chromium, width)
        page = own.open(folder)
        key = page.locator("#plot-front-decode .key")
        assert key.is_visible() == shown
        assert "gates+nf4+spec" in key.inner_text() if shown else True
        page.close()


@pytest.mark.parametrize("width", [1280, 390])
def test_pictures_are_there_and_the_page_is_as_wide_as_the_screen(
    chromium: Any, folder: Path, width: int
) -> None:
    own = Opened(chromium, width)
    page = own.open(folder)
    for key in ("front-decode", "front-size", "front-saved", "repeats", "training", "curves"):
        drawn = page.locator(f"#plot-{key} .drawn:visible svg")
        assert drawn.count() == 1
        box = drawn.bounding_box()
        assert box is not None and box["width"] > 250 and box["height"] > 150
    assert page.evaluate("document.documentElement.scrollWidth") <= width
    assert own.said == []
    page.close()


def test_the_theme_is_the_system_s_until_it_is_chosen(chromium: Any, folder: Path) -> None:
    own = Opened(chromium, theme="dark")
    page = own.open(folder)

    def ground() -> str:
        return str(page.evaluate("getComputedStyle(document.body).backgroundColor"))

    dark = ground()
    page.get_by_role("button", name="Theme").click()
    assert page.get_by_role("button", name="Theme").inner_text() == "Theme: light"
    assert ground() != dark
    page.get_by_role("button", name="Theme").click()
    assert ground() == dark
    page.close()


@pytest.mark.parametrize(("width", "theme"), [(1280, "dark"), (390, "light")])
@pytest.mark.parametrize("hash", ["", "#cell=gates+spec"])
def test_axe_finds_nothing_serious(
    chromium: Any, folder: Path, width: int, theme: str, hash: str
) -> None:
    from axe_playwright_python.sync_playwright import Axe

    own = Opened(chromium, width, theme)
    page = own.open(folder, hash)
    page.add_style_tag(content="section { content-visibility: visible !important; }")
    found = Axe().run(page).response["violations"]
    bad = [
        (each["id"], each["impact"], [node["html"][:160] for node in each["nodes"]][:3])
        for each in found
        if each["impact"] in ("serious", "critical")
    ]
    page.close()
    assert bad == []


@pytest.mark.slow
def test_200_cells_open_and_how_long_that_takes(
    chromium: Any, tmp_path: Path, record_property: Any
) -> None:
    """The time is told and not judged: a busy machine is not a slow page."""
    _rendered(tmp_path, many_cells(200))
    own = Opened(chromium)
    devtools = own.page.context.new_cdp_session(own.page)
    devtools.send("Performance.enable", {"timeDomain": "threadTicks"})
    started = time.perf_counter()
    page = own.open(tmp_path)
    own.page.locator("#all-cells tbody tr").nth(199).wait_for(state="attached")
    seconds = time.perf_counter() - started
    megabytes = (tmp_path / "report.html").stat().st_size / 1e6
    spent = {
        each["name"]: each["value"] for each in devtools.send("Performance.getMetrics")["metrics"]
    }
    own.page.get_by_label("Name").fill("gptq4")
    assert 0 < len(own.names()) < 200
    page.close()
    assert own.said == []
    record_property("open_s", round(seconds, 3))
    busy = spent["TaskDuration"]
    print(f"200 cells, {megabytes:.2f} MB: opened in {seconds:.2f} s, {busy:.2f} s of them busy")
    assert megabytes < 5
