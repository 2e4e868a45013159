"""Reports are drawn from results alone: everything shown, everything escaped, nothing missing.

The results here are test data, made in code; no number in them was measured.
"""

from __future__ import annotations

import base64
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

from compose.errors import UserError
from compose.results.io import save_results
from compose.results.schema import Results
from reports import Report, pareto, render, tables
from reports.columns import tone
from reports.numbers import number
from reports.plots import Picture, pictures
from reports.plots.scatter import side_by_side
from reports.render import breakable, escape_markdown, fenced, to_html, to_markdown

NASTY = "<img src=x onerror=alert(1)>&amp;\"'`|$x$*_[a](b)#"


def measured(median: float, spread: float = 0.02) -> dict[str, Any]:
    """A median with five repeats around it."""
    return {"median": median, "repeats": [median * (1 + spread * k) for k in (0, -1, 0.4, 1, -0.3)]}


def made_up_cell(
    name: str,
    *,
    decode: float,
    disk: float,
    ratio: float,
    accuracy: float = 1.0,
    saved: float | None = None,
    speculation: dict[str, Any] | None = None,
    **more: Any,
) -> dict[str, Any]:
    """A measured cell; `disk` in MB, `ratio` of perplexity and `accuracy` against dense."""
    chain = [] if name == "dense" else name.split("+")
    uses: dict[str, tuple[str, dict[str, Any]]] = {
        "gates": ("gate", {"kind": "scalar", "budget": 0.8}),
        "nf4": ("bnb", {"format": "nf4"}),
        "gptq4": ("gptq", {"bits": 4, "group_size": 64}),
        "skip80": ("skip", {"budget": 0.8}),
        "spec": ("speculate", {"draft_budget": 0.5, "draft_length": "auto"}),
        "narrow": ("prune-width", {"ratio": 0.2}),
        "heal": ("heal", {"steps": 200}),
        "drop3": ("drop-layers", {"count": 3}),
    }
    scores = {"arc_easy": 0.512, "piqa": 0.668, "lambada_openai": 0.421}
    tasks = {}
    for task, dense in scores.items():
        value = dense * accuracy
        half = 1.96 * math.sqrt(value * (1 - value) / 500)
        tasks[task] = {
            "metric": "acc" if task == "lambada_openai" else "acc_norm",
            "value": value,
            "n": 500,
            "ci95": [value - half, value + half],
        }
    cell: dict[str, Any] = {
        "name": name,
        "chain": chain,
        "status": "ok",
        "steps": [{"name": n, "use": uses[n][0], **uses[n][1]} for n in chain if n in uses],
        "size": {
            "disk_bytes": round(disk * 1e6),
            "resident_bytes": round(disk * 1.08e6),
            "peak_bytes": round(disk * 1e6 + 410e6),
        },
        "speed": {
            "decode_tokens_per_s": measured(decode),
            "prefill_tokens_per_s": measured(decode * 31, 0.01),
            "ttft_s": measured(4.1 / decode),
            "by_batch": {"8": {"decode_tokens_per_s": measured(decode * 4.2)}},
        },
        "quality": {
            "perplexity": {"dataset": "wikitext2", "value": 21.4 * ratio, "tokens": 8192},
            "kl_to_baseline": 0.9 * math.log(ratio) if ratio > 1 else 0.0,
            "greedy_agreement": 1 / ratio**0.8,
            "tasks": tasks,
        },
    }
    cell["quality"]["perplexity"]["ratio_to_baseline"] = ratio
    if saved is not None:
        cell["compute"] = {
            "saved_gross": saved + 0.01,
            "saved_net": saved,
            "saved_model": saved * 0.79,
        }
    if speculation is not None:
        cell["lossless_check"] = {"lossless": True, "prompts": 16, "tokens": 1024}
        cell["lossless_check"] |= {k: speculation.pop(k) for k in CHECKED & speculation.keys()}
        cell["speculation"] = {"speedup": 1.2, **speculation}
        cell["quality_of"] = name.removesuffix("+spec")
        del cell["quality"]
    if chain and chain[-1] in ("spec", "skip80"):
        cell["plain"] = "+".join(chain[:-1]) or "dense"
    return cell | more


CHECKED = {"lossless", "prompts", "tokens", "first_divergence"}


