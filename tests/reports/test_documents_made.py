"""Tables and figures that documents take from results files."""

from __future__ import annotations

import subprocess
from pathlib import Path
from typing import Any

import pytest
from stale import changed_since

from compose import store
from compose.errors import UserError
from compose.planning.fingerprint import PACKAGES
from compose.results.io import save_results
from compose.results.parts import (
    Compute,
    Estimate,
    LosslessCheck,
    Measured,
    Peer,
    Perplexity,
    Quality,
    SeedRun,
    Size,
    Speculation,
    Speed,
    SpeedNumbers,
    TaskScore,
    TextCompute,
    Verdict,
)
from compose.results.schema import CellResult, Results
from reports.documents import __main__ as command
from reports.documents.figures import figure
from reports.documents.markers import fill, outside, unfinished
from reports.documents.provenance import missing_provenance
from reports.documents.publish import compact
from reports.documents.tables import TABLES

MEASURED_BY = {"load": "0123456789abcdef", "quality": "0123456789abcdef"}


def speed(median: float, ratio: Estimate | None = None) -> Speed:
    repeats = (median - 10, median, median + 20)
    decode = Measured(median=median, quartiles=(median - 5, median + 10), repeats=repeats)
    return Speed(decode_tokens_per_s=decode, decode_ratio=ratio, by_batch={8: SpeedNumbers()})


def scored(ratio: float, kl: float | None, written: float) -> Quality:
    text = Perplexity(
        dataset="heldout-text",
        value=20 * ratio,
        tokens=8176,
        ratio_to_baseline=ratio,
        ratio_ci95=(ratio - 0.02, ratio + 0.02),
    )
    tasks = {
        "arc_easy": TaskScore(metric="acc", value=0.466, n=500, kind="likelihood"),
        "arithmetic": TaskScore(
            metric="exact_match", value=written, n=500, ci95=(0.1, 0.2), kind="generative"
        ),
    }
    return Quality(perplexity=text, kl_to_baseline=kl, tasks=tasks)


@pytest.fixture
def results() -> Results:
    faster = Estimate(value=3.9, low=3.8, high=4.02, n=5, different=True)
    same = Estimate(value=1.01, low=0.97, high=1.05, n=5, different=False)
    return Results(
        run="peers",
        environment={
            "processor": "Some Xeon",
            "threads": 2,
            "versions": {"torch": "2.13", "gateskip-compose": "0.1.0"},
            "git_commit": "0123456789abcdef",
            "date": "2026-11-26T12:00:00",
        },
        command="gateskip run pipelines/peers.yaml",
        cells=(
            CellResult(
                name="dense",
                chain=(),
                status="ok",
                fingerprint=MEASURED_BY,
                speed=speed(96.0),
                size=Size(disk_bytes=269_000_000),
                quality=scored(1.0, None, 0.204),
            ),
            CellResult(
                name="nf4",
                chain=("nf4",),
                status="ok",
                fingerprint=MEASURED_BY,
                speed=speed(375.0, faster),
                size=Size(disk_bytes=117_400_000),
                quality=scored(1.44, 0.415, 0.086),
                compute=Compute(saved_net=0.151),
                verdict=Verdict(verdict="REGRESSION", why="it writes less well"),
            ),
            CellResult(
                name="spec",
                chain=("spec",),
                status="ok",
                fingerprint=MEASURED_BY,
                speed=speed(97.0, same),
                quality_of="dense",
                plain="dense",
                lossless_check=LosslessCheck(lossless=True, prompts=16, tokens=1024),
                speculation=Speculation(
                    draft_length_histogram={3: 1, 0: 27},
                    plain_steps=27 / 28,
                    fell_back=True,
                    speedup=1.01,
                    speedup_ci95=(0.97, 1.05),
                ),
            ),
            CellResult(
                name="llama.cpp:q4_k_m",
                chain=(),
                status="ok",
                fingerprint=MEASURED_BY,
                speed=speed(140.0, faster),
                size=Size(disk_bytes=105_000_000),
                quality=scored(1.09, 0.104, 0.168),
                peer=Peer(engine="llama.cpp", option="q4_k_m", settings="flash attention off"),
            ),
        ),
    )


