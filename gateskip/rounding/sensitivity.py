"""Estimates the cost of rounding a layer from gradients: a few passes instead of one an option.

To second order the KL that an error dW of a layer's weights causes is half of E[(g . dW)^2], where
g are gradients of the log-likelihood of tokens that the model draws itself (the Fisher information:
arXiv 2306.07629, where its diagonal weighs single weights; here whole errors are multiplied with
the gradients). For weights W of a layer with inputs x and outputs y, g . dW is the sum over tokens
of a = (dW x) . (gradient of y), so one forward and backward pass serves all layers and all their
options.

The squares of the tokens' a are added up. Correlations between tokens of a sequence are left out:
their estimate, the square of the sum, is one number a sequence and too noisy to help. On SmolLM2, 3
bits, 42 linear layers of six decoder layers, the logarithms of these costs and of measured ones
correlate by 0.87; costs of layers 0 to 2 are estimated too high, those of their MLPs threefold.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from gateskip.model.families import backbone
from gateskip.quantization.rounding import round_to_grid
from gateskip.rounding.allocation import Costs
from gateskip.rounding.compensate import Rounding

TOKENS = 2048  # tokens whose gradients are taken, at most
SEQUENCE = 256  # tokens that attend to each other; with 64, early layers' estimates rise further
BATCH = 2  # sequences in a pass


def estimate_costs(
    model: Any,
    blocks: Tensor,
    options: Callable[[str], Sequence[Rounding]],
    seed: int = 0,
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> Costs:
    """The cost of each option of each linear layer that has any, on token ids [N, S].

    The model's weights, and whether they require gradients, do not change.
    """
    names = {module: name for name, module in model.named_modules()}
    linears = [
        part
        for layer in backbone(model).layers
        for part in layer.modules()
        if isinstance(part, nn.Linear) and options(names[part])
    ]
    taps = _taps(model, linears, sequences(blocks), seed)
    costs: Costs = {}
    for done, part in enumerate(linears):
        progress(done, len(linears))
        costs[names[part]] = _costs(part, *taps.of(part), options(names[part]))
    progress(len(linears), len(linears))
    return costs


def sequences(blocks: Tensor) -> Tensor:
    """Token ids [N, S] as sequences of at most SEQUENCE, from all over the text."""
    length = min(SEQUENCE, blocks.shape[1])
    whole = blocks[:, : blocks.shape[1] // length * length].reshape(-1, length)
    count = min(len(whole), max(1, TOKENS // length))
    return whole[torch.arange(count) * len(whole) // count]


@torch.no_grad()
def _costs(
    part: Any, inputs: Tensor, gradients: Tensor, hows: Sequence[Rounding]
) -> dict[int, float]:
    """KL of each option from inputs [N, S, in] and the gradients of the outputs [N, S, out]."""
    whole, squares = part.weight.float(), inputs.square().mean((0, 1))
    costs: dict[int, float] = {}
    for how in hows:
        lost = round_to_grid(whole, squares, how.bits, how.group, how.offset).weight() - whole
        moved = (F.linear(inputs, lost) * gradients).sum(2)  # [N, S]
        costs[how.bits] = float(moved.square().mean() / 2)
    return costs


class _Taps:
    """Inputs of linear layers, and gradients of their outputs, in bfloat16."""

    def __init__(self, linears: Sequence[nn.Module]) -> None:
        self.inputs: dict[nn.Module, list[Tensor]] = {part: [] for part in linears}
        self.gradients: dict[nn.Module, list[Tensor]] = {part: [] for part in linears}
        self._last: tuple[Tensor, Tensor] | None = None

    def note(self, part: nn.Module, args: tuple[Tensor, ...], output: Tensor) -> None:
        """Keep an input, once for all layers that read it, and hook the output's gradient."""
        if self._last is None or self._last[0] is not args[0]:
            self._last = args[0], args[0].detach().bfloat16()
        self.inputs[part].append(self._last[1])
        output.register_hook(lambda gradient: self.gradients[part].append(gradient.bfloat16()))

    def of(self, part: nn.Module) -> tuple[Tensor, Tensor]:
        """Inputs [N, S, in] and gradients [N, S, out] of a layer, in float32; frees its own."""
        inputs, gradients = self.inputs.pop(part), self.gradients.pop(part)
        return torch.cat(inputs).float(), torch.cat(gradients).float()


def _taps(model: Any, linears: Sequence[nn.Module], ids: Tensor, seed: int) -> _Taps:
    """Forward and backward passes over token ids [N, S], for tokens drawn from the model."""
    taps, generator = _Taps(linears), torch.Generator(ids.device).manual_seed(seed)
    learning = [weight for weight in model.parameters() if weight.requires_grad]
    model.requires_grad_(False)
    embedding = model.get_input_embeddings()
    hooks = [part.register_forward_hook(taps.note) for part in linears]
    hooks.append(embedding.register_forward_hook(lambda _, args, out: out.requires_grad_()))
    try:
        with torch.enable_grad():
            for part in ids.split(BATCH):
                logits = model(part, use_cache=False).logits.float().flatten(0, 1)
                drawn = torch.multinomial(logits.detach().softmax(-1), 1, generator=generator)
                F.cross_entropy(logits, drawn.squeeze(1), reduction="sum").backward()
    finally:
        for hook in hooks:
            hook.remove()
        for weight in learning:
            weight.requires_grad_()
    return taps
