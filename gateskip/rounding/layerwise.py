"""Rounds a model's linear layers one after another, each for inputs from the rounded layers below.

Token blocks pass the layers in order. Within a layer, linear modules that read the same input are
rounded together, in the order in which they run; later ones read the rounded outputs. Only one
layer's second moments exist at a time. With `let_go` only one layer exists in float32: the others
stay in their mapped file.
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor, nn

from gateskip.kernels.autotune import fast_products, fast_type
from gateskip.model.families import backbone
from gateskip.quantization.as_stored import embed_in_float32
from gateskip.quantization.rounding import round_to_grid
from gateskip.rounding.compensate import Rounding, output_error, round_compensated
from gateskip.rounding.layer_files import LayerFiles, Rounded
from gateskip.rounding.moments import Moments
from gateskip.rounding.recording import Recording

BATCH = 4  # blocks in a pass, at most

Choose = Callable[[str], Rounding | None]
"""Layer name -> how it is rounded; None leaves it unchanged."""


class _Stop(Exception):
    """Ends a pass early."""


@torch.no_grad()
def round_layers(
    model: Any,
    blocks: Tensor,
    choose: Choose,
    compensate: bool = True,
    progress: Callable[[int, int], None] = lambda done, total: None,
    let_go: bool = False,
    finished: LayerFiles | None = None,
) -> Iterator[tuple[str, Rounded]]:
    """Round every linear module of the layers that `choose` names; blocks [N, S] are token ids.
    Modules come by name as soon as they are rounded.

    Layers are rounded in float32, whatever type the model is loaded in. Text passes them in
    bfloat16 where that is faster; sums of inputs' products are float32. With `let_go` each layer is
    freed after its turn, and the model cannot run any more; otherwise it keeps the rounded values
    as ordinary weights. Without `compensate` each weight is rounded by itself
    (quantization/rounding.py). Layers in `finished` are taken from there; others are added to it.
    """
    names = {module: name for name, module in model.named_modules()}
    hidden, settings = _entered(model, blocks, let_go)
    layers = list(backbone(model).layers)
    for number, layer in enumerate(layers):
        progress(number, len(layers))
        layer.float()
        passes = _Passes(layer, hidden, settings[number])
        known = None if finished is None else finished.read(number)
        if known is None:
            rounded = _round_layer(passes, names, choose, compensate)
            yield from rounded if finished is None else finished.kept(number, rounded)
        else:
            for name, each in known.items():
                weight = model.get_submodule(name).weight
                weight.data = each.grid.weight().to(weight.device)
            yield from known.items()
        passes.finish()
        if let_go:
            layer.to("meta")
    progress(len(layers), len(layers))


class _Passes:
    """A layer, and hidden states [B, S, H] that pass it batch by batch."""

    def __init__(self, layer: nn.Module, hidden: list[Tensor], settings: dict[str, Any]) -> None:
        self.layer, self.hidden, self._settings = layer, hidden, settings
        self._recording = Recording(layer)

    def readers(self) -> list[list[Any]]:
        """The layer's linear modules in the order in which they run; those with the same input
        together."""
        groups: list[list[Any]] = []
        last: list[Tensor] = []

        def note(module: nn.Module, args: tuple[Tensor, ...]) -> None:
            if last and args[0] is last[0]:
                groups[-1].append(module)
            else:
                groups.append([module])
            last[:] = [args[0]]

        linears = [part for part in self.layer.modules() if isinstance(part, nn.Linear)]
        hooks = [part.register_forward_pre_hook(note) for part in linears]
        try:
            self._run(self.hidden[0])
        finally:
            for hook in hooks:
                hook.remove()
        return groups

    def moments(self, module: Any) -> Moments:
        """Second moments of a module's inputs over all text. Modules that run before it must have
        their final weights: the next pass takes their outputs as they are now."""
        device = self.hidden[0].device
        moments, fast = Moments(module.in_features, device), fast_type(device.type)

        def add(_: nn.Module, args: tuple[Tensor, ...]) -> None:
            moments.add(args[0].flatten(0, -2).to(fast))
            raise _Stop

        hook = module.register_forward_pre_hook(add)
        try:
            for number, part in enumerate(self.hidden):
                with self._recording.of(number):
                    _stopped(lambda part=part: self._run(part))  # type: ignore[misc]
        finally:
            hook.remove()
        return moments

    def finish(self) -> None:
        """The layer's outputs in place of its inputs."""
        for number, part in enumerate(self.hidden):
            with self._recording.of(number):
                self.hidden[number] = self._run(part)
            self._recording.forget(number)

    def _run(self, hidden: Tensor) -> Tensor:
        """`run_layer` with products in bfloat16 where they are faster."""
        with fast_products(hidden.device.type):
            return run_layer(self.layer, hidden, self._settings)


