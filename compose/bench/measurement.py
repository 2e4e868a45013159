"""What `gateskip bench` records: a run of one batch, and the repeats of a system on a workload."""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

from gateskip.runtime.backend import Arithmetic

Rows = list[list[int]]
"""Token ids of a batch of prompts, or of their continuations."""

Workloads = dict[str, list[Rows]]
"""Name of a workload -> its batches of prompts."""


@dataclass(frozen=True)
class Run:
    """The continuations of one batch of prompts, and the time they took."""

    tokens: Rows
    prompt_tokens: int
    prefill_s: float
    decoded: int
    """New tokens but the first of each row, which comes out of prefill."""
    decode_s: float
    drafted: int = 0
    accepted: int = 0
    spent: dict[str, float] = field(default_factory=dict)
    """Seconds by part of the native work, where the backend counts them."""
    saved: float = 0.0
    """Share of the model's multiply-adds saved by skipping, gates and shortcuts paid for."""
    skipped: float = 0.0
    """Share of branch-tokens that were skipped; every branch and token has the same weight."""


class Runner(Protocol):
    """A system that is ready to run: prompts as token ids in, greedy continuations out."""

    @property
    def arithmetic(self) -> Arithmetic | None:
        """The arithmetic of decoding; None for a peer, which does not tell."""

    @property
    def prefill_arithmetic(self) -> Arithmetic | None:
        """The arithmetic of prompts; None for a peer."""

    def __call__(self, rows: Rows, new_tokens: int) -> Run:
        """Continue `rows` by up to `new_tokens` each."""


@dataclass
class Measurement:
    """Repeats of one system on one workload."""

    system: str
    workload: str
    """What the prompts are: batch and context, or a category."""
    arithmetic: Arithmetic | None = None
    """Of decoding, where the system is ours."""
    prefill_arithmetic: Arithmetic | None = None
    """Of prompts, where the system is ours."""
    prefill: list[float] = field(default_factory=list)
    """Prompt tokens a second, one for each repeat."""
    decode: list[float] = field(default_factory=list)
    """New tokens a second after the first of each row."""
    acceptance: float | None = None
    time_split: dict[str, float] = field(default_factory=dict)
    """Shares of the decoding time by part of the native work, and in Python around it."""
    saved: float = 0.0
    """Share of the model's multiply-adds saved by skipping, the LM head counted."""
    skipped: float = 0.0
    """Share of branch-tokens, the prompts' among them, that were skipped."""
    equal: bool = True
    """Whether its tokens were those of the first system."""

    def add(self, runs: Sequence[Run], equal: bool) -> None:
        """Add one repeat: the runs of the workload's batches."""
        self.equal &= equal
        self.prefill.append(_rate(runs, "prompt_tokens", "prefill_s"))
        self.decode.append(_rate(runs, "decoded", "decode_s"))
        drafted = sum(run.drafted for run in runs)
        self.acceptance = sum(run.accepted for run in runs) / drafted if drafted else None
        self.time_split = _time_split(runs)
        self.saved = statistics.mean(run.saved for run in runs)
        self.skipped = statistics.mean(run.skipped for run in runs)

    def to_json(self) -> dict[str, Any]:
        """Medians and extremes, and the repeats themselves.

        `ideal_speedup` is what the saved multiply-adds would give if time followed them.
        """
        return {
            "system": self.system,
            "workload": self.workload,
            "arithmetic": None if self.arithmetic is None else self.arithmetic.to_dict(),
            "prefill_arithmetic": (
                None if self.prefill_arithmetic is None else self.prefill_arithmetic.to_dict()
            ),
            "prefill_tokens_per_s": _summary(self.prefill),
            "decode_tokens_per_s": _summary(self.decode),
            "acceptance_rate": self.acceptance,
            "time_split": self.time_split,
            "ideal_speedup": 1 / (1 - self.saved),
            "skipped_branch_tokens": self.skipped,
            "equal_to_first": self.equal,
        }


def _rate(runs: Sequence[Run], tokens: str, seconds: str) -> float:
    spent: float = sum(getattr(run, seconds) for run in runs)
    return float(sum(getattr(run, tokens) for run in runs) / max(spent, 1e-9))


def _time_split(runs: Sequence[Run]) -> dict[str, float]:
    whole = sum(run.decode_s for run in runs)
    names = runs[0].spent
    shares = {name: sum(run.spent[name] for run in runs) / whole for name in names}
    return shares | {"python": 1 - sum(shares.values())} if shares else {}


def _summary(values: Sequence[float]) -> dict[str, Any]:
    return {
        "median": statistics.median(values),
        "min": min(values),
        "max": max(values),
        "repeats": list(values),
    }
