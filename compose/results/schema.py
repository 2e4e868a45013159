"""The typed result of a run: what every cell measured, where, and how it compares to the baseline.

`results.json` is the truth; tables, pictures and picks are derived from it. A value that was not
measured is absent, never zero: in memory it is None, in the file its key is missing. Fields that a
record does not name are kept, so that a measurement may say more than this version knows.
"""

from __future__ import annotations

import importlib.metadata
import json
import math
import os
import platform
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass
from datetime import UTC, datetime
from functools import cached_property
from pathlib import Path
from typing import Any, ClassVar, Literal

import psutil
from pydantic import (
    BaseModel,
    ConfigDict,
    Field,
    SerializerFunctionWrapHandler,
    ValidationError,
    model_serializer,
    model_validator,
)

from compose.errors import UserError, suggest
from compose.store import write_json

SCHEMA_VERSION = 1
FILE_NAME = "results.json"
LIBRARIES = (
    "gateskip-compose",
    "torch",
    "transformers",
    "accelerate",
    "tokenizers",
    "safetensors",
    "bitsandbytes",
    "gptqmodel",
    "optimum",
    "torch-pruning",
    "lm-eval",
    "datasets",
    "numpy",
)
"""Distributions whose version can change a result."""

CPU_FEATURES = (
    "avx2",
    "avx512f",
    "avx512_vnni",
    "avx512_bf16",
    "amx_tile",
    "amx_bf16",
    "asimd",
    "bf16",
    "i8mm",
    "sve",
)
"""Instruction sets that decide which kernels run, as the kernel names them."""


class Record(BaseModel):
    """A frozen part of a result. What is None is left out when it is written."""

    model_config = ConfigDict(
        frozen=True, extra="allow", allow_inf_nan=False, use_attribute_docstrings=True
    )

    always: ClassVar[frozenset[str]] = frozenset()
    """Fields that are written even when they are None, because scripts look them up."""

    @model_serializer(mode="wrap")
    def _without_absent(self, handler: SerializerFunctionWrapHandler) -> dict[str, Any]:
        written: dict[str, Any] = handler(self)
        kept = {k: v for k, v in written.items() if v is not None or k in self.always}
        return kept | {k: None for k in self.always if k not in kept}


class Measured(Record):
    """A number that was measured several times."""

    median: float
    """The middle of the repeats."""

    repeats: tuple[float, ...] = ()
    """Every repeat, in the order of the rounds."""


class SpeedNumbers(Record):
    """How fast one batch size ran."""

    prefill_tokens_per_s: Measured | None = None
    """Prompt tokens read a second, over the whole batch."""

    decode_tokens_per_s: Measured | None = None
    """New tokens made a second after the first, over the whole batch."""

    ttft_s: Measured | None = None
    """Seconds from the prompt to the first new token."""


class Speed(SpeedNumbers):
    """Batch size 1, and the other batch sizes below `by_batch`."""

    by_batch: dict[int, SpeedNumbers] | None = None
    """Batch size -> its numbers, for every size but 1."""


class Size(Record):
    """Bytes on disk and in memory."""

    disk_bytes: int | None = None
    """Weight files of the artifact."""

    resident_bytes: int | None = None
    """What the loaded model occupies."""

    peak_bytes: int | None = None
    """Most memory of the cell's process while it was measured."""


class Compute(Record):
    """Shares of the dense model's multiply-adds that were not computed, 0 to 1."""

    saved_gross: float | None = None
    """In the decoder layers, the cost of the gates left out."""

    saved_net: float | None = None
    """In the decoder layers, gates and keys/values that are still computed paid for."""

    saved_model: float | None = None
    """Net, of the whole model: the LM head counts too."""


class Perplexity(Record):
    """Perplexity on held-out text."""

    dataset: str
    """Which text: `wikitext2`, `heldout-text`, ..."""

    value: float | None = None
    """exp of the mean negative log-likelihood of a token; absent when it was not finite."""

    tokens: int | None = None
    """Tokens that were scored."""

    ratio_to_baseline: float | None = None
    """`value` over the baseline's value; 1 is no loss."""


