"""Stored steps of runs: damaged ones are made again, two runs share one store, space is asked for.

Workers are scripted as in test_runner.py; the last test starts real ones on a tiny model.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import Any

import pytest
import scripted_runs as scripted

from compose import hashes
from compose.errors import StepError
from compose.planning.planner import make_plan
from compose.run import steps as steps_module
from compose.store import Store, write_json

ENVIRONMENT = {**os.environ, "PYTHONPATH": str(Path(__file__).resolve().parents[3])}


def flip(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.write_bytes(data)


def test_a_damaged_step_is_made_again_and_that_is_said(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    scripted.go(tmp_path, scripted.Script())
    plan = make_plan(scripted.pipeline())
    gates = next(step for step in plan.steps if step.name == "gates")
    flip(Store(tmp_path / "store").model(gates.key) / "model.safetensors")
    script, told = scripted.Script(), []
    board = scripted.Board(scripted.Console(file=scripted.io.StringIO(), width=200))
    board.print = lambda text, **_: told.append(text)
    given = scripted.Settings(tmp_path, tmp_path / "cache", "gateskip run")
    result = scripted.run(plan, given, script, board)
    assert [event[1] for event in script.done("step")] == ["gates"]
    assert script.done("quality") == [], "its cells were measured on what it was"
    assert any("gates is made again" in text and "not what was stored" in text for text in told)
    assert result.exit_code == 0 and result.worked
    again = scripted.Script()
    scripted.go(tmp_path, again)
    assert again.log == []


def test_a_damaged_folder_is_not_exported(tmp_path: Path) -> None:
    from compose.errors import ArtifactError
    from compose.outputs.export import export_cell
    from compose.outputs.run_folder import RunFolder

    scripted.go(tmp_path, scripted.Script())
    plan = make_plan(scripted.pipeline())
    flip(Store(tmp_path / "store").model(plan.cell("cut").weights) / "model.safetensors")
    with pytest.raises(ArtifactError, match="is damaged"):
        export_cell(RunFolder.of(plan, tmp_path), "cut", tmp_path / "x", scripted.Script())
    assert not (tmp_path / "x").exists()


def test_two_runs_on_one_store_do_each_step_once(tmp_path: Path) -> None:
    scripts = [scripted.Script(), scripted.Script()]
    for script in scripts:
        note = script.note

        def slow(*event: str, note: Any = note) -> None:
            if event[0] == "step":
                time.sleep(0.3)
            note(*event)

        script.note = slow
    results: dict[str, Any] = {}

    def go(name: str, script: Any) -> None:
        results[name] = scripted.go(tmp_path, script, make_plan(scripted.pipeline(name=name)))

    threads = [
        threading.Thread(target=go, args=(name, script))
        for name, script in zip(("one", "two"), scripts, strict=True)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(600)
    assert {name: result.exit_code for name, result in results.items()} == {"one": 0, "two": 0}
    made = sorted(event[1] for script in scripts for event in script.done("step"))
    assert made == ["drop", "gates", "source"]


def test_a_step_without_space_fails_before_it_begins(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = steps_module.needed_bytes

    def needed(run: Any, step: Any) -> int:
        return 10**18 if step.name == "gates" else whole(run, step)

    monkeypatch.setattr("compose.run.steps.needed_bytes", needed)
    script = scripted.Script()
    result = scripted.go(tmp_path, script)
    assert result.exit_code == 1
    assert "gates" not in [event[1] for event in script.done("step")]
    failed = result.results.cell("gates")
    assert "gates writes about" in (failed.reason or "") and "free" in (failed.reason or "")
    assert result.results.cell("cut").status == "ok"
    monkeypatch.undo()


def test_what_fits_is_let_through(tmp_path: Path) -> None:
    steps_module.require_space(tmp_path / "not" / "yet" / "there", 1, "a step")
    with pytest.raises(StepError, match="a step writes about"):
        steps_module.require_space(tmp_path, 10**18, "a step")


def test_the_estimate_follows_what_a_step_starts_from(tmp_path: Path) -> None:
    scripted.go(tmp_path, scripted.Script())
    plan = make_plan(scripted.pipeline())
    state: Any = type("State", (), {})()
    state.plan, state.store = plan, Store(tmp_path / "store")
    state.settings = scripted.Settings(tmp_path, tmp_path / "cache")
    steps = {step.name: step for step in plan.steps}
    parent = sum(state.store.manifest(steps["source"].key)["files"].values())
    assert steps_module.needed_bytes(state, steps["source"]) == pytest.approx(4 * 134.5e6, rel=0.01)
    assert steps_module.needed_bytes(state, steps["drop"]) == parent
    trained = scripted.pipeline(stages={"gates": {"use": "gate", "steps": 5}}, pipelines={},
                                matrix={"gate": ("none", "gates")})  # fmt: skip
    state.plan = make_plan(trained)
    state.store = Store(tmp_path / "store")
    gates = next(step for step in state.plan.steps if step.name == "gates")
    assert steps_module.needed_bytes(state, gates) == parent * (1 + 24 / 4), (
        "checkpoints of all weights"
    )


@pytest.mark.slow
def test_two_processes_on_one_store_train_once(tmp_path: Path, tiny_llama: Path) -> None:
    one = scripted.SlowRun(tmp_path / "a", tiny_llama)
    two = scripted.SlowRun(tmp_path / "b", tiny_llama)
    two.file.write_text(two.file.read_text().replace("name: slow", "name: other"))
    two.marks, two.out = one.marks, one.out
    started = [each.start(0.3) for each in (one, two)]
    for process in started:
        _, err = process.communicate(timeout=300)
        assert process.returncode == 0, err
    assert [one.count(f"train-{step}") for step in range(6)] == [1] * 6
    assert isinstance(started[0], subprocess.Popen)


READ_ONLY = """
import sys
from compose.cli import app
app(sys.argv[1:])
"""


def closed(folder: Path) -> None:
    """Take the right to write from everything below a folder."""
    for path in [*folder.rglob("*"), folder]:
        path.chmod(0o555 if path.is_dir() else 0o444)


def opened(folder: Path) -> None:
    for path in [folder, *folder.rglob("*")]:
        path.chmod(0o755 if path.is_dir() else 0o644)


def without_roots_rights() -> list[str]:
    """What a command begins with so that modes count for root, too."""
    if os.geteuid() != 0:
        return []
    if shutil.which("setpriv") is None:
        pytest.skip("modes say nothing to root, and setpriv is missing")
    return ["setpriv", "--bounding-set=-dac_override", "--inh-caps=-dac_override"]


@pytest.mark.slow
def test_a_read_only_store_can_be_reported_from(tmp_path: Path) -> None:
    scripted.go(tmp_path, scripted.Script())
    store = tmp_path / "store"
    closed(store)
    try:
        command = [*without_roots_rights(), sys.executable, "-c", READ_ONLY]
        probe = [*command[:-2], "-c", f"open({str(store / 'x')!r}, 'w')"]
        assert subprocess.run(probe, capture_output=True).returncode != 0, "it is read-only"
        for asked in (
            ["report", str(tmp_path / "small")],
            ["pick", str(tmp_path / "small"), "--maximize", "decode"],
            ["cache", "list", "--out", str(tmp_path)],
            ["cache", "verify", "--out", str(tmp_path)],
        ):
            done = subprocess.run(
                [*command, *asked], capture_output=True, text=True, env=ENVIRONMENT
            )
            assert done.returncode == 0, (asked, done.stdout, done.stderr)
        again = scripted.Script()
        assert scripted.go(tmp_path, again).exit_code == 0
        assert again.log == []
    finally:
        opened(store)


def test_a_store_that_cannot_be_written_is_a_failed_step_and_no_traceback(tmp_path: Path) -> None:
    scripted.go(tmp_path, scripted.Script())
    (tmp_path / "store" / ".temp").rmdir()
    (tmp_path / "store" / ".temp").write_text("in the way")
    other = scripted.pipeline(name="other", seed=5)
    result = scripted.go(tmp_path, scripted.Script(), make_plan(other))
    assert result.exit_code == 1
    assert result.results.cell("gates").failed_in == "gates"
    assert result.results.cell("dense").status == "ok"


def test_what_a_killed_run_left_is_swept(tmp_path: Path) -> None:
    scripted.go(tmp_path, scripted.Script())
    run, store = tmp_path / "small", Store(tmp_path / "store")
    key = store.all_keys()[0]
    left = [
        run / ".123-456-plan.json",
        run / "cells" / "dense" / ".9-9-load.json",
        run / "logs" / ".scratch" / "gateskip-tasks-x" / "a",
        store.root / ".temp" / f".{key}-0123abcd" / "model" / "a",
        store.root / ".temp" / f".{key}-0123abcd-old" / "a",
        store.root / ".work" / key / "checkpoint",
        store.root / ".hashes" / ".999999999-1-x.json",
    ]
    kept = [run / "cells" / ".reference-x", store.root / ".work" / "unfinished" / "checkpoint"]
    for path in (*left, kept[1]):
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text("left")
    again = scripted.Script()
    assert scripted.go(tmp_path, again).exit_code == 0
    assert again.log == []
    assert [path for path in left if path.exists()] == []
    assert kept[1].exists(), "an unfinished step goes on from its scratch"


def test_what_another_run_is_at_work_on_is_not_swept(tmp_path: Path) -> None:
    scripted.go(tmp_path, scripted.Script())
    store = Store(tmp_path / "store")
    key = store.all_keys()[0]
    at_work = store.root / ".temp" / f".{key}-0123abcd"
    at_work.mkdir(parents=True)
    with store.locked("other"):
        other = store.root / ".temp" / ".other-0123abcd"
        other.mkdir()
        Store(tmp_path / "store").sweep()
        assert other.exists() and not at_work.exists()


def test_a_damaged_memory_of_hashes_is_no_damage(tmp_path: Path) -> None:
    scripted.go(tmp_path, scripted.Script())
    store = Store(tmp_path / "store")
    key = store.all_keys()[0]
    memory = store.root / ".hashes" / f"{key}.json"
    marks = {name: hashes._mark(store.path(key) / name) for name in store.manifest(key)["sha256"]}
    write_json(memory, {name: [mark, "0" * 64] for name, mark in marks.items()})
    assert store.damage(key) is None
