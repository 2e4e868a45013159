"""Integer grids of a model folder as blocks of GGUF with the same codes, scales and minima.

A block type has a number of bits. A grid of fewer bits goes into the next larger type:

    up to 4 bits with minima        Q4_1        scale * code + minimum
    up to 4 bits, symmetric         Q4_0        scale * (code - 8)
    5 to 8 bits, symmetric          Q8_0        scale * code, signed

Groups of 64 or 128 weights repeat their scale in each block of 32. Blocks have float16 scales and
minima; this project's scales and minima are float16 numbers by construction
(gateskip/quantization/grid.py).

Layers in the GPTQ format become the same blocks. Their zero points are integers, so a minimum is a
product, -scale * zero, which float16 rounds: by at most 0.8 % of a scale with 4 bits.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from compose.artifacts.intake import weight_files
from compose.artifacts.packed_folder import GPTQ, GRID, IntegerLayer, PackedFolder
from compose.errors import ArtifactError

if TYPE_CHECKING:
    import numpy
    from numpy.typing import NDArray
    from torch import Tensor

BLOCK = 32
CODES = ".codes"
PARTS = tuple(f".{part}" for part in (*GRID, *GPTQ))
"""Ends of the names of a packed layer's tensors."""
EMBEDDING, HEAD = "model.embed_tokens", "lm_head"


def refuse_grids(config: dict[str, Any]) -> list[str]:
    """Reasons why the grids of this config cannot be written as blocks; empty where they can."""
    quantization = config["quantization_config"]
    stated = [quantization, *quantization.get("layers", {}).values()]
    stated += [quantization[key] for key in ("embedding", "head") if quantization.get(key)]
    sizes = {grid.get("group_size", BLOCK) for grid in stated}
    return [f"groups of {size} are not whole blocks of {BLOCK}" for size in sizes if size % BLOCK]


def main_kind(config: dict[str, Any]) -> str:
    """The type of most blocks, as `KINDS` of write.py names it."""
    quantization = config["quantization_config"]
    if quantization["bits"] > 4:
        return "q8_0"
    symmetric = quantization.get("offset") == "none" or quantization.get("sym")
    return "q4_0" if symmetric else "q4_1"


def grid_blocks(
    folder: Path, config: dict[str, Any]
) -> Iterator[tuple[str, str, NDArray[numpy.uint8]]]:
    """Name, type and rows of blocks [n, bytes] of every weight that is a grid.

    Raises:
        ArtifactError: scales are not exact in float16, or no block type fits a grid.
    """
    from safetensors import safe_open

    where: dict[str, Path] = {}
    for shard in weight_files(folder):
        with safe_open(shard, "pt") as file:
            where |= dict.fromkeys(file.keys(), shard)

    def read(name: str) -> Tensor | None:
        if name not in where:
            return None
        with safe_open(where[name], "pt") as file:
            tensor: Tensor = file.get_tensor(name)
        return tensor

    for stored in sorted(name for name in where if name.endswith(CODES)):
        module = stored.removesuffix(CODES)
        bits = bits_of(module, config["quantization_config"])
        codes, scale, *others = (read(f"{module}.{part}") for part in GRID)
        assert codes is not None and scale is not None, f"{module} is a whole grid"
        yield f"{module}.weight", *as_blocks(module, codes, scale, *others, bits)


def gptq_blocks(folder: Path) -> Iterator[tuple[str, str, NDArray[numpy.uint8]]]:
    """`grid_blocks` of a folder in the GPTQ format.

    Raises:
        ArtifactError: as `grid_blocks`, or the columns of a group are not adjacent.
    """
    source = PackedFolder(folder)
    for module in (*source.layers, *source.embeddings):
        yield f"{module}.weight", *integer_blocks(module, source.layer(module))


def integer_blocks(module: str, layer: IntegerLayer) -> tuple[str, NDArray[numpy.uint8]]:
    """A layer with integer zero points as blocks: their type and rows [n, bytes]."""
    minimum = None
    if layer.zeros is not None:
        minimum = (-layer.zeros.float() * layer.scale.float()).half()
    return _written(module, layer.codes, layer.scale, minimum, layer.bits)


def bits_of(module: str, quantization: dict[str, Any]) -> int:
    """Bits of a module's codes, as a folder's config states them."""
    outer = {EMBEDDING: "embedding", HEAD: "head" if quantization.get("head") else "embedding"}
    if module in outer and quantization.get(outer[module]):
        return int(quantization[outer[module]]["bits"])
    layer = quantization.get("layers", {}).get(module, {})
    return int(layer.get("bits", quantization["bits"]))


def as_blocks(module: str, *stored: Any) -> tuple[str, NDArray[numpy.uint8]]:
    """A grid's tensors of a folder and its bits as blocks: their type and rows [n, bytes]."""
    from gateskip.quantization.grid_linear import read

    grid = read(*stored)
    return _written(module, grid.codes, grid.scale, grid.minimum, grid.bits)


def _written(
    module: str, codes: Tensor, scale: Tensor, minimum: Tensor | None, bits: int
) -> tuple[str, NDArray[numpy.uint8]]:
    """Codes [n, k], scales and minima [n, k / group] as blocks of 32."""
    from compose.artifacts.gguf.blocks import Blocks, write_blocks
    from gateskip.quantization.grid import middle

    if minimum is not None and bits > 4:
        raise ArtifactError(f"{module}: no GGUF block has {bits} bits and a minimum")
    wide = 4 if bits <= 4 else 8
    if minimum is None:
        codes = codes + (middle(wide) - middle(bits))  # both middles stand for zero
    repeats = codes.shape[1] // BLOCK // scale.shape[1]
    numbers = [
        None if data is None else _float16(module, data).repeat_interleave(repeats, dim=1).numpy()
        for data in (scale, minimum)
    ]
    assert numbers[0] is not None, "every grid has scales"
    return write_blocks(Blocks(codes.numpy(), numbers[0], numbers[1], wide))


def _float16(module: str, stored: Tensor) -> Tensor:
    """Scales or minima in float16, without rounding.

    Raises:
        ArtifactError: float16 would round them.
    """
    half = stored.half()
    if not bool((half.float() == stored.float()).all()):
        raise ArtifactError(
            f"{module}: float16, which GGUF needs, would round its scales or minima"
        )
    return half