class TaskScore(Record):
    """A benchmark task of lm-eval."""

    metric: str
    """`acc` or `acc_norm`."""

    value: float | None = None
    """The score, 0 to 1."""

    n: int | None = None
    """Questions that were asked."""

    ci95: tuple[float, float] | None = None
    """95 % interval of the score."""

    retained: float | None = None
    """`value` over the baseline's value."""


class Overlap(Record):
    """Whether what is scored stands in a text that stages learn from."""

    rows: int
    """Rows or questions that are scored."""

    tainted: int
    """How many share a run of thirteen words with such a text."""


class Quality(Record):
    """How good the answers still are."""

    perplexity: Perplexity | None = None
    """Perplexity and its ratio to the baseline's."""

    kl_to_baseline: float | None = None
    """Mean KL divergence, baseline to this cell, nats a token."""

    greedy_agreement: float | None = None
    """Share of positions where both put the same token first."""

    tasks: dict[str, TaskScore] | None = None
    """Task name -> its score."""

    kl_of_rounding: float | None = None
    """Mean KL, nats a token, from these weights as they were scored to the same weights as they are
    decoded, with activations rounded to 8 bits; absent where decoding does not round."""

    overlap: dict[str, Overlap] | None = None
    """Of the baseline only: text or task -> whether stages learn from what is scored."""


class Divergence(Record):
    """The first place where speculative and plain greedy decoding differ."""

    prompt: int | None = None
    """Which prompt, from 0."""

    position: int | None = None
    """Which new token, from 0."""

    plain_token: int | None = None
    """The token that plain decoding took."""

    speculative_token: int | None = None
    """The token that speculative decoding took."""

    margin: float | None = None
    """Distance of the two highest logits there, plain decoding; near 0 is a near-tie."""

    margin_share: float | None = None
    """The same as a share of the distance between the highest and the lowest logit."""


class Speculation(Record):
    """What self-speculative decoding did. The cell named by `plain` is what it is compared with."""

    always: ClassVar[frozenset[str]] = frozenset({"first_divergence"})

    acceptance_rate: float | None = None
    """Accepted over drafted tokens."""

    mean_accepted_tokens: float | None = None
    """Tokens gained by one pass of the whole model; plain decoding has 1."""

    draft_length_histogram: dict[int, int] | None = None
    """Draft length -> rounds in which so many tokens were drafted; 0 is a plain step."""

    speedup: float | None = None
    """Decode speed over that of the plain cell."""

    speedup_per_prompt: tuple[float, ...] | None = None
    """The same for each prompt."""

    lossless: bool | None = None
    """Whether every new token equals plain greedy decoding's."""

    prompts: int | None = None
    """Prompts that were compared."""

    tokens: int | None = None
    """New tokens that were compared, over all prompts."""

    first_divergence: Divergence | None = None
    """Where they first differ; null when they do not."""

    divergences: tuple[Divergence, ...] | None = None
    """The same for each prompt whose texts differ."""

    acceptance_by_position: tuple[float, ...] | None = None
    """Share accepted of the drafts at each position, where all before them had been accepted."""

    looked_up_share: float | None = None
    """Share of the drafted tokens that the text itself proposed."""

    draft_s: float | None = None
    """Seconds of the last timed repeat that went into drafting."""

    verify_s: float | None = None
    """Seconds of it that went into passes at full compute."""


class BranchUse(Record):
    """What one branch's gate did, averaged over tokens."""

    gate: float
    """Mean gate, 0 to 1."""

    kept: float
    """Share of tokens that entered."""


class GroupUse(Record):
    """What a group of tokens got."""

    tokens: int
    """How many were seen."""

    compute: float
    """Mean share of the branches' multiply-adds, 0 to 1."""

    kept: tuple[float, ...]
    """Share of the group that entered each branch, in the order branches run."""


