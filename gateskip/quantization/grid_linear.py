"""Modules whose weights are integer grids, as a model folder stores them.

They run wherever torch runs, by unpacking weights for each product; on a CPU, `accelerate_linears`
puts compiled kernels in their place.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from gateskip.quantization.grid import Grid, pack_bits, row_parts, unpack_bits

METHOD = "gateskip"
"""The `quant_method` of a folder of such modules."""

STORED = torch.bfloat16  # of scales and minima, which it holds exactly


class GridLinear(nn.Module):
    """A linear layer of codes [out, in * bits / 8], scale and minimum [out, in / group]."""

    codes: Tensor
    scale: Tensor
    minimum: Tensor | None
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
        """Empty buffers of the sizes that a checkpoint fills; `dtype` is the bias's."""
        super().__init__()
        self.in_features, self.out_features = in_features, out_features
        self.bits, self.group = bits, group
        groups = in_features // group
        self.register_buffer("codes", _empty(out_features, in_features * bits // 8))
        self.register_buffer("scale", torch.empty(out_features, groups, dtype=stored))
        low = torch.empty(out_features, groups, dtype=stored) if minimum else None
        self.register_buffer("minimum", low)
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
        low = None if self.minimum is None else self.minimum.float()
        return Grid(unpack_bits(self.codes, self.bits), self.scale.float(), low, self.bits)

    def forward(self, x: Tensor) -> Tensor:
        """x [..., in] -> [..., out]."""
        return F.linear(x, self.grid().weight().to(x.dtype), self.bias)


class GridEmbedding(nn.Module):
    """An embedding table [vocabulary, hidden] as a symmetric grid, unpacked at the first access to
    `weight`: kernels read the codes."""

    codes: Tensor
    scale: Tensor
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
        self.register_buffer("_table", torch.empty(0, dtype=dtype), persistent=False)

    def grid(self) -> Grid:
        """The table as codes and scales."""
        return Grid(unpack_bits(self.codes, self.bits), self.scale.float(), None, self.bits)

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
    tensors = {"codes": pack_bits(grid.codes, grid.bits), "scale": grid.scale.to(STORED)}
    if grid.minimum is not None:
        tensors["minimum"] = grid.minimum.to(STORED)
    return {name: tensor.contiguous() for name, tensor in tensors.items()}


def grids_of(model: Any) -> dict[str, GridLinear]:
    """The grid layers of a model by name."""
    return {name: m for name, m in model.named_modules() if isinstance(m, GridLinear)}


def _empty(rows: int, columns: int) -> Tensor:
    return torch.empty(rows, columns, dtype=torch.uint8)