def _round_layer(
    passes: _Passes,
    names: dict[nn.Module, str],
    choose: Choose,
    compensate: bool,
) -> Iterator[tuple[str, Rounded]]:
    """Round a layer's modules in place, for the text that passes it."""
    for modules in passes.readers():
        chosen = {names[m]: (m, how) for m in modules if (how := choose(names[m])) is not None}
        if chosen:
            moments = passes.moments(modules[0])
            yield from _round_readers(chosen, moments, compensate).items()
            del moments


def _entered(model: Any, blocks: Tensor, let_go: bool) -> tuple[list[Tensor], list[dict[str, Any]]]:
    """`enter` with the embedding in float32."""
    embed_in_float32(model)
    entered = enter(model, blocks)
    if let_go:
        for module in (model.get_input_embeddings(), model.get_output_embeddings()):
            module.to("meta")
    return entered


def _round_readers(
    chosen: dict[str, tuple[Any, Rounding]], seen: Moments, compensate: bool
) -> dict[str, Rounded]:
    """Round modules that read the same input, in place. Rows do not depend on each other, so
    modules with the same settings are rounded together, which takes a third less time."""
    chance = seen.chance() if compensate else 0.0
    moments = seen.mean()
    alike: dict[Rounding, list[str]] = {}
    for name, (_, how) in chosen.items():
        alike.setdefault(how, []).append(name)
    done: dict[str, Rounded] = {}
    for how, names in alike.items():
        weights = [chosen[name][0].weight.detach().float() for name in names]
        if compensate:
            whole = round_compensated(torch.cat(weights), moments, how, chance)
        else:
            squares = moments.diagonal()
            whole = round_to_grid(torch.cat(weights), squares, how.bits, how.group, how.offset)
        grids = whole.split([len(weight) for weight in weights])
        for name, weight, grid in zip(names, weights, grids, strict=True):
            done[name] = Rounded(grid.cpu(), output_error(weight, moments, grid))
            chosen[name][0].weight.data = grid.weight()
    return done


def enter(
    model: Any, blocks: Tensor, batch: int | None = None
) -> tuple[list[Tensor], list[dict[str, Any]]]:
    """Hidden states [B, S, H] before the first layer, batch by batch, and each layer's other
    arguments: masks and rotary tables, which depend only on the length."""
    batch = batch or math.gcd(len(blocks), BATCH)
    layers = list(backbone(model).layers)
    settings: list[dict[str, Any]] = [{} for _ in layers]
    entered: list[Tensor] = []

    def passed(number: int) -> Callable[..., Tensor]:
        def forward(*args: Any, **kwargs: Any) -> Tensor:
            hidden: Tensor = args[0] if args else kwargs.pop("hidden_states")
            settings[number] = kwargs
            if number == 0:
                entered.append(hidden)
            if number == len(layers) - 1:
                raise _Stop
            return hidden

        return forward

    for number, layer in enumerate(layers):
        layer.forward = passed(number)
    try:
        for part in blocks.split(batch):
            _stopped(lambda part=part: model(part, use_cache=False))  # type: ignore[misc]
    finally:
        for layer in layers:
            del layer.forward
    return entered, settings


def _stopped(run: Callable[[], object]) -> None:
    with contextlib.suppress(_Stop):
        run()


def run_layer(layer: nn.Module, hidden: Tensor, settings: dict[str, Any]) -> Tensor:
    """A layer's output [B, S, H] for hidden states [B, S, H]."""
    out = layer(hidden, **settings)
    states: Tensor = out[0] if isinstance(out, tuple) else out
    return states
