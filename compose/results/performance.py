"""Speed, memory, arithmetic and compute of a cell."""

from __future__ import annotations

from compose.results.record import Estimate, Record


class Measured(Record):
    """A number that was measured several times."""

    median: float
    """The middle of the repeats."""

    quartiles: tuple[float, float] | None = None
    """First and third quartile of the repeats; absent below two of them."""

    repeats: tuple[float, ...] = ()
    """Every repeat, in the order of the rounds."""


class SpeedNumbers(Record):
    """How fast one shape (a batch size and a context) ran."""

    prefill_tokens_per_s: Measured | None = None
    """Prompt tokens read a second, over the whole batch."""

    decode_tokens_per_s: Measured | None = None
    """New tokens a second after the first, over the whole batch."""

    ttft_s: Measured | None = None
    """Seconds from the prompt to the first new token."""

    decode_ratio: Estimate | None = None
    """Decode speed over the baseline's, paired round by round; absent for the baseline."""

    prefill_ratio: Estimate | None = None
    """Prefill speed over the baseline's, paired round by round; absent for the baseline."""

    repeat_s: tuple[float, ...] | None = None
    """Seconds that each timed decode repeat lasted."""

    time_split: dict[str, float] | None = None
    """Shares of the decoding time by part of the native work, and in Python around it."""


class Speed(SpeedNumbers):
    """Batch size 1 at the main context; other batch sizes and contexts below."""

    by_batch: dict[int, SpeedNumbers] | None = None
    """Batch size -> its numbers, for every size but 1."""

    by_context: dict[int, SpeedNumbers] | None = None
    """Prompt tokens -> the numbers of batch 1 there, for every length but the main one."""

    by_category: dict[str, SpeedNumbers] | None = None
    """Category of the prompts -> its numbers, where prompts come from a file; then the numbers
    above are of all categories together."""

    threads: int | None = None
    """Threads of the cell's process while it was timed."""

    affinity: int | None = None
    """Cores on which the system let that process run."""

    equal_to_baseline: bool | None = None
    """Whether the text decoded while timed was the baseline's, in every round."""


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
    """Weights of the artifact, without its tokenizer."""

    resident_bytes: int | None = None
    """What the loaded model occupies, with all that drafts for it and what the engine made of its
    weights."""

    peak_bytes: int | None = None
    """Most memory of the cell's process while it was measured."""

    cache_bytes: int | None = None
    """KV cache of the largest shape that was timed."""

    beside_bytes: int | None = None
    """Most memory beside weights and cache while it was timed."""


class Compute(Record):
    """Shares of the dense model's multiply-adds that were not computed, 0 to 1.

    Attention is counted at the context that each token saw, cut to the window of sliding layers.
    """

    saved_gross: float | None = None
    """In the decoder layers, the cost of the gates left out."""

    saved_net: float | None = None
    """In the decoder layers, gates and keys/values that are still computed paid for."""

    saved_model: float | None = None
    """Net, of the whole model: the LM head counts too."""

    saved_net_while_timed: float | None = None
    """`saved_net` of the timed speed rounds (prompt and new tokens)."""

    prompt_saved_while_timed: float | None = None
    """The same of their prompts alone."""

    answer_saved_while_timed: float | None = None
    """The same of their new tokens alone."""

    kept: float | None = None
    """Share of the branches' multiply-adds that a skipping cell's own budget kept on the scored
    text, beside the budget that was asked for."""

    kept_shares: tuple[float, ...] | None = None
    """Share of tokens that entered each branch (attention 0, MLP 0, ...), for cells that skip."""


class PhaseCompute(Record):
    """What tokens of one phase were computed at, 0 to 1."""

    tokens: int
    """Tokens that were read, or written but for the last of each answer. A prompt's last token is a
    part of the answer where both phases are computed differently."""

    kept: float
    """Share of the branches' multiply-adds."""

    saved_net: float
    """Share of the dense model's that was not spent; gates, shortcuts and keys/values paid for."""


class TextCompute(PhaseCompute):
    """What a cell that skips spent on the very text that was scored."""

    prompt: PhaseCompute | None = None
    """On prompts."""

    answer: PhaseCompute | None = None
    """On what was written."""
