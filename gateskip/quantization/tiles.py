"""Codes and tables in the order that the compiled kernels read them: src/simd/codes.h draws it.

Sixteen rows of a weight are a tile, 32 columns of it a block, four columns of a block a four: four
bytes of each of the sixteen rows, row after row.
"""

from __future__ import annotations

from functools import reduce
from operator import or_

import torch
from torch import Tensor
from torch.nn import functional as F

from gateskip.kernels.abi import BLOCK, ROWS_PER_TILE
from gateskip.quantization.grid import AT_ONCE

FOURS = BLOCK // 4  # of a block


def tiles(table: Tensor) -> Tensor:
    """A table [n, m] as [tiles, m, 16]: sixteen rows side by side, the last ones filled with 0."""
    filled = F.pad(table, (0, 0, 0, -len(table) % ROWS_PER_TILE))
    return filled.view(-1, ROWS_PER_TILE, table.shape[1]).transpose(1, 2).contiguous()


def pack_codes(codes: Tensor, bits: int) -> Tensor:
    """Codes [n, k] of 2, 3, 4, 6 or 8 bits, k whole blocks -> uint8 [tiles, k bits / 32, 16, 4]."""
    n, k = codes.shape
    packed = torch.empty(
        -(-n // ROWS_PER_TILE), k * bits // BLOCK, ROWS_PER_TILE, 4, dtype=torch.uint8
    )
    step = max(1, AT_ONCE // (k * ROWS_PER_TILE))  # tiles
    for first in range(0, len(packed), step):
        rows = codes[first * ROWS_PER_TILE : (first + step) * ROWS_PER_TILE]
        packed[first : first + step] = _packed(rows, bits)
    return packed


def _packed(codes: Tensor, bits: int) -> Tensor:
    columns = tiles(codes.to(torch.uint8))  # [tiles, k, 16]
    fours = columns.view(len(columns), -1, 4, ROWS_PER_TILE).transpose(2, 3)
    if bits == 8:
        return fours
    blocks = fours.unflatten(1, (-1, FOURS))  # [tiles, k / 32, 8, 16, 4]
    parted = {3: _three_bits, 6: _six_bits}.get(bits)
    packed = _whole_parts(blocks, bits) if parted is None else parted(blocks)
    return packed.flatten(1, 2)


def _whole_parts(blocks: Tensor, bits: int) -> Tensor:
    """Codes of 2 or 4 bits: the fours that fit into one byte share it, the first one in the lowest
    bits."""
    many = 8 // bits
    return reduce(or_, (blocks[:, :, i::many] << bits * i for i in range(many)))


def _three_bits(blocks: Tensor) -> Tensor:
    """Codes of 3 bits: two fours share a byte; its remaining two bits hold parts of the last two
    fours."""
    packed = blocks[:, :, 0:6:2] | blocks[:, :, 1:6:2] << 3  # [tiles, blocks, 3, 16, 4]
    last = blocks[:, :, 6:]
    packed[:, :, :2] |= (last & 3) << 6
    packed[:, :, 2] |= (last[:, :, 0] >> 2) << 6 | (last[:, :, 1] >> 2) << 7
    return packed


def _six_bits(blocks: Tensor) -> Tensor:
    """Codes of 6 bits: the lower four bits in the layout of 4-bit codes, then the upper two in that
    of 2-bit codes."""
    return torch.cat((_whole_parts(blocks & 15, 4), _whole_parts(blocks >> 4, 2)), 2)
