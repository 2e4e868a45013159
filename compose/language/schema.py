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
from compose.contract import Device
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
    """The model that the pipeline compresses."""

    source: Text
    """The model to compress: a Hugging Face hub id, a local folder or a GGUF file (path relative to
    the pipeline file), or a short name such as `smollm2-135m-instruct`."""

    keep_blocks: bool = False
    """Whether the quantized weights of a GGUF file are kept as integers; by default, they are
    dequantized. With `keep_blocks: true`, weights in Q4_0, Q4_1, Q5_0, Q5_1 and Q8_0 stay
    unchanged, and weights in Q4_K and Q5_K get scales in bfloat16. With `keep_blocks: true`,
    weights in other quantized GGUF types are rounded to 8 bits."""

    dtype: Literal["float32", "bfloat16", "float16"] = "float32"
    """The data type of unquantized weights, in files and in computations. For a GGUF file, the
    default data type is bfloat16."""

    device: Device = "cpu"
    """The device on which models are trained, rounded, scored and timed: `cpu` or `cuda`. With
    `device: cuda`, the run is refused if the machine has no CUDA device, or if a variant has packed
    weights, which are decoded on a CPU. Never run on a GPU."""

    @model_validator(mode="before")
    @classmethod
    def _type_of_files(cls, stated: Any) -> Any:
        file = isinstance(stated, Mapping) and is_gguf(str(stated.get("source")))
        return {"dtype": "bfloat16", **stated} if file else stated


class TrainSpec(DataSpec):
    """Texts on which the stages `gate`, `heal` and `draft-network` train."""

    limit: Count = 2000
    """Number of texts that are taken from each source; every run takes the same texts."""


class Data(_Section):
    """The texts that stages train or calibrate on. The benchmark measures on other texts."""

    train: TrainSpec = TrainSpec()
    """Text for the stages that train: `gate`, `heal` and `draft-network`."""

    calibration: DataSpec = DataSpec()
    """Text for measurements inside stages, without training: to calibrate thresholds, to rank
    layers and weights for pruning, and to round weights."""


class Matrix(BaseModel):
    """All combinations of one choice for each axis; each combination is one variant. Every key of
    `matrix` except `exclude` is an axis: a list of choices, such as `quantize: [none, int4]`. The
    order of the axes in the file is the order of the stages in a variant."""

    model_config = ConfigDict(frozen=True, extra="allow", use_attribute_docstrings=True)
    __pydantic_extra__: dict[str, Annotated[tuple[Choice, ...], Field(min_length=1)]] = Field(
        init=False
    )

    exclude: tuple[dict[str, Choice], ...] = ()
    """Combinations that are left out of the matrix. Each entry of `exclude` names a choice for one
    or several axes."""

    @property
    def axes(self) -> dict[str, tuple[Chain, ...]]:
        """Axis -> its choices as chains; `none` is the empty chain."""
        extra = self.__pydantic_extra__
        return {axis: tuple(map(as_chain, choices)) for axis, choices in extra.items()}


class Search(_Section):
    """The sequences of stages that `gateskip search` tries, and how many of them it measures."""

    axes: dict[Text, Annotated[tuple[Choice, ...], Field(min_length=1)]] = {}
    """Choices for each axis of the search, written as in `matrix`. Without `axes`, the search uses
    the axes of `matrix`. If the file has neither `axes` nor `matrix`, each kind of stage is one
    axis, and each axis has the choice `none`."""

    vary: dict[Text, dict[Text, tuple[Any, ...]]] = {}
    """Values that the search tries for settings of stages, such as `{narrow: {ratio: [0.05, 0.1]}}`
    for the stage named `narrow`. If a file has neither `vary` nor `axes`, the search tries widths
    and numbers of layers around the values in `stages`."""

    probes: Count = 48
    """Maximum number of sequences of stages that are measured in the first round of a search, on
    little text."""

    batch: Count = 8
    """Number of sequences of stages that the search proposes at a time. After each batch, the
    results decide which sequences of stages the search proposes next."""

    tokens: Annotated[int, Field(ge=2)] = 2048
    """Number of tokens on which each sequence of stages is scored in the first round. Each further
    round of a search scores four times as many tokens. The last round of a search runs the whole
    benchmark of the pipeline file."""

    finalists: Count = 6
    """Number of sequences of stages that are measured with the whole benchmark, in the last round
    of a search. The last round also measures sequences that may or may not keep to a limit such as
    `--at-most-kl`, because their 95 % intervals include the limit."""


