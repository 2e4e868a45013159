"""Linear layers rounded by their weights alone: no text is read, and all inputs weigh alike."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor, nn

from gateskip.model.families import backbone
from gateskip.quantization.rounding import round_to_grid
from gateskip.rounding.compensate import Rounding
from gateskip.rounding.layer_files import Rounded
from gateskip.rounding.layerwise import Choose


@torch.no_grad()
def round_weights_alone(
    model: Any, choose: Choose, progress: Callable[[int, int], None], let_go: bool = False
) -> Iterator[tuple[str, Rounded]]:
    """Round every linear module of the layers that `choose` names; they come by name.

    With `let_go` each layer is freed after its turn; else it keeps the rounded values as ordinary
    weights.
    """
    names = {module: name for name, module in model.named_modules()}
    layers = list(backbone(model).layers)
    for number, layer in enumerate(layers):
        progress(number, len(layers))
        linears = [module for module in layer.modules() if isinstance(module, nn.Linear)]
        for linear in linears:
            if (how := choose(names[linear])) is not None:
                yield names[linear], _rounded(linear, how)
        if let_go:
            layer.to("meta")
    progress(len(layers), len(layers))


def _rounded(linear: nn.Linear, how: Rounding) -> Rounded:
    """A layer's weights on a grid, in place, and their relative error."""
    weight = linear.weight.detach().float()
    squares = torch.ones(weight.shape[1], device=weight.device)
    grid = round_to_grid(weight, squares, how.bits, how.group, how.offset)
    values = grid.weight()
    linear.weight.data = values
    return Rounded(grid, _relative_error(weight, values))


def _relative_error(weight: Tensor, values: Tensor) -> float:
    """||W - Q|| / ||W||."""
    return float((weight - values).norm() / weight.norm().clamp_min(1e-12))
