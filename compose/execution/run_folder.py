"""What a run leaves on disk, and the typed result that is made of it.

    runs/NAME/plan.json                 the plan it followed
    runs/NAME/cells/CELL/PHASE.json     what a phase (load, quality, lossless) found, under its key
    runs/NAME/speed/SESSION.jsonl       rounds of the cells whose speed was compared with each other
    runs/NAME/jobs, logs                what workers were told, and what they and libraries printed
    runs/NAME/results.json, report.*    made from the above, and from it alone
    runs/store/KEY                      model folders, shared by the runs beside each other

A phase's key is made of all that decides what it finds, so a record under another key is out of
date. Failures are never kept: the next run tries again.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import statistics
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from compose.artifacts.folder import lineage
from compose.assets import SELF_WRITTEN
from compose.errors import ComposeError, UserError
from compose.planning.plan import Cell, Plan, digest, speculates
from compose.results.schema import CellResult, Results
from compose.store import Store, read_json, write_json

Phase = Literal["load", "quality", "lossless"]
MEASURE_VERSION = 4  # raised when the same cell begins to be measured in another way
SPEED_NUMBERS = ("prefill_tokens_per_s", "decode_tokens_per_s", "ttft_s")


@dataclass(frozen=True)
class Failure:
    """Why a step or a cell could not be finished."""

    reason: str
    failed_in: str
    traceback: str | None = None


@dataclass(frozen=True)
class RunFolder:
    """Where everything of a run is."""

    root: Path

    @classmethod
    def of(cls, plan: Plan, out: Path) -> RunFolder:
        """The folder of a plan's run under `out`."""
        return cls(out.absolute() / plan.pipeline.name)

    @classmethod
    def existing(cls, folder: Path) -> RunFolder:
        """The folder of a run that was started before.

        Raises:
            UserError: it is none.
        """
        run = cls(folder.absolute())
        if not run.plan_file.is_file():
            raise UserError(
                f"{folder} is not the folder of a run: it has no {run.plan_file.name}",
                fix="name a folder that `gateskip run` made, such as runs/NAME",
            )
        return run

    @property
    def store(self) -> Store:
        """Model folders, shared by all runs beside this one."""
        return Store(self.root.parent / "store")

    @property
    def plan_file(self) -> Path:
        """The plan that the run follows."""
        return self.root / "plan.json"

    @property
    def results_file(self) -> Path:
        """The typed result."""
        return self.root / "results.json"

    def log(self, name: str) -> Path:
        """The log of a step or cell."""
        return self.root / "logs" / f"{file_name(name)}.log"

    def job(self, name: str) -> Path:
        """The job file of a step or cell."""
        return self.root / "jobs" / f"{file_name(name)}.json"

    def record(self, cell: str, phase: Phase) -> Path:
        """What a phase of a cell found."""
        return self.root / "cells" / file_name(cell) / f"{phase}.json"

    @property
    def speed(self) -> Path:
        """The folder of speed sessions."""
        return self.root / "speed"

    def reference(self, baseline_key: str) -> Path:
        """What the baseline predicts; the other cells are compared with it."""
        return self.root / "cells" / f".reference-{baseline_key}.safetensors"


def file_name(name: str) -> str:
    """A cell's name as a file name: the same unless it is too long or has odd characters."""
    safe = re.sub(r"[^A-Za-z0-9_.+-]", "_", name)
    if safe == name and len(name) <= 120 and not name.startswith("."):
        return name
    return f"{safe[:100].lstrip('.')}-{hashlib.sha256(name.encode()).hexdigest()[:8]}"


def phase_key(plan: Plan, cell: Cell, phase: Phase) -> str:
    """What decides the finding of a phase: the cell, and the settings that the phase reads."""
    benchmark = plan.pipeline.benchmark.model_dump(mode="json")
    reads: dict[str, Any] = {"threads": benchmark["threads"], "seed": plan.pipeline.seed}
    if phase == "quality":
        reads |= {"quality": benchmark["quality"], "baseline": plan.cells[0].key}
        if cell is plan.cells[0]:
            reads |= {"learns_from": learns_from(plan)}
    elif phase == "lossless":
        reads |= {"lossless": benchmark["lossless"]}
    recipe = {"cell": cell.key, "phase": phase, "reads": reads, "version": MEASURE_VERSION}
    return digest(recipe)


