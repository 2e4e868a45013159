"""What the runner and its worker processes exchange: job files, commands and messages, as JSON."""

from __future__ import annotations

from typing import Any, Literal, TypedDict

Role = Literal[
    "step",
    "check",
    "continue",
    "cell",
    "answer",
    "insight",
    "tune",
    "gguf",
    "convert",
    "compressed-tensors",
    "probe",
]
"""What a worker does; `compose.workers.main` describes each."""

Message = dict[str, Any]
"""From a worker: `progress` [done, total, phase, {detail, numbers}], or an answer: `ok` with
`result`, else with `error`, `kind` (a class of `compose.errors`) and `traceback`."""


class StepRequest(TypedDict):
    """The job of role `step`: make one model folder."""

    key: str
    name: str
    stage: dict[str, Any] | None
    """The stage's parameters; None for the source model."""
    model: str
    """The pipeline's source model."""
    keep_blocks: bool
    """Whether the source's GGUF blocks are kept."""
    dtype: str
    seed: int
    data: dict[str, Any]
    """The pipeline's `data` section."""
    source: str | None
    """The model folder that the stage starts from."""
    dense: str
    """The folder of the untouched source model: the teacher."""
    target: str
    """The folder to make."""
    check: str
    """Where the logits of the probe text are stored."""
    work: str
    """Scratch that survives a kill."""
    asset_cache: str
    tensorboard: str | None
    """The folder for TensorBoard files of training; None for none."""


class CheckRequest(TypedDict):
    """The job of role `check`: load a folder and compare its logits with stored ones."""

    folder: str
    reference: str


class ContinueRequest(TypedDict):
    """The job of role `continue`: decode `tokens` tokens after the probe text."""

    folder: str
    tokens: int
    settings: dict[str, Any] | None
    """How to decode; None for what the folder states."""


class CellRequest(TypedDict):
    """The job of role `cell`: measure a cell, command by command."""

    name: str
    folder: str
    baseline_folder: str
    decode: dict[str, Any] | None
    """The decode stage's parameters; None for plain decoding."""
    benchmark: dict[str, Any]
    """The pipeline's `benchmark` section."""
    seed: int
    dtype: str
    backend: str
    """What runs the model; `auto` lets the folder decide."""
    baseline_backend: str
    peer: str | None
    """The engine that is measured instead of ours, on the folder of the baseline."""
    asset_cache: str
    reference: str
    """Where the baseline's predictions are stored."""
    threads: int | None
    learns_from: list[tuple[str, int | None]]
    """Of the baseline only: source and row limit of each text that a stage of the plan reads."""


class CellCommand(TypedDict, total=False):
    """A command to a worker of role `cell`."""

    do: Literal["join", "drop", "load", "quality", "lossless", "roofline", "warm", "speed", "quit"]
    cell: str
    """Which cell is asked, in a process of several; the first one unless it says otherwise."""
    job: CellRequest
    """Of `join`: another cell that the process is to measure."""
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
