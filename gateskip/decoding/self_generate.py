"""Text that a model writes itself, for stages that need no other text.

A draft has to be right on the text of its model, so it is fitted to such text (self-generated data:
arXiv 2305.17888). A chat model gets its template up to the place of a user's words and continues
from there, first as the user and then as itself (arXiv 2406.08464). Any other model begins after
its first token.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, Protocol

import torch
from torch import Tensor

from gateskip.decoding.sampling import Sampler
from gateskip.decoding.stats import Generation

TOGETHER = 32  # rows written at a time
ANSWER = 160  # tokens of an answer, at most
SAMPLER = Sampler(temperature=0.8)
PLACE = "(what the user says)"


class Writer(Protocol):
    """The part of a Decoder that writes text."""

    tokenizer: Any

    def generate(
        self,
        prompts: Sequence[Sequence[int]],
        max_new_tokens: int,
        *,
        sampler: Sampler,
        seed: int,
        eos: Sequence[int] = (),
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
    """Token ids [count, length] of text that a decoder writes; every row begins with `opening`.

    Raises ValueError where a row has only its opening.
    """
    first = opening(decoder.tokenizer)
    if len(first) >= length:
        raise ValueError(
            f"a text of {length} tokens has no room after its opening ({len(first)} tokens)"
        )
    return go_on(decoder, torch.tensor([first] * count), length, seed, progress)


def go_on(
    decoder: Writer,
    given: Tensor,
    length: int,
    seed: int = 0,
    progress: Callable[[int, int], None] | None = None,
) -> Tensor:
    """Token ids [N, length] that begin as `given` [N, P], P < length, and that a decoder
    continues."""
    rows: list[list[int]] = []
    for some in given.split(TOGETHER):
        prompts = some.tolist()
        written = decoder.generate(
            prompts, length - given.shape[1], sampler=SAMPLER, seed=seed * 1_000_003 + len(rows)
        )
        rows += [[*prompt, *row] for prompt, row in zip(prompts, written.tokens, strict=True)]
        if progress is not None:
            progress(len(rows), len(given))
    return torch.tensor(rows)


def answer(
    decoder: Writer,
    prompts: Sequence[str],
    count: int,
    length: int,
    seed: int = 0,
    progress: Callable[[int, int], None] | None = None,
) -> Tensor:
    """Token ids [N, length], N at most `count`, of prompts and a decoder's answers, end to end.

    A prompt is put into the tokenizer's chat template where there is one. An answer ends at the
    end-of-text token, or after ANSWER tokens. The rest at the end that fills no block is dropped.

    Raises ValueError where all answers together do not fill one block.
    """
    stream: list[int] = []
    end = getattr(decoder.tokenizer, "eos_token_id", None)
    stops = [] if end is None else [end]
    for start in range(0, len(prompts), TOGETHER):
        some = [asked_ids(decoder.tokenizer, text) for text in prompts[start : start + TOGETHER]]
        written = decoder.generate(
            some, ANSWER, sampler=SAMPLER, seed=seed * 1_000_003 + start, eos=stops
        )
        for prompt, answered in zip(some, written.tokens, strict=True):
            closing = stops if answered[-1:] != stops else []
            stream += [*prompt, *answered, *closing]
        if progress is not None:
            progress(min(count, len(stream) // length), count)
        if len(stream) >= count * length:
            break
    whole = min(count, len(stream) // length)
    if whole == 0:
        raise ValueError(f"answers to {len(prompts)} prompts do not fill a block of {length}")
    return torch.tensor(stream[: whole * length]).view(whole, length)


def ask(
    decoder: Writer, count: int, length: int, stops: Sequence[int], seed: int = 0
) -> list[list[int]]:
    """Token ids of `count` chats up to the place where an answer begins. The decoder, whose
    tokenizer has a chat template, writes the user's message in at most `length` tokens."""
    tokenizer, first = decoder.tokenizer, opening(decoder.tokenizer)
    prompts: list[list[int]] = []
    while len(prompts) < count:
        some = [first] * min(TOGETHER, count - len(prompts))
        drawn = seed * 1_000_003 + len(prompts)
        written = decoder.generate(some, length, sampler=SAMPLER, seed=drawn, eos=stops)
        words = (tokenizer.decode(ids, skip_special_tokens=True).strip() for ids in written.tokens)
        prompts += [asked_ids(tokenizer, text) for text in words]
    return prompts


def asked_ids(tokenizer: Any, prompt: str) -> list[int]:
    """Token ids of a prompt, up to the place where its answer begins."""
    if getattr(tokenizer, "chat_template", None):
        turn = [{"role": "user", "content": prompt}]
        prompt = tokenizer.apply_chat_template(turn, tokenize=False, add_generation_prompt=True)
        ids: list[int] = tokenizer(prompt, add_special_tokens=False)["input_ids"]
        return ids
    return list(tokenizer(prompt + "\n")["input_ids"])


def opening(tokenizer: Any) -> list[int]:
    """The beginning of every text of this model: a chat up to the user's words, or one token."""
    if getattr(tokenizer, "chat_template", None):
        chat = tokenizer.apply_chat_template([{"role": "user", "content": PLACE}], tokenize=False)
        before, place, _ = chat.partition(PLACE)
        ids: list[int] = tokenizer(before, add_special_tokens=False)["input_ids"]
        if place and ids:
            return ids
    first = getattr(tokenizer, "bos_token_id", None)
    return [0 if first is None else first]
