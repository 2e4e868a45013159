"""Choosing the cell to ship: the best by one aim among those that meet every constraint."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

from compose.analysis.intervals import MIN_QUESTIONS
from compose.analysis.metrics import METRICS, interval_of, metric_of, retained_basis
from compose.analysis.verdicts import gives_baselines_predictions, question_count, too_few
from compose.errors import UserError, suggest
from compose.numbers import bytes_text, three_decimals
from compose.results.schema import CellResult, Results

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
    "kl",
    "agreement",
    "saved",
)
"""Metrics that may be aimed for; each knows whether higher or lower is better."""

MINIMIZED = tuple(name for name in AIMS if METRICS[name].better == "lower")
"""The aims of which less is better."""

TIE_BREAKS = ("retained", "agreement", "decode", "size")
NOT_MEASURED = 10.0  # shortfall of a cell that lacks the number; worse than any near miss


@dataclass(frozen=True)
class Constraint:
    """A bound on one number of a cell; for quality, on the worse end of its interval."""

    words: str
    option: str
    value: Callable[[CellResult], float | None]
    limit: float
    at_least: bool
    show: Callable[[float], str]
    unknown: Callable[[CellResult], str] = lambda cell: "not measured"
    """Why a cell has no such number."""

    def shortfall(self, cell: CellResult) -> float:
        """How far the cell misses the bound, relative to it; 0 when it is met."""
        value = self.value(cell)
        if value is None:
            return NOT_MEASURED
        missing = self.limit - value if self.at_least else value - self.limit
        return max(0.0, missing / abs(self.limit)) if self.limit else max(0.0, missing)

    @property
    def remedy(self) -> str:
        """The option that lets more cells through."""
        return f"loosen {self.option}"

    def required(self) -> str:
        """The bound in words."""
        return f"{self.words} {'>=' if self.at_least else '<='} {self.show(self.limit)}"

    def seen(self, cell: CellResult) -> str:
        """The cell's number in words."""
        value = self.value(cell)
        return f"{self.words} {self.unknown(cell) if value is None else self.show(value)}"


@dataclass(frozen=True)
class Lossless:
    """A cell that speculates must have passed the lossless check."""

    remedy: str = "pass --no-require-lossless"

    def shortfall(self, cell: CellResult) -> float:
        """0 when the cell does not speculate or is lossless."""
        lossless = None if cell.lossless_check is None else cell.lossless_check.lossless
        if not cell.speculates or lossless:
            return 0.0
        return NOT_MEASURED if lossless is None else 1.0

    def required(self) -> str:
        """The bound in words."""
        return "lossless drafts"

    def seen(self, cell: CellResult) -> str:
        """The cell's losslessness in words."""
        if not cell.speculates:
            return "no drafts"
        words = {True: "lossless", False: "not lossless", None: "lossless check not made"}
        return words[None if cell.lossless_check is None else cell.lossless_check.lossless]


def aim_of(maximize: str | None, minimize: str | None) -> str:
    """The metric to aim for. `maximize` also takes those of which less is better, as it always did.

    Raises:
        UserError: both are given, or there is no such aim.
    """
    if maximize is not None and minimize is not None:
        raise UserError("two aims are given", fix="pass --maximize or --minimize, not both")
    if minimize is not None:
        verb, name, able = "minimize", minimize, MINIMIZED
    else:
        verb, name, able = "maximize", maximize or "decode", AIMS
    aim = name.replace("_", "-")
    if aim not in able:
        raise UserError(f"cannot {verb} {name!r}", fix=suggest(name, able))
    return aim