class Sampling(_Section):
    """How tokens are sampled. The sampling settings have the same meaning as in transformers."""

    temperature: Annotated[float, Field(gt=0)] = 0.7
    """Sampling temperature, by which the logits are divided."""

    top_k: Annotated[int, Field(ge=0)] = 0
    """Number of most likely tokens from which the next token is sampled; 0 means all tokens."""

    top_p: Annotated[float, Field(gt=0, le=1)] = 1.0
    """Total probability of the most likely tokens from which the next token is sampled (nucleus
    sampling)."""

    min_p: Annotated[float, Field(ge=0, le=1)] = 0.0
    """Minimum probability of a token that can be sampled, as a share of the highest token
    probability."""


class Speed(_Section):
    """Settings for measuring speed."""

    prompt_tokens: Count = 128
    """Length of the prompt, in tokens."""

    new_tokens: Count = 128
    """Number of tokens that are decoded after each prompt."""

    min_seconds: Annotated[float, Field(ge=0)] = 2.0
    """Minimum decoding time of each variant in one round, in seconds."""

    repeats: Count = 5
    """Number of rounds; in each round, all variants are timed one after another. The reported speed
    is the median over the rounds."""

    one_process: bool = False
    """Whether all variants are timed in one process; by default, each variant has its own process.
    Two processes that run the same code can differ in speed by a few percent; timing all variants
    in one process avoids this difference. With `one_process: true`, each round loads all variants
    again, in another order. Other engines, such as llama.cpp, run in their own processes even with
    `one_process: true`. With `one_process: true`, the peak memory of each variant is not measured.
    """

    batch_sizes: Annotated[tuple[Count, ...], AfterValidator(_no_repeats), Field(min_length=1)] = (
        1,
    )
    """Batch sizes for which speed is measured; a batch size is the number of prompts that are
    decoded together."""

    contexts: Annotated[tuple[Count, ...], AfterValidator(_no_repeats)] = ()
    """Further prompt lengths for which speed is measured, in tokens, with a batch size of 1."""

    prompts: Text | None = None
    """Prompts that the model answers while its speed is measured: a JSON Lines file that gives each
    prompt a category, or the name of prompts that ship with gateskip. Without `prompts`, the model
    continues ordinary text while its speed is measured."""

    prompts_per_category: Count | None = None
    """Number of prompts of each category that are used in one round; each round uses other prompts.
    Without `prompts_per_category`, each round uses all prompts."""

    sampling: Sampling | None = None
    """How tokens are sampled while speed is measured; by default, decoding is greedy. With
    `sampling`, the measured variants write different texts. `sampling` and `against` exclude each
    other, because other engines are timed with greedy decoding."""


class OwnAnswers(_Section):
    """Settings for comparing variants on answers that the dense model writes. On the dense model's
    answers, the predictions of each variant are compared with the predictions of the dense model.
    """

    source: Text = "prompts"
    """Source of the prompts that the dense model answers: a path, a hub data set id, or the name of
    prompts that ship with gateskip."""

    prompts: Count = 16
    """Number of prompts that the dense model answers."""

    new_tokens: Count = 64
    """Maximum number of tokens in each answer of the dense model."""


