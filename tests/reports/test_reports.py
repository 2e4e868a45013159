"""Reports are drawn from results alone: everything shown, everything escaped, nothing missing.

The results here are test data, made in code; no number in them was measured.
"""

from __future__ import annotations

import csv
import io
import json
import math
import re
import xml.etree.ElementTree as ET
from html.parser import HTMLParser
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from report_data import estimate, made_up_cell, made_up_results, many_cells, with_evidence

from compose.analysis.families import NOT_QUANTIZED, family_of, weights_of
from compose.errors import UserError
from compose.numbers import PAGE
from compose.results.io import save_results
from compose.results.schema import CellResult, Results
from compose.table import Entry, Table
from reports import Report, Row, pareto, read, render
from reports.answers import Answer, answers
from reports.closing import GLOSSARY
from reports.comparison import compare_runs, line
from reports.plots import Picture, dark_pngs, pictures
from reports.plots.marks import apart, side_by_side
from reports.plots.names import Name, best_places
from reports.plots.scatter import scale_of
from reports.plots.spread import x_axis
from reports.plots.svg import inline
from reports.render import to_html, to_markdown
from reports.summary import summary
from reports.tables import cells, run_tables
from reports.tables.columns import tone
from reports.tables.csv_file import to_csv
from reports.tables.markdown import escape_markdown, fenced
from reports.tables.speculation import timed_histogram
from reports.text import breakable

PUBLISHED = Path(__file__).resolve().parents[2] / "reports" / "published"
NASTY = "<img src=x onerror=alert(1)>&amp;\"'`|$x$*_[a](b)#"


@pytest.fixture(scope="module")
def report() -> Report:
    return Report(Results.model_validate(made_up_results()))


@pytest.fixture(scope="module")
def evident() -> Report:
    """The same run with intervals, verdicts and other engines."""
    return Report(Results.model_validate(with_evidence(made_up_results())))


@pytest.fixture(scope="module")
def drawn(report: Report) -> dict[str, Picture]:
    return pictures(report)


def test_what_was_spent_on_the_scored_text_is_shown() -> None:
    """Net saved, and below it what each phase kept; unrounded in the CSV; else no such column."""
    data = made_up_results()
    assert not any("saved" in column.head for column in cells.quality(_report(data)).columns)
    cell = next(c for c in data["cells"] if c["chain"][-1:] == ["skip80"] and "quality" in c)
    answer = {"tokens": 30, "kept": 0.8, "saved_net": 0.1}
    prompt = {"tokens": 90, "kept": 0.743, "saved_net": 0.2}
    spent = {"tokens": 120, "kept": 0.757, "saved_net": 0.175, "prompt": prompt, "answer": answer}
    cell["quality"]["tasks"]["piqa"]["compute"] = spent
    cell["quality"]["own_answers"] = {"kl": 0.1, "compute": {**answer, "answer": answer}}
    shown = cells.quality(_report(data))
    heads = [column.head for column in shown.columns]
    entries = next(made for row, made in shown.rows if row.cell.name == cell["name"])
    piqa = entries[heads.index("piqa saved")]
    assert (piqa.text, piqa.note) == ("17.5", "kept prompt 74.3, answer 80.0")
    assert entries[heads.index("Own answers saved")].note == "kept answer 80.0"
    records = csv.DictReader(io.StringIO(to_csv(_report(data))))
    record = next(each for each in records if each["cell"] == cell["name"])
    assert record["piqa-prompt-kept"] == "0.743" and record["piqa-saved"] == "0.175"
    assert record["own-answers-answer-kept"] == "0.8"


def test_cells_that_answer_alike_stand_together() -> None:
    data = made_up_results()
    by_name = {cell["name"]: cell for cell in data["cells"]}
    assert answers(_report(data)) == ()
    said = {"questions": ["Why?", "How?"], "texts": ["Because it rains.", "By hand."]}
    by_name["dense"]["quality"]["own_answers"] = said
    for name, first in (("gptq4", "Because it rains."), ("nf4", "Because of rain.")):
        by_name[name]["quality"]["own_answers"] = {"texts": [first, "By hand."]}
    report = _report(data)
    why, how = answers(report)
    assert why.text == "Why?" and how.answers == (
        Answer(("dense", "nf4", "gptq4"), "By hand.", ""),
    )
    alike, other = why.answers
    assert alike == Answer(("dense", "gptq4"), "Because it rains.", "")
    assert other == Answer(("nf4",), "Because ", "of rain.")
    page, text = to_html(report, {}), to_markdown(report, {})
    assert "Because <mark>of rain.</mark>" in page and 'href="#answers"' in page
    assert "## Answers" in text and "nf4:\n\n```text\nBecause of rain.\n```" in text


def _report(data: dict[str, Any]) -> Report:
    return Report(Results.model_validate(data))


class Page(HTMLParser):
    """Collects tags, text and attributes, and checks that tags close in order."""

    VOID = frozenset({"meta", "link", "img", "input", "source", "wbr", "br"})

    def __init__(self, text: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.text: list[str] = []
        self.feed(text)
        assert self.open == []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))
        if tag not in self.VOID:
            self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        if self.open[-1:] not in (["style"], ["script"]):
            self.text.append(data)

    @property
    def words(self) -> str:
        return " ".join("".join(self.text).split())


