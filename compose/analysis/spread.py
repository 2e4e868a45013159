"""The spread between equal runs on a machine, which the rounds of one run cannot show.

The rounds of a run follow each other within a minute or two. Slower influences (neighbours on a
shared machine, the placement of memory) are the same for all of them, and different in the next
run. So a speed ratio of one run has at least the standard deviation that the same ratio had over
many equal runs. `make repeatability` measures it and stores it for the machine; a run records it
with its environment.
"""

from __future__ import annotations

import json
import math
import statistics
from collections.abc import Mapping, Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, Literal

from compose.analysis.intervals import t_quantile
from compose.results.record import Estimate, Record
from compose.results.schema import Results
from compose.store import write_json

FILE = "between-runs.json"
MACHINE = ("processor", "cores", "threads")
LEAST_RUNS = 5
Kind = Literal["decode", "prefill"]


class Spread(Record):
    """Standard deviation of the logarithm of a speed ratio over equal runs."""

    runs: int
    """Equal runs that it was measured on."""

    decode: float
    """Of decode speed over the baseline's."""

    prefill: float
    """Of prefill speed over the baseline's."""

    assumed: bool | None = None
    """Whether it was measured on another machine."""

    def of(self, metric: str) -> float:
        """Of a metric's kind: `decode`, or `prefill, batch 8`."""
        return self.prefill if metric.startswith("prefill") else self.decode


ASSUMED = Spread(runs=21, decode=0.068, prefill=0.052, assumed=True)
"""For comparing runs of a machine that was not measured: two virtual cores of a shared server
(reports/published/repeatability)."""


def measured_spread(runs: Sequence[Results]) -> Spread:
    """From equal runs: the standard deviations of all cells' ratios, pooled.

    Raises ValueError for fewer than five runs, or runs without ratios.
    """
    if len(runs) < LEAST_RUNS:
        raise ValueError(f"{len(runs)} runs say little of their spread: {LEAST_RUNS} do")
    return Spread(
        runs=len(runs), decode=_pooled(runs, "decode_ratio"), prefill=_pooled(runs, "prefill_ratio")
    )


def _pooled(runs: Sequence[Results], field: str) -> float:
    logs: dict[str, list[float]] = {}
    for run in runs:
        for cell in run.measured:
            ratio: Estimate | None = getattr(cell.speed, field, None) if cell.speed else None
            if ratio is not None:
                logs.setdefault(cell.name, []).append(math.log(ratio.value))
    variances = [
        statistics.variance(values) for values in logs.values() if len(values) == len(runs)
    ]
    if not variances:
        raise ValueError(f"no cell has a {field} in every run")
    return math.sqrt(statistics.fmean(variances))


def spread_in(environment: Mapping[str, Any]) -> Spread | None:
    """The spread that a run's environment states for its machine; None where it was not
    measured."""
    record = environment.get("between_runs")
    return None if record is None else Spread.model_validate(record)


def widened(ratio: Estimate, kind: Kind, spread: Spread | None) -> Estimate:
    """The ratio with an interval that covers the spread between runs.

    Its half width, on the logarithm, is that of its rounds, or Student's t of the spread between
    runs where that is larger. Unchanged where no spread is known.
    """
    if spread is None:
        return ratio
    half = t_quantile(spread.runs) * spread.of(kind)
    rounds_half = (math.log(ratio.high) - math.log(ratio.low)) / 2
    if half <= rounds_half:
        return ratio
    low, high = ratio.value * math.exp(-half), ratio.value * math.exp(half)
    wide = {"low": low, "high": high, "different": not low <= 1 <= high}
    return ratio.model_copy(update=wide | {"rounds_ci95": ratio.ci95})


def store_spread(folder: Path, spread: Spread, environment: Mapping[str, Any]) -> Path:
    """Store a machine's spread in the folder of measurements that are made once a machine."""
    record = {name: environment.get(name) for name in MACHINE}
    record |= {"commit": environment.get("git_commit"), "between_runs": spread.model_dump()}
    record["date"] = datetime.now(UTC).isoformat(timespec="seconds")
    file = folder / FILE
    write_json(file, record)
    return file


def stored_spread(folder: Path, environment: Mapping[str, Any]) -> dict[str, Any] | None:
    """The spread stored for this machine at this number of threads, as an environment has it."""
    try:
        record = json.loads((folder / FILE).read_text(encoding="utf-8"))
        same = all(record[name] == environment.get(name) for name in MACHINE)
        return Spread.model_validate(record["between_runs"]).model_dump() if same else None
    except (OSError, ValueError, KeyError):
        return None
