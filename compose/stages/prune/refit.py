"""What stays makes up for what goes: removed inputs of a linear layer are predicted from the rest.

A layer that loses input channels keeps the outputs it had, as far as the channels that stay can
tell, when its weights are fitted anew by least squares on text (channel pruning: arXiv 1707.06168,
eq. 4). The fit needs the products of its inputs with each other alone, so one pass over the text
serves all layers, and no gradient is taken. In the same way the MLP before a dropped layer learns
what that layer used to add.
"""

from __future__ import annotations

from contextlib import AbstractContextManager
from typing import TYPE_CHECKING, Any

from compose.stages.base import StageJob
from compose.stages.prune.edit import decoder_layers, last_linear, look_on

if TYPE_CHECKING:
    from torch import Tensor

DOUBT = 4.0  # what ridge a fit gets for each of its inputs, over the tokens it is made on


def _fast_products() -> AbstractContextManager[Any]:
    """Within this context a model multiplies in bfloat16 where the device is fast at it."""
    import torch

    from gateskip.training.loop import precision

    return torch.autocast("cpu", torch.bfloat16, enabled=precision("auto") == "bf16")


def read_text(model: Any, blocks: Tensor, hooks: list[Any], job: StageJob, note: str) -> None:
    """Let a model read blocks [N, S] once, as fast as it can, while hooks look on."""
    import torch

    with torch.inference_mode(), _fast_products():
        look_on(lambda block: model(block, use_cache=False), blocks, hooks, job, note)


def input_grams(model: Any, readers: list[Any], blocks: Tensor, job: StageJob) -> list[Tensor]:
    """Mean outer products of what each linear layer reads on blocks [N, S], [in, in] a reader.

    Readers of one and the same input share one product.
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
                sums[number] = torch.zeros(rows.shape[1], rows.shape[1])
            sums[number].addmm_(rows.T, rows)

        return hook

    hooks = [reader.register_forward_pre_hook(watch(i)) for i, reader in enumerate(readers)]
    read_text(model, blocks, hooks, job, "refitting")
    means = {number: total / blocks.numel() for number, total in sums.items()}
    return [means[first] for first in owner]


def made_up(weight: Tensor, kept: Tensor, gram: Tensor, tokens: int) -> Tensor:
    """Weights [out, kept] that do best what `weight` [out, in] did, from the inputs `kept` alone.

    `gram` [in, in] holds the inputs' mean products over so many tokens.
    """
    import torch

    from gateskip.calibration.fit_shortcuts import ridge_solution

    stays = torch.zeros(len(gram), dtype=torch.bool)
    stays[kept] = True
    gone = (~stays).nonzero().squeeze(1)
    if len(gone) == 0:
        return weight[:, kept]
    ridge = ridge_for(len(gram), tokens)
    ways = ridge_solution(gram[kept][:, kept], gram[kept][:, gone], ridge)  # [kept, gone]
    return weight[:, kept] + weight[:, gone] @ ways.T


def ridge_for(inputs: int, tokens: int) -> float:
    """How far a fit is held back, relative to its inputs' mean square: the fewer tokens it is made
    on, the more (docs/experiments.md)."""
    return DOUBT * inputs / tokens


class Gap:
    """Layers `first` to `last` that go, and what the MLP before them must add in their place."""

    def __init__(self, model: Any, first: int, last: int) -> None:
        import torch

        from gateskip.model.families import find_branches

        layers = decoder_layers(model)
        self.reader = last_linear(find_branches(model)[2 * first - 1].module)
        width = self.reader.in_features
        self.gram = torch.zeros(width, width)
        self.cross = torch.zeros(width, model.config.hidden_size)
        self.hooks = [
            self.reader.register_forward_pre_hook(self._read),
            layers[first].register_forward_pre_hook(self._enter, with_kwargs=True),
            layers[last].register_forward_hook(self._leave),
        ]

    def _read(self, module: Any, inputs: tuple[Tensor, ...]) -> None:
        self.seen = inputs[0].flatten(0, -2).float()

    def _enter(self, module: Any, inputs: tuple[Any, ...], named: dict[str, Any]) -> None:
        self.entered = (inputs[0] if inputs else named["hidden_states"]).flatten(0, -2).float()

    def _leave(self, module: Any, inputs: Any, output: Any) -> None:
        from gateskip.calibration.fit_shortcuts import token_weights

        left = (output[0] if isinstance(output, tuple) else output).reshape(self.entered.shape)
        weight = token_weights(left.float())  # what reads hidden states norms them
        scaled = self.seen * (weight / weight.median()).unsqueeze(1)  # blocks count alike
        self.gram.addmm_(scaled.T, self.seen)
        self.cross.addmm_(scaled.T, left.float() - self.entered)

    def close(self, tokens: int) -> None:
        """Let the MLP before the gap add what the layers in it did, as far as so many tell."""
        from gateskip.calibration.fit_shortcuts import ridge_solution

        ridge = ridge_for(len(self.gram), tokens)
        self.reader.weight.data += ridge_solution(self.gram, self.cross, ridge).T


def close_gaps(model: Any, gone: set[int], blocks: Tensor, job: StageJob) -> int:
    """Prepare a model for the loss of the layers `gone`; returns how many gaps were closed.

    No MLP stands before layer 0. One whose output is normed (Gemma, OLMo2) is left alone, as are
    families that are not known by name.
    """
    import torch

    from gateskip.model.families import FAMILIES

    family = FAMILIES.get(model.config.model_type)
    if family is None or family.mlp_out is not None:
        return 0
    gaps = [Gap(model, first, last) for first, last in _runs(gone) if first > 0]
    hooks = [hook for gap in gaps for hook in gap.hooks]
    read_text(model, blocks, hooks, job, "refitting")
    with torch.no_grad():
        for gap in gaps:
            gap.close(blocks.numel())
    return len(gaps)


def _runs(numbers: set[int]) -> list[tuple[int, int]]:
    """{2, 5, 6} -> [(2, 2), (5, 6)]."""
    firsts = sorted(number for number in numbers if number - 1 not in numbers)
    lasts = sorted(number for number in numbers if number + 1 not in numbers)
    return list(zip(firsts, lasts, strict=True))
