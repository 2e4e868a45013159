"""A pipeline -> its plan: steps that make model folders, cells to measure, and what is left out.

Planning is pure and quick: it imports no torch, needs no weights, and reads only the files whose
content is part of a step's key. A step's key is its value: equal steps of two chains run once.
"""

from __future__ import annotations

import hashlib
import itertools
import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, TypedDict

from compose.errors import PlanError, RuleBroken, suggest
from compose.language.schema import DENSE, Chain, Loc, Pipeline, as_chain
from compose.stages.base import RULES, DataSpec, ModelShape, Stage

SOURCE = "source"
SPECULATE = "speculate"
SOURCE_VERSION = 1  # raised when the same source begins to be stored in another way
Origin = Literal["baseline", "pipeline", "matrix", "plain"]


class Facts(TypedDict, total=False):
    """What is known of a pipeline's inputs beyond its text. What is absent is left out of keys."""

    model_sha256: str
    """The pinned hash of the source model; stands for the path of a local folder."""

    data_sha256: Mapping[str, str]
    """Hash of a data set by its source; a local file that is not named here is hashed."""

    file_sha256: Mapping[str, str]
    """Hash of a file that a stage names by its path; one that is not named here is hashed."""


@dataclass(frozen=True)
class Step:
    """One model folder to be made. Its key is 16 hex digits, the same for equal steps."""

    key: str
    name: str
    """The stage's name in the file, or `source`."""
    stage: Stage | None
    """None for the source model."""
    parent: str | None
    """Key of the step whose folder this one starts from."""
    chain: Chain
    """Names of the stages up to and with this one."""
    seed: int
    """Seed of what it draws."""
    memory: int | None = None
    """About what its process holds at its peak, in bytes; None where sizes are not known."""


@dataclass(frozen=True)
class Cell:
    """One configuration to be measured: a model folder, and how it is decoded."""

    name: str
    """`dense`, a named pipeline's name, or the chain's stages joined by `+`."""
    chain: Chain
    key: str
    """16 hex digits, of the weights and the decode stage: equal cells are one cell."""
    weights: str
    """Key of the step that makes the folder."""
    decode: Stage | None
    plain: str | None
    """The cell with the same weights and no decode stage; None when that is this one."""
    origin: Origin
    """Who asked for it; `plain` are added so that a decode stage has its like to compare with."""
    aliases: tuple[str, ...] = ()
    """Other names that mean this cell."""
    repeats: str | None = None
    """The cell of which this one is a repeat with another seed."""


@dataclass(frozen=True)
class LeftOut:
    """A combination of the matrix that is not planned."""

    name: str
    chain: Chain
    rule: str
    """A name in `compose.stages.rules.RULES`."""
    message: str


@dataclass(frozen=True)
class Plan:
    """Steps in an order in which they can run, cells with the baseline first, and the rest."""

    pipeline: Pipeline
    steps: tuple[Step, ...]
    cells: tuple[Cell, ...]
    left_out: tuple[LeftOut, ...]

    def step(self, key: str) -> Step:
        """The step with this key; KeyError when the plan has none."""
        return {step.key: step for step in self.steps}[key]

    def title(self, step: Step) -> str:
        """The chain that a step ends, and its seed where that is not the first."""
        seed = "" if step.seed == self.pipeline.seed else f"@{step.seed}"
        return ("+".join(step.chain) or step.name) + seed

    def lineage(self, key: str) -> tuple[Step, ...]:
        """The steps from the source up to and with the one with this key."""
        step = self.step(key)
        return (step,) if step.parent is None else (*self.lineage(step.parent), step)

    def cell(self, name: str) -> Cell:
        """The cell of this name or alias.

        Raises:
            PlanError: no cell is named so; when it was left out, the error says by which rule.
        """
        for cell in self.cells:
            if name == cell.name or name in cell.aliases:
                return cell
        for left in self.left_out:
            if name == left.name:
                raise PlanError(f"cell {name!r} is left out: {left.message} [rule {left.rule}]")
        names = [each for cell in self.cells for each in (cell.name, *cell.aliases)]
        raise PlanError(f"no cell is named {name!r}: {suggest(name, names)}")

    def to_json(self) -> dict[str, Any]:
        """The plan as plain JSON, for plan.json and scripts."""
        return {
            "schema_version": 1,
            "run": self.pipeline.name,
            "baseline": self.cells[0].name,
            "steps": [_step_json(step) for step in self.steps],
            "cells": [_cell_json(cell) for cell in self.cells],
            "left_out": [vars(left) | {"chain": list(left.chain)} for left in self.left_out],
        }


