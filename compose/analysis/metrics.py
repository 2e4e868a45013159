"""Numbers of a cell by name, for tables, constraints and aims."""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from compose.analysis.intervals import t_quantile
from compose.errors import UserError, suggest
from compose.results.schema import CellResult, Results

Interval = tuple[float, float]


@dataclass(frozen=True)
class Metric:
    """A number of a cell that can be shown, bounded, or aimed for."""

    title: str
    better: Literal["higher", "lower"]
    of: Callable[[Results, CellResult], float | None]
    interval: Callable[[Results, CellResult], Interval | None] = lambda results, cell: None
    """Its 95 % interval, for those that have one."""

    def rank(self, value: float) -> float:
        """The value as something that is better when it is higher."""
        return value if self.better == "higher" else -value


def _read(part: str, *fields: str) -> Callable[[Results, CellResult], Any]:
    """Reads a field of a part of a cell, at any depth; None where one on the way is None."""

    def read(results: Results, cell: CellResult) -> Any:
        value = results.quality(cell) if part == "quality" else getattr(cell, part)
        for field in fields:
            value = None if value is None else getattr(value, field)
        return value

    return read


def _number(part: str, *fields: str) -> Callable[[Results, CellResult], float | None]:
    read = _read(part, *fields)

    def number(results: Results, cell: CellResult) -> float | None:
        value = read(results, cell)
        return None if value is None else float(value)

    return number


def _estimated(title: str, *path: str) -> Metric:
    """A metric that is an estimate with an interval, and better when higher."""
    return Metric(title, "higher", _number(*path, "value"), _read(*path, "ci95"))


def _speculation(title: str, field: str) -> Metric:
    """A number of the timed speculation with the interval beside it, better when higher."""
    read = _read("speculation", f"{field}_ci95")
    return Metric(title, "higher", _number("speculation", field), read)


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


_perplexity_interval = _read("quality", "perplexity", "ratio_ci95")


def _retained(results: Results, cell: CellResult) -> float | None:
    """Mean share of the baseline's task scores; without tasks, its perplexity over the cell's.

    A cell that lacks one of the baseline's tasks has no mean: it would not be comparable.
    """
    basis = retained_basis(results)
    if basis == "perplexity":
        ratio = _perplexity_ratio(results, cell)
        return 1 / ratio if ratio else None
    quality = results.quality(cell)
    if basis is None or quality is None:
        return None
    if quality.retained is not None:
        return quality.retained.value
    dense = results.quality(results.cell(results.baseline))
    tasks = [] if dense is None else list(dense.tasks or ())
    shares = [task_retained(results, cell, task) for task in tasks]
    present = [share for share in shares if share is not None]
    return sum(present) / len(present) if present and len(present) == len(tasks) else None


def _retained_interval(results: Results, cell: CellResult) -> Interval | None:
    quality = results.quality(cell)
    if quality is None:
        return None
    if retained_basis(results) == "perplexity":
        ends = _perplexity_interval(results, cell)
        return None if ends is None else (1 / ends[1], 1 / ends[0])
    return None if quality.retained is None else quality.retained.ci95


def _accuracy(results: Results, cell: CellResult) -> float | None:
    quality = results.quality(cell)
    scores = [] if quality is None else [s.value for s in (quality.tasks or {}).values()]
    present = [score for score in scores if score is not None]
    return sum(present) / len(present) if present and len(present) == len(scores) else None