def pick(
    results: Results,
    *,
    min_retained: float | None = None,
    max_perplexity_ratio: float | None = None,
    max_kl: float | None = None,
    max_bytes: float | None = None,
    max_resident: float | None = None,
    require_lossless: bool = True,
    by_estimate: bool = False,
    maximize: str | None = None,
    minimize: str | None = None,
    baseline: bool = True,
) -> CellResult:
    """The best measured cell by one aim of `AIMS` among those that meet all constraints.

    The aim is named by `maximize` or by `minimize` (`aim_of`), and is `decode` without either.

    `min_retained` is a share of the baseline's quality, 0 to 1 (`metrics.retained_basis` says of
    what), and bounds the lower end of the interval; `max_perplexity_ratio` and `max_kl` (nats a
    token from the baseline) bound the upper end. With `by_estimate` they bound the estimates
    themselves. Sizes are in bytes. Other engines are not picked; the baseline may be, unless
    `baseline` is False. Ties are broken by quality, speed, size and at last by their place in the
    results.

    Raises:
        UserError: unknown aim, nothing measured, no cell whose quality is known well enough for a
            bound, or no cell meets the constraints; the message says which of them left none and
            which cell comes nearest.
    """
    aim = aim_of(maximize, minimize)
    ours = [cell for cell in results.measured if cell.peer is None]
    if not baseline:
        ours = [cell for cell in ours if cell.name != results.baseline]
    cells = [cell for cell in ours if metric_of(results, aim, cell) is not None]
    if not cells:
        raise UserError(
            f"no variant of run {results.run!r} has a measurement of {METRICS[aim].title}",
            fix="choose a metric that the run measured, or measure this one (`benchmark`)",
        )
    of_quality = _quality_bounds(results, min_retained, max_perplexity_ratio, max_kl, by_estimate)
    for bound in of_quality:
        _require_evidence(results, cells, bound)
    constraints: list[Constraint | Lossless] = [
        *of_quality,
        *_size_bounds(results, max_bytes, max_resident),
        *([Lossless()] if require_lossless else []),
    ]
    fit = [cell for cell in cells if not any(bound.shortfall(cell) for bound in constraints)]
    if not fit:
        raise _nothing_left(results, cells, constraints, aim)
    return max(fit, key=lambda cell: _rank(results, cell, aim))


def retained_bound(results: Results, cell: CellResult) -> float | None:
    """The share of the baseline's quality that a cell keeps at least, at 95 % confidence.

    None where that is not known: too few questions, or outcomes that do not pair. The baseline, and
    a cell with its predictions, keeps all.
    """
    quality = results.quality(cell)
    if quality is None or retained_basis(results) is None or _is_refuted(cell):
        return None
    if gives_baselines_predictions(results, quality):
        return 1.0
    if retained_basis(results) == "tasks" and question_count(quality) < MIN_QUESTIONS:
        return None
    ends = interval_of(results, "retained", cell)
    return None if ends is None else ends[0]


def _is_refuted(cell: CellResult) -> bool:
    """Whether it speculates and its tokens differ from its plain cell's, so that its quality may,
    too."""
    return cell.lossless_check is not None and cell.lossless_check.lossless is False


def _ratio_bound(results: Results, cell: CellResult) -> float | None:
    """The perplexity ratio that a cell has at most, at 95 % confidence."""
    if metric_of(results, "perplexity-ratio", cell) is None or _is_refuted(cell):
        return None
    quality = results.quality(cell)
    if quality is not None and gives_baselines_predictions(results, quality):
        return 1.0
    ends = interval_of(results, "perplexity-ratio", cell)
    return None if ends is None else ends[1]


def _kl_bound(results: Results, cell: CellResult) -> float | None:
    """The mean KL to the baseline that a cell has at most, at 95 % confidence."""
    quality = results.quality(cell)
    if quality is None or _is_refuted(cell):
        return None
    if gives_baselines_predictions(results, quality):
        return 0.0
    ends = interval_of(results, "kl", cell)
    return None if ends is None else ends[1]


def _why_unknown(results: Results, cell: CellResult) -> str:
    quality = results.quality(cell)
    if quality is None:
        return "not measured"
    if _is_refuted(cell):
        return "unknown: drafts change its output"
    few = retained_basis(results) == "tasks" and question_count(quality) < MIN_QUESTIONS
    return f"unknown: {too_few(quality)}" if few else "unknown: no 95 % interval"


