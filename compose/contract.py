"""The contract between the runner and its worker processes: jobs, needs, commands and messages.

A job is a frozen value, one class a role. The parent makes it and writes it to a file as JSON; the
worker reads it back into the same class and hands it on, to the stage or to what measures the cell.
"""

from __future__ import annotations

import json
import os
import stat
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Annotated, Any, ClassVar, Literal, Self, TypedDict

from pydantic import BaseModel, ConfigDict, Field, SkipValidation, TypeAdapter, model_validator

from compose.errors import UserError
from compose.store import private_folder, write_json
from compose.units import Progress

Role = Literal[
    "step",
    "check",
    "continue",
    "cell",
    "answer",
    "chat",
    "insight",
    "tune",
    "gguf",
    "convert",
    "compressed-tensors",
    "probe",
    "fetch",
]
"""What a worker does; `compose.workers.main` describes each."""

Backend = Literal["auto", "reference", "gathered", "native"]
"""What runs a model; `auto` lets the folder decide."""

Device = Literal["cpu", "cuda"]
"""Where a model is trained, rounded, scored and timed."""

Message = dict[str, Any]
"""From a worker: `progress` [done, total, phase, {detail, numbers}], a piece of `text` that a model
writes, or an answer: `ok` with `result`, else with `error`, `kind` (a class of `compose.errors`)
and `traceback`."""


Weight = Annotated[float, Field(gt=0)]
Split = Literal["train", "calibration"]
"""An entry of a pipeline's `data`."""


class DataSpec(BaseModel):
    """The texts on which stages are trained or calibrated."""

    model_config = ConfigDict(
        frozen=True, extra="forbid", use_attribute_docstrings=True, allow_inf_nan=False
    )

    source: str = Field(default="calibration-text", min_length=1)
    """Source of the text: a path to a .txt, .jsonl, .json or .xz file (relative to the pipeline
    file), a hub data set id, or the name of a text that ships with gateskip."""

    mix: dict[str, Weight] = {}
    """Several sources of text with their weights, instead of one `source`, such as `{training-text:
    1, sums: 1}`. The share of blocks from each source is proportional to its weight."""

    answered: tuple[str, ...] = ()
    """Sources of text in which the original model writes the answers: to prompts, and to the user's
    messages in chats. In text without prompts and chats, the original model continues the first
    quarter of each block."""

    limit: int = Field(default=128, ge=1)
    """Number of texts that are taken from each source; every run takes the same texts."""

    length: int = Field(default=512, ge=8)
    """Length of a block of text, in tokens."""

    @property
    def weights(self) -> dict[str, float]:
        """Every source and its weight."""
        return self.mix or {self.source: 1.0}

    @model_validator(mode="after")
    def _fits_together(self) -> Self:
        if self.mix and self.source != type(self).model_fields["source"].default:
            raise ValueError("source and mix name the text twice: leave one out")
        for name in self.answered:
            if name not in self.weights:
                raise ValueError(f"answered: {name} is no source of this text")
        return self


def silent(done: int, total: int, phase: str, /, *, detail: str = "", **numbers: float) -> None:
    """Report progress to nobody."""


@dataclass(frozen=True, kw_only=True)
class StageJob:
    """All that a weight stage is given to run."""

    __pydantic_config__: ClassVar = ConfigDict(arbitrary_types_allowed=True)  # of `progress`

    source: Path
    """The model folder it starts from; only read."""
    target: Path
    """An empty folder, to be filled with the resulting Hugging Face folder."""
    seed: int
    dtype: str
    """`float32`, `bfloat16` or `float16`: the type of what is not quantized."""
    train: DataSpec | None
    calibration: DataSpec | None
    dense: Path
    """The folder of the untouched source model: the teacher."""
    work: Path
    """Scratch that survives a kill, for checkpoints in the middle of a stage."""
    asset_cache: Path
    """Where downloaded models and data are kept."""
    device: Device = "cpu"
    """Where the stage computes, if it has a path there."""
    progress: Annotated[SkipValidation[Progress], Field(exclude=True)] = silent
    """Called as the work goes on; a stage that only counts passes (done, total, phase). Not part of
    a job file: each process has its own."""


@dataclass(frozen=True, kw_only=True)
class StepJob(StageJob):
    """All that a step's process is told: to make one model folder, and what to note of it."""

    key: str
    name: str
    stage: Mapping[str, Any] | None
    """The stage's parameters; None where the source model is stored, which starts from nothing:
    `source` and `dense` are then the folder it is to be."""
    model: str
    """The pipeline's source model."""
    keep_blocks: bool
    """Whether the source's GGUF blocks are kept."""
    check: Path
    """Where the logits of the probe text are stored."""
    tensorboard: Path | None
    """The folder for TensorBoard files of training; None for none."""