METRICS: dict[str, Metric] = {
    "decode": Metric(
        "decode tokens/s", "higher", _number("speed", "decode_tokens_per_s", "median")
    ),
    "prefill": Metric(
        "prefill tokens/s", "higher", _number("speed", "prefill_tokens_per_s", "median")
    ),
    "ttft": Metric("seconds to the first token", "lower", _number("speed", "ttft_s", "median")),
    "size": Metric("bytes on disk", "lower", _number("size", "disk_bytes")),
    "resident": Metric("bytes in memory", "lower", _number("size", "resident_bytes")),
    "peak": Metric("peak bytes", "lower", _number("size", "peak_bytes")),
    "saved": Metric("compute saved, net", "higher", _number("compute", "saved_net")),
    "saved-gross": Metric("compute saved, gross", "higher", _number("compute", "saved_gross")),
    "decode-ratio": _estimated("decode speed over the baseline's", "speed", "decode_ratio"),
    "prefill-ratio": _estimated("prefill speed over the baseline's", "speed", "prefill_ratio"),
    "retained": Metric("share of quality retained", "higher", _retained, _retained_interval),
    "written": _estimated("share of written tasks retained", "quality", "written_retained"),
    "ranked": _estimated(
        "share of tasks ranked by likelihood retained", "quality", "ranked_retained"
    ),
    "accuracy": Metric("mean task score", "higher", _accuracy),
    "perplexity": Metric("perplexity", "lower", _number("quality", "perplexity", "value")),
    "perplexity-ratio": Metric(
        "perplexity ratio", "lower", _perplexity_ratio, _perplexity_interval
    ),
    "kl": Metric(
        "KL to the baseline",
        "lower",
        _number("quality", "kl_to_baseline"),
        _read("quality", "kl_ci95"),
    ),
    "answer-kl": Metric(
        "KL on the baseline's own answers", "lower", _number("quality", "own_answers", "kl")
    ),
    "prefix": Metric(
        "tokens of greedy answers in common",
        "higher",
        _number("quality", "own_answers", "common_prefix"),
    ),
    "agreement": Metric("greedy agreement", "higher", _number("quality", "greedy_agreement")),
    "acceptance": _speculation("acceptance rate", "acceptance_rate"),
    "accepted": _speculation("mean accepted tokens", "mean_accepted_tokens"),
    "speedup": _speculation("speed-up of speculation", "speedup"),
}
"""Every number that tables, constraints and aims may name."""


def metrics(results: Results, cell: CellResult) -> dict[str, float]:
    """All numbers of `METRICS` that the cell has."""
    values = {name: metric.of(results, cell) for name, metric in METRICS.items()}
    return {name: value for name, value in values.items() if value is not None}


def metric_of(results: Results, name: str, cell: CellResult) -> float | None:
    """The number of `cell` that `METRICS` calls `name`, or None where it was not measured.

    Raises:
        UserError: there is no metric of that name.
    """
    return _metric(name).of(results, cell)


def interval_of(results: Results, name: str, cell: CellResult) -> Interval | None:
    """The 95 % interval of a metric, or None where it has none.

    Raises:
        UserError: there is no metric of that name.
    """
    return _metric(name).interval(results, cell)


def _metric(name: str) -> Metric:
    if name not in METRICS:
        raise UserError(f"there is no metric {name!r}", fix=suggest(name, METRICS))
    return METRICS[name]


def over_seeds(results: Results, name: str, cell: CellResult) -> tuple[float, ...]:
    """A metric of quality or compute with every seed, the first seed's first."""
    runs = [
        cell.model_copy(update={"quality": run.quality, "compute": run.compute})
        for run in cell.seeds or ()
    ]
    values = [metric_of(results, name, seeded) for seeded in (cell, *runs)]
    return tuple(value for value in values if value is not None)


def half_width(values: Sequence[float]) -> float:
    """Half of the 95 % interval of the values' mean, by Student's t."""
    error = statistics.stdev(values) / math.sqrt(len(values))
    return t_quantile(len(values)) * error


def gain(results: Results, name: str, cell: CellResult) -> float | None:
    """A metric of the cell over the baseline's, or None where either was not measured."""
    baseline = results.find(results.baseline)
    if baseline is None:
        return None
    value, dense = metric_of(results, name, cell), metric_of(results, name, baseline)
    return value / dense if value is not None and dense else None


def retained_basis(results: Results) -> Literal["tasks", "perplexity"] | None:
    """The quantity of which `retained` is a share: one for the whole run, so that cells compare."""
    baseline = results.find(results.baseline)
    quality = None if baseline is None else results.quality(baseline)
    if quality is None:
        return None
    if quality.tasks and all(score.value for score in quality.tasks.values()):
        return "tasks"
    perplexity = quality.perplexity
    return "perplexity" if perplexity is not None and perplexity.value else None
