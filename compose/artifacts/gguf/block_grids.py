"""A GGUF file's blocks as the grids of a model folder, without rounding again.

Blocks of Q4_0, Q4_1 and Q8_0 are grids (blocks.py). Their float16 scales and minima stay float16 in
the folder, so the weights equal the file's, bit by bit, wherever torch or a kernel multiplies in
float32. Native products of 8-bit activations round scales and minima to bfloat16: KL 0.0007 on
SmolLM2's Q4_1 file, a fifth of the cost of rounding the activations. The embedding and a separate
LM head keep their blocks where both are symmetric and of the same kind; all other weights are
dequantized.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

from compose.artifacts.folder import GRID_METHOD
from compose.artifacts.gguf.file import GgufFile, GgufTensor

if TYPE_CHECKING:
    from torch import Tensor

GROUP = 32
GRIDS = ("Q4_0", "Q4_1", "Q8_0")
WITH_MINIMUM = "Q4_1"
EMBEDDING, HEAD = "model.embed_tokens.weight", "lm_head.weight"

Tensors = list[tuple[str, GgufTensor]]
"""Each weight's name in transformers -> the file's tensor."""


def require_grids(file: GgufFile) -> None:
    """Refuse a file whose layers have no blocks that can be kept.

    Raises:
        ArtifactError: with the types in which they are stored.
    """
    kinds = Counter(
        tensor.storage.name
        for name, tensor in file.tensors.items()
        if name.startswith("blk.") and len(tensor.shape) == 2
    )
    if not any(kind in GRIDS for kind in kinds):
        stored = ", ".join(kind for kind, _ in kinds.most_common())
        file.refuse(
            f"its layers are stored as {stored}, and only blocks of {', '.join(GRIDS)} can be kept",
            "leave keep_blocks out: the weights are then dequantized",
        )


def block_weights(tensors: Tensors) -> dict[str, str]:
    """Name -> storage type of the weights that keep their blocks."""
    kinds = {name: tensor.storage.name for name, tensor in tensors}
    layers = {
        name: kinds[name]
        for name, tensor in tensors
        if name.startswith("model.layers.") and len(tensor.shape) == 2 and kinds[name] in GRIDS
    }
    outer = {name: kinds[name] for name in (EMBEDDING, HEAD) if name in kinds}
    alike = len(set(outer.values())) == 1
    symmetric = all(kind in GRIDS and kind != WITH_MINIMUM for kind in outer.values())
    return layers | (outer if alike and symmetric else {})


def quantization(tensors: Tensors, kinds: dict[str, str]) -> dict[str, Any]:
    """config.json's `quantization_config`: the bits of most layers, and the layers that differ."""
    layers = {name.removesuffix(".weight"): kind for name, kind in kinds.items() if _inside(name)}
    usual, _ = Counter(layers.values()).most_common(1)[0]
    linears = [name for name, tensor in tensors if _inside(name) and len(tensor.shape) == 2]
    embedding = (
        {"bits": _bits(kinds[EMBEDDING]), "group_size": GROUP} if EMBEDDING in kinds else None
    )
    return {
        "quant_method": GRID_METHOD,
        "bits": _bits(usual),
        "group_size": GROUP,
        "offset": _offset(usual),
        "scales": "float16",
        "layers": {
            name: {"bits": _bits(kind), "group_size": GROUP, "offset": _offset(kind)}
            for name, kind in layers.items()
            if kind != usual
        },
        "unpacked": [name.removesuffix(".weight") for name in linears if name not in kinds],
        "embedding": embedding,
    }


def grid_tensors(name: str, stored: Any, kind: str) -> Iterator[tuple[str, Tensor]]:
    """A weight's tensors in the folder, from its rows of blocks uint8 [n, bytes]."""
    import torch

    from compose.artifacts.gguf.blocks import read_blocks
    from gateskip.quantization.grid import pack_bits

    blocks = read_blocks(stored, kind)
    module = name.removesuffix("weight")
    yield f"{module}codes", pack_bits(torch.from_numpy(blocks.codes), blocks.bits)
    yield f"{module}scale", torch.from_numpy(blocks.scale)
    if blocks.minimum is not None:
        yield f"{module}minimum", torch.from_numpy(blocks.minimum)


def _inside(name: str) -> bool:
    """Whether this is a weight of a decoder layer."""
    return name.startswith("model.layers.")


def _bits(kind: str) -> int:
    return int(kind[1])


def _offset(kind: str) -> str:
    return "real" if kind == WITH_MINIMUM else "none"
