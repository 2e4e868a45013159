"""An embedding that stays packed: rows are unpacked as tokens are looked up.

Where the LM head multiplies with the same table, both use one packed table.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from gateskip.kernels import abi, ops
from gateskip.kernels.abi import BLOCK
from gateskip.model.families import embedding_scale, final_norm
from gateskip.quantization.grid_linear import GridEmbedding, SharedHead
from gateskip.quantization.packed_linear import PackedLinear, has_kernels


class PackedEmbedding(nn.Module):
    """A table [vocabulary, hidden] of symmetric codes; rows have the type `dtype`."""

    def __init__(self, table: PackedLinear, dtype: torch.dtype, embed_scale: float) -> None:
        """Rows that are looked up are multiplied by `embed_scale`, as Gemma does."""
        super().__init__()
        self.table, self.dtype, self.embed_scale = table, dtype, embed_scale
        self.num_embeddings, self.embedding_dim = table.out_features, table.in_features
        self.bits, self.group = table.bits, table.group

    def forward(self, ids: Tensor) -> Tensor:
        """ids [...] -> [..., hidden]. Raises IndexError for ids outside the vocabulary."""
        tokens = ids.reshape(-1).to(torch.int32).contiguous()
        if len(tokens) and not 0 <= int(tokens.min()) <= int(tokens.max()) < self.num_embeddings:
            raise IndexError(f"tokens are 0 to {self.num_embeddings - 1}")
        matrix, parts = self.table.exact_matrix()
        how = abi.Embedding(matrix, int(self.dtype == torch.bfloat16), self.embed_scale)
        rows = ops.embed(how, tokens)
        del parts  # which the matrix points to
        return rows.to(self.dtype).view(*ids.shape, self.embedding_dim)


def pack_embedding(model: Any) -> bool:
    """Pack a model's embedding in place where it is a grid of whole blocks and has kernels here,
    and the LM head with it if they share a table. Returns whether it was packed."""
    table = model.get_input_embeddings()
    if not isinstance(table, GridEmbedding) or table.group % BLOCK:
        return False
    if not has_kernels(final_norm(model).weight):
        return False
    packed = PackedLinear.of(table.grid())
    model.set_input_embeddings(PackedEmbedding(packed, table.dtype, embedding_scale(model)))
    if isinstance(model.get_output_embeddings(), SharedHead):
        model.set_output_embeddings(packed)
    return True
