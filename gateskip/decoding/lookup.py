"""Prompt look-up: what followed the last tokens earlier in a text (Saxena 2023).

Nothing is computed, and where a text repeats its prompt the proposal is often right.
"""

from __future__ import annotations

from collections.abc import Sequence

LENGTHS = (3, 2)  # of the n-grams that are looked up, the longer first


class Lookup:
    """Where the n-grams of one growing text ended last; each token is read once.

    A search through the text takes longer than a plain step of a small model once the text has some
    thousand tokens.
    """

    def __init__(self) -> None:
        self._ends: dict[tuple[int, ...], int] = {}
        self._read = 0  # ends of n-grams up to here are known

    def propose(self, text: Sequence[int], count: int) -> list[int]:
        """Up to `count` tokens that followed the last earlier occurrence of the text's last n-gram.

        `text` is what it was at the last call, or longer.
        """
        for end in range(self._read + 1, len(text)):  # the last n-gram is followed by nothing yet
            for n in LENGTHS:
                if end >= n:
                    self._ends[tuple(text[end - n : end])] = end
        self._read = max(self._read, len(text) - 1)
        if count < 1:
            return []
        for n in LENGTHS:
            found = self._ends.get(tuple(text[-n:]))
            if found is not None:
                return list(text[found : found + count])
        return []
