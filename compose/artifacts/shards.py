"""Writes weights into safetensors files as they are made, with at most a few gigabytes in
memory."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING

from compose.store import write_json

if TYPE_CHECKING:
    from torch import Tensor

SHARD_BYTES = 2 * 10**9
ONE = "model.safetensors"


def save_shards(
    folder: Path, tensors: Iterable[tuple[str, Tensor]], most: int = SHARD_BYTES
) -> None:
    """Write named tensors as transformers reads them: one file, or several and their index."""
    from safetensors.torch import save_file

    held: dict[str, Tensor] = {}
    written: list[tuple[Path, list[str]]] = []
    size = total = 0

    def write() -> None:
        path = folder / f".model-{len(written)}.safetensors"
        save_file(held, path, metadata={"format": "pt"})
        written.append((path, list(held)))
        held.clear()

    for name, tensor in tensors:
        nbytes = tensor.numel() * tensor.element_size()
        if held and size + nbytes > most:
            write()
            size = 0
        held[name] = tensor.contiguous()
        size, total = size + nbytes, total + nbytes
    write()
    if len(written) == 1:
        written[0][0].rename(folder / ONE)
        return
    places: dict[str, str] = {}
    for number, (path, names) in enumerate(written, 1):
        final = f"model-{number:05}-of-{len(written):05}.safetensors"
        path.rename(folder / final)
        places |= dict.fromkeys(names, final)
    index = {"metadata": {"total_size": total}, "weight_map": places}
    write_json(folder / f"{ONE}.index.json", index)
