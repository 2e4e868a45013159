"""Turns records on disk, and this run's failures, into the typed result.

This module and `gather_speed` collect the measurements. `compose.analysis.relate` compares cells
with the baseline (intervals, verdicts, curves).
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from compose.analysis.intervals import ratio_of_sums
from compose.analysis.relate import relate
from compose.artifacts.folder import lineage
from compose.errors import ComposeError
from compose.outputs.gather_speed import timed_parts
from compose.outputs.run_folder import Phase, RunFolder, phases_of, read_phase
from compose.outputs.sessions import Session
from compose.planning.plan import Cell, Plan
from compose.processes.endings import Failure
from compose.results.schema import CellResult, Results
from compose.units import public_path

MOST_POINTS = 300  # of a training curve: more than a picture shows


def gather(
    run: RunFolder,
    plan: Plan,
    *,
    failures: Mapping[str, Failure],
    session: Session | None,
    environment: dict[str, Any],
    command: str | None,
) -> Results:
    """The result of a plan: cells that were measured, failed, or were left out.

    `failures` (by cell name), `environment` and `command` are this run's. A speed session has its
    own environment and command, which are used where there is a session. A cell that was neither
    measured nor tried is missing, and a note names it.
    """
    parts = {cell.name: _cell_parts(run, plan, cell, failures, session) for cell in plan.cells}
    present = {name: part for name, part in parts.items() if part is not None}
    _fold_repeats(plan, present)
    left_out = [
        CellResult(
            name=left.name, chain=left.chain, status="left-out", reason=left.message, rule=left.rule
        )
        for left in plan.left_out
    ]
    source_map = plan.pipeline.source_map
    missing = [cell.name for cell in plan.cells if parts[cell.name] is None]
    notes = _source_notes(run, plan)
    if missing:
        notes.append(f"not measured in this run: {', '.join(missing)}")
    if session is not None and len(session.groups) > 1:
        notes.append(
            f"the cells did not fit into memory together: speed was measured in "
            f"{len(session.groups)} groups, with the baseline in each"
        )
    results = Results(
        run=plan.pipeline.name,
        environment=_environment(session) if session else environment,
        baseline=plan.cells[0].name,
        command=session.command if session else command,
        model=public_path(plan.pipeline.model.source),
        dtype=plan.pipeline.model.dtype,
        seed=plan.pipeline.seed,
        pipeline=_text(source_map.file) if source_map else None,
        benchmark=plan.pipeline.benchmark.model_dump(mode="json"),
        seconds=_seconds(run, plan, present, session),
        notes=tuple(notes) or None,
        cells=(*(CellResult.model_validate(part) for part in present.values()), *left_out),
    )
    return relate(results)


def _environment(session: Session) -> dict[str, Any]:
    """The machine of a session, with its roofline and its load."""
    measured: dict[str, Any] = {"roofline": session.roofline} if session.roofline else {}
    if session.load_averages:
        loads = session.load_averages
        measured["load_average"] = {"min": min(loads), "max": max(loads)}
    return session.environment | measured


def _cell_parts(
    run: RunFolder,
    plan: Plan,
    cell: Cell,
    failures: Mapping[str, Failure],
    session: Session | None,
) -> dict[str, Any] | None:
    """A cell's result as plain data, or None where nothing was tried."""
    failure = failures.get(cell.name)
    records = {phase: read_phase(run, plan, cell, phase) for phase in phases_of(cell)}
    timed_sections: dict[str, dict[str, Any]] = {}
    if session is not None and session.members.get(cell.name) == cell.key:
        timed_sections = timed_parts(session, cell.name, plan.cells[0].name, cell.plain)
    timed = cell.repeats is not None or bool(timed_sections)
    whole = all(record is not None for record in records.values()) and timed
    if failure is None and not whole:
        return None
    part: dict[str, Any] = {
        "name": cell.name,
        "chain": cell.chain,
        "status": "ok" if failure is None else "failed",
        "aliases": cell.aliases or None,
        "plain": cell.plain,
        "steps": _step_infos(plan, cell),
        "fitted_to": _texts_seen(plan, cell),
        **_step_records(plan.model_folder(cell, run.store)),
    }
    if failure is not None:
        part |= vars(failure)
    for phase, record in records.items():
        if record is not None:
            _merge_phase(part, phase, record)
    for section, numbers in timed_sections.items():
        part[section] = {**part.get(section, {}), **numbers}
    if timed_sections and session is not None:
        part["fingerprint"] = {**part.get("fingerprint", {}), "speed": session.settings["code"]}
    if phases_of(cell)[-1] == "lossless":
        part["quality_of"] = cell.plain
    return part