def learns_from(plan: Plan) -> list[tuple[str, int | None]]:
    """Source and row limit of every text that a stage of the plan reads, the model's own left out:
    what it knows of a scored text, it knew before."""
    stages = [step.stage for step in plan.steps if step.stage is not None]
    splits = sorted({split for stage in stages for split in stage.reads_data})
    specs = [getattr(plan.pipeline.data, split) for split in splits]
    known = [spec for spec in specs if spec is not None and spec.source != SELF_WRITTEN]
    return [(spec.source, spec.limit) for spec in known]


def phases_of(cell: Cell) -> tuple[Phase, ...]:
    """What is measured of a cell beside speed: speculation gives the plain cell's own tokens."""
    return ("load", "lossless") if speculates(cell.decode) else ("load", "quality")


def read_phase(run: RunFolder, plan: Plan, cell: Cell, phase: Phase) -> dict[str, Any] | None:
    """What the phase found, if it was run on this very cell with these settings."""
    record = read_json(run.record(cell.name, phase))
    if not isinstance(record, dict) or record.get("key") != phase_key(plan, cell, phase):
        return None
    result: dict[str, Any] = record["result"]
    return result | {"seconds": record.get("seconds", 0.0)}


def write_phase(
    run: RunFolder, plan: Plan, cell: Cell, phase: Phase, result: dict[str, Any], seconds: float
) -> None:
    """Keep what the phase found."""
    record = {"key": phase_key(plan, cell, phase), "seconds": round(seconds, 3), "result": result}
    write_json(run.record(cell.name, phase), record)


# --- Speed sessions ------------------------------------------------------------------------------


@dataclass
class Session:
    """Cells measured in interleaved rounds, and the rounds that are complete.

    Only numbers of one session may be compared. The file's first line is the session itself; each
    further line is one round of one group and batch size, with every cell's numbers.
    """

    file: Path
    settings: dict[str, Any]
    """Everything beside the cells on which the numbers depend."""
    members: dict[str, str]
    """Cell name -> cell key."""
    groups: list[list[str]]
    """Cells that were held in memory together; the baseline is in each."""
    environment: dict[str, Any]
    command: str
    rounds: dict[tuple[int, int, int], dict[str, dict[str, Any]]] = field(default_factory=dict)
    """(group, batch size, round) -> cell name -> its numbers."""
    seconds: float = 0.0

    @classmethod
    def load(cls, file: Path) -> Session | None:
        """Read a session; a last line that a kill cut short is dropped."""
        lines = [_json_or_none(line) for line in _lines(file)]
        if not lines or lines[0] is None:
            return None
        session = cls(file=file, **lines[0])
        for line in lines[1:]:
            if line is not None:
                session.rounds[line["group"], line["batch"], line["round"]] = line["cells"]
                session.seconds += line["seconds"]
        return session

    def create(self) -> None:
        """Write the first line."""
        head = {
            "settings": self.settings,
            "members": self.members,
            "groups": self.groups,
            "environment": self.environment,
            "command": self.command,
        }
        self.file.parent.mkdir(parents=True, exist_ok=True)
        temporary = self.file.with_suffix(".new")
        temporary.write_text(json.dumps(head) + "\n", encoding="utf-8")
        os.replace(temporary, self.file)

    def add(
        self, place: tuple[int, int, int], cells: dict[str, dict[str, Any]], seconds: float
    ) -> None:
        """Keep a complete round."""
        group, batch, number = place
        line = {"group": group, "batch": batch, "round": number, "seconds": round(seconds, 3)}
        with self.file.open("r+b") as file:
            content = file.read()
            file.seek(content.rfind(b"\n") + 1)  # over what a kill left of a line
            file.write(json.dumps({**line, "cells": cells}).encode() + b"\n")
            file.truncate()
            file.flush()
            os.fsync(file.fileno())
        self.rounds[place] = cells
        self.seconds += seconds

    def places(self) -> list[tuple[int, int, int]]:
        """Every round there should be, in the order in which they run."""
        batches, repeats = self.settings["speed"]["batch_sizes"], self.settings["speed"]["repeats"]
        return [
            (group, batch, number)
            for group in range(len(self.groups))
            for batch in batches
            for number in range(repeats)
        ]

    def complete(self, place: tuple[int, int, int]) -> bool:
        """Whether a round has the numbers of every cell of its group."""
        return set(self.rounds.get(place, {})) >= set(self.groups[place[0]])

    def finished(self) -> bool:
        """Whether every round is complete."""
        return all(map(self.complete, self.places()))

    def of_cell(self, name: str) -> dict[int, list[dict[str, Any]]]:
        """Batch size -> the cell's numbers, round by round."""
        found: dict[int, list[dict[str, Any]]] = {}
        for place in self.places():
            numbers = self.rounds.get(place, {}).get(name)
            if numbers is not None:
                found.setdefault(place[1], []).append(numbers)
        return found


