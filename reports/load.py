"""From results to what a report shows: numbered rows, families, fronts, the best by each aim."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

from compose.analysis.families import NOT_QUANTIZED, Decode, decode_of, family_of, weights_of
from compose.analysis.metrics import METRICS, interval_of, metrics
from compose.results.io import load_results
from compose.results.schema import CellResult, Results

FRONTS = ("decode", "size", "saved")
"""What quality is drawn against."""


@dataclass(frozen=True)
class Row:
    """A measured cell with its number in the report and its metrics (`METRICS`)."""

    number: int
    cell: CellResult
    values: dict[str, float]
    weights: str
    family: str
    decode: Decode
    is_baseline: bool

    @property
    def is_quantized(self) -> bool:
        """Whether its weights are packed, as far as the chain or the peer's option tells."""
        return self.weights != NOT_QUANTIZED

    def get(self, metric: str) -> float | None:
        """The metric, or None where it was not measured."""
        return self.values.get(metric)


@dataclass(frozen=True)
class LeftOutGroup:
    """Cells that one rule left out, and the sentences that say so."""

    rule: str
    reasons: tuple[str, ...]
    cells: tuple[str, ...]


@dataclass(frozen=True)
class Report:
    """Results with everything derived that tables and pictures share."""

    results: Results

    @cached_property
    def rows(self) -> tuple[Row, ...]:
        """Measured cells, numbered from 1: the baseline first, the others as the plan has them."""
        results = self.results
        cells = sorted(results.measured, key=lambda cell: cell.name != results.baseline)
        return tuple(
            Row(
                number=number,
                cell=cell,
                values=metrics(results, cell),
                weights=weights_of(cell),
                family=family_of(cell),
                decode=decode_of(cell),
                is_baseline=cell.name == results.baseline,
            )
            for number, cell in enumerate(cells, 1)
        )

    @cached_property
    def baseline(self) -> Row | None:
        """The row of the baseline, when it was measured."""
        return next((row for row in self.rows if row.is_baseline), None)

    @cached_property
    def failed(self) -> tuple[CellResult, ...]:
        """Cells that failed."""
        return tuple(cell for cell in self.results.cells if cell.status == "failed")

    @cached_property
    def left_out(self) -> tuple[LeftOutGroup, ...]:
        """Cells that the planner left out, by rule."""
        cells = [cell for cell in self.results.cells if cell.status == "left-out"]
        rules = dict.fromkeys(cell.rule or "unnamed rule" for cell in cells)
        groups = []
        for rule in rules:
            members = [cell for cell in cells if (cell.rule or "unnamed rule") == rule]
            reasons = dict.fromkeys(cell.reason for cell in members if cell.reason)
            groups.append(LeftOutGroup(rule, tuple(reasons), tuple(c.name for c in members)))
        return tuple(groups)

    @cached_property
    def tasks(self) -> tuple[str, ...]:
        """Every task that some cell was asked, in the order met."""
        qualities = [self.results.quality(row.cell) for row in self.rows]
        return tuple(dict.fromkeys(t for q in qualities if q is not None for t in q.tasks or ()))

    @cached_property
    def batches(self) -> tuple[int, ...]:
        """Batch sizes beside 1 that some cell ran."""
        speeds = [row.cell.speed for row in self.rows]
        return tuple(sorted({b for s in speeds if s is not None for b in s.by_batch or ()}))

    @cached_property
    def contexts(self) -> tuple[int, ...]:
        """Prompt lengths beside the main one that some cell ran."""
        speeds = [row.cell.speed for row in self.rows]
        return tuple(sorted({c for s in speeds if s is not None for c in s.by_context or ()}))

    @cached_property
    def categories(self) -> tuple[str, ...]:
        """Categories of prompts that some cell ran apart."""
        speeds = [row.cell.speed for row in self.rows]
        return tuple(dict.fromkeys(c for s in speeds if s is not None for c in s.by_category or ()))

    @cached_property
    def peers(self) -> tuple[Row, ...]:
        """The rows of other engines."""
        return tuple(row for row in self.rows if row.cell.peer is not None)

    def interval(self, row: Row, metric: str) -> tuple[float, float] | None:
        """The 95 % interval of a row's metric (`METRICS`), where the results have one."""
        return interval_of(self.results, metric, row.cell)

    @cached_property
    def quality_axis(self) -> str | None:
        """The metric that stands for quality in the fronts: the finest that was measured."""
        for metric in ("perplexity-ratio", "kl", "retained", "agreement"):
            if sum(row.get(metric) is not None for row in self.rows) > 1:
                return metric
        return None

    def front(self, metric: str) -> tuple[Row, ...]:
        """Rows that no other row beats in both `metric` and the quality axis."""
        quality = self.quality_axis
        if quality is None:
            return ()
        measured = [row for row in self.rows if {metric, quality} <= row.values.keys()]
        points = [
            (METRICS[metric].rank(row.values[metric]), METRICS[quality].rank(row.values[quality]))
            for row in measured
        ]
        return tuple(measured[index] for index in pareto(points))

    @cached_property
    def on_a_front(self) -> frozenset[int]:
        """Numbers of the rows on the front of decode speed, of size or of compute."""
        return frozenset(row.number for m in FRONTS for row in self.front(m))


def read(path: str | Path) -> Report:
    """The report of a results.json or of a run's folder.

    Raises:
        UserError: the results cannot be read.
    """
    return Report(load_results(path))


def pareto(points: Sequence[tuple[float, float]]) -> list[int]:
    """Indices of the points that none beats, both coordinates better when higher, left to right.

    Equal points stand or fall together.

    >>> pareto([(1, 3), (2, 2), (3, 1), (1, 1), (2, 2)])
    [0, 1, 4, 2]
    """
    order = sorted(range(len(points)), key=lambda i: (-points[i][0], -points[i][1]))
    front: list[int] = []
    highest, holder = -math.inf, (math.nan, math.nan)
    for index in order:
        x, y = points[index]
        if y > highest or (x, y) == holder:
            highest, holder = y, (x, y)
            front.append(index)
    return sorted(front, key=lambda i: points[i])
