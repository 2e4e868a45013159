"""The parts of a cell's result: sizes, speed, quality, speculation, training curves, gate use.

Every field is optional where it may not have been measured. Fields that a record does not name are
kept, so that a measurement may say more than this version knows.
"""

from __future__ import annotations

from typing import Any, ClassVar

from pydantic import BaseModel, ConfigDict, SerializerFunctionWrapHandler, model_serializer


class Record(BaseModel):
    """A frozen part of a result. What is None is left out when it is written."""

    model_config = ConfigDict(
        frozen=True, extra="allow", allow_inf_nan=False, use_attribute_docstrings=True
    )

    always: ClassVar[frozenset[str]] = frozenset()
    """Fields that are written even when they are None, because scripts look them up."""

    @model_serializer(mode="wrap")
    def _without_absent(self, handler: SerializerFunctionWrapHandler) -> dict[str, Any]:
        written: dict[str, Any] = handler(self)
        kept = {k: v for k, v in written.items() if v is not None or k in self.always}
        return kept | {k: None for k in self.always if k not in kept}


class Measured(Record):
    """A number that was measured several times."""

    median: float
    """The middle of the repeats."""

    repeats: tuple[float, ...] = ()
    """Every repeat, in the order of the rounds."""


class SpeedNumbers(Record):
    """How fast one batch size ran."""

    prefill_tokens_per_s: Measured | None = None
    """Prompt tokens read a second, over the whole batch."""

    decode_tokens_per_s: Measured | None = None
    """New tokens a second after the first, over the whole batch."""

    ttft_s: Measured | None = None
    """Seconds from the prompt to the first new token."""


class Speed(SpeedNumbers):
    """Batch size 1, and the other batch sizes below `by_batch`."""

    by_batch: dict[int, SpeedNumbers] | None = None
    """Batch size -> its numbers, for every size but 1."""


class Arithmetic(Record):
    """The arithmetic that computed a number; see `gateskip.runtime.backend.Arithmetic`."""

    backend: str
    """`reference`, `gathered` or `native`."""

    weights: str
    """How weights are stored: `bfloat16`, `4 bits in groups of 64`, ..."""

    activations: str
    """What weights are multiplied with: `float32`, `8 bits in blocks of 32`, ..."""

    accumulation: str
    """The type in which products are summed."""


class Size(Record):
    """Bytes on disk and in memory."""

    disk_bytes: int | None = None
    """Weight files of the artifact."""

    resident_bytes: int | None = None
    """What the loaded model occupies."""

    peak_bytes: int | None = None
    """Most memory of the cell's process while it was measured."""


class Compute(Record):
    """Shares of the dense model's multiply-adds that were not computed, 0 to 1."""

    saved_gross: float | None = None
    """In the decoder layers, the cost of the gates left out."""

    saved_net: float | None = None
    """In the decoder layers, gates and keys/values that are still computed paid for."""

    saved_model: float | None = None
    """Net, of the whole model: the LM head counts too."""


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


class TaskScore(Record):
    """A benchmark task of lm-eval."""

    metric: str
    """`acc` or `acc_norm`."""

    value: float | None = None
    """The score, 0 to 1."""

    n: int | None = None
    """Questions that were asked."""

    ci95: tuple[float, float] | None = None
    """95 % interval of the score."""

    retained: float | None = None
    """`value` over the baseline's value."""


class Contamination(Record):
    """13-gram contamination of what is scored by the texts that stages learn from."""

    rows: int
    """Rows or questions that are scored."""

    contaminated: int
    """How many share a run of thirteen words with a training text."""


