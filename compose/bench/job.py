"""What a cell's process is to measure, as its parent describes it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

if TYPE_CHECKING:
    from gateskip.runtime.backend import BackendName

BLOCK = 512  # tokens of a block on which perplexity is measured


@dataclass(frozen=True)
class CellJob:
    """What a cell's process is to measure."""

    name: str
    folder: Path
    baseline_folder: Path
    decode: Mapping[str, Any] | None
    """Parameters of the decode stage, None for plain decoding."""
    benchmark: Mapping[str, Any]
    """The pipeline's benchmark section."""
    seed: int
    dtype: str
    asset_cache: Path
    reference: Path
    """Where the baseline's hidden states are, or are to be put."""
    threads: int | None
    backend: BackendName | Literal["auto"] = "auto"
    """What runs the model."""
    baseline_backend: str = "auto"
    """What runs the baseline."""
    learns_from: Sequence[tuple[str, int | None]] = ()
    """Of the baseline only: source and row limit of each text that a stage of the plan reads."""

    @property
    def is_baseline(self) -> bool:
        """Whether this is the cell that the others are compared with."""
        plain = self.decode is None and self.backend == self.baseline_backend
        return plain and self.folder == self.baseline_folder
