"""95 % intervals of published numbers: shares, ratios of scores, of perplexities and of speeds.

Comparisons are paired wherever possible, because pairs carry less noise than groups: cells answer
the same questions, read the same blocks of text, and are timed in the same rounds.

| number | unit that is drawn anew | method |
|---|---|---|
| share of correct answers | question | Wilson's interval |
| score over the baseline's (`retained`) | question, both scores | bootstrap, percentiles |
| perplexity over the baseline's | block of 512 tokens, both losses | Student's t |
| mean KL | block, answer | Student's t |
| speed over the baseline's | round, both speeds | Student's t of the log ratios |
| accepted drafts, over drafted or passes | prompt, round | Student's t, linearized ratio |

The bootstrap draws `RESAMPLES` times from a fixed seed: the same outcomes give the same interval.
Its percentiles are too narrow for a handful of values (of four blocks, a nominal 95 % covers 80 %),
so numbers per block and per round get Student's t instead. A ratio of perplexities is exp of a mean
difference of losses, and the noise of speeds multiplies, so t is taken of logarithms in both.

Two pairs are added to the questions: one that only the cell has right, and one that only the
baseline has right (Agresti and Min 2005). Without them, four questions lost of 200 would already be
"different", which happens to equal cells one time in eight.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from functools import cache

import numpy as np
from numpy.typing import ArrayLike, NDArray

from compose.results.record import Estimate

RESAMPLES = 10_000
SEED = 20261126
MIN_QUESTIONS = 200
"""Questions below which tasks give no verdict: at 25, a share of 0.36 is 0.20 to 0.55."""

LEVEL = 0.95

Floats = NDArray[np.float64]


def wilson(share: float, n: int) -> tuple[float, float]:
    """Wilson's 95 % interval of a share that was seen in `n` trials.

    A share that is not a whole number of successes, such as a group's mean, is rounded to the
    nearest.
    """
    if n == 0:
        return 0.0, 1.0
    from scipy.stats import binomtest

    interval = binomtest(round(share * n), n).proportion_ci(LEVEL, method="wilson")
    return float(interval.low), float(interval.high)


def mean_interval(values: Sequence[float]) -> Estimate | None:
    """Mean of values (KL of blocks or answers) with Student's interval; None below two."""
    if len(values) < 2:
        return None
    mean, half = _mean_and_half(np.asarray(values, dtype=np.float64))
    return Estimate(value=mean, low=mean - half, high=mean + half, n=len(values))


def ratio_of_sums(
    parts: Sequence[float], wholes: Sequence[float], most: float = math.inf
) -> Estimate | None:
    """Sum of `parts` over sum of `wholes`, one pair a prompt or round, with Student's interval.

    Tokens of a prompt are correlated, so the prompt is the unit. The standard error is that of the
    ratio estimator (Cochran 1977, Sampling Techniques, section 6.3). The interval ends at 0 and at
    `most`. None below two pairs, where the wholes sum to 0, and where all pairs have one ratio, for
    example where all of a few drafts were accepted: such pairs do not show any spread.
    """
    pairs = _pairs(parts, wholes)
    n, total = len(pairs), float(pairs[:, 1].sum())
    if n < 2 or total <= 0:
        return None
    value = float(pairs[:, 0].sum()) / total
    residuals = pairs[:, 0] - value * pairs[:, 1]
    if np.allclose(residuals, 0.0):
        return None
    half = t_quantile(n) * math.sqrt(n / (n - 1) * float(residuals @ residuals)) / total
    return Estimate(value=value, low=max(value - half, 0.0), high=min(value + half, most), n=n)


def paired_ratio(scores: Sequence[float], base: Sequence[float]) -> Estimate | None:
    """Mean score over the baseline's mean score, both of the same questions in the same order.

    Scores are 0 to 1. None where there is no question, or the baseline has none right: the ratio or
    its interval is not finite then.
    """
    return mean_of_ratios([(scores, base)])


