"""The metrics of the GateSkip paper (arXiv 2510.13876), and the same metrics counted our way.

A *curve* is made of the cells that skip with the same weights at several budgets, and of the cell
of those weights that skips nothing. The paper counts as saved the mean over branches of the share
of tokens that skipped it, and compares a point with the curve's own first point. So it leaves out
the cost of gates and of the keys and values of skipped tokens, and the quality that was lost by
training the gates. Our way counts net multiply-adds, and compares with the dense model. Tasks whose
answers are written count the compute of their own prompts and answers, because the share that is
skipped differs between texts.

- *Saved @90 %*: the most saved by a measured point that keeps 90 % of the reference.
- *Accuracy at 0, 5, ... 60 %*: linear between neighbouring points, nothing beyond the outermost.
"""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from itertools import pairwise
from typing import Literal

from compose.results.parts import SkippingCurve, SkippingFigures, SkippingPoint
from compose.results.schema import CellResult, Results

REFERENCE_SHARE = 0.9
"""Share of the reference's accuracy that "saved @90 %" requires."""

PERCENTS = range(0, 65, 5)
"""Where accuracy is interpolated."""

Kind = Literal["generative", "likelihood", "all"]


def skipping_curves(results: Results) -> tuple[SkippingCurve, ...]:
    """The curves of a run, one for each family of cells and kind of tasks; none without tasks."""
    baseline = results.find(results.baseline)
    if baseline is None:
        return ()
    curves = []
    for weights, cells in _families(results).items():
        for kind, tasks in _tasks_by_kind(results, baseline).items():
            dense = _accuracy(results, baseline, tasks)
            measured = [c for c in cells if _accuracy(results, c, tasks) is not None]
            if dense is not None and any(map(_skips, measured)):
                curves.append(_curve(results, weights, kind, tasks, measured, dense))
    return tuple(curves)


def figures(points: Sequence[SkippingPoint], reference: float | None = None) -> SkippingFigures:
    """The figures of at least one point; without a reference, the first point is the reference."""
    ordered = tuple(sorted(points, key=lambda point: point.saved))
    whole = ordered[0].accuracy if reference is None else reference
    keeps = [point.saved for point in ordered if point.accuracy >= REFERENCE_SHARE * whole - 1e-9]
    at = {percent: _interpolated(ordered, percent / 100) for percent in PERCENTS}
    return SkippingFigures(
        points=ordered,
        reference=whole,
        saved_at_90=max(keeps, default=None),
        accuracy_at={percent: value for percent, value in at.items() if value is not None},
    )


def skipped_share(cell: CellResult) -> float | None:
    """Mean over branches of the share of tokens that skipped, as published; 0 for plain decoding.

    The text is read in blocks of one length, so the mean over forward calls is that over tokens.
    """
    if not _skips(cell):
        return 0.0
    entered = None if cell.compute is None else cell.compute.kept_shares
    return 1 - statistics.fmean(entered) if entered else None


def _curve(
    results: Results,
    weights: str,
    kind: Kind,
    tasks: tuple[str, ...],
    cells: Sequence[CellResult],
    dense: float,
) -> SkippingCurve:
    gross: list[SkippingPoint] = []
    net: list[SkippingPoint] = []
    for cell in cells:
        accuracy = _accuracy(results, cell, tasks)
        assert accuracy is not None, "cells without these tasks are left out before"
        for points, saved in (
            (gross, skipped_share(cell)),
            (net, _saved_net(results, cell, tasks)),
        ):
            if saved is not None:
                points.append(SkippingPoint(cell=cell.name, saved=saved, accuracy=accuracy))
    return SkippingCurve(
        weights=weights,
        kind=kind,
        tasks=tasks,
        published=figures(gross) if gross else None,
        ours=figures(net, dense) if net else None,
    )


def _families(results: Results) -> dict[str, list[CellResult]]:
    """Weights (a chain joined by `+`) -> its cells that skip, and the plain cell before them."""
    families: dict[str, list[CellResult]] = {}
    for cell in results.measured:
        if _skips(cell) and cell.chain:
            weights = "+".join(cell.chain[:-1]) or results.baseline
            if weights not in families:
                plain = results.find(cell.plain)
                families[weights] = [plain] if plain is not None and plain.status == "ok" else []
            families[weights].append(cell)
    return families


def _skips(cell: CellResult) -> bool:
    """Whether it decodes while it skips, and is scored so."""
    if cell.steps:
        return cell.steps[-1].use == "skip"
    return cell.compute is not None and cell.compute.kept_shares is not None


def _saved_net(results: Results, cell: CellResult, tasks: Sequence[str]) -> float | None:
    """Share saved on the tasks' own text where all of them have it, else on the running text."""
    quality = results.quality(cell)
    scores = {} if quality is None else quality.tasks or {}
    saved = [compute.saved_net for task in tasks if (compute := scores[task].compute) is not None]
    if saved and len(saved) == len(tasks):
        return statistics.fmean(saved)
    return None if cell.compute is None else cell.compute.saved_net


def _tasks_by_kind(results: Results, baseline: CellResult) -> dict[Kind, tuple[str, ...]]:
    quality = results.quality(baseline)
    scores = {} if quality is None else quality.tasks or {}
    if any(score.kind is None for score in scores.values()):
        return {"all": tuple(scores)}
    kinds: dict[Kind, tuple[str, ...]] = {}
    for name, score in scores.items():
        assert score.kind is not None
        kinds[score.kind] = (*kinds.get(score.kind, ()), name)
    return kinds


def _accuracy(results: Results, cell: CellResult, tasks: Sequence[str]) -> float | None:
    """Mean score of these tasks, or None where one is missing."""
    quality = results.quality(cell)
    scores = {} if quality is None else quality.tasks or {}
    values = [scores[name].value if name in scores else None for name in tasks]
    present = [value for value in values if value is not None]
    return statistics.fmean(present) if present and len(present) == len(tasks) else None


def _interpolated(points: Sequence[SkippingPoint], saved: float) -> float | None:
    """Accuracy at a share of compute saved, between points in the order of `saved`."""
    for left, right in pairwise(points):
        if left.saved <= saved <= right.saved and left.saved < right.saved:
            part = (saved - left.saved) / (right.saved - left.saved)
            return left.accuracy + part * (right.accuracy - left.accuracy)
    return next((point.accuracy for point in points if point.saved == saved), None)