def _quality_bounds(
    results: Results,
    min_retained: float | None,
    max_ratio: float | None,
    max_kl: float | None,
    by_estimate: bool,
) -> list[Constraint]:
    show = three_decimals
    bounds = []
    if min_retained is not None:
        value = _reader(results, "retained") if by_estimate else partial(retained_bound, results)
        words = "retained" if by_estimate else "retained (at least)"
        why = partial(_why_unknown, results)
        bounds.append(Constraint(words, "--min-retained", value, min_retained, True, show, why))
    at_most = [
        (
            "perplexity-ratio",
            "perplexity ratio",
            "--at-most-perplexity-ratio",
            max_ratio,
            _ratio_bound,
        ),
        ("kl", "KL", "--at-most-kl", max_kl, _kl_bound),
    ]
    for metric, words, option, limit, upper in at_most:
        if limit is not None:
            value = _reader(results, metric) if by_estimate else partial(upper, results)
            words = words if by_estimate else f"{words} (at most)"
            bounds.append(Constraint(words, option, value, limit, False, show))
    return bounds


def _size_bounds(
    results: Results, max_bytes: float | None, max_resident: float | None
) -> list[Constraint]:
    rows = [
        ("size", "disk", "--at-most-mb", max_bytes),
        ("resident", "memory", "--at-most-memory-mb", max_resident),
    ]
    return [
        Constraint(words, option, _reader(results, metric), limit, False, bytes_text)
        for metric, words, option, limit in rows
        if limit is not None
    ]


def _require_evidence(results: Results, cells: list[CellResult], bound: Constraint) -> None:
    """Refuse a bound on quality where only the baseline's is known: there is nothing to choose
    from."""
    others = [cell for cell in cells if cell.name != results.baseline]
    if not others or any(bound.value(cell) is not None for cell in others):
        return
    estimates = [(metric_of(results, "retained", cell), cell) for cell in others]
    measured = [(value, cell) for value, cell in estimates if value is not None]
    near = ""
    if measured:
        value, cell = max(measured, key=lambda pair: pair[0])
        near = f"; the nearest by estimate is {cell.name!r}: retained {three_decimals(value)}"
    raise UserError(
        f"no evidence for {bound.required()}: {bound.unknown(others[0])}{near}",
        fix="ask more questions (benchmark.quality.limit), or pass --by-estimate",
    )


def _reader(results: Results, metric: str) -> Callable[[CellResult], float | None]:
    return lambda cell: metric_of(results, metric, cell)


def _rank(results: Results, cell: CellResult, aim: str) -> tuple[float, ...]:
    """Higher is better; a number that is missing comes last."""
    values = [(name, metric_of(results, name, cell)) for name in (aim, *TIE_BREAKS)]
    return tuple(float("-inf") if v is None else METRICS[name].rank(v) for name, v in values)


def _nothing_left(
    results: Results, cells: list[CellResult], constraints: list[Constraint | Lossless], aim: str
) -> UserError:
    left = [(bound, sum(not bound.shortfall(cell) for cell in cells)) for bound in constraints]
    unmet = [bound for bound, count in left if count == 0]
    if unmet:
        which = " and ".join(bound.required() for bound in unmet)
        message = f"no variant meets {which} ({len(cells)} were measured)"
    else:
        many = len(cells)
        alone = ", ".join(f"{count} of {many} meet {bound.required()}" for bound, count in left)
        message = f"no variant meets all limits together: {alone}"
    nearest = min(
        cells,
        key=lambda cell: (
            sum(bound.shortfall(cell) for bound in constraints),
            [-rank for rank in _rank(results, cell, aim)],
        ),
    )
    missed = [bound for bound in constraints if bound.shortfall(nearest)]
    values = ", ".join(bound.seen(nearest) for bound in missed)
    return UserError(
        f"{message}; the nearest is {nearest.name!r}: {values}",
        fix=", ".join(bound.remedy for bound in missed),
    )
