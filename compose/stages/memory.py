"""How much memory a fine-tune holds at its peak, estimated from sizes alone."""

from __future__ import annotations

from compose.stages.shape import ModelShape

AS_STORED, IN_FLOAT32 = 2.0, 4.0
"""Bytes a weight of a mapped file that has two, and of a model in float32."""

TRAINED = {"frozen": 4.0, "lora": 9.0, "scales": 9.0, "full": 20.0, "codes": 26.0}
"""Bytes a weight of the model in a fine-tune, by what learns, in float32: itself, and where
anything of it learns a teacher, gradients and AdamW's two moments; where codes learn, their places,
and the weights that these stand for."""


def training_bytes(shape: ModelShape, tokens: int, seen: int = 0) -> float:
    """About what a step on `tokens` keeps for its backward pass, in bytes: the floats of each token
    in each layer, and its shares of attention to `seen` tokens where these are laid out."""
    inside = 16 * shape.hidden_size + 6 * shape.intermediate_size + 3 * shape.num_heads * seen
    return 4.0 * tokens * shape.num_layers * inside
