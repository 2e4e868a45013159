"""Chooses how many tokens to draft, by the measured cost of drafting and by how much of it is
accepted."""

from __future__ import annotations

import statistics
from collections import deque
from collections.abc import Sequence

MAX_ROUNDS = 32
"""Most rounds in one native call. After some passes over all weights no cache holds the data that
Python needs, so that a call takes it about a millisecond: a third of a plain step of a small model
in 4 bits."""


LEVELS = 16  # of a draft's acceptance: states that differ by less are one


class DraftLengthController:
    """Chooses the draft length with the most expected tokens a second, by measured cost and
    acceptance.

    Drafts end early where they become unlikely. `expected_rounds` takes this into account, from the
    drafts so far. Until there are enough of them, and for drafts without probabilities, the
    acceptance rate a counts: k drafted tokens yield (1 - a^(k + 1)) / (1 - a) tokens a pass (arXiv
    2211.17192, equation 1) in the time of k draft steps and one verify pass. Length 0 is plain
    decoding; while it is best, drafting is tried again after ever longer pauses. A decoder keeps
    its controllers from one call to the next: the cost of speculation does not depend on the
    prompt.
    """

    LONGEST = 8
    TRIAL = 1  # tokens that a round of a trial drafts: what does not pay must cost little
    # Rounds of a trial. After a pause the first one finds the draft's weights and code in no cache:
    # by itself it takes much longer than drafting would, and drafts would never be begun again.
    # Where no draft is accepted they cost four times a draft step and a verified row: half a plain
    # step with a draft network, one and a half with a 4-bit copy of a bfloat16 model.
    TRIED = 4
    MARGIN = 1.02  # speculation must promise this much more than plain decoding
    PAUSE, LONGEST_PAUSE = 32, 512  # rounds
    FRESH = 48  # rounds of drafting after which plain steps are timed again, against drift
    TIMED = 2  # plain steps that are timed: in one call they cost less than one by one
    TOGETHER = 8  # rounds with a draft in one call
    BINS = 10  # of a drafted token's probability, each with an acceptance rate of its own
    KNOWN = 10  # drafted tokens after which the bins' shares are known well enough
    RENEW = 16  # rounds of drafting after which what drafts bring is expected anew

    def __init__(self) -> None:
        self.acceptance = 0.6
        # A draft's own probabilities are no acceptance rates: greedy tokens are accepted far more
        # often. So the rate of each bin is learned, starting from something in between.
        self.acceptance_by_bin = [0.5 + (n + 0.5) / 2 / self.BINS for n in range(self.BINS)]
        self.share_by_bin = [1.0] * self.BINS  # how often a token falls into each, not yet divided
        self.seen = 0  # drafted tokens of which the draft said how sure it is
        self.expected_rounds: list[tuple[float, float]] = []  # by limit; empty: to be made
        self.draft_step: float | None = None  # seconds
        self.plain: float | None = None
        self.per_row: float | None = None  # what one more row adds to a verify pass, seconds
        self._plain, self._draft_step, self._per_row = Recent(), Recent(), Recent()
        self.pause, self.wait = self.PAUSE, 0
        self.since_plain = 0  # rounds
        self.rounds_made = 0  # of drafting
        self.last = 0  # what `draft_length` said
        self.trying = False  # whether a trial has begun in which nothing was drafted yet

    def draft_length(self) -> int:
        """Tokens to draft next."""
        self.last = self._next()
        return self.last

    def rounds(self) -> int:
        """Most rounds until a length is chosen again."""
        if self.times_plain():
            return self.TIMED
        if self.last:
            return MAX_ROUNDS
        return max(1, self.pause - 1 - self.wait)

    def drafts(self) -> int:
        """Most rounds with a draft among them."""
        if self.trying:
            return self.TRIED
        return min(self.TOGETHER, self.FRESH - self.since_plain) if self.last else MAX_ROUNDS

    def times_plain(self) -> bool:
        """Whether plain steps are timed next."""
        return self.plain is None or self.since_plain >= self.FRESH

    def waited(self, rounds: int = 1) -> None:
        """Note that rounds went by without a draft of this controller."""
        if self.last == 0:
            self.wait += rounds

    def _next(self) -> int:
        if self.times_plain():
            return 0
        if self.draft_step is None or self.per_row is None:
            return self._try()
        best = max(range(self.LONGEST + 1), key=self._tokens_per_s)
        if best and self._tokens_per_s(best) > self.MARGIN * self._tokens_per_s(0):
            self.pause, self.trying = self.PAUSE, False
            return best
        if self.trying:
            return self._try()
        if self.wait < self.pause - 1:
            return 0
        self.wait, self.pause = 0, min(2 * self.pause, self.LONGEST_PAUSE)
        self.rounds_made = -1  # expect anew after it
        return self._try()

    def _try(self) -> int:
        """Draft a little, to measure its cost and acceptance; until a text proposes something."""
        self.trying = True
        return self.TRIAL

    def min_acceptance(self) -> float:
        """The probability that a whole draft is accepted below which one more token is not worth
        its cost: the cost of drafting and verifying it, over the plain step that it may save."""
        if self.plain is None or self.draft_step is None or self.per_row is None:
            return 0.0
        return (self.draft_step + self.per_row) / self.plain

    def expected(self, probability: float) -> float:
        """The probability that a drafted token is accepted, given the draft's probability of it."""
        return self.acceptance_by_bin[self._bin(probability)]

    def learn(self, probabilities: Sequence[float], accepted: int) -> None:
        """Update from a draft's tokens; those after the first rejected one carry no information."""
        for position, probability in enumerate(probabilities[: accepted + 1]):
            number = self._bin(probability)
            before = self.acceptance_by_bin[number]
            self.acceptance_by_bin[number] += 0.05 * ((position < accepted) - before)
            self.share_by_bin = [0.98 * share for share in self.share_by_bin]
            self.share_by_bin[number] += 1
            self.seen += 1

    def _bin(self, probability: float) -> int:
        return min(int(probability * self.BINS), self.BINS - 1)

    def _tokens_per_s(self, k: int) -> float:
        assert self.plain is not None
        if k == 0:
            return 1 / self.plain
        assert self.draft_step is not None and self.per_row is not None
        tokens, drafted = self._round(k)
        return tokens / (self.plain + drafted * (self.draft_step + self.per_row))

    def _round(self, k: int) -> tuple[float, float]:
        """Expected tokens that a round with a limit of k yields, and drafts."""
        if self.seen < self.KNOWN:  # or drafts do not say how sure they are: looked up
            a = min(self.acceptance, 0.99)
            return (1 - a ** (k + 1)) / (1 - a), k
        if not self.expected_rounds:
            total = sum(self.share_by_bin)
            shares = [share / total for share in self.share_by_bin]
            self.expected_rounds = expected_rounds(
                shares, self.acceptance_by_bin, self.min_acceptance(), self.LONGEST
            )
        return self.expected_rounds[k]

    def observe(
        self,
        count: int,
        accepted: Sequence[int],
        draft_s: float,
        verify_s: float,
        steps: int = 1,
    ) -> None:
        """Update from a round: `count` tokens drafted a row, and how many each row accepted; or,
        where none were drafted, from that many plain `steps`."""
        if count == 0:
            if not self.times_plain():
                self.waited(steps)
            self.plain, self.since_plain = self._plain.add(verify_s / steps), 0
            return
        self.trying = False
        self.since_plain += 1
        self.rounds_made += 1
        if self.rounds_made % self.RENEW == 0:
            self.expected_rounds = []
        self.draft_step = self._draft_step.add(draft_s / count)
        self.per_row = self._per_row.add(max(0.0, verify_s - (self.plain or verify_s)) / count)
        for right in accepted:
            tried = min(right + 1, count)  # drafts after the first rejected one say nothing
            for outcome in (1.0,) * right + (0.0,) * (tried - right):
                self.acceptance += 0.1 * (outcome - self.acceptance)


