"""The runner: order, resume, failures as data, speed sessions; then the real thing, killed.

Most tests replace workers by scripted ones, so that orchestration is tested in milliseconds. The
tests at the end start real workers on a tiny model, kill them, and compare what comes out.
"""

from __future__ import annotations

import json
import math
import signal
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
from filelock import FileLock
from scripted_runs import (
    Answer,
    Script,
    ScriptedWorker,
    SlowRun,
    go,
    pipeline,
    results_of,
    speed_numbers,
)
from typer.testing import CliRunner

from compose.analysis.metrics import over_seeds
from compose.artifacts.folder import hash_folder, lineage
from compose.cli import app
from compose.errors import AssetError, PlanError, StepError, UserError
from compose.outputs import export as export_module
from compose.outputs.gather import MOST_POINTS, thinned
from compose.outputs.run_folder import RunFolder, file_name, phase_key, read_phase
from compose.outputs.sessions import Round, Session, Shape, find_session, new_session
from compose.planning.planner import make_plan
from compose.results.schema import Results
from compose.run import cells as cells_module
from compose.run import runner as runner_module
from compose.run import speed as speed_module
from compose.store import Store, read_json

ROOT = Path(__file__).resolve().parents[3]


# --- The whole way ------------------------------------------------------------------------------


def test_a_report_is_drawn_when_results_are_new_or_it_is_gone(tmp_path: Path) -> None:
    drawn = []

    def draw(results_file: Path, folder: Path) -> None:
        assert results_file.is_file()
        drawn.append(folder)
        (folder / "report.html").write_text("report")

    for worked in (True, False, True):
        assert go(tmp_path, Script(), draw=draw).worked is worked
        if not worked:
            (tmp_path / "small" / "report.html").unlink()
    assert drawn == [tmp_path / "small"] * 2


def test_a_cell_stays_loaded_between_quality_and_speed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(cells_module, "FREE_BYTES_TO_KEEP", 0)
    script = Script()
    script.local = True
    result = go(tmp_path, script)
    assert result.exit_code == 0
    cells = [cell.name for cell in results_of(tmp_path).measured]
    assert sorted(event[1] for event in script.done("load")) == sorted(cells), "loaded once"
    assert len(script.done("speed")) > len(cells)


