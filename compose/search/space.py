"""The search space: every chain that a pipeline file allows and no order rule forbids.

Axes come from the file's `search` section, from its matrix, or from its stages, one axis for each
kind. Varied stages (`compose.language.variants`) replace themselves in every choice. Planning finds
the chains that break a rule, and the chains that are equal.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import get_args

from compose.errors import PlanError
from compose.language.schema import Chain, Choice, Matrix, Pipeline, Search, as_chain
from compose.language.variants import Values, variants
from compose.planning.keys import InputHashes
from compose.planning.plan import Plan
from compose.planning.planner import cell_name, make_plan
from compose.stages.base import ModelShape, Role, Stage

MOST_CHAINS = 4000
"""Chains of a space, at most: planning them takes seconds."""

AROUND = (0.5, 1.0, 1.5)
"""Factors on widths and numbers of layers where a file gives no values."""

BITS = {"float32": 32, "bfloat16": 16, "float16": 16}
"""Bits of a weight that is not packed, by the pipeline's type."""

Choices = tuple[Chain, ...]
"""The choices of a chain, one an axis, without empty ones."""


@dataclass(frozen=True)
class Candidate:
    """A chain that may be proposed."""

    name: str
    """The name of its cell: the stages joined by `+`."""
    chain: Chain
    choices: Choices
    predicted_bytes: int | None
    """Bytes of its weight files as its plan says; None where a stage cannot tell."""


@dataclass(frozen=True)
class Space:
    """The candidates of a search, and the stages that they are made of."""

    pipeline: Pipeline
    """The file, with varied stages among its stages."""
    candidates: tuple[Candidate, ...]
    """In the order of the axes; chains that equal another one are left out."""
    bases: Mapping[str, str]
    """Stage -> the stage of the file that it is a variant of."""
    left_out: int
    """Chains that break an order rule."""

    def candidate(self, chain: Chain) -> Candidate | None:
        """The candidate with this chain."""
        return next((candidate for candidate in self.candidates if candidate.chain == chain), None)

    def siblings(self, choice: Chain) -> Chain:
        """The choice with every variant's name replaced by that of the stage in the file."""
        return tuple(self.bases.get(name, name) for name in choice)


def build_space(
    pipeline: Pipeline, shape: ModelShape | None = None, hashes: InputHashes | None = None
) -> Space:
    """The space of a pipeline file on a model of `shape`.

    Raises:
        PlanError: the file has nothing to choose from, or more chains than `MOST_CHAINS`.
    """
    (axes, excluded), vary = _axes(pipeline), _vary(pipeline)
    families = {
        name: variants(name, stage, vary[name]) if name in vary else {name: stage}
        for name, stage in pipeline.stages.items()
    }
    stages = {name: stage for family in families.values() for name, stage in family.items()}
    bases = {variant: name for name, family in families.items() for variant in family}
    widened = pipeline.model_copy(update={"stages": {**pipeline.stages, **stages}})
    choices = _all_choices(
        axes, {name: tuple(family) for name, family in families.items()}, excluded
    )
    for chain in pipeline.pipelines.values():
        choices.setdefault(chain, tuple((name,) for name in chain))
    plan = plan_chains(widened, tuple(choices), shape, hashes)
    candidates = tuple(_candidates(plan, choices, shape))
    if not candidates:
        raise PlanError(
            f"{pipeline.name!r} has no chain to search among",
            fix="name stages, and under `search` the axes and values to choose from",
        )
    return Space(widened, candidates, bases, len(plan.left_out))


def plan_chains(
    pipeline: Pipeline,
    chains: Sequence[Chain],
    shape: ModelShape | None,
    hashes: InputHashes | None,
) -> Plan:
    """The plan of exactly these chains, beside the cells that they are compared with.

    A chain that the file's baseline names is planned under its own name.
    """
    baseline = pipeline.benchmark.baseline
    named = {name: chain for name, chain in pipeline.pipelines.items() if name == baseline}
    every = [chain for chain in dict.fromkeys((*baseline_chain(pipeline), *chains)) if chain]
    update = {
        "pipelines": named,
        "matrix": Matrix.model_validate({"chains": tuple(every)}) if every else None,
        "search": None,
        "export": {},
    }
    return make_plan(pipeline.model_copy(update=update), shape, hashes)


def baseline_chain(pipeline: Pipeline) -> tuple[Chain, ...]:
    """The chain of a baseline that is named by its stages, as in `nf4` or `narrow+nf4`."""
    chain = tuple(pipeline.benchmark.baseline.split("+"))
    return (chain,) if all(name in pipeline.stages for name in chain) else ()


