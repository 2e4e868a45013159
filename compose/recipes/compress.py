"""One model, compressed: its recipe is run, the best variant within the bounds is exported."""

from __future__ import annotations

import contextlib
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from compose.analysis.pick import pick
from compose.analysis.recommend import recommendations
from compose.artifacts.zero_points import price_text
from compose.assets import is_local
from compose.contract import CompressedTensorsJob, GgufJob
from compose.errors import UserError
from compose.language.schema import in_name
from compose.outputs.export import export_cell, is_current, refuse_foreign, stored_baseline
from compose.outputs.run_folder import RunFolder
from compose.planning.plan import Plan
from compose.planning.prepare import load_plan
from compose.processes.executors import make_executor
from compose.processes.worker_process import ask_once
from compose.recipes.recipe import Request, pipeline_of, pipeline_text
from compose.results.schema import CellResult, Results
from compose.run.runner import run
from compose.run.state import Board, Settings
from compose.store import private_folder, require_writable, write_text

RECIPE = "pipeline.yaml"


@dataclass(frozen=True)
class Compressed:
    """The result of `compress`: the folder of the compressed model, and all measurements."""

    folder: Path
    """The exported model folder."""
    variant: str
    """The name in `results` of the exported variant."""
    results: Results
    """The measurements of all variants. The baseline is the original model."""
    run_folder: Path
    """The folder of the run: report, pipeline file and logs."""
    gguf: Path | None = None
    """The same weights as a GGUF file for llama.cpp."""
    compressed_tensors: Path | None = None
    """The same weights as a folder for vLLM."""

    @property
    def cell(self) -> CellResult:
        """The measurements of the exported variant."""
        return self.results.cell(self.variant)

    @property
    def report(self) -> Path:
        """The HTML report that compares all variants."""
        return self.run_folder / "report.html"


def plan_of(request: Request, settings: Settings) -> Plan:
    """The plan of a request; its pipeline is written into the folder of its run.

    Raises:
        UserError: the target is in use or may not be written to, or the model is not available.
    """
    refuse_foreign(request.to)
    if not request.to.exists():
        require_writable(request.to)
    name = run_name(request.to)
    folder = settings.out.absolute() / name
    private_folder(folder)
    recipe = pipeline_of(request, name)
    text = pipeline_text(recipe, settings.command or "compose.compress")
    write_text(folder / RECIPE, text)
    return load_plan(folder / RECIPE, settings.asset_cache)


def run_name(to: Path) -> str:
    """The name of the run that fills a folder.

    >>> run_name(Path("exports/my model"))
    'compress-my-model'
    """
    return "compress-" + in_name(to.absolute().name)


def source_of(model: str) -> str:
    """The model as a pipeline in any folder names it: a path becomes absolute."""
    return str(Path(model).expanduser().absolute()) if is_local(model) else model


def compress(
    request: Request,
    plan: Plan,
    settings: Settings,
    board: Board,
    workers: int | None,
) -> Compressed:
    """Run the plan of a request, and export the fastest variant within its bounds.

    Raises:
        UserError: no variant meets the bounds; the message names the nearest. The run stays.
        StepError: an export does not load as it should.
    """
    threads = plan.pipeline.benchmark.threads
    result = run(plan, settings, make_executor("local", threads, workers), board)
    cell = choose(result.results, request)
    is_new = not is_current(result.folder, cell.name, request.to)
    if is_new:
        line = board.line(f"export {cell.name} to {request.to}")
        with result.folder.locked(), contextlib.closing(make_executor("local", None)) as executor:
            export_cell(result.folder, cell.name, request.to, executor)
        line.done()
    done = Compressed(request.to, cell.name, result.results, result.folder.root)
    return _in_formats(done, request, board, is_new=is_new)


def choose(results: Results, request: Request) -> CellResult:
    """The variant that decodes fastest within the bounds of a request.

    Without bounds, the one that the report recommends: for speed, else for size or exactness.

    Raises:
        UserError: none meets the bounds, none is recommended, or none was measured.
    """
    if request.is_bounded:
        most_bytes = None if request.at_most_mb is None else request.at_most_mb * 1e6
        return pick(results, max_kl=request.at_most_kl, max_bytes=most_bytes, baseline=False)
    answers = recommendations(results)
    for answer in answers:
        if answer.cell is not None:
            return answer.cell
    raise UserError(
        f"nothing is exported. {answers[0].sentence}",
        fix="accept a loss by --bits 8, --bits 4 or --at-most-kl",
    )


def _in_formats(done: Compressed, request: Request, board: Board, *, is_new: bool) -> Compressed:
    """Write the further formats of an exported folder; of one that is not new, those that lack."""
    file, folder = request.gguf_file, request.vllm_folder
    source = done.folder.absolute()
    if file is not None and (is_new or not file.exists()):
        _convert(GgufJob(source, file.absolute(), None), file, board)
    if folder is not None and (is_new or not folder.exists()):
        dense = stored_baseline(RunFolder.existing(done.run_folder), done.results)
        written = _convert(CompressedTensorsJob(source, folder.absolute(), dense), folder, board)
        for line in price_text(written["zero_points"]):
            board.print(line)
    return replace(done, gguf=file, compressed_tensors=folder)


def _convert(job: GgufJob | CompressedTensorsJob, target: Path, board: Board) -> dict[str, Any]:
    line = board.line(f"write {target}")
    try:
        written: dict[str, Any] = ask_once(job)
    except BaseException:
        line.failed("")
        raise
    line.done()
    return written
