"""Rounds a model's linear layers one after another, each for inputs from the rounded layers below.

Token blocks pass the layers in order. Within a layer, linear modules that read the same input are
rounded together, in the order in which they run; later ones read the rounded outputs. Only one
layer's second moments exist at a time. Text passes a copy of one layer, in bfloat16 where that is
faster.
"""

from __future__ import annotations

import contextlib
import copy
import math
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor, nn

from gateskip.kernels.autotune import fast_type
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

    Weights are rounded in float32, whatever type the model is loaded in. Text passes the layers in
    bfloat16 where that is faster. With `let_go` each layer is freed after its turn, and the model
    cannot run any more; otherwise it gets the rounded values as ordinary weights. Without
    `compensate` each weight is rounded by itself (quantization/rounding.py). Layers in `finished`
    are taken from there; others are added to it.
    """
    names = {module: name for name, module in model.named_modules()}
    hidden, settings = _entered(model, blocks, let_go)
    layers = list(backbone(model).layers)
    for number, layer in enumerate(layers):
        progress(number, len(layers))
        passes = _Passes(layer, names, hidden, settings[number])
        known = None if finished is None else finished.read(number)
        if known is not None:
            rounded = passes.replaced(known)
        elif finished is None:
            rounded = _round_layer(passes, choose, compensate)
        else:
            rounded = finished.kept(number, _round_layer(passes, choose, compensate))
        for name, each in rounded:
            if not let_go:
                weight = model.get_submodule(name).weight
                weight.data = each.grid.weight().to(weight.device)
            yield name, each
        passes.finish()
        if let_go:
            layer.to("meta")
    progress(len(layers), len(layers))


class _Passes:
    """A copy of a layer, and hidden states [B, S, H] that pass it batch by batch."""

    def __init__(
        self,
        layer: nn.Module,
        names: dict[nn.Module, str],
        hidden: list[Tensor],
        settings: dict[str, Any],
    ) -> None:
        """The copy gets the type of `hidden`; `names` are those of the model's modules."""
        self._layer = copy.deepcopy(layer).to(hidden[0].dtype)
        pairs = list(zip(layer.modules(), self._layer.modules(), strict=True))
        self._copies: dict[str, Any] = {names[part]: other for part, other in pairs}
        self._stored: dict[str, Any] = {names[part]: part for part, _ in pairs}
        self._hidden, self._settings = hidden, settings
        self._recording = Recording(self._layer)

    def weight(self, name: str) -> Tensor:
        """The weights of a linear module before rounding, in float32."""
        weight: Tensor = self._stored[name].weight.detach().float()
        return weight

    def replaced(self, rounded: dict[str, Rounded]) -> Iterator[tuple[str, Rounded]]:
        """The same modules, by name; the following passes see their rounded weights."""
        for name, each in rounded.items():
            weight = self._copies[name].weight
            weight.data = each.grid.weight().to(weight)
            yield name, each

    def readers(self) -> list[list[str]]:
        """Names of the layer's linear modules in the order in which they run; those with the same
        input together."""
        groups: list[list[str]] = []
        last: list[Tensor] = []

        def note(name: str) -> Callable[..., None]:
            def hook(_: nn.Module, args: tuple[Tensor, ...]) -> None:
                if last and args[0] is last[0]:
                    groups[-1].append(name)
                else:
                    groups.append([name])
                last[:] = [args[0]]

            return hook

        linears = {n: part for n, part in self._copies.items() if isinstance(part, nn.Linear)}
        hooks = [part.register_forward_pre_hook(note(name)) for name, part in linears.items()]
        try:
            self._run(self._hidden[0])
        finally:
            for hook in hooks:
                hook.remove()
        return groups

    def moments(self, name: str) -> Moments:
        """Second moments of a module's inputs over all text. Modules that run before it must have
        their final weights: the next pass takes their outputs as they are now."""
        module = self._copies[name]
        moments = Moments(module.in_features, self._hidden[0].device)

        def add(_: nn.Module, args: tuple[Tensor, ...]) -> None:
            moments.add(args[0].flatten(0, -2))
            raise _Stop

        hook = module.register_forward_pre_hook(add)
        try:
            for number, part in enumerate(self._hidden):
                with self._recording.of(number):
                    _stopped(lambda part=part: self._run(part))  # type: ignore[misc]
        finally:
            hook.remove()
        return moments

    def finish(self) -> None:
        """The layer's outputs in place of its inputs."""
        for number, part in enumerate(self._hidden):
            with self._recording.of(number):
                self._hidden[number] = self._run(part)
            self._recording.forget(number)

    def _run(self, hidden: Tensor) -> Tensor:
        return run_layer(self._layer, hidden, self._settings)


def _round_layer(
    passes: _Passes, choose: Choose, compensate: bool
) -> Iterator[tuple[str, Rounded]]:
    """Round a layer's modules for the text that passes it."""
    for names in passes.readers():
        chosen = {name: how for name in names if (how := choose(name)) is not None}
        if chosen:
            weights = {name: passes.weight(name) for name in chosen}
            rounded = _round_readers(weights, chosen, passes.moments(names[0]), compensate)
            yield from passes.replaced(rounded)


def _entered(model: Any, blocks: Tensor, let_go: bool) -> tuple[list[Tensor], list[dict[str, Any]]]:
    """`enter` with the embedding in float32, and states and settings in the type that is fast."""
    embed_in_float32(model)
    hidden, settings = enter(model, blocks)
    if let_go:
        for module in (model.get_input_embeddings(), model.get_output_embeddings()):
            module.to("meta")
    fast = fast_type(hidden[0].device.type)
    return _in_type(hidden, fast), _in_type(settings, fast)


def _in_type(values: Any, dtype: torch.dtype) -> Any:
    """The same lists, tuples and dictionaries with tensors of floats in one type."""
    if isinstance(values, dict):
        return {key: _in_type(value, dtype) for key, value in values.items()}
    if isinstance(values, list | tuple):
        return type(values)(_in_type(value, dtype) for value in values)
    floats = isinstance(values, Tensor) and values.is_floating_point()
    return values.to(dtype) if floats else values


def _round_readers(
    weights: dict[str, Tensor], chosen: dict[str, Rounding], seen: Moments, compensate: bool
) -> dict[str, Rounded]:
    """Round modules that read the same input. Rows do not depend on each other, so modules with the
    same settings are rounded together, which takes a third less time."""
    chance = seen.chance() if compensate else 0.0
    moments = seen.mean()
    alike: dict[Rounding, list[str]] = {}
    for name, how in chosen.items():
        alike.setdefault(how, []).append(name)
    done: dict[str, Rounded] = {}
    for how, names in alike.items():
        together = torch.cat([weights[name] for name in names])
        if compensate:
            whole = round_compensated(together, moments, how, chance)
        else:
            squares = moments.diagonal()
            whole = round_to_grid(together, squares, how.bits, how.group, how.offset)
        grids = whole.split([len(weights[name]) for name in names])
        for name, grid in zip(names, grids, strict=True):
            done[name] = Rounded(grid.cpu(), output_error(weights[name], moments, grid))
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
