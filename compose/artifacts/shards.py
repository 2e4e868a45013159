"""Reads weights mapped from safetensors files, and writes them into such files as they are made,
with at most two gigabytes in memory."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from compose.artifacts.intake import weight_files
from compose.store import write_json

if TYPE_CHECKING:
    from torch import Tensor

SHARD_BYTES = 1_200_000_000  # 300 million weights in float32
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


class _Mapped(Mapping[str, "Tensor"]):
    """Name -> tensor of open files; a tensor is a view of its file's pages."""

    def __init__(self, places: dict[str, Any]) -> None:
        self._places = places

    def __getitem__(self, name: str) -> Tensor:
        tensor: Tensor = self._places[name].get_tensor(name)
        return tensor

    def __iter__(self) -> Iterator[str]:
        return iter(self._places)

    def __len__(self) -> int:
        return len(self._places)


@contextmanager
def mapped_tensors(folder: Path) -> Iterator[Mapping[str, Tensor]]:
    """A folder's weights by name, each mapped from its file when it is asked for."""
    from safetensors import safe_open

    with ExitStack() as stack:
        files = [stack.enter_context(safe_open(path, "pt")) for path in weight_files(folder)]
        yield _Mapped({name: file for file in files for name in file.keys()})  # noqa: SIM118
