"""Importance of neurons, heads and channels: by magnitude, by activation, or by Taylor expansion.

Neurons and heads are input channels, or groups of them, of a linear layer: the MLP's down
projection and the attention's output projection. One measurement serves both.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Literal

from compose.stages.base import StageJob
from compose.stages.prune.edit import Hook, block_loss, run_hooked
from compose.stages.prune.refit import run_text

if TYPE_CHECKING:
    from torch import Tensor

Importance = Literal["activation", "magnitude", "taylor"]
GRADIENT_BLOCKS = 16  # calibration blocks that gradients are taken on
AT_ONCE = 1 << 26  # weights in float32


def activation_scores(readers: list[Any], squares: list[Tensor], group: int = 1) -> list[Tensor]:
    """Mean square of the contribution of each group of input channels, [groups] per reader.

    A channel adds its activation times its column of weights, so its contribution has the size of
    activation times column norm (Wanda's score, arXiv 2306.11695, summed over a column). `squares`
    are the activations' mean squares, [in] per reader.
    """
    return [
        _by_group(square * _column_squares(reader.weight), group)
        for square, reader in zip(squares, readers, strict=True)
    ]


def taylor_scores(
    model: Any, readers: list[Any], blocks: Tensor, job: StageJob, group: int = 1
) -> list[Tensor]:
    """Mean square of the loss's gradient in a mask on each group of channels, [groups] per reader,
    over the first blocks.

    The gradient in a token's mask is the sum of activation times gradient over the group. To first
    order it is the change of the loss when the group is removed there (Taylor criterion, arXiv
    1906.10771, eq. 8).
    """
    import torch

    blocks = blocks[:GRADIENT_BLOCKS]
    squares = [
        torch.zeros(reader.in_features // group, device=reader.weight.device) for reader in readers
    ]

    def watch(number: int) -> Any:
        def hook(module: Any, inputs: tuple[Tensor, ...]) -> None:
            activation = inputs[0]

            def add(gradient: Tensor) -> None:
                product = (activation.detach() * gradient).flatten(0, -2)  # [tokens, in]
                of_mask = product.unflatten(-1, (-1, group)).sum(-1)  # [tokens, groups]
                squares[number] += of_mask.float().square().sum(0)

            activation.register_hook(add)

        return hook

    hooks: list[Hook] = [
        reader.register_forward_pre_hook(watch(i)) for i, reader in enumerate(readers)
    ]
    embedding = model.requires_grad_(False).get_input_embeddings()
    hooks.append(
        embedding.register_forward_hook(lambda module, inputs, output: output.requires_grad_())
    )
    with torch.enable_grad():
        run_hooked(
            lambda block: block_loss(model, block).backward(), blocks, hooks, job, "gradients"
        )
    return [square / blocks.numel() for square in squares]


def magnitude_scores(reader: Any, writers: list[Tensor], group: int = 1) -> Tensor:
    """Sum of squared weights of each group of channels, [groups].

    `writers` [N, ...] are the weights that compute the N channels that the layer `reader` reads.
    """
    squares = _column_squares(reader.weight)
    for weight in writers:
        squares = squares + weight.detach().float().square().sum(1)
    return _by_group(squares, group)


def _column_squares(weight: Tensor) -> Tensor:
    """Sums of squares [in] over the rows of weights [out, in], of a large LM head in parts."""
    rows = max(1, AT_ONCE // weight.shape[1])
    total: Tensor = sum(part.float().square().sum(0) for part in weight.detach().split(rows))
    return total


def _by_group(channels: Tensor, group: int) -> Tensor:
    """[N] -> [N / group]."""
    grouped: Tensor = channels.unflatten(0, (-1, group))
    return grouped.sum(1)


def importance_scores(
    importance: Importance,
    model: Any,
    readers: list[Any],
    blocks: Tensor,
    job: StageJob,
    grams: list[Tensor] | None,
    group: int = 1,
    writers: list[list[Tensor]] | None = None,
) -> list[Tensor]:
    """Squared importance of each group of input channels: [groups] for each of `readers`.

    `grams` [in, in], one per reader, are the mean products of its inputs; without them `activation`
    runs the text once. `writers`, a list per reader, are the weights [in, ...] that compute its
    channels; `magnitude` also counts these.
    """
    if importance == "magnitude":
        written_by: list[list[Tensor]] = writers or [[] for _ in readers]
        return [magnitude_scores(*pair, group) for pair in zip(readers, written_by, strict=True)]
    if importance == "taylor":
        return taylor_scores(model, readers, blocks, job, group)
    if grams is not None:
        squares = [gram.diagonal() for gram in grams]
    else:
        from gateskip.model.inputs import input_squares

        squares = input_squares(readers, lambda: run_text(model, blocks, [], job, "ranking"))
    return activation_scores(readers, squares, group)
