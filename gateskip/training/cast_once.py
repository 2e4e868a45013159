"""Casts weights that do not train once to the precision to which autocast casts them at every use.

Autocast caches a cast weight within a pass only where the weight gets a gradient. It casts a frozen
backbone, and a teacher's, again in every pass, and an LM head for every chunk of tokens.
"""

from __future__ import annotations

import copy
from typing import Any

import torch
from accelerate import Accelerator
from torch import nn

from gateskip.quantization.packed_linear import DenseLinear

PRECISIONS = {"bf16": torch.bfloat16, "fp16": torch.float16}
"""Accelerate's names of mixed precision -> the type that autocast casts to."""


@torch.no_grad()
def cast_once(model: Any, accelerator: Accelerator) -> Any:
    """A copy of `model` for passes under the accelerator's autocast that train no weight.

    The copy shares everything but the linear layers, whose weights are cast. Passes compute the
    same numbers. Without mixed precision, or without a plain linear layer, it is the model itself:
    packed layers choose their own precision. `model` is moved to the accelerator's device, and its
    parameters stop requiring gradients.
    """
    model.requires_grad_(False).to(accelerator.device)
    dtype = PRECISIONS.get(accelerator.mixed_precision)
    dense = (nn.Linear, DenseLinear)
    linears = [name for name, part in model.named_modules() if type(part) in dense]
    if dtype is None or not linears:
        return model
    shared = (*model.parameters(), *model.buffers())
    copied = copy.deepcopy(model, {id(tensor): tensor for tensor in shared})
    for name in linears:
        copied.set_submodule(name, _cast(copied.get_submodule(name), dtype))
    return copied


def _cast(linear: Any, dtype: torch.dtype) -> nn.Linear:
    """A linear layer with the same bias and cast weights."""
    cast = nn.Linear(linear.in_features, linear.out_features, bias=False, device="meta")
    cast.weight = nn.Parameter(linear.weight.to(dtype), requires_grad=False)
    cast.bias = linear.bias
    return cast
