"""The pipeline language as frozen models: unknown keys refused, one docstring a field.

`language.parse.load_pipeline` reads a file into a `Pipeline`; a program may also build one itself.
pydantic checks each field by itself; `Pipeline.problems` finds names that point at nothing. The
planner checks whether chains break a rule.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from typing import Annotated, Any, Literal

from pydantic import (
    AfterValidator,
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    PrivateAttr,
    model_validator,
)

from compose.assets.table import TASKS, WRITTEN_TASK
from compose.bench.peers.table import parse_peer
from compose.errors import UserError, shortened, suggest
from compose.language.limits import SECTION, Limits
from compose.language.positions import Error, Loc, Problem, SourceMap
from compose.language.variants import vary_problems
from compose.stages.base import DataSpec, Stage
from compose.stages.decode import Skip, Speculate
from compose.stages.gate import Gate
from compose.stages.quantize.integers import Int4, Int8
from compose.stages.registry import AnyStage

Chain = tuple[str, ...]
"""Names of stages, in the order in which they run."""

NONE = "none"
DENSE = "dense"
RESERVED = (NONE, DENSE, "source", "default")
_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9_.-]*")


def _name(name: str) -> str:
    if not _NAME.fullmatch(name):
        raise ValueError(
            f"{shortened(repr(name))} is not a name: take letters, digits, '_', '.' and '-', "
            "a letter or digit first"
        )
    return name


def _free_name(name: str) -> str:
    if name in RESERVED:
        raise ValueError(f"{name!r} already means something here: take another name")
    return _name(name)


def _variant_name(name: str) -> str:
    """Names joined by `+`, as the matrix names its variants: `int4-healed+drafts`."""
    if name in RESERVED:
        return _free_name(name)
    for part in name.split("+"):
        _name(part)
    return name


def _no_repeats(values: tuple[Any, ...]) -> tuple[Any, ...]:
    twice = [value for index, value in enumerate(values) if value in values[:index]]
    if twice:
        raise ValueError(f"{twice[0]!r} is listed twice")
    return values


def _with_a_written_task(tasks: tuple[str, ...]) -> tuple[str, ...]:
    """The tasks, and one with written answers where none of them is known to have them."""
    written = [name for name in tasks if name in TASKS and TASKS[name].writes]
    return tasks if written or not tasks else (*tasks, WRITTEN_TASK)


def _candidates(value: object) -> object:
    """One data set, a list of them in order of preference, or null -> a tuple."""
    if value is None:
        return ()
    return (value,) if isinstance(value, str) else value


def _matrix(value: object) -> object:
    if isinstance(value, str):
        raise ValueError(f"{value!r} is not a matrix: write 'default', or a mapping of axes")
    return value


def _no_bool(value: object) -> object:
    """In Python, true is the number 1."""
    return str(value).lower() if isinstance(value, bool) else value


Name = Annotated[str, AfterValidator(_name)]
FreeName = Annotated[str, AfterValidator(_free_name)]
VariantName = Annotated[str, AfterValidator(_variant_name)]
Text = Annotated[str, Field(min_length=1)]
Count = Annotated[int, Field(ge=1)]
Choice = Text | Annotated[tuple[Text, ...], Field(min_length=1)]


class _Section(BaseModel):
    model_config = SECTION


class Model(_Section):
    """The model that is compressed."""

    source: Text
    """An alias, a hub id, a local folder or a GGUF file (relative to this file)."""

    keep_blocks: bool = False
    """Of a GGUF file: keep the weights in its Q4_0, Q4_1 and Q8_0 blocks, not rounded again. Else,
    and where they are stored in other ways, weights are dequantized."""

    dtype: Literal["float32", "bfloat16", "float16"] = "float32"
    """The type in which weights that are not quantized are kept and computed."""


class TrainSpec(DataSpec):
    """The texts that gates and healing learn from."""

    limit: Count = 2000
    """How many rows of text are taken, in a fixed order."""


class Data(_Section):
    """The texts that stages read. Benchmarks have their own."""

    train: TrainSpec = TrainSpec()
    """For stages that train: gate, heal."""

    calibration: DataSpec = DataSpec()
    """Text for stages that only measure: thresholds, block influence, pruning, GPTQ."""


class Matrix(BaseModel):
    """Every combination of one choice an axis. All keys but `exclude` are axes, in chain order."""

    model_config = ConfigDict(frozen=True, extra="allow", use_attribute_docstrings=True)
    __pydantic_extra__: dict[str, Annotated[tuple[Choice, ...], Field(min_length=1)]] = Field(
        init=False
    )

    exclude: tuple[dict[str, Choice], ...] = ()
    """Combinations to leave out: each entry names a choice for some of the axes."""

    @property
    def axes(self) -> dict[str, tuple[Chain, ...]]:
        """Axis -> its choices as chains; `none` is the empty chain."""
        extra = self.__pydantic_extra__
        return {axis: tuple(map(as_chain, choices)) for axis, choices in extra.items()}


class Search(_Section):
    """The chains that `gateskip search` may build, and how many of them it measures."""

    axes: dict[Text, Annotated[tuple[Choice, ...], Field(min_length=1)]] = {}
    """One choice of each axis, in chain order, as in a matrix. When left out: the axes of the
    matrix, or else one axis for each kind of stage, with `none`."""

    vary: dict[Text, dict[Text, tuple[Any, ...]]] = {}
    """Stage -> parameter -> the values that it may take: `{narrow: {ratio: [0.05, 0.1]}}`. Where
    the axes are left out, too, widths and layers vary around their own values."""

    probes: Count = 48
    """Chains measured on the first rung, at most. A space that is not larger is measured whole."""

    batch: Count = 8
    """Chains that are proposed and measured together; the next ones follow from their results."""

    tokens: Annotated[int, Field(ge=2)] = 2048
    """Tokens on which the first rung scores; each further rung has four times as many, and the last
    is the file's own benchmark."""

    finalists: Count = 6
    """Chains that come to the last rung, more where intervals still reach the bound."""