def _lines(file: Path) -> list[str]:
    try:
        return file.read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError):
        return []


def _json_or_none(line: str) -> dict[str, Any] | None:
    try:
        value = json.loads(line)
    except ValueError:
        return None
    return value if isinstance(value, dict) else None


def speed_settings(plan: Plan, environment: Mapping[str, Any]) -> dict[str, Any]:
    """What two speed measurements must share to be comparable, beside the cells."""
    benchmark = plan.pipeline.benchmark
    machine = ("processor", "cores", "threads", "memory_bytes", "accelerator", "versions")
    return {
        "speed": benchmark.speed.model_dump(mode="json"),
        "seed": plan.pipeline.seed,
        "machine": {name: environment.get(name) for name in machine},
        "version": MEASURE_VERSION,
    }


def find_session(run: RunFolder, settings: dict[str, Any], cells: Iterable[Cell]) -> Session | None:
    """The session that measured all these cells with these settings: the furthest along, if any."""
    wanted = {cell.name: cell.key for cell in cells}.items()
    found: list[Session] = []
    for file in sorted(run.speed.glob("*.jsonl")):
        session = Session.load(file)
        if session and session.settings == settings and session.members.items() >= wanted:
            found.append(session)
    return max(found, key=lambda session: (session.finished(), len(session.rounds)), default=None)


def new_session(
    run: RunFolder,
    settings: dict[str, Any],
    cells: Iterable[Cell],
    groups: list[list[str]],
    environment: dict[str, Any],
    command: str,
) -> Session:
    """Begin a session of these cells; one of the same cells and settings is begun anew."""
    members = {cell.name: cell.key for cell in cells}
    file = run.speed / f"{digest({'settings': settings, 'members': members})}.jsonl"
    session = Session(file, settings, members, groups, environment, command)
    session.create()
    return session


# --- Results -------------------------------------------------------------------------------------


@dataclass
class Gathered:
    """What `gather` is told beside the records on disk."""

    failures: dict[str, Failure] = field(default_factory=dict)
    """Cell name -> why it failed in this run."""
    session: Session | None = None
    environment: dict[str, Any] = field(default_factory=dict)
    command: str | None = None


def gather(run: RunFolder, plan: Plan, told: Gathered) -> Results:
    """All that is known of the plan's cells: measured, failed, or left out.

    Cells of the plan that were neither measured nor tried are not in it.
    """
    parts = {cell.name: _cell_parts(run, plan, cell, told) for cell in plan.cells}
    known = {name: part for name, part in parts.items() if part is not None}
    _compare(plan, known)
    _fold_repeats(plan, known)
    left_out = [
        CellResult(
            name=left.name, chain=left.chain, status="left-out", reason=left.message, rule=left.rule
        )
        for left in plan.left_out
    ]
    source_map = plan.pipeline.source_map
    session = told.session
    missing = [cell.name for cell in plan.cells if parts[cell.name] is None]
    notes = [f"not measured in this run: {', '.join(missing)}"] if missing else []
    if session is not None and len(session.groups) > 1:
        notes.append(
            f"the cells did not fit into memory together: speed was measured in "
            f"{len(session.groups)} groups, with the baseline in each"
        )
    return Results(
        run=plan.pipeline.name,
        environment=session.environment if session else told.environment,
        baseline=plan.cells[0].name,
        command=session.command if session else told.command,
        model=_public(plan.pipeline.model.source),
        dtype=plan.pipeline.model.dtype,
        pipeline=_text(source_map.file) if source_map else None,
        benchmark=plan.pipeline.benchmark.model_dump(mode="json"),
        seconds=_seconds(run, plan, known, session),
        notes=tuple(notes) or None,
        cells=(*(CellResult.model_validate(part) for part in known.values()), *left_out),
    )


