"""The job that a weight stage runs: folders, type, seed, and the text that it may read."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from compose.stages.text.data_spec import DataSpec, Split
from compose.units import Progress

if TYPE_CHECKING:
    from torch import Tensor


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
        from compose.stages.text.split_text import SplitText

        spec = self.train if split == "train" else self.calibration
        assert spec is not None, f"a stage names {split} in reads_data to be given it"
        text = SplitText(
            spec=spec,
            split=split,
            tokenizer=tokenizer,
            length=length or spec.length,
            dense=self.dense,
            cache=self.asset_cache,
            seed=2 * self.seed + (split == "train"),
            progress=self.progress,
        )
        return text.blocks(limit or spec.limit)
