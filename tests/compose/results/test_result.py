"""Results: absent stays absent, files are read and written whole, numbers derive as documented."""

from __future__ import annotations

import json
import math
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from pydantic import ValidationError

from compose.analysis.metrics import (
    METRICS,
    gain,
    metric_of,
    metrics,
    retained_basis,
    task_retained,
)
from compose.errors import UserError
from compose.results.environment import capture_environment
from compose.results.io import load_results, save_results
from compose.results.parts import LosslessCheck, Measured, Quality, Speculation
from compose.results.schema import CellResult, Results


def run_of(*cells: dict[str, Any], **more: Any) -> Results:
    """A run of cells that are `ok` unless they say otherwise."""
    full = [{"chain": [], "status": "ok", **cell} for cell in cells]
    return Results.model_validate({"run": "test", "cells": full, **more})


def quality(perplexity: float, **tasks: float) -> dict[str, Any]:
    return {
        "perplexity": {"dataset": "wikitext2", "value": perplexity},
        "tasks": {name: {"metric": "acc", "value": value} for name, value in tasks.items()},
    }


SKELETON = """
{"schema_version": 3, "run": "quickstart", "environment": {}, "baseline": "dense",
 "cells": [{"name": "gates+nf4+spec", "chain": ["gates", "nf4", "spec"], "status": "ok",
   "reason": null,
   "size": {"disk_bytes": 10, "resident_bytes": 20, "peak_bytes": 30},
   "speed": {"prefill_tokens_per_s": {"median": 1.5, "repeats": [1.5]},
     "decode_tokens_per_s": {"median": 2.5, "repeats": [2.0, 2.5, 3.0]},
     "ttft_s": {"median": 0.5, "repeats": [0.5]}},
   "compute": {"saved_gross": 0.2, "saved_net": 0.1},
   "quality": {"perplexity": {"dataset": "wikitext2", "value": 20.5, "tokens": 8192,
       "ratio_to_baseline": 1.25},
     "kl_to_baseline": 0.5, "greedy_agreement": 0.75,
     "own_answers": {"kl": 0.25, "common_prefix": 12.5},
     "tasks": {"arc_easy": {"metric": "acc_norm", "value": 0.5, "n": 100,
       "ci95": [0.25, 0.75], "retained": 0.9}}},
   "speculation": {"acceptance_rate": 0.5, "mean_accepted_tokens": 1.5, "speedup": 1.25},
   "lossless_check": {"lossless": true, "first_divergence": null}}]}
"""


def test_the_design_s_skeleton_survives_a_round_trip(tmp_path: Path) -> None:
    data = json.loads(SKELETON)
    save_results(Results.model_validate(data), tmp_path / "results.json")
    assert json.loads((tmp_path / "results.json").read_text("utf-8")) == data


def test_absent_stays_absent_but_for_what_scripts_look_up(tmp_path: Path) -> None:
    results = run_of({"name": "dense", "size": {"disk_bytes": 5}, "lossless_check": {}})
    save_results(results, tmp_path / "results.json")
    (cell,) = json.loads((tmp_path / "results.json").read_text("utf-8"))["cells"]
    assert cell == {
        "name": "dense",
        "chain": [],
        "status": "ok",
        "reason": None,
        "size": {"disk_bytes": 5},
        "lossless_check": {"first_divergence": None},
    }


def test_fields_of_a_later_version_survive(tmp_path: Path) -> None:
    results = run_of({"name": "dense", "size": {"gpu_bytes": 7}, "watts": 3})
    save_results(results, tmp_path / "results.json")
    assert load_results(tmp_path) == results
    (cell,) = json.loads((tmp_path / "results.json").read_text("utf-8"))["cells"]
    assert (cell["size"]["gpu_bytes"], cell["watts"]) == (7, 3)