def _cell_parts(run: RunFolder, plan: Plan, cell: Cell, told: Gathered) -> dict[str, Any] | None:
    """A cell's result as plain data, or None when nothing was tried."""
    failure = told.failures.get(cell.name)
    found = {phase: read_phase(run, plan, cell, phase) for phase in phases_of(cell)}
    rounds = told.session.of_cell(cell.name) if told.session else {}
    measured = told.session is not None and told.session.members.get(cell.name) == cell.key
    timed = cell.repeats is not None or (measured and bool(rounds))
    whole = all(record is not None for record in found.values()) and timed
    if failure is None and not whole:
        return None
    part: dict[str, Any] = {
        "name": cell.name,
        "chain": cell.chain,
        "status": "ok" if failure is None else "failed",
        "aliases": cell.aliases or None,
        "plain": cell.plain,
        "steps": _step_infos(plan, cell),
        **_made(run, cell),
    }
    if failure is not None:
        part |= {
            "reason": failure.reason,
            "failed_in": failure.failed_in,
            "traceback": failure.traceback,
        }
    for phase, record in found.items():
        if record is not None:
            _merge_phase(part, phase, record)
    if rounds and measured:
        _merge_speed(part, rounds)
    if phases_of(cell)[-1] == "lossless":
        part["quality_of"] = cell.plain
    return part


def _merge_phase(part: dict[str, Any], phase: Phase, record: dict[str, Any]) -> None:
    """Sort a phase's finding into the result: its own section, and what it says beyond that."""
    record = dict(record)
    part["seconds"] = round(part.get("seconds", 0.0) + record.pop("seconds", 0.0), 3)
    for section in ("size", "compute", "speculation"):
        if section in record:
            part[section] = {**part.get(section, {}), **record.pop(section)}
    if "insight" in record:
        part["insight"] = record.pop("insight")
    if "notes" in record:
        part["notes"] = (*part.get("notes", ()), *record.pop("notes"))
    if phase == "load":
        part |= record  # what is left describes the whole cell, such as its kernels
        return
    own = "quality" if phase == "quality" else "speculation"
    part[own] = {**part.get(own, {}), **record}


def _merge_speed(part: dict[str, Any], rounds: dict[int, list[dict[str, Any]]]) -> None:
    """Medians and repeats of each batch size, and what else the rounds saw."""
    by_batch = {batch: _numbers(repeats) for batch, repeats in rounds.items()}
    first = 1 if 1 in by_batch else min(by_batch)
    others = {batch: numbers for batch, numbers in by_batch.items() if batch != 1}
    part["speed"] = (by_batch[1] if first == 1 else {}) | ({"by_batch": others} if others else {})
    every = [numbers for repeats in rounds.values() for numbers in repeats]
    peaks = [numbers["peak_bytes"] for numbers in every if numbers.get("peak_bytes")]
    if peaks:
        part["size"] = {**part.get("size", {}), "peak_bytes": max(peaks)}
    latest = rounds[first][-1]
    for section in ("compute", "speculation"):
        if section in latest:
            part[section] = {**latest[section], **part.get(section, {})}


def _numbers(repeats: list[dict[str, Any]]) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for name in SPEED_NUMBERS:
        values = [numbers[name] for numbers in repeats if numbers.get(name) is not None]
        if values:
            found[name] = {"median": statistics.median(values), "repeats": values}
    return found


