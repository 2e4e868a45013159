"""A pipeline -> its plan: the chains to make and measure, and the rules that leave others out.

Planning is pure and quick: it imports no torch, needs no weights, and reads only the files whose
content is part of a step's key.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass

from compose.bench.peers.table import parse_peer
from compose.errors import PlanError, RuleBroken, shortened
from compose.language.positions import Loc
from compose.language.schema import DENSE, Chain, Pipeline, as_chain
from compose.planning.keys import InputHashes, StepKeys
from compose.planning.plan import (
    SOURCE,
    Cell,
    LeftOut,
    Origin,
    Plan,
    Step,
    speculates,
    why_no_baseline,
)
from compose.stages.base import RULES, ModelShape, Stage
from compose.stages.decode import DecodeStage

MOST_COMBINATIONS = 10_000
"""Chains of a matrix: planning more takes minutes, running them years."""
MOST_STAGES = 100
"""Stages of one chain."""


def make_plan(
    pipeline: Pipeline, shape: ModelShape | None = None, hashes: InputHashes | None = None
) -> Plan:
    """Plan all chains of a pipeline, on a model of `shape`; the same inputs give the same plan.

    Without a shape, rules that need sizes are not checked. A file in `hashes` is not hashed again.

    Raises:
        PlanError: a name points at nothing, an explicit pipeline breaks a rule (a `RuleBroken`, at
            the stage's line), or two different cells would have one name.
    """
    for problem in pipeline.problems():
        error = PlanError(problem.message, fix=problem.fix)
        raise pipeline.locate(error, problem.loc, at_key=problem.at_key)
    _refuse_endless(pipeline)
    planner = _Planner(pipeline, shape, hashes or {})
    planner.add((), (DENSE,), "baseline")
    for name, chain in pipeline.pipelines.items():
        planner.add_pipeline(name, chain)
    for chain, excluded in combinations(pipeline):
        planner.add_combination(chain, excluded)
    planner.add_plain_cells()
    planner.add_repeats()
    planner.add_peers()
    return planner.plan()


def _refuse_endless(pipeline: Pipeline) -> None:
    """Refuse a matrix or a chain that would keep the planner busy for minutes, at its line."""
    matrix = pipeline.matrix
    axes = {} if matrix is None else matrix.axes
    excluded = 0 if matrix is None else len(matrix.exclude)
    count = math.prod(map(len, axes.values())) if axes else 0
    chained = (count + len(pipeline.pipelines)) * (1 + len(pipeline.more_seeds))
    if max(chained, count * excluded // 100) > MOST_COMBINATIONS:
        error = PlanError(
            f"the file asks for {shortened(str(chained), 20)} chains, with {excluded} entries that "
            f"exclude some; at most {MOST_COMBINATIONS} chains can be planned",
            fix="shorten the axes of the matrix, or split it over several files",
        )
        most: Loc = ("more_seeds",) if len(pipeline.more_seeds) > count else ("matrix",)
        raise pipeline.locate(error, most, at_key=True)
    chains = [(("pipelines", name), chain) for name, chain in pipeline.pipelines.items()]
    chains += [(("matrix", axis), chain) for axis, choices in axes.items() for chain in choices]
    for place, chain in chains:
        if len(chain) > MOST_STAGES:
            error = PlanError(f"a chain of {len(chain)} stages: at most {MOST_STAGES} are planned")
            raise pipeline.locate(error, place)


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


def _compared_with(decode: Stage) -> Stage | None:
    """How the cell decodes that one of this stage is compared with; None is plain decoding."""
    assert isinstance(decode, DecodeStage), "only these say how a model is run"
    return decode.compared_with()


def cell_name(chain: Chain) -> str:
    """The name of a chain that has none of its own."""
    return "+".join(chain) or DENSE


@dataclass
class _PlannedCell:
    """A cell to which further names may be added."""

    chain: Chain
    weights: str
    decode: Stage | None
    origin: Origin
    names: list[str]
    """The cell's name, then its aliases."""
    repeats: str | None = None
    peer: str | None = None


class _Planner:
    """Collects steps and cells by key, so that equal ones are planned once."""

    def __init__(self, pipeline: Pipeline, shape: ModelShape | None, hashes: InputHashes) -> None:
        self._pipeline = pipeline
        self._stages: Mapping[str, Stage] = pipeline.stages
        self._shape = shape
        self._keys = StepKeys(pipeline, hashes)
        self._steps: dict[str, Step] = {}
        self._cells: dict[str, _PlannedCell] = {}
        self._left_out: dict[Chain, LeftOut] = {}

    def add(self, chain: Chain, names: tuple[str, ...], origin: Origin) -> None:
        """Plan a chain that breaks no rule; one that equals a planned cell only adds its names."""
        weights, decode = self._weights(chain, self._pipeline.seed)
        new = _PlannedCell(chain, weights, decode, origin, [])
        planned = self._cells.setdefault(self._keys.cell(weights, decode), new)
        planned.names += [name for name in names if name not in planned.names]

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
        """Add what each cell with a decode stage is compared with, and the same weights, decoded
        plainly."""
        for planned in list(self._cells.values()):
            if planned.decode is None:
                continue
            chain = self._steps[planned.weights].chain
            for decode in (_compared_with(planned.decode), None):
                names = [name for name, stage in self._stages.items() if stage == decode][:1]
                if self._keys.cell(planned.weights, decode) not in self._cells:
                    self.add((*chain, *names), (cell_name((*chain, *names)),), "plain")

    def add_repeats(self) -> None:
        """Plan every cell whose chain makes weights again with each further seed, for its quality.

        Cells that speculate are left out: their tokens, and so their quality, are the plain cell's.
        """
        for planned in list(self._cells.values()):
            if self._steps[planned.weights].stage is None or speculates(planned.decode):
                continue
            for seed in self._pipeline.more_seeds:
                weights, decode = self._weights(planned.chain, seed)
                name = planned.names[0]
                repeat = _PlannedCell(
                    planned.chain, weights, decode, planned.origin, [f"{name}@{seed}"], name
                )
                self._cells[self._keys.cell(weights, decode)] = repeat

    def add_peers(self) -> None:
        """Plan the other engines on the untouched model, one cell each."""
        weights, _ = self._weights((), self._pipeline.seed)
        seed = self._pipeline.seed
        for peer in self._pipeline.benchmark.against:
            planned = _PlannedCell((), weights, None, "peer", [peer], peer=peer)
            text = None
            if parse_peer(peer).reads_text:
                text = {"seed": seed, **self._keys.data_identity("calibration")}
            self._cells[self._keys.cell(weights, None, peer, text)] = planned

    def plan(self) -> Plan:
        """The plan, after the last checks on names."""
        self._refuse_shared_names()
        cells = [self._cell(key, planned) for key, planned in self._cells.items()]
        names = {name for cell in cells for name in (cell.name, *cell.aliases)}
        left_out = [left for left in self._left_out.values() if left.name not in names]
        plan = Plan(self._pipeline, tuple(self._steps.values()), tuple(cells), tuple(left_out))
        for name in self._pipeline.export:
            self._ours(plan, name, ("export", name), at_key=True)
        name = self._pipeline.benchmark.baseline
        baseline = self._ours(plan, name, ("benchmark", "baseline"))
        self._require_baseline(plan, baseline)
        cells.sort(key=lambda cell: cell is not baseline)  # stable: the others keep their order
        return Plan(plan.pipeline, plan.steps, tuple(cells), plan.left_out)

    def _require_baseline(self, plan: Plan, cell: Cell) -> None:
        """Refuse a baseline that the other cells cannot be compared with, at its line."""
        why = why_no_baseline(cell, self._pipeline.benchmark.quality)
        if why is not None:
            weights = plan.cell(cell.repeats or cell.name).weights
            plain = self._cells[self._keys.cell(weights, None)].names[0]
            error = PlanError(f"the baseline {why}", fix=f"name {plain!r}")
            raise self._pipeline.locate(error, ("benchmark", "baseline"))

    def _ours(self, plan: Plan, name: str, loc: Loc, *, at_key: bool = False) -> Cell:
        """The cell of that name, which our decoder must run."""
        try:
            cell = plan.cell(name)
            if cell.peer is not None:
                raise PlanError(f"{name!r} is another engine: name a chain of stages")
        except PlanError as error:
            raise self._pipeline.locate(error, loc, at_key=at_key) from None
        return cell

    def _broken(self, chain: Chain) -> tuple[int, RuleBroken] | None:
        """Index of the first stage of a chain that breaks a rule, and the error; else None."""
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
            step = self._add_step(
                Step(key, name, stage, step.key, chain[: index + 1], seed, memory)
            )
            shape = None if shape is None else stage.reshape(shape)
        return step.key, None

    def _add_step(self, step: Step) -> Step:
        return self._steps.setdefault(step.key, step)

    def _leave_out(self, chain: Chain, rule: str, message: str) -> None:
        self._left_out.setdefault(chain, LeftOut(cell_name(chain), chain, rule, message))

    def _refuse_shared_names(self) -> None:
        owner: dict[str, _PlannedCell] = {}
        for planned in self._cells.values():
            for name in planned.names:
                other = owner.setdefault(name, planned)
                if other is not planned:
                    message = f"{name!r} names two cells: {other.chain} and {planned.chain}"
                    error = PlanError(message, fix="give the pipeline another name")
                    raise self._pipeline.locate(error, ("pipelines", name), at_key=True)

    def _cell(self, key: str, planned: _PlannedCell) -> Cell:
        name, *aliases = planned.names
        plain = None
        if planned.decode is not None:
            key_of = self._keys.cell(planned.weights, _compared_with(planned.decode))
            plain = self._cells[key_of].names[0]
        return Cell(
            name=name,
            chain=planned.chain,
            key=key,
            weights=planned.weights,
            decode=planned.decode,
            plain=plain,
            origin=planned.origin,
            aliases=tuple(aliases),
            repeats=planned.repeats,
            peer=planned.peer,
        )
