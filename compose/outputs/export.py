"""A measured cell -> a folder to ship: model, gates, decode settings, lineage, numbers, model card.

The folder is filled in a temporary place, loaded again in a fresh process, and compared with the
logits that were stored when its step was made. Only then it is moved into place.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from compose.analysis.metrics import METRICS, metrics
from compose.artifacts.bundle import needs_loader, write_bundle, write_loader
from compose.artifacts.folder import (
    LINEAGE,
    dtype_of,
    is_gated,
    lineage,
    place_file,
    require_model,
    write_lineage,
)
from compose.assets import resolve_model
from compose.contract import CheckJob, ContinueJob, role_of, write_job
from compose.errors import ArtifactError, ComposeError, StepError, UserError, suggest
from compose.numbers import metric_text
from compose.outputs.run_folder import RunFolder
from compose.processes.executors import Executor
from compose.processes.worker_process import await_answer
from compose.results.io import load_results
from compose.results.schema import CellResult, Results
from compose.store import new_folder, read_json, write_json
from compose.units import printable

MEASUREMENTS = "measurements.json"
CARD = "README.md"
CARD_METRICS = (
    *("size", "resident", "decode", "prefill", "ttft"),
    *("perplexity", "kl", "agreement", "retained", "saved", "acceptance", "accepted"),
)
GATE_SETTINGS = "gateskip.json"
DRAFT_FOLDER = "draft_model"
COMPARED_TOKENS = 32


def export_cell(
    run: RunFolder, name: str, target: Path, executor: Executor, *, compare_tokens: bool = False
) -> Path:
    """Export a cell of a finished run to the folder `target`, and return it.

    An earlier export at `target` is replaced; any other folder with files is refused. With
    `compare_tokens`, the export must also continue a text with the same tokens as its source.

    Raises:
        UserError: the run has no such cell, it was not measured, or the target is in use.
        StepError: the export does not load to the same model.
    """
    results = load_results(run.results_file)
    cell = results.cell(name)
    planned, source = stored_cell(run, cell)
    refuse_foreign(target)
    target = target.absolute()
    with new_folder(target) as folder:
        assemble(folder, source, results, cell, planned)
        verify(folder, run, planned["weights"], executor)
        if compare_tokens:
            verify_tokens(folder, run, planned, executor)
    return target


def stored_cell(run: RunFolder, cell: CellResult) -> tuple[dict[str, Any], Path]:
    """A measured cell's row of plan.json, and its model folder in the store.

    Raises:
        UserError: the cell was not measured.
        ArtifactError: its folder is no longer in the store, or is damaged.
    """
    if cell.status != "ok":
        raise UserError(
            f"cell {cell.name!r} cannot be exported: it is {cell.status} ({cell.reason})"
        )
    planned = planned_cell(run, cell.name)
    damage = run.store.damage(planned["weights"])
    if damage is not None or not run.store.has(planned["weights"]):
        state = "no longer" if damage is None else f"damaged ({damage})"
        raise ArtifactError(
            f"the model folder of cell {cell.name!r} is {state} in the store {run.store.root}",
            fix="run the pipeline again: only what is missing is made",
        )
    return planned, run.store.model(planned["weights"])


def stored_baseline(run: RunFolder, results: Results) -> Path | None:
    """The model folder of a run's baseline in the store; None where it is not there."""
    try:
        return stored_cell(run, results.cell(results.baseline))[1]
    except UserError:
        return None


def is_current(run: RunFolder, name: str, target: Path) -> bool:
    """Whether `target` already is the export of this cell with these numbers."""
    written = read_json(target / MEASUREMENTS)
    results = load_results(run.results_file)
    current = measurements(results, results.cell(name), planned_cell(run, name))
    return bool(written == current) and (target / "config.json").is_file()


def planned_cell(run: RunFolder, name: str) -> dict[str, Any]:
    """The cell's row of plan.json: its weights' key and its decode settings.

    Raises:
        UserError: the plan has no such cell.
    """
    plan = read_json(run.plan_file) or {}
    cells: dict[str, dict[str, Any]] = {cell["name"]: cell for cell in plan.get("cells", [])}
    if name not in cells:
        raise UserError(f"the run's plan has no cell {name!r}: {suggest(name, cells)}")
    return cells[name]


