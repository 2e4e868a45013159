"""Which texts stages read: the entries of a pipeline's `data`."""

from __future__ import annotations

from typing import Annotated, Literal, Self

from pydantic import BaseModel, ConfigDict, Field, model_validator

Weight = Annotated[float, Field(gt=0)]
Split = Literal["train", "calibration"]
"""An entry of a pipeline's `data`."""


class DataSpec(BaseModel):
    """Which texts a stage learns from or is calibrated on."""

    model_config = ConfigDict(
        frozen=True, extra="forbid", use_attribute_docstrings=True, allow_inf_nan=False
    )

    source: str = Field(default="calibration-text", min_length=1)
    """An alias, a hub data set id, or a path (from the YAML file) to .txt, .jsonl, .json or .xz."""

    mix: dict[str, Weight] = {}
    """Several sources instead of one, and the weight of each: `{training-text: 1, sums: 1}`. So
    many of the blocks come from it."""

    answered: tuple[str, ...] = ()
    """Those sources whose prompts the untouched model answers: what follows a prompt or the user's
    words of a chat, and what follows the first quarter of a block of other text."""

    limit: int = Field(default=128, ge=1)
    """How many rows of text are taken of each source, in a fixed order."""

    length: int = Field(default=512, ge=8)
    """Tokens in one block."""

    @property
    def weights(self) -> dict[str, float]:
        """Every source and its weight."""
        return self.mix or {self.source: 1.0}

    @model_validator(mode="after")
    def _fits_together(self) -> Self:
        if self.mix and self.source != type(self).model_fields["source"].default:
            raise ValueError("source and mix name the text twice: leave one out")
        for name in self.answered:
            if name not in self.weights:
                raise ValueError(f"answered: {name} is no source of this text")
        return self
