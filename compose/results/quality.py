"""Quality of a cell: perplexity, tasks, generated answers, and the distance to the baseline.

What was seen of each block, question and answer is kept beside every mean, so that intervals and
later comparisons pair the same text: see `compose.analysis.intervals`.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal

from compose.results.performance import TextCompute
from compose.results.record import Estimate, Record

TaskKind = Literal["likelihood", "generative"]
"""Whether a task's answers are ranked by their likelihood, or written by the cell."""


class Perplexity(Record):
    """Perplexity on held-out text."""

    dataset: str
    """Which text: `wikitext2`, `heldout-text`, ..."""

    value: float | None = None
    """exp of the mean negative log-likelihood of a token; absent when it was not finite."""

    tokens: int | None = None
    """Tokens that were scored."""

    ratio_to_baseline: float | None = None
    """`value` over the baseline's value; 1 is no loss."""

    ratio_ci95: tuple[float, float] | None = None
    """95 % interval of `ratio_to_baseline`: Student's t over the blocks of the text, paired."""

    block_nll: tuple[float, ...] | None = None
    """Mean negative log-likelihood of each block of 512 tokens, nats a token, in text order."""

    after_prompt: int | None = None
    """Tokens of each block that were read as a prompt and not scored, in a cell whose prompts skip
    what answers do not need."""

    dense_nll: tuple[float, ...] | None = None
    """The dense model's `block_nll` on the tokens after such a prompt."""


class TaskScore(Record):
    """A benchmark task of lm-eval."""

    metric: str
    """`acc`, `acc_norm`, `exact_match` or `f1`."""

    value: float | None = None
    """The score, 0 to 1."""

    n: int | None = None
    """Questions that were asked."""

    ci95: tuple[float, float] | None = None
    """95 % interval of the score."""

    kind: TaskKind | None = None
    """Whether answers were ranked by likelihood, or written by the cell's own decoder."""

    outcomes: tuple[float, ...] | None = None
    """Score of each question, 0 to 1, in the order asked."""

    questions: str | None = None
    """16 hex digits over what was asked: outcomes pair only where these are equal."""

    retained: float | None = None
    """`value` over the baseline's value."""

    retained_ci95: tuple[float, float] | None = None
    """95 % interval of `retained`: bootstrap over questions, paired with the baseline's."""

    compute: TextCompute | None = None
    """What a cell that skips spent on these prompts and answers; of written tasks only."""


class OwnAnswers(Record):
    """Distance to the dense model along its own greedy answers, and how soon answers part."""

    answers: int | None = None
    """Answers that the dense model wrote."""

    tokens: int | None = None
    """Their tokens, all of which are scored."""

    kl: float | None = None
    """Mean KL(dense || cell) on the dense model's greedy answers, nats a token."""

    kl_ci95: tuple[float, float] | None = None
    """95 % interval of `kl`: Student's t over answers."""

    answer_kl: tuple[float, ...] | None = None
    """Mean KL of each answer, nats a token."""

    common_prefix: float | None = None
    """Mean tokens that the cell's and the dense model's greedy answers share from the start."""

    prefixes: tuple[int, ...] | None = None
    """The same for each answer."""

    max_tokens: int | None = None
    """Most tokens of an answer, which bounds `common_prefix`."""

    compute: TextCompute | None = None
    """What a cell that skips spent on the prompts, on the dense model's answers that it was led
    through, and on its own."""

    questions: tuple[str, ...] | None = None
    """Of the baseline only: the first prompts, as they were asked."""

    texts: tuple[str, ...] | None = None
    """What the cell itself answered to these, greedily."""


class NoiseFloor(Record):
    """The dense model in the other float type: differences below these are rounding."""

    dtype: str | None = None
    """That float type."""

    kl: float | None = None
    """Mean KL to the dense model, nats a token."""

    ratio: float | None = None
    """Perplexity over the dense model's."""

    greedy_agreement: float | None = None
    """Share of positions where both put the same token first."""


class Contamination(Record):
    """13-gram contamination of what is scored by the texts that stages learn from."""

    rows: int
    """Rows or questions that are scored."""

    contaminated: int
    """How many share a run of thirteen words with a training text."""


class Quality(Record):
    """Perplexity, task scores, generated answers, and the distance to the baseline."""

    perplexity: Perplexity | None = None
    """Perplexity and its ratio to the baseline's."""

    kl_to_baseline: float | None = None
    """Mean KL divergence, baseline to this cell, nats a token."""

    kl_ci95: tuple[float, float] | None = None
    """95 % interval of `kl_to_baseline`: Student's t over the blocks of the text."""

    kl_median: float | None = None
    """Median over tokens of the same."""

    kl_p90: float | None = None
    """90th percentile over tokens of the same."""

    block_kl: tuple[float, ...] | None = None
    """Mean KL of each block of 512 tokens, in text order."""

    greedy_agreement: float | None = None
    """Share of positions where both put the same token first."""

    tasks: dict[str, TaskScore] | None = None
    """Task name -> its score."""

    retained: Estimate | None = None
    """Mean over the baseline's tasks of the share of its score, with its interval and all
    questions; absent where outcomes do not pair, and for the baseline."""

    written_retained: Estimate | None = None
    """The same over the tasks whose answers the cell writes; absent where there is none."""

    ranked_retained: Estimate | None = None
    """The same over the tasks whose answers are ranked by likelihood."""

    own_answers: OwnAnswers | None = None
    """Distance to the dense model on the dense model's own greedy answers."""

    noise_floor: NoiseFloor | None = None
    """Of the baseline only: what another float type changes."""

    kl_of_rounding: float | None = None
    """Mean KL, nats a token, from these weights as they were scored to the same weights as they are
    decoded, with activations rounded to 8 bits; absent where decoding does not round."""

    contamination: dict[str, Contamination] | None = None
    """Of the baseline only: text or task -> how much of it stands in training texts."""


def common_prefix(first: Sequence[Any], second: Sequence[Any]) -> int:
    """How many tokens or characters two answers share from the start.

    >>> common_prefix([5, 6, 7, 2], [5, 6, 8])
    2
    """
    pairs = zip(first, second, strict=False)
    shared = next((i for i, (a, b) in enumerate(pairs) if a != b), None)
    return min(len(first), len(second)) if shared is None else shared
