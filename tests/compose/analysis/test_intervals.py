"""Intervals: against ones worked by hand, and their coverage and power where the truth is known."""

from __future__ import annotations

import itertools
import math
import statistics

import numpy as np
import pytest

from compose.analysis.intervals import (
    exp_mean_ratio,
    mean_interval,
    mean_of_ratios,
    paired_ratio,
    paired_speed_ratio,
    ratio_of_sums,
    wilson,
)

T4 = 2.776445
"""Student's t at 97.5 % with 4 degrees of freedom, from a table."""


def test_speed_ratio_worked_by_hand() -> None:
    """Logs of the ratios are 0.1, 0.2, 0.3, 0.4 and 0.5: mean 0.3, variance 0.025."""
    base = [100.0, 90.0, 120.0, 80.0, 100.0]
    own = [
        value * math.exp(log) for value, log in zip(base, (0.1, 0.2, 0.3, 0.4, 0.5), strict=True)
    ]
    found = paired_speed_ratio(own, base)
    assert found is not None
    half = T4 * math.sqrt(0.025 / 5)
    assert found.value == pytest.approx(math.exp(0.3))
    assert found.ci95 == pytest.approx((math.exp(0.3 - half), math.exp(0.3 + half)), rel=1e-5)
    assert (found.n, found.different) == (5, True)


def test_drift_of_the_machine_cancels_in_pairs() -> None:
    """A machine that halves its speed between rounds: the ratio is 1.1 in each of them."""
    found = paired_speed_ratio([110.0, 55.0, 220.0], [100.0, 50.0, 200.0])
    assert found is not None
    assert found.ci95 == pytest.approx((1.1, 1.1))


def test_perplexity_ratio_worked_by_hand() -> None:
    """Losses of five blocks differ by 0.01 to 0.05: exp of the mean, t on the differences."""
    base = [2.0, 2.5, 3.0, 2.2, 2.8]
    own = [loss + more for loss, more in zip(base, (0.01, 0.02, 0.03, 0.04, 0.05), strict=True)]
    found = exp_mean_ratio(own, base)
    assert found is not None
    half = T4 * math.sqrt(0.00025 / 5)
    assert found.value == pytest.approx(math.exp(0.03))
    assert found.ci95 == pytest.approx((math.exp(0.03 - half), math.exp(0.03 + half)), rel=1e-6)
    assert found.different


def test_mean_worked_by_hand() -> None:
    found = mean_interval([1.0, 2.0, 3.0, 4.0, 5.0])
    assert found is not None
    half = T4 * math.sqrt(2.5 / 5)
    assert (found.value, found.different) == (3.0, None)
    assert found.ci95 == pytest.approx((3 - half, 3 + half), rel=1e-6)


def test_ratio_of_sums_worked_by_hand() -> None:
    """20 of 50; residuals 0.4, -1.2, 1.6, 0.8 and -1.6 of which the squares sum to 7.36."""
    found = ratio_of_sums([6.0, 2.0, 4.0, 6.0, 2.0], [14.0, 8.0, 6.0, 13.0, 9.0])
    assert found is not None
    half = T4 * math.sqrt(5 / 4 * 7.36) / 50
    assert (found.value, found.n, found.different) == (0.4, 5, None)
    assert found.ci95 == pytest.approx((0.4 - half, 0.4 + half), rel=1e-6)
    sure = ratio_of_sums([9.0, 10.0, 4.0], [10.0, 10.0, 5.0], most=1.0)
    assert sure is not None and sure.high == 1.0
    assert ratio_of_sums([4.0, 3.0, 0.0], [4.0, 3.0, 0.0]) is None, (
        "seven of seven are not certainty"
    )
    assert ratio_of_sums([1.0], [2.0]) is None and ratio_of_sums([0.0] * 3, [0.0] * 3) is None


def test_coverage_of_accepted_drafts() -> None:
    """16 prompts of 40 to 80 drafted tokens, each with an acceptance of its own around 0.6: tokens
    as if each were drawn by itself would have an interval half as wide, which holds 0.6 too
    seldom."""
    draw = np.random.default_rng(16)
    held = tokens_alone = 0
    for _ in range(1000):
        drafted = draw.integers(40, 81, 16)
        accepted = draw.binomial(drafted, draw.beta(6, 4, 16))
        found = ratio_of_sums(accepted.tolist(), drafted.tolist(), most=1.0)
        assert found is not None
        held += found.low <= 0.6 <= found.high
        low, high = wilson(found.value, int(drafted.sum()))
        tokens_alone += low <= 0.6 <= high
    assert held / 1000 >= 0.93
    assert tokens_alone / 1000 < 0.75


def test_paired_ratio_is_the_bootstrap_of_all_resamples() -> None:
    """Two questions and the two added pairs: all 4^4 resamples are counted instead of drawn."""
    own, base = [1.0, 0.0], [1.0, 1.0]
    pairs = [*zip(own, base, strict=True), (1.0, 0.0), (0.0, 1.0)]
    ratios = []
    for drawn in itertools.product(pairs, repeat=4):
        right, theirs = (sum(column) for column in zip(*drawn, strict=True))
        ratios.append(right / theirs if theirs else math.inf)
    assert sum(math.isinf(ratio) for ratio in ratios) == 1, "of 256: only where no base is drawn"
    assert np.quantile(ratios, 0.025) == 0.0
    found = paired_ratio(own, base)
    assert found is not None
    assert (found.value, found.n) == (0.5, 2)
    assert (found.low, found.high) == pytest.approx(
        (np.quantile(ratios, 0.025), np.quantile(ratios, 0.975))
    )