class Quality(Record):
    """Perplexity, task scores, and the distance to the baseline."""

    perplexity: Perplexity | None = None
    """Perplexity and its ratio to the baseline's."""

    kl_to_baseline: float | None = None
    """Mean KL divergence, baseline to this cell, nats a token."""

    greedy_agreement: float | None = None
    """Share of positions where both put the same token first."""

    tasks: dict[str, TaskScore] | None = None
    """Task name -> its score."""

    kl_of_rounding: float | None = None
    """Mean KL, nats a token, from these weights as they were scored to the same weights as they are
    decoded, with activations rounded to 8 bits; absent where decoding does not round."""

    contamination: dict[str, Contamination] | None = None
    """Of the baseline only: text or task -> how much of it stands in training texts."""


class Divergence(Record):
    """The first place where speculative and plain greedy decoding differ."""

    prompt: int | None = None
    """Which prompt, from 0."""

    position: int | None = None
    """Which new token, from 0."""

    plain_token: int | None = None
    """The token that plain decoding took."""

    speculative_token: int | None = None
    """The token that speculative decoding took."""

    margin: float | None = None
    """Distance of the two highest logits there, plain decoding; near 0 is a near-tie."""

    margin_share: float | None = None
    """The same as a share of the distance between the highest and the lowest logit."""


class Speculation(Record):
    """What self-speculative decoding did. The cell named by `plain` is what it is compared with."""

    always: ClassVar[frozenset[str]] = frozenset({"first_divergence"})

    acceptance_rate: float | None = None
    """Accepted over drafted tokens."""

    mean_accepted_tokens: float | None = None
    """Tokens gained by one pass of the whole model; plain decoding has 1."""

    draft_length_histogram: dict[int, int] | None = None
    """Draft length -> rounds in which so many tokens were drafted; 0 is a plain step."""

    speedup: float | None = None
    """Decode speed over that of the plain cell."""

    lossless: bool | None = None
    """Whether every new token equals plain greedy decoding's."""

    prompts: int | None = None
    """Prompts that were compared."""

    tokens: int | None = None
    """New tokens that were compared, over all prompts."""

    first_divergence: Divergence | None = None
    """Where they first differ; null when they do not."""

    divergences: tuple[Divergence, ...] | None = None
    """The same for each prompt whose texts differ."""

    acceptance_by_position: tuple[float, ...] | None = None
    """Share accepted of the drafts at each position, where all before them had been accepted."""

    looked_up_share: float | None = None
    """Share of the drafted tokens that the text itself proposed."""

    draft_s: float | None = None
    """Seconds of the last timed repeat that went into drafting."""

    verify_s: float | None = None
    """Seconds of it that went into passes at full compute."""


class BranchUse(Record):
    """What one branch's gate did, averaged over tokens."""

    gate: float
    """Mean gate, 0 to 1."""

    kept: float
    """Share of tokens that entered."""


class GroupUse(Record):
    """What a group of tokens got."""

    tokens: int
    """How many were seen."""

    compute: float
    """Mean share of the branches' multiply-adds, 0 to 1."""

    kept: tuple[float, ...]
    """Share of the group that entered each branch, in the order branches run."""


class Insight(Record):
    """Which tokens got how much compute, on the text of the perplexity."""

    branches: tuple[BranchUse, ...]
    """Attention 0, MLP 0, attention 1, ..."""

    kinds: dict[str, GroupUse]
    """Kind of token (first, punctuation, content, ...) -> its use."""

    positions: tuple[GroupUse, ...]
    """Stretches of equal length, from the beginning of a text to its end."""


class TrainingPoint(Record):
    """A point of a training curve."""

    step: int
    """Optimizer steps done."""

    loss: float | None = None
    """Training loss, smoothed as the stage says."""

    valid: float | None = None
    """Loss on held-out text."""


class StepInfo(Record):
    """A stage of the chain. Its parameters are kept beside these two."""

    name: str
    """What the pipeline file calls it."""

    use: str
    """Which stage it is: `gate`, `bnb`, `skip`, ..."""


class SeedRun(Record):
    """The same chain, run and scored with another seed."""

    seed: int
    """The seed."""

    quality: Quality | None = None
    """Quality with it."""

    compute: Compute | None = None
    """Shares of compute that were saved with it."""
