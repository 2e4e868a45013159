"""Choosing the cell to ship: the best by one aim among those that meet every constraint."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from compose.errors import UserError, suggest
from compose.results.metrics import METRICS, metric_of
from compose.results.schema import CellResult, Results
from compose.units import bytes_text

AIMS = (
    "decode",
    "prefill",
    "ttft",
    "size",
    "resident",
    "peak",
    "retained",
    "accuracy",
    "perplexity",
    "agreement",
    "saved",
)
"""Metrics that may be aimed for; each knows whether higher or lower is better."""

TIE_BREAKS = ("retained", "agreement", "decode", "size")
NOT_MEASURED = 10.0  # how far off a cell counts that lacks the number; worse than any near miss


@dataclass(frozen=True)
class Constraint:
    """A bound on one number of a cell."""

    words: str
    option: str
    value: Callable[[CellResult], float | None]
    limit: float
    at_least: bool
    show: Callable[[float], str]

    def shortfall(self, cell: CellResult) -> float:
        """How far the cell misses the bound, relative to it; 0 when it is met."""
        value = self.value(cell)
        if value is None:
            return NOT_MEASURED
        missing = self.limit - value if self.at_least else value - self.limit
        return max(0.0, missing / abs(self.limit)) if self.limit else max(0.0, missing)

    @property
    def remedy(self) -> str:
        """What lets more cells through."""
        return f"loosen {self.option}"

    def required(self) -> str:
        """The bound in words."""
        return f"{self.words} {'>=' if self.at_least else '<='} {self.show(self.limit)}"

    def seen(self, cell: CellResult) -> str:
        """The cell's number in words."""
        value = self.value(cell)
        return f"{self.words} {'not measured' if value is None else self.show(value)}"


@dataclass(frozen=True)
class Lossless:
    """A cell that speculates must have been seen to give plain decoding's tokens."""

    remedy: str = "pass --no-require-lossless"

    def shortfall(self, cell: CellResult) -> float:
        """0 when the cell does not speculate or is lossless."""
        lossless = None if cell.lossless_check is None else cell.lossless_check.lossless
        if not cell.speculates or lossless:
            return 0.0
        return NOT_MEASURED if lossless is None else 1.0

    def required(self) -> str:
        """The bound in words."""
        return "lossless speculation"

    def seen(self, cell: CellResult) -> str:
        """What was seen of the cell."""
        if not cell.speculates:
            return "no speculation"
        words = {True: "lossless", False: "not lossless", None: "losslessness not measured"}
        return words[None if cell.lossless_check is None else cell.lossless_check.lossless]


def pick(
    results: Results,
    *,
    min_retained: float | None = None,
    max_perplexity_ratio: float | None = None,
    max_bytes: float | None = None,
    max_resident: float | None = None,
    require_lossless: bool = True,
    maximize: str = "decode",
) -> CellResult:
    """The best measured cell by `maximize` (one of `AIMS`) among those that meet all constraints.

    `min_retained` is a share of the baseline's quality, 0 to 1 (`metrics.retained_basis` says of
    what); sizes are in bytes. The baseline may win. Ties are broken by quality, speed,
    size and at last by their place in the results.

    Raises:
        UserError: unknown aim, nothing measured, or no cell meets the constraints; the message
            says which of them left none and which cell comes nearest.
    """
    aim = maximize.replace("_", "-")
    if aim not in AIMS:
        raise UserError(f"cannot maximize {maximize!r}", fix=suggest(maximize, AIMS))
    cells = [cell for cell in results.measured if metric_of(results, aim, cell) is not None]
    if not cells:
        raise UserError(
            f"no cell of run {results.run!r} has {METRICS[aim].title} measured",
            fix="aim for what the run measured, or measure it with the pipeline's `benchmark`",
        )
    bounds = _bounds(results, min_retained, max_perplexity_ratio, max_bytes, max_resident)
    constraints: list[Constraint | Lossless] = [
        *bounds,
        *([Lossless()] if require_lossless else []),
    ]
    fit = [cell for cell in cells if not any(each.shortfall(cell) for each in constraints)]
    if not fit:
        raise _nothing_left(results, cells, constraints, aim)
    return max(fit, key=lambda cell: _rank(results, cell, aim))


def _bounds(
    results: Results,
    min_retained: float | None,
    max_perplexity_ratio: float | None,
    max_bytes: float | None,
    max_resident: float | None,
) -> list[Constraint]:
    rows = [
        ("retained", "retained", "--min-retained", min_retained, True, "{:.3f}".format),
        (
            "perplexity-ratio",
            "perplexity ratio",
            "--max-perplexity-ratio",
            max_perplexity_ratio,
            False,
            "{:.3f}".format,
        ),
        ("size", "disk", "--max-bytes", max_bytes, False, bytes_text),
        ("resident", "memory", "--max-resident", max_resident, False, bytes_text),
    ]
    return [
        Constraint(words, option, _reader(results, metric), limit, at_least, show)
        for metric, words, option, limit, at_least, show in rows
        if limit is not None
    ]


def _reader(results: Results, metric: str) -> Callable[[CellResult], float | None]:
    return lambda cell: metric_of(results, metric, cell)


def _rank(results: Results, cell: CellResult, aim: str) -> tuple[float, ...]:
    """Higher is better; a number that is missing comes last."""
    values = [(name, metric_of(results, name, cell)) for name in (aim, *TIE_BREAKS)]
    return tuple(float("-inf") if v is None else METRICS[name].rank(v) for name, v in values)


def _nothing_left(
    results: Results, cells: list[CellResult], constraints: list[Constraint | Lossless], aim: str
) -> UserError:
    left = [(each, sum(not each.shortfall(cell) for cell in cells)) for each in constraints]
    unmet = [each for each, count in left if count == 0]
    if unmet:
        which = " and ".join(each.required() for each in unmet)
        message = f"no cell meets {which} ({len(cells)} were measured)"
    else:
        alone = ", ".join(f"{each.required()} by {count}" for each, count in left)
        message = f"no cell meets every constraint; alone, of {len(cells)} cells: {alone}"
    nearest = min(
        cells,
        key=lambda cell: (
            sum(each.shortfall(cell) for each in constraints),
            [-rank for rank in _rank(results, cell, aim)],
        ),
    )
    missed = [each for each in constraints if each.shortfall(nearest)]
    values = ", ".join(each.seen(nearest) for each in missed)
    return UserError(
        f"{message}; the nearest is {nearest.name!r}: {values}",
        fix=", ".join(each.remedy for each in missed),
    )
