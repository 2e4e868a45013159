"""The pipeline language, its planner and its runner: chains of compression steps, measured."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Literal

if TYPE_CHECKING:
    from compose.recipes.compress import Compressed

__all__ = ["compress"]


def compress(
    model: str | Path,
    to: str | Path,
    *,
    bits: Literal[8, 4, 3] | None = None,
    at_most_mb: float | None = None,
    at_most_kl: float | None = None,
    effort: Literal["quick", "normal", "best"] = "normal",
    drafts: bool = True,
    gguf: bool = False,
    compressed_tensors: bool = False,
    out: str | Path = "runs",
    workers: int | None = None,
    quiet: bool = True,
) -> Compressed:
    """Make a model smaller and faster, measure the cost, and export the best variant.

    This is the same as the command `gateskip compress`. Variants in 8 and 4 bits, with and without
    drafts, are made and compared with the original model. The fastest variant within the bounds is
    exported. Without bounds, the fastest variant that is shown to keep its quality is exported.

    Args:
        model: an alias, a hub id, a folder or a GGUF file.
        to: the folder for the compressed model.
        bits: make only variants with this number of bits per weight, in spite of a loss.
        at_most_mb: maximum size of the exported folder on disk, in megabytes (10^6 bytes).
        at_most_kl: maximum KL divergence from the original model, in nats per token.
        effort: `quick` rounds without calibration text, `normal` rounds with calibration text,
            `best` also trains the rounded weights.
        drafts: whether decoding with drafts is also tried. Drafts do not change the text.
        gguf: also write `TO.gguf` for llama.cpp.
        compressed_tensors: also write the folder `TO-compressed-tensors` for vLLM.
        out: the folder for results and intermediate model folders.
        workers: number of processes at the same time.
        quiet: print only failures.

    Returns:
        The exported folder and all measurements; `compose.recipes.card.card_of` makes the card.

    Raises:
        UserError: the model cannot be read, the target folder is in use, no variant meets the
            bounds, or no variant is recommended.
        StepError: the exported folder gives other predictions, or cannot be loaded.
    """
    from compose.assets import default_cache
    from compose.recipes.compress import source_of
    from compose.recipes.recipe import Request
    from compose.run.state import Settings
    from compose.terminal.compress import compress_shown
    from compose.terminal.reports import draw_report

    request = Request(
        model=source_of(str(model)),
        to=Path(to),
        bits=bits,
        at_most_mb=at_most_mb,
        at_most_kl=at_most_kl,
        effort=effort,
        drafts=drafts,
        gguf=gguf,
        compressed_tensors=compressed_tensors,
    )
    settings = Settings(Path(out), default_cache(), draw=draw_report)
    return compress_shown(request, settings, workers, quiet=quiet)