def _compare(plan: Plan, parts: dict[str, dict[str, Any]]) -> None:
    """Fill in what relates a cell to the baseline or to its plain cell."""
    baseline = parts.get(plan.cells[0].name, {})
    for part in parts.values():
        quality, base = part.get("quality") or {}, baseline.get("quality") or {}
        _relate(quality.get("perplexity"), base.get("perplexity"), "ratio_to_baseline")
        for task, score in (quality.get("tasks") or {}).items():
            _relate(score, (base.get("tasks") or {}).get(task), "retained")
        plain = parts.get(part.get("plain") or "", {})
        fast, slow = _decode_median(part), _decode_median(plain)
        if part.get("speculation") is not None and fast and slow:
            part["speculation"]["speedup"] = fast / slow


def _fold_repeats(plan: Plan, parts: dict[str, dict[str, Any]]) -> None:
    """Move what other seeds gave into the cells that they repeat; failures stay on their own."""
    for cell in plan.cells:
        part = parts.get(cell.name)
        if cell.repeats is None or part is None or part["status"] != "ok":
            continue
        if first := parts.get(cell.repeats):
            found = {section: part.get(section) for section in ("quality", "compute")}
            seed = plan.step(cell.weights).seed
            first["seeds"] = (*first.get("seeds", ()), {"seed": seed} | found)
            del parts[cell.name]


def _relate(value: dict[str, Any] | None, base: dict[str, Any] | None, name: str) -> None:
    if not value or not base or value.get("dataset") != base.get("dataset"):
        return
    if value.get("value") is not None and base.get("value"):
        value[name] = value["value"] / base["value"]


def _decode_median(part: dict[str, Any]) -> float | None:
    decode = (part.get("speed") or {}).get("decode_tokens_per_s") or {}
    median: float | None = decode.get("median")
    return median


def _step_infos(plan: Plan, cell: Cell) -> tuple[dict[str, Any], ...] | None:
    stages = [(name, plan.pipeline.stages[name]) for name in cell.chain]
    infos = []
    for name, stage in stages:
        parameters = stage.model_dump(mode="json")
        parameters |= {key: path.name for key, path in stage.files().items()}
        infos.append({"name": name, **parameters})
    return tuple(infos) or None


def _made(run: RunFolder, cell: Cell) -> dict[str, Any]:
    """What the stages recorded as they made the folder: curves and errors, by the stage's name."""
    try:
        entries = lineage(run.store.model(cell.weights))
    except ComposeError:
        return {}
    records = {entry["name"]: entry.get("record") or {} for entry in entries}
    curves = {name: curve for name, record in records.items() if (curve := _curve(record))}
    errors = {name: found for name, record in records.items() if (found := _errors(record))}
    peaks = {entry["name"]: entry["peak_bytes"] for entry in entries if "peak_bytes" in entry}
    return {
        "training": curves or None,
        "layer_errors": errors or None,
        "step_peak_bytes": peaks or None,
    }


def _curve(record: dict[str, Any]) -> list[dict[str, Any]] | None:
    curve = record.get("training")
    if isinstance(curve, list) and all(
        isinstance(point, dict) and "step" in point for point in curve
    ):
        return curve
    return None


def _errors(record: dict[str, Any]) -> dict[str, float] | None:
    errors = record.get("layer_errors")
    return errors if isinstance(errors, dict) else None


def _seconds(
    run: RunFolder, plan: Plan, parts: dict[str, dict[str, Any]], session: Session | None
) -> float:
    """Wall time that the run's steps and measurements took, in whichever run they were made."""
    total: float = sum(part.get("seconds", 0.0) for part in parts.values())
    for step in plan.steps:
        record = (run.store.manifest(step.key) or {}).get("record") or {}
        total += record.get("wall_s", 0.0)
    return round(total + (session.seconds if session else 0.0), 1)


def _public(source: str) -> str:
    return Path(source).name if Path(source).is_absolute() else source


def _text(file: str) -> str | None:
    try:
        return Path(file).read_text(encoding="utf-8")
    except OSError:
        return None