@dataclass(frozen=True, kw_only=True)
class CellJob:
    """All that a cell's process is told."""

    name: str
    folder: Path
    baseline_folder: Path
    decode: Mapping[str, Any] | None
    """Parameters of the decode stage, None for plain decoding."""
    benchmark: Mapping[str, Any]
    """The pipeline's benchmark section."""
    seed: int
    dtype: str
    asset_cache: Path
    reference: Path
    """Where the baseline's hidden states are, or are to be put."""
    threads: int | None
    backend: Backend = "auto"
    """What runs the model."""
    baseline_backend: str = "auto"
    """What runs the baseline."""
    peer: str | None = None
    """The engine that is measured instead of ours, on the folder of the baseline."""
    calibration: DataSpec | None = None
    """The text that `peer` is fitted to, where it reads one."""
    learns_from: Sequence[tuple[str, int | None]] = ()
    """Of the baseline only: source and row limit of each text that a stage of the plan reads."""
    device: Device = "cpu"
    """Where the cell is scored and timed."""

    @property
    def is_baseline(self) -> bool:
        """Whether this is the cell that the others are compared with."""
        plain = self.decode is None and self.backend == self.baseline_backend
        return plain and self.folder == self.baseline_folder


@dataclass(frozen=True)
class CheckJob:
    """Load a folder and compare its logits with stored ones."""

    folder: Path
    reference: Path


@dataclass(frozen=True)
class ContinueJob:
    """Decode tokens after the probe text."""

    folder: Path
    tokens: int
    settings: Mapping[str, Any] | None
    """How to decode; None for what the folder states."""


@dataclass(frozen=True)
class AnswerJob:
    """Answer a prompt; see `compose.bench.generate.answer`."""

    folder: Path
    prompt: str
    max_new_tokens: int
    budget: float | None
    speculate: bool | None
    sampling: Mapping[str, Any]
    seed: int
    stop: tuple[str, ...]
    draft_model: Path | None = None
    """The folder of another model that drafts."""
    device: Device = "cpu"


@dataclass(frozen=True)
class ChatJob:
    """Hold a conversation; see `compose.bench.conversation.Conversation`."""

    folder: Path
    max_new_tokens: int
    """Of one answer."""
    budget: float | None
    speculate: bool | None
    sampling: Mapping[str, Any]
    seed: int
    draft_model: Path | None = None
    """The folder of another model that drafts."""
    device: Device = "cpu"


@dataclass(frozen=True)
class InsightJob:
    """Show what each token of a text costs; see `compose.bench.insight.insight`."""

    folder: Path
    text: str
    budget: float | None


@dataclass(frozen=True)
class TuneJob:
    """Find the draft that decodes fastest; see `compose.bench.speed.tune.tune`."""

    folder: Path
    prompts: str
    limit: int | None
    new_tokens: int
    repeats: int
    write: bool


@dataclass(frozen=True)
class GgufJob:
    """Write a folder as a GGUF file; see `compose.artifacts.gguf.write.write_gguf`."""

    folder: Path
    file: Path
    kind: str | None
    name: str | None = None


@dataclass(frozen=True)
class ConvertJob:
    """Make a GGUF file a folder in the cache; see `compose.assets.models.gguf_source`."""

    source: Path
    cache: Path
    keep_blocks: bool
    dtype: str


@dataclass(frozen=True)
class CompressedTensorsJob:
    """Write a packed folder in the format compressed-tensors."""

    folder: Path
    target: Path
    dense: Path | None = None
    """The folder of the model before rounding, where it is known."""


@dataclass(frozen=True)
class ProbeJob:
    """Try the libraries that stages need."""


@dataclass(frozen=True)
class FetchJob:
    """Fetch the inputs of a plan; see `compose.workers.fetch`."""

    cache: Path
    model: str | None
    """The source model; None where it is not needed or is here."""
    keep_blocks: bool
    """Whether the model's GGUF blocks are kept."""
    texts: tuple[tuple[str, ...], ...]
    """Of each text the sources in order: one of them is enough."""
    tasks: tuple[str, ...]
    peers: tuple[str, ...]
    """Other engines whose environments are made."""
    draft_models: tuple[str, ...] = ()
    """Models that only draft."""