def made_up_results() -> dict[str, Any]:
    """A run with every kind of cell: measured, speculative, pruned, ruined, failed, left out."""

    def spec(rate: float, mean: float, speedup: float, **more: Any) -> dict[str, Any]:
        lengths = {0: 41, 1: 122, 2: 310, 3: 284, 4: 133, 5: 60, 6: 17}
        return {
            "acceptance_rate": rate,
            "mean_accepted_tokens": mean,
            "speedup": speedup,
            "draft_length_histogram": {str(k): v for k, v in lengths.items()},
            **more,
        }

    near_tie = {"prompt": 11, "position": 37, "margin": 0.0031}
    curve = [
        {
            "step": step,
            "loss": 0.42 * math.exp(-step / 110) + 0.11 + 0.02 * math.sin(step),
            **({"valid": 0.40 * math.exp(-step / 120) + 0.13} if step % 50 == 0 else {}),
        }
        for step in range(0, 301, 10)
    ]
    heal = [{"step": s, "loss": 2.2 * math.exp(-s / 60) + 0.35} for s in range(0, 201, 10)]
    cells = [
        made_up_cell("dense", decode=23.6, disk=269.1, ratio=1.0),
        made_up_cell("nf4", decode=29.8, disk=114.2, ratio=1.082, accuracy=0.972),
        made_up_cell("gptq4", decode=31.2, disk=109.8, ratio=1.061, accuracy=0.981),
        made_up_cell("gates", decode=23.1, disk=269.4, ratio=1.004, accuracy=0.998, saved=0.0)
        | {"training": {"gates": curve}},
        made_up_cell(
            "gates+skip80", decode=28.7, disk=269.4, ratio=1.121, accuracy=0.957, saved=0.181
        ),
        made_up_cell(
            "gates+spec", decode=27.9, disk=269.4, ratio=1.0, speculation=spec(0.71, 2.31, 1.21)
        ),
        made_up_cell("gates+nf4", decode=29.2, disk=114.5, ratio=1.087, accuracy=0.969, saved=0.0),
        made_up_cell(
            "gates+nf4+skip80", decode=35.9, disk=114.5, ratio=1.229, accuracy=0.921, saved=0.180
        ),
        made_up_cell(
            "gates+nf4+spec",
            decode=31.8,
            disk=114.5,
            ratio=1.0,
            speculation=spec(
                0.64, 2.05, 1.09, lossless=False, first_divergence=near_tie, tokens=1016
            ),
        ),
        made_up_cell(
            "gates+gptq4", decode=30.6, disk=110.1, ratio=1.066, accuracy=0.979, saved=0.0
        ),
        made_up_cell(
            "gates+gptq4+skip80",
            decode=38.4,
            disk=110.1,
            ratio=1.192,
            accuracy=0.938,
            saved=0.181,
            notes=["one repeat ran beside another process"],
        ),
        made_up_cell(
            "gates+gptq4+spec",
            decode=43.1,
            disk=110.1,
            ratio=1.0,
            speculation=spec(0.78, 2.94, 1.41),
        ),
        made_up_cell("drop3", decode=26.1, disk=248.0, ratio=1.412, accuracy=0.861, saved=0.1),
        made_up_cell(
            "narrow+heal+gates+gptq4+spec",
            decode=46.7,
            disk=98.7,
            ratio=1.0,
            speculation=spec(0.69, 2.44, 1.33),
            aliases=["shipped"],
            training={"heal": heal},
        ),
        made_up_cell(
            "narrow+heal+gates+gptq4",
            decode=35.1,
            disk=98.7,
            ratio=1.338,
            accuracy=0.884,
            saved=0.12,
        ),
        made_up_cell("narrow", decode=26.8, disk=240.1, ratio=812.0, accuracy=0.41, saved=0.12),
    ]
    failed = {
        "name": "drop3+gates",
        "chain": ["drop3", "gates"],
        "status": "failed",
        "failed_in": "gates",
        "reason": "RuntimeError: the loss was not finite at step 40",
        "traceback": "Traceback (most recent call last):\n"
        '  File "compose/workers/main.py", line 88, in step\n    record = stage.run(job)\n'
        "RuntimeError: the loss was not finite at step 40\n",
    }
    rules = {
        "decode-needs-gates": (
            "skip has no gates to decide by: a gate stage must come before.",
            ["skip80", "spec", "nf4+skip80", "nf4+spec", "gptq4+skip80", "gptq4+spec"],
        ),
        "excluded": ("excluded by the pipeline file.", ["drop3+nf4"]),
    }
    left_out = [
        {
            "name": name,
            "chain": name.split("+"),
            "status": "left-out",
            "rule": rule,
            "reason": reason,
        }
        for rule, (reason, names) in rules.items()
        for name in names
    ]
    return {
        "schema_version": 3,
        "run": "made-up-for-tests",
        "baseline": "dense",
        "command": "gateskip run pipelines/made-up.yaml --out runs",
        "model": "a made-up model",
        "dtype": "bfloat16",
        "seconds": 1930.0,
        "pipeline": "schema: 1\nname: made-up-for-tests\n",
        "environment": {
            "processor": "A processor for tests",
            "threads": 2,
            "memory_bytes": 25_000_000_000,
            "versions": {"torch": "2.13.0", "transformers": "5.24.0"},
            "git_commit": "0123abc",
            "platform": "Linux",
            "date": "2026-11-24T17:00:00+00:00",
        },
        "cells": [*cells, failed, *left_out],
    }


@pytest.fixture(scope="module")
def report() -> Report:
    return Report(Results.model_validate(made_up_results()))


@pytest.fixture(scope="module")
def drawn(report: Report) -> dict[str, Picture]:
    return pictures(report)


