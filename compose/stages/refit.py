"""What stays makes up for what goes: removed inputs of a linear layer are predicted from the rest.

A layer that loses input channels keeps the outputs it had, as far as the channels that stay can
tell, when its weights are fitted anew by least squares on text (channel pruning: arXiv 1707.06168,
eq. 4). The fit needs the products of its inputs with each other alone, so one pass over the text
serves all layers, and no gradient is taken.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from compose.stages.base import StageJob
from compose.stages.prune import fast_products, look_on

if TYPE_CHECKING:
    from torch import Tensor

RIDGE = 0.01  # relative to the mean square of the inputs


def input_grams(model: Any, readers: list[Any], blocks: Tensor, job: StageJob) -> list[Tensor]:
    """Mean outer products of what each linear layer reads on blocks [N, S], [in, in] a reader.

    Readers of one and the same input share one product.
    """
    import torch

    sums: dict[int, Tensor] = {}
    seen: dict[int, Tensor] = {}  # number of a reader -> its last input
    owner = list(range(len(readers)))

    def watch(number: int) -> Any:
        def hook(module: Any, inputs: tuple[Tensor, ...]) -> None:
            before = seen.get(number - 1)
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
    with torch.inference_mode(), fast_products():
        look_on(lambda block: model(block, use_cache=False), blocks, hooks, job, "refitting")
    means = {number: total / blocks.numel() for number, total in sums.items()}
    return [means[first] for first in owner]


def made_up(weight: Tensor, kept: Tensor, gram: Tensor) -> Tensor:
    """Weights [out, kept] that do best what `weight` [out, in] did, from the inputs `kept` alone.

    `gram` [in, in] holds the inputs' mean products.
    """
    import torch

    from gateskip.shortcuts import ridge_solution

    stays = torch.zeros(len(gram), dtype=torch.bool)
    stays[kept] = True
    gone = (~stays).nonzero().squeeze(1)
    if len(gone) == 0:
        return weight[:, kept]
    ways = ridge_solution(gram[kept][:, kept], gram[kept][:, gone], RIDGE)  # [kept, gone]
    return weight[:, kept] + weight[:, gone] @ ways.T
