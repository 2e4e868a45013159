"""Weights of the norms before branches, which are factors of a gate's input.

RMSNorm gives w * x / rms(x). Where w was folded into the layers after it, the norm's weight is one:
the model's function is the same, but its branches, and so its gates, read x / rms(x).
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from gateskip.model.families import family_of, find_branches


def input_norms(model: Any) -> Tensor | None:
    """The weights of the norm before each branch: [branches, H], in float32.

    Ones where a branch has no norm before it. None where a norm also adds a bias (LayerNorm), since
    no factor undoes that.
    """
    offset = family_of(model).norm.offset
    rows = []
    for branch in find_branches(model):
        norm: Any = branch.norm_in
        if norm is None:
            rows.append(torch.ones(model.config.hidden_size))
            continue
        bias = getattr(norm, "bias", None)
        if bias is not None and bool(bias.any()):
            return None
        rows.append(norm.weight.detach().float().cpu() + offset)
    return torch.stack(rows)


def has_folded_norms(model: Any) -> bool:
    """Whether all norms before branches have weights of one."""
    weights = input_norms(model)
    return weights is not None and bool((weights == 1).all())
