"""What steps and cells have cost on this machine: the records in the store and in finished runs.

A step's cost is compared by the *passes* that it is made of: weights of the model times tokens of
text that go through them, a training step counting four passes (forward and backward of the model,
forward of its teacher), and a search as many as the stage says (`Stage.searched`). Costs of stages
of the same kind at other sizes are scaled by that, which is an assumption and is named as one.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from compose.artifacts.folder import LINEAGE
from compose.bench.peers.table import parse_peer
from compose.errors import ComposeError
from compose.planning.plan import SOURCE
from compose.results.io import load_results
from compose.results.schema import CellResult, Results
from compose.run.steps import WIDTHS
from compose.stages.base import DataSpec, ModelShape, Stage
from compose.stages.registry import STAGES
from compose.store import Store, read_json

TRAINING_PASSES = 4
TOKENS_A_QUESTION = 100
"""Of a question of a task with its answers, where nobody has counted them."""


@dataclass(frozen=True)
class Cost:
    """What one step or cell took on this machine."""

    kind: str
    """Of a step or of a cell: `kind_of_step`, `kind_of_cell`."""
    passes: float
    """Weights times tokens; see above."""
    weights: int
    """Of the model that it started from."""
    seconds: float
    peak_bytes: int | None
    disk_bytes: int
    where: str
    """Which record: a key in the store, or a cell of a run."""


def step_passes(stage: Stage | None, shape: ModelShape, data: Mapping[str, DataSpec]) -> float:
    """Weights times tokens of a step on a model of `shape`; loading it counts as one token."""
    return shape.weights * (1.0 + _tokens(stage, shape, data))


def _tokens(stage: Stage | None, shape: ModelShape, data: Mapping[str, DataSpec]) -> float:
    if stage is None:
        return 0.0
    train, looked = data.get("train"), data.get("calibration")
    tokens = 0.0
    if looked is not None and "calibration" in stage.reads_data:
        length = _number(stage, "length") or looked.length
        tokens += (_number(stage, "samples") or looked.limit) * length
    steps = _number(stage, "steps") or _number(stage, "iters")
    if train is not None and steps and "train" in stage.reads_data:
        rows = (_number(stage, "batch") or 1) * (_number(stage, "accumulate") or 1)
        length = _number(stage, "length") or train.length
        tokens += TRAINING_PASSES * steps * rows * length
    return tokens + stage.searched(shape)


def kind_of_step(stage: Stage | None) -> str:
    """Steps of one kind cost alike for each pass."""
    return SOURCE if stage is None else stage.costs_like()


def _number(stage: Stage, name: str) -> int:
    value = getattr(stage, name, None)
    return value if isinstance(value, int) and not isinstance(value, bool) else 0


SCORED, COMPARED = "cell", "speculating cell"
"""Kinds of cells: quality is scored of one, tokens are compared of the other."""


def kind_of_cell(peer: str | None, *, speculating: bool) -> str:
    """Cells of one kind cost alike for each weight and token.

    Other engines are a kind each, and a second one where they read the calibration text.

    Raises:
        UserError: there is no such engine or option.
    """
    if peer is None:
        return COMPARED if speculating else SCORED
    name = parse_peer(peer)
    return f"{name.engine.name} with a text" if name.reads_text else name.engine.name


def cell_passes(weights: int, benchmark: Mapping[str, Any], kind: str = SCORED) -> float:
    """Weights times tokens that a cell reads and writes, under a benchmark section."""
    if kind == COMPARED:
        lossless = benchmark.get("lossless") or {"prompts": 0, "new_tokens": 0}
        return weights * (1.0 + 2.0 * int(lossless["prompts"]) * int(lossless["new_tokens"]))
    quality = benchmark.get("quality") or {}
    tokens: float = 0.0
    if quality.get("perplexity"):
        tokens += float(quality.get("perplexity_tokens", 0))
    questions = len(quality.get("tasks") or ()) * int(quality.get("limit", 0))
    tokens += questions * TOKENS_A_QUESTION
    if answers := quality.get("own_answers"):
        tokens += int(answers["prompts"]) * int(answers["new_tokens"])
    return weights * (1.0 + tokens)


def step_costs(store: Store) -> Iterator[Cost]:
    """The costs of all steps in a store whose records say enough."""
    for key in store.all_keys():
        manifest = store.manifest(key) or {}
        lineage, config = read_json(store.model(key) / LINEAGE), store.model(key) / "config.json"
        seconds = (manifest.get("record") or {}).get("wall_s")
        entries = lineage.get("stages") if isinstance(lineage, dict) else None
        if not isinstance(seconds, int | float) or not isinstance(entries, list) or not entries:
            continue
        try:
            stage = stage_of(entries[-1])
            shape = ModelShape.from_config(read_json(config) or {})
            specs = (entries[-1].get("data") or {}).items()
            data = {split: DataSpec.model_validate(spec) for split, spec in specs}
        except (ComposeError, ValidationError, KeyError, TypeError, AttributeError):
            continue  # of another version
        yield Cost(
            kind=kind_of_step(stage),
            passes=step_passes(stage, shape, data),
            weights=shape.weights,
            seconds=float(seconds),
            peak_bytes=(manifest.get("record") or {}).get("peak_bytes"),
            disk_bytes=sum(manifest["files"].values()),
            where=f"store/{key}",
        )


def stage_of(entry: Mapping[str, Any]) -> Stage | None:
    """The stage of an entry of a lineage; None for the source."""
    if entry["use"] == SOURCE:
        return None
    return STAGES[entry["use"]].model_validate({"use": entry["use"], **entry["parameters"]})


def cell_costs(out: Path) -> Iterator[Cost]:
    """The costs of all cells that the runs in `out` have measured."""
    for file in sorted(out.glob("*/results.json")):
        try:
            results = load_results(file)
        except (ComposeError, OSError):
            continue
        for cell in results.measured:
            if (cost := _cell_cost(results, cell, file.parent.name)) is not None:
                yield cost


def _cell_cost(results: Results, cell: CellResult, run: str) -> Cost | None:
    size = cell.size
    weights = None if size is None else (size.model_extra or {}).get("weights")
    weights = weights or _weights_of(results, cell)
    if cell.seconds is None or weights is None or size is None:
        return None
    try:
        kind = kind_of_cell(None if cell.peer is None else cell.name, speculating=cell.speculates)
    except ComposeError:
        return None  # an engine or option of another version
    return Cost(
        kind=kind,
        passes=cell_passes(weights, results.benchmark or {}, kind),
        weights=weights,
        seconds=cell.seconds,
        peak_bytes=size.peak_bytes or size.resident_bytes,
        disk_bytes=0,
        where=f"{run}: {cell.name}",
    )


def _weights_of(results: Results, cell: CellResult) -> int | None:
    """About how many weights a cell's model has: from the bytes of the baseline's files."""
    baseline = results.find(results.baseline)
    size = None if baseline is None else baseline.size
    if size is None or size.disk_bytes is None or results.dtype not in WIDTHS:
        return None
    return size.disk_bytes // WIDTHS[results.dtype]