class Sampling(_Section):
    """How tokens are drawn; the fields mean what they do in transformers."""

    temperature: Annotated[float, Field(gt=0)] = 0.7
    """Divides the logits."""

    top_k: Annotated[int, Field(ge=0)] = 0
    """Only the k most likely tokens; 0 is all."""

    top_p: Annotated[float, Field(gt=0, le=1)] = 1.0
    """Only the most likely tokens that together have this probability."""

    min_p: Annotated[float, Field(ge=0, le=1)] = 0.0
    """Only tokens at least this likely, relative to the most likely."""


class Speed(_Section):
    """How speed is measured."""

    prompt_tokens: Count = 128
    """Length of the prompt that is prefilled."""

    new_tokens: Count = 128
    """Tokens decoded after it, each time that a cell has its turn."""

    min_seconds: Annotated[float, Field(ge=0)] = 2.0
    """How long every cell decodes in one repeat, in turns that alternate over all cells."""

    repeats: Count = 5
    """Interleaved rounds over all cells; every one is kept, the median is reported."""

    one_process: bool = False
    """Whether all cells of ours are timed in one process, into which each round loads them anew, in
    another order. A process can be a few percent faster or slower than an equal one for as long as
    it lives; one process makes this the same for all cells, and the placement of weights changes
    with the rounds. The peak memory of each cell is not measured then."""

    batch_sizes: Annotated[tuple[Count, ...], AfterValidator(_no_repeats), Field(min_length=1)] = (
        1,
    )
    """Prompts run at once, one measurement each."""

    contexts: Annotated[tuple[Count, ...], AfterValidator(_no_repeats)] = ()
    """Further prompt lengths, measured with one prompt at a time."""

    prompts: Text | None = None
    """Prompts by category (an alias or a file), continued to their end instead of running text."""

    prompts_per_category: Count | None = None
    """How many of each category a round reads, the next ones in every round; all when left out."""

    sampling: Sampling | None = None
    """How tokens are drawn while speed is measured; greedily when left out. Texts then differ from
    cell to cell, and other engines, which are timed greedily, cannot take part."""


class OwnAnswers(_Section):
    """The prompts that the dense model answers; other cells are compared along its answers."""

    source: Text = "prompts"
    """Where the prompts come from: an alias, a hub data set id, or a path."""

    prompts: Count = 16
    """How many are answered."""

    new_tokens: Count = 64
    """Tokens of an answer, at most."""


class Quality(_Section):
    """How quality is measured."""

    perplexity: Annotated[
        tuple[Text, ...],
        BeforeValidator(_candidates, json_schema_input_type=Text | tuple[Text, ...] | None),
    ] = ("wikitext2", "heldout-text")
    """A data set, or several of which the first available one is used; null measures none."""

    perplexity_tokens: Annotated[int, Field(ge=2)] = 8192
    """Tokens over which perplexity, KL and agreement are measured."""

    tasks: Annotated[
        tuple[Text, ...], AfterValidator(_no_repeats), AfterValidator(_with_a_written_task)
    ] = ()
    """Tasks of lm-eval. Where none of them has written answers, `arithmetic` is added: skipping
    costs little in likelihoods and much in written text, so every mean includes a task with written
    answers."""

    limit: Count = 500
    """Questions taken of each task."""

    batch_size: Count = 8
    """Sequences scored at once."""

    own_answers: OwnAnswers | None = OwnAnswers()
    """KL to the dense model on answers that it wrote itself, and how far greedy answers agree with
    them, all as the cell decodes; null measures none."""


