"""Bytes of a chain's weight files from its plan: shapes after pruning, bits after quantizing."""

from __future__ import annotations

from collections.abc import Sequence

from compose.stages.base import ModelShape, Stage

BITS = {"float32": 32, "bfloat16": 16, "float16": 16}
"""Bits of a weight that is not packed, by the pipeline's type."""


def predicted_bytes(shape: ModelShape, chain: Sequence[Stage], dtype: str) -> int | None:
    """Bytes of the weight files that a chain of stages makes of a model of `shape`.

    Norms, biases and gates are left out: kilobytes to a few megabytes. None where a stage packs
    weights or removes some and does not say how many.
    """
    if shape.quantized is not None:
        return None
    layers: float = BITS[dtype]
    outer: float = BITS[dtype]
    for stage in chain:
        if stage.role == "quantize":
            packed = stage.stored_bits(shape)
            if packed is None:
                return None
            layers, outer = packed.layers, packed.outer or outer
        smaller = stage.reshape(shape)
        if stage.role == "prune" and smaller == shape:
            return None  # only the weights show what it removes
        shape = smaller
    outside = shape.vocab_size * shape.hidden_size * (1 if shape.tie_embeddings else 2)
    return round(((shape.weights - outside) * layers + outside * outer) / 8)