class Insight(Record):
    """Which tokens got how much compute, on the text of the perplexity."""

    branches: tuple[BranchUse, ...]
    """Attention 0, MLP 0, attention 1, ..."""

    kinds: dict[str, GroupUse]
    """Kind of token (first, punctuation, content, ...) -> its use."""

    positions: tuple[GroupUse, ...]
    """Stretches of equal length, from the beginning of a text to its end."""


class TrainingPoint(Record):
    """A point of a training curve."""

    step: int
    """Optimizer steps done."""

    loss: float | None = None
    """Training loss, smoothed as the stage says."""

    valid: float | None = None
    """Loss on held-out text."""


class StepInfo(Record):
    """A stage of the chain. Its parameters are kept beside these two."""

    name: str
    """What the pipeline file calls it."""

    use: str
    """Which stage it is: `gate`, `bnb`, `skip`, ..."""


class SeedRun(Record):
    """The same chain, made and scored with another seed."""

    seed: int
    """The seed."""

    quality: Quality | None = None
    """How good the answers are with it."""

    compute: Compute | None = None
    """Shares of compute that were saved with it."""


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

    aliases: tuple[str, ...] | None = None
    """Other names of the same chain."""

    plain: str | None = None
    """The cell with the same weights and plain decoding."""

    quality_of: str | None = None
    """The cell whose quality this one has, because it gives the same tokens."""

    steps: tuple[StepInfo, ...] | None = None
    """The chain's stages with their parameters."""

    size: Size | None = None
    """Bytes on disk and in memory."""

    speed: Speed | None = None
    """Tokens a second."""

    compute: Compute | None = None
    """Shares of compute that were saved."""

    insight: Insight | None = None
    """What the gates let in, for cells that skip."""

    quality: Quality | None = None
    """How good the answers are, measured on this cell itself."""

    speculation: Speculation | None = None
    """What speculation did, for cells that speculate."""

    training: dict[str, tuple[TrainingPoint, ...]] | None = None
    """Stage name -> its training curve."""

    layer_errors: dict[str, dict[str, float]] | None = None
    """Stage name -> relative error of each layer's output that quantization made."""

    step_peak_bytes: dict[str, int] | None = None
    """Stage name -> the most memory that the process held which ran it."""

    seeds: tuple[SeedRun, ...] | None = None
    """What further seeds gave; everything else is the first seed's."""

    seconds: float | None = None
    """Wall time of the cell's measurements."""

    notes: tuple[str, ...] | None = None
    """What a reader should know about these numbers."""

    @model_validator(mode="before")
    @classmethod
    def _only_finite(cls, data: Any) -> Any:
        """Drop numbers that JSON cannot hold (a ruined perplexity), and say so in `notes`."""
        if not isinstance(data, dict):
            return data
        dropped: list[str] = []
        clean: dict[str, Any] = _finite(data, "", dropped)
        if dropped:
            lost = [f"{place} was not a finite number" for place in dropped]
            clean["notes"] = (*(clean.get("notes") or ()), *lost)
        return clean


