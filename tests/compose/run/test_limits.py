"""Limits, crashes and kills as results: what is measured of them, kept, tried again, and shown."""

from __future__ import annotations

import json
import os
import signal
import time
from pathlib import Path
from typing import Any

import pytest
import scripted_runs as scripted
from jobs import write_idle_job

from compose.contract import UNLIMITED, Allowed
from compose.errors import PipelineError, StepError, WorkerLost
from compose.language.parse import load_pipeline
from compose.memory import oom_kills
from compose.planning.plan import cell_needs, step_needs
from compose.planning.planner import make_plan
from compose.processes.endings import Ending, ending_of, is_lasting, lost
from compose.processes.worker_process import LocalWorker
from compose.store import Store

LIMITS = {"step": {"seconds": 60.0}, "cell": {"memory_mb": 500.0}}


# --- In the file, in the plan -------------------------------------------------------------------


def parsed(folder: Path, limits: str) -> Any:
    file = folder / "a.yaml"
    text = f"schema: 1\nname: a\nmodel: {{source: smollm2-135m-instruct}}\nlimits: {limits}\n"
    text += "matrix: default\n"
    file.write_text(text)
    return load_pipeline(file)


def test_limits_are_read(tmp_path: Path) -> None:
    limits = parsed(
        tmp_path, "{step: {seconds: 600, memory_mb: 8e3}, cell: {seconds: 90.5}}"
    ).limits
    assert (limits.step.seconds, limits.step.memory_mb) == (600, 8000)
    assert (limits.cell.seconds, limits.cell.memory_mb) == (90.5, None)


@pytest.mark.parametrize(
    ("limits", "message"),
    [
        ("{step: {seconds: 0}}", r"4:26: limits\.step\.seconds: expected a number above 0"),
        ("{cell: {memory_mb: -5}}", r"4:28: limits\.cell\.memory_mb: expected a number above 0"),
        ("{cell: {seconds: soon}}", "4:26: .*expected a number, not 'soon'"),
        ("{cell: {second: 5}}", "4:17: .*did you mean 'seconds'"),
        ("{cells: {seconds: 5}}", "4:10: .*did you mean 'cell'"),
        ("{step: {seconds: .inf}}", "4:26: .*expected a finite number"),
        ("{step: 60}", "4:16: .*expected a mapping, not 60"),
        ("60", "4:9: .*expected a mapping, not 60"),
    ],
)
def test_a_limit_that_is_none_is_refused_at_its_place(
    limits: str, message: str, tmp_path: Path
) -> None:
    with pytest.raises(PipelineError, match=message):
        parsed(tmp_path, limits)


def test_limits_are_no_part_of_a_key() -> None:
    free, limited = make_plan(scripted.pipeline()), make_plan(scripted.pipeline(limits=LIMITS))
    assert [step.key for step in free.steps] == [step.key for step in limited.steps]
    assert [cell.key for cell in free.cells] == [cell.key for cell in limited.cells]
    assert limited.to_json()["limits"]["cell"] == {"seconds": None, "memory_mb": 500.0}


def test_a_plan_shows_its_limits(tmp_path: Path) -> None:
    from rich.console import Console

    from compose.outputs.run_folder import RunFolder
    from compose.terminal.show import plan_tables

    plan = make_plan(scripted.pipeline(limits=LIMITS))
    console = Console(width=200, record=True, file=open(os.devnull, "w"))  # noqa: SIM115
    console.print(plan_tables(plan, RunFolder.of(plan, tmp_path)))
    assert "limits: a step 1 min 00 s, a cell 500.0 MB" in console.export_text()


def test_workers_are_asked_for_within_their_limits(tmp_path: Path) -> None:
    plan = make_plan(scripted.pipeline(limits=LIMITS))
    assert step_needs(plan, plan.steps[1]).allowed == Allowed(60.0, None, "limits.step")
    assert not any(step_needs(plan, step).gpu for step in plan.steps), "see test_device.py"
    store = Store(tmp_path)
    assert cell_needs(plan, plan.cells[0], store).memory == 500_000_000, "at most what is allowed"
    free = make_plan(scripted.pipeline())
    assert cell_needs(free, free.cells[0], store).memory is None
    store.model(free.cells[0].weights).mkdir(parents=True)
    (store.model(free.cells[0].weights) / "model.safetensors").write_bytes(b"0" * 1000)
    assert cell_needs(free, free.cells[0], store).memory == 800_002_000


# --- What a process is ended by -----------------------------------------------------------------


def idle(folder: Path, allowed: Allowed = UNLIMITED) -> LocalWorker:
    """A worker of role `cell`, which waits for commands."""
    write_idle_job(folder / "job.json")
    return LocalWorker("cell", folder / "job.json", folder / "cell.log", 1, allowed)


def ended(worker: LocalWorker) -> Ending:
    with pytest.raises(WorkerLost) as caught:
        worker.receive()
    return ending_of(caught.value)