def test_keys_of_numbers_are_read_back(tmp_path: Path) -> None:
    cell = {
        "name": "dense",
        "speed": {"by_batch": {8: {"decode_tokens_per_s": {"median": 9.0}}}},
        "speculation": {"draft_length_histogram": {4: 11}},
    }
    save_results(run_of(cell), tmp_path / "results.json")
    read = load_results(tmp_path).cell("dense")
    assert read.speed is not None and read.speed.by_batch is not None
    assert read.speed.by_batch[8].decode_tokens_per_s == Measured(median=9.0)
    assert read.speculation is not None
    assert read.speculation.draft_length_histogram == {4: 11}


def test_numbers_that_json_cannot_hold_are_dropped_and_noted(tmp_path: Path) -> None:
    cell = run_of(
        {
            "name": "ruined",
            "quality": {
                "perplexity": {"dataset": "wikitext2", "value": math.inf, "tokens": 100},
                "kl_to_baseline": math.nan,
                "tasks": {"piqa": {"metric": "acc", "value": 0.5, "ci95": [0.4, math.nan]}},
            },
            "notes": ["first"],
        }
    ).cells[0]
    assert cell.quality is not None and cell.quality.perplexity is not None
    assert cell.quality.perplexity.value is None
    assert cell.quality.perplexity.tokens == 100
    assert cell.quality.tasks is not None and cell.quality.tasks["piqa"].ci95 is None
    assert cell.notes == (
        "first",
        "quality.perplexity.value was not a finite number",
        "quality.kl_to_baseline was not a finite number",
        "quality.tasks.piqa.ci95 was not a finite number",
    )
    save_results(Results(run="test", cells=(cell,)), tmp_path / "results.json")
    with pytest.raises(ValidationError):
        Quality(kl_to_baseline=math.nan)


def test_records_are_frozen() -> None:
    with pytest.raises(ValidationError):
        run_of({"name": "dense"}).cells[0].name = "other"  # type: ignore[misc]


def test_a_run_has_no_name_twice() -> None:
    with pytest.raises(ValidationError, match="two cells are called 'a'"):
        run_of({"name": "a"}, {"name": "a"})


# --- files ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("{", "not JSON"),
        ("[]", "the file"),
        ('{"schema_version": 4}', "newer than 3"),
        ('{"schema_version": 2}', "older than 3"),
        ('{"run": "x"}', "cells: Field required"),
        (
            '{"run": "x", "cells": [{"name": "a", "chain": [], "status": "fine"}]}',
            r"cells\[0\].status",
        ),
        (
            '{"run": "x", "cells": [{"name": "a", "chain": [], "status": "ok",'
            ' "speed": {"ttft_s": {"median": "soon"}}, "size": 3}]}',
            r"\(and 1 more\)",
        ),
    ],
)
def test_bad_files_say_where(tmp_path: Path, text: str, message: str) -> None:
    (tmp_path / "results.json").write_text(text, "utf-8")
    with pytest.raises(UserError, match=message) as caught:
        load_results(tmp_path)
    assert caught.value.file == str(tmp_path / "results.json")


def test_a_folder_or_the_file(tmp_path: Path) -> None:
    save_results(run_of({"name": "dense"}), tmp_path / "results.json")
    assert load_results(tmp_path) == load_results(str(tmp_path / "results.json"))
    with pytest.raises(UserError, match="cannot read the results"):
        load_results(tmp_path / "elsewhere")


# --- cells and numbers ---------------------------------------------------------------------------


def test_cells_are_found_by_name_and_alias() -> None:
    results = run_of({"name": "gates+spec", "aliases": ["shipped"]}, {"name": "dense"})
    assert results.cell("shipped").name == "gates+spec"
    assert results.find(None) is None
    with pytest.raises(UserError, match="did you mean 'dense'"):
        results.cell("dence")


def test_speculation_has_the_quality_of_its_plain_cell() -> None:
    results = run_of(
        {"name": "dense", "quality": quality(20.0)},
        {"name": "gates", "quality": quality(25.0)},
        {"name": "gates+spec", "quality_of": "gates"},
        {"name": "lost", "quality_of": "nowhere"},
    )
    assert metric_of(results, "perplexity-ratio", results.cell("gates+spec")) == 1.25
    assert results.quality(results.cell("lost")) is None