def refuse_foreign(target: Path) -> None:
    """Refuse a target that has other files than an earlier export, with a UserError."""
    if target.is_dir() and (target / LINEAGE).is_file() and (target / MEASUREMENTS).is_file():
        return
    if target.exists() and (not target.is_dir() or any(target.iterdir())):
        raise UserError(
            f"{target} exists and is not an earlier export, so it is not replaced",
            fix="name another folder, or move that one away",
        )


def assemble(
    folder: Path, source: Path, results: Results, cell: CellResult, planned: dict[str, Any]
) -> None:
    """Fill the export folder. The lineage comes last, because its hash covers all other files."""
    require_model(source)
    for path in sorted(path for path in source.rglob("*") if path.is_file()):
        if path.name != LINEAGE:
            place_file(path, folder / path.relative_to(source), link=False)
    decode = decode_default(planned["decode"])
    if (draft := draft_folder(planned["decode"])) is not None:
        for path in sorted(path for path in draft.rglob("*") if path.is_file()):
            place_file(path, folder / DRAFT_FOLDER / path.relative_to(draft), link=False)
    if is_gated(source):
        settings = read_json(folder / GATE_SETTINGS) or {}
        write_json(folder / GATE_SETTINGS, {**settings, "decode": decode})
    elif decode != {"mode": "plain"}:  # it drafts without gates, or keeps keys in 8 bits
        write_json(folder / GATE_SETTINGS, {"decode": decode})
    if (folder / GATE_SETTINGS).exists():
        write_bundle(folder)
    if needs_loader(folder):
        write_loader(folder)
    write_json(folder / MEASUREMENTS, measurements(results, cell, planned))
    before = lineage(source)
    (folder / CARD).write_text(model_card(folder, results, cell, before), encoding="utf-8")
    entry = {
        "name": cell.name,
        "use": "export",
        "parameters": {"run": results.run, "decode": decode},
        "input_sha256": before[-1]["output_sha256"],
    }
    for name in ("arithmetic", "scoring_arithmetic"):
        if (arithmetic := getattr(cell, name)) is not None:
            entry[name] = arithmetic.model_dump(mode="json")
    write_lineage(folder, entry, before)


def decode_default(decode: dict[str, Any] | None) -> dict[str, Any]:
    """The decode settings that an export states: those of the cell's decode stage. A draft model is
    not named: the export carries it in its folder `draft_model`."""
    if decode is None:
        return {"mode": "plain"}
    settings = {key: value for key, value in decode.items() if key not in ("use", "draft_model")}
    if settings.get("kv_cache") == "model":  # as where nothing is said
        del settings["kv_cache"]
    return {"mode": decode["use"], **settings}


def draft_folder(decode: dict[str, Any] | None) -> Path | None:
    """The folder of the model that drafts for a cell; None where none does."""
    source = (decode or {}).get("draft_model")
    return None if source is None else Path(resolve_model(source).path)


def measurements(results: Results, cell: CellResult, planned: dict[str, Any]) -> dict[str, Any]:
    """The cell's numbers, those of the cells it is compared with, and where they were taken."""
    named = {"cell": cell, "baseline": results.find(results.baseline)}
    named["quality_of"] = results.find(cell.quality_of)
    rows = {role: row.model_dump(mode="json") for role, row in named.items() if row is not None}
    head = {"schema_version": results.schema_version, "run": results.run}
    where = {"environment": results.environment, "benchmark": results.benchmark}
    return {**head, "weights": planned["weights"], **where, **rows}


def verify(folder: Path, run: RunFolder, weights: str, executor: Executor) -> None:
    """Load the folder in a fresh process and compare its logits with those stored by the step.

    Raises:
        StepError: it does not load, or gives other logits.
    """
    reference = run.store.path(weights) / "check.safetensors"
    try:
        _ask(CheckJob(folder, reference), run, weights, executor)
    except ComposeError as error:
        raise StepError(f"the export does not load as it should: {error}") from error