# --- files ---------------------------------------------------------------------------------------


def test_render_writes_everything_and_the_same_each_time(
    tmp_path: Path, report: Report, drawn: dict[str, Picture]
) -> None:
    save_results(Results.model_validate(made_up_results()), tmp_path / "results.json")
    (tmp_path / "report-files").mkdir()
    (tmp_path / "report-files" / "old.png").write_bytes(b"")
    done = render(tmp_path, tmp_path)
    assert done.html == tmp_path / "report.html"
    markdown = done.markdown.read_text("utf-8")
    linked = re.findall(r"!\[[^\]]*\]\((.+?)\)", markdown)
    assert set(linked) == {f"report-files/{key}.png" for key in drawn}
    files = {p.name for p in (tmp_path / "report-files").iterdir()}
    assert files == {f"{key}.{kind}" for key in drawn for kind in ("png", "svg")}
    for link in linked:
        assert (tmp_path / link).read_bytes().startswith(b"\x89PNG")
        ET.fromstring((tmp_path / link).with_suffix(".svg").read_bytes())
    page = Page(done.html.read_text("utf-8"))
    assert done.html.read_text("utf-8") == to_html(report, drawn)
    assert not list(tmp_path.rglob(".*"))
    assert done.csv.read_text("utf-8") == to_csv(report)
    for cell in made_up_results()["cells"]:
        assert cell["name"] in page.words
        assert escape_markdown(cell["name"]) in markdown
        assert cell["name"] in done.csv.read_text("utf-8")


def test_the_page_needs_nothing_else(report: Report, drawn: dict[str, Picture]) -> None:
    text = to_html(report, drawn)
    page = Page(text)
    links = [v for _, a in page.tags for k, v in a.items() if k in ("src", "href", "srcset")]
    beside = {"report.md", "report.csv", "results.json"}
    beside |= {f"report-files/{key}.{kind}" for key in drawn for kind in ("png", "svg")}
    assert {link for link in links if not (link or "").startswith(("#", "data:,"))} == beside
    assert not [a for tag, a in page.tags if tag in ("img", "link", "script") and "src" in a]
    ids = [a["id"] for _, a in page.tags if "id" in a]
    assert len(ids) == len(set(ids))
    anchors = {link[1:] for link in links if link and re.match("#(?!cell=)", link)}
    assert anchors <= set(ids)
    assert all(used[4:-1].startswith("#") for used in re.findall(r"url\([^)]*\)", text))
    assert len(text) < 3_000_000


def test_every_name_links_to_its_cell(report: Report) -> None:
    page = Page(to_html(report, {}))
    rows = {a["data-cell"] for tag, a in page.tags if tag == "tr" and "data-cell" in a}
    linked = {a["href"] for tag, a in page.tags if tag == "a"}
    assert rows == {row.cell.name for row in report.rows}
    assert {f"#cell={name}" for name in rows} <= linked


def test_pictures_are_sound_and_use_the_reader_s_fonts(drawn: dict[str, Picture]) -> None:
    assert list(drawn) == ["front-decode", "front-size", "front-saved", "repeats", "training"]
    for picture in drawn.values():
        assert set(picture.inline) == {"wide", "narrow"}
        for text in (*picture.inline.values(), picture.svg.decode("utf-8")):
            ET.fromstring(text)
            assert "DejaVu" not in text


def test_inline_pictures_follow_the_theme_of_the_page(drawn: dict[str, Picture]) -> None:
    for picture in drawn.values():
        colours = set(re.findall(r"#[0-9a-f]{6}\b", picture.inline["wide"]))
        assert not colours, picture.key
        assert "var(--p-" in picture.inline["wide"]


def test_each_mark_of_a_front_is_a_cell(report: Report, drawn: dict[str, Picture]) -> None:
    named = re.findall(r'class="mark" data-cell="([^"]+)"', drawn["front-decode"].inline["wide"])
    assert sorted(named) == sorted(row.cell.name for row in report.rows)


def test_missing_results_are_the_user_s_mistake(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"results\.json"):
        render(tmp_path, tmp_path)


# --- what is shown -------------------------------------------------------------------------------


def test_nothing_is_recommended_for_speed_without_intervals(report: Report) -> None:
    speed, *others = summary(report)
    assert speed.row is None
    assert "Nothing is recommended for speed" in speed.price
    assert "no variant is shown to be faster" in speed.price
    assert all(card.row is None for card in others)


def with_kept(data: dict[str, Any]) -> dict[str, Any]:
    """nf4 and gptq4 with shares kept, over 1500 questions; and one with dense's predictions."""
    data = with_evidence(data)
    for place, (low, high) in {1: (0.93, 1.0), 2: (0.96, 1.0)}.items():  # nf4, gptq4
        kept = {"value": 0.98, "low": low, "high": high, "n": 1500}
        data["cells"][place]["quality"]["retained"] = kept
        data["cells"][place]["quality"]["perplexity"]["ratio_ci95"] = [0.99, 1.02]
    data["cells"][9]["quality"]["perplexity"]["ratio_ci95"] = [0.99, 1.02]  # gates+gptq4
    return data