class Results(Record):
    """A whole run. Cells are found by name; `metric` reads any number of a cell by name."""

    schema_version: Literal[1] = 1
    """Raised when a field changes its meaning or goes."""

    run: str
    """The run's name."""

    environment: dict[str, Any] = Field(default_factory=dict)
    """Processor, threads, memory, versions, git commit: see `capture_environment`."""

    baseline: str = "dense"
    """The cell that the others are compared with."""

    command: str | None = None
    """The command line that made the run."""

    model: str | None = None
    """The model that the chains start from."""

    dtype: str | None = None
    """Number format of what is not quantized."""

    pipeline: str | None = None
    """The pipeline file's text."""

    benchmark: dict[str, Any] | None = None
    """The benchmark's settings: tokens, repeats, tasks."""

    seconds: float | None = None
    """Wall time of the run."""

    notes: tuple[str, ...] | None = None
    """What a reader should know about the whole run."""

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
        found = self.find(name)
        if found is None:
            hint = suggest(name, [cell.name for cell in self.cells])
            raise UserError(f"run {self.run!r} has no cell {name!r}", fix=hint)
        return found

    def quality(self, cell: CellResult) -> Quality | None:
        """The cell's own quality, or that of the cell it gives the same tokens as."""
        source = cell if cell.quality is not None else self.find(cell.quality_of)
        return None if source is None else source.quality

    @cached_property
    def retained_basis(self) -> Literal["tasks", "perplexity"] | None:
        """What `retained` is a share of: one basis for the whole run, so that cells compare."""
        baseline = self.find(self.baseline)
        quality = None if baseline is None else self.quality(baseline)
        if quality is None:
            return None
        if quality.tasks and all(score.value for score in quality.tasks.values()):
            return "tasks"
        perplexity = quality.perplexity
        return "perplexity" if perplexity is not None and perplexity.value else None

    def metric(self, name: str, cell: CellResult) -> float | None:
        """The number called `name` in `METRICS`, or None where it was not measured.

        Raises:
            UserError: there is no metric of that name.
        """
        if name not in METRICS:
            raise UserError(f"there is no metric {name!r}", fix=suggest(name, METRICS))
        return METRICS[name].of(self, cell)

    def over_seeds(self, name: str, cell: CellResult) -> tuple[float, ...]:
        """A metric of quality or compute with every seed, the first seed's first."""
        runs = [
            cell.model_copy(update={"quality": run.quality, "compute": run.compute})
            for run in cell.seeds or ()
        ]
        values = [self.metric(name, each) for each in (cell, *runs)]
        return tuple(value for value in values if value is not None)

    def gain(self, name: str, cell: CellResult) -> float | None:
        """A metric of the cell over the baseline's, or None."""
        baseline = self.find(self.baseline)
        if baseline is None:
            return None
        own, theirs = self.metric(name, cell), self.metric(name, baseline)
        return own / theirs if own is not None and theirs else None


@dataclass(frozen=True)
class Metric:
    """A number of a cell that can be shown, bounded, or aimed for."""

    title: str
    better: Literal["higher", "lower"]
    of: Callable[[Results, CellResult], float | None]

    def rank(self, value: float) -> float:
        """The value as something that is better when it is higher."""
        return value if self.better == "higher" else -value


def _median(results: Results, cell: CellResult, field: str) -> float | None:
    measured = None if cell.speed is None else getattr(cell.speed, field)
    return None if measured is None else float(measured.median)


def _part(part: str, field: str) -> Callable[[Results, CellResult], float | None]:
    def read(results: Results, cell: CellResult) -> float | None:
        record = results.quality(cell) if part == "quality" else getattr(cell, part)
        value = None if record is None else getattr(record, field)
        return None if value is None else float(value)

    return read


def _speed(field: str) -> Callable[[Results, CellResult], float | None]:
    return lambda results, cell: _median(results, cell, field)


def _perplexity(results: Results, cell: CellResult) -> float | None:
    quality = results.quality(cell)
    return None if quality is None or quality.perplexity is None else quality.perplexity.value


def _perplexity_ratio(results: Results, cell: CellResult) -> float | None:
    quality = results.quality(cell)
    if quality is None or quality.perplexity is None:
        return None
    if quality.perplexity.ratio_to_baseline is not None:
        return quality.perplexity.ratio_to_baseline
    baseline = results.find(results.baseline)
    dense = None if baseline is None else results.quality(baseline)
    if dense is None or dense.perplexity is None or not dense.perplexity.value:
        return None
    if dense.perplexity.dataset != quality.perplexity.dataset or quality.perplexity.value is None:
        return None
    return quality.perplexity.value / dense.perplexity.value


def task_retained(results: Results, cell: CellResult, task: str) -> float | None:
    """A task's score over the baseline's, or None."""
    quality, baseline = results.quality(cell), results.find(results.baseline)
    score = None if quality is None else (quality.tasks or {}).get(task)
    if score is None or score.retained is not None:
        return None if score is None else score.retained
    dense = None if baseline is None else results.quality(baseline)
    theirs = None if dense is None else (dense.tasks or {}).get(task)
    if score.value is None or theirs is None or not theirs.value:
        return None
    return score.value / theirs.value


