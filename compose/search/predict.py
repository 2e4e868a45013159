"""Predicts metrics of chains that were not measured: the effects of their choices, added up.

A KL to the baseline adds up over independent choices; so do the logarithms of ratios (speed,
perplexity, share retained, bytes). The effects are fitted to the measured chains by ridge
regression, in which an empty chain has no effect. A choice that was never measured gets the mean
effect of its siblings: the same stages with other values.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Iterable, Mapping

import numpy as np

from compose.language.schema import Chain
from compose.search.probes import Probe
from compose.search.space import Candidate, Space

RIDGE = 1e-3
"""Ridge penalty: so small that chains of one choice are predicted as measured."""

AS_THEY_ARE = ("kl",)
"""Metrics whose effects add up by themselves; those of all others do in logarithms."""

OVER_BASELINE = ("kl", "perplexity-ratio", "retained", "decode-ratio", "prefill-ratio")
"""Metrics that relate to the baseline, and so have no effect where nothing is chosen."""


class Effects:
    """The effects of choices on one metric, from probes of chains that have it."""

    def __init__(self, space: Space, metric: str, probes: Mapping[Chain, Probe]) -> None:
        self._space, self._metric = space, metric
        rows = [
            (candidate.choices, probes[candidate.chain].numbers[metric])
            for candidate in space.candidates
            if candidate.chain in probes and metric in probes[candidate.chain].numbers
        ]
        self._level = 0.0
        if metric not in OVER_BASELINE and rows:
            self._level = statistics.median(self._to(value) for _, value in rows)
        self._effects = _ridge(
            [(choices, self._to(value) - self._level) for choices, value in rows]
        )
        by_sibling: dict[Chain, list[float]] = {}
        for choice, effect in self._effects.items():
            by_sibling.setdefault(space.siblings(choice), []).append(effect)
        self._siblings = {base: statistics.mean(effects) for base, effects in by_sibling.items()}

    def predict(self, candidate: Candidate) -> float | None:
        """The predicted metric of a candidate; None where a choice is unknown."""
        total = self._level
        for choice in candidate.choices:
            effect = self._effects.get(choice, self._siblings.get(self._space.siblings(choice)))
            if effect is None:
                return None
            total += effect
        return total if self._metric in AS_THEY_ARE else math.exp(total)

    def _to(self, value: float) -> float:
        """A value on the scale on which effects add up."""
        return value if self._metric in AS_THEY_ARE else math.log(max(value, 1e-9))


def _ridge(rows: Iterable[tuple[tuple[Chain, ...], float]]) -> dict[Chain, float]:
    """Choice -> its effect: the least squares of sums of effects against the values."""
    measured = list(rows)
    names = list(dict.fromkeys(choice for choices, _ in measured for choice in choices))
    if not names:
        return {}
    place = {name: index for index, name in enumerate(names)}
    design = np.zeros((len(measured), len(names)))
    for row, (choices, _) in enumerate(measured):
        for choice in choices:
            design[row, place[choice]] = 1.0
    values = np.array([value for _, value in measured])
    normal = design.T @ design + RIDGE * np.eye(len(names))
    effects = np.linalg.solve(normal, design.T @ values)
    return {name: float(effects[index]) for name, index in place.items()}