def test_the_report_opens_with_the_answer_and_its_price() -> None:
    data = with_kept(made_up_results())
    data["cells"][5]["quality_of"] = "dense"
    data["cells"][5]["speed"]["decode_ratio"] = estimate(1.2)
    data["cells"][5]["speculation"]["speedup_ci95"] = [1.1, 1.3]
    data["cells"][1]["size"]["disk_bytes"] = 50_000_000
    report = _report(data)
    speed, size, exact = summary(report)
    assert (speed.aim, size.aim, exact.aim) == ("For speed", "For size", "For exactness")
    assert speed.row is not None and speed.row.cell.name == "gates+gptq4+spec"
    assert (
        size.row is not None
        and size.row.cell.name == "nf4"
        and "% of the original model's disk space" in size.price
    )
    assert exact.row is not None and exact.row.cell.name == "gates+spec"
    assert exact.price.endswith("Its predictions are identical to those of the original model.")
    words, markdown = Page(to_html(report, {})).words, to_markdown(report, {})
    for text in (words, markdown):
        place = text.index("Recommended")
        for card in (speed, size, exact):
            assert card.row is not None
            line = card.price if text is words else escape_markdown(card.price)
            assert place < text.index(line) < text.index("variants measured")
        assert "one combination of stages, measured" in text[: text.index("variants measured")]


def test_one_variant_for_all_aims_is_one_card_and_so_is_one_reason() -> None:
    data = with_kept(made_up_results())
    cells = [data["cells"][0], data["cells"][2]]
    (card,) = summary(_report(data | {"cells": cells}))
    assert card.aim == "For speed, size and exactness"
    assert card.row is not None and card.row.cell.name == "gptq4"
    (nothing,) = summary(_report(data | {"cells": cells[:1]}))
    assert nothing.price == (
        "Nothing is recommended, because no variant was measured beside the original model."
    )
    assert nothing.price in Page(to_html(_report(data | {"cells": cells[:1]}), {})).words


def test_what_is_kept_counts_by_its_lower_bound() -> None:
    report = _report(with_kept(made_up_results()))
    shown = {
        row.cell.name: _by_head(cells.overview(report), e)["Keeps (%)"] for row, e in _rows(report)
    }
    assert shown["nf4"].tone == "fair" and shown["gptq4"].tone == "good"
    assert shown["nf4"].text == "no difference" and shown["nf4"].note == "93.0–100.0"
    assert shown["drop3"].tone is None


def test_the_baseline_s_predictions_are_called_identical() -> None:
    """They were "keeps 100 % (no evidence)"."""
    data = with_evidence(made_up_results())
    data["cells"][5]["quality_of"] = "dense"
    report = _report(data)
    for table in (cells.overview(report), cells.quality(report)):
        entries = next(made for row, made in table.rows if row.cell.name == "gates+spec")
        shown = _by_head(table, entries)
        assert shown["Keeps (%)"].text == "identical predictions"
        assert shown["Keeps (%)"].note == ""
    for text in (Page(to_html(report, {})).words, to_markdown(report, {})):
        assert "identical predictions" in text and "(no evidence)" not in text


def test_lossless_names_its_weights_everywhere(evident: Report) -> None:
    for table in (cells.overview(evident), cells.lossless(evident)):
        for row, entries in table.rows:
            entry = _by_head(table, entries)["Lossless"]
            assert entry.is_absent or entry.note.startswith("to its "), row.cell.name
    shown = {
        row.cell.name: _by_head(cells.lossless(evident), e)
        for row, e in cells.lossless(evident).rows
    }
    assert shown["gates+gptq4+spec"]["Lossless"].note == "to its gptq 4-bit weights"
    assert shown["gates+spec"]["Lossless"].note == "to its bfloat16 weights"


@pytest.mark.parametrize(
    ("share", "settings", "words"),
    [
        (0.69, {"draft_weights": "learned"}, "look-up 69\u202f%, learned 31\u202f%"),
        (0.3, {"draft_weights": "int4"}, "int4 70\u202f%, look-up 30\u202f%"),
        (0.9952, {"draft_weights": "int4-head"}, "look-up 99.5\u202f%, int4-head 0.5\u202f%"),
        (1.0, {"draft_weights": "auto"}, "look-up 100\u202f%"),
        (0.0, {"draft_weights": "own"}, "the model itself 100\u202f%"),
    ],
)
def test_drafts_that_were_looked_up_are_credited_to_look_up(
    share: float, settings: dict[str, Any], words: str
) -> None:
    data = with_evidence(made_up_results())
    data["cells"][11]["steps"][-1] |= settings
    data["cells"][11]["speculation"]["looked_up_share"] = share
    report = _report(data)
    for table, head in (
        (cells.speculation(report), "Drafted by (% of drafts)"),
        (cells.overview(report), "Accepted (%)"),
    ):
        entries = next(e for row, e in table.rows if row.cell.name == "gates+gptq4+spec")
        entry = _by_head(table, entries)[head]
        assert words in (entry.text, *entry.note.split("pass, ")[-1:])


def test_training_of_under_20_steps_makes_no_curve() -> None:
    data = made_up_results()
    for cell in data["cells"]:
        for name, curve in cell.get("training", {}).items():
            cell["training"][name] = [point for point in curve if point["step"] < 20]
    report = _report(data)
    drawn = pictures(report)
    assert "training" not in drawn
    assert 'id="plot-training"' not in to_html(report, drawn)


