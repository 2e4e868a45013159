"""Fine-tuning of packed weights, which stay packed.

A packed weight is a code times a scale that a group of codes shares. The codes stay fixed and the
scales are trained: one or two for every hundred weights (PEQA, arXiv 2305.14152, eq. 2). The codes
of an integer grid can be trained, too (grids.py). Format, size and speed of the checkpoint do not
change, so it loads wherever the packed model did. Norms, which are never packed, are trained too.
"""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.nn import functional as F

from gateskip.model.families import backbone
from gateskip.quantization.grid_linear import GridLinear
from gateskip.quantization.packed_linear import bitsandbytes_functions, gptq_weight, int8_parts
from gateskip.training.grids import LearnedGrid, ScaledGrid


class ScaledLinear(nn.Module):
    """A packed linear layer that learns a gain for each of its scales.

    weight[o, i] = codes[o, i] * scale[o, g] * gain[o, g], where column i belongs to group g.
    """

    codes: Tensor
    scale: Tensor
    order: Tensor | None
    bias: Tensor | None

    def __init__(
        self, weight: Tensor, scale: Tensor, groups: Tensor, key: str, bias: Tensor | None
    ) -> None:
        """weight [out, in] of the packed layer; scale [out, G]; groups [in], the group of a column.

        `key` is the name of the stored scales, after the layer's name. Columns are stored group by
        group, all of one size.
        """
        super().__init__()
        order = groups.argsort(stable=True)
        columns = scale.float()[:, groups[order]]
        codes = torch.where(columns == 0, 0.0, weight.float()[:, order] / columns)
        self.key = key
        self.register_buffer("codes", codes.view(*scale.shape, -1))
        self.register_buffer("scale", scale.float())
        ordered = torch.equal(order, torch.arange(len(order), device=order.device))
        self.register_buffer("order", None if ordered else order)
        self.register_buffer("bias", None if bias is None else bias.detach())
        self.gain = nn.Parameter(torch.ones(scale.shape, device=scale.device))

    def learned(self) -> Tensor:
        """The current scales [out, G]."""
        return self.scale * self.gain

    def tensors(self) -> dict[str, Tensor]:
        """The tensors to store, by name after the layer's."""
        return {self.key: self.learned()}

    def forward(self, x: Tensor) -> Tensor:
        """x [..., in] -> [..., out]."""
        device = x.device.type
        autocast = torch.is_autocast_enabled(device)
        dtype = torch.get_autocast_dtype(device) if autocast else x.dtype
        weight = (self.codes.to(dtype) * self.learned().to(dtype).unsqueeze(2)).flatten(1)
        x = x if self.order is None else x[..., self.order]
        return F.linear(x, weight, None if self.bias is None else self.bias.to(x.dtype))


Opened = ScaledLinear | ScaledGrid


def open_scales(model: Any, dense: Any | None = None) -> list[str]:
    """Make a packed model's scales and norms its only trainable parameters, in place; with `dense`,
    the model before packing, the codes of its integer grids as well.

    Returns the names of the layers that are trained.

    Raises:
        ValueError: the model has no packed layer, or a layer whose scales are packed themselves, or
            codes are to train in a layer that is not an integer grid.
    """
    model.requires_grad_(False)
    opened = []
    weights = {} if dense is None else dict(dense.named_parameters())
    for name, module in list(model.named_modules()):
        scaled = _scaled(name, module) if dense is None else _learned(name, module, weights)
        if scaled is not None:
            parent, _, child = name.rpartition(".")
            setattr(model.get_submodule(parent), child, scaled)
            opened.append(name)
    if not opened:
        raise ValueError("no linear layer of this model is packed")
    for norm in norms(model):
        norm.requires_grad_(True)
    return opened


def norms(model: Any) -> Iterator[Tensor]:
    """Weights of all norms of the backbone, one vector each."""
    for module in backbone(model).modules():
        weight = getattr(module, "weight", None)
        if type(module).__name__.endswith("Norm") and isinstance(weight, Tensor):
            yield weight


