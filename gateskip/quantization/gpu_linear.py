"""Linear layers on a GPU that multiply with the kernels of gateskip/kernels/gpu.

`pack_for_gpu` puts modules of packed codes in place of the grid modules of a loaded model, and
`pass_unused` lets layers of floats read no weights in a branch that no token enters. Other packed
layers stay: those of bitsandbytes have kernels for GPUs of their own.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from functools import cache
from importlib import import_module  # noqa: TID251
from importlib.util import find_spec
from typing import Any

import torch
from torch import Tensor, nn

from gateskip.extras import need
from gateskip.model.families import backbone
from gateskip.quantization.grid import Grid, pack_bits, unpack_bits
from gateskip.quantization.grid_linear import STORED, GridEmbedding, GridLinear, SharedHead

WIDTHS = (4, 8)  # bits of a code that have kernels
GROUPS = (32, 64, 128)  # sizes of groups that have kernels


_entered: ContextVar[Tensor | None] = ContextVar("entered", default=None)


@contextmanager
def used_rows(entered: Tensor | None) -> Iterator[None]:
    """Within this context only the rows of `entered`, bool [...], of each product are used; None
    for all. A `GpuLinear` or `UsedLinear` reads no weights where no row is, without asking the
    host."""
    before = _entered.set(None if entered is None else entered.flatten())
    try:
        yield
    finally:
        _entered.reset(before)


class GpuLinear(nn.Module):
    """A linear layer of codes [out, in * width / 8], scale and minimum [out, in / group]; `width`,
    4 or 8, is the number of bits that a code takes in memory, and `bits` the grid's."""

    codes: Tensor
    scale: Tensor
    minimum: Tensor | None
    bias: Tensor | None

    def __init__(self, grid: Grid, bias: Tensor | None, stored: torch.dtype = STORED) -> None:
        """`stored` is the type of scales and minima, which it holds exactly.

        Raises ValueError for groups of other sizes than `GROUPS`.
        """
        super().__init__()
        if grid.group not in GROUPS:
            sizes = ", ".join(map(str, GROUPS))
            raise ValueError(f"groups of {grid.group} weights have no kernel: use {sizes}")
        self.out_features, self.in_features = grid.codes.shape
        self.bits, self.group, self.middle = grid.bits, grid.group, grid.middle
        self.width = next(width for width in WIDTHS if width >= grid.bits)
        self.register_buffer("codes", pack_bits(grid.codes, self.width))
        self.register_buffer("scale", grid.scale.to(stored))
        low = None if grid.minimum is None else grid.minimum.to(stored)
        self.register_buffer("minimum", low)
        self.register_buffer("bias", bias)

    def grid(self) -> Grid:
        """The weights as codes, scales and minima."""
        return self.rows(slice(None))

    def rows(self, chosen: Tensor | slice) -> Grid:
        """Some rows of the grid."""
        low = None if self.minimum is None else self.minimum[chosen].float()
        codes = unpack_bits(self.codes[chosen], self.width)
        return Grid(codes, self.scale[chosen].float(), low, self.bits)

    def forward(self, x: Tensor) -> Tensor:
        """x [..., in] -> [..., out], in x's type; see `used_rows`."""
        flat = x.reshape(-1, self.in_features)
        weights = (self.codes, self.scale, self.minimum, self.bias, self.width, self.middle)
        out: Tensor = _kernels().multiply(flat, *weights, _entered.get())
        return out.view(*x.shape[:-1], self.out_features)


class GpuEmbedding(nn.Module):
    """An embedding whose rows are unpacked as tokens are looked up; an LM head that shares its
    table multiplies by `table`. Rows have the type `dtype`."""

    factor: Tensor | None

    def __init__(self, table: GpuLinear, dtype: torch.dtype, embed_scale: float | None) -> None:
        """Rows that are looked up are multiplied by `embed_scale`, as Gemma does."""
        super().__init__()
        self.table, self.dtype = table, dtype
        factor = None if embed_scale is None else torch.tensor(embed_scale, dtype=dtype)
        self.register_buffer("factor", factor)  # on the device: a step copies nothing there
        self.num_embeddings, self.embedding_dim = table.out_features, table.in_features
        self.bits, self.group = table.bits, table.group

    def forward(self, ids: Tensor) -> Tensor:
        """ids [...] -> [..., hidden]."""
        rows = self.table.rows(ids.reshape(-1)).weight().to(self.dtype)
        rows = rows if self.factor is None else rows * self.factor
        return rows.view(*ids.shape, self.embedding_dim)


class UsedLinear(nn.Linear):
    """A linear layer of floats that takes `used_rows` into account for a few rows."""

    def forward(self, input: Tensor) -> Tensor:
        """input [..., in] -> [..., out]."""
        flat, entered = input.reshape(-1, self.in_features), _entered.get()
        if entered is None or len(flat) > _kernels().FEW_ROWS or flat.dtype != self.weight.dtype:
            return super().forward(input)
        multiply = _kernels("floats").multiply_used
        out: Tensor = multiply(flat.contiguous(), self.weight, self.bias, entered)
        return out.view(*input.shape[:-1], self.out_features)


@cache
def _kernels(kind: str = "packed") -> Any:
    """A module of kernels. An import statement would make an exported folder require Triton."""
    return import_module(f"gateskip.kernels.gpu.{kind}")


def pass_unused(model: Any) -> int:
    """Make the linear layers of floats in a model's layers `UsedLinear`, in place, where Triton is
    installed; returns how many."""
    if find_spec("triton") is None:
        return 0
    linears = [part for part in backbone(model).layers.modules() if type(part) is nn.Linear]
    for linear in linears:
        linear.__class__ = UsedLinear
    return len(linears)


def _held(grid: GridLinear | GridEmbedding) -> torch.dtype:
    """The type of its scales and minima on a GPU, whose kernels read no bytes."""
    return STORED if grid.exponent is not None else grid.scale.dtype


def pack_for_gpu(model: Any) -> int:
    """Replace a model's grid modules in place; returns how many linear layers were replaced.

    Raises ModuleNotFoundError, with the extra's name, without Triton.
    Raises ValueError as `GpuLinear` does.
    """
    grids = [part for part in model.named_modules() if isinstance(part[1], GridLinear)]
    table = model.get_input_embeddings()
    if grids or isinstance(table, GridEmbedding):
        need("computing with packed weights on a GPU", "triton", extra="gpu")
    for name, layer in grids:
        model.set_submodule(name, GpuLinear(layer.grid(), layer.bias, _held(layer)))
    if isinstance(table, GridEmbedding):
        packed = GpuLinear(table.grid(), None, _held(table))
        model.set_input_embeddings(GpuEmbedding(packed, table.dtype, table.embed_scale))
        if isinstance(model.get_output_embeddings(), SharedHead):
            model.set_output_embeddings(packed)
    return len(grids)