def _retained(results: Results, cell: CellResult) -> float | None:
    """Mean share of the baseline's task scores; without tasks, its perplexity over the cell's.

    A cell that lacks one of the baseline's tasks has no mean: it would not compare.
    """
    if results.retained_basis == "perplexity":
        ratio = _perplexity_ratio(results, cell)
        return 1 / ratio if ratio else None
    dense = results.quality(results.cell(results.baseline)) if results.retained_basis else None
    tasks = [] if dense is None else list(dense.tasks or ())
    shares = [task_retained(results, cell, task) for task in tasks]
    known = [share for share in shares if share is not None]
    return sum(known) / len(known) if known and len(known) == len(tasks) else None


def _accuracy(results: Results, cell: CellResult) -> float | None:
    quality = results.quality(cell)
    scores = [] if quality is None else [s.value for s in (quality.tasks or {}).values()]
    known = [score for score in scores if score is not None]
    return sum(known) / len(known) if known and len(known) == len(scores) else None


METRICS: dict[str, Metric] = {
    "decode": Metric("decode tokens/s", "higher", _speed("decode_tokens_per_s")),
    "prefill": Metric("prefill tokens/s", "higher", _speed("prefill_tokens_per_s")),
    "ttft": Metric("seconds to the first token", "lower", _speed("ttft_s")),
    "size": Metric("bytes on disk", "lower", _part("size", "disk_bytes")),
    "resident": Metric("bytes in memory", "lower", _part("size", "resident_bytes")),
    "peak": Metric("peak bytes", "lower", _part("size", "peak_bytes")),
    "saved": Metric("compute saved, net", "higher", _part("compute", "saved_net")),
    "saved-gross": Metric("compute saved, gross", "higher", _part("compute", "saved_gross")),
    "retained": Metric("share of quality retained", "higher", _retained),
    "accuracy": Metric("mean task score", "higher", _accuracy),
    "perplexity": Metric("perplexity", "lower", _perplexity),
    "perplexity-ratio": Metric("perplexity ratio", "lower", _perplexity_ratio),
    "kl": Metric("KL to the baseline", "lower", _part("quality", "kl_to_baseline")),
    "agreement": Metric("greedy agreement", "higher", _part("quality", "greedy_agreement")),
    "acceptance": Metric("acceptance rate", "higher", _part("speculation", "acceptance_rate")),
    "accepted": Metric(
        "mean accepted tokens", "higher", _part("speculation", "mean_accepted_tokens")
    ),
    "speedup": Metric("speed-up of speculation", "higher", _part("speculation", "speedup")),
}
"""Every number that tables, constraints and aims may name."""


def metrics(results: Results, cell: CellResult) -> dict[str, float]:
    """All numbers of `METRICS` that the cell has."""
    values = {name: metric.of(results, cell) for name, metric in METRICS.items()}
    return {name: value for name, value in values.items() if value is not None}


def load_results(path: str | Path) -> Results:
    """Read `results.json`, given the file or the run's folder.

    Raises:
        UserError: it is not there, is not JSON, or is not a result this version can read.
    """
    file = Path(path)
    file = file / FILE_NAME if file.is_dir() else file
    try:
        data = json.loads(file.read_text(encoding="utf-8"))
    except OSError as error:
        why = error.strerror or str(error)
        fix = "give a run's folder or its results.json"
        raise UserError(f"cannot read the results: {why}", fix=fix, file=file) from error
    except ValueError as error:
        raise UserError(f"this is not JSON: {error}", file=file) from error
    version = data.get("schema_version") if isinstance(data, dict) else None
    if isinstance(version, int) and version > SCHEMA_VERSION:
        raise UserError(
            f"schema version {version} is newer than {SCHEMA_VERSION}, the one this version reads",
            fix="upgrade gateskip-compose",
            file=file,
        )
    try:
        return Results.model_validate(data)
    except ValidationError as error:
        raise UserError(_first_mistake(data, error), file=file) from error