def make_plan(
    pipeline: Pipeline, shape: ModelShape | None = None, facts: Facts | None = None
) -> Plan:
    """Plan all chains of a pipeline, on a model of `shape`; the same inputs give the same plan.

    Without a shape, rules that need sizes are not checked.

    Raises:
        PlanError: a name points at nothing, an explicit pipeline breaks a rule (a `RuleBroken`, at
            the stage's line), or two different cells would have one name.
    """
    for problem in pipeline.problems():
        error = PlanError(problem.message, fix=problem.fix)
        raise pipeline.locate(error, problem.loc, at_key=problem.at_key)
    planner = _Planner(pipeline, shape, facts or {})
    planner.add((), (DENSE,), "baseline")
    for name, chain in pipeline.pipelines.items():
        planner.add_pipeline(name, chain)
    for chain, excluded in combinations(pipeline):
        planner.add_combination(chain, excluded)
    planner.add_plain_cells()
    planner.add_repeats()
    return planner.plan()


def combinations(pipeline: Pipeline) -> Iterator[tuple[Chain, bool]]:
    """Every chain of the matrix in the order of its axes, and whether it is excluded."""
    if pipeline.matrix is None:
        return
    axes = pipeline.matrix.axes
    for choice in itertools.product(*axes.values()):
        taken = dict(zip(axes, choice, strict=True))
        excluded = any(
            all(taken[axis] == as_chain(unwanted) for axis, unwanted in entry.items())
            for entry in pipeline.matrix.exclude
        )
        yield tuple(itertools.chain.from_iterable(choice)), excluded


def cell_name(chain: Chain) -> str:
    """The name of a chain that has none of its own."""
    return "+".join(chain) or DENSE


def speculates(decode: Stage | None) -> bool:
    """Whether a cell with this decode stage speculates: it then gives the plain cell's tokens."""
    return decode is not None and decode.use == SPECULATE


def digest(recipe: Mapping[str, Any]) -> str:
    """16 hex digits of the sha256 of a recipe in canonical JSON."""
    text = json.dumps(recipe, sort_keys=True, separators=(",", ":"), allow_nan=False)
    return hashlib.sha256(text.encode()).hexdigest()[:16]


@dataclass
class _Draft:
    """A cell whose names are still being gathered."""

    chain: Chain
    weights: str
    decode: Stage | None
    origin: Origin
    names: list[str]
    repeats: str | None = None


