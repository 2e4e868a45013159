"""Proposes the chains to measure next: first every choice once, then the most promising chains.

The order is the same for the same seed and the same numbers. A chain that is too large by its plan
alone is never proposed.
"""

from __future__ import annotations

import random
from collections.abc import Mapping, Sequence

from compose.analysis.metrics import METRICS
from compose.language.schema import Chain
from compose.search.predict import Effects
from compose.search.probes import OF_THE_BASELINE, Probe
from compose.search.space import Candidate, Space
from compose.search.target import Bound, Target

SIZE_SLACK = 1.05
"""Factor by which a plan's bytes may exceed a bound: gates, norms and headers are not in it."""

REACH = 1.5
"""A chain is proposed up to this multiple of a bound's distance from the baseline: effects only
nearly add up."""

LEAST_FOR_A_LOT = 4
"""Size of a batch from which on its last chain is drawn at random."""

GAIN = 1.05
"""Factor by which a chain may turn out better than predicted."""


def too_large(candidate: Candidate, target: Target) -> Bound | None:
    """The bound on bytes that a candidate breaks by its plan alone, or None."""
    size = candidate.predicted_bytes
    if size is None:
        return None
    bounds = target.bounds_of("size")
    return next((bound for bound in bounds if size > SIZE_SLACK * bound.limit), None)


class Proposer:
    """Proposes the candidates of a space in batches, from what was measured before."""

    def __init__(self, space: Space, target: Target, *, most: int, seed: int, best: int) -> None:
        """At most `most` are proposed; of more candidates than that, after each choice was seen,
        only those that may become one of the `best`."""
        self.space, self.target, self.most, self.best = space, target, most, best
        self.large = {
            candidate.chain: bound
            for candidate in space.candidates
            if (bound := too_large(candidate, target)) is not None
        }
        if len(self.large) == len(space.candidates):  # the smallest ones show how near the bound is
            sized = sorted(space.candidates, key=lambda candidate: candidate.predicted_bytes or 0)
            for candidate in sized[:best]:
                del self.large[candidate.chain]
        self.able = [
            candidate for candidate in space.candidates if candidate.chain not in self.large
        ]
        self.whole = len(self.able) <= most
        """Whether every candidate is measured, whatever its prediction."""
        lots = list(range(len(self.able)))
        random.Random(seed).shuffle(lots)
        self._lot = {candidate.chain: lot for candidate, lot in zip(self.able, lots, strict=True)}

    def propose(self, probes: Mapping[Chain, Probe], batch: int) -> list[Candidate]:
        """The next candidates, at most `batch`; none when the search has seen enough."""
        waiting = [candidate for candidate in self.able if candidate.chain not in probes]
        room = min(batch, self.most - len(probes))
        if not waiting or room < 1:
            return []
        if self.whole or len(probes) < self.most // 2:
            unseen = self._unseen(waiting, probes, room)
            if unseen:
                return unseen
        ranked = self._ranked(waiting, probes)
        if self.whole:
            first = [candidate for _, candidate in ranked]
            return [*first, *(candidate for candidate in waiting if candidate not in first)][:room]
        chosen = self._may_win(ranked, probes)[:room]
        rest = [candidate for candidate in waiting if candidate not in chosen]
        if rest and len(chosen) >= LEAST_FOR_A_LOT:  # it corrects the predictions
            chosen[-1] = min(rest, key=self._by_lot)
        return chosen

    def _by_lot(self, candidate: Candidate) -> int:
        return self._lot[candidate.chain]

    def _unseen(
        self, waiting: Sequence[Candidate], probes: Mapping[Chain, Probe], room: int
    ) -> list[Candidate]:
        """Short chains with a choice that no probe has, those without seen siblings first."""
        seen = {
            choice
            for candidate in self.space.candidates
            if candidate.chain in probes
            for choice in candidate.choices
        }
        chosen: list[Candidate] = []
        while len(chosen) < room:
            new = [candidate for candidate in waiting if not seen.issuperset(candidate.choices)]
            if not new:
                break
            related = {self.space.siblings(choice) for choice in seen}

            def order(candidate: Candidate, related: set[Chain] = related) -> tuple[int, int, int]:
                near = sum(self.space.siblings(choice) in related for choice in candidate.choices)
                return len(candidate.choices), near, self._by_lot(candidate)

            chosen.append(min(new, key=order))
            seen.update(chosen[-1].choices)
        return chosen

    def _ranked(
        self, waiting: Sequence[Candidate], probes: Mapping[Chain, Probe]
    ) -> list[tuple[float, Candidate]]:
        """Candidates that are predicted to come near every bound, with the aim's predicted value,
        the best first; candidates without a prediction come last."""
        limits = [
            (bound, Effects(self.space, bound.metric, probes)) for bound in self.target.bounds
        ]
        aim = Effects(self.space, self.target.metric, probes)
        metric = METRICS[self.target.metric]
        ranked = []
        for candidate in waiting:
            if not all(self._reaches(candidate, bound, effects) for bound, effects in limits):
                continue
            value = self._size_or(candidate, self.target.metric, aim)
            rank = float("-inf") if value is None else metric.rank(value)
            ranked.append((rank, candidate))
        return sorted(ranked, key=lambda pair: (-pair[0], self._by_lot(pair[1])))

    def _size_or(self, candidate: Candidate, metric: str, effects: Effects) -> float | None:
        """A predicted number: bytes as the plan has them, where it has."""
        if metric == "size" and candidate.predicted_bytes is not None:
            return float(candidate.predicted_bytes)
        return effects.predict(candidate)

    def _reaches(self, candidate: Candidate, bound: Bound, effects: Effects) -> bool:
        """Whether a candidate is predicted to come near a bound; unknown ones may."""
        value = self._size_or(candidate, bound.metric, effects)
        if value is None:
            return True
        if bound.metric == "size":
            return value <= SIZE_SLACK * bound.limit
        none = OF_THE_BASELINE[bound.metric]
        lost, allowed = abs(value - none), abs(bound.limit - none)
        better = value >= none if bound.at_least else value <= none
        return better or lost <= REACH * allowed

    def _may_win(
        self, ranked: Sequence[tuple[float, Candidate]], probes: Mapping[Chain, Probe]
    ) -> list[Candidate]:
        """The candidates that may surpass one of the best probes that surely meet the bounds."""
        sure = sorted(
            (
                self.target.rank(probe)
                for probe in probes.values()
                if probe.failure is None and self.target.standing(probe) == "met"
            ),
            reverse=True,
        )
        if len(sure) < self.best:
            return [candidate for _, candidate in ranked]
        least = sure[self.best - 1]
        return [
            candidate
            for rank, candidate in ranked
            if rank * (GAIN if rank > 0 else 1 / GAIN) > least
        ]
