"""Modules whose weights are integer grids, as a model folder stores them.

They run wherever torch runs, by unpacking weights for each product; on a CPU, `accelerate_linears`
puts compiled kernels in their place.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from gateskip.quantization.grid import Grid, Lines, pack_bits, row_parts, unpack_bits
from gateskip.quantization.offsets import STEPS_BELOW

METHOD = "gateskip"
"""The `quant_method` of a folder of such modules."""

STORED = torch.bfloat16  # of scales and minima that are no bytes: it holds them exactly
IN_STEPS = torch.uint8  # of those that are whole numbers of their row's step


class GridLinear(nn.Module):
    """A linear layer of codes [out, in * bits / 8], scale and minimum [out, in / group]. Where
    these are bytes, `exponent` [out] has the rows' steps (`Lines` of grid.py)."""

    codes: Tensor
    scale: Tensor
    minimum: Tensor | None
    exponent: Tensor | None
    bias: Tensor | None

    def __init__(
        self,
        in_features: int,
        out_features: int,
        bits: int,
        group: int,
        minimum: bool,
        bias: bool,
        dtype: torch.dtype = torch.bfloat16,
        stored: torch.dtype = STORED,
    ) -> None:
        """Empty buffers of the sizes that a checkpoint fills; `dtype` is the bias's, `stored` that
        of scales and minima."""
        super().__init__()
        self.in_features, self.out_features = in_features, out_features
        self.bits, self.group = bits, group
        groups = in_features // group
        self.register_buffer("codes", _empty(out_features, in_features * bits // 8))
        self.register_buffer("scale", torch.empty(out_features, groups, dtype=stored))
        low = torch.empty(out_features, groups, dtype=stored) if minimum else None
        self.register_buffer("minimum", low)
        self.register_buffer("exponent", _exponents(out_features, stored))
        self.register_buffer("bias", torch.empty(out_features, dtype=dtype) if bias else None)

    @classmethod
    def of(cls, grid: Grid, bias: Tensor | None = None) -> GridLinear:
        """From a grid of weights [out, in]."""
        n, k = grid.codes.shape
        layer = cls(k, n, grid.bits, grid.group, grid.minimum is not None, bias is not None)
        for name, value in stored(grid).items():
            setattr(layer, name, value)
        layer.bias = None if bias is None else bias.detach()
        return layer

    def grid(self) -> Grid:
        """The weights as codes, scales and minima."""
        return read(self.codes, self.scale, self.minimum, self.exponent, self.bits)

    def forward(self, x: Tensor) -> Tensor:
        """x [..., in] -> [..., out]."""
        return F.linear(x, self.grid().weight().to(x.dtype), self.bias)


class GridEmbedding(nn.Module):
    """An embedding table [vocabulary, hidden] as a symmetric grid, unpacked at the first access to
    `weight`: kernels read the codes."""

    codes: Tensor
    scale: Tensor
    exponent: Tensor | None
    _table: Tensor

    def __init__(
        self,
        num_embeddings: int,
        embedding_dim: int,
        bits: int,
        group: int,
        dtype: torch.dtype,
        stored: torch.dtype = STORED,
        embed_scale: float | None = None,
    ) -> None:
        """Empty buffers of the sizes that a checkpoint fills; `dtype` is the unpacked table's.
        Rows that are looked up are multiplied by `embed_scale`, as Gemma does."""
        super().__init__()
        self.embed_scale = embed_scale
        self.num_embeddings, self.embedding_dim = num_embeddings, embedding_dim
        self.bits, self.group = bits, group
        self.register_buffer("codes", _empty(num_embeddings, embedding_dim * bits // 8))
        groups = embedding_dim // group
        self.register_buffer("scale", torch.empty(num_embeddings, groups, dtype=stored))
        self.register_buffer("exponent", _exponents(num_embeddings, stored))
        self.register_buffer("_table", torch.empty(0, dtype=dtype), persistent=False)

    def grid(self) -> Grid:
        """The table as codes and scales."""
        return read(self.codes, self.scale, None, self.exponent, self.bits)

    @property
    def dtype(self) -> torch.dtype:
        """The type of the unpacked table."""
        return self._table.dtype

    def hold(self, dtype: torch.dtype) -> None:
        """Unpack the table in another type from now on."""
        self._table = self.codes.new_empty(0, dtype=dtype)

    @property
    def weight(self) -> Tensor:
        """The unpacked table [vocabulary, hidden]."""
        if not self._table.numel():
            with torch.inference_mode(False), torch.no_grad():
                self._table = self._unpacked()
        return self._table

    def _unpacked(self) -> Tensor:
        grid, shape = self.grid(), (self.num_embeddings, self.embedding_dim)
        table = self.codes.new_empty(shape, dtype=self.dtype)
        for part in row_parts(*shape):
            table[part] = grid.rows(part).weight()
        return table

    def forward(self, ids: Tensor) -> Tensor:
        """ids [...] -> [..., hidden]."""
        rows = F.embedding(ids, self.weight)
        return rows if self.embed_scale is None else rows * rows.new_tensor(self.embed_scale)


class SharedHead(nn.Module):
    """The LM head of a model that multiplies with its embedding's table."""

    def __init__(self, embedding: GridEmbedding) -> None:
        super().__init__()
        self._shared = (embedding,)  # in a tuple: no second owner of its buffers
        self.in_features, self.out_features = embedding.embedding_dim, embedding.num_embeddings
        self.bias = None

    @property
    def weight(self) -> Tensor:
        """The embedding's table [vocabulary, hidden]."""
        return self._shared[0].weight

    def grid(self) -> Grid:
        """The table as codes and scales."""
        return self._shared[0].grid()

    def forward(self, x: Tensor) -> Tensor:
        """x [..., hidden] -> logits [..., vocabulary]."""
        return F.linear(x, self.weight.to(x.dtype))


def stored(grid: Grid) -> dict[str, Tensor]:
    """A grid's tensors as stored in a file: name after the layer's name -> tensor."""
    codes = {"codes": pack_bits(grid.codes, grid.bits)}
    return codes | stored_lines(grid.scale, grid.minimum, grid.bits)


def stored_lines(scale: Tensor, minimum: Tensor | None, bits: int) -> dict[str, Tensor]:
    """`stored` of scales and minima [out, groups] alone: bytes and exponents where they are whole
    numbers of steps in few enough bits, else bfloat16."""
    lines = Lines.of(scale, minimum, bits) if bits < STEPS_BELOW else None
    if lines is None:
        tensors = {"scale": scale.to(STORED), "minimum": minimum}
        tensors["minimum"] = None if minimum is None else minimum.to(STORED)
    else:
        tensors = {"scale": lines.scale, "minimum": lines.minimum, "exponent": lines.exponent}
    return {name: part.contiguous() for name, part in tensors.items() if part is not None}


def read(
    codes: Tensor, scale: Tensor, minimum: Tensor | None, exponent: Tensor | None, bits: int
) -> Grid:
    """The grid of tensors as stored in a file."""
    if exponent is None:
        low = None if minimum is None else minimum.float()
        return Grid(unpack_bits(codes, bits), scale.float(), low, bits)
    return Grid(unpack_bits(codes, bits), *Lines(scale, minimum, exponent).numbers(bits), bits)


def grids_of(model: Any) -> dict[str, GridLinear]:
    """The grid layers of a model by name."""
    return {name: m for name, m in model.named_modules() if isinstance(m, GridLinear)}


def _exponents(rows: int, stored: torch.dtype) -> Tensor | None:
    return torch.empty(rows, dtype=torch.int8) if stored == IN_STEPS else None


def _empty(rows: int, columns: int) -> Tensor:
    return torch.empty(rows, columns, dtype=torch.uint8)