def test_every_point_of_a_front_has_its_name(drawn: dict[str, Picture], report: Report) -> None:
    """In the picture itself, and on a phone in a list below it."""
    for picture in drawn.values():
        if not picture.key.startswith("front-"):
            assert picture.names == ()
            continue
        marked = set(re.findall(r'data-cell="([^"]+)"', picture.inline["wide"]))
        assert {name.split("\u00a0", 1)[1] for name in picture.names} == marked
        labels = re.findall(r">([^<>]+)</text>", picture.inline["wide"])
        written = {label.partition(" ↓ ")[0] for label in labels}  # with its number off the scale
        left = [name for name in picture.names if name.split("\u00a0", 1)[1] not in written]
        assert len(left) <= 2 and all(name in picture.caption for name in left), picture.key


def test_the_picture_of_the_readme_names_every_point_in_light_and_dark() -> None:
    report = read(PUBLISHED / "peers")
    light = pictures(report)["front-decode"]
    assert "Marks without a name" not in light.caption
    dark = dark_pngs(report, ["front-decode"])["front-decode"]
    assert dark.startswith(b"\x89PNG") and dark != light.png


def test_the_report_closes_with_terms_and_commands(evident: Report) -> None:
    assert 3 <= len(GLOSSARY) <= 12
    words, markdown = Page(to_html(evident, {})).words, to_markdown(evident, {})
    for text in (words, markdown):
        glossary, after = text.rindex("Glossary"), text.rindex("What next")
        assert text.rindex("Environment") < glossary < after
        for term, _ in GLOSSARY:
            assert glossary < text.index(term, glossary) < after
        for command in ("chat", "generate", "report", "pick", "export", "--format gguf"):
            assert command in text[after:]


def test_a_reader_meets_variants_and_not_cells(evident: Report) -> None:
    words = Page(to_html(evident, pictures(evident))).words
    assert not re.search(r"\bcells?\b", words.replace("--cell ", ""), re.IGNORECASE)
    markdown = to_markdown(evident, {}).replace("--cell ", "")
    assert not re.search(r"\bcells?\b", markdown, re.IGNORECASE)


def test_a_cell_that_is_not_lossless_shows_where(report: Report) -> None:
    words = Page(to_html(report, {})).words
    assert "prompt 11, token 37, margin 0.0031" in words


def test_timed_speculation_and_the_lossless_check_are_two_tables(evident: Report) -> None:
    timed, check = cells.speculation(evident), cells.lossless(evident)
    assert {column.label for column in timed.columns}.isdisjoint({"Lossless", "Prompts"})
    accepted = {row.cell.name: _by_head(timed, entries) for row, entries in timed.rows}
    forced = {row.cell.name: _by_head(check, entries) for row, entries in check.rows}
    assert accepted["gates+spec"]["Plain steps (%)"].note == "fell back to plain decoding"
    assert accepted["gates+spec"]["Speed-up (over plain)"].text == "no difference"
    assert accepted["gates+spec"]["Draft length (most often)"].text == "none"
    assert forced["gates+spec"]["Accepted (%, forced)"].text == "63.0"
    assert forced["gates+spec"]["Accepted (%, forced)"].note == "57.0–69.0"
    assert accepted["gates+spec"]["Accepted (%)"].note == "50.0–70.0"
    assert "Fell back to plain decoding" in Page(to_html(evident, {})).words
    assert "fell back to plain decoding" in to_markdown(evident, {})


def _texts(table: Table[None]) -> tuple[tuple[str, ...], ...]:
    return tuple(tuple(entry.text for entry in entries) for _, entries in table.rows)


def _by_head(table: Table[Row], entries: tuple[Entry, ...]) -> dict[str, Entry]:
    return {c.label: entry for c, entry in zip(table.columns, entries, strict=True)}


def test_a_ratio_whose_interval_holds_1_is_no_difference(evident: Report) -> None:
    rows = {row.cell.name: _by_head(cells.overview(evident), e) for row, e in _rows(evident)}
    assert rows["gates"]["Decode (tok/s)"].note == "no difference (0.94–1.02)"
    assert rows["gates+skip80"]["Decode (tok/s)"].note == "×1.22 (1.17–1.26)"
    assert rows["gates"]["Perplexity (× dense)"].text == "no difference"
    assert rows["nf4"]["Perplexity (× dense)"].text == "1.082"
    assert rows["nf4"]["Perplexity (× dense)"].note == "1.060–1.104"


def _rows(report: Report) -> tuple[tuple[Row, tuple[Entry, ...]], ...]:
    return cells.overview(report).rows


def test_spread_is_quartiles_and_not_the_extremes() -> None:
    data = made_up_results()
    speed = {"median": 20.0, "quartiles": [19.0, 21.0], "repeats": [1.0, 19.0, 20.0, 21.0, 99.0]}
    data["cells"][0]["speed"]["decode_tokens_per_s"] = speed
    report = Report(Results.model_validate(data))
    table = cells.speed(report)
    assert _by_head(table, table.rows[0][1])["Decode (tok/s)"].note == "19.0–21.0"