def _all_choices(
    axes: Mapping[str, Sequence[Chain]],
    families: Mapping[str, tuple[str, ...]],
    excluded: Sequence[Mapping[str, Choice]],
) -> dict[Chain, Choices]:
    """Chain -> its choices, for one choice of every axis; the empty chain is left out.

    `excluded` are entries of a matrix, in the names of the file: they leave out every variant.
    """
    widened = [
        [
            (choice, variant)
            for choice in choices
            for variant in itertools.product(*(families.get(name, (name,)) for name in choice))
        ]
        for choices in axes.values()
    ]
    count = math.prod(map(len, widened))
    if count > MOST_CHAINS:
        raise PlanError(
            f"the space has {count} chains, more than {MOST_CHAINS}",
            fix="name fewer axes, or fewer values under search.vary",
        )
    chains: dict[Chain, Choices] = {}
    for pairs in itertools.product(*widened):
        written = dict(zip(axes, (choice for choice, _ in pairs), strict=True))
        if any(
            all(written[axis] == as_chain(unwanted) for axis, unwanted in entry.items())
            for entry in excluded
        ):
            continue
        taken = tuple(variant for _, variant in pairs if variant)
        chain = tuple(itertools.chain.from_iterable(taken))
        if chain:
            chains.setdefault(chain, taken)
    return chains


def _candidates(
    plan: Plan, choices: Mapping[Chain, Choices], shape: ModelShape | None
) -> Iterator[Candidate]:
    """Every cell of the plan but the baseline, repeats and other engines."""
    dtype = plan.pipeline.model.dtype
    for cell in plan.cells[1:]:
        if cell.peer is not None or cell.repeats is not None or not cell.chain:
            continue
        taken = choices.get(cell.chain) or tuple((name,) for name in cell.chain)
        stages = [plan.pipeline.stages[name] for name in cell.chain]
        size = None if shape is None else predicted_bytes(shape, stages, dtype)
        yield Candidate(cell_name(cell.chain), cell.chain, taken, size)


def predicted_bytes(shape: ModelShape, chain: Sequence[Stage], dtype: str) -> int | None:
    """Bytes of the weight files that a chain of stages makes of a model of `shape`.

    Norms, biases and gates are left out: kilobytes to a few megabytes. None where a stage packs
    weights or removes some and does not say how many.
    """
    if shape.quantized is not None:
        return None
    layers: float = BITS[dtype]
    outer: float = BITS[dtype]
    for stage in chain:
        if stage.role == "quantize":
            packed = stage.stored_bits(shape)
            if packed is None:
                return None
            layers, outer = packed.layers, packed.outer or outer
        smaller = stage.reshape(shape)
        if stage.role == "prune" and smaller == shape:
            return None  # only the weights show what it removes
        shape = smaller
    outside = shape.vocab_size * shape.hidden_size * (1 if shape.tie_embeddings else 2)
    return round(((shape.weights - outside) * layers + outside * outer) / 8)


def _axes(
    pipeline: Pipeline,
) -> tuple[dict[str, tuple[Chain, ...]], tuple[Mapping[str, Choice], ...]]:
    """The axes that the file names, or those of its matrix with its exclusions, or one for each
    kind of stage."""
    search = pipeline.search or Search()
    if search.axes:
        return Matrix.model_validate(dict(search.axes)).axes, ()
    if pipeline.matrix is not None:
        return pipeline.matrix.axes, pipeline.matrix.exclude
    by_role: dict[str, tuple[Chain, ...]] = {}
    for role in get_args(Role):  # in the order in which stages of a chain follow each other
        names = [name for name, stage in pipeline.stages.items() if stage.role == role]
        if names:
            by_role[role] = ((), *((name,) for name in names))
    return by_role, ()


def _vary(pipeline: Pipeline) -> Mapping[str, Values]:
    """The values that the file names; where it names neither axes nor values, values around its
    own."""
    search = pipeline.search or Search()
    if search.axes or search.vary:
        return search.vary
    around = {name: _around(stage) for name, stage in pipeline.stages.items()}
    return {name: values for name, values in around.items() if values}


def _around(stage: Stage) -> dict[str, tuple[float | int, ...]]:
    """Values around a stage's own: of widths by share, of layers by number."""
    ratio, count = getattr(stage, "ratio", None), getattr(stage, "count", None)
    if isinstance(ratio, float):
        ratios = (round(factor * ratio, 4) for factor in AROUND)
        return {"ratio": tuple(value for value in ratios if value < 1)}
    if isinstance(count, int) and not isinstance(count, bool):
        counts = (max(1, round(factor * count)) for factor in AROUND)
        return {"count": tuple(dict.fromkeys(counts))}
    return {}
