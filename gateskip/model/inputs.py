"""Mean squares of linear layers' inputs, measured while a model runs."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn


def input_squares(layers: Sequence[nn.Module], run: Callable[[], object]) -> list[Tensor]:
    """Mean square of each input of every layer [in], in float32, over all tokens of `run()`.

    `run` runs the model on text. A layer that was not run gets an empty tensor.
    """
    sums: list[Tensor | None] = [None] * len(layers)
    counts = [0] * len(layers)

    def watch(number: int) -> Callable[[nn.Module, tuple[Tensor, ...]], None]:
        def hook(module: nn.Module, inputs: tuple[Tensor, ...]) -> None:
            rows = inputs[0].detach().flatten(0, -2).float()  # [tokens, in]
            squares, before = rows.square().sum(0), sums[number]
            sums[number] = squares if before is None else before.add_(squares)
            counts[number] += len(rows)

        return hook

    hooks = [layer.register_forward_pre_hook(watch(i)) for i, layer in enumerate(layers)]
    try:
        run()
    finally:
        for hook in hooks:
            hook.remove()
    return [
        torch.empty(0) if total is None else total / count
        for total, count in zip(sums, counts, strict=True)
    ]