def test_speed_stands_beside_quality_and_falls_with_it(results: Results) -> None:
    lines = TABLES["speed-at-equal-quality"](results)
    assert lines == [
        "|  | perplexity, x dense | KL | arithmetic | MB | decode, tok/s | x dense |",
        "| --- | --- | --- | --- | --- | --- | --- |",
        "| `spec` | 1.00 (0.980 to 1.02) | – | 20.4 (10.0 to 20.0) | – | 97.0 (92.0 to 107) |"
        " no difference (0.970 to 1.05) |",
        "| `dense` | 1 | 0 | 20.4 (10.0 to 20.0) | 269 | 96.0 (91.0 to 106) | – |",
        "| `llama.cpp:q4_k_m` | 1.09 (1.07 to 1.11) | 0.104 | 16.8 (10.0 to 20.0) | 105 |"
        " 140 (135 to 150) | 3.90x (3.80 to 4.02) |",
        "| `nf4` | 1.44 (1.42 to 1.46) | 0.415 | 8.60 (10.0 to 20.0) | 117 |"
        " 375 (370 to 385) | 3.90x (3.80 to 4.02) |",
    ]


def test_a_glance_has_no_intervals(results: Results) -> None:
    lines = TABLES["glance"](results, cells="dense,nf4,llama.cpp:q4_k_m")
    assert lines == [
        "|  | perplexity, x dense | KL | MB | decode, tok/s | decode, x dense |",
        "| --- | --- | --- | --- | --- | --- |",
        "| `dense` | 1 | 0 | 269 | 96.0 | 1 |",
        "| `llama.cpp:q4_k_m` | 1.09 | 0.104 | 105 | 140 | 3.90 |",
        "| `nf4` | 1.44 | 0.415 | 117 | 375 | 3.90 |",
    ]


def test_each_row_says_which_text_it_saw(results: Results) -> None:
    seen = {"dense": (), "nf4": ("calibration-text", "sums"), "llama.cpp:q4_k_m": None}
    cells = [
        cell.model_copy(update={"fitted_to": seen[cell.name]})
        for cell in results.cells
        if cell.name in seen
    ]
    stated = results.model_copy(update={"cells": tuple(cells)})
    for name in ("glance", "speed-at-equal-quality"):
        lines = TABLES[name](stated)
        assert [line.split(" | ")[-1] for line in lines] == [
            *("calibrated on |", "--- |", "no text |", "– |", "calibration-text, sums |")
        ]


def test_what_is_written_stands_beside_what_it_saved(results: Results) -> None:
    task = TaskScore(
        metric="f1",
        value=0.3,
        n=200,
        kind="generative",
        retained=0.9,
        retained_ci95=(0.8, 0.95),
        compute=TextCompute(tokens=900, kept=0.83, saved_net=0.152),
    )
    kept = Estimate(value=0.91, low=0.85, high=0.96, n=200, different=True)
    cell = CellResult(
        name="read83",
        chain=("gates", "read83"),
        status="ok",
        quality=Quality(tasks={"squad": task}, written_retained=kept),
    )
    whole = task.model_copy(update={"compute": None})
    cut = cell.model_copy(
        update={
            "name": "dropped",
            "compute": Compute(saved_net=0.167),
            "quality": Quality(tasks={"squad": whole}, written_retained=kept),
        }
    )
    cells = (*results.cells[:1], cell, cut)
    lines = TABLES["written"](results.model_copy(update={"cells": cells}))
    assert lines == [
        "|  | squad, kept | saved | mean kept |",
        "| --- | --- | --- | --- |",
        "| `read83` | 90.0 % (80.0 to 95.0) | 15.2 % | 91.0 % (85.0 to 96.0) |",
        "| `dropped` | 90.0 % (80.0 to 95.0) | 16.7 % | 91.0 % (85.0 to 96.0) |",
    ]


