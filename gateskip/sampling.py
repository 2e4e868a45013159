"""Accept or refuse drafted tokens: pure functions of logits."""

from __future__ import annotations

from torch import Tensor


def accept_greedy(draft: list[int], target_logits: Tensor) -> tuple[int, int]:
    """How many drafted tokens the target agrees with, and the token that follows them.

    draft: K drafted ids; target_logits [K + 1, V], row i the target's prediction after i drafted
    tokens. The result is what decoding the target greedily would have given, token for token
    (speculative decoding, arXiv 2211.17192, algorithm 1 at temperature 0).
    """
    wanted = target_logits.argmax(-1).tolist()
    accepted = 0
    while accepted < len(draft) and draft[accepted] == wanted[accepted]:
        accepted += 1
    return accepted, wanted[accepted]
