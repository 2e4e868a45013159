"""Models that a command line names: a model folder, or a GGUF file that becomes one."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from compose.artifacts.gguf.file import is_gguf
from compose.artifacts.gguf.read import check_gguf_source, keeps_blocks
from compose.assets.models.gguf_source import converted, grids_text
from compose.assets.models.resolve import require_blocks
from compose.contract import ConvertJob
from compose.processes.worker_process import ask_once

DTYPE = "bfloat16"
"""The type of a GGUF file's weights that are not blocks."""


def as_folders(
    sources: Sequence[Path], cache: Path, *, keep_blocks: bool | None = False
) -> list[Path]:
    """The model folders; a worker converts each GGUF file once.

    With None, the blocks of a GGUF file are kept where it has any.

    Raises:
        ArtifactError: a GGUF file cannot be read.
        AssetError: the blocks of GGUF files should be kept, and there is no GGUF file.
    """
    if keep_blocks and not any(map(is_gguf, sources)):
        require_blocks(str(sources[0]))
    return [_as_folder(source, cache, keep_blocks) for source in sources]


def _as_folder(source: Path, cache: Path, keep_blocks: bool | None) -> Path:
    if not is_gguf(source):
        return source
    keep = keeps_blocks(source) if keep_blocks is None else keep_blocks
    check_gguf_source(source, keep_blocks=keep)  # refuses what cannot be read, at once
    folder = converted(source, cache, keep_blocks=keep, dtype=DTYPE)
    if folder is not None:
        return folder
    return Path(ask_once(ConvertJob(source.absolute(), cache, keep, DTYPE)))


def how_read(source: Path, folder: Path) -> str | None:
    """One line that says how a GGUF file's weights are held; None for other models."""
    if not is_gguf(source):
        return None
    return f"{source.name}: {grids_text(folder) or f'weights in {DTYPE}'}"