def test_prompts_stand_beside_the_plain_cell_of_the_same_weights(results: Results) -> None:
    def read(*repeats: float) -> Measured:
        return Measured(median=repeats[1], quartiles=(repeats[0], repeats[2]), repeats=repeats)

    def cell(name: str, plain: str | None, by: float, ratio: Estimate | None = None) -> CellResult:
        own = {128: read(100.0, 110.0, 90.0), 512: read(200.0, 190.0, 210.0)}
        fast = {n: read(*(by * x for x in each.repeats)) for n, each in own.items()}
        longer = SpeedNumbers(prefill_tokens_per_s=fast[512])
        first = Speed(prefill_tokens_per_s=fast[128], prefill_ratio=ratio, by_context={512: longer})
        return CellResult(name=name, chain=(), status="ok", speed=first, plain=plain)

    ratio = Estimate(value=2.4, low=2.3, high=2.5, n=3, different=True)
    cells = (cell("int8", None, 2.0), cell("int8+read80", "int8", 2.4, ratio))
    made = results.model_copy(
        update={"cells": cells, "benchmark": {"speed": {"prompt_tokens": 128}}}
    )
    head, _, plain, skips = TABLES["prompts"](made)
    assert head.count("x plain") == 2 > head.count("x dense")  # a column of nothing is left out
    assert "| 128 tokens, tok/s |" in head
    assert plain == "| `int8` | 220 (200 to 180) | – | – | 380 (400 to 420) | – |"
    assert "264 (240 to 216) | 2.40x (2.30 to 2.50) | 1.20x (1.20 to 1.20) |" in skips
    assert skips.endswith("456 (480 to 504) | 1.20x (1.20 to 1.20) |")


def test_decoding_has_a_column_for_each_shape(results: Results) -> None:
    ratio = Estimate(value=2.0, low=1.8, high=2.2, n=5, different=True)

    def numbers(tokens: float) -> dict[str, Any]:
        found = Measured(median=tokens, quartiles=(tokens, tokens), repeats=(tokens,))
        return {"decode_tokens_per_s": found, "decode_ratio": ratio}

    batches = {32: SpeedNumbers(**numbers(300)), 8: SpeedNumbers(**numbers(200))}
    later = {2048: SpeedNumbers(**numbers(50))}
    speed = Speed(**numbers(100), by_batch=batches, by_context=later)
    cell = CellResult(name="int8", chain=(), status="ok", speed=speed)
    head, _, line = TABLES["decoding"](results.model_copy(update={"cells": (cell,)}))
    shapes = ("1 row", "8 rows", "32 rows", "after 2048 tokens")
    assert head == f"|  | {' | '.join(f'{each}, tok/s | x dense' for each in shapes)} |"
    two = "2.00x (1.80 to 2.20)"
    speeds = " | ".join(f"{n} ({n} to {n}) | {two}" for n in ("100", "200", "300", "50.0"))
    assert line == f"| `int8` | {speeds} |"


def test_seeds_have_their_mean_and_the_ends_of_its_interval(results: Results) -> None:
    def cell(ratio: float, kl: float) -> Quality:
        return Quality(
            perplexity=Perplexity(dataset="text", value=ratio, ratio_to_baseline=ratio),
            kl_to_baseline=kl,
        )

    runs = tuple(SeedRun(seed=n, quality=cell(1.0 + n / 10, 0.2)) for n in (2, 3))
    own = CellResult(name="gates", chain=(), status="ok", quality=cell(1.1, 0.2), seeds=runs)
    made = results.model_copy(update={"cells": (own,)})
    head, _, line = TABLES["seeds"](made)
    assert "perplexity, x dense | KL |" in head
    assert "| 3 |" in line and line.endswith("| 1.20 (0.952 to 1.45) | 0.200 (0.200 to 0.200) |")