def test_each_verdict_has_its_sentence_everywhere(evident: Report) -> None:
    words, markdown = Page(to_html(evident, {})).words, to_markdown(evident, {})
    records = list(csv.DictReader(io.StringIO(to_csv(evident))))
    judged = [row for row in evident.rows if row.cell.verdict]
    assert len(judged) == 15
    for row in judged:
        verdict = row.cell.verdict
        assert verdict is not None
        assert verdict.why in words
        assert escape_markdown(verdict.why) in markdown
        assert (records[row.number - 1]["verdict"], records[row.number - 1]["why"]) == (
            verdict.verdict,
            verdict.why,
        )


def test_other_engines_stand_in_tables_and_fronts_but_win_nothing(evident: Report) -> None:
    drawn = pictures(evident)
    for key in ("front-decode", "front-size"):
        assert 'data-cell="llama.cpp:q8_0"' in drawn[key].inline["wide"]
        assert "Pentagons are other engines" in drawn[key].caption
        assert "95\u202f% intervals" in drawn[key].caption
    assert all(best.row is None or best.row.cell.peer is None for best in summary(evident))
    page = Page(to_html(evident, drawn)).words
    assert "Flash attention off, which was faster here." in page
    assert {row.family for row in evident.peers} == {"llama.cpp"}


def test_whiskers_end_where_the_intervals_end(evident: Report) -> None:
    rows = {row.cell.name: row for row in evident.rows}
    axis = x_axis(evident, evident.rows, "decode")
    assert axis.at(rows["dense"]) == 1.0
    ends = axis.ends(rows["nf4"])
    assert ends == pytest.approx((29.8 / 23.6 * 0.96, 29.8 / 23.6 * 1.04))
    scale = scale_of(evident, "perplexity-ratio", evident.rows, evident.front("decode"))
    up = scale.ends(rows["nf4"])
    assert up == pytest.approx((-math.log(1.082 * 0.98), -math.log(1.082 * 1.02)))


def test_the_origin_of_the_weights_stands_in_the_notes(evident: Report) -> None:
    text, markdown = to_html(evident, {}), to_markdown(evident, {})
    assert text.index('id="notes"') < text.index("once were Q4_1") < text.index('id="environment"')
    assert markdown.index("## Notes") < markdown.index("once were Q4") < len(markdown)
    assert text.count("once were Q4_1") == 1 and 'href="#notes"' in text


def test_what_else_is_known_of_the_run_is_said(evident: Report) -> None:
    words, markdown = Page(to_html(evident, {})).words, to_markdown(evident, {})
    for known in (
        "narrow+heal",  # a stage
        "900.0 MB",
        "0123456789abcdef",
        "prompts: bfloat16",
        "Noise floor: computed in float32, the dense model",
    ):
        assert known in words
        assert escape_markdown(known) in markdown
    assert _texts(run_tables.curves(evident)) == (
        (
            "gates, likelihood tasks",
            "published",
            "10.8\u202f%",
            "50.0\u202f%",
            "47.5\u202f%",
            "45.0\u202f%",
        ),
        (
            "gates, likelihood tasks",
            "ours",
            "9.0\u202f%",
            "50.0\u202f%",
            "47.5\u202f%",
            "45.0\u202f%",
        ),
    )


def test_csv_has_the_numbers_of_the_results(evident: Report) -> None:
    records = list(csv.DictReader(io.StringIO(to_csv(evident))))
    assert len(records) == len(evident.results.cells)
    for row, record in zip(evident.rows, records, strict=False):
        assert record["cell"] == row.cell.name
        for metric, value in row.values.items():
            assert float(record[metric]) == value
    nf4 = next(record for record in records if record["cell"] == "nf4")
    assert float(nf4["decode-ratio-low"]) == pytest.approx(29.8 / 23.6 * 0.96)
    assert nf4["family"] == "quantized" and nf4["quantizer"] == "nf4"
    failed = next(record for record in records if record["status"] == "failed")
    assert "not finite" in failed["why"]


def test_coordinates_are_shortened_and_what_is_written_stays() -> None:
    drawn = '<?xml version="1.0"?><svg width="9"><text x="1.23456">KL 0.00012</text></svg>'
    assert inline(drawn, "p-", {}) == '<svg><text x="1.23">KL 0.00012</text></svg>'


def test_integers_are_quantized_and_healing_does_not_prune() -> None:
    def cell(*uses: str) -> CellResult:
        raw = made_up_cell("+".join(uses), decode=1.0, disk=1.0, ratio=1.0)
        raw["steps"] = [{"name": use, "use": use} for use in uses]
        return CellResult.model_validate(raw)

    for use in ("int8", "int4", "int3", "int2"):
        for chain in ((use,), (use, "heal")):
            assert weights_of(cell(*chain)) == use
            assert family_of(cell(*chain)) == "quantized"
    assert family_of(cell("drop-layers", "int4", "heal")) == "pruned"
    assert weights_of(cell("heal")) == NOT_QUANTIZED


@pytest.mark.slow
def test_a_report_of_200_cells_stays_below_5_mb() -> None:
    report = Report(Results.model_validate(many_cells(200)))
    drawn = pictures(report)
    text = to_html(report, drawn)
    assert len(report.rows) == 200
    assert len(text.encode("utf-8")) < 5_000_000
    print(f"200 cells: {len(text.encode('utf-8')) / 1e6:.2f} MB")


