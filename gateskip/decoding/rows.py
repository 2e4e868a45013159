"""Texts in the making: their tokens, their ends, and look-up in them."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

Tokens = list[int]
LENGTHS = (3, 2)  # of the n-grams that are looked up, the longer first


@dataclass(frozen=True)
class StopConditions:
    """Conditions that end a row."""

    tokens: frozenset[int]
    strings: tuple[str, ...]
    tokenizer: Any
    limit: int
    criteria: tuple[Any, ...] = ()
    """StoppingCriteria of transformers: (ids [1, S], None) -> bool [1]."""

    def reached(self, tokens: Tokens, text: Tokens) -> bool:
        """Whether a row of new tokens, the end of its text, ends here."""
        if len(tokens) >= self.limit or tokens[-1] in self.tokens:
            return True
        if self.criteria:
            ids = torch.tensor([text])
            if any(bool(ends(ids, None).all()) for ends in self.criteria):
                return True
        if not self.strings:
            return False
        longest = max(map(len, self.strings))
        tail = self.tokenizer.decode(tokens[-longest - 4 :])  # most tokens have a character or more
        return any(string in tail for string in self.strings)


class Row:
    """One text in the making."""

    def __init__(
        self,
        number: int,
        prompt: Tokens,
        stops: StopConditions,
        seed: int,
        on_token: Callable[[int, int], None] | None,
    ) -> None:
        self.number, self.prompt, self.stops, self.on_token = number, prompt, stops, on_token
        self.tokens: Tokens = []
        self.text = list(prompt)
        self.ended = False
        self.lookup = Lookup()
        self.state: Tensor | None = None  # final state [H] before the last token
        self.generator = torch.Generator().manual_seed(seed * 1_000_003 + number)

    def uniform(self) -> float:
        """A number from 0 to 1 from the row's random stream."""
        return float(self.uniforms(1))

    def uniforms(self, count: int) -> Tensor:
        """That many numbers from it [count]."""
        return torch.rand(count, generator=self.generator, dtype=torch.float64)

    @property
    def last(self) -> int:
        """The last committed token."""
        return self.text[-1]

    @property
    def slot(self) -> int:
        """Its position: it is in the text, but not yet in the cache."""
        return len(self.text) - 1

    def commit(self, tokens: Tokens) -> None:
        """Append tokens up to the first that ends the row."""
        for token in tokens:
            if self.ended:
                return
            self.tokens.append(token)
            self.text.append(token)
            self.ended = self.stops.reached(self.tokens, self.text)
            if self.on_token is not None:
                self.on_token(self.number, token)

    def commit_one(self, token: int) -> bool:
        """Append a token; whether the row ends with it."""
        self.commit([token])
        return self.ended


class Lookup:
    """Prompt look-up: proposes the tokens that followed the last tokens earlier in a text (Saxena
    2023).

    It computes nothing, and where a text repeats its prompt the proposal is often right. It stores
    where the n-grams of one growing text ended last, and reads each token once. Searching the text
    each time would take longer than a plain step of a small model once the text has some thousand
    tokens.
    """

    def __init__(self) -> None:
        self._ends: dict[tuple[int, ...], int] = {}
        self._read = 0  # n-grams that end up to here were read

    def propose(self, text: Sequence[int], count: int) -> list[int]:
        """Up to `count` tokens that followed the last earlier occurrence of the text's last n-gram.

        `text` is the text of the last call, or a longer one that begins with it.
        """
        for end in range(self._read + 1, len(text)):  # the last n-gram is followed by nothing yet
            for n in LENGTHS:
                if end >= n:
                    self._ends[tuple(text[end - n : end])] = end
        self._read = max(self._read, len(text) - 1)
        if count < 1:
            return []
        for n in LENGTHS:
            earlier = self._ends.get(tuple(text[-n:]))
            if earlier is not None:
                return list(text[earlier : earlier + count])
        return []
