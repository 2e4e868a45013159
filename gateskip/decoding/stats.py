"""Statistics of one `generate` call: tokens, times, and the outcome of drafts."""

from __future__ import annotations

from dataclasses import asdict, dataclass, field
from typing import Any

from gateskip.decoding.phases import Phase
from gateskip.model.compute import Usage
from gateskip.runtime.backend import Round

Tokens = list[int]
ADDED = (
    *("prompt_tokens", "new_tokens", "prefill_s", "decode_s", "drafted", "accepted"),
    *("passes", "draft_s", "verify_s", "looked_up"),
)
"""Fields of Stats that are sums."""


@dataclass
class Stats:
    """Counts and times of one `generate` call, in tokens and seconds."""

    prompt_tokens: int = 0
    new_tokens: int = 0
    prefill_s: float = 0.0
    decode_s: float = 0.0
    ttft_s: float = 0.0
    """Time to the first token of the first row: prefill and one LM head."""
    drafted: int = 0
    accepted: int = 0
    passes: int = 0
    """Forward passes at full compute after prefill: verify passes and plain steps."""
    draft_s: float = 0.0
    verify_s: float = 0.0
    draft_lengths: dict[int, int] = field(default_factory=dict)
    """How many times each draft length was tried; 0 is a plain step."""
    draft_weights: str | None = None
    """The draft model; `none` where no draft was measured to be faster than plain decoding."""
    looked_up: int = 0
    """Drafted tokens that look-up in the text proposed."""
    positions: list[list[int]] = field(default_factory=list)
    """By position in a draft: how many drafts reached it with all earlier tokens accepted, and how
    many tokens were accepted there."""

    @property
    def acceptance_rate(self) -> float | None:
        """Accepted / drafted tokens; None when nothing was drafted."""
        return self.accepted / self.drafted if self.drafted else None

    @property
    def mean_accepted_tokens(self) -> float | None:
        """Tokens that a full pass yields; plain decoding has 1. None without a pass."""
        return (self.accepted + self.passes) / self.passes if self.passes else None

    def add(self, other: Stats) -> None:
        """Count another call's work with this one's; `ttft_s` stays the first call's."""
        for name in ADDED:
            setattr(self, name, getattr(self, name) + getattr(other, name))
        for length, times in other.draft_lengths.items():
            self.draft_lengths[length] = self.draft_lengths.get(length, 0) + times
        for position, (tried, accepted) in enumerate(other.positions):
            self.count(position, tried, accepted)

    def count(self, position: int, tried: int, accepted: int) -> None:
        """Drafts that reached a position with all earlier tokens accepted, and accepted tokens
        there."""
        while len(self.positions) <= position:
            self.positions.append([0, 0])
        self.positions[position][0] += tried
        self.positions[position][1] += accepted

    def add_round(self, done: Round) -> None:
        """Count one round of drafting and verifying, or its plain steps."""
        self.draft_s += done.draft_s
        self.verify_s += done.verify_s
        for row in done.rows:
            self.drafted += row.drafted
            self.accepted += row.accepted
            self.passes += done.steps
            self.looked_up += row.drafted if row.looked_up else 0
            self.draft_lengths[row.drafted] = self.draft_lengths.get(row.drafted, 0) + done.steps
            for position in range(min(row.accepted + 1, row.drafted)):
                self.count(position, 1, position < row.accepted)

    def to_dict(self) -> dict[str, Any]:
        """Counts, times and the two rates, as plain data."""
        return asdict(self) | {
            "acceptance_rate": self.acceptance_rate,
            "mean_accepted_tokens": self.mean_accepted_tokens,
        }


@dataclass(frozen=True)
class Generation:
    """New tokens of every row, without the prompt, and their statistics."""

    tokens: list[Tokens]
    stats: Stats
    usage: dict[Phase, Usage] = field(default_factory=dict)
    """How many tokens of each phase entered each branch; empty where drafts were verified."""
