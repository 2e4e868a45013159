"""Model folders of integer grids, as transformers loads them.

`config.json` says `quant_method: gateskip`; `layers` lists the layers that differ in bits or group
size. transformers has registers for other quantizers, so `from_pretrained` reads such a folder once
`register` was called; `trust_remote_code` calls it for a folder that contains this code.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import nn
from transformers.quantizers.auto import (
    AUTO_QUANTIZER_MAPPING,
    register_quantization_config,
    register_quantizer,
)
from transformers.quantizers.base import HfQuantizer
from transformers.utils.quantization_config import QuantizationConfigMixin

from gateskip.quantization.grid_linear import (
    IN_STEPS,
    METHOD,
    GridEmbedding,
    GridLinear,
    SharedHead,
)
from gateskip.quantization.offsets import STEPS_BELOW, SYMMETRIC_FROM


class GridConfig(QuantizationConfigMixin):
    """The quantization config of a folder of grids."""

    def __init__(
        self,
        bits: int = 4,
        group_size: int = 32,
        offset: str = "real",
        layers: dict[str, dict[str, Any]] | None = None,
        unpacked: list[str] | None = None,
        embedding: dict[str, Any] | None = None,
        head: dict[str, Any] | None = None,
        scales: str = "bfloat16",
        steps: bool = False,
        **others: Any,
    ) -> None:
        """`layers` has the bits, group sizes and offsets of layers that differ, `unpacked` the
        names of those that are not packed, `embedding` bits and group size of the embedding, and
        `head` those of an LM head with its own table, where they differ.
        `scales` is the type of scales and minima in the file: float16 where the grids come from
        another format. With `steps`, those of fewer than 8 bits are bytes instead, and there are
        exponents (`Lines` of grid.py)."""
        self.quant_method: Any = METHOD
        self.bits, self.group_size, self.offset = bits, group_size, offset
        self.layers, self.unpacked = layers or {}, unpacked or []
        self.embedding, self.head = embedding, head
        self.scales, self.steps = scales, steps

    def stored(self, bits: int) -> torch.dtype:
        """The type of scales and minima beside codes of `bits` bits."""
        dtype: torch.dtype = getattr(torch, self.scales)
        return IN_STEPS if self.steps and bits < STEPS_BELOW else dtype

    def of(self, name: str) -> tuple[int, int]:
        """Bits and group size of a layer."""
        layer = self.layers.get(name, {})
        return layer.get("bits", self.bits), layer.get("group_size", self.group_size)

    def has_minima(self, name: str) -> bool:
        """Whether a layer's groups have a minimum; 6 bits and more are symmetric."""
        offset = self.layers.get(name, {}).get("offset", self.offset)
        return offset != "none" and self.of(name)[0] < SYMMETRIC_FROM


class GridQuantizer(HfQuantizer):
    """Puts empty grid modules where the checkpoint has grids."""

    requires_calibration = True

    def _process_model_before_weight_loading(self, model: Any, **kwargs: Any) -> None:
        config: Any = self.quantization_config
        embedding = model.get_input_embeddings()
        tied = model.config.get_text_config().tie_word_embeddings
        head = model.get_output_embeddings()
        for name, module in list(model.named_modules()):
            if isinstance(module, nn.Linear) and module is not head and name not in config.unpacked:
                model.set_submodule(name, _empty_linear(module, name, config))
        if config.embedding is not None:
            packed = _empty_embedding(embedding, model, config)
            model.set_input_embeddings(packed)
            if tied:
                model.set_output_embeddings(SharedHead(packed))
                model.all_tied_weights_keys = {}
        outer = config.head or config.embedding
        if outer is not None and head is not None and not tied:
            name = next(name for name, module in model.named_modules() if module is head)
            if name not in config.unpacked:
                bits, group = outer["bits"], outer["group_size"]
                model.set_submodule(name, _head(head, bits, group, config.stored(bits)))

    def _process_model_after_weight_loading(self, model: Any, **kwargs: Any) -> None:
        embedding = model.get_input_embeddings()
        if isinstance(embedding, GridEmbedding):
            embedding.hold(_dtype(model))

    def is_serializable(self) -> bool:
        """True: the stage that rounds them writes the folder."""
        return True

    @property
    def is_trainable(self) -> bool:
        """Codes are not trained; scales are, by `heal: {backbone: scales}`."""
        return False


def register() -> None:
    """Let transformers load such folders in this process."""
    if METHOD not in AUTO_QUANTIZER_MAPPING:
        register_quantization_config(METHOD)(GridConfig)
        register_quantizer(METHOD)(GridQuantizer)


def _empty_linear(linear: Any, name: str, config: GridConfig) -> GridLinear:
    bits, group = config.of(name)
    with torch.device(linear.weight.device):
        return GridLinear(
            linear.in_features,
            linear.out_features,
            bits,
            group,
            config.has_minima(name),
            linear.bias is not None,
            linear.weight.dtype,
            config.stored(bits),
        )


def _empty_embedding(embedding: Any, model: Any, config: GridConfig) -> GridEmbedding:
    stated: Any = config.embedding
    sizes = (embedding.num_embeddings, embedding.embedding_dim)
    grid = (stated["bits"], stated["group_size"])
    scale = getattr(embedding, "scalar_embed_scale", None)
    with torch.device(embedding.weight.device):
        return GridEmbedding(*sizes, *grid, _dtype(model), config.stored(grid[0]), scale)


def _head(linear: Any, bits: int, group: int, stored: torch.dtype) -> GridLinear:
    with torch.device(linear.weight.device):
        sizes = (linear.in_features, linear.out_features, bits, group)
        return GridLinear(*sizes, False, linear.bias is not None, linear.weight.dtype, stored)


def _dtype(model: Any) -> torch.dtype:
    """The type in which the model computes: that of its norms."""
    return next((p.dtype for p in model.parameters() if p.is_floating_point()), torch.float32)
