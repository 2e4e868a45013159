"""The job that a weight stage runs: folders, type, seed, and the text that it may read."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from pydantic import BaseModel, ConfigDict, Field

from compose.units import Progress

if TYPE_CHECKING:
    from torch import Tensor

Split = Literal["train", "calibration"]
"""An entry of a pipeline's `data`."""


class DataSpec(BaseModel):
    """Which texts a stage learns from or is calibrated on."""

    model_config = ConfigDict(frozen=True, extra="forbid", use_attribute_docstrings=True)

    source: str = Field(default="calibration-text", min_length=1)
    """An alias, a hub data set id, or a path (from the YAML file) to .txt, .jsonl, .json or .xz."""

    limit: int = Field(default=128, ge=1)
    """How many rows of text are taken, in a fixed order."""

    length: int = Field(default=512, ge=8)
    """Tokens in one block."""


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
        from compose.assets import SELF_WRITTEN, load_texts, token_blocks

        spec = self.train if split == "train" else self.calibration
        assert spec is not None, f"a stage names {split} in reads_data to be given it"
        if spec.source == SELF_WRITTEN:
            from compose.stages.own_text import written_once

            count, length = min(limit or spec.limit, spec.limit), length or spec.length
            return written_once(
                self.dense,
                self.work / f"self-written-{split}-{count}-{length}.safetensors",
                count,
                length,
                2 * self.seed + (split == "train"),
                lambda done, total: self.progress(done, total, f"writing {split} text"),
            )
        texts = load_texts(spec.source, spec.limit, self.asset_cache)
        return token_blocks(texts, tokenizer, length or spec.length, limit or spec.limit)