class _Planner:
    """Gathers steps and cells by key."""

    def __init__(self, pipeline: Pipeline, shape: ModelShape | None, facts: Facts) -> None:
        self._pipeline = pipeline
        self._stages: Mapping[str, Stage] = pipeline.stages
        self._shape = shape
        self._keys = _Keys(pipeline, facts)
        self._steps: dict[str, Step] = {}
        self._drafts: dict[str, _Draft] = {}
        self._left_out: dict[Chain, LeftOut] = {}

    def add(self, chain: Chain, names: tuple[str, ...], origin: Origin) -> None:
        """Plan a chain that breaks no rule; one that equals a planned cell only adds its names."""
        weights, decode = self._weights(chain, self._pipeline.seed)
        draft = _Draft(chain, weights, decode, origin, [])
        draft = self._drafts.setdefault(_cell_key(weights, decode), draft)
        draft.names += [name for name in names if name not in draft.names]

    def add_pipeline(self, name: str, chain: Chain) -> None:
        """Plan a named chain, or raise the rule that it breaks, at its line."""
        broken = self._broken(chain)
        if broken is not None:
            index, error = broken
            error.cell, error.stage = name, chain[index]
            raise self._pipeline.locate(error, ("pipelines", name, index))
        self.add(chain, (name,), "pipeline")

    def add_combination(self, chain: Chain, excluded: bool) -> None:
        """Plan a chain of the matrix, or note why it is left out."""
        broken = self._broken(chain)
        if broken is not None:
            _, error = broken
            self._leave_out(chain, error.rule, error.message)
        elif excluded:
            self._leave_out(chain, "exclude", RULES["exclude"])
        else:
            self.add(chain, (cell_name(chain),), "matrix")

    def add_plain_cells(self) -> None:
        """See to it that every cell with a decode stage has its like without one."""
        for draft in list(self._drafts.values()):
            if draft.decode is not None and _cell_key(draft.weights, None) not in self._drafts:
                chain = self._steps[draft.weights].chain
                self.add(chain, (cell_name(chain),), "plain")

    def add_repeats(self) -> None:
        """Plan what has weights of its own again with every further seed, for its quality.

        Speculation gives the plain cell's tokens, so its like with another seed says nothing new.
        """
        for draft in list(self._drafts.values()):
            if self._steps[draft.weights].stage is None or speculates(draft.decode):
                continue
            for seed in self._pipeline.more_seeds:
                weights, decode = self._weights(draft.chain, seed)
                name = draft.names[0]
                repeat = _Draft(
                    draft.chain, weights, decode, draft.origin, [f"{name}@{seed}"], name
                )
                self._drafts[_cell_key(weights, decode)] = repeat

    def plan(self) -> Plan:
        """Everything gathered, after the last checks on names."""
        self._refuse_shared_names()
        cells = [self._cell(key, draft) for key, draft in self._drafts.items()]
        planned = {name for cell in cells for name in (cell.name, *cell.aliases)}
        left_out = [each for each in self._left_out.values() if each.name not in planned]
        plan = Plan(self._pipeline, tuple(self._steps.values()), tuple(cells), tuple(left_out))
        for name in self._pipeline.export:
            self._named(plan, name, ("export", name), at_key=True)
        wanted = self._pipeline.benchmark.baseline
        baseline = self._named(plan, wanted, ("benchmark", "baseline"))
        cells.sort(key=lambda cell: cell is not baseline)  # stable: the others keep their order
        return Plan(plan.pipeline, plan.steps, tuple(cells), plan.left_out)

    def _named(self, plan: Plan, name: str, loc: Loc, *, at_key: bool = False) -> Cell:
        try:
            return plan.cell(name)
        except PlanError as error:
            raise self._pipeline.locate(error, loc, at_key=at_key) from None

    def _broken(self, chain: Chain) -> tuple[int, RuleBroken] | None:
        """The first stage of a chain that may not stand where it stands."""
        shape, before = self._shape, tuple[Stage, ...]()
        for index, name in enumerate(chain):
            stage = self._stages[name]
            try:
                stage.check(shape, before)
            except RuleBroken as error:
                return index, error
            before = (*before, stage)
            shape = None if shape is None else stage.reshape(shape)
        return None

    def _weights(self, chain: Chain, seed: int) -> tuple[str, Stage | None]:
        """Add the steps of a chain; the last one's key, and the decode stage, if there is one."""
        source = Step(self._keys.source(), SOURCE, None, None, (), self._pipeline.seed)
        step, shape = self._add_step(source), self._shape
        for index, name in enumerate(chain):
            stage = self._stages[name]
            if stage.acts == "decode":
                return step.key, stage  # the rules let nothing follow it
            key = self._keys.stage(name, stage, step.key, seed)
            memory = (
                None if shape is None else stage.memory(shape, self._pipeline.data.train.length)
            )
            made = Step(key, name, stage, step.key, chain[: index + 1], seed, memory)
            step = self._add_step(made)
            shape = None if shape is None else stage.reshape(shape)
        return step.key, None

    def _add_step(self, step: Step) -> Step:
        return self._steps.setdefault(step.key, step)

    def _leave_out(self, chain: Chain, rule: str, message: str) -> None:
        self._left_out.setdefault(chain, LeftOut(cell_name(chain), chain, rule, message))

    def _refuse_shared_names(self) -> None:
        owner: dict[str, _Draft] = {}
        for draft in self._drafts.values():
            for name in draft.names:
                other = owner.setdefault(name, draft)
                if other is not draft:
                    message = f"{name!r} names two cells: {other.chain} and {draft.chain}"
                    error = PlanError(message, fix="give the pipeline another name")
                    raise self._pipeline.locate(error, ("pipelines", name), at_key=True)

    def _cell(self, key: str, draft: _Draft) -> Cell:
        name, *aliases = draft.names
        plain = None
        if draft.decode is not None:
            plain = self._drafts[_cell_key(draft.weights, None)].names[0]
        return Cell(
            name=name,
            chain=draft.chain,
            key=key,
            weights=draft.weights,
            decode=draft.decode,
            plain=plain,
            origin=draft.origin,
            aliases=tuple(aliases),
            repeats=draft.repeats,
        )