def test_failures_and_left_out_cells_say_why(report: Report) -> None:
    words = Page(to_html(report, {})).words
    markdown = to_markdown(report, {})
    for text in (words, markdown):
        assert "the loss was not finite at step 40" in text
        assert "decode-needs-gates" in text
        assert "stage.run(job)" in text
    assert len(report.left_out) == 2
    assert "16 variants measured, 1 failed, 7 left out" in words


def test_the_arithmetic_of_each_cell_is_shown() -> None:
    data = made_up_results()
    used = {"backend": "native", "weights": "bfloat16", "accumulation": "float32"}
    data["cells"][0] |= {
        "arithmetic": used | {"activations": "8 bits in blocks of 32"},
        "scoring_arithmetic": used | {"activations": "bfloat16"},
    }
    report = Report(Results.model_validate(data))
    ((_, entries), *_) = cells.arithmetic(report).rows
    shown = ["native", "bfloat16", "8 bits in blocks of 32", "bfloat16", "float32"]
    assert [entry.text for entry in entries] == shown
    assert "8 bits in blocks of 32" in to_html(report, {})
    assert "## Arithmetic" in to_markdown(report, {})


def test_seeds_have_a_mean_and_student_s_interval() -> None:
    cell = made_up_cell("gates", decode=30.0, disk=270.0, ratio=1.1, saved=0.2)
    others = [made_up_cell("gates", decode=1.0, disk=1.0, ratio=r, saved=0.2) for r in (1.2, 1.3)]
    cell["seeds"] = [
        {"seed": n, "quality": other["quality"], "compute": other["compute"]}
        for n, other in enumerate(others, 1)
    ]
    results = made_up_results() | {"cells": [made_up_results()["cells"][0], cell]}
    report = Report(Results.model_validate(results))
    table = cells.seeds(report)
    ((row, entries),) = table.rows
    assert row.cell.name == "gates"
    shown = {column.head: entry for column, entry in zip(table.columns, entries, strict=True)}
    assert shown["Seeds"].text == "3"
    assert shown["Perplexity"].text == "1.200"
    assert shown["Perplexity"].note == "± 0.248"  # 4.303 standard errors of 0.1 / sqrt(3)
    assert shown["Saved"].note == "± 0.0"
    assert "± 0.248" in to_html(report, {})
    assert "± 0.248" in to_markdown(report, {})


def test_a_speculative_cell_has_the_quality_of_its_plain_cell(report: Report) -> None:
    rows = {row.cell.name: row for row in report.rows}
    own, plain = rows["gates+gptq4+spec"], rows["gates+gptq4"]
    assert own.values["retained"] == plain.values["retained"]
    assert own.values["perplexity-ratio"] == plain.values["perplexity-ratio"]


def test_absent_is_a_dash_and_never_zero() -> None:
    data = made_up_results()
    data["cells"][1] = {"name": "nf4", "chain": ["nf4"], "status": "ok"}
    report = Report(Results.model_validate(data))
    table = cells.overview(report)
    entries = next(entries for row, entries in table.rows if row.cell.name == "nf4")
    assert {entry.text for entry in entries} == {"–"}
    assert 'title="not measured">–<' in to_html(report, {})


def test_columns_that_nothing_fills_are_named_once() -> None:
    data = made_up_results()
    for cell in data["cells"]:
        cell.get("speed", {}).pop("prefill_tokens_per_s", None)
    report = Report(Results.model_validate(data))
    table = cells.overview(report)
    assert "Prefill (tok/s)" in table.absent
    assert all(column.head != "Prefill" for column in table.columns)


def test_the_same_numbers_in_both_reports(report: Report) -> None:
    words, markdown = Page(to_html(report, {})).words, to_markdown(report, {})
    for table in (cells.overview(report), cells.quality(report), cells.speed(report)):
        for _, entries in table.rows:
            for entry in entries:
                assert " ".join(entry.text.split()) in words
                assert escape_markdown(entry.text) in markdown


@pytest.mark.parametrize(
    "cells",
    [
        [],
        [{"name": "dense", "chain": [], "status": "ok"}],
        [{"name": "dense", "chain": [], "status": "failed"}],
        [{"name": "a", "chain": ["a"], "status": "left-out"}],
        [{"name": "a+spec", "chain": ["a", "spec"], "status": "ok", "speculation": {}}],
        [
            made_up_cell("dense", decode=20, disk=10, ratio=1),
            made_up_cell("nf4", decode=20, disk=10, ratio=1),
        ],
    ],
)
def test_a_poor_run_still_makes_a_report(cells: list[dict[str, Any]]) -> None:
    data = {"schema_version": 3, "run": "poor", "cells": cells}
    report = Report(Results.model_validate(data))
    Page(to_html(report, pictures(report)))
    assert "# poor" in to_markdown(report, {})


def test_any_field_may_be_absent() -> None:
    """Take away one part of every cell at a time; the report stays whole."""
    for part in ("steps", "size", "speed", "compute", "quality", "speculation", "training"):
        data = made_up_results()
        for cell in data["cells"]:
            cell.pop(part, None)
        report = Report(Results.model_validate(data))
        Page(to_html(report, {}))
        assert to_markdown(report, {})