def test_the_other_tables(results: Results) -> None:
    assert "arc_easy" in TABLES["quality"](results)[0]
    (row,) = TABLES["speculation"](results)[2:]
    assert row == (
        "| `spec` | yes, 16 prompts, 1024 tokens | 0: 27, 3: 1 |"
        " 96.4 %: fell back to plain decoding | 1.01 (0.970 to 1.05) |"
    )
    assert TABLES["verdicts"](results)[2:] == ["| `nf4` | REGRESSION | it writes less well |"]
    assert "15.1 %" in TABLES["skipping"](results)[3]
    assert TABLES["peers"](results)[2:] == ["| `llama.cpp:q4_k_m` | flash attention off |"]
    assert len(TABLES["speed"](results, cells="dense,nf4")) == 4
    with pytest.raises(UserError, match="no cell"):
        TABLES["speed"](results, cells="nf5")


@pytest.mark.parametrize(
    ("cell", "path", "options", "text"),
    [
        ("nf4", "speed.decode_ratio", {}, "3.90x (3.80 to 4.02)"),
        ("nf4", "speed.decode_ratio", {"interval": "no"}, "3.90x"),
        ("spec", "speed.decode_ratio", {}, "no difference (0.970 to 1.05)"),
        ("nf4", "speed.decode_tokens_per_s", {}, "375 (370 to 385)"),
        ("nf4", "quality.perplexity.ratio_to_baseline", {"form": "x"}, "1.44x (1.42 to 1.46)"),
        ("nf4", "quality.tasks.arithmetic.value", {"form": "points"}, "8.6 (10.0 to 20.0)"),
        ("nf4", "compute.saved_net", {"form": "percent"}, "15.1 %"),
        ("nf4", "size.disk_bytes", {"form": "mb"}, "117 MB"),
        ("-", "environment.processor", {}, "Some Xeon"),
    ],
)
def test_a_figure(
    results: Results, cell: str, path: str, options: dict[str, str], text: str
) -> None:
    assert figure(results, cell, path, **options) == text


def test_a_figure_that_there_is_not_is_refused(results: Results) -> None:
    with pytest.raises(UserError, match="nothing at"):
        figure(results, "dense", "speed.decode_ratio")


DOCUMENT = """\
# Page

<!-- table: peers verdicts cells=nf4 -->
old
<!-- end -->

It is <!-- figure: peers nf4 speed.decode_ratio interval=no -->5x<!-- end --> as fast.
"""


def test_a_document_is_filled_and_filled_again_stays(results: Results, tmp_path: Path) -> None:
    save_results(results, tmp_path / "reports" / "published" / "peers" / "results.json")
    filled = fill(DOCUMENT, Path("docs/page.md"), tmp_path)
    assert "| `nf4` | REGRESSION | it writes less well |" in filled
    assert (
        "[reports/published/peers/results.json](../reports/published/peers/results.json):"
        " Some Xeon, 2 threads, version 0.1.0, commit 0123456789ab, 2026-11-26,"
        " `gateskip run pipelines/peers.yaml`"
    ) in filled
    assert "nf4 speed.decode_ratio interval=no -->3.90x<!-- end --> as fast" in filled
    assert "old" not in filled
    assert fill(filled, Path("docs/page.md"), tmp_path) == filled
    assert outside(filled).split() == ["#", "Page", "It", "is", "as", "fast."]


