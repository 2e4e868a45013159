"""Shortcuts by least squares, and the ridge regression that all closed-form fits share."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from gateskip.gates.shortcuts import Shortcuts
from gateskip.kernels.autotune import fast_products
from gateskip.model.families import Branch, device_of, embed, find_branches
from gateskip.model.gating import ANCHORS
from gateskip.model.reference import masked_forward

RIDGE = 0.03  # relative to the mean variance of a branch's input
LARGEST_WEIGHT = 4.0  # of a token in the fit, in medians


@torch.no_grad()
def fit_shortcuts(model: Any, blocks: Tensor, rank: int | Sequence[int]) -> Shortcuts:
    """Least-squares shortcuts of one rank, or of one rank for each branch, that approximate the
    dense model's branches on blocks [N, S] of token ids. Blocks pass layer after layer, so that
    only one layer's sums exist at a time.

    A token's weight is one over the square of the branch's output there, so that relative errors
    count. A few tokens have activations a thousand times larger than usual; unweighted, they would
    dominate the fit.
    """
    branches, width = len(find_branches(model)), model.config.hidden_size
    shortcuts = Shortcuts(branches, width, rank).to(device_of(model))
    parts = blocks.split(4)
    hidden = [embed(model, part.to(device_of(model))) for part in parts]
    for first in range(0, branches, 2):
        sums = {index: _Sums(width, device_of(model)) for index in (first, first + 1)}

        def observe(branch: Branch, x: Tensor, output: Tensor, sums: Any = sums) -> None:
            with torch.autocast(x.device.type, enabled=False):  # only the model's products are fast
                sums[branch.index].add(*(p[:, ANCHORS:].flatten(0, 1).float() for p in (x, output)))

        for place, (part, states) in enumerate(zip(parts, hidden, strict=True)):
            with fast_products(states.device.type):
                hidden[place] = masked_forward(
                    model, part, observe=observe, start=(first, states), stop=first + 2
                )
        for index, branch_sums in sums.items():
            fitted = branch_sums.solve(shortcuts.ranks[index])
            for stored, part in zip(shortcuts.of(index), fitted, strict=True):
                stored.copy_(part)
    return shortcuts


def token_weights(states: Tensor) -> Tensor:
    """One over the square of each of states [tokens, H], so that relative errors count: [tokens].

    At most LARGEST_WEIGHT medians, since the states of a few tokens are almost zero.
    """
    weight = 1 / states.square().sum(1).clamp_min(1e-12)
    return weight.clamp(max=LARGEST_WEIGHT * weight.median())


def ridge_solution(gram: Tensor, cross: Tensor, ridge: float) -> Tensor:
    """Weights [..., H, K] of ridge regressions from centred gram [..., H, H], cross [..., H, K].

    `ridge` is relative to the inputs' mean variance. By Cholesky: the batched LU of torch 2.13's
    MKL fails on AVX-512 with several threads.
    """
    scale = gram.diagonal(dim1=-2, dim2=-1).mean(-1).clamp_min(1e-12)
    damped = gram + ridge * scale[..., None, None] * torch.eye(gram.shape[-1], device=gram.device)
    return torch.cholesky_solve(cross, torch.linalg.cholesky(damped))


class _Sums:
    """Weighted normal equations of one branch."""

    def __init__(self, width: int, device: torch.device | None = None) -> None:
        self.gram, self.cross = (torch.zeros(width, width, device=device) for _ in range(2))
        self.x, self.output = (torch.zeros(width, device=device) for _ in range(2))
        self.weight = 0.0

    def add(self, x: Tensor, output: Tensor) -> None:
        """x, output [tokens, H]."""
        weight = token_weights(output).unsqueeze(1)
        scaled = x * weight
        self.gram += x.T @ scaled
        self.cross += scaled.T @ output
        self.x += scaled.sum(0)
        self.output += (output * weight).sum(0)
        self.weight += float(weight.sum())

    def solve(self, rank: int) -> tuple[Tensor, Tensor, Tensor]:
        """down [r, H], up [H, r], bias [H]: the ridge solution, truncated to its r largest
        directions."""
        x, output = self.x / self.weight, self.output / self.weight
        gram = self.gram / self.weight - torch.outer(x, x)
        cross = self.cross / self.weight - torch.outer(x, output)
        whole = ridge_solution(gram, cross, RIDGE)  # [H, H]
        _, directions = torch.linalg.eigh(whole.T @ cross)  # of the predictions' covariance
        up = directions[:, len(directions) - rank :]  # [H, r]
        down = whole @ up
        size = down.norm(dim=0).clamp_min(1e-9).sqrt()  # share the size out between both factors
        return (down / size).T, up * size, output - x @ down @ up.T
