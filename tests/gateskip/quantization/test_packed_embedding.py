"""Embeddings that stay packed: rows, LM head, drafts and memory are those of the grid."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from random_grids import MIXED, on_grids, random_grid

from compose.bench.speed.measure import held_bytes
from gateskip.kernels import abi, build, ops
from gateskip.quantization.folders import load_model
from gateskip.quantization.grid import Grid
from gateskip.quantization.grid_linear import GridEmbedding, stored
from gateskip.quantization.packed_embedding import pack_embedding
from gateskip.quantization.packed_linear import PackedLinear, accelerate_linears
from gateskip.quantization.tiles import tiles
from gateskip.runtime.backend import DraftLimit, SampleRequest
from gateskip.runtime.skipping import SkippingModel

pytestmark = pytest.mark.skipif(build.library() is None, reason="no kernels here")


def table(grid: Grid, dtype: torch.dtype, scale: float | None) -> GridEmbedding:
    embedding = GridEmbedding(*grid.codes.shape, grid.bits, grid.group, dtype, embed_scale=scale)
    for name, value in stored(grid).items():
        setattr(embedding, name, value)
    return embedding


@pytest.mark.parametrize("bits", [2, 3, 4, 6, 8])
@pytest.mark.parametrize("group", [32, 64])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("scale", [None, 8.3125])
def test_rows_are_those_of_the_unpacked_table(
    tiny_llama: Path, bits: int, group: int, dtype: torch.dtype, scale: float | None
) -> None:
    """To the bit, at every place of a tile, for any shape of ids; none is read beyond the table."""
    model = load_model(tiny_llama, "float32")
    own = table(random_grid(bits, group, offset=False), dtype, scale)
    model.set_input_embeddings(own)
    assert pack_embedding(model)
    packed = model.get_input_embeddings()
    ids = torch.tensor([[0, 40, 15, 16], [17, 0, 31, 32]])
    assert torch.equal(packed(ids), own(ids)) and packed(ids).dtype == dtype
    assert packed(ids[:0]).shape == (0, 4, 384)
    for beyond in (-1, 41):
        with pytest.raises(IndexError):
            packed(torch.tensor([beyond]))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("exact", [True, False])
def test_part_of_a_row_is_read_from_any_number_on(dtype: torch.dtype, exact: bool) -> None:
    """Scales that neither bytes nor bfloat16 hold stay in float32."""
    grid = random_grid(6, 32, offset=False)
    if not exact:
        grid = Grid(grid.codes, grid.scale * (1 + 2**-12), None, 6)
    layer = PackedLinear.of(grid)
    assert layer._scale.dtype == (torch.uint8 if exact else torch.float32)
    matrix, _parts = layer.exact_matrix()
    embedding = abi.Embedding(matrix, int(dtype == torch.bfloat16), 1.0)
    found = ops.embed(embedding, torch.tensor([33, 2], dtype=torch.int32))
    assert torch.equal(found, grid.weight()[[33, 2]].to(dtype).float())


@pytest.mark.parametrize("embedding", [4, 6, 8])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_a_model_decodes_the_same_with_its_table_packed(
    tiny_llama: Path, embedding: int, dtype: str
) -> None:
    """States, logits and drafts to the bit, in less memory; the head is the embedding's table."""
    whole, packed = (
        on_grids(load_model(tiny_llama, dtype), MIXED, embedding).requires_grad_(False)
        for _ in range(2)
    )
    for each in (whole, packed):
        accelerate_linears(each)
    assert pack_embedding(packed) and not pack_embedding(packed)
    assert packed.get_output_embeddings() is packed.get_input_embeddings().table
    unpacked = whole.get_input_embeddings().weight.nbytes
    held = [held_bytes((*each.parameters(), *each.buffers())) for each in (packed, whole)]
    assert held[0] <= held[1] - unpacked
    found = [decoded(model) for model in (whole, packed)]
    for mine, its in zip(*found, strict=True):
        assert torch.equal(mine, its)


@torch.no_grad()
def decoded(model: Any) -> tuple[torch.Tensor, ...]:
    """States of a prompt and of decoding, logits, and a draft's tokens."""
    fast = SkippingModel(model, None, "project", "native", rounded=True)
    ids = torch.randint(3, 512, (1, 12), generator=torch.Generator().manual_seed(2))
    cache = fast.new_cache(1, 40)
    prompt = fast.forward(ids, cache, [0])
    states = fast.decode([[9]], cache, [0], [12])
    assert fast.engine is not None
    drafted = fast.engine.sample(
        SampleRequest(9, 5, limit=DraftLimit(0.0, [1.0])), (cache, 0, 12), None
    )
    chosen, _ = fast.engine.argmax([9, 8], cache, [0, 0], [12, 13], None)
    tokens = torch.tensor([*drafted.tokens, *chosen])
    return prompt, states, fast.head(states), tokens


@pytest.mark.parametrize("bits", [3, 4, 8])
def test_offsets_come_back_exactly(bits: int) -> None:
    """A grid's scales and minima are kept in a byte each, in 8 bits in two, and give its weights to
    the bit."""
    grid = random_grid(bits, 32, offset=True)
    layer = PackedLinear.of(grid)
    kept = torch.bfloat16 if bits == 8 else torch.uint8
    assert layer._scale.dtype == layer._offset.dtype == kept
    assert layer.rounded_parts()[0] is layer._scale and layer.rounded_parts()[1] is layer._offset
    assert torch.equal(layer.offset, tiles(grid.offset()))
