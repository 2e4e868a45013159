"""The pipeline language as frozen models: unknown keys refused, one docstring per field.

`language.parse.load_pipeline` reads a file into a `Pipeline`; a program may also build one itself.
pydantic checks each field by itself; `Pipeline.problems` finds names that refer to nothing. The
planner checks whether chains break a rule.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from typing import Annotated, Any, Literal, Self

from pydantic import (
    AfterValidator,
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    PrivateAttr,
    model_validator,
)

from compose.artifacts.gguf.file import is_gguf
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
            f"{shortened(repr(name))} is not a name: use letters, digits, '_', '.' and '-', "
            "and begin with a letter or digit"
        )
    return name


def in_name(text: str) -> str:
    """Text in the characters that a name may have.

    >>> in_name("my model")
    'my-model'
    """
    return re.sub(r"[^A-Za-z0-9_.-]+", "-", text)


def _free_name(name: str) -> str:
    if name in RESERVED:
        raise ValueError(f"{name!r} is a reserved name: take another")
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
    """The tasks, with one of written answers added where none of them is known to have written
    answers."""
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
    """For a GGUF file: keep its quantized weights as integers. Q4_0, Q4_1, Q5_0, Q5_1 and Q8_0 stay
    as they are. Q4_K and Q5_K keep their codes and get scales in bfloat16. All other types get 8
    bits. By default, all weights are dequantized."""

    dtype: Literal["float32", "bfloat16", "float16"] = "float32"
    """The data type of unquantized weights, in files and in computations. The default for a GGUF
    file is bfloat16."""

    @model_validator(mode="before")
    @classmethod
    def _type_of_files(cls, stated: Any) -> Any:
        file = isinstance(stated, Mapping) and is_gguf(str(stated.get("source")))
        return {"dtype": "bfloat16", **stated} if file else stated


class TrainSpec(DataSpec):
    """Texts on which the stages `gate`, `heal` and `draft-network` train."""

    limit: Count = 2000
    """Number of texts that are taken from each source. The choice is always the same."""


class Data(_Section):
    """The texts that stages read. The benchmark uses other texts."""

    train: TrainSpec = TrainSpec()
    """Text for stages that train: `gate`, `heal`, `draft-network`."""

    calibration: DataSpec = DataSpec()
    """Text for stages that measure without training: calibration of thresholds, importance of
    layers, pruning, rounding."""


class Matrix(BaseModel):
    """All combinations of one choice for each axis. Every key except `exclude` is an axis. The
    order of the axes is the order of the stages in a chain."""

    model_config = ConfigDict(frozen=True, extra="allow", use_attribute_docstrings=True)
    __pydantic_extra__: dict[str, Annotated[tuple[Choice, ...], Field(min_length=1)]] = Field(
        init=False
    )

    exclude: tuple[dict[str, Choice], ...] = ()
    """Combinations to leave out. Each entry names a choice for one or several axes."""

    @property
    def axes(self) -> dict[str, tuple[Chain, ...]]:
        """Axis -> its choices as chains; `none` is the empty chain."""
        extra = self.__pydantic_extra__
        return {axis: tuple(map(as_chain, choices)) for axis, choices in extra.items()}


class Search(_Section):
    """The chains that `gateskip search` may build, and how many of them it measures."""

    axes: dict[Text, Annotated[tuple[Choice, ...], Field(min_length=1)]] = {}
    """Choices for each axis, as in `matrix`. By default, the axes of `matrix`. Without a matrix,
    there is one axis for each kind of stage, with `none` as one choice."""

    vary: dict[Text, dict[Text, tuple[Any, ...]]] = {}
    """Values to try for parameters of stages: `{narrow: {ratio: [0.05, 0.1]}}`. If a file has
    neither `vary` nor `axes`, the search varies widths and numbers of layers around the values in
    `stages`."""

    probes: Count = 48
    """Maximum number of chains that are measured in the first round."""

    batch: Count = 8
    """Number of chains that are proposed at a time. Their results decide which chains are proposed
    next."""

    tokens: Annotated[int, Field(ge=2)] = 2048
    """Number of tokens that are scored in the first round. Each further round scores four times as
    many tokens. The last round runs the whole benchmark of the file."""

    finalists: Count = 6
    """Number of chains in the last round. Further chains take part if their intervals still include
    the bound."""


class Sampling(_Section):
    """How tokens are sampled. The fields have the same meaning as in transformers."""

    temperature: Annotated[float, Field(gt=0)] = 0.7
    """Sampling temperature: the logits are divided by it."""

    top_k: Annotated[int, Field(ge=0)] = 0
    """Sample only from this number of most likely tokens; 0 means all tokens."""

    top_p: Annotated[float, Field(gt=0, le=1)] = 1.0
    """Sample only from the most likely tokens that together have this probability."""

    min_p: Annotated[float, Field(ge=0, le=1)] = 0.0
    """Sample only from tokens whose probability is at least this share of the highest probability.
    """


class Speed(_Section):
    """How speed is measured."""

    prompt_tokens: Count = 128
    """Length of the prompt, in tokens."""

    new_tokens: Count = 128
    """Number of tokens that are decoded after each prompt."""

    min_seconds: Annotated[float, Field(ge=0)] = 2.0
    """Minimum decoding time of each variant in one round, in seconds. The variants take short
    turns."""

    repeats: Count = 5
    """Number of rounds. In each round all variants take turns. The median over the rounds is
    reported."""

    one_process: bool = False
    """Whether all variants are timed in one process. By default, each variant has its own process.
    Two processes that run the same code can differ in speed by a few percent; in one process, this
    difference does not exist. Each round loads all variants again, in another order. Other engines
    still run in their own processes. The peak memory of each variant is not measured."""

    batch_sizes: Annotated[tuple[Count, ...], AfterValidator(_no_repeats), Field(min_length=1)] = (
        1,
    )
    """Batch sizes to measure: the number of prompts that are decoded together."""

    contexts: Annotated[tuple[Count, ...], AfterValidator(_no_repeats)] = ()
    """Further prompt lengths in tokens, measured with a batch size of 1."""

    prompts: Text | None = None
    """Prompts with categories (an alias or a file) that the model answers while it is timed. By
    default, the model continues ordinary text."""

    prompts_per_category: Count | None = None
    """Number of prompts of each category in one round. Each round uses other prompts. By default,
    each round uses all prompts."""

    sampling: Sampling | None = None
    """How tokens are sampled while speed is measured. By default, decoding is greedy. With
    sampling, variants write different texts, and other engines cannot be compared, because they are
    timed with greedy decoding."""


class OwnAnswers(_Section):
    """Prompts that the dense model answers. On these answers, the predictions of the other variants
    are compared with those of the dense model."""

    source: Text = "prompts"
    """Where the prompts come from: an alias, a hub data set id, or a path."""

    prompts: Count = 16
    """Number of prompts."""

    new_tokens: Count = 64
    """Maximum number of tokens in an answer."""


class Quality(_Section):
    """How quality is measured."""

    perplexity: Annotated[
        tuple[Text, ...],
        BeforeValidator(_candidates, json_schema_input_type=Text | tuple[Text, ...] | None),
    ] = ("wikitext2", "heldout-text")
    """Data set for perplexity. In a list, the first available data set is used. With null,
    perplexity is not measured."""

    perplexity_tokens: Annotated[int, Field(ge=2)] = 8192
    """Number of tokens on which perplexity, KL and agreement are measured."""

    tasks: Annotated[
        tuple[Text, ...], AfterValidator(_no_repeats), AfterValidator(_with_a_written_task)
    ] = ()
    """Tasks of lm-eval. If the model writes the answers in none of them, the task `arithmetic` is
    added, because multiple-choice tasks hardly show the loss that skipping causes in written
    answers."""

    allow_code: bool = False
    """Whether `humaneval` may run the code that a model writes: in a child process with limits of
    time, memory and files, without network."""

    limit: Count = 500
    """Maximum number of questions of each task."""

    batch_size: Count = 8
    """Number of sequences that are scored together."""

    own_answers: OwnAnswers | None = OwnAnswers()
    """Compare each variant with the dense model on answers that the dense model wrote: the KL, and
    the number of equal tokens in greedy answers. With null, this is not measured."""

    @model_validator(mode="after")
    def _code_is_allowed(self) -> Self:
        for name in self.tasks:
            if name in TASKS and TASKS[name].runs_code and not self.allow_code:
                raise ValueError(
                    f"the task {name} runs code that the model writes; to allow it, add"
                    " `allow_code: true` under benchmark.quality, or --allow-code to gateskip bench"
                )
        return self


class Lossless(_Section):
    """How text that is decoded with drafts is compared, token by token, with text that is decoded
    without drafts."""

    prompts: Count = 16
    """Number of prompts."""

    new_tokens: Count = 64
    """Number of tokens that are compared after each prompt."""

    source: Text = "prompts"
    """Where the prompts come from: an alias, a hub data set id, or a path."""


class Benchmark(_Section):
    """How variants are measured. A variant (cell) is one chain of stages."""

    baseline: Text = DENSE
    """The variant that all other variants are compared with, in speed and in quality. By default,
    the original model (`dense`)."""

    against: Annotated[
        tuple[Text, ...],
        BeforeValidator(_candidates, json_schema_input_type=Text | tuple[Text, ...] | None),
        AfterValidator(_no_repeats),
    ] = ()
    """Other engines that are measured with the original model, such as `llama.cpp:q4_k_m`."""

    threads: Count | None = None
    """Number of threads for each variant. By default, one thread for each core of the machine."""

    speed: Speed = Speed()
    """Settings for tokens per second and time to first token."""

    quality: Quality = Quality()
    """Settings for perplexity, agreement with the dense model, and tasks."""

    lossless: Lossless = Lossless()
    """Settings for the check that decoding with drafts writes the same text as decoding without
    drafts."""


class Export(_Section):
    """The folder of one exported variant."""

    to: Text
    """The folder of the export, relative to the working directory of the command."""


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
    """A whole pipeline file. A `Pipeline` that a program builds may name no variant: its plan then
    has the dense model and the other engines alone."""

    schema_version: Annotated[Literal[1], BeforeValidator(_no_bool)] = Field(
        default=1, alias="schema"
    )
    """Version of the pipeline language."""

    name: Name
    """Name of the run, and of its folder."""

    seed: Annotated[int, Field(ge=0, lt=2**32)] = 0
    """Seed for all random numbers."""

    more_seeds: tuple[Annotated[int, Field(ge=0, lt=2**32)], ...] = ()
    """Further seeds. For each seed, the weights are made and scored again.

    The report shows means over all seeds, with intervals.
    """

    model: Model
    """The model that is compressed."""

    data: Data = Data()
    """The texts that stages read."""

    stages: dict[FreeName, AnyStage] = {}
    """The stages that chains use: a name for each stage, with the stage and its settings."""

    pipelines: dict[VariantName, tuple[Text, ...]] = {}
    """Named chains of stages. A chain that breaks an order rule is an error."""

    matrix: Annotated[
        Matrix | None,
        BeforeValidator(_matrix, json_schema_input_type=Literal["default"] | Matrix | None),
    ] = None
    """All combinations of one choice for each axis. Combinations that break an order rule are left
    out. `default` combines gates, 8 and 4 bits, and ways of decoding; `gateskip validate` lists the
    combinations."""

    search: Search | None = None
    """The chains that `gateskip search` may build; `gateskip run` ignores it."""

    benchmark: Benchmark = Benchmark()
    """How variants are measured."""

    limits: Limits = Limits()
    """Limits on time and memory. By default, there are no limits."""

    export: dict[Text, Export] = {}
    """Variants to export at the end of the run: the name of each variant and its folder."""

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
        """Seeds listed twice, and names that refer to nothing."""
        for index, seed in enumerate(self.more_seeds):
            if seed in (self.seed, *self.more_seeds[:index]):
                yield Problem(("more_seeds", index), f"seed {seed} is listed twice")
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
        """Cells that verify drafts at a budget, where no `skip` stage has the same budget."""
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
                f"drafts are verified at budget {other.budget:g}{after}, so the cell is compared"
                " with a stage that skips at that budget, and there is none",
                fix=f"add one: skip{percent:.0f}: {{{stated}}}",
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
        """Problems of the axes at `place`: stages that do not exist, and choices listed twice."""
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
