"""The typed result of a run: every cell of its matrix, and what was measured of it.

`results.json` is the truth; tables, pictures and picks are derived from it. A value that was not
measured is absent, never zero: in memory it is None, in the file its key is missing.
"""

from __future__ import annotations

from functools import cached_property
from typing import Any, ClassVar, Literal

from pydantic import Field, model_validator

from compose.errors import UserError, suggest
from compose.results.parts import (
    Arithmetic,
    Compute,
    Insight,
    LosslessCheck,
    Peer,
    Quality,
    Record,
    SeedRun,
    Size,
    SkippingCurve,
    Speculation,
    Speed,
    StepInfo,
    TaskScore,
    TrainingPoint,
    Verdict,
)
from compose.results.record import only_finite

SCHEMA_VERSION = 3


Status = Literal["ok", "failed", "left-out"]


class CellResult(Record):
    """One cell of the matrix: a chain of stages, and what was measured of it."""

    always: ClassVar[frozenset[str]] = frozenset({"reason"})

    name: str
    """Unique in a run; `dense` is the untouched model."""

    chain: tuple[str, ...]
    """Names of the stages, in order; empty for the untouched model."""

    status: Status
    """`ok`; `failed` while it ran; `left-out` by the planner."""

    reason: str | None = None
    """One sentence on why it failed or was left out."""

    rule: str | None = None
    """The planner's rule that left it out."""

    failed_in: str | None = None
    """The stage or the phase (`load`, `quality`, `lossless`, `speed`) that failed."""

    traceback: str | None = None
    """The traceback of the failure."""

    ending: dict[str, Any] | None = None
    """How its process ended without an answer: `exit_code` or `signal`, the `limit` that it hit,
    `seconds` of work, `most_bytes` held, `oom_kills` that the kernel counted meanwhile, `node`."""

    aliases: tuple[str, ...] | None = None
    """Other names of the same chain."""

    plain: str | None = None
    """The cell with the same weights and plain decoding, or of one that verifies drafts at a
    budget, the cell that skips at that budget without drafts."""

    quality_of: str | None = None
    """The cell whose quality this one has, because it gives the same tokens."""

    steps: tuple[StepInfo, ...] | None = None
    """The chain's stages with their parameters."""

    fitted_to: tuple[str, ...] | None = None
    """The texts that its weights, gates or drafts were calibrated on or trained on; empty where it
    saw none, None in older results."""

    arithmetic: Arithmetic | None = None
    """The arithmetic of decoding."""

    scoring_arithmetic: Arithmetic | None = None
    """The arithmetic of prompts and of everything that is scored."""

    backend_fallback: str | None = None
    """Why the backend `native` was not taken, where it was not."""

    size: Size | None = None
    """Bytes on disk and in memory."""

    speed: Speed | None = None
    """Tokens a second."""

    compute: Compute | None = None
    """Shares of compute that were saved."""

    insight: Insight | None = None
    """Which tokens entered which branches, for cells that skip."""

    quality: Quality | None = None
    """Quality, measured on this cell itself."""

    speculation: Speculation | None = None
    """What speculation did in the timed rounds, for cells that speculate."""

    lossless_check: LosslessCheck | None = None
    """Whether speculation gives plain decoding's tokens, for cells that speculate."""

    verdict: Verdict | None = None
    """Whether the cell is worth shipping; absent for the baseline and for peers."""

    peer: Peer | None = None
    """Of another engine's cell only: which one, and how it was run."""

    fingerprint: dict[str, str] | None = None
    """Measured phase -> 16 hex digits over the code and the versions that measured it."""

    choices: dict[str, Any] | None = None
    """What a stopwatch chose once on this machine: the float type of prompts, whose kernels."""

    training: dict[str, tuple[TrainingPoint, ...]] | None = None
    """Stage name -> its training curve."""

    layer_errors: dict[str, dict[str, float]] | None = None
    """Stage name -> relative error of each layer's output by quantization."""

    step_peak_bytes: dict[str, int] | None = None
    """Stage name -> the most memory that the process held which ran it."""

    step_seconds: dict[str, float] | None = None
    """Stage name -> wall time of the process that ran it."""

    seeds: tuple[SeedRun, ...] | None = None
    """What further seeds gave; everything else is the first seed's."""

    seconds: float | None = None
    """Wall time of the cell's measurements."""

    notes: tuple[str, ...] | None = None
    """What a reader should know about these numbers."""

    @property
    def speculates(self) -> bool:
        """Whether the cell drafts tokens and verifies them."""
        return self.speculation is not None or self.lossless_check is not None

    @model_validator(mode="before")
    @classmethod
    def _only_finite(cls, data: Any) -> Any:
        """Drop numbers that JSON cannot hold (a ruined perplexity), and say so in `notes`."""
        return only_finite(data) if isinstance(data, dict) else data