class _Keys:
    """Computes keys: a hash over what decides a step's result, and the key of the step before."""

    def __init__(self, pipeline: Pipeline, facts: Facts) -> None:
        self._pipeline = pipeline
        self._model_sha256 = facts.get("model_sha256")
        self._files = dict(facts.get("file_sha256", {}))
        self._data = dict(facts.get("data_sha256", {}))

    def source(self) -> str:
        model = self._pipeline.model
        return digest(
            {
                "use": SOURCE,
                "version": SOURCE_VERSION,
                "model": self._model_identity(model.source),
                "dtype": model.dtype,
            }
        )

    def stage(self, name: str, stage: Stage, parent: str, seed: int) -> str:
        hashes = {
            parameter: self._file_sha256(path, ("stages", name, parameter))
            for parameter, path in stage.files().items()
        }
        return digest(
            {
                **stage.identity(hashes),
                "parent": parent,
                "seed": seed,
                "dtype": self._pipeline.model.dtype,
                "data": {split: self._data_identity(split) for split in stage.reads_data},
            }
        )

    def _model_identity(self, source: str) -> dict[str, Any]:
        folder = Path(source)
        if not folder.is_absolute():
            return {"source": source, "sha256": self._model_sha256}
        if self._model_sha256 is not None:
            return {"sha256": self._model_sha256}
        return {"folder": source, "files": _listing(folder)}

    def _data_identity(self, split: Literal["train", "calibration"]) -> dict[str, Any]:
        spec: DataSpec = getattr(self._pipeline.data, split)
        identity: dict[str, Any] = {"limit": spec.limit, "length": spec.length}
        if Path(spec.source).is_absolute():
            known = self._data.get(spec.source)
            sha256 = known or self._file_sha256(Path(spec.source), ("data", split, "source"))
            return identity | {"sha256": sha256}
        return identity | {"source": spec.source, "sha256": self._data.get(spec.source)}

    def _file_sha256(self, path: Path, loc: Loc) -> str:
        if str(path) not in self._files:
            try:
                with path.open("rb") as file:
                    self._files[str(path)] = hashlib.file_digest(file, "sha256").hexdigest()
            except OSError as error:
                refused = PlanError(f"cannot read {str(path)!r}: {error.strerror}")
                raise self._pipeline.locate(refused, loc) from None
        return self._files[str(path)]


def _listing(folder: Path) -> list[tuple[str, int, int]]:
    """Name, size and time of every file: tells a changed model folder without reading weights."""
    files = sorted(path for path in folder.glob("*") if path.is_file())
    return [(path.name, path.stat().st_size, path.stat().st_mtime_ns) for path in files]


def _cell_key(weights: str, decode: Stage | None) -> str:
    return digest({"weights": weights, "decode": None if decode is None else decode.identity({})})


def _stage_json(stage: Stage | None) -> dict[str, Any] | None:
    return None if stage is None else stage.model_dump(mode="json")


def _step_json(step: Step) -> dict[str, Any]:
    return vars(step) | {"stage": _stage_json(step.stage), "chain": list(step.chain)}


def _cell_json(cell: Cell) -> dict[str, Any]:
    lists = {"chain": list(cell.chain), "aliases": list(cell.aliases)}
    return vars(cell) | {"decode": _stage_json(cell.decode)} | lists
