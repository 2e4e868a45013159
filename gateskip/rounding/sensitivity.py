"""Estimates the cost of rounding a layer from gradients: a few passes instead of one an option.

To second order the KL that an error dW of a layer's weights causes is half of E[(g . dW)^2], where
g are gradients of the log-likelihood of tokens that the model draws itself (the Fisher information:
arXiv 2306.07629, where its diagonal weighs single weights; here whole errors are multiplied with
the gradients). For weights W of a layer with inputs x and outputs y, g . dW is the sum over tokens
of a = (dW x) . (gradient of y), so one forward and backward pass serves all layers and all their
options. On the way back each layer runs once more, so that the inputs and gradients of one layer
alone are in memory.

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

from gateskip.kernels.autotune import fast_products
from gateskip.model.families import backbone, device_of, final_norm, head
from gateskip.quantization.packed_linear import DenseLinear
from gateskip.quantization.rounding import round_to_grid
from gateskip.rounding.allocation import Costs
from gateskip.rounding.compensate import Rounding
from gateskip.rounding.layerwise import enter, run_layer

TOKENS = 2048  # tokens whose gradients are taken, at most
SEQUENCE = 256  # tokens that attend to each other; with 64, early layers' estimates rise further
OUTPUTS = 512  # rows of a weight that are rounded on trial, about, when it has more


def estimate_costs(
    model: Any,
    blocks: Tensor,
    options: Callable[[str], Sequence[Rounding]],
    seed: int = 0,
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> Costs:
    """The cost of each option of each linear layer that has any, on token ids [N, S].

    The model computes in float32; its weights may have another type (quantization/as_stored.py).
    Products are in bfloat16 where that is faster. The model's weights, and whether they require
    gradients, do not change.
    """
    names = {module: name for name, module in model.named_modules()}
    learning = [weight for weight in model.parameters() if weight.requires_grad]
    model.requires_grad_(False)
    costs: Costs = {}
    try:
        with fast_products(device_of(model).type):
            backward = _Backward(model, sequences(blocks), seed)
            for done in range(len(backward)):
                progress(done, len(backward))
                taps = backward.next_layer()
                for part in taps.linears:
                    if hows := options(names[part]):
                        costs[names[part]] = _costs(part, *taps.of(part), hows)
    finally:
        for weight in learning:
            weight.requires_grad_()
    progress(len(backward), len(backward))
    return {name: costs[name] for name in names.values() if name in costs}


def sequences(blocks: Tensor) -> Tensor:
    """Token ids [N, S] as sequences of at most SEQUENCE, from all over the text."""
    length = min(SEQUENCE, blocks.shape[1])
    whole = blocks[:, : blocks.shape[1] // length * length].reshape(-1, length)
    count = min(len(whole), max(1, TOKENS // length))
    return whole[torch.arange(count) * len(whole) // count]


@torch.no_grad()
def _costs(
    part: Any, inputs: Tensor, gradients: Tensor, hows: Sequence[Rounding]
) -> dict[Rounding, float]:
    """KL of each option from inputs [N, S, in] and the gradients of the outputs [N, S, out].

    Errors of rows are independent: a share of all rows causes this share of the KL, on average.
    """
    step = max(1, gradients.shape[2] // OUTPUTS)
    whole, gradients = part.weight[::step].float(), gradients[..., ::step]
    share = len(whole) / len(part.weight)
    squares = inputs.square().mean((0, 1))
    costs: dict[Rounding, float] = {}
    for how in hows:
        lost = round_to_grid(whole, squares, how.bits, how.group, how.offset).weight() - whole
        moved = (F.linear(inputs, lost).float() * gradients).sum(2)  # [N, S]
        costs[how] = float(moved.square().mean() / 2 / share)
    return costs


class _Backward:
    """Goes from the last decoder layer to the first with the gradients of the log-likelihood of
    tokens that the model draws."""

    def __init__(self, model: Any, ids: Tensor, seed: int) -> None:
        self._layers = list(backbone(model).layers)
        hidden, self._settings = enter(model, ids)
        self._entered: list[list[Tensor]] = []  # of each layer, inputs [B, S, H] batch by batch
        with torch.no_grad():
            for layer, settings in zip(self._layers, self._settings, strict=True):
                self._entered.append(hidden)
                hidden = [run_layer(layer, part, settings) for part in hidden]
        self._gradients = _of_drawn_tokens(model, hidden, seed)

    def __len__(self) -> int:
        return len(self._layers)

    def next_layer(self) -> _Taps:
        """The layer below the one before."""
        number = len(self._entered) - 1
        layer, settings = self._layers[number], self._settings[number]
        taps = _Taps(layer)
        with taps:
            for batch, part in enumerate(self._entered.pop()):
                part = part.detach().requires_grad_()
                with torch.enable_grad():
                    out = run_layer(layer, part, settings)
                (self._gradients[batch],) = torch.autograd.grad(out, part, self._gradients[batch])
        return taps


def _of_drawn_tokens(model: Any, hidden: Sequence[Tensor], seed: int) -> list[Tensor]:
    """Gradients of the outputs [B, S, H] of the last layer, sequence by sequence: logits of a large
    vocabulary take as much memory as many layers."""
    gradients: list[Tensor] = []
    generator = torch.Generator(hidden[0].device).manual_seed(seed)
    for batch in hidden:
        parts = []
        for states in batch.split(1):
            states = states.detach().requires_grad_()
            with torch.enable_grad():
                logits = head(model, final_norm(model)(states)).float().flatten(0, 1)
                drawn = torch.multinomial(logits.detach().softmax(-1), 1, generator=generator)
                loss = F.cross_entropy(logits, drawn.squeeze(1), reduction="sum")
            parts += torch.autograd.grad(loss, states)
        gradients.append(torch.cat(parts))
    return gradients


class _Taps:
    """Inputs of a decoder layer's linear modules, and gradients of their outputs, in bfloat16."""

    def __init__(self, layer: nn.Module) -> None:
        self.linears = [m for m in layer.modules() if isinstance(m, nn.Linear | DenseLinear)]
        self.inputs: dict[nn.Module, list[Tensor]] = {part: [] for part in self.linears}
        self.gradients: dict[nn.Module, list[Tensor]] = {part: [] for part in self.linears}

    def __enter__(self) -> None:
        self._hooks = [part.register_forward_hook(self._note) for part in self.linears]

    def __exit__(self, *_: object) -> None:
        for hook in self._hooks:
            hook.remove()

    def _note(self, part: nn.Module, args: tuple[Tensor, ...], output: Tensor) -> None:
        self.inputs[part].append(args[0].detach().bfloat16())
        output.register_hook(lambda gradient: self.gradients[part].append(gradient.bfloat16()))

    def of(self, part: nn.Module) -> tuple[Tensor, Tensor]:
        """Inputs [N, S, in] and gradients [N, S, out] of a module, in float32."""
        return torch.cat(self.inputs[part]).float(), torch.cat(self.gradients[part]).float()