class Results(Record):
    """A whole run: its settings and its cells, which are found by name or alias."""

    schema_version: Literal[3] = 3
    """Raised when a field changes its meaning or goes."""

    run: str
    """The run's name."""

    environment: dict[str, Any] = Field(default_factory=dict)
    """Processor, threads, memory, versions, git commit: see `compose.results.environment`."""

    baseline: str = "dense"
    """The cell that the others are compared with."""

    command: str | None = None
    """The command line of the run."""

    model: str | None = None
    """The model that the chains start from."""

    dtype: str | None = None
    """Number format of what is not quantized."""

    seed: int | None = None
    """Seed of everything that draws numbers; further seeds stand with their cells' numbers, and
    each stored step's own in its lineage."""

    pipeline: str | None = None
    """The pipeline file's text."""

    benchmark: dict[str, Any] | None = None
    """The benchmark's settings: tokens, repeats, tasks."""

    seconds: float | None = None
    """Wall time of the run."""

    notes: tuple[str, ...] | None = None
    """What a reader should know about the whole run."""

    skipping_curves: tuple[SkippingCurve, ...] | None = None
    """Accuracy against compute saved, of each family of cells that skip with the same weights."""

    cells: tuple[CellResult, ...]
    """Every cell of the plan, the baseline first, and those that the planner left out."""

    @model_validator(mode="after")
    def _names_are_unique(self) -> Results:
        names = [cell.name for cell in self.cells]
        twice = sorted({name for name in names if names.count(name) > 1})
        if twice:
            raise ValueError(f"two cells are called {', '.join(map(repr, twice))}")
        return self

    @cached_property
    def _by_name(self) -> dict[str, CellResult]:
        aliased = {alias: cell for cell in self.cells for alias in cell.aliases or ()}
        return aliased | {cell.name: cell for cell in self.cells}

    @property
    def measured(self) -> tuple[CellResult, ...]:
        """The cells with status `ok`."""
        return tuple(cell for cell in self.cells if cell.status == "ok")

    def find(self, name: str | None) -> CellResult | None:
        """The cell of that name or alias, or None."""
        return None if name is None else self._by_name.get(name)

    def cell(self, name: str) -> CellResult:
        """The cell of that name or alias.

        Raises:
            UserError: the run has no such cell.
        """
        cell = self.find(name)
        if cell is None:
            hint = suggest(name, [cell.name for cell in self.cells])
            raise UserError(f"run {self.run!r} has no cell {name!r}", fix=hint)
        return cell

    def quality(self, cell: CellResult) -> Quality | None:
        """The cell's own quality, or that of the cell it gives the same tokens as."""
        source = cell if cell.quality is not None else self.find(cell.quality_of)
        return None if source is None else source.quality

    def tasks(self, cell: CellResult) -> dict[str, TaskScore]:
        """The scores of the cell's tasks; empty where none was asked."""
        quality = self.quality(cell)
        return (quality.tasks if quality else None) or {}
