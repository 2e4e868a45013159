"""Probes: a chain's numbers as one rung measured them, kept in the store under their key.

A probe's key covers everything that affects its numbers: the cell, the baseline, the settings of
the rung's benchmark, the code, the libraries and the machine. An interrupted search, or a search
with another target, finds it again. Failed probes are not stored: the next search tries again.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, TypeGuard

from compose.analysis.metrics import METRICS, Interval, interval_of, metric_of
from compose.analysis.verdicts import gives_baselines_predictions
from compose.language.schema import Chain
from compose.numbers import metric_text
from compose.outputs.run_folder import phase_key, phases_of
from compose.planning.keys import digest
from compose.planning.plan import Cell, Plan
from compose.planning.planner import cell_name
from compose.results.schema import CellResult, Results
from compose.store import Store, read_json, write_json

PROBED = (
    *("decode", "prefill", "decode-ratio", "prefill-ratio", "size"),
    *("kl", "perplexity", "perplexity-ratio", "retained"),
)
"""Metrics of a probe."""

OF_THE_BASELINE = {"kl": 0.0, "perplexity-ratio": 1.0, "retained": 1.0}
"""Metrics of a cell with the baseline's own predictions."""

EXACT = ("size",)
"""Metrics that are counted, not estimated."""


@dataclass(frozen=True)
class Probe:
    """The metrics of a chain on one rung, or why they could not be measured."""

    chain: Chain
    numbers: Mapping[str, float] = field(default_factory=dict)
    """Metric -> its estimate."""
    intervals: Mapping[str, Interval] = field(default_factory=dict)
    """Metric -> its 95 % interval, for those that have one."""
    lossless: bool | None = None
    """Whether its speculation kept the tokens; None where it does not speculate."""
    failure: str | None = None
    """Why nothing was measured."""

    @property
    def name(self) -> str:
        """The name of its cell."""
        return cell_name(self.chain)

    def shown(self, metric: str) -> str:
        """A number with its interval, in words."""
        title, value = METRICS[metric].title, self.numbers.get(metric)
        ends = self.intervals.get(metric)
        if value is None:
            return f"{title} not measured"
        if ends is None or ends[0] == ends[1]:
            return f"{title} {metric_text(metric, value)}"
        low, high = (metric_text(metric, end) for end in ends)
        return f"{title} {metric_text(metric, value)} ({low} to {high})"


def number(results: Results, metric: str, cell: CellResult) -> float | None:
    """A metric of a cell; a cell with the baseline's predictions has no distance from it."""
    if _is_the_baselines(results, metric, cell):
        return OF_THE_BASELINE[metric]
    return metric_of(results, metric, cell)


def interval(results: Results, metric: str, cell: CellResult) -> Interval | None:
    """The 95 % interval of `number`: its value twice where it is exact."""
    value = number(results, metric, cell)
    if value is not None and (metric in EXACT or _is_the_baselines(results, metric, cell)):
        return value, value
    return interval_of(results, metric, cell)


def _is_the_baselines(results: Results, metric: str, cell: CellResult) -> bool:
    quality = results.quality(cell)
    is_same = quality is not None and gives_baselines_predictions(results, quality)
    return is_same and metric in OF_THE_BASELINE


def probe_of(results: Results, cell: CellResult) -> Probe:
    """The probe of a cell of a rung's results."""
    if cell.status != "ok":
        return Probe(cell.chain, failure=cell.reason or cell.status)
    numbers = {name: number(results, name, cell) for name in PROBED}
    ends = {name: interval(results, name, cell) for name in PROBED}
    return Probe(
        chain=cell.chain,
        numbers={name: value for name, value in numbers.items() if _finite(value)},
        intervals={name: pair for name, pair in ends.items() if pair and all(map(_finite, pair))},
        lossless=None if cell.lossless_check is None else cell.lossless_check.lossless,
    )


def _finite(value: float | None) -> TypeGuard[float]:
    return value is not None and math.isfinite(value)


def probe_key(plan: Plan, cell: Cell, speed: Mapping[str, Any]) -> str:
    """The key of a cell's probe under a rung's plan; `speed` is what
    `compose.outputs.sessions.speed_settings` gives."""
    plain = plan.cell(cell.plain) if cell.plain is not None else cell
    phases = {
        f"{part.key} {phase}": phase_key(plan, part, phase)
        for part in (plain, cell)
        if part is not plan.cells[0]
        for phase in phases_of(part)
    }
    return digest({"baseline": plan.cells[0].key, "phases": phases, "speed": dict(speed)})


class ProbeStore:
    """Probes by key, beside the model folders of a store. Safe for several processes."""

    def __init__(self, store: Store) -> None:
        self.root = store.root / ".probes"

    def get(self, key: str) -> Probe | None:
        """The probe with this key, or None."""
        record = read_json(self._file(key))
        if not isinstance(record, dict) or record.get("key") != key:
            return None
        probe = record["probe"]
        ends = {name: (low, high) for name, (low, high) in probe["intervals"].items()}
        return Probe(**{**probe, "chain": tuple(probe["chain"]), "intervals": ends})

    def put(self, key: str, probe: Probe) -> None:
        """Keep a probe that did not fail."""
        if probe.failure is None:
            write_json(self._file(key), {"key": key, "probe": asdict(probe)})

    def _file(self, key: str) -> Path:
        return self.root / f"{key}.json"
