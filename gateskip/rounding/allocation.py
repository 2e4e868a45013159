"""Mixed bits: gives each layer the bits with which the model has the lowest KL under a size limit.

The cost of a layer's rounding is measured: its weights are rounded alone, and the KL of the whole
model's distribution from the unrounded one is taken on text, at every fourth token. That takes a
pass for each option of each layer; sensitivity.py estimates the same from few passes. Costs of
different layers are added up. The sum is not exact, but it ranks layers by the benefit of another
bit.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, TypeVar

import torch
from torch import Tensor

from gateskip.model.families import backbone, final_norm, head
from gateskip.model.inputs import input_squares
from gateskip.quantization.rounding import round_to_grid
from gateskip.rounding.compensate import Rounding
from gateskip.rounding.layerwise import enter, run_layer

T = TypeVar("T")

EVERY = 4  # positions of a text for one that is compared: logits cost as much as many layers

Costs = dict[str, dict[Rounding, float]]
"""Layer -> how it is rounded -> KL in nats a token when this layer alone is rounded like that."""


@torch.no_grad()
def measure_costs(
    model: Any,
    blocks: Tensor,
    options: Callable[[str], Sequence[Rounding]],
    progress: Callable[[int, int], None] = lambda done, total: None,
    known: Costs | None = None,
    keep: Callable[[Costs], None] = lambda costs: None,
) -> Costs:
    """The cost of each option of each linear layer that has any, on token ids [N, S].

    A layer's inputs come from the unrounded layers below it, which run once: an option of layer l
    only runs the layers from l on. Layers in `known` are not measured again; `keep` is called with
    all costs so far after each layer.
    """
    names = {module: name for name, module in model.named_modules()}
    layers = list(backbone(model).layers)
    linears = [
        (number, part)
        for number, layer in enumerate(layers)
        for part in layer.modules()
        if isinstance(part, torch.nn.Linear) and options(names[part])
    ]
    squares = input_squares([part for _, part in linears], lambda: model(blocks, use_cache=False))
    runs = _Runs(model, blocks)
    costs: Costs = dict(known or {})
    for done, ((number, part), mean) in enumerate(zip(linears, squares, strict=True)):
        progress(done, len(linears))
        if names[part] in costs:
            continue
        whole = part.weight.detach().clone()
        costs[names[part]] = {}
        for how in options(names[part]):
            grid = round_to_grid(whole.float(), mean, how.bits, how.group, how.offset)
            part.weight.copy_(grid.weight())
            costs[names[part]][how] = runs.kl_from(number)
        part.weight.copy_(whole)
        keep(costs)
    progress(len(linears), len(linears))
    return costs


class _Runs:
    """The model's passes over one text, from any layer on."""

    def __init__(self, model: Any, blocks: Tensor) -> None:
        self.model = model
        self.layers = list(backbone(model).layers)
        (hidden, *_), self.settings = enter(model, blocks, len(blocks))
        self.entered = [hidden]  # the input of each layer
        for layer, settings in zip(self.layers, self.settings, strict=True):
            self.entered.append(run_layer(layer, self.entered[-1], settings))
        self.dense = self._distribution(self.entered[-1])

    def kl_from(self, number: int) -> float:
        """KL of the distribution, in nats a token, after the layers from `number` on have run
        again."""
        hidden = self.entered[number]
        for layer, settings in zip(self.layers[number:], self.settings[number:], strict=True):
            hidden = run_layer(layer, hidden, settings)
        return mean_kl(self.dense, self._distribution(hidden))

    def _distribution(self, hidden: Tensor) -> Tensor:
        at = final_norm(self.model)(hidden[:, EVERY - 1 :: EVERY])
        return head(self.model, at).float().log_softmax(-1)


@torch.no_grad()
def distribution(model: Any, blocks: Tensor) -> Tensor:
    """Log-probabilities [N, S / 4, V] at every fourth token of token ids [N, S]."""
    hidden = backbone(model)(blocks, use_cache=False).last_hidden_state
    return head(model, hidden[:, EVERY - 1 :: EVERY]).float().log_softmax(-1)


def mean_kl(target: Tensor, log_probs: Tensor) -> float:
    """KL in nats a token of log-probabilities [..., V] from those of the target."""
    return float((target.exp() * (target - log_probs)).sum(-1).mean())


def allocate(
    costs: Mapping[str, Mapping[T, float]], sizes: Mapping[str, Mapping[T, int]], limit: int
) -> dict[str, T]:
    """The option of each layer: a low sum of costs at no more than `limit` bytes together.

    Greedy: starts from the smallest option of each layer and repeatedly takes the step that lowers
    the cost most for each byte. An option that is larger and no cheaper than another is never
    taken.

    Raises ValueError where even the smallest options are larger than `limit`.
    """
    chosen = {name: min(sizes[name], key=sizes[name].__getitem__) for name in costs}
    spent = sum(sizes[name][option] for name, option in chosen.items())
    if spent > limit:
        raise ValueError(f"the smallest choice takes {spent} bytes, but only {limit} are allowed")
    while True:
        steps = [
            (gain, extra, name, option)
            for name, now in chosen.items()
            for gain, extra, option in _steps(now, costs[name], sizes[name])
            if spent + extra <= limit
        ]
        if not steps:
            return chosen
        _, extra, name, option = max(steps, key=lambda step: step[:3])
        chosen[name] = option
        spent += extra


def _steps(
    now: T, costs: Mapping[T, float], sizes: Mapping[T, int]
) -> Iterator[tuple[float, int, T]]:
    """Larger options of a layer, with less cost: cost saved for each byte, bytes, option."""
    for option, size in sizes.items():
        extra = size - sizes[now]
        if extra > 0 and costs[option] < costs[now]:
            yield (costs[now] - costs[option]) / extra, extra, option