def verify_tokens(
    folder: Path, run: RunFolder, planned: dict[str, Any], executor: Executor
) -> None:
    """Continue the probe text greedily with the export and with the step's folder that it was made
    of.

    Each runs in a separate process: the source with the cell's decode settings, the export with its
    own defaults.

    Raises:
        StepError: the tokens differ.
    """
    weights = planned["weights"]
    settings, draft = decode_default(planned["decode"]), draft_folder(planned["decode"])
    if draft is not None:
        settings["draft_model"] = str(draft)
    source = _continuation(run.store.model(weights), settings, run, weights, executor)
    export = _continuation(folder, None, run, weights, executor)
    if source != export:
        pairs = zip(source, export, strict=False)
        first = next((i for i, (a, b) in enumerate(pairs) if a != b), COMPARED_TOKENS)
        raise StepError(f"the export gives other tokens than its source from token {first} on")


def _continuation(
    folder: Path,
    settings: dict[str, Any] | None,
    run: RunFolder,
    weights: str,
    executor: Executor,
) -> list[int]:
    job = ContinueJob(folder, COMPARED_TOKENS, settings)
    tokens: list[int] = _ask(job, run, weights, executor)
    return tokens


def _ask(job: CheckJob | ContinueJob, run: RunFolder, weights: str, executor: Executor) -> Any:
    """The answer of one worker."""
    role = role_of(job)
    file = run.job(f"export-{weights}.{role}")
    write_job(file, job)
    worker = executor.start(role, file, run.log(f"export-{weights}"))
    try:
        return await_answer(worker)
    finally:
        worker.stop()


# --- The model card ------------------------------------------------------------------------------


def model_card(
    folder: Path, results: Results, cell: CellResult, stages: list[dict[str, Any]]
) -> str:
    """README.md of the export, in the form that model hubs read."""
    from jinja2 import Environment, PackageLoader, StrictUndefined

    from gateskip.quantization.folders import is_mixed

    environment = Environment(
        loader=PackageLoader("compose"),
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
        finalize=_on_card,
    )
    return environment.get_template("model_card.md.j2").render(
        cell=cell,
        results=results,
        source=stages[0],
        stages=stages[1:],
        licence=stages[0].get("licence"),
        gated=(folder / GATE_SETTINGS).is_file(),
        quantized="quantization_config" in require_model(folder),
        mixed=is_mixed(folder),
        dtype=dtype_of(folder),
        decode=[step for step in cell.steps or () if step.use in ("plain", "skip", "speculate")],
        rows=card_rows(results, cell),
        base_model=base_model(stages[0]),
        parameters=_parameters,
    )


def _on_card(value: Any) -> Any:
    """A value for the card's table: on one line, with markup and cell separators escaped."""
    if not isinstance(value, str):
        return value
    flat = " ".join(printable(value).split()) if "\n" in value else printable(value)
    return flat.replace("`", "'").replace("<", "&lt;").replace("|", "\\|")


def base_model(source: dict[str, Any]) -> str | None:
    """The hub id of the source model, where it has one."""
    kind, _, rest = str(source.get("origin", "")).partition(":")
    return rest.partition("@")[0] if kind == "hub" else None


def card_rows(results: Results, cell: CellResult) -> list[tuple[str, str, str]]:
    """(metric, this cell, baseline) for every number that this cell has."""
    baseline = results.cell(results.baseline)
    values, base = metrics(results, cell), metrics(results, baseline)
    rows = [
        (METRICS[name].title, metric_text(name, values[name]), metric_text(name, base.get(name)))
        for name in CARD_METRICS
        if name in values
    ]
    before = results.tasks(baseline)
    for task, score in results.tasks(cell).items():
        shown = f"{metric_text('accuracy', score.value)} (n={score.n})"
        other = before[task].value if task in before else None
        rows.append((f"{task}, {score.metric}", shown, metric_text("accuracy", other)))
    return rows


def _parameters(values: dict[str, Any]) -> str:
    return ", ".join(f"{key} {value}" for key, value in values.items()) or "none"