def places(model: Any) -> dict[int, Tensor]:
    """Parameters of the positions on grids whose codes learn, by the parameter's id()."""
    grids = (module for module in model.modules() if isinstance(module, LearnedGrid))
    return {id(grid.place): grid.place for grid in grids}


def save_scales(model: Any, source: Path, target: Path) -> None:
    """Write the packed folder `source` again into `target`, with the scales, codes and norms that
    `model` learned.

    All other tensors, and all formats, do not change.
    """
    learned = {f"{n}.{key}": t for n, m in _opened(model) for key, t in m.tensors().items()}
    norm_ids = {id(weight) for weight in norms(model)}
    learned |= {n: p.detach() for n, p in model.named_parameters() if id(p) in norm_ids}
    for path in sorted(source.glob("*.safetensors")):
        if path.name == "gates.safetensors":
            continue
        with safe_open(path, framework="pt") as file:
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
            metadata = file.metadata()
        for name in tensors.keys() & learned.keys():
            tensors[name] = _as_stored(learned.pop(name), tensors[name])
        save_file(tensors, str(target / path.name), metadata=metadata)
    assert not learned, f"{source} stores no {next(iter(learned))}"
    for path in source.glob("*.json"):
        if path.name not in ("gateskip.json", "compose.json"):
            shutil.copyfile(path, target / path.name)


def _opened(model: Any) -> Iterator[tuple[str, Opened]]:
    for name, module in model.named_modules():
        if isinstance(module, Opened):
            yield name, module


def _as_stored(learned: Tensor, stored: Tensor) -> Tensor:
    """Scales [out, G] in the layout and type of the file: GPTQ stores them transposed."""
    turned = stored.ndim == 2 and learned.shape != stored.shape
    shaped = learned.T if turned else learned.reshape(stored.shape)
    return shaped.to(stored).contiguous()


def _scaled(name: str, module: nn.Module) -> Opened | None:
    """A packed layer of any kind whose scales learn; None for a layer that is not packed."""
    if isinstance(module, GridLinear):
        return ScaledGrid(module.grid(), module.bias)
    if hasattr(module, "qweight") and hasattr(module, "g_idx"):
        return _from_gptq(module)
    kind = type(module).__name__
    if kind == "Linear4bit":
        return _from_four_bits(name, module)
    return _from_int8(module) if kind == "Linear8bitLt" else None


def _learned(name: str, module: nn.Module, weights: dict[str, Tensor]) -> Opened | None:
    """An integer grid whose codes learn; None for a layer that is not packed."""
    if isinstance(module, GridLinear):
        return LearnedGrid(module.grid(), module.bias, weights.get(f"{name}.weight"))
    if _scaled(name, module) is not None:
        raise ValueError(
            f"{name} is not an integer grid, and only codes of integer grids are trained"
        )
    return None


def _from_gptq(module: Any) -> ScaledLinear:
    """scales [G, out]; g_idx has each column's group."""
    weight = gptq_weight(module).T[:, : module.in_features]
    groups = module.g_idx[: module.in_features].long()
    return ScaledLinear(weight, module.scales.T, groups, "scales", module.bias)


def _from_four_bits(name: str, module: Any) -> ScaledLinear:
    """One absolute maximum for each block, blocks along a row."""
    state = module.weight.quant_state
    if state.nested:
        raise ValueError(f"the scales of {name} are packed themselves (double quantization)")
    weight = bitsandbytes_functions().dequantize_4bit(module.weight.data, state).float()
    scale = state.absmax.view(len(weight), -1)
    groups = torch.arange(weight.shape[1], device=weight.device) // state.blocksize
    return ScaledLinear(weight, scale, groups, "weight.absmax", module.bias)


def _from_int8(module: Any) -> ScaledLinear:
    """One absolute maximum for each row; the whole row is a group."""
    codes, scale = int8_parts(module)
    groups = torch.zeros(codes.shape[1], dtype=torch.long, device=codes.device)
    return ScaledLinear(codes * scale, 127 * scale, groups, "SCB", module.bias)