@pytest.mark.parametrize(
    ("marker", "words"),
    [
        ("table: peers verdict", "verdicts"),
        ("table: peers", "form"),
        ("figure: peers nf4", "form"),
        ("table: nothing quality", "cannot read"),
        ("table: peers quality colour=red", "options"),
    ],
)
def test_a_marker_that_cannot_be_filled(
    results: Results, tmp_path: Path, marker: str, words: str
) -> None:
    save_results(results, tmp_path / "reports" / "published" / "peers" / "results.json")
    with pytest.raises(UserError, match=words):
        fill(f"<!-- {marker} -->\n<!-- end -->", Path("README.md"), tmp_path)


def test_a_document_is_replaced_whole_or_not_at_all(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "page.md").write_text("old")
    monkeypatch.setattr(command, "ROOT", tmp_path)
    monkeypatch.setattr(command, "DOCUMENTS", (Path("page.md"),))
    monkeypatch.setattr(command, "fill", lambda text, document: "new")

    def full(*_: object) -> None:
        raise OSError("the disk is full")

    with monkeypatch.context() as patched:
        patched.setattr(store.os, "replace", full)
        with pytest.raises(OSError, match="full"):
            command.main([])
    assert (tmp_path / "page.md").read_text() == "old"
    assert command.main([]) == 0 and (tmp_path / "page.md").read_text() == "new"


def test_a_marker_without_its_end_is_found() -> None:
    assert unfinished("<!-- table: a quality -->\n| a |\n")
    assert not unfinished(DOCUMENT)


def test_what_a_result_has_to_say(results: Results) -> None:
    assert not missing_provenance(results)
    bare = Results(run="x", cells=results.cells)
    facts = ["processor", "versions", "git_commit", "date", "version", "command"]
    assert missing_provenance(bare) == facts
    cell = results.cells[0].model_copy(update={"fingerprint": None})
    assert missing_provenance(results.model_copy(update={"cells": (cell,)})) == ["fingerprint"]


def test_a_published_result_is_compact(results: Results) -> None:
    dense = results.cell("dense")
    assert dense.speed and dense.speed.decode_tokens_per_s
    shape = SpeedNumbers(decode_tokens_per_s=dense.speed.decode_tokens_per_s)
    fast = dense.speed.model_copy(
        update={"ttft_s": dense.speed.decode_tokens_per_s, "by_batch": {8: shape}}
    )
    cells = (dense.model_copy(update={"speed": fast}), *results.cells[1:])
    small = compact(results.model_copy(update={"cells": cells})).cell("dense").speed
    assert small and small.ttft_s and small.by_batch and small.by_batch[8].decode_tokens_per_s
    assert small.decode_tokens_per_s == fast.decode_tokens_per_s, "drawn"
    for measured in (small.ttft_s, small.by_batch[8].decode_tokens_per_s):
        assert measured == fast.decode_tokens_per_s.model_copy(update={"repeats": ()})


def test_what_changed_since_a_commit(tmp_path: Path) -> None:
    def git(*words: str) -> str:
        identity = ("-c", "user.name=a", "-c", "user.email=a@b.c")
        command = ["git", *identity, "-C", str(tmp_path), *words]
        return subprocess.run(command, check=True, capture_output=True, text=True).stdout.strip()

    git("init", "-q")
    for folder in (*PACKAGES, "compose/bench"):
        (tmp_path / folder).mkdir(parents=True)
        (tmp_path / folder / "old.py").write_text("def score(x):\n    return x + 1\n")
    git("add", "-A")
    git("commit", "-qm", "first")
    commit = git("rev-parse", "HEAD")
    assert changed_since(commit, tmp_path) == changed_since(f"{commit}-dirty", tmp_path) == {}
    scorer = (tmp_path / "compose/bench/old.py").rename(tmp_path / "compose/bench/new.py")
    scorer.write_text(f'"""Moved."""\n\n{scorer.read_text()}')
    assert changed_since(commit, tmp_path) == {}
    scorer.write_text(scorer.read_text().replace("x + 1", "x - 1"))
    assert changed_since(commit, tmp_path) == {"compose/bench/new.py": 1}
    assert changed_since("0" * 40, tmp_path) is None