Job = (
    StepJob
    | CheckJob
    | ContinueJob
    | CellJob
    | AnswerJob
    | ChatJob
    | InsightJob
    | TuneJob
    | GgufJob
    | ConvertJob
    | CompressedTensorsJob
    | ProbeJob
    | FetchJob
)

JOBS: Mapping[Role, type[Job]] = {
    "step": StepJob,
    "check": CheckJob,
    "continue": ContinueJob,
    "cell": CellJob,
    "answer": AnswerJob,
    "chat": ChatJob,
    "insight": InsightJob,
    "tune": TuneJob,
    "gguf": GgufJob,
    "convert": ConvertJob,
    "compressed-tensors": CompressedTensorsJob,
    "probe": ProbeJob,
    "fetch": FetchJob,
}
"""The class of each role's job."""


class CellCommand(TypedDict, total=False):
    """A command to a worker of role `cell`."""

    do: Literal["join", "drop", "load", "quality", "lossless", "roofline", "warm", "speed", "quit"]
    cell: str
    """Which cell is asked, in a process of several; the first one unless it says otherwise."""
    job: dict[str, Any]
    """Of `join`: another cell that the process is to measure, as `to_json` gives it."""
    reference: str
    """Of `quality`: where the baseline's predictions are stored."""
    round: int
    """Of `warm` and `speed`: which repeat the turn belongs to."""
    batch: int
    context: int
    category: str
    """Of `warm` and `speed`: the shape; see `compose.outputs.sessions.Shape`."""
    threads: int
    """Of `warm` and `roofline`: with how many threads is timed."""


class ChatCommand(TypedDict, total=False):
    """A command to a worker of role `chat`."""

    do: Literal["say", "reset"]
    text: str
    """Of `say`: the user's message."""


@dataclass(frozen=True)
class Allowed:
    """What a worker may take at most; None is no limit."""

    seconds: float | None = None
    memory: int | None = None
    """Bytes that one of its processes may hold."""
    name: str = "limits"
    """Where the limit stands in the pipeline file, as in `limits.step`."""


UNLIMITED = Allowed()


@dataclass(frozen=True)
class Needs:
    """What one worker needs. An executor of one machine uses `here` and `allowed` alone."""

    here: bool = False
    """The machine that this process runs on, with all its threads: the worker will be timed."""
    memory: int | None = None
    """Bytes that it is expected to hold at its peak; None where that is not known."""
    gpu: bool = False
    """Whether it works on a GPU where there is one."""
    allowed: Allowed = UNLIMITED


ANYWHERE = Needs()
"""Of a worker that asks for nothing."""


def role_of(job: Job) -> Role:
    """The role whose job this is."""
    return next(role for role, kind in JOBS.items() if type(job) is kind)


@cache
def _adapter(role: Role) -> TypeAdapter[Job]:
    return TypeAdapter(JOBS[role])


def to_json(job: Job) -> dict[str, Any]:
    """A job as plain JSON."""
    values: dict[str, Any] = _adapter(role_of(job)).dump_python(job, mode="json")
    return values


def from_json(role: Role, values: Mapping[str, Any]) -> Job:
    """The job that `to_json` gave these values for."""
    return _adapter(role).validate_python(values)


def write_job(file: Path, job: Job) -> Role:
    """Write a job file, in a folder for this user alone: a worker does what the file says."""
    private_folder(file.parent)
    write_json(file, to_json(job))
    return role_of(job)


def read_job(role: Role, file: Path) -> Job:
    """The job in a file, which nobody else may have written: it says which folders are filled.

    Raises:
        UserError: the file, or its folder, is another user's, or others may write to it.
    """
    with file.open("rb") as opened:
        for what, facts in (
            (file.parent, os.stat(file.parent)),
            (file, os.fstat(opened.fileno())),
        ):
            why = _open_to_others(facts)
            if why is not None and not (what is file and _closed(file.parent)):
                raise UserError(
                    f"{what} is {why}, so what it asks for is not done",
                    fix="remove the run's folder `jobs`; it is made again, for you alone",
                )
        return from_json(role, json.loads(opened.read()))


def _open_to_others(facts: os.stat_result) -> str | None:
    """Why others than this user could have written a file or folder; None where they could not."""
    if facts.st_uid not in (os.geteuid(), 0):
        return "another user's"
    if stat.S_IMODE(facts.st_mode) & 0o022:
        return "open to other users to write to"
    return None


def _closed(folder: Path) -> bool:
    """Whether nobody else gets into the folder, whatever the modes of the files in it."""
    facts = os.stat(folder)
    return facts.st_uid == os.geteuid() and not stat.S_IMODE(facts.st_mode) & 0o077
