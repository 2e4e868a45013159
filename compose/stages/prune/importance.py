"""How much a neuron or a head matters: by its weights, by what it adds on text, or by the loss.

Neurons and heads are channels, or groups of channels, of what a linear layer reads: the MLP's down
projection and the attention's output projection. So one measurement serves both.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Literal

from compose.stages.base import StageJob
from compose.stages.prune.edit import look_on, next_token_loss
from compose.stages.prune.refit import read_text

if TYPE_CHECKING:
    from torch import Tensor

Importance = Literal["activation", "magnitude", "taylor"]
SLOPE_BLOCKS = 16  # calibration blocks that gradients are taken on


def input_squares(model: Any, readers: list[Any], blocks: Tensor, job: StageJob) -> list[Tensor]:
    """Mean square of each channel that a linear layer reads on the text, [in] a reader."""
    import torch

    squares = [torch.zeros(reader.in_features) for reader in readers]

    def watch(number: int) -> Any:
        def hook(module: Any, inputs: tuple[Tensor, ...]) -> None:
            squares[number] += inputs[0].flatten(0, -2).float().square().sum(0)

        return hook

    hooks = [reader.register_forward_pre_hook(watch(i)) for i, reader in enumerate(readers)]
    read_text(model, blocks, hooks, job, "ranking")
    return [square / blocks.numel() for square in squares]


def contributions(readers: list[Any], squares: list[Tensor], group: int = 1) -> list[Tensor]:
    """Mean square of what each group of input channels adds, [groups] a reader.

    A channel adds its activation times its column of weights, so its contribution has the size of
    activation times column norm (Wanda's score, arXiv 2306.11695, summed over a column). `squares`
    are the activations' mean squares, [in] a reader.
    """
    return [
        _by_group(square * reader.weight.detach().float().square().sum(0), group)
        for square, reader in zip(squares, readers, strict=True)
    ]


def slopes(
    model: Any, readers: list[Any], blocks: Tensor, job: StageJob, group: int = 1
) -> list[Tensor]:
    """Mean square of the loss's slope in a mask on each group of channels, [groups] a reader, over
    the first blocks.

    The slope in a token's mask is the sum of activation times gradient over the group; to first
    order it is what removing the group there changes (Taylor criterion, arXiv 1906.10771, eq. 8).
    """
    import torch

    blocks = blocks[:SLOPE_BLOCKS]
    squares = [torch.zeros(reader.in_features // group) for reader in readers]

    def watch(number: int) -> Any:
        def hook(module: Any, inputs: tuple[Tensor, ...]) -> None:
            seen = inputs[0]

            def add(gradient: Tensor) -> None:
                slope = (seen.detach() * gradient).flatten(0, -2).unflatten(-1, (-1, group)).sum(-1)
                squares[number] += slope.float().square().sum(0)

            seen.register_hook(add)

        return hook

    hooks = [reader.register_forward_pre_hook(watch(i)) for i, reader in enumerate(readers)]
    embedding = model.requires_grad_(False).get_input_embeddings()
    hooks.append(embedding.register_forward_hook(lambda _, __, found: found.requires_grad_()))
    with torch.enable_grad():
        look_on(
            lambda block: next_token_loss(model, block).backward(), blocks, hooks, job, "slopes"
        )
    return [square / blocks.numel() for square in squares]


def sizes(reader: Any, writers: list[Tensor], group: int = 1) -> Tensor:
    """Sum of squared weights of each group of channels, [groups].

    `writers` [N, ...] make the N channels that the linear layer `reader` reads.
    """
    found: Tensor = reader.weight.detach().float().square().sum(0)
    for weight in writers:
        found = found + weight.detach().float().square().sum(1)
    return _by_group(found, group)


def _by_group(channels: Tensor, group: int) -> Tensor:
    """[N] -> [N / group]."""
    grouped: Tensor = channels.unflatten(0, (-1, group))
    return grouped.sum(1)


def ranked(
    importance: Importance,
    model: Any,
    readers: list[Any],
    blocks: Tensor,
    job: StageJob,
    grams: list[Tensor] | None,
    group: int = 1,
    writers: list[list[Tensor]] | None = None,
) -> list[Tensor]:
    """Squared importance of each group of input channels, [groups] a reader, in the way asked for.

    `grams` [in, in] a reader, where they are known, spare a pass over the text; `writers` a reader
    are the weights [in, ...] that make its channels.
    """
    if importance == "magnitude":
        made_by: list[list[Tensor]] = writers or [[] for _ in readers]
        return [sizes(*each, group) for each in zip(readers, made_by, strict=True)]
    if importance == "taylor":
        return slopes(model, readers, blocks, job, group)
    if grams is None:
        squares = input_squares(model, readers, blocks, job)
    else:
        squares = [gram.diagonal() for gram in grams]
    return contributions(readers, squares, group)
