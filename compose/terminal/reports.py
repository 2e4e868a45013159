"""What `gateskip report` does: draws reports, and compares runs."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path

from compose.errors import UserError
from compose.outputs.run_folder import RunFolder
from compose.results.io import FILE_NAME, load_results


def draw_report(results_file: Path, folder: Path) -> None:
    """Draw report.html, report.md and report.csv of a run's results into a folder."""
    from reports.render import render

    render(results_file, folder)


def draw(run_dir: Path) -> str:
    """Draw a run's report beside its results; what was written, a line a file.

    Raises:
        UserError: it is not the folder of a run, its results cannot be read, or a run is at work
            on it.
    """
    from reports.render import render

    with _held(folder_of_results(run_dir)):
        done = render(run_dir, run_dir)
    return "\n".join(str(run_dir / path.name) for path in (done.html, done.markdown, done.csv))


def compare_and_tell(
    run_dirs: Sequence[Path], *, fail_on_regression: bool, tell: Callable[[str], object]
) -> bool:
    """Compare the first run with each other; whether any number became worse beyond chance.

    The comparison is written into the last run's folder. One run alone compares with nothing.

    Raises:
        UserError: there is one run only, under `fail_on_regression`; or a run is at work on the
            last folder.
    """
    if len(run_dirs) < 2:
        if fail_on_regression:
            fix = "name the earlier run first, then the run to judge"
            raise UserError("--fail-on-regression needs at least two runs", fix=fix)
        return False
    from reports.comparison import compare_runs, in_words, line

    runs = [load_results(folder_of_results(folder)) for folder in run_dirs]
    with _held(run_dirs[-1]):
        done = compare_runs(runs, run_dirs[-1])
    tell("\n".join(str(run_dirs[-1] / path.name) for path in (done.html, done.markdown, done.json)))
    for pair in done.pairs:
        tell(line(pair))
        for change in pair.regressions:
            tell(f"  worse: {in_words(change)}")
    return any(pair.regressions for pair in done.pairs)


def folder_of_results(run_dir: Path) -> Path:
    """The folder, which holds results: that of a run, or one that is published of it.

    Raises:
        UserError: it is neither.
    """
    if not (run_dir / FILE_NAME).is_file():
        RunFolder.existing(run_dir)
    return run_dir


def _held(run_dir: Path) -> AbstractContextManager[None]:
    """The folder of a run, held alone, since a run sweeps it; what is kept of one is not swept."""
    run = RunFolder(run_dir.absolute())
    return run.locked() if run.plan_file.is_file() else nullcontext()
