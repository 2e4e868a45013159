"""Weights that do not train, once in the precision that autocast would cast them to at every use.

Autocast remembers a cast weight within a pass only where it gets a gradient. A frozen backbone, and
a teacher's, was cast anew in every pass, and an LM head for every chunk of tokens.
"""

from __future__ import annotations

import copy
from typing import Any

import torch
from accelerate import Accelerator
from torch import nn

from gateskip.quantization.packed_linear import DenseLinear

PRECISIONS = {"bf16": torch.bfloat16, "fp16": torch.float16}
"""Accelerate's names of mixed precision -> what autocast casts to."""


@torch.no_grad()
def cast_once(model: Any, accelerator: Accelerator) -> Any:
    """`model`, which is moved to the accelerator's device, for passes under its autocast that train
    no weight: a copy that shares everything but its linear layers, whose weights are cast.

    The passes compute the same numbers. Without mixed precision it is the model itself, and so
    where it has no plain linear layer: packed ones see to their own precision.
    """
    model.requires_grad_(False).to(accelerator.device)
    dtype = PRECISIONS.get(accelerator.mixed_precision)
    dense = (nn.Linear, DenseLinear)
    linears = [name for name, part in model.named_modules() if type(part) in dense]
    if dtype is None or not linears:
        return model
    shared = (*model.parameters(), *model.buffers())
    copied = copy.deepcopy(model, {id(each): each for each in shared})
    for name in linears:
        copied.set_submodule(name, _cast(copied.get_submodule(name), dtype))
    return copied


def _cast(linear: Any, dtype: torch.dtype) -> nn.Linear:
    """A linear layer with the same bias and cast weights."""
    cast = nn.Linear(linear.in_features, linear.out_features, bias=False, device="meta")
    cast.weight = nn.Parameter(linear.weight.to(dtype), requires_grad=False)
    cast.bias = linear.bias
    return cast
