"""Adapts gates to the same model with other norms: folds a norm's weights into the gates, and back.

A gate reads its branch's input, w * x / rms(x). Where w was folded into the branch's layers, it has
to be folded into the gate as well: W (w * x) = (W diag(w)) x. Gates in that form fit every model of
the same function: dividing by a model's w gives the gates for its norms.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from gateskip.gates.base import Gates
from gateskip.model.norms import has_folded_norms, input_norms

READS = {
    "scalar": "weight",
    "vector": "weight",
    "low-rank": "down",
    "mlp": "inner",
    "random": "direction",
    "router": "weight",
}
"""Gate kind -> the parameter [branches, ..., H] that multiplies its input. `static` has none,
`exit` uses the model itself, and `shared` has one for many branches."""


def scale_inputs(gates: Gates, by: Tensor) -> None:
    """Multiply all weights of a branch's input by `by` [branches, H], in place.

    Raises:
        ValueError: gates of this kind share weights between branches.
    """
    if gates.kind == "shared":
        raise ValueError("shared gates have one weight for all branches, but each has its own norm")
    weights: list[Any] = [getattr(gates, READS[gates.kind])] if gates.kind in READS else []
    if gates.shortcuts is not None:
        weights.append(gates.shortcuts.down)
    with torch.no_grad():
        for weight in weights:
            factor = by.to(weight.device)
            weight.mul_(factor if weight.ndim == 2 else factor.unsqueeze(1))


def fold_norms_into_gates(gates: Gates, model: Any) -> None:
    """Make gates of `model` fit the same model with its norms folded, in place.

    Raises:
        ValueError: its norms have a bias, or gates of this kind share weights.
    """
    weights = input_norms(model)
    if weights is None:
        raise ValueError(
            f"norms of {model.config.model_type} have a bias, so they cannot be folded"
        )
    scale_inputs(gates, weights)
    gates.folded = True


def fit_norms(gates: Gates, model: Any) -> None:
    """Make gates from a file fit the norms of `model`, in place.

    Raises:
        ValueError: the gates are for norms with weights and the model's are folded; or the gates
            are folded, and the model's norms have a bias or gates of this kind share weights.
    """
    ones = has_folded_norms(model)
    if gates.folded == ones:
        return
    if ones:
        raise ValueError(
            "these gates read the output of norms with weights, but the model's norms are folded"
            " into its layers"
        )
    weights = input_norms(model)
    if weights is None:
        raise ValueError(
            f"norms of {model.config.model_type} have a bias, but these gates are folded"
        )
    scale_inputs(gates, torch.where(weights == 0, 0, 1 / weights))
    gates.folded = False
