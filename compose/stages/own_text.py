"""Text that the dense model generates itself, as token blocks, for stages without other data."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from torch import Tensor


def written_once(
    dense: Path,
    kept: Path,
    count: int,
    length: int,
    seed: int,
    progress: Callable[[int, int], None],
) -> Tensor:
    """Blocks [count, length] that the model in `dense` writes; from `kept` where a killed run had
    them already."""
    from safetensors.torch import load_file, save_file

    import gateskip
    from gateskip.decoding.self_generate import write

    if not kept.is_file():
        blocks = write(gateskip.load(dense), count, length, seed, progress)
        kept.parent.mkdir(parents=True, exist_ok=True)
        save_file({"blocks": blocks}, kept.with_suffix(".part"))
        kept.with_suffix(".part").replace(kept)
    return load_file(kept)["blocks"]
