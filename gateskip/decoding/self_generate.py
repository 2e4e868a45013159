"""Text that a model writes itself: what to learn from where no other text is at hand, or wanted.

A draft has to be right on what its model says, so that is the text to fit it to (self-generated
data: arXiv 2305.17888). A chat model is given its template up to the place of a user's words and
goes on from there, first as the user and then as itself (arXiv 2406.08464); any other model begins
after its first token.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, Protocol

import torch
from torch import Tensor

from gateskip.decoding.sampling import Sampler
from gateskip.decoding.stats import Generation

TOGETHER = 32  # rows written at a time
SAMPLER = Sampler(temperature=0.8)
PLACE = "(what the user says)"


class Writer(Protocol):
    """What text is written with: a Decoder."""

    tokenizer: Any

    def generate(
        self, prompts: Sequence[Sequence[int]], max_new_tokens: int, *, sampler: Sampler, seed: int
    ) -> Generation:
        """Continue prompts (token ids, one list a row)."""
        ...


def write(
    decoder: Writer,
    count: int,
    length: int,
    seed: int = 0,
    progress: Callable[[int, int], None] | None = None,
) -> Tensor:
    """Token ids [count, length] of a decoder's own text; every row begins with `opening`.

    Raises ValueError where a row holds no more than its opening.
    """
    first = opening(decoder.tokenizer)
    if len(first) >= length:
        raise ValueError(f"a text of {length} tokens ends before its opening of {len(first)}")
    rows: list[list[int]] = []
    while len(rows) < count:
        some = [first] * min(TOGETHER, count - len(rows))
        found = decoder.generate(
            some, length - len(first), sampler=SAMPLER, seed=seed * 1_000_003 + len(rows)
        )
        rows += [[*first, *row] for row in found.tokens]
        if progress is not None:
            progress(len(rows), count)
    return torch.tensor(rows)


def opening(tokenizer: Any) -> list[int]:
    """What every text of this model begins with: a chat up to the user's words, or one token."""
    if getattr(tokenizer, "chat_template", None):
        chat = tokenizer.apply_chat_template([{"role": "user", "content": PLACE}], tokenize=False)
        before, found, _ = chat.partition(PLACE)
        ids: list[int] = tokenizer(before, add_special_tokens=False)["input_ids"]
        if found and ids:
            return ids
    first = getattr(tokenizer, "bos_token_id", None)
    return [0 if first is None else first]
