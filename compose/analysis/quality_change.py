"""Whether quality changed between two runs of a cell: one test each for accuracy and perplexity."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np
from numpy.typing import NDArray

from compose.analysis.intervals import LEVEL, ONE_EACH
from compose.analysis.relate import paired_blocks, paired_questions
from compose.results.parts import Estimate, Perplexity, TaskScore

SAME_PERPLEXITY = 0.001
"""Change of log perplexity that is never reported: another order of sums changes as much."""

EXACT_FLIPS = 16
"""Changed questions up to which all sign flips are counted; above, their sum is taken as normal."""


@dataclass
class Tested:
    """A change, and the numbers of its significance test."""

    value: float
    """Change of a logarithm, or of an accuracy; 0 means no change."""
    variance: float
    """Variance of one of the values whose mean it is."""
    per: float
    """Factor from `variance` to the variance of `value`, such as 1/n."""
    degrees: float
    """Degrees of freedom with which `variance` is known; infinite for z."""
    tolerance: float = 0.0
    """A change up to here counts as none."""
    exact_p: float | None = None
    """Probability by counting, where it was counted."""
    is_log: bool = True

    @cached_property
    def p(self) -> float:
        """Probability of so large a change by chance, both directions."""
        from scipy.stats import t

        if self.exact_p is not None:
            return self.exact_p
        beyond = abs(self.value) - self.tolerance
        if beyond <= 0:
            return 1.0
        error = math.sqrt(self.variance * self.per)
        return float(2 * t.sf(beyond / error, self.degrees)) if error else 0.0

    def effect(self) -> Estimate:
        """The change with its own 95 % interval: a ratio, or a difference of accuracies."""
        from scipy.stats import t

        half = float(t.ppf(0.5 + LEVEL / 2, self.degrees)) * math.sqrt(self.variance * self.per)
        low, high = self.value - half, self.value + half
        ends = [math.exp(end) if self.is_log else end for end in (self.value, low, high)]
        return Estimate(
            value=ends[0],
            low=ends[1],
            high=ends[2],
            n=max(1, round(1 / self.per)),
            different=not low <= 0 <= high,
        )


def perplexity_change(old: Perplexity, new: Perplexity) -> Tested | None:
    """Change of log perplexity on the same blocks; None where they are not the same."""
    losses = [np.array(perplexity.block_nll or ()) for perplexity in (old, new)]
    if not paired_blocks(new, old) or len(losses[1]) < 2:
        return None
    differences = losses[1] - losses[0]
    n = len(differences)
    variance = float(differences.var(ddof=1))
    return Tested(float(differences.mean()), variance, 1 / n, n - 1, tolerance=SAME_PERPLEXITY)


def accuracy_change(tasks: Sequence[tuple[TaskScore, TaskScore]]) -> Tested:
    """Change of the mean score over tasks, each pair the first run's outcomes and the second's.

    Paired where a task asked the same questions. If all did, the probability is that of as large a
    sum when each changed question had changed in either direction with equal chance.
    """
    value = variance = 0.0
    steps: list[NDArray[np.float64]] = []
    for old, new in tasks:
        before, after = np.array(old.outcomes), np.array(new.outcomes)
        value += float(after.mean() - before.mean())
        if paired_questions(new, old):
            padded = np.append(after - before, ONE_EACH @ [1.0, -1.0])
            variance += float(padded.var() / len(padded))
            steps.append((after - before)[after != before] / len(after))
        else:
            variance += float(before.var() / len(before) + after.var() / len(after))
    count = sum(len(new.outcomes or ()) for _, new in tasks)
    share = 1 / len(tasks)
    exact = sign_flip_p(np.concatenate(steps)) if len(steps) == len(tasks) else None
    return Tested(
        value=value * share,
        variance=variance * share**2 * count,
        per=1 / count,
        degrees=math.inf,
        exact_p=exact,
        is_log=False,
    )


def sign_flip_p(steps: NDArray[np.float64]) -> float:
    """Share of all ways to give `steps` [m] signs whose sum is as far from 0 as theirs."""
    steps = steps[steps != 0]
    if not len(steps):
        return 1.0
    total = abs(float(steps.sum()))
    if len(steps) > EXACT_FLIPS:
        return math.erfc(total / math.sqrt(2 * float((steps**2).sum())))
    ways = np.arange(2 ** len(steps))[:, None] >> np.arange(len(steps)) & 1  # [2^m, m]
    sums = np.abs((2 * ways - 1) @ steps)
    return float((sums >= total - 1e-12).mean())
