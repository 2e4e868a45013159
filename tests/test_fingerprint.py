"""A number that other code or other libraries measured is not published beside new ones."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from compose.execution import run_folder
from compose.execution.gather import gather
from compose.execution.run_folder import (
    RunFolder,
    is_measured,
    only_code_changed,
    read_phase,
    write_phase,
)
from compose.language.schema import Pipeline
from compose.planning import fingerprint as module
from compose.planning.fingerprint import MEASURING, ROOT, fingerprint, fingerprint_of
from compose.planning.plan import Plan
from compose.planning.planner import make_plan
from compose.terminal.show import plan_state


@pytest.fixture
def plan() -> Plan:
    raw = {
        "schema": 1,
        "name": "small",
        "model": {"source": "smollm2-135m-instruct"},
        "stages": {"drop": {"use": "drop-layers", "count": 1}},
        "pipelines": {"cut": ["drop"]},
    }
    return make_plan(Pipeline.model_validate(raw))


QUALITY = {"perplexity": {"dataset": "heldout-text", "value": 7.5}}


def _measure(plan: Plan, out: Path) -> RunFolder:
    """Records of every phase of both cells, as a run leaves them."""
    run = RunFolder.of(plan, out)
    for cell in plan.cells:
        write_phase(run, plan, cell, "load", {"size": {"disk_bytes": 1}}, 1.0)
        write_phase(run, plan, cell, "quality", QUALITY, 1.0)
    return run


def test_other_versions_make_an_old_perplexity_unknown(
    plan: Plan, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run, (dense, cut) = _measure(plan, tmp_path), plan.cells
    assert is_measured(run, plan, dense)
    record = read_phase(run, plan, dense, "quality")
    assert record is not None and record["fingerprint"] == fingerprint()
    assert not only_code_changed(run, plan, cut)

    other = fingerprint_of(ROOT, {"torch": "0.0"})
    monkeypatch.setattr(run_folder, "fingerprint", lambda: other)
    assert read_phase(run, plan, dense, "quality") is None
    assert not is_measured(run, plan, dense)
    facts: dict[str, Any] = {"failures": {}, "session": None, "environment": {}, "command": None}
    assert gather(run, plan, **facts).cells == ()


def test_the_plan_says_why_a_cell_is_measured_again(
    plan: Plan, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = _measure(plan, tmp_path)
    assert [cell["cached"] for cell in plan_state(plan, run)["cells"]] == [True, True]
    monkeypatch.setattr(run_folder, "fingerprint", lambda: "0" * 16)
    for cell in plan_state(plan, run)["cells"]:
        assert not cell["cached"] and cell["why"] == "code or libraries changed"
    run.record("cut", "load").unlink()  # never measured as a whole
    assert "why" not in plan_state(plan, run)["cells"][1]


def test_weights_outlive_a_change_of_the_code(plan: Plan, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "library_versions", lambda: {"torch": "0.0"})
    fingerprint.cache_clear()
    again = make_plan(plan.pipeline)
    fingerprint.cache_clear()
    assert [step.key for step in again.steps] == [step.key for step in plan.steps]


def test_any_source_and_any_version_counts(tmp_path: Path) -> None:
    for name in MEASURING:
        assert (ROOT / name).exists(), name
        place = tmp_path / name
        if not place.suffix:
            place = place / "kernel.cpp"
        place.parent.mkdir(parents=True, exist_ok=True)
        place.write_text("one\n")
    first = fingerprint_of(tmp_path, {"torch": "2.13"})
    assert first == fingerprint_of(tmp_path, {"torch": "2.13"}) and len(first) == 16
    assert first != fingerprint_of(tmp_path, {"torch": "2.14"})
    cache = tmp_path / "gateskip" / "__pycache__"
    cache.mkdir()
    (cache / "load.pyc").write_bytes(b"compiled")
    assert first == fingerprint_of(tmp_path, {"torch": "2.13"})
    (tmp_path / "compose" / "assets" / "rows.py").write_text("two\n")
    assert first != fingerprint_of(tmp_path, {"torch": "2.13"})