def test_what_stayed_loaded_gives_way_to_a_cell_that_needs_its_memory(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(cells_module, "FREE_BYTES_TO_KEEP", 0)
    script, alive, note = Script(), list[tuple[str, int]](), Script.note
    script.local = True

    def noted(*event: str) -> None:
        alive.append((event[0], script.live))
        note(script, *event)

    monkeypatch.setattr(script, "note", noted)
    monkeypatch.setattr(script, "free_bytes", lambda: 0 if script.live else 10**12)
    assert go(tmp_path, script).exit_code == 0
    assert {live for kind, live in alive if kind == "quality"} == {1}


def test_steps_then_quality_then_interleaved_rounds(tmp_path: Path) -> None:
    script = Script()
    result = go(tmp_path, script)
    assert result.exit_code == 0
    assert result.worked
    assert script.closed == 1
    assert [event[1] for event in script.done("step")] == ["source", "drop", "gates"]
    assert len(script.done("check")) == 3, "every folder is loaded again by another process"
    kinds = [event[0] for event in script.log]
    assert kinds.index("quality") > max(i for i, kind in enumerate(kinds) if kind == "step")
    assert [event[1] for event in script.done("quality")] == ["dense", "cut", "gates", "gates+skip"]
    assert script.done("lossless") == [("lossless", "gates+spec")]
    cells = ["dense", "cut", "gates", "gates+skip", "gates+spec"]
    rounds = script.done("speed")
    for number, start in enumerate(range(0, len(rounds), len(cells))):
        names = [event[1] for event in rounds[start : start + len(cells)]]
        turn = number % 3  # three rounds a batch size, each begins with another cell
        assert names == [*cells[turn:], *cells[:turn]]
        assert len({event[2:] for event in rounds[start : start + len(cells)]}) == 1
    assert len(rounds) == len(cells) * 3 * 2
    assert script.most_live == len(cells), "the cells of a group are alive together"


def test_numbers_that_are_not_finite_are_left_out_and_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    receive = ScriptedWorker.receive

    def ruined(worker: ScriptedWorker) -> Answer:
        answer = receive(worker)
        if worker.job.get("name") == "gates" and worker.role == "step":
            answer["result"]["peak"] = math.inf
        if worker.job.get("name") == "gates" and "perplexity" in answer["result"]:
            answer["result"]["perplexity"] |= {"value": math.inf, "block_nll": [1.0, math.nan]}
        return answer

    monkeypatch.setattr(ScriptedWorker, "receive", ruined)
    plan = make_plan(pipeline())
    assert go(tmp_path, Script(), plan).exit_code == 0
    stored = Store.beside(tmp_path).manifest(plan.cell("gates").weights) or {}
    assert stored["record"]["notes"] == ["peak was not a finite number"]
    gates = results_of(tmp_path).cell("gates")
    assert gates.quality.perplexity.value is None and gates.quality.perplexity.tokens == 64
    assert gates.notes == (
        "quality.perplexity.value was not a finite number",
        "quality.perplexity.block_nll was not a finite number",
    )


def test_cells_may_share_one_process(tmp_path: Path) -> None:
    script = Script()
    speed = {"repeats": 3, "min_seconds": 0, "one_process": True}
    go(tmp_path, script, make_plan(pipeline(benchmark={"threads": 1, "speed": speed})))
    cells = ["dense", "cut", "gates", "gates+skip", "gates+spec"]
    assert script.done("join") == [("join", name) for name in cells[1:]]
    assert script.most_live == 1, "no process stays from scoring"
    loads = [event[1] for event in script.log if event[0] == "load"][-15:]
    assert loads == [*cells, *cells[1:], "dense", *cells[2:], "dense", "cut"], "anew in each round"
    assert len(script.done("drop")) == 2
    names = [event[1] for event in script.done("speed")]
    assert names == [*cells, *cells[1:], "dense", *cells[2:], "dense", "cut"]
    dense = results_of(tmp_path).cell("dense")
    assert len(dense.speed.decode_tokens_per_s.repeats) == 3
    assert dense.size.resident_bytes == 200 and dense.size.peak_bytes is None


def test_one_of_the_cells_of_a_process_may_fail(tmp_path: Path) -> None:
    script = Script()
    script.break_at["speed", "cut", "1", "0"] = StepError("out of luck")
    speed = {"repeats": 2, "min_seconds": 0, "one_process": True}
    result = go(tmp_path, script, make_plan(pipeline(benchmark={"threads": 1, "speed": speed})))
    assert result.exit_code == 1
    results = results_of(tmp_path)
    assert "out of luck" in (results.cell("cut").reason or "")
    assert len(results.cell("gates").speed.decode_tokens_per_s.repeats) == 2


def test_the_result_is_typed_and_compared_with_the_baseline(tmp_path: Path) -> None:
    go(tmp_path, Script())
    results = results_of(tmp_path)
    assert results.baseline == "dense"
    assert [cell.name for cell in results.cells] == [
        *("dense", "cut", "gates", "gates+skip", "gates+spec"),
        *("skip", "spec"),
    ]
    dense, gates = results.cell("dense"), results.cell("gates")
    assert dense.speed is not None
    assert dense.speed.decode_tokens_per_s is not None
    assert dense.speed.decode_tokens_per_s.repeats == (10.0, 11.0, 12.0)
    assert dense.speed.decode_tokens_per_s.median == 11.0
    assert dense.speed.by_batch is not None
    assert set(dense.speed.by_batch) == {4}
    assert dense.size is not None
    assert (dense.size.resident_bytes, dense.size.peak_bytes) == (200, 1002)
    assert (dense.model_extra or {})["kernels"] == {"native": 3}
    assert gates.quality is not None
    assert gates.quality.perplexity is not None
    assert gates.quality.perplexity.ratio_to_baseline == pytest.approx(1.2)
    assert gates.quality.tasks is not None
    assert gates.quality.tasks["arc_easy"].retained == pytest.approx(1 / 1.2)
    assert gates.training is not None
    assert gates.training["gates"][0].loss == 2.0
    assert gates.layer_errors == {"gates": {"up_proj": 0.25}}
    assert dense.training is None and dense.layer_errors is None
    skip = results.cell("gates+skip")
    assert skip.compute is not None
    assert skip.compute.saved_net == 0.2
    assert skip.plain == "gates"
    assert skip.steps is not None
    assert skip.steps[-1].use == "skip"
    spec = results.cell("gates+spec")
    assert spec.quality is None
    assert spec.quality_of == "gates"
    assert results.quality(spec) == gates.quality
    assert spec.speculation is not None and spec.lossless_check is not None
    assert spec.lossless_check.lossless is True
    low, high = spec.lossless_check.acceptance_rate_ci95 or (1, 0)
    assert 0 == low < 0.6 < high == 1, "two prompts know little"
    assert spec.speculation.speedup == pytest.approx(3.0)
    assert spec.verdict is not None and dense.verdict is None
    assert (spec.fingerprint or {}).keys() == {"load", "lossless", "speed"}
    assert results.cell("skip").status == "left-out"
    assert results.cell("skip").rule == "decode-needs-gates"


def test_long_training_curves_are_thinned() -> None:
    """Points of three steps: their mean loss, and the validation that one of them had."""
    curve: list[Answer] = [{"step": i + 1, "loss": float(i)} for i in range(3 * MOST_POINTS - 1)]
    curve[4]["valid"] = 7.0
    points = thinned(curve)
    assert len(points) == MOST_POINTS and points[-1]["step"] == len(curve)
    assert points[:2] == [{"step": 3, "loss": 1.0}, {"step": 6, "loss": 4.0, "valid": 7.0}]
    assert thinned(curve[:MOST_POINTS]) == curve[:MOST_POINTS]


def test_a_second_run_does_nothing(tmp_path: Path) -> None:
    go(tmp_path, Script())
    written = (tmp_path / "small" / "results.json").read_bytes()
    stamp = (tmp_path / "small" / "results.json").stat().st_mtime_ns
    again = Script()
    result = go(tmp_path, again)
    assert again.log == []
    assert not result.worked
    assert result.exit_code == 0
    assert (tmp_path / "small" / "results.json").read_bytes() == written
    assert (tmp_path / "small" / "results.json").stat().st_mtime_ns == stamp


def test_equal_steps_of_another_run_are_shared(tmp_path: Path) -> None:
    go(tmp_path, Script())
    other = Script()
    go(tmp_path, other, make_plan(pipeline(name="other")))
    assert other.done("step") == []
    assert other.done("quality") != []


def test_a_lost_reference_is_made_again_only_for_a_cell_that_needs_it(tmp_path: Path) -> None:
    go(tmp_path, Script(), only=("gates",))
    plan = make_plan(pipeline())
    reference = RunFolder.of(plan, tmp_path).reference(plan.cells[0].key)
    reference.unlink()
    script = Script()
    go(tmp_path, script, only=("gates",))
    assert script.log == []
    go(tmp_path, script)
    assert ("quality", "dense") in script.log
    assert reference.is_file()


def test_again_measures_anew_and_keeps_folders(tmp_path: Path) -> None:
    go(tmp_path, Script())
    again = Script()
    go(tmp_path, again, again=True)
    assert again.done("step") == []
    assert len(again.done("quality")) == 4
    assert len(again.done("speed")) == 30


# --- Changes ------------------------------------------------------------------------------------


def test_a_new_cell_repeats_speed_for_all_and_quality_for_itself(tmp_path: Path) -> None:
    go(tmp_path, Script(), make_plan(pipeline(pipelines={})))
    script = Script()
    go(tmp_path, script)
    assert [event[1] for event in script.done("step")] == ["drop"]
    assert script.done("quality") == [("quality", "cut")]
    assert len(script.done("speed")) == 30
    assert len(list((tmp_path / "small" / "speed").iterdir())) == 1


def test_changed_settings_repeat_what_reads_them(tmp_path: Path) -> None:
    go(tmp_path, Script())
    speed = {"repeats": 3, "batch_sizes": (1, 4), "min_seconds": 0}
    benchmark: Answer = {"threads": 1, "speed": speed}
    script = Script()
    changed = {**benchmark, "lossless": {"prompts": 2}}
    go(tmp_path, script, make_plan(pipeline(benchmark=changed)))
    assert {event[0] for event in script.log} == {"load", "lossless"}
    script = Script()
    changed |= {"quality": {"limit": 7}}
    go(tmp_path, script, make_plan(pipeline(benchmark=changed)))
    assert {event[0] for event in script.log} == {"load", "quality"}
    script = Script()
    changed |= {"speed": {"repeats": 1, "min_seconds": 0}}
    go(tmp_path, script, make_plan(pipeline(benchmark=changed)))
    assert {event[0] for event in script.log} == {"load", "roofline", "warm", "speed"}


def test_only_measures_what_is_asked_and_what_it_is_compared_with(tmp_path: Path) -> None:
    script = Script()
    go(tmp_path, script, only=("gates+spec",))
    assert {event[1] for event in script.done("speed")} == {"dense", "gates", "gates+spec"}
    assert [event[1] for event in script.done("step")] == ["source", "gates"]
    results = results_of(tmp_path)
    assert [cell.name for cell in results.measured] == ["dense", "gates", "gates+spec"]
    assert results.notes is not None
    assert "cut" in results.notes[0]
    with pytest.raises(PlanError, match="did you mean 'gates'"):
        go(tmp_path, Script(), only=("gatez",))


def test_only_after_a_whole_run_does_nothing_and_loses_nothing(tmp_path: Path) -> None:
    go(tmp_path, Script())
    script = Script()
    result = go(tmp_path, script, only=("cut",))
    assert script.log == []
    assert not result.worked
    assert len(results_of(tmp_path).measured) == 5


def test_only_leaves_the_rounds_of_a_run_that_was_ended(tmp_path: Path) -> None:
    first, other, again = Script(), Script(), Script()
    first.interrupt_at = ("speed", "dense", "4", "0")
    with pytest.raises(KeyboardInterrupt):
        go(tmp_path, first)
    go(tmp_path, other, only=("cut",))
    assert {event[1] for event in other.done("speed")} == {"dense", "cut"}
    go(tmp_path, again)
    assert {event[2] for event in again.done("speed")} == {"4"}, "rounds of one row were whole"
    assert len(list((tmp_path / "small" / "speed").iterdir())) == 1


def test_further_seeds_are_scored_and_folded_into_the_cell(tmp_path: Path) -> None:
    plan = make_plan(pipeline(more_seeds=[1]))
    script = Script()
    script.break_at[("quality", "cut@1")] = failing()
    result = go(tmp_path, script, plan)
    assert result.exit_code == 1
    assert {event[1] for event in script.done("speed")} == {
        "dense",
        "cut",
        "gates",
        "gates+skip",
        "gates+spec",
    }
    results = results_of(tmp_path)
    assert [cell.name for cell in results.cells if cell.status == "failed"] == ["cut@1"]
    assert results.cell("cut").seeds is None
    folded = results.cell("gates+skip")
    assert folded.seeds is not None
    assert [run.seed for run in folded.seeds] == [1]
    assert over_seeds(results, "perplexity-ratio", folded) == (1.2, 1.2)
    again = Script()
    go(tmp_path, again, plan)
    assert {event[1] for event in again.done("quality")} == {"cut@1"}
    assert again.done("step") == again.done("speed") == []


# --- Failures -----------------------------------------------------------------------------------


def failing(reason: str = "it broke") -> StepError:
    error = StepError(f"{reason}\nmore")
    error.add_note("Traceback of the worker")
    return error


def test_a_failed_step_fails_its_cells_and_the_others_go_on(tmp_path: Path) -> None:
    script = Script()
    script.break_at[("step", "gates")] = failing()
    result = go(tmp_path, script)
    assert result.exit_code == 1
    results = results_of(tmp_path)
    status = {cell.name: cell.status for cell in results.cells if cell.status != "left-out"}
    assert status == {
        "dense": "ok",
        "cut": "ok",
        **dict.fromkeys(["gates", "gates+skip", "gates+spec"], "failed"),
    }
    failed = results.cell("gates+skip")
    assert failed.reason == "it broke"
    assert failed.failed_in == "gates"
    assert failed.traceback == "Traceback of the worker"
    assert failed.speed is None
    assert not Store(tmp_path / "store").has(script.done("step")[-1][1])
    again = Script()
    assert go(tmp_path, again).exit_code == 0
    assert [event[1] for event in again.done("step")] == ["gates"], "only what failed is tried"
    assert [event[1] for event in again.done("quality")] == ["gates", "gates+skip"]


def test_a_folder_that_does_not_load_again_fails_its_step(tmp_path: Path) -> None:
    script = Script()
    script.break_at[("check",)] = failing("other logits")
    result = go(tmp_path, script)
    assert result.exit_code == 1
    assert {cell.status for cell in results_of(tmp_path).cells} == {"failed", "left-out"}
    assert list((tmp_path / "store").glob("*/manifest.json")) == []


def test_a_failed_measurement_fails_its_cell_alone(tmp_path: Path) -> None:
    script = Script()
    script.break_at[("quality", "gates+skip")] = failing()
    assert go(tmp_path, script).exit_code == 1
    results = results_of(tmp_path)
    failed = results.cell("gates+skip")
    assert (failed.status, failed.failed_in) == ("failed", "quality")
    assert failed.size is not None
    assert failed.size.resident_bytes == 200
    assert len(results.measured) == 4
    assert "gates+skip" not in {event[1] for event in script.done("speed")}


def test_a_cell_that_fails_in_a_round_drops_out_and_the_others_finish(tmp_path: Path) -> None:
    script = Script()
    script.break_at[("speed", "cut", "1", "1")] = failing()
    assert go(tmp_path, script).exit_code == 1
    results = results_of(tmp_path)
    assert results.cell("cut").failed_in == "speed"
    assert results.cell("cut").quality is not None
    assert len(script.done("speed", "cut")) == 2
    assert len(script.done("speed", "dense")) == 6
    again = Script()
    assert go(tmp_path, again).exit_code == 0
    assert len(again.done("speed", "dense")) == 5, "all rounds but the one that was complete"


def test_a_cell_whose_process_cannot_be_started_for_speed_drops_out(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    script, start = Script(), Script.start

    def refuses(role: str, job: Path, log: Path, needs: Any = None) -> ScriptedWorker:
        if log.name == "speed-cut.log":
            raise StepError("no node of that kind is left")
        return start(script, role, job, log, needs)

    monkeypatch.setattr(script, "start", refuses)
    result = go(tmp_path, script)
    assert result.exit_code == 1
    cut = result.results.cell("cut")
    assert cut.status == "failed" and cut.reason == "no node of that kind is left"
    assert result.results.cell("dense").speed is not None


def test_a_source_that_cannot_be_had_is_the_users_to_put_right(tmp_path: Path) -> None:
    script = Script()
    script.break_at[("step", "source")] = AssetError("no such model", fix="name another")
    with pytest.raises(AssetError, match="no such model"):
        go(tmp_path, script)
    assert script.live == 0
    assert script.done("quality") == []


def test_data_that_the_baseline_cannot_have_is_the_users_to_put_right(tmp_path: Path) -> None:
    script = Script()
    script.break_at[("quality", "dense")] = AssetError("no such data")
    with pytest.raises(AssetError, match="no such data"):
        go(tmp_path, script)
    assert script.done("quality") == [("quality", "dense")]


def test_data_that_a_step_cannot_have_fails_its_cells(tmp_path: Path) -> None:
    script = Script()
    script.break_at[("step", "gates")] = AssetError("no such data")
    assert go(tmp_path, script).exit_code == 1
    assert results_of(tmp_path).cell("gates").reason == "no such data"


def numbers_of(results: Results) -> list[Answer]:
    """All cells as plain data, without how long measuring took, and how much memory steps did."""
    cells = [cell.model_dump(mode="json") for cell in results.cells]
    varying = ("seconds", "step_peak_bytes", "step_seconds")
    return [{key: value for key, value in cell.items() if key not in varying} for cell in cells]


# --- Going on after an end ----------------------------------------------------------------------


@pytest.mark.parametrize(
    "moment",
    [
        ("step", "gates"),
        ("quality", "gates"),
        ("lossless", "gates+spec"),
        ("speed", "gates", "1", "1"),
        ("speed", "dense", "4", "2"),
    ],
)
def test_what_was_finished_before_an_interrupt_is_not_repeated(
    tmp_path: Path, moment: tuple[str, ...]
) -> None:
    first, whole = Script(), Script()
    go(tmp_path / "whole", whole)
    first.interrupt_at = moment
    with pytest.raises(KeyboardInterrupt):
        go(tmp_path / "broken", first)
    assert first.live == 0
    second = Script()
    assert go(tmp_path / "broken", second).exit_code == 0
    wanted, found = results_of(tmp_path / "whole"), results_of(tmp_path / "broken")
    assert numbers_of(wanted) == numbers_of(found)
    repeated = Counter(
        event
        for event in first.log + second.log
        if event[0] in ("step", "quality", "lossless") and event != moment
    )
    assert set(repeated.values()) == {1}
    if moment[0] == "speed":
        rounds = len({event[2:] for event in second.done("speed")})
        assert rounds == 6 - (int(moment[2] == "4") * 3 + int(moment[3]))


def test_a_round_that_a_kill_cut_short_is_dropped(tmp_path: Path) -> None:
    plan = make_plan(pipeline())
    run_folder = RunFolder.of(plan, tmp_path)
    settings = {
        "speed": {"batch_sizes": [1], "repeats": 2, "prompt_tokens": 8, "contexts": []},
    }
    cells = plan.cells[:2]
    session = new_session(run_folder, settings, cells, [["dense", "cut"]], {"cores": 2}, "run")
    numbers = {"dense": speed_numbers(0), "cut": speed_numbers(1)}
    first, second = (Round(0, Shape(1, 8), number) for number in range(2))
    session.add(first, numbers, 2.0, load_average=0.5)
    with session.file.open("ab") as file:
        file.write(b'{"group": 0, "batch": 1, "context": 8, "round": 1, "cel')
    found = find_session(run_folder, settings, cells)
    assert found is not None
    assert found.rounds == {first: numbers}
    assert not found.finished()
    found.add(second, numbers, 2.0)
    again = Session.load(session.file)
    assert again is not None
    assert again.finished()
    assert again.seconds == 4.0
    assert again.environment == {"cores": 2}
    assert again.load_averages == [0.5]
    assert find_session(run_folder, {**settings, "seed": 1}, cells) is None
    assert find_session(run_folder, settings, plan.cells) is None


def test_records_of_another_cell_or_setting_are_out_of_date(tmp_path: Path) -> None:
    go(tmp_path, Script())
    plan = make_plan(pipeline())
    folder = RunFolder.of(plan, tmp_path)
    cell = plan.cell("gates")
    assert read_phase(folder, plan, cell, "quality") is not None
    other = make_plan(pipeline(seed=1))
    assert phase_key(other, other.cell("gates"), "quality") != phase_key(plan, cell, "quality")
    assert read_phase(folder, other, other.cell("gates"), "quality") is None
    folder.record("gates", "quality").write_text("{")
    assert read_phase(folder, plan, cell, "quality") is None


def test_two_runs_of_one_name_do_not_mix(tmp_path: Path) -> None:
    (tmp_path / "small").mkdir()
    with FileLock(tmp_path / "small" / ".lock"), pytest.raises(UserError, match="at work"):
        go(tmp_path, Script())


def test_what_else_writes_into_the_folder_of_a_run_waits_for_no_run(tmp_path: Path) -> None:
    go(tmp_path, Script())
    folder = tmp_path / "small"
    exported = ["export", str(folder), "--cell", "dense", "--to", str(tmp_path / "out")]
    with FileLock(folder / ".lock"):
        for arguments in (["report", str(folder)], exported):
            result = CliRunner().invoke(app, arguments)
            assert result.exit_code == 2 and "another process is at work on" in result.output


def test_a_folder_that_is_no_export_is_refused_before_all_work(tmp_path: Path) -> None:
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "letter.txt").write_text("dear")
    script = Script()
    plan = make_plan(pipeline(export={"cut": {"to": str(tmp_path / "mine")}}))
    with pytest.raises(UserError, match="is not an earlier export"):
        go(tmp_path, script, plan)
    assert script.log == []


def test_an_export_that_fails_is_told_and_the_others_go_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    made = []

    def export(run: RunFolder, name: str, target: Path, executor: Any) -> Path:
        if name == "cut":
            raise failing("it does not load")
        made.append((name, target))
        return target

    monkeypatch.setattr(export_module, "export_cell", export)
    targets = {name: {"to": str(tmp_path / name)} for name in ("cut", "gates")}
    result = go(tmp_path, Script(), make_plan(pipeline(export=targets)))
    assert result.exit_code == 1
    assert made == [("gates", tmp_path / "gates")]
    assert all(cell.status != "failed" for cell in result.results.cells)


# --- Turns --------------------------------------------------------------------------------------


def test_every_cell_decodes_for_as_long_in_turns_that_alternate(tmp_path: Path) -> None:
    """The cell that decoded least goes next, until each has decoded for `min_seconds`."""
    speed = {"repeats": 2, "min_seconds": 40}
    plan = make_plan(pipeline(benchmark={"threads": 1, "speed": speed}))
    script = Script()
    script.turn_s = {"dense": 5.0, "gates+spec": 1.0}  # 40 s and 8 s of decoding a turn
    go(tmp_path, script, plan)
    first = [event[1] for event in script.done("speed") if event[3] == "0"]
    assert Counter(first) == {
        **{"dense": 1, "cut": 5, "gates": 5, "gates+skip": 5, "gates+spec": 5},
    }
    assert first[:5] == ["dense", "cut", "gates", "gates+skip", "gates+spec"]
    assert first[5:9] == first[1:5] == first[9:13], "the others go on in turns"
    second = [event[1] for event in script.done("speed") if event[3] == "1"]
    assert second[0] == "cut", "each round begins with another cell"
    assert len(script.done("warm")) == 5, "each is warmed up once, whole, before it is timed"
    dense = results_of(tmp_path).cell("dense").speed
    assert dense is not None and dense.decode_tokens_per_s is not None
    assert dense.decode_tokens_per_s.repeats == (10.0, 11.0)


def test_a_cell_that_decodes_nothing_has_one_turn(tmp_path: Path) -> None:
    """With one new token there is no decoding to wait for."""
    plan = make_plan(pipeline(benchmark={"speed": {"repeats": 1, "min_seconds": 40}}))
    script = Script()
    script.decode_rate = dict.fromkeys(["dense", "cut", "gates", "gates+skip", "gates+spec"], 0.0)
    go(tmp_path, script, plan)
    assert len(script.done("speed")) == 5


def test_other_code_is_another_session(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Speeds of one session are of one code: a changed file or library begins a new one."""
    go(tmp_path, Script())
    monkeypatch.setattr(runner_module, "fingerprint", lambda: "0" * 16)
    again = Script()
    go(tmp_path, again)
    assert len(again.done("speed")) == 30


def test_further_contexts_are_timed_with_one_row(tmp_path: Path) -> None:
    speed = {"repeats": 1, "min_seconds": 0, "batch_sizes": [4, 1], "contexts": [512, 128]}
    plan = make_plan(pipeline(pipelines={}, benchmark={"speed": speed}))
    go(tmp_path, Script(), plan)
    (file,) = (tmp_path / "small" / "speed").iterdir()
    session = Session.load(file)
    assert session is not None
    assert session.shapes == [Shape(1, 128), Shape(4, 128), Shape(1, 512)]
    assert session.main_shape == Shape(1, 128)
    assert session.roofline == {"memory_gb_per_s": 20.0}
    pairs = session.paired("gates+spec", "gates")
    assert {shape: len(each) for shape, each in pairs.items()} == dict.fromkeys(session.shapes, 1)
    ((own, plain),) = pairs[Shape(1, 512)]
    assert own["decode_tokens_per_s"] == 3 * plain["decode_tokens_per_s"]
    assert session.main("gates+spec")[0]["speculation"]["passes"] == 10


def test_categories_share_the_numbers_of_a_cell(tmp_path: Path) -> None:
    rows = [{"category": name, "prompt": "?"} for name in ("a", "b", "a")]
    asked = tmp_path / "asked.jsonl"
    asked.write_text("\n".join(map(json.dumps, rows)))
    speed = {"repeats": 2, "min_seconds": 0, "prompts": str(asked)}
    go(tmp_path, Script(), make_plan(pipeline(pipelines={}, benchmark={"speed": speed})))
    (file,) = (tmp_path / "small" / "speed").iterdir()
    session = Session.load(file)
    assert session is not None
    assert session.shapes == [Shape(1, 0, "a"), Shape(1, 0, "b")] and session.main_shape is None
    both = session.main("dense")
    assert [each["turns"] for each in both] == [2, 2]
    assert both[1]["decode_tokens_per_s"] == 11.0


# --- Memory -------------------------------------------------------------------------------------


def test_cells_that_do_not_fit_together_are_measured_in_groups(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    free = 2.5 * speed_module.PROCESS_BYTES / speed_module.MEMORY_SHARE

    script = Script()
    monkeypatch.setattr(script, "free_bytes", lambda: free)
    assert go(tmp_path, script).exit_code == 0
    assert script.most_live == 2
    assert len(script.done("speed", "dense")) == 4 * 6, "the baseline is in every group"
    assert len(script.done("speed", "cut")) == 6
    results = results_of(tmp_path)
    assert results.notes is not None
    assert "4 groups" in results.notes[0]
    dense = results.cell("dense").speed
    assert dense is not None
    assert dense.decode_tokens_per_s is not None
    assert len(dense.decode_tokens_per_s.repeats) == 12


# --- Names --------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "same"),
    [("gates+nf4", True), ("a" * 130, False), ("a/b", False), (".hidden", False)],
)
def test_cell_names_as_file_names(name: str, same: bool) -> None:
    file = file_name(name)
    assert (file == name) == same
    assert "/" not in file
    assert not file.startswith(".")
    assert len(file) <= 120
    assert file_name(name + "x") != file


# --- Real processes, ended at the worst moments -------------------------------------------------


@pytest.mark.slow
def test_a_run_that_is_ended_again_and_again_ends_like_an_unbroken_one(
    tmp_path: Path, tiny_llama: Path
) -> None:
    whole, broken = SlowRun(tmp_path / "whole", tiny_llama), SlowRun(tmp_path / "b", tiny_llama)
    whole.finish()

    code, _ = broken.end_at("train-2", signal.SIGKILL)
    assert code == -signal.SIGKILL
    code, err = broken.end_at("train-4", signal.SIGINT, signal.SIGINT, signal.SIGTERM)
    assert code == 130
    assert "to continue, run the same command again" in err
    assert "Traceback" not in err
    broken.end_at("quality-dropped", signal.SIGKILL)
    code, err = broken.end_at("speed-dropped-2", signal.SIGTERM)
    assert code == 143 and "run the same command again: gateskip run" in err
    broken.finish()

    assert [broken.count(f"train-{step}") for step in range(6)] == [1] * 6, "checkpoints are used"
    assert broken.count("quality-dense") == 1
    assert broken.count("quality-dropped") == 2, "the phase that was under way is repeated"
    assert [broken.count(f"speed-dropped-{number}") for number in range(4)] == [1, 1, 2, 1]
    assert numbers_of(broken.results()) == numbers_of(whole.results())
    plan = read_json(broken.out / "slow" / "plan.json")
    keys = [step["key"] for step in plan["steps"]]
    stores = [Store(each.out / "store") for each in (whole, broken)]
    for key in keys:
        first, second = (hash_folder(store.model(key)) for store in stores)
        assert first == second
    assert sorted(
        path.name for path in (broken.out / "store").iterdir() if path.name != ".hashes"
    ) == sorted([".locks", ".temp", ".work", *keys])
    assert list((broken.out / "store" / ".temp").iterdir()) == []
    assert list((broken.out / "store" / ".work").iterdir()) == []
    assert lineage(broken.folder / "export")[-1]["use"] == "export"

    assert "Nothing to do" in broken.finish()
    assert broken.count("load-dense") == 3, "once for quality, twice for speed"