class Lossless(_Section):
    """How speculation is compared with plain decoding, token for token."""

    prompts: Count = 16
    """How many prompts are continued."""

    new_tokens: Count = 64
    """Tokens compared a prompt."""

    source: Text = "prompts"
    """Where the prompts come from: an alias, a hub data set id, or a path."""


class Benchmark(_Section):
    """The measurements of every cell."""

    baseline: Text = DENSE
    """The cell that speed and quality are compared with."""

    against: Annotated[
        tuple[Text, ...],
        BeforeValidator(_candidates, json_schema_input_type=Text | tuple[Text, ...] | None),
        AfterValidator(_no_repeats),
    ] = ()
    """Other engines on the untouched model, each a cell of its own: `llama.cpp:q4_k_m`, ..."""

    threads: Count | None = None
    """Threads a cell computes with; when left out, as many as the machine has cores."""

    speed: Speed = Speed()
    """Tokens per second and time to first token."""

    quality: Quality = Quality()
    """Perplexity, agreement with the dense model, and tasks."""

    lossless: Lossless = Lossless()
    """Whether speculation changes the text."""


class Export(_Section):
    """Where one cell is exported to."""

    to: Text
    """The folder, relative to the one in which the command runs."""


DEFAULT_STAGES: dict[str, Stage] = {
    "gates": Gate(prompt_budgets=(0.9, 0.8, 0.68)),
    "int8": Int8(),
    "int4": Int4(),
    "read80": Skip(prompt_budget=0.8),
    "spec": Speculate(),
}
"""The stages of `matrix: default`; a stage of the same name in the file replaces it."""

DEFAULT_MATRIX = Matrix.model_validate(
    {
        "gate": (NONE, "gates"),
        "quantize": (NONE, "int8", "int4"),
        "decode": (NONE, "read80", "spec"),
    }
)