class Page(HTMLParser):
    """Collects tags, text and attributes, and checks that tags close in order."""

    VOID = frozenset({"meta", "img", "source", "wbr", "br"})

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
    assert len(linked) == 5
    assert {p.name for p in (tmp_path / "report-files").iterdir()} == {Path(p).name for p in linked}
    for link in linked:
        assert (tmp_path / link).read_bytes().startswith(b"\x89PNG")
    page = Page(done.html.read_text("utf-8"))
    assert done.html.read_text("utf-8") == to_html(report, drawn)
    assert not list(tmp_path.rglob(".*"))
    for cell in made_up_results()["cells"]:
        assert cell["name"] in page.words
        assert escape_markdown(cell["name"]) in markdown


def test_the_page_needs_nothing_else(report: Report, drawn: dict[str, Picture]) -> None:
    text = to_html(report, drawn)
    page = Page(text)
    links = [v for _, a in page.tags for k, v in a.items() if k in ("src", "href", "srcset")]
    assert links
    assert all(link and link.startswith(("data:image/svg+xml;base64,", "#")) for link in links)
    anchors = {link[1:] for link in links if link and link.startswith("#")}
    assert anchors <= {a["id"] for _, a in page.tags if "id" in a}
    assert "url(" not in text
    assert len(text) < 3_000_000


def test_pictures_are_sound_and_use_the_reader_s_fonts(drawn: dict[str, Picture]) -> None:
    assert list(drawn) == ["front-decode", "front-size", "accuracy", "repeats", "training"]
    for picture in drawn.values():
        assert set(picture.sources) == {
            f"{theme}-{width}" for theme in ("light", "dark") for width in ("wide", "narrow")
        }
        for source in picture.sources.values():
            svg = base64.b64decode(source.partition(",")[2]).decode("utf-8")
            ET.fromstring(svg)
            assert "DejaVu" not in svg


def test_missing_results_are_the_user_s_mistake(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"results\.json"):
        render(tmp_path, tmp_path)


# --- what is shown -------------------------------------------------------------------------------


def test_the_summary_names_the_winners(report: Report) -> None:
    fastest, smallest, lossless = report.best
    assert fastest.row is not None and fastest.row.cell.name == "gates+gptq4+spec"
    assert smallest.row is not None and smallest.row.cell.size is not None
    assert smallest.row.cell.size.disk_bytes == 98_700_000
    assert "gptq4, 110\u202fMB" in smallest.note
    assert lossless.row is not None
    assert lossless.row.cell.name == "narrow+heal+gates+gptq4+spec"


def test_a_cell_that_is_not_lossless_shows_where(report: Report) -> None:
    words = Page(to_html(report, {})).words
    assert "First differs at prompt 11, token 37, margin 0.0031." in words
    assert "Not lossless" in words


def test_failures_and_left_out_cells_say_why(report: Report) -> None:
    words = Page(to_html(report, {})).words
    markdown = to_markdown(report, {})
    for text in (words, markdown):
        assert "the loss was not finite at step 40" in text
        assert "decode-needs-gates" in text
        assert "stage.run(job)" in text
    assert len(report.left_out) == 2
    assert "16 cells measured, 1 failed, 7 left out" in words


def test_the_arithmetic_of_each_cell_is_shown() -> None:
    data = made_up_results()
    used = {"backend": "native", "weights": "bfloat16", "accumulation": "float32"}
    data["cells"][0] |= {
        "arithmetic": used | {"activations": "8 bits in blocks of 32"},
        "scoring_arithmetic": used | {"activations": "bfloat16"},
    }
    report = Report(Results.model_validate(data))
    ((_, entries), *_) = tables.arithmetic(report).rows
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
    table = tables.seeds(report)
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
    table = tables.overview(report)
    entries = next(entries for row, entries in table.rows if row.cell.name == "nf4")
    assert {entry.text for entry in entries} == {"–"}
    assert 'title="not measured">–<' in to_html(report, {})


def test_columns_that_nothing_fills_are_named_once() -> None:
    data = made_up_results()
    for cell in data["cells"]:
        cell.get("speed", {}).pop("prefill_tokens_per_s", None)
    report = Report(Results.model_validate(data))
    table = tables.overview(report)
    assert "Prefill (tok/s)" in table.absent
    assert all(column.head != "Prefill" for column in table.columns)


def test_the_same_numbers_in_both_reports(report: Report) -> None:
    words, markdown = Page(to_html(report, {})).words, to_markdown(report, {})
    for table in (tables.overview(report), tables.quality(report), tables.speed(report)):
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
    assert "no tasks were asked" in to_html(report, {})


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
    for above, line in pairwise(lines):
        if above.startswith("| ") and line.startswith("| "):  # rows of one table are as wide
            assert _pipes(above) == _pipes(line)


def _pipes(line: str) -> int:
    return re.sub(r"\\.", "", line).count("|")


def test_pictures_hold_any_name(nasty: tuple[Report, dict[str, Picture]]) -> None:
    for picture in nasty[1].values():
        ET.fromstring(base64.b64decode(picture.sources["dark-wide"].partition(",")[2]))


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
    assert number(value) == text


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
    assert tables.histogram(row).bars == ((1, 2, 0.25), (2, 0, 0.0), (3, 0, 0.0), (4, 8, 1.0))


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
