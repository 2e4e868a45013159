"""What the two phases of a text are computed at: its prompt, and the answer that is written.

Either phase may be left at full compute while the other one skips. Running text that is scored has
no phases: it is read at the budget.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, get_args

from gateskip.runtime.skipping import Limits

Phase = Literal["prompt", "answer"]
PHASES: tuple[Phase, ...] = get_args(Phase)
Compute = Literal["budget", "full"]
COMPUTES: tuple[Compute, ...] = get_args(Compute)


@dataclass(frozen=True)
class Phases:
    """What decides which tokens enter a branch, phase by phase; None is full compute."""

    prompt: Limits = None
    answer: Limits = None
    text: Limits = None
    """Of running text that is scored."""

    @property
    def differ(self) -> bool:
        """Whether a context and what follows it are computed differently."""
        return self.prompt is not self.answer


FULL = Phases()


def check_phases(prompt: Compute, answer: Compute) -> None:
    """Raise ValueError for unknown words, and where both phases are at full compute."""
    for phase, compute in zip(PHASES, (prompt, answer), strict=True):
        if compute not in COMPUTES:
            raise ValueError(f"{phase} {compute!r}: one of {', '.join(COMPUTES)}")
    if prompt == answer == "full":
        raise ValueError("prompt: full and answer: full skip nothing: leave one of them at budget")
