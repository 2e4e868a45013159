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
    """Make a model smaller and faster, measure what it cost, and export the best variant.

    The same as `gateskip compress`. Variants in 8 and 4 bits, without and with drafts, are made
    and measured beside the model as it is. The one that decodes fastest within the bounds is
    exported; without bounds, the fastest of which no loss of quality is shown.

    Args:
        model: an alias, a hub id, a folder or a GGUF file.
        to: the folder to export to.
        bits: make only variants of so many bits a weight, whatever they lose.
        at_most_mb: bound of the exported folder's size on disk, in units of 10^6 bytes.
        at_most_kl: bound of the loss: KL to the model as it is, nats a token.
        effort: `quick` rounds each weight by itself, `normal` fits the rounding to text, `best`
            trains what was rounded.
        drafts: whether decoding with drafts is tried. Drafts never change a token.
        gguf: also write `TO.gguf` for llama.cpp.
        compressed_tensors: also write the folder `TO-compressed-tensors` for vLLM.
        out: the folder of runs.
        workers: variants made side by side.
        quiet: print nothing but failures.

    Returns:
        The exported folder with all numbers; `compose.recipes.card.card_of` makes the card.

    Raises:
        UserError: the model cannot be read, the target is in use, no variant meets the bounds, or
            none is recommended.
        StepError: an export does not load as it should.
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
