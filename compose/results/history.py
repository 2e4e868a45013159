"""What made a cell, and what beside its numbers decides how they are read."""

from __future__ import annotations

from typing import Literal

from compose.results.performance import Compute
from compose.results.quality import Quality
from compose.results.record import Record


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

    role: str | None = None
    """What it does to a model: `prune`, `heal`, `gate`, `quantize`, ...; None in older results."""

    stored_as: str | None = None
    """How its weights are stored, in words, where it is a quantizer."""


class SeedRun(Record):
    """The same chain, run and scored with another seed."""

    seed: int
    """The seed."""

    quality: Quality | None = None
    """Quality with it."""

    compute: Compute | None = None
    """Shares of compute that were saved with it."""


class Peer(Record):
    """Another engine as a cell: which one, and how it was run."""

    engine: str
    """`llama.cpp`, `openvino`, `onnxruntime`, `transformers`."""

    option: str | None = None
    """What of it: `q4_k_m`, `int4`, `compiled`, ..."""

    versions: dict[str, str] | None = None
    """Library -> version, in the engine's own environment."""

    flags: str | None = None
    """Build flags and instruction sets, as the engine states them."""

    settings: str | None = None
    """One sentence: how it is run."""

    threads: int | None = None
    """Threads it was given."""


Outcome = Literal["ACCEPT", "TRADE-OFF", "REGRESSION", "NO EVIDENCE"]


class Verdict(Record):
    """Whether a cell is worth shipping, judged from intervals; see `compose.analysis.verdicts`."""

    verdict: Outcome
    """The judgement."""

    why: str
    """One sentence of what it rests on."""
