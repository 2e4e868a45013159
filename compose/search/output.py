"""The output of a search: an ordinary pipeline file with the winner and the front around it."""

from __future__ import annotations

import os
from collections.abc import Iterable, Mapping, Sequence
from io import StringIO
from pathlib import Path
from typing import Any

from ruamel.yaml import YAML

from compose.analysis.metrics import METRICS
from compose.language.schema import Chain, Matrix, Pipeline
from compose.results.schema import CellResult, Results
from compose.search.probes import number
from compose.search.space import baseline_chain
from compose.search.target import Target

SHOWN = {"decode-ratio": "decode", "prefill-ratio": "prefill"}
"""Metric of probes -> metric of cells that were timed together."""


def front(results: Results, target: Target) -> list[CellResult]:
    """The Pareto front: the cells for which no other cell is at least as good in the aim and in
    every bounded number, and better in one. In the order of the aim, the best first."""
    names = [SHOWN.get(target.metric, target.metric), *(bound.metric for bound in target.bounds)]
    ranks: dict[str, tuple[float, ...]] = {}
    cells = [cell for cell in results.measured if cell.peer is None]
    for cell in cells:
        values = [(name, number(results, name, cell)) for name in names]
        rank = [METRICS[name].rank(value) for name, value in values if value is not None]
        if len(rank) == len(names) and not _changes_tokens(cell):
            ranks[cell.name] = tuple(rank)
    best = [cell for cell in cells if cell.name in ranks and not _is_surpassed(cell.name, ranks)]
    return sorted(best, key=lambda cell: ranks[cell.name], reverse=True)


def _changes_tokens(cell: CellResult) -> bool:
    return cell.lossless_check is not None and cell.lossless_check.lossless is False


def _is_surpassed(name: str, ranks: Mapping[str, tuple[float, ...]]) -> bool:
    values = ranks[name]
    return any(
        all(theirs >= ours for theirs, ours in zip(other, values, strict=True)) and other != values
        for other in ranks.values()
    )


def pipeline_of_chains(pipeline: Pipeline, name: str, chains: Sequence[Chain]) -> Pipeline:
    """A pipeline of these chains alone, in this order, with the stages that they need."""
    baseline = pipeline.benchmark.baseline
    named = {label: chain for label, chain in pipeline.pipelines.items() if label == baseline}
    every = tuple(dict.fromkeys((*baseline_chain(pipeline), *chains)))
    needed = {stage for chain in (*every, *named.values()) for stage in chain}
    return pipeline.model_copy(
        update={
            "name": name,
            "stages": {label: stage for label, stage in pipeline.stages.items() if label in needed},
            "pipelines": named,
            "matrix": Matrix.model_validate({"found": every}),
            "search": None,
            "export": {},
        }
    )


def to_yaml(pipeline: Pipeline, folder: Path, remarks: Iterable[str] = ()) -> str:
    """The pipeline as the text of a YAML file in `folder`, behind remarks.

    Paths are written relative to that folder, so that results name no folder of the machine.
    """
    plain = pipeline.model_dump(mode="json", by_alias=True, exclude_defaults=True)
    matrix = pipeline.matrix.__pydantic_extra__ if pipeline.matrix is not None else {}
    values: dict[str, Any] = {
        "schema": 1,
        "name": pipeline.name,
        "seed": pipeline.seed,
        "more_seeds": plain.get("more_seeds"),
        "model": {
            "source": pipeline.model.source,
            "dtype": pipeline.model.dtype,
            **plain["model"],
        },
        "data": plain.get("data"),
        "stages": {
            name: {"use": stage.use, **stage.model_dump(mode="json", exclude_unset=True)}
            for name, stage in pipeline.stages.items()
        },
        "pipelines": {name: list(chain) for name, chain in pipeline.pipelines.items()},
        "matrix": {axis: [list(chain) for chain in chains] for axis, chains in matrix.items()},
        "benchmark": plain.get("benchmark"),
        "limits": plain.get("limits"),
    }
    empty: tuple[Any, ...] = (None, {}, [])
    written = {name: value for name, value in values.items() if value not in empty}
    yaml = YAML(typ="safe", pure=True)
    yaml.default_flow_style = None
    yaml.width = 110
    yaml.representer.sort_base_mapping_type_on_output = False  # keys stay in their order
    text = StringIO()
    yaml.dump(_relative(written, folder), text)
    return "".join(f"# {line}\n" for line in remarks) + text.getvalue()


def _relative(value: Any, folder: Path) -> Any:
    """Plain values with every path from the root written relative to `folder`."""
    if isinstance(value, dict):
        return {_relative(name, folder): _relative(item, folder) for name, item in value.items()}
    if isinstance(value, list):
        return [_relative(item, folder) for item in value]
    if isinstance(value, str) and Path(value).is_absolute():
        relative = os.path.relpath(value, folder)
        return relative if relative.startswith(".") else f"./{relative}"
    return value