def expected_rounds(
    shares: Sequence[float], accepted: Sequence[float], min_acceptance: float, longest: int
) -> list[tuple[float, float]]:
    """(tokens a round yields, tokens it drafts) for limits of 0 to `longest` drafted tokens.

    A draft goes on while it is likely enough that all of it is accepted, so its length differs from
    round to round. A mean acceptance rate is not enough: sure tokens come in long drafts, unsure
    ones end them. Drafted tokens are taken as independent, each from a bin of probability with a
    share and an acceptance rate.

    `shares` and `accepted` are each bin's share of drafted tokens and acceptance rate. A draft ends
    once its acceptance, the product over its tokens, is `min_acceptance` or lower.
    """
    going = {LEVELS: 1.0}  # how likely the draft still goes on, by its acceptance
    tokens, drafted = 1.0, 0.0  # verifying yields one by itself
    rounds = [(tokens, drafted)]
    for _ in range(longest):
        following: dict[int, float] = {}
        for level, likely in going.items():
            drafted += likely
            for share, rate in zip(shares, accepted, strict=True):
                whole = rate * level / LEVELS
                tokens += likely * share * whole
                if whole > min_acceptance:
                    place = round(whole * LEVELS)
                    following[place] = following.get(place, 0.0) + likely * share
        going = following
        rounds.append((tokens, drafted))
    return rounds


class Recent:
    """The last few durations of something. The first one, and one during which the system did other
    work, are far too long; so the median counts, the lower one of two."""

    KEPT = 5

    def __init__(self) -> None:
        self._times = deque[float](maxlen=self.KEPT)

    def add(self, seconds: float) -> float:
        """Add a duration; returns their median."""
        self._times.append(seconds)
        return statistics.median_low(self._times)