def wait_for_start(folder: Path) -> None:
    end = time.monotonic() + 300
    while "--- cell" not in (folder / "cell.log").read_text():
        assert time.monotonic() < end
        time.sleep(0.05)


def test_a_worker_that_works_too_long_is_ended(tmp_path: Path) -> None:
    worker = idle(tmp_path, Allowed(seconds=0.3, name="limits.cell"))
    ending = ended(worker)
    assert ending.limit == "limits.cell.seconds"
    assert ending.seconds is not None and ending.seconds >= 0.3
    assert "by limits.cell.seconds" in ending.as_text()
    assert worker.process.returncode is not None
    assert ending.lasting and not ending.from_outside


def test_time_in_which_nothing_was_asked_is_not_counted(tmp_path: Path) -> None:
    worker = idle(tmp_path, Allowed(seconds=30.0))
    try:
        wait_for_start(tmp_path)
        time.sleep(0.5)
        assert worker.worked == 0.0
        worker.send({"do": "speed", "round": 0, "batch": 1})
        asked = time.monotonic()
        assert not worker.receive()["ok"]
        assert 0.0 < worker.worked <= time.monotonic() - asked
    finally:
        worker.stop()


def test_a_worker_that_holds_too_much_is_ended(tmp_path: Path) -> None:
    ending = ended(idle(tmp_path, Allowed(memory=1_000_000, name="limits.step")))
    assert ending.limit == "limits.step.memory_mb"
    assert ending.most_bytes is not None and ending.most_bytes > 1_000_000
    assert "it used" in ending.as_text()


@pytest.mark.parametrize(
    ("number", "lasting", "from_outside"),
    [
        (signal.SIGKILL, True, True),
        (signal.SIGSEGV, True, False),
        (signal.SIGTERM, False, True),
    ],
)
def test_a_signal_is_named_and_its_sender_is_not(
    number: signal.Signals, lasting: bool, from_outside: bool, tmp_path: Path
) -> None:
    worker = idle(tmp_path)
    wait_for_start(tmp_path)
    os.kill(worker.process.pid, number)
    ending = ended(worker)
    assert ending.signal == number.name
    assert (ending.lasting, ending.from_outside) == (lasting, from_outside)
    assert ending.exit_code is None
    assert "usual" not in ending.as_text(), "nothing is guessed"


def test_an_exit_without_an_answer_has_its_code(tmp_path: Path) -> None:
    (tmp_path / "job.json").write_text("no json")
    worker = LocalWorker("cell", tmp_path / "job.json", tmp_path / "cell.log", 1)
    ending = ended(worker)
    assert ending.exit_code == 1
    assert "exit code 1" in ending.as_text()


def test_a_worker_that_we_stopped_has_no_ending(tmp_path: Path) -> None:
    worker = idle(tmp_path)
    worker.stop()
    with pytest.raises(StepError) as caught:
        worker.receive()
    assert not is_lasting(caught.value)


def test_what_the_kernel_counted_is_said() -> None:
    assert oom_kills() >= 0
    text = Ending(signal="SIGKILL", most_bytes=3_000_000_000, oom_kills=1).as_text()
    assert "at most 3 GB of memory" in text.replace("3.0 GB", "3 GB")
    assert "the kernel killed 1 process(es) for lack of memory" in text


def test_an_ending_survives_its_error() -> None:
    for ending in (Ending(exit_code=0, seconds=1.5), Ending(node="n", node_lost=True)):
        assert ending_of(lost(ending)) == ending


# --- As a result of a run -----------------------------------------------------------------------

KILLED = lost(Ending(signal="SIGSEGV", most_bytes=5_000_000))


def test_a_crash_is_a_result_until_it_is_asked_for_again(tmp_path: Path) -> None:
    script = scripted.Script()
    script.break_at = {("quality", "gates"): KILLED}
    result = scripted.go(tmp_path, script)
    failed = result.results.cell("gates")
    assert (result.exit_code, failed.status, failed.failed_in) == (1, "failed", "quality")
    assert failed.ending == {"signal": "SIGSEGV", "most_bytes": 5_000_000}
    assert "SIGSEGV" in (failed.reason or "")
    again = scripted.Script()
    result = scripted.go(tmp_path, again)
    assert again.log == [] and result.exit_code == 1 and not result.worked
    assert result.results.cell("gates").ending == failed.ending
    retried = scripted.Script()
    result = scripted.go(tmp_path, retried, retry_failed=True)
    assert result.exit_code == 0
    assert ("quality", "gates") in retried.log and ("quality", "dense") not in retried.log
    assert list((tmp_path / "small").glob("failed/*")) == []