def test_without_tasks_quality_is_judged_by_perplexity() -> None:
    data = made_up_results()
    for cell in data["cells"]:
        cell.get("quality", {}).pop("tasks", None)
    report = Report(Results.model_validate(data))
    row = next(row for row in report.rows if row.cell.name == "gptq4")
    assert row.values["retained"] == pytest.approx(1 / 1.061)
    assert "this run asked no questions" in to_html(report, {})


# --- comparing runs ------------------------------------------------------------------------------


def test_a_comparison_says_what_became_worse_in_every_format(tmp_path: Path) -> None:
    before, after = (with_evidence(made_up_results()) for _ in range(2))
    after["run"] = "later"
    after["cells"][2]["speed"]["decode_ratio"] = estimate(0.7)
    after["cells"][1]["size"]["disk_bytes"] //= 2
    runs = [Results.model_validate(data) for data in (before, after)]
    done = compare_runs(runs, tmp_path)
    (pair,) = done.pairs
    assert [(change.cell, change.metric) for change in pair.regressions] == [("gptq4", "decode")]
    assert "1 worse, 1 better" in line(pair)
    page = Page(done.html.read_text("utf-8")).words
    for text in (page, done.markdown.read_text("utf-8")):
        assert "×0.70" in text
        assert "×1.32" in text
        assert "114.2 MB" in text
    (record,) = json.loads(done.json.read_text("utf-8"))
    worse = [change for change in record["changes"] if change["outcome"] == "worse"]
    assert worse[0]["after"] == 0.7
    assert worse[0]["effect"]["high"] < 1


def test_two_of_the_same_runs_differ_in_nothing(tmp_path: Path) -> None:
    results = Results.model_validate(with_evidence(made_up_results()))
    (pair,) = compare_runs([results, results], tmp_path).pairs
    assert {change.outcome for change in pair.changes} == {"no difference", "not comparable"}


def test_runs_with_nothing_in_common_are_said_to_have_nothing(tmp_path: Path) -> None:
    runs = [Results(run=name, cells=()) for name in ("a", "b")]
    done = compare_runs(runs, tmp_path)
    assert "nothing in common" in done.html.read_text("utf-8")
    assert "nothing in common" in done.markdown.read_text("utf-8")


# --- escaping ------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def nasty() -> tuple[Report, dict[str, Picture]]:
    """A report in which every text is an attack, and its pictures."""
    data = made_up_results()
    for key in ("run", "command", "model", "dtype", "pipeline"):
        data[key] = NASTY
    data["notes"] = [NASTY]
    data["environment"] = {"processor": NASTY, NASTY: NASTY, "date": NASTY}
    spec = data["cells"][11]
    spec.update(name=NASTY, chain=[NASTY], notes=[NASTY], aliases=[NASTY + "2"])
    spec["steps"] = [{"name": NASTY, "use": "bnb", "format": NASTY}]
    spec["training"] = {NASTY: [{"step": 0, "loss": 1.0}, {"step": 1, "loss": 0.5}]}
    for index, name in ((1, "$\\frac$"), (2, "\x00\x1b<&"), (3, "名前"), (6, "a" * 90)):
        data["cells"][index]["name"] = name
    quality = data["cells"][0]["quality"]
    quality["perplexity"]["dataset"] = NASTY
    quality["tasks"][NASTY] = {"metric": NASTY, "value": 0.5}
    quality["own_answers"] = {"questions": [NASTY], "texts": [NASTY]}
    data["cells"][1]["quality"]["own_answers"] = {"texts": [f"{NASTY}</mark></dl>```\x1b[31m"]}
    data["cells"][-1].update(rule=NASTY, reason=NASTY)
    data["cells"][16].update(
        reason=NASTY, failed_in=NASTY, traceback=f"{NASTY}</pre>```\n````\x1b[31m"
    )
    report = Report(Results.model_validate(data))
    return report, pictures(report)


def test_the_page_escapes_everything(nasty: tuple[Report, dict[str, Picture]]) -> None:
    text = to_html(*nasty)
    page = Page(text)
    assert "<img src=x" not in text
    assert not [a for tag, a in page.tags if "onerror" in a]
    assert sum(tag == "script" for tag, _ in page.tags) == 1
    assert NASTY in "".join(page.text)
    assert "\x1b" not in text


def test_only_our_script_may_run(report: Report) -> None:
    page = Page(to_html(report, {}))
    policy = next(a["content"] for tag, a in page.tags if tag == "meta" and "http-equiv" in a)
    assert policy is not None and "default-src 'none'" in policy and "script-src 'sha256-" in policy


def test_markdown_escapes_everything(nasty: tuple[Report, dict[str, Picture]]) -> None:
    text = to_markdown(*nasty)
    outside = re.sub(r"(`{3,})\w*\n.*?\n\1", "", text, flags=re.S)
    assert "<img" not in outside
    lines = outside.splitlines()
    for above, below in pairwise(lines):
        if above.startswith("| ") and below.startswith("| "):  # rows of one table are as wide
            assert _pipes(above) == _pipes(below)