def test_retained_is_a_mean_over_the_baseline_s_tasks() -> None:
    results = run_of(
        {"name": "dense", "quality": quality(20.0, a=0.5, b=0.8)},
        {"name": "whole", "quality": quality(40.0, a=0.4, b=0.8)},
        {"name": "part", "quality": quality(40.0, a=0.4)},
        {"name": "none"},
    )
    assert retained_basis(results) == "tasks"
    assert metric_of(results, "retained", results.cell("whole")) == pytest.approx(0.9)
    assert metric_of(results, "retained", results.cell("part")) is None
    assert metric_of(results, "retained", results.cell("none")) is None
    assert task_retained(results, results.cell("whole"), "a") == pytest.approx(0.8)
    assert task_retained(results, results.cell("whole"), "c") is None
    assert metric_of(results, "accuracy", results.cell("whole")) == pytest.approx(0.6)


def test_without_tasks_retained_is_of_perplexity() -> None:
    results = run_of(
        {"name": "dense", "quality": quality(20.0)}, {"name": "nf4", "quality": quality(25.0)}
    )
    assert retained_basis(results) == "perplexity"
    assert metric_of(results, "retained", results.cell("nf4")) == pytest.approx(0.8)


def test_another_text_s_perplexity_is_not_compared() -> None:
    other = {"perplexity": {"dataset": "heldout-text", "value": 10.0}}
    results = run_of({"name": "dense", "quality": quality(20.0)}, {"name": "nf4", "quality": other})
    assert metric_of(results, "perplexity-ratio", results.cell("nf4")) is None


def test_without_a_baseline_nothing_is_relative() -> None:
    results = run_of(
        {"name": "dense", "status": "failed"}, {"name": "nf4", "quality": quality(25.0, a=0.5)}
    )
    cell = results.cell("nf4")
    assert retained_basis(results) is None
    assert metrics(results, cell) == {"perplexity": 25.0, "accuracy": 0.5}
    assert gain(results, "perplexity", cell) is None
    assert results.measured == (cell,)


def test_gain_is_over_the_baseline() -> None:
    fast, slow = ({"decode_tokens_per_s": {"median": m}} for m in (30.0, 20.0))
    results = run_of({"name": "dense", "speed": slow}, {"name": "nf4", "speed": fast})
    assert gain(results, "decode", results.cell("nf4")) == 1.5
    with pytest.raises(UserError, match="did you mean 'decode'"):
        metric_of(results, "decod", results.cell("nf4"))


def test_every_metric_reads_an_empty_and_a_full_cell() -> None:
    full = Results.model_validate(json.loads(SKELETON))
    assert metrics(run_of({"name": "dense"}), CellResult(name="x", chain=(), status="ok")) == {}
    relative = {"retained", "perplexity-ratio", "decode-ratio", "prefill-ratio"}
    relative |= {"written", "ranked"}
    assert set(METRICS) - set(metrics(full, full.cells[0])) <= relative


def test_lossless_is_three_valued() -> None:
    assert LosslessCheck().lossless is None
    assert LosslessCheck().model_dump() == {"first_divergence": None}
    assert Speculation().model_dump() == {}


# --- environment ---------------------------------------------------------------------------------


def test_the_environment_tells_the_machine_without_torch() -> None:
    code = (
        "import json, sys; from compose.results.environment import capture_environment as e;"
        "found = e(threads=3); assert 'torch' not in sys.modules; print(json.dumps(found))"
    )
    root = Path(__file__).resolve().parents[3]
    done = subprocess.run([sys.executable, "-c", code], cwd=root, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    assert found["threads"] == 3
    assert found["memory_bytes"] > 0
    assert {"pydantic"}.isdisjoint(found["versions"])  # only what can change a result
    assert None not in found.values()


def test_the_environment_names_no_folder_and_no_host() -> None:
    import socket

    text = json.dumps(capture_environment())
    assert str(Path.home()) not in text
    assert str(Path.cwd()) not in text
    assert f'"{socket.gethostname()}"' not in text
