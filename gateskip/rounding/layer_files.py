"""Rounded layers on disk: a rounding that was killed goes on with the layer that it was at.

FOLDER/layer-N.safetensors   of each module of layer N its packed codes, its scales and its minima;
                             bits, sizes and errors are in the metadata

A file has its name only when it is whole. Codes, scales and minima come back as they were, to the
bit.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from gateskip.quantization.grid import Grid, pack_bits, unpack_bits


@dataclass(frozen=True)
class Rounded:
    """A layer's weights on a grid, and the relative error of its output on calibration text."""

    grid: Grid
    error: float


class LayerFiles:
    """The layers of one rounding that are finished, in a folder of its own."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def _file(self, number: int) -> Path:
        return self.folder / f"layer-{number}.safetensors"

    def read(self, number: int) -> dict[str, Rounded] | None:
        """Module name -> what layer `number` became; None where it is not finished."""
        try:
            with safe_open(self._file(number), "pt") as file:
                facts = json.loads(file.metadata()["modules"])
                return {name: _read(file, name, fact) for name, fact in facts.items()}
        except (OSError, SafetensorError, KeyError, TypeError, ValueError):  # none, or damaged
            return None

    def kept(
        self, number: int, rounded: Iterable[tuple[str, Rounded]]
    ) -> Iterator[tuple[str, Rounded]]:
        """Pass on the modules of layer `number`; after the last one they are written."""
        tensors: dict[str, Tensor] = {}
        facts: dict[str, dict[str, Any]] = {}
        for name, each in rounded:
            grid = each.grid
            tensors[f"{name}.codes"] = pack_bits(grid.codes, grid.bits)
            tensors[f"{name}.scale"] = grid.scale.clone()  # a view of other modules' scales
            if grid.minimum is not None:
                tensors[f"{name}.minimum"] = grid.minimum.clone()
            facts[name] = {"bits": grid.bits, "error": each.error}
            yield name, each
        self.folder.mkdir(parents=True, exist_ok=True)
        unfinished = self._file(number).with_suffix(".tmp")
        save_file(tensors, unfinished, metadata={"modules": json.dumps(facts)})
        os.replace(unfinished, self._file(number))


def _read(file: Any, name: str, fact: dict[str, Any]) -> Rounded:
    names = file.keys()
    minimum = file.get_tensor(f"{name}.minimum") if f"{name}.minimum" in names else None
    codes = unpack_bits(file.get_tensor(f"{name}.codes"), fact["bits"])
    grid = Grid(codes, file.get_tensor(f"{name}.scale"), minimum, fact["bits"])
    return Rounded(grid, fact["error"])