def mean_of_ratios(tasks: Sequence[tuple[Sequence[float], Sequence[float]]]) -> Estimate | None:
    """Mean over tasks of `paired_ratio`; each task's questions are drawn by themselves.

    `tasks` are pairs of the cell's and the baseline's scores. None where one task has no ratio.
    """
    values, draws, total = [], [], 0
    for number, (scores, base) in enumerate(tasks):
        pairs = _pairs(scores, base)  # [n, 2]
        if not len(pairs) or pairs[:, 1].sum() <= 0:
            return None
        values.append(float(pairs[:, 0].mean() / pairs[:, 1].mean()))
        means = _resampled_means(np.vstack([pairs, ONE_EACH]), SEED + number)
        with np.errstate(divide="ignore", invalid="ignore"):
            draws.append(means[:, 0] / means[:, 1])
        total += len(pairs)
    if not values:
        return None
    return _estimate(float(np.mean(values)), np.mean(draws, axis=0), total)


ONE_EACH: Floats = np.array([[1.0, 0.0], [0.0, 1.0]])
"""The two pairs that questions get in addition: see the top of this file."""


def exp_mean_ratio(losses: Sequence[float], base: Sequence[float]) -> Estimate | None:
    """Perplexity over the baseline's from mean losses (nats) of the same blocks; None below two."""
    return None if len(losses) < 2 else exp_t_interval(np.subtract(*_pairs(losses, base).T))


def paired_speed_ratio(speeds: Sequence[float], base: Sequence[float]) -> Estimate | None:
    """Speed over the baseline's from repeats of the same rounds, in the order of the rounds.

    The value is the geometric mean of the ratios round by round, the interval Student's t of their
    logarithms. None below two rounds.
    """
    logs = np.log(_pairs(speeds, base)) @ np.array([1.0, -1.0])
    return None if len(logs) < 2 else exp_t_interval(logs)


def exp_t_interval(logs: ArrayLike) -> Estimate:
    """exp of the mean of logarithms [n] with Student's 95 % interval, n at least 2."""
    values = np.asarray(logs, dtype=np.float64)
    mean, half = _mean_and_half(values)
    return _ratio(math.exp(mean), math.exp(mean - half), math.exp(mean + half), len(values))


@cache
def t_quantile(n: int) -> float:
    """Half the width of a 95 % interval of the mean of `n` values, in standard errors."""
    from scipy.stats import t

    return float(t.ppf(0.5 + LEVEL / 2, n - 1))


def _mean_and_half(values: Floats) -> tuple[float, float]:
    """The mean of at least two values and half of its 95 % interval."""
    error = float(values.std(ddof=1)) / math.sqrt(len(values))
    return float(values.mean()), t_quantile(len(values)) * error


def _pairs(values: Sequence[float], base: Sequence[float]) -> Floats:
    """Both as one array [n, 2]."""
    assert len(values) == len(base), "pairs need the same questions, blocks or rounds"
    return np.column_stack([np.asarray(values, np.float64), np.asarray(base, np.float64)])


def _resampled_means(rows: Floats, seed: int = SEED) -> Floats:
    """Means [RESAMPLES, k] of `rows` [n, k] drawn n times with replacement.

    Equal rows are drawn together, as one multinomial count: of right and wrong answers there are
    four kinds of pairs, whatever their number.
    """
    kinds, counts = np.unique(rows, axis=0, return_counts=True)
    n = len(rows)
    drawn = np.random.default_rng(seed).multinomial(n, counts / n, size=RESAMPLES)
    means: Floats = drawn @ kinds / n
    return means


def _estimate(value: float, draws: Floats, n: int) -> Estimate | None:
    """A ratio with the percentiles of its draws; None where an end is not finite."""
    with np.errstate(invalid="ignore"):  # between two infinite draws
        ends = np.quantile(draws, [(1 - LEVEL) / 2, (1 + LEVEL) / 2])
    if not np.isfinite(ends).all():
        return None
    return _ratio(value, float(ends[0]), float(ends[1]), n)


def _ratio(value: float, low: float, high: float, n: int) -> Estimate:
    return Estimate(value=value, low=low, high=high, n=n, different=not low <= 1 <= high)