def test_a_step_that_crashed_is_passed_over_with_its_cells(tmp_path: Path) -> None:
    script = scripted.Script()
    script.break_at = {("step", "gates"): KILLED}
    scripted.go(tmp_path, script)
    again = scripted.Script()
    result = scripted.go(tmp_path, again)
    assert again.done("step") == [] and again.done("quality") == []
    for name in ("gates", "gates+skip", "gates+spec"):
        assert result.results.cell(name).failed_in == "gates"
    retried = scripted.Script()
    assert scripted.go(tmp_path, retried, retry_failed=True).exit_code == 0
    assert retried.done("step") == [("step", "gates")]


def test_a_raised_limit_tries_again_by_itself(tmp_path: Path) -> None:
    script = scripted.Script()
    ending = Ending(limit="limits.cell.seconds", seconds=60.0)
    script.break_at = {("speed", "cut", "1", "1"): lost(ending)}
    limited = make_plan(scripted.pipeline(limits={"cell": {"seconds": 60.0}}))
    result = scripted.go(tmp_path, script, limited)
    assert "limits.cell.seconds" in (result.results.cell("cut").reason or "")
    raised = make_plan(scripted.pipeline(limits={"cell": {"seconds": 90.0}}))
    assert scripted.go(tmp_path, scripted.Script(), raised).exit_code == 0


@pytest.mark.parametrize(
    "error", [StepError("No space left on device"), lost(Ending(signal="SIGTERM"))]
)
def test_what_may_be_put_right_is_tried_again(error: Exception, tmp_path: Path) -> None:
    script = scripted.Script()
    script.break_at = {("quality", "gates"): error}
    assert scripted.go(tmp_path, script).exit_code == 1
    assert scripted.go(tmp_path, scripted.Script()).exit_code == 0


class Flaky(scripted.Script):  # type: ignore[misc]
    """Loses the worker of one event a few times, on an executor that begins it again."""

    attempts = 3

    def __init__(self, event: tuple[str, ...], times: int, ending: Ending) -> None:
        super().__init__()
        self.event, self.left, self.ending = event, times, ending

    def note(self, *event: str) -> None:
        super().note(*event)
        if event == self.event and self.left:
            self.left -= 1
            raise lost(self.ending)


GONE = Ending(node="n1", node_lost=True)
TAKEN = Ending(signal="SIGKILL", node="n1")


@pytest.mark.parametrize("ending", [GONE, TAKEN])
@pytest.mark.parametrize("event", [("step", "gates"), ("quality", "gates")])
def test_a_worker_that_was_taken_away_begins_again(
    event: tuple[str, ...], ending: Ending, tmp_path: Path
) -> None:
    script = Flaky(event, 2, ending)
    assert scripted.go(tmp_path, script).exit_code == 0
    assert script.log.count(event) == 3


def test_attempts_are_bounded(tmp_path: Path) -> None:
    script = Flaky(("step", "gates"), 9, GONE)
    result = scripted.go(tmp_path, script)
    assert script.log.count(("step", "gates")) == 3
    assert "lost with its node" in (result.results.cell("gates").reason or "")
    assert scripted.go(tmp_path, scripted.Script()).exit_code == 0, "a lost node is no result"


def test_a_crash_of_its_own_is_not_tried_elsewhere(tmp_path: Path) -> None:
    script = Flaky(("step", "gates"), 9, Ending(signal="SIGSEGV"))
    scripted.go(tmp_path, script)
    assert script.log.count(("step", "gates")) == 1


# --- The last line ------------------------------------------------------------------------------


@pytest.mark.parametrize("json_lines", [False, True])
def test_the_last_line_is_json(
    json_lines: bool, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    from compose.run.state import Settings
    from compose.terminal.live.run_shown import run_shown

    script = scripted.Script()
    script.break_at = {("quality", "gates"): KILLED}
    settings = Settings(tmp_path, tmp_path / "cache", "gateskip run")
    plan = make_plan(scripted.pipeline())
    run_shown(plan, settings, script, quiet=False, json_lines=json_lines)
    last = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert (last["event"], last["run"], last["exit_code"]) == ("result", "small", 1)
    if not json_lines:
        assert last["failed"] == ["gates"] and last["measured"] == 4


@pytest.mark.parametrize("json_lines", [False, True])
@pytest.mark.parametrize(
    ("error", "event", "code"),
    [
        (KeyboardInterrupt(), "interrupted", 130),
        (OSError(28, "No space left on device", "a"), "error", 1),
    ],
)
def test_the_last_line_is_json_also_where_a_run_cannot_go_on(
    error: BaseException,
    event: str,
    code: int,
    json_lines: bool,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    from compose.run.state import Settings
    from compose.terminal.live import run_shown as module

    def broken(*_: Any) -> Any:
        raise error

    monkeypatch.setattr(module, "run", broken)
    settings = Settings(tmp_path, tmp_path / "cache", "gateskip run")
    with pytest.raises(type(error)):
        plan = make_plan(scripted.pipeline())
        module.run_shown(plan, settings, scripted.Script(), quiet=True, json_lines=json_lines)
    last = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert (last["event"], last["exit_code"]) == (event, code)