def _pipes(line: str) -> int:
    return re.sub(r"\\.", "", line).count("|")


def test_pictures_hold_any_name(nasty: tuple[Report, dict[str, Picture]]) -> None:
    for picture in nasty[1].values():
        ET.fromstring(picture.inline["narrow"])
        ET.fromstring(picture.svg)


def test_a_fence_outgrows_what_it_holds() -> None:
    assert fenced("a\n````\nb") == "`````\na\n````\nb\n`````"


def test_names_break_after_a_plus() -> None:
    assert breakable("a+<b>") == "a+<wbr>&lt;b&gt;"


# --- fronts and numbers --------------------------------------------------------------------------

coordinate = st.integers(min_value=-4, max_value=4).map(float)


@given(st.lists(st.tuples(coordinate, coordinate), max_size=14))
def test_pareto_is_what_its_definition_says(points: list[tuple[float, float]]) -> None:
    def beaten(a: tuple[float, float]) -> bool:
        return any(b != a and b[0] >= a[0] and b[1] >= a[1] for b in points)

    assert set(pareto(points)) == {i for i, p in enumerate(points) if not beaten(p)}
    assert pareto(points) == sorted(pareto(points), key=lambda i: points[i])


@pytest.mark.parametrize(
    ("value", "text"),
    [
        (0.0, "0.000"),
        (0.0341, "0.034"),
        (1.618, "1.62"),
        (23.44, "23.4"),
        (412.4, "412"),
        (12_437, "12\u202f400"),
        (999.7, "1000"),
        (1_234_567, "1\u202f230\u202f000"),
        (3.2e9, "3.2e+09"),
    ],
)
def test_numbers_have_three_digits(value: float, text: str) -> None:
    assert PAGE.number(value) == text


@pytest.mark.parametrize(
    ("metric", "value", "expected"),
    [
        ("retained", 0.95, "good"),
        ("retained", 0.9, "fair"),
        ("retained", 0.3, "poor"),
        ("perplexity-ratio", 1.01, "good"),
        ("perplexity-ratio", 2.0, "poor"),
        ("decode", 1.0, None),
    ],
)
def test_tones(metric: str, value: float, expected: str | None) -> None:
    assert tone(metric, value) == expected


def test_a_histogram_has_no_gaps() -> None:
    data = made_up_results()
    data["cells"][5]["speculation"]["draft_length_histogram"] = {"1": 2, "4": 8}
    report = Report(Results.model_validate(data))
    row = next(row for row in report.rows if row.cell.name == "gates+spec")
    assert timed_histogram(row).bars == ((1, 2, 0.25), (2, 0, 0.0), (3, 0, 0.0), (4, 8, 1.0))


def test_names_cover_neither_marks_nor_each_other() -> None:
    """Six marks in a heap and one alone; a name without a line stands at its own mark."""
    centres = [(200.0 + 15 * k, 150.0 + 4 * (k % 2)) for k in range(6)] + [(60.0, 60.0)]
    wanted = [Name(mark, 70.0, 11.0) for mark in range(7)]
    limits = (0.0, 0.0, 500.0, 300.0)
    placed = best_places(wanted, centres, limits, 4 / 3)
    assert placed.keys() == set(range(7)) and not placed[6].leader
    boxes = []
    for mark, place in placed.items():
        x, y = centres[mark]
        left = x + place.dx * 4 / 3 - 70 * {"left": 0, "center": 0.5, "right": 1}[place.ha]
        low = y + place.dy * 4 / 3 - 11 * {"bottom": 0, "center": 0.5, "top": 1}[place.va]
        boxes.append((left, low, left + 70, low + 11))
        assert all(not (left < a < left + 70 and low < b < low + 11) for a, b in centres)
        assert left >= 0 and left + 70 <= 500 and low >= 0 and low + 11 <= 300
    for place, a in enumerate(boxes):
        for b in boxes[:place]:
            assert a[0] >= b[2] or b[0] >= a[2] or a[1] >= b[3] or b[1] >= a[3]
    assert best_places(wanted, centres, (0.0, 0.0, 60.0, 300.0), 4 / 3) == {}, "no room at all"


def test_marks_that_coincide_in_a_chain_are_all_apart() -> None:
    spots = [(100.0, 50.0), (110.0, 50.0), (120.0, 50.0), (131.0, 50.0)]
    moved = sorted(x + shift for (x, _), shift in zip(spots, apart(spots), strict=True))
    assert all(right - left >= 13 for left, right in pairwise(moved))


def test_marks_that_coincide_stand_side_by_side_in_their_order() -> None:
    spots = [(100.0, 50.0), (98.0, 51.0), (300.0, 50.0)]
    shifts = side_by_side(spots, apart=14.0)
    moved = [x + shift for (x, _), shift in zip(spots, shifts, strict=True)]
    assert moved == [106.0, 92.0, 300.0]


def test_the_report_says_where_speculation_spends_its_time() -> None:
    data = made_up_results()
    data["cells"][5]["speculation"] |= {"draft_s": 1.0, "verify_s": 3.0}
    page = to_markdown(Report(Results.model_validate(data)), {})
    table = page[page.index("Drafting") :]
    assert "25" in table[: table.index("\n\n")]