class Pipeline(_Section):
    """A whole pipeline file. One that a program builds may name no variant; then its plan has the
    dense model and the other engines alone."""

    schema_version: Annotated[Literal[1], BeforeValidator(_no_bool)] = Field(
        default=1, alias="schema"
    )
    """Version of this language."""

    name: Name
    """Name of the run, and of the folder it fills."""

    seed: Annotated[int, Field(ge=0, lt=2**32)] = 0
    """Seed of everything that draws numbers."""

    more_seeds: tuple[Annotated[int, Field(ge=0, lt=2**32)], ...] = ()
    """Further seeds: weights are made and their quality is measured again with each of them.

    The report has means with intervals."""

    model: Model
    """The model that is compressed."""

    data: Data = Data()
    """The texts that stages read."""

    stages: dict[FreeName, AnyStage] = {}
    """The stages of chains: a name for each stage with its parameters."""

    pipelines: dict[VariantName, tuple[Text, ...]] = {}
    """Named chains; one that breaks a rule is an error."""

    matrix: Annotated[
        Matrix | None,
        BeforeValidator(_matrix, json_schema_input_type=Literal["default"] | Matrix | None),
    ] = None
    """Every combination of one choice an axis; those that break a rule are left out. `default`
    stands for gates, quantizers and decoders: `gateskip validate` lists them."""

    search: Search | None = None
    """The chains that `gateskip search` may build; `gateskip run` ignores it."""

    benchmark: Benchmark = Benchmark()
    """The measurements of every cell."""

    limits: Limits = Limits()
    """Limits on time and memory of a step and of a cell. Not limited when left out."""

    export: dict[Text, Export] = {}
    """Cells to export when the run ends: name -> where to."""

    _source_map: SourceMap | None = PrivateAttr(default=None)

    @model_validator(mode="before")
    @classmethod
    def _expand_default(cls, raw: Any) -> Any:
        """Write `matrix: default` out, with its stages."""
        if not isinstance(raw, Mapping):
            return raw
        stages = raw.get("stages", {})
        if raw.get("matrix") != "default" or not isinstance(stages, Mapping):
            return raw
        return {**raw, "matrix": DEFAULT_MATRIX, "stages": {**DEFAULT_STAGES, **stages}}

    @property
    def source_map(self) -> SourceMap | None:
        """Positions of all values in the file; None when the pipeline was not read from one."""
        return self._source_map

    def with_source_map(self, source_map: SourceMap) -> Pipeline:
        """The same pipeline with the positions of its file."""
        copy = self.model_copy()
        copy._source_map = source_map
        return copy

    def locate(self, error: Error, loc: Loc, *, at_key: bool = False) -> Error:
        """Write the place of `loc` in the file into `error`, where it is known."""
        if self._source_map is None:
            return error
        return self._source_map.locate(error, loc, at_key=at_key)

    def problems(self) -> Iterator[Problem]:
        """Seeds listed twice and names that point at nothing."""
        for index, seed in enumerate(self.more_seeds):
            if seed in (self.seed, *self.more_seeds[:index]):
                yield Problem(("more_seeds", index), f"seed {seed} is named twice")
        yield from self._verify_problems()
        for name, chain in self.pipelines.items():
            yield from self._unknown_stages(chain, ("pipelines", name))
        if self.matrix is not None:
            yield from self._axes_problems(self.matrix.__pydantic_extra__, ("matrix",))
            yield from self._matrix_problems(self.matrix)
        if self.search is not None:
            yield from self._axes_problems(self.search.axes, ("search", "axes"))
            yield from vary_problems(self.search.vary, self.stages, ("search", "vary"))
        if self.benchmark.against and self.benchmark.speed.sampling is not None:
            yield Problem(
                ("benchmark", "speed", "sampling"),
                "other engines are timed greedily: cells that sample cannot be compared with them",
                fix="remove `sampling`, or `against`",
            )
        for index, peer in enumerate(self.benchmark.against):
            try:
                parse_peer(peer)
            except UserError as error:
                yield Problem(("benchmark", "against", index), error.message, fix=error.fix)

    def _verify_problems(self) -> Iterator[Problem]:
        """Drafts that are verified at budgets at which no stage skips."""
        for name, stage in self.stages.items():
            other = stage.compared_with() if isinstance(stage, Speculate) else None
            if not isinstance(other, Skip) or other in self.stages.values():
                continue
            settings = other.model_dump(exclude_defaults=True, exclude={"budget"})
            words = {"use": "skip", "budget": f"{other.budget:g}", **settings}
            stated = ", ".join(f"{key}: {value}" for key, value in words.items())
            percent = 100 * min(other.budget, other.prompt_budget or 1)
            key = "verify_budget" if other.budget < 1 else "prompt_budget"
            reads = other.prompt_budget
            after = "" if reads is None else f" after prompts at {reads:g}"
            yield Problem(
                ("stages", name, key),
                f"drafts are verified at {other.budget:g}{after}, and no stage skips at that"
                " budget, which is what they are compared with",
                fix=f"add a stage, as in skip{percent:.0f}: {{{stated}}}",
            )

    def _unknown_stages(self, chain: Choice, loc: Loc) -> Iterator[Problem]:
        names = [(chain, loc)] if isinstance(chain, str) else _indexed(chain, loc)
        for name, place in names:
            if name not in self.stages:
                hint = suggest(name, self.stages)
                yield Problem(place, f"no stage is named {shortened(repr(name))}: {hint}")

    def _axes_problems(
        self, axes: Mapping[str, tuple[Choice, ...]], place: Loc
    ) -> Iterator[Problem]:
        """Of axes that stand at `place`: stages that do not exist, and choices listed twice."""
        for axis, choices in axes.items():
            chains = [as_chain(choice) for choice in choices]
            for index, choice in enumerate(choices):
                loc: Loc = (*place, axis, index)
                if choice != NONE:
                    yield from self._unknown_stages(choice, loc)
                if chains[index] in chains[:index]:
                    yield Problem(loc, f"axis {axis!r} has the choice {_shown(choice)} twice")

    def _matrix_problems(self, matrix: Matrix) -> Iterator[Problem]:
        axes = matrix.__pydantic_extra__
        if not axes:
            yield Problem(("matrix",), "the matrix has no axis", at_key=True)
        for index, entry in enumerate(matrix.exclude):
            yield from _exclude_problems(entry, axes, ("matrix", "exclude", index))


def as_chain(choice: Choice) -> Chain:
    """A choice of an axis as a chain: `none` is empty, a name is a chain of one."""
    if isinstance(choice, str):
        return () if choice == NONE else (choice,)
    return choice


def _exclude_problems(
    entry: Mapping[str, Choice], axes: Mapping[str, tuple[Choice, ...]], loc: Loc
) -> Iterator[Problem]:
    if not entry:
        yield Problem(loc, "this entry excludes every combination: name an axis")
    for axis, choice in entry.items():
        if axis not in axes:
            message = f"the matrix has no axis {axis!r}: {suggest(axis, axes)}"
            yield Problem((*loc, axis), message, at_key=True)
        elif as_chain(choice) not in map(as_chain, axes[axis]):
            hint = suggest(_shown(choice), map(_shown, axes[axis]))
            yield Problem((*loc, axis), f"axis {axis!r} has no choice {_shown(choice)}: {hint}")


def _indexed(chain: Chain, loc: Loc) -> list[tuple[str, Loc]]:
    return [(name, (*loc, index)) for index, name in enumerate(chain)]


def _shown(choice: Choice) -> str:
    return choice if isinstance(choice, str) else f"[{', '.join(choice)}]"
