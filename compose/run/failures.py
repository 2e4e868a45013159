"""What becomes of work that failed: tried again where it was taken away, else kept as a result.

    runs/NAME/failed/NAME.json    why a step (by its key) or a cell (by its name) failed, and a key

A run passes over what has failed under the same key, until `gateskip run --retry-failed`. The key
covers what is made or measured, its limits and the code: a raised limit tries again by itself.

A worker's error, its own crash and a limit that it hit are results. A worker that was taken away
(its node went, it was killed) leaves none: an executor of many machines starts the work again
(`attempted`), on another node where there is one, and a step goes on from its checkpoint. The
number of attempts is bounded: work that needs more memory than any node has is killed on each.
"""

from __future__ import annotations

import shutil
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import TypeVar

from compose.errors import WorkerLost
from compose.outputs.run_folder import file_name
from compose.planning.fingerprint import fingerprint
from compose.planning.keys import digest
from compose.planning.plan import Cell, Step
from compose.processes.endings import Failure, ending_of, failure_of, first_line, is_lasting
from compose.run.state import Line, RunState
from compose.store import read_json, write_json
from compose.units import printable


def step_failed(run: RunState, step: Step, error: Exception) -> None:
    """Note that a step failed; what would come again is kept for further runs."""
    failure = run.failed_steps[step.key] = failure_of(error, step.name)
    if is_lasting(error):
        _keep(run, step.key, _step_key(run, step), failure)


def cell_failed(run: RunState, cell: Cell, error: Exception, phase: str) -> None:
    """Note that a cell failed in a phase; what would come again is kept for further runs."""
    failure = run.failed_cells[cell.name] = failure_of(error, phase)
    if is_lasting(error):
        _keep(run, cell.name, _cell_key(run, cell), failure)


def pass_over_step(run: RunState, step: Step) -> bool:
    """Whether a step failed in an earlier run and is not tried again; it has then failed."""
    failure = _kept(run, step.key, _step_key(run, step))
    if failure is None:
        return False
    run.failed_steps[step.key] = failure
    _say(run, run.plan.title(step), failure)
    return True


def pass_over_cell(run: RunState, cell: Cell) -> bool:
    """Whether a cell failed in an earlier run and is not tried again; it has then failed."""
    failure = _kept(run, cell.name, _cell_key(run, cell))
    if failure is None:
        return False
    run.failed_cells[cell.name] = failure
    _say(run, cell.name, failure)
    return True


def forget_failures(run: RunState) -> None:
    """Have everything that failed tried again."""
    shutil.rmtree(_folder(run), ignore_errors=True)


def _folder(run: RunState) -> Path:
    return run.folder.root / "failed"


def _file(run: RunState, name: str) -> Path:
    return _folder(run) / f"{file_name(name)}.json"


def _keep(run: RunState, name: str, key: str, failure: Failure) -> None:
    try:
        write_json(_file(run, name), {"key": key, "name": name, "failure": asdict(failure)})
    except OSError as error:  # a full disk: then it is tried again
        run.board.print(f"! the failure of {name} cannot be kept: {first_line(error)}")


def _kept(run: RunState, name: str, key: str) -> Failure | None:
    record = read_json(_file(run, name))
    if not isinstance(record, dict) or record.get("key") != key:
        return None
    try:
        return Failure(**record["failure"])
    except (KeyError, TypeError):
        return None


def _say(run: RunState, name: str, failure: Failure) -> None:
    run.board.print(
        f"! {name} failed before and is not tried again without --retry-failed: "
        f"{printable(failure.reason)}"
    )


def _step_key(run: RunState, step: Step) -> str:
    limit = run.plan.pipeline.limits.step.model_dump()
    return digest({"step": step.key, "limit": limit, "code": fingerprint()})


def _cell_key(run: RunState, cell: Cell) -> str:
    pipeline = run.plan.pipeline
    return digest(
        {
            "cell": cell.key,
            "benchmark": pipeline.benchmark.model_dump(mode="json"),
            "seed": pipeline.seed,
            "limit": pipeline.limits.cell.model_dump(),
            "code": fingerprint(),
        }
    )


Made = TypeVar("Made")


def attempted(run: RunState, name: str, line: Line, work: Callable[[], Made]) -> Made:
    """What `work` returns, begun again while its worker is taken away, up to the executor's bound.

    Raises as `work`; the last error where every attempt was lost.
    """
    most = run.workers.executor.attempts
    for attempt in range(1, most + 1):
        try:
            return work()
        except WorkerLost as error:
            if attempt == most or not ending_of(error).from_outside:
                raise
            run.board.print(f"! {name}, attempt {attempt} of {most}: {first_line(error)}")
            line.update(0, 1, f"attempt {attempt + 1} of {most}")
    raise AssertionError("an executor allows one attempt at least")
