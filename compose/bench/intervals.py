"""Confidence intervals of what a benchmark counts."""

from __future__ import annotations


def wilson(share: float, n: int) -> tuple[float, float]:
    """Wilson's 95 % interval of a share that was seen in `n` trials.

    A share that is no whole number of successes, such as a group's mean, is rounded to the nearest.
    """
    if n == 0:
        return 0.0, 1.0
    from scipy.stats import binomtest

    interval = binomtest(round(share * n), n).proportion_ci(0.95, method="wilson")
    return float(interval.low), float(interval.high)
