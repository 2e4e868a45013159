"""Text that the dense model generates itself, as token blocks, kept until the stage has ended."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from torch import Tensor

Progress = Callable[[int, int], None]


def written_once(
    dense: Path, kept: Path, count: int, length: int, seed: int, progress: Progress
) -> Tensor:
    """Blocks [count, length] that the model in `dense` writes; from `kept` where a killed run had
    them already."""
    import gateskip
    from gateskip.decoding.self_generate import write

    return _once(kept, lambda: write(gateskip.load(dense), count, length, seed, progress))


def continued_once(
    dense: Path, kept: Path, given: Tensor, length: int, seed: int, progress: Progress
) -> Tensor:
    """Blocks [N, length] that begin as `given` [N, P] and go on as the model in `dense` does."""
    import gateskip
    from gateskip.decoding.self_generate import go_on

    return _once(kept, lambda: go_on(gateskip.load(dense), given, length, seed, progress))


def answered_once(
    dense: Path,
    kept: Path,
    prompts: Sequence[str],
    count: int,
    length: int,
    seed: int,
    progress: Progress,
) -> Tensor:
    """Blocks [N, length], N at most `count`, of prompts and the dense model's answers, end to end.

    Raises:
        ValueError: they do not fill one block.
    """
    import gateskip
    from gateskip.decoding.self_generate import answer

    return _once(kept, lambda: answer(gateskip.load(dense), prompts, count, length, seed, progress))


def _once(kept: Path, make: Callable[[], Tensor]) -> Tensor:
    """What the file holds; it is made first where it does not exist."""
    from safetensors.torch import load_file, save_file

    if not kept.is_file():
        blocks = make()
        kept.parent.mkdir(parents=True, exist_ok=True)
        save_file({"blocks": blocks}, kept.with_suffix(".part"))
        kept.with_suffix(".part").replace(kept)
    return load_file(kept)["blocks"]
