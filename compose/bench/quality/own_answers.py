"""The dense model's greedy answers, and the distance of another cell from them.

The baseline writes an answer to each prompt and stores the final hidden states that predict its
tokens. Another cell is compared in two ways. First, it is teacher-forced along the same answers,
and KL(dense || cell) is taken at every token. Second, it answers the same prompts itself, and the
tokens that both answers share from the start are counted.

Both use the cell's decode settings: the prompt is prefilled and the answer's tokens are decoding
steps, with activations rounded and branches skipped as in generation.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate
from typing import Any, Protocol

import torch
from torch import Tensor

from compose.bench.quality.scored import Rows, Scored
from compose.bench.quality.text import Head, kl_rows, log_probs
from compose.errors import StepError
from compose.results.quality import common_prefix
from compose.units import Progress

BATCH = 8  # answers at once
SHOWN = 10  # of them, whose texts are kept


class AnsweringModel(Protocol):
    """A model that answers prompts, and can be teacher-forced along another model's answers."""

    def generate(self, prompts: Rows, new_tokens: int, stop_tokens: Sequence[int]) -> Rows:
        """Greedy answers of up to `new_tokens`; the token that ends one is part of it."""

    def answer_logits(self, prompts: Rows, answers: Rows) -> list[Tensor]:
        """For each answer, the logits [T, V] that predict its T tokens, computed as in decoding."""


@dataclass(frozen=True)
class DenseAnswers:
    """The dense model's answers, and its final states before each of their tokens."""

    prompts: Rows
    """Token ids of each prompt."""
    answers: Rows
    """Token ids of each answer, including the token that ended it."""
    hidden: list[Tensor]
    """For each answer, the final states [T, H] that predict its T tokens."""

    def tensors(self) -> dict[str, Tensor]:
        """The answers as named tensors, to be stored."""
        return {
            "answers.prompts": _flat(self.prompts),
            "answers.prompt_lengths": torch.tensor([len(prompt) for prompt in self.prompts]),
            "answers.tokens": _flat(self.answers),
            "answers.lengths": torch.tensor([len(answer) for answer in self.answers]),
            "answers.hidden": torch.cat(self.hidden).contiguous().cpu(),
        }

    @classmethod
    def of(cls, stored: dict[str, Tensor], prompts: Rows) -> DenseAnswers:
        """The answers in the tensors of `tensors`.

        Raises:
            StepError: the tensors have no answers, or answers to other prompts.
        """
        try:
            answered = _cut(stored["answers.prompts"], stored["answers.prompt_lengths"])
            lengths = stored["answers.lengths"]
            answers = _cut(stored["answers.tokens"], lengths)
            hidden = list(stored["answers.hidden"].split(lengths.tolist()))
        except KeyError as error:
            raise StepError(f"the reference holds no answers of the dense model: {error}") from None
        if answered != prompts:
            raise StepError("the reference holds answers to other prompts")
        return cls(answered, answers, hidden)


def write_answers(
    model: Scored, prompts: Rows, new_tokens: int, stop_tokens: Sequence[int]
) -> DenseAnswers:
    """Let the dense model answer each prompt with up to `new_tokens` tokens."""
    answers = _generate(model, prompts, new_tokens, stop_tokens)
    hidden: list[Tensor] = []
    for start in range(0, len(prompts), BATCH):
        some = slice(start, start + BATCH)
        hidden += model.answer_states(prompts[some], answers[some])
    return DenseAnswers(prompts, answers, hidden)


def dense_record(dense: DenseAnswers, new_tokens: int, tokenizer: Any) -> dict[str, Any]:
    """The record of the dense model itself: each answer equals its own."""
    lengths = [len(answer) for answer in dense.answers]
    texts = texts_of(dense.answers, tokenizer)
    return {"kl": 0.0, **_counts(dense, new_tokens), **_shared(lengths), "texts": texts}


def score_answers(
    model: AnsweringModel,
    dense: DenseAnswers,
    head: Head,
    new_tokens: int,
    stop_tokens: Sequence[int],
    tokenizer: Any,
    progress: Progress | None = None,
) -> dict[str, Any]:
    """Distance of a cell to the dense model along its answers; see `compose.results.quality`.

    `head` gives the dense model's logits of its own hidden states.
    """
    sums: list[float] = []
    for start in range(0, len(dense.prompts), BATCH):
        some = slice(start, start + BATCH)
        led = model.answer_logits(dense.prompts[some], dense.answers[some])
        for logits, theirs in zip(led, dense.hidden[some], strict=True):
            sums.append(_summed_kl(logits, theirs, head))
        if progress is not None:
            progress(min(start + BATCH, len(dense.prompts)), len(dense.prompts), "own answers")
    written = _generate(model, dense.prompts, new_tokens, stop_tokens)
    lengths = [len(answer) for answer in dense.answers]
    pairs = zip(dense.answers, written, strict=True)
    return {
        "kl": sum(sums) / sum(lengths),
        "answer_kl": [round(kl / n, 6) for kl, n in zip(sums, lengths, strict=True)],
        **_counts(dense, new_tokens),
        **_shared([common_prefix(theirs, answer) for theirs, answer in pairs]),
        "texts": texts_of(written, tokenizer),
    }


def texts_of(answers: Rows, tokenizer: Any) -> list[str]:
    """The first answers as text."""
    return [tokenizer.decode(row, skip_special_tokens=True).strip() for row in answers[:SHOWN]]


def _summed_kl(logits: Tensor, theirs: Tensor, head: Head) -> float:
    """KL(dense || cell), summed over the positions of an answer.

    `logits` [T, V] are the cell's, `theirs` [T, H] the dense model's final states.
    """
    with torch.inference_mode():
        target = log_probs(head(theirs.to(logits.device)))  # [T, V]
        return float(kl_rows(target, log_probs(logits)).sum())


def _generate(
    model: AnsweringModel, prompts: Rows, new_tokens: int, stop_tokens: Sequence[int]
) -> Rows:
    answers: Rows = []
    for start in range(0, len(prompts), BATCH):
        answers += model.generate(prompts[start : start + BATCH], new_tokens, stop_tokens)
    return answers


def _counts(dense: DenseAnswers, new_tokens: int) -> dict[str, Any]:
    tokens = sum(map(len, dense.answers))
    return {"answers": len(dense.answers), "tokens": tokens, "max_tokens": new_tokens}


def _shared(prefixes: list[int]) -> dict[str, Any]:
    return {"common_prefix": sum(prefixes) / len(prefixes), "prefixes": prefixes}


def _flat(rows: Rows) -> Tensor:
    return torch.tensor([token for row in rows for token in row], dtype=torch.long)


def _cut(flat: Tensor, lengths: Tensor) -> Rows:
    ends = list(accumulate(lengths.tolist()))
    return [flat[end - n : end].tolist() for end, n in zip(ends, lengths.tolist(), strict=True)]