def save_results(results: Results, path: str | Path) -> None:
    """Write `results.json` in one move: a reader meets the old file or the new one, whole."""
    write_json(Path(path), results.model_dump(mode="json"))


def capture_environment(threads: int | None = None) -> dict[str, Any]:
    """What the machine and the libraries are, without importing torch.

    `threads` is what the benchmark was told to use; without it, what torch would take is recorded.
    Nothing that names the user, the host or a folder is in it.
    """
    torch = sys.modules.get("torch")
    if threads is None and torch is not None:
        threads = int(torch.get_num_threads())
    found = {
        "processor": _processor(),
        "cpu_features": _cpu_features(),
        "cores": psutil.cpu_count(logical=False),
        "threads": threads or _thread_count(),
        "memory_bytes": psutil.virtual_memory().total,
        "accelerator": _accelerator(torch),
        "platform": platform.platform(terse=True),
        "python": platform.python_version(),
        "versions": _versions(),
        "git_commit": _git_commit(),
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
    }
    return {key: value for key, value in found.items() if value not in (None, [], {})}


def _finite(value: Any, place: str, dropped: list[str]) -> Any:
    """`value` without keys whose number, or list of numbers, is not finite; `dropped` names them.

    A list goes as a whole: an interval or a round of repeats with a hole would mislead.
    """
    if isinstance(value, list | tuple):
        return [_finite(item, f"{place}[{i}]", dropped) for i, item in enumerate(value)]
    if not isinstance(value, dict):
        return value
    kept: dict[Any, Any] = {}
    for key, item in value.items():
        inner = f"{place}.{key}" if place else str(key)
        numbers = item if isinstance(item, list | tuple) else [item]
        if any(isinstance(number, float) and not math.isfinite(number) for number in numbers):
            dropped.append(inner)
        else:
            kept[key] = _finite(item, inner, dropped)
    return kept


def _first_mistake(data: Any, error: ValidationError) -> str:
    mistakes = error.errors(include_url=False, include_input=False)
    loc = mistakes[0]["loc"]
    place = ""
    for part in loc:
        place += f"[{part}]" if isinstance(part, int) else f".{part}" if place else str(part)
    message = f"{place or 'the file'}: {mistakes[0]['msg']}"
    more = len(mistakes) - 1
    return message if not more else f"{message} (and {more} more)"


def _processor() -> str | None:
    return _cpuinfo("model name") or platform.processor() or platform.machine() or None


def _cpu_features() -> list[str]:
    flags = (_cpuinfo("flags") or _cpuinfo("Features") or "").split()
    return [feature for feature in CPU_FEATURES if feature in flags]


def _cpuinfo(key: str) -> str | None:
    """The first value of a key in the kernel's description of the processor, where there is one."""
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        return None
    pairs = (line.partition(":") for line in lines)
    return next((value.strip() for name, _, value in pairs if name.strip() == key), None)


def _thread_count() -> int | None:
    told = os.environ.get("OMP_NUM_THREADS", "")
    return int(told) if told.isdigit() else os.cpu_count()


def _accelerator(torch: Any) -> str | None:
    if torch is None or not torch.cuda.is_available():
        return None
    return str(torch.cuda.get_device_name())


def _versions() -> dict[str, str]:
    found = {}
    for name in LIBRARIES:
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    return found


def _git_commit() -> str | None:
    """The commit of the source tree, `-dirty` with changes; None for an installed copy."""
    root = Path(__file__).resolve().parents[2]

    def git(*words: str) -> str:
        command = ["git", "-C", str(root), *words]
        done = subprocess.run(command, check=True, capture_output=True, text=True, timeout=10)
        return done.stdout.strip()

    try:
        if Path(git("rev-parse", "--show-toplevel")).resolve() != root:
            return None
        commit = git("rev-parse", "HEAD")
        return f"{commit}-dirty" if git("status", "--porcelain") else commit
    except (OSError, subprocess.SubprocessError):
        return None
