"""Integer grids with random codes, and models whose weights lie on grids."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from gateskip.quantization.grid import (
    Grid,
    exact_minimum,
    exact_scale,
    minimum_in_steps,
    row_steps,
    scale_in_steps,
)
from gateskip.quantization.grid_linear import GridEmbedding, GridLinear, SharedHead, stored
from gateskip.quantization.offsets import has_steps
from gateskip.quantization.rounding import round_to_grid


def random_grid(bits: int, group: int, offset: bool, n: int = 41, k: int = 384) -> Grid:
    """All codes, in rows that fill no whole tile; in fewer than 8 bits lines are whole steps."""
    generator = torch.Generator().manual_seed(bits * group)
    codes = torch.randint(0, 1 << bits, (n, k), generator=generator).to(torch.uint8)
    scale = exact_scale((torch.rand(n, k // group, generator=generator) + 0.1) / (1 << bits))
    low = -torch.rand(n, k // group, generator=generator)
    minimum = exact_minimum(low, scale, bits) if offset else None
    if has_steps(bits, "real"):
        step = row_steps(scale, minimum, bits).unsqueeze(1)
        scale = scale_in_steps(scale, step)
        if minimum is not None:
            minimum = minimum_in_steps(minimum, scale, step, bits)
    return Grid(codes, scale, minimum, bits)


def on_grids(model: Any, bits: dict[str, int], embedding: int, group: int = 32) -> Any:
    """A model with its linear layers on grids, of some bits by the end of their names, and its
    embedding, which the head shares, on a symmetric one."""
    for name, linear in list(model.model.layers.named_modules()):
        if isinstance(linear, nn.Linear):
            own = next(n for end, n in bits.items() if name.endswith(end))
            grid = round_to_grid(linear.weight, torch.ones(linear.in_features), own, group)
            model.model.layers.set_submodule(name, GridLinear.of(grid))
    weight = model.get_input_embeddings().weight
    grid = round_to_grid(weight, torch.ones(weight.shape[1]), embedding, 32, "none")
    table = GridEmbedding(*weight.shape, embedding, 32, weight.dtype)
    for name, value in stored(grid).items():
        setattr(table, name, value)
    model.set_input_embeddings(table)
    model.set_output_embeddings(SharedHead(table))
    return model


MIXED = {"q_proj": 4, "k_proj": 3, "v_proj": 8, "up_proj": 2, "": 3}
