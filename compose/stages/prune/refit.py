"""Least-squares reconstruction after structured pruning.

A linear layer that loses input channels is re-fitted: its remaining weights approximate its old
outputs on text as closely as possible (channel pruning: arXiv 1707.06168, eq. 4). The fit needs
only the products of the layer's inputs with each other, so one pass over the text serves all
layers, without gradients. The MLP before dropped layers is re-fitted in the same way, to add their
contribution to the residual stream.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

from compose.stages.base import StageJob
from compose.stages.prune.edit import Hook, last_linear, run_hooked

if TYPE_CHECKING:
    from torch import Tensor

RIDGE_PER_INPUT = 4.0  # over the number of tokens of a fit (docs/experiments.md)


def run_text(model: Any, blocks: Tensor, hooks: list[Hook], job: StageJob, note: str) -> None:
    """Run a model once over blocks [N, S], without gradients, and remove the hooks afterwards."""
    import torch

    from gateskip.kernels.autotune import fast_products

    with torch.inference_mode(), fast_products(blocks.device.type):
        run_hooked(lambda block: model(block, use_cache=False), blocks, hooks, job, note)


def input_grams(model: Any, readers: list[Any], blocks: Tensor, job: StageJob) -> list[Tensor]:
    """Gram matrices: mean products of each layer's inputs on blocks [N, S]; [in, in] per reader.

    Readers with the same input share one matrix.
    """
    import torch

    sums: dict[int, Tensor] = {}
    seen: dict[int, Tensor] = {}  # number of the last reader -> its input
    owner = list(range(len(readers)))

    def watch(number: int) -> Any:
        def hook(module: Any, inputs: tuple[Tensor, ...]) -> None:
            before = seen.get(number - 1)
            seen.clear()
            seen[number] = inputs[0]
            if before is not None and before is inputs[0]:
                owner[number] = owner[number - 1]
                return
            rows = inputs[0].flatten(0, -2).float()
            if number not in sums:
                sums[number] = torch.zeros(rows.shape[1], rows.shape[1], device=rows.device)
            sums[number].addmm_(rows.T, rows)

        return hook

    hooks: list[Hook] = [
        reader.register_forward_pre_hook(watch(i)) for i, reader in enumerate(readers)
    ]
    run_text(model, blocks, hooks, job, "refitting")
    means = {number: total / blocks.numel() for number, total in sums.items()}
    return [means[first] for first in owner]


def grams_by_layer(
    model: Any, readers: list[Any], blocks: Tensor, job: StageJob
) -> Iterator[Tensor]:
    """Gram matrices as in `input_grams` for one reader a layer, one after another, so that only one
    exists at a time.

    Blocks pass layer after layer. They have left a layer when its matrix is given, so the layer may
    change.
    """
    import torch

    from gateskip.kernels.autotune import fast_products
    from gateskip.model.families import backbone
    from gateskip.rounding.layerwise import enter, run_layer

    device = blocks.device.type
    with torch.inference_mode(), fast_products(device):
        hidden, settings = enter(model, blocks, batch=1)
    layers = list(backbone(model).layers)
    for number, (layer, reader) in enumerate(zip(layers, readers, strict=True)):
        gram = torch.zeros(reader.in_features, reader.in_features, device=blocks.device)

        def add(module: Any, inputs: tuple[Tensor, ...], gram: Tensor = gram) -> None:
            rows = inputs[0].flatten(0, -2).float()
            gram.addmm_(rows.T, rows)

        hook = reader.register_forward_pre_hook(add)
        with torch.inference_mode(), fast_products(device):
            for place, states in enumerate(hidden):
                hidden[place] = run_layer(layer, states, settings[number])
        hook.remove()
        job.progress(number + 1, len(layers), "refitting")
        yield gram.div_(blocks.numel())


def refitted(weight: Tensor, columns: Tensor, gram: Tensor, tokens: int) -> Tensor:
    """Weights [out, k] whose outputs are closest to those of `weight` [out, in].

    They read only the input columns with the indices `columns` [k]. `gram` [in, in] holds the mean
    products of all inputs over `tokens` tokens. The error is the sum of squares on that text.
    """
    import torch

    from gateskip.calibration.fit_shortcuts import ridge_solution

    stays = torch.zeros(len(gram), dtype=torch.bool, device=gram.device)
    stays[columns] = True
    gone = (~stays).nonzero().squeeze(1)
    if len(gone) == 0:
        return weight[:, columns]
    weight, ridge = weight.float(), ridge_for(len(gram), tokens)
    rows = gram[columns]  # [k, in]
    predictors = ridge_solution(rows[:, columns], rows[:, gone], ridge)  # [k, gone]
    return weight[:, columns] + weight[:, gone] @ predictors.T


def ridge_for(inputs: int, tokens: int) -> float:
    """Ridge penalty of a fit, relative to its inputs' mean square. It is larger for fewer tokens an
    input (docs/experiments.md)."""
    return RIDGE_PER_INPUT * inputs / tokens


class Gap:
    """Layers `first` to `last`, which are dropped, and the re-fit of the MLP before them."""

    def __init__(self, model: Any, first: int, last: int) -> None:
        import torch

        from gateskip.model.families import backbone, find_branches

        layers = backbone(model).layers
        self.reader = last_linear(find_branches(model)[2 * first - 1].module)
        width, device = self.reader.in_features, self.reader.weight.device
        self.gram = torch.zeros(width, width, device=device)
        self.cross = torch.zeros(width, model.config.hidden_size, device=device)
        self.hooks: list[Hook] = [
            self.reader.register_forward_pre_hook(self._read),
            layers[first].register_forward_pre_hook(self._enter, with_kwargs=True),
            layers[last].register_forward_hook(self._leave),
        ]

    def _read(self, module: Any, inputs: tuple[Tensor, ...]) -> None:
        self.inputs = inputs[0].flatten(0, -2).float()

    def _enter(self, module: Any, inputs: tuple[Any, ...], named: dict[str, Any]) -> None:
        self.before = (inputs[0] if inputs else named["hidden_states"]).flatten(0, -2).float()

    def _leave(self, module: Any, inputs: Any, output: Any) -> None:
        from gateskip.calibration.fit_shortcuts import token_weights

        after = (output[0] if isinstance(output, tuple) else output).reshape(self.before.shape)
        # Norms divide hidden states by their size, so that relative errors count; weights are
        # divided by their median, so that all blocks count alike.
        weight = token_weights(after.float())
        scaled = self.inputs * (weight / weight.median()).unsqueeze(1)
        self.gram.addmm_(scaled.T, self.inputs)
        self.cross.addmm_(scaled.T, after.float() - self.before)

    def close(self, tokens: int) -> None:
        """Re-fit the MLP before the gap to add the contribution of the dropped layers, on all
        tokens read."""
        from gateskip.calibration.fit_shortcuts import ridge_solution

        ridge = ridge_for(len(self.gram), tokens)
        added = ridge_solution(self.gram, self.cross, ridge).T
        self.reader.weight.data = self.reader.weight.float() + added


def close_gaps(model: Any, gone: set[int], blocks: Tensor, job: StageJob) -> int:
    """Re-fit the MLPs before the layers `gone`, which are then dropped; returns the number of MLPs.

    blocks [N, S] are the text of the fit. Layer 0 has no MLP before it. An MLP whose output is
    normed (Gemma, OLMo2) does not change, nor do MLPs of families that are not known by name.
    """
    import torch

    from gateskip.model.families import FAMILIES

    family = FAMILIES.get(model.config.model_type)
    if family is None or family.mlp_out is not None:
        return 0
    gaps = [Gap(model, first, last) for first, last in _runs(gone) if first > 0]
    hooks = [hook for gap in gaps for hook in gap.hooks]
    run_text(model, blocks, hooks, job, "refitting")
    with torch.no_grad():
        for gap in gaps:
            gap.close(blocks.numel())
    return len(gaps)


def _runs(numbers: set[int]) -> list[tuple[int, int]]:
    """{2, 5, 6} -> [(2, 2), (5, 6)]."""
    firsts = sorted(number for number in numbers if number - 1 not in numbers)
    lasts = sorted(number for number in numbers if number + 1 not in numbers)
    return list(zip(firsts, lasts, strict=True))
