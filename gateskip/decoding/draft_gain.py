"""What drafting is expected to bring, where the draft's own probabilities end drafts early.

A draft goes on while all of it is likely enough to be accepted, so its length differs from round to
round, and a mean acceptance rate says too little: sure tokens come in long drafts, unsure ones end
them. Drafted tokens are taken as independent, each from a bin of probability with a share and an
acceptance rate of its own.
"""

from __future__ import annotations

from collections.abc import Sequence

LEVELS = 16  # of a draft's acceptance: states that differ by less are one


def expected_rounds(
    shares: Sequence[float], accepted: Sequence[float], least: float, longest: int
) -> list[tuple[float, float]]:
    """(tokens a round yields, tokens it drafts) for limits of 0 to `longest` drafted tokens.

    `shares` and `accepted` are each bin's share of drafted tokens and acceptance rate; a draft ends
    once its acceptance, the product over its tokens, is `least` or lower.
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
                if whole > least:
                    place = round(whole * LEVELS)
                    following[place] = following.get(place, 0.0) + likely * share
        going = following
        rounds.append((tokens, drafted))
    return rounds
