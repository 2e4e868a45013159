"""Blocks of GGUF as integer grids and back, bit by bit: Q4_0, Q4_1 and Q8_0.

A block is 32 weights of a row. It begins with a float16 scale (Q4_1: and a float16 minimum); then
come the codes:

    Q4_0    scale * (code - 8)          two codes a byte, those of the first half of the block in
    Q4_1    scale * code + minimum      the low bits
    Q8_0    scale * code                signed bytes

In a grid, codes are unsigned, and those of a grid without minima stand for code - 2**(bits - 1).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy
from numpy.typing import NDArray

BLOCK = 32
BITS = {"Q4_0": 4, "Q4_1": 4, "Q8_0": 8}
"""Storage type -> bits of its codes, for the blocks that are grids."""


@dataclass(frozen=True)
class Blocks:
    """A matrix [n, k] as codes, with a scale for each group of 32."""

    codes: NDArray[numpy.uint8]
    """[n, k]"""
    scale: NDArray[numpy.float16]
    """[n, k / 32]"""
    minimum: NDArray[numpy.float16] | None
    """[n, k / 32]; None where codes are symmetric"""
    bits: int


def read_blocks(stored: NDArray[numpy.uint8], kind: str) -> Blocks:
    """Rows of blocks [n, bytes] as codes, scales and minima."""
    n, bits = len(stored), BITS[kind]
    numbers = 2 if kind == "Q4_1" else 1
    blocks = stored.reshape(n, -1, 2 * numbers + BLOCK * bits // 8)  # [n, groups, bytes]
    head = numpy.ascontiguousarray(blocks[:, :, : 2 * numbers]).view("<f2")
    body = blocks[:, :, 2 * numbers :]
    nibbles = (body & 15, body >> 4)
    codes = body ^ 128 if bits == 8 else numpy.concatenate(nibbles, axis=2)  # signed, plus 128
    minimum = head[:, :, 1].copy() if numbers == 2 else None
    flat: Any = codes.reshape(n, -1)
    return Blocks(flat, head[:, :, 0].copy(), minimum, bits)


def write_blocks(blocks: Blocks) -> tuple[str, NDArray[numpy.uint8]]:
    """The storage's name, and the rows of blocks [n, bytes]."""
    n, codes = len(blocks.codes), blocks.codes.reshape(len(blocks.codes), -1, BLOCK)
    heads: list[NDArray[Any]] = [_bytes_of(blocks.scale)]
    if blocks.minimum is not None:
        heads.append(_bytes_of(blocks.minimum))
    if blocks.bits == 8:
        body = codes ^ 128
    else:
        body = codes[:, :, : BLOCK // 2] | codes[:, :, BLOCK // 2 :] << 4
    kind = f"Q{blocks.bits}_{0 if blocks.minimum is None else 1}"
    return kind, numpy.concatenate((*heads, body), axis=2).reshape(n, -1)


def _bytes_of(numbers: NDArray[numpy.float16]) -> NDArray[numpy.uint8]:
    """float16 [n, groups] -> uint8 [n, groups, 2]"""
    whole = numpy.ascontiguousarray(numbers, dtype="<f2")
    return whole.view(numpy.uint8).reshape(*numbers.shape, 2)
