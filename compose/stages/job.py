"""The job that a weight stage runs: folders, type, seed, and the text that it may read."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal, Self

from pydantic import BaseModel, ConfigDict, Field, model_validator

from compose.units import Progress

if TYPE_CHECKING:
    from torch import Tensor

Weight = Annotated[float, Field(gt=0)]
Split = Literal["train", "calibration"]
"""An entry of a pipeline's `data`."""


class DataSpec(BaseModel):
    """Which texts a stage learns from or is calibrated on."""

    model_config = ConfigDict(frozen=True, extra="forbid", use_attribute_docstrings=True)

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


@dataclass(frozen=True)
class StageJob:
    """All that a weight stage is given to run."""

    source: Path
    """The model folder it starts from; only read."""
    target: Path
    """An empty folder, to be filled with the resulting Hugging Face folder."""
    seed: int
    dtype: str
    """`float32`, `bfloat16` or `float16`: the type of what is not quantized."""
    train: DataSpec | None
    calibration: DataSpec | None
    dense: Path
    """The folder of the untouched source model: the teacher."""
    progress: Progress
    """Called as the work goes on; a stage that only counts passes (done, total, phase)."""
    work: Path
    """Scratch that survives a kill, for checkpoints in the middle of a stage."""
    asset_cache: Path
    """Where downloaded models and data are kept."""

    def blocks(
        self, split: Split, tokenizer: Any, length: int | None = None, limit: int | None = None
    ) -> Tensor:
        """Token blocks [N, length] of a split; its own length and row limit where none is given."""
        from compose.stages.split_text import SplitText

        spec = self.train if split == "train" else self.calibration
        assert spec is not None, f"a stage names {split} in reads_data to be given it"
        text = SplitText(self, split, spec, tokenizer, length or spec.length)
        return text.blocks(limit or spec.limit)
