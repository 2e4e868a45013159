"""The compute of the two phases of a text: its prompt, and the answer that is written.

Nothing is predicted from most tokens of a prompt: later tokens only read their keys and values. So
they may skip everything that no later token needs, by separate thresholds (calibration/reading.py).
The last token of a prompt predicts the answer's first token and is computed like the answer: within
the prompt's pass where answers are at full compute.

Either phase may stay at full compute while the other one skips. Running text that is scored has no
phases: something is predicted from each of its tokens, so it is computed like an answer.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, get_args

from gateskip.runtime.budget_control import BudgetControl
from gateskip.runtime.skipping import Limits, is_full

Phase = Literal["prompt", "answer"]
PHASES: tuple[Phase, ...] = get_args(Phase)
Compute = Literal["budget", "full"]
COMPUTES: tuple[Compute, ...] = get_args(Compute)


@dataclass(frozen=True)
class Phases:
    """Limits that decide which tokens enter a branch, phase by phase; None is full compute."""

    prompt: Limits = None
    answer: Limits = None
    text: Limits = None
    """For running text that is scored."""

    @property
    def differ(self) -> bool:
        """Whether a prompt and what follows it are computed differently."""
        return self.prompt is not self.answer

    @property
    def apart(self) -> bool:
        """Whether a prompt's last token needs a separate pass: where it is computed differently
        from the others, and either skips or follows a prompt under per-row control."""
        return self.differ and (not is_full(self.answer) or isinstance(self.prompt, BudgetControl))

    def read(self, length: int) -> int:
        """Number of a prompt's tokens that pass together: all, or all but the last."""
        return length - 1 if self.apart else length

    def full_from(self, lengths: Sequence[int]) -> list[int] | None:
        """For each prompt, the position in its pass from which on tokens are at full compute; None
        where all are computed alike."""
        return [length - 1 for length in lengths] if self.differ and not self.apart else None


FULL = Phases()


def check_phases(prompt: Compute, answer: Compute, prompt_budget: float | None = None) -> None:
    """Raise ValueError for unknown words, for contradicting settings, and where both phases are at
    full compute."""
    for phase, compute in zip(PHASES, (prompt, answer), strict=True):
        if compute not in COMPUTES:
            raise ValueError(f"{phase} {compute!r}: one of {', '.join(COMPUTES)}")
    if prompt == answer == "full":
        raise ValueError("prompt: full and answer: full skip nothing: leave one of them at budget")
    if prompt_budget is not None and prompt == "full":
        raise ValueError(
            "prompt: full and prompt_budget contradict each other: leave one of them out"
        )