def test_what_has_no_ratio() -> None:
    assert paired_ratio([], []) is None
    assert paired_ratio([1.0, 1.0], [0.0, 0.0]) is None, "nothing is a share of no right answer"
    assert mean_of_ratios([([1.0], [1.0]), ([0.0], [0.0])]) is None
    assert paired_speed_ratio([1.0], [1.0]) is None, "one round has no spread"
    assert exp_mean_ratio([1.0], [1.0]) is None
    assert mean_interval([1.0]) is None
    assert wilson(0.0, 0) == (0.0, 1.0)
    with pytest.raises(AssertionError, match="same questions"):
        paired_ratio([1.0], [1.0, 0.0])


def test_the_mean_over_tasks_is_of_ratios_not_of_questions() -> None:
    """A task of 400 questions at 0.5 and one of 100 at 1.0 of the baseline: 0.75 of it."""
    large = [1.0, 0.0] * 200, [1.0] * 400
    small = [1.0] * 100, [1.0] * 100
    found = mean_of_ratios([large, small])
    assert found is not None
    assert (found.value, found.n) == (0.75, 500)
    alone = paired_ratio(*large)
    assert alone is not None
    assert found.high - found.low < alone.high - alone.low, "half of the mean is nearly certain"


def test_the_same_outcomes_give_the_same_interval() -> None:
    draw = np.random.default_rng(3)
    own, base = (draw.integers(0, 2, 300).astype(float).tolist() for _ in range(2))
    assert paired_ratio(own, base) == paired_ratio(own, base)


def test_four_questions_lost_of_200_are_no_difference() -> None:
    """An exact sign test says so too: four of four on one side have p = 1/8."""
    base = [1.0] * 80 + [0.0] * 120
    four, ten = ([0.0] * lost + [1.0] * (80 - lost) + [0.0] * 120 for lost in (4, 10))
    assert not paired_ratio(four, base).different  # type: ignore[union-attr]
    assert paired_ratio(ten, base).different  # type: ignore[union-attr]


@pytest.mark.parametrize("rounds", [5, 8, 20])
def test_coverage_and_power_of_speed_ratios(rounds: int) -> None:
    """1.5 % of noise a repeat, 5 % of drift a round: 93 % and more of the intervals hold the
    truth, and a speed that is 5 % lower is called different nearly always."""
    draw = np.random.default_rng(rounds)
    held = told = 0
    for _ in range(600):
        drift = draw.normal(0, 0.05, rounds)
        own, base = np.exp(draw.normal(0, 0.015, (2, rounds)) + drift)
        same, slower = paired_speed_ratio(own, base), paired_speed_ratio(0.95 * own, base)
        assert same is not None and slower is not None
        held += not same.different
        told += bool(slower.different)
    assert held / 600 >= 0.93
    assert told / 600 >= 0.95


@pytest.mark.parametrize(
    ("questions", "right", "lost", "won"),
    [(200, 0.3, 0.1, 0.02), (200, 0.6, 0.0, 0.0), (500, 0.5, 0.04, 0.04), (500, 0.5, 0.2, 0.05)],
)
def test_coverage_of_shares_retained(questions: int, right: float, lost: float, won: float) -> None:
    """Answers that are lost and won at known rates: 93 % and more of the intervals hold it."""
    draw = np.random.default_rng(5)
    truth = (right * (1 - lost) + (1 - right) * won) / right
    held = 0
    for _ in range(300):
        base = draw.random(questions) < right
        own = np.where(base, draw.random(questions) >= lost, draw.random(questions) < won)
        found = paired_ratio(own.astype(float), base.astype(float))
        assert found is not None
        held += found.low <= truth <= found.high
    assert held / 300 >= 0.93


@pytest.mark.parametrize("blocks", [4, 16])
def test_coverage_of_perplexity_ratios(blocks: int) -> None:
    """A bootstrap of four blocks covers 80 %; Student's t is honest there too."""
    draw = np.random.default_rng(blocks)
    truth, held = math.exp(0.1), []
    for _ in range(600):
        found = exp_mean_ratio(draw.normal(0.1, 0.05, blocks), np.zeros(blocks))
        assert found is not None
        held.append(found.low <= truth <= found.high)
    assert statistics.mean(held) >= 0.93


def test_wilson_worked_by_hand() -> None:
    """9 of 25: centre (0.36 + z^2/50) / (1 + z^2/25), from the formula with z = 1.959964."""
    z2 = 1.959964**2
    centre = (0.36 + z2 / 50) / (1 + z2 / 25)
    half = math.sqrt(z2 * (0.36 * 0.64 / 25 + z2 / 2500)) / (1 + z2 / 25)
    assert wilson(0.36, 25) == pytest.approx((centre - half, centre + half), rel=1e-5)