class Quality(_Section):
    """Settings for measuring quality."""

    perplexity: Annotated[
        tuple[Text, ...],
        BeforeValidator(_candidates, json_schema_input_type=Text | tuple[Text, ...] | None),
    ] = ("wikitext2", "heldout-text")
    """Text on which perplexity is measured: the name of a data set, or a list of names. Of a list
    of data sets, the first one that is available is used. With `perplexity: null`, perplexity is
    not measured."""

    perplexity_tokens: Annotated[int, Field(ge=2)] = 8192
    """Number of tokens on which perplexity, KL and agreement with the dense model are measured."""

    tasks: Annotated[
        tuple[Text, ...], AfterValidator(_no_repeats), AfterValidator(_with_a_written_task)
    ] = ()
    """Names of lm-eval tasks to score. If none of the tasks asks for written answers, the task
    `arithmetic` is added, because multiple-choice tasks hardly show the loss that skipping causes
    in written answers."""

    allow_code: bool = False
    """Whether the task `humaneval` may run the code that a model writes. The code that a model
    writes runs in a child process without network, with limits on time, memory and files."""

    limit: Count = 500
    """Maximum number of questions that are asked in each task."""

    batch_size: Count = 8
    """Number of sequences that are scored together."""

    own_answers: OwnAnswers | None = OwnAnswers()
    """Whether and how variants are compared with the dense model on answers that the dense model
    writes: by KL, and by the number of equal tokens in greedy answers. With `own_answers: null`,
    variants are not compared on the dense model's answers."""

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
    """Settings for the lossless check, which compares text decoded with drafts, token by token,
    with text decoded without drafts."""

    prompts: Count = 16
    """Number of prompts on which text decoded with drafts and without drafts is compared."""

    new_tokens: Count = 64
    """Number of tokens after each prompt that are compared between decoding with and without
    drafts."""

    source: Text = "prompts"
    """Source of the prompts for the lossless check: a path, a hub data set id, or the name of
    prompts that ship with gateskip."""


class Benchmark(_Section):
    """How variants are measured. A variant (also called a cell) is a model that one sequence of
    stages made."""

    baseline: Text = DENSE
    """The variant with which the speed and quality of all other variants are compared; by default,
    the original model (`dense`)."""

    against: Annotated[
        tuple[Text, ...],
        BeforeValidator(_candidates, json_schema_input_type=Text | tuple[Text, ...] | None),
        AfterValidator(_no_repeats),
    ] = ()
    """Other engines in which the original model is measured, too, such as `llama.cpp:q4_k_m`."""

    threads: Count | None = None
    """Number of threads with which each variant runs; by default, one thread for each core of the
    machine."""

    speed: Speed = Speed()
    """Settings for measuring tokens per second and the time to the first token."""

    quality: Quality = Quality()
    """Settings for measuring perplexity, agreement with the dense model, and task scores."""

    lossless: Lossless = Lossless()
    """Settings for the lossless check, which compares text decoded with drafts with text decoded
    without drafts."""


class Export(_Section):
    """The folder into which one variant is exported."""

    to: Text
    """The folder into which the variant is exported, relative to the working directory of the
    command."""


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
    """A whole pipeline file. A `Pipeline` object that a program builds may contain no variants:
    then only the original model and the other engines are measured."""

    schema_version: Annotated[Literal[1], BeforeValidator(_no_bool)] = Field(
        default=1, alias="schema"
    )
    """Version of the pipeline language."""

    name: Name
    """Name of the run; the folder of the run has the same name."""

    seed: Annotated[int, Field(ge=0, lt=2**32)] = 0
    """Seed for all random numbers of the run."""

    more_seeds: tuple[Annotated[int, Field(ge=0, lt=2**32)], ...] = ()
    """Further seeds; for each seed, the weights are made and scored again. With `more_seeds`, the
    report shows means over all seeds, with intervals."""

    model: Model
    """The model that the pipeline compresses."""

    data: Data = Data()
    """The texts that stages train or calibrate on."""

    stages: dict[FreeName, AnyStage] = {}
    """The stages of the pipeline: a name of your choice for each stage, followed by its settings.
    """

    pipelines: dict[VariantName, tuple[Text, ...]] = {}
    """Variants to make: a name for each variant, followed by its stages in order. If the order of
    the stages breaks a rule, the pipeline file is refused."""

    matrix: Annotated[
        Matrix | None,
        BeforeValidator(_matrix, json_schema_input_type=Literal["default"] | Matrix | None),
    ] = None
    """All combinations of one choice for each axis, as variants to make. Combinations whose order
    of stages breaks a rule are left out of the matrix. `matrix: default` combines gates,
    quantization to 8 and 4 bits, and ways of decoding; `gateskip validate` lists the combinations
    of a file."""

    search: Search | None = None
    """The sequences of stages that `gateskip search` tries; `gateskip run` ignores this section."""

    benchmark: Benchmark = Benchmark()
    """How variants are measured."""

    limits: Limits = Limits()
    """Limits on the time and memory of processes. By default, time and memory are not limited."""

    export: dict[Text, Export] = {}
    """Variants that are exported when the run ends: the name of each variant, followed by its
    folder."""

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
