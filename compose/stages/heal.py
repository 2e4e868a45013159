"""Healing: distil the dense model back into one that pruning has damaged."""

from __future__ import annotations

from typing import ClassVar, Literal

from pydantic import Field

from compose.stages.base import Role, Split, Stage


class Heal(Stage):
    """Train all weights on the dense model's own predictions."""

    role: ClassVar[Role] = "heal"
    reads_data: ClassVar[tuple[Split, ...]] = ("train",)

    use: Literal["heal"] = "heal"
    """The stage's name."""

    steps: int = Field(default=200, ge=1)
    """Optimizer steps."""

    lr: float = Field(default=1e-4, gt=0)
    """Learning rate at its peak."""

    batch: int = Field(default=1, ge=1)
    """Sequences in one optimizer step."""

    length: int | None = Field(default=None, ge=8)
    """Tokens in one sequence; when left out, `data.train.length`."""

    temperature: float = Field(default=1.0, gt=0)
    """Softens the teacher's and the student's distributions before they are compared."""