def _merge_phase(part: dict[str, Any], phase: Phase, record: dict[str, Any]) -> None:
    """Put a phase's record into the sections of the result that its numbers belong to."""
    record = dict(record)
    part["seconds"] = round(part.get("seconds", 0.0) + record.pop("seconds", 0.0), 3)
    part["fingerprint"] = {**part.get("fingerprint", {}), phase: record.pop("fingerprint")}
    for section in ("size", "compute"):
        if section in record:
            part[section] = {**part.get(section, {}), **record.pop(section)}
    if "insight" in record:
        part["insight"] = record.pop("insight")
    if "notes" in record:
        part["notes"] = (*part.get("notes", ()), *record.pop("notes"))
    if phase == "load":
        part |= record  # what is left describes the whole cell, such as its kernels
        return
    if drafts := record.get("drafts_by_prompt"):
        drafted, accepted = zip(*drafts, strict=True)
        if rate := ratio_of_sums(accepted, drafted, most=1.0):
            record["acceptance_rate_ci95"] = rate.ci95
    part["quality" if phase == "quality" else "lossless_check"] = record


def _fold_repeats(plan: Plan, parts: dict[str, dict[str, Any]]) -> None:
    """Move the numbers of further seeds into the cells that they repeat; failures stay cells."""
    for cell in plan.cells:
        part = parts.get(cell.name)
        if cell.repeats is None or part is None or part["status"] != "ok":
            continue
        if first := parts.get(cell.repeats):
            numbers = {section: part.get(section) for section in ("quality", "compute")}
            seed = plan.step(cell.weights).seed
            first["seeds"] = (*first.get("seeds", ()), {"seed": seed} | numbers)
            del parts[cell.name]


def _step_infos(plan: Plan, cell: Cell) -> tuple[dict[str, Any], ...] | None:
    stages = [(name, plan.pipeline.stages[name]) for name in cell.chain]
    infos = []
    for name, stage in stages:
        parameters = stage.model_dump(mode="json")
        parameters |= {key: path.name for key, path in stage.files().items()}
        if (draft := parameters.get("draft_model")) is not None and Path(draft).is_absolute():
            parameters["draft_model"] = Path(draft).name
        declared = {"role": stage.role, "stored_as": stage.stored_as()}
        infos.append({"name": name, **parameters, **declared})
    return tuple(infos) or None


def _texts_seen(plan: Plan, cell: Cell) -> tuple[str, ...] | None:
    """Sources of the texts that a cell's stages, or the engine that runs it, were fitted to; None
    for a folder that was there before."""
    if cell.origin == "bench":
        return None
    splits = {"calibration"} if cell.calibrates_peer else set[str]()
    splits.update(*(plan.pipeline.stages[name].reads_data for name in cell.chain))
    texts = (getattr(plan.pipeline.data, split).weights for split in sorted(splits))
    return tuple(dict.fromkeys(source for weights in texts for source in weights))


def _step_records(folder: Path) -> dict[str, Any]:
    """The records of stages: training curves, layer errors and peak memory, by the stage's name."""
    try:
        entries = lineage(folder)
    except ComposeError:
        return {}
    records = {entry["name"]: entry.get("record") or {} for entry in entries}
    curves = {name: curve for name, record in records.items() if (curve := _curve(record))}
    errors = {name: layers for name, record in records.items() if (layers := _errors(record))}
    peaks = {entry["name"]: entry["peak_bytes"] for entry in entries if "peak_bytes" in entry}
    seconds = {entry["name"]: entry["wall_s"] for entry in entries if "wall_s" in entry}
    return {
        "training": curves or None,
        "layer_errors": errors or None,
        "step_peak_bytes": peaks or None,
        "step_seconds": seconds or None,
    }


def _source_notes(run: RunFolder, plan: Plan) -> list[str]:
    """Notes on the source model, such as that its weights were quantized before."""
    for cell in plan.cells:
        with contextlib.suppress(ComposeError):
            record = lineage(run.store.model(cell.weights))[0].get("record") or {}
            return list(record.get("notes", ()))
    return []


def _curve(record: dict[str, Any]) -> list[dict[str, Any]] | None:
    curve = record.get("training")
    if isinstance(curve, list) and all(
        isinstance(point, dict) and "step" in point for point in curve
    ):
        return thinned(curve)
    return None


def thinned(curve: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """A training curve of at most MOST_POINTS points. Each point stands for equally many steps:
    their mean loss and the last validation among them."""
    stride = math.ceil(len(curve) / MOST_POINTS)
    if stride <= 1:
        return curve
    points = []
    for start in range(0, len(curve), stride):
        steps = curve[start : start + stride]
        losses = [point["loss"] for point in steps if point.get("loss") is not None]
        validated = [point for point in steps if point.get("valid") is not None]
        point = {**(validated[-1] if validated else {}), **steps[-1]}
        points.append(point | ({"loss": sum(losses) / len(losses)} if losses else {}))
    return points


def _errors(record: dict[str, Any]) -> dict[str, float] | None:
    errors = record.get("layer_errors")
    return errors if isinstance(errors, dict) else None


def _seconds(
    run: RunFolder, plan: Plan, parts: dict[str, dict[str, Any]], session: Session | None
) -> float:
    """Wall time of the plan's steps and measurements, including those of earlier runs."""
    total: float = sum(part.get("seconds", 0.0) for part in parts.values())
    for step in plan.steps:
        record = (run.store.manifest(step.key) or {}).get("record") or {}
        total += record.get("wall_s", 0.0)
    return round(total + (session.seconds if session else 0.0), 1)


def _text(file: str) -> str | None:
    try:
        return Path(file).read_text(encoding="utf-8")
    except OSError:
        return None
