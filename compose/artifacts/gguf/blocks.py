"""Blocks of GGUF as integer grids; those of up to 4 bits and of 8 also back, bit by bit.

A block is 32 weights of a row. It begins with a float16 scale (Q4_1 and Q5_1: and a float16
minimum); then come the codes:

    Q4_0    scale * (code - 8)          two codes a byte, those of the first half of the block in
    Q4_1    scale * code + minimum      the low bits
    Q5_0    scale * (code - 16)         the same, after the highest bits of all 32 codes
    Q5_1    scale * code + minimum
    Q8_0    scale * code                signed bytes

Eight blocks of Q4_K and Q5_K share two float16 numbers; each has a scale and a minimum that are
these numbers times integers of 6 bits, which fill 12 bytes:

    Q4_K    scale * code - minimum      two codes a byte, of two blocks
    Q5_K    scale * code - minimum      the same, after the highest bits: a byte has those of the
                                        same place in all eight blocks

In a grid, codes are unsigned, and those of a grid without minima stand for code - 2**(bits - 1).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy
from numpy.typing import NDArray

BLOCK = 32
SHARING = 8  # blocks of Q4_K and Q5_K that share two numbers
K_HEAD = 16  # bytes of these numbers and of the integers


@dataclass(frozen=True)
class Blocks:
    """A matrix [n, k] as codes, with a scale for each group of 32."""

    codes: NDArray[numpy.uint8]
    """[n, k]"""
    scale: NDArray[Any]
    """[n, k / 32], float16; float32 where scales are products"""
    minimum: NDArray[Any] | None
    """[n, k / 32], of the same type; None where codes are symmetric"""
    bits: int


def read_blocks(stored: NDArray[numpy.uint8], kind: str) -> Blocks:
    """Rows of blocks [n, bytes] as codes, scales and minima."""
    n, bits = len(stored), int(kind[1])
    if kind.endswith("_K"):
        return _read_sharing(stored, bits)
    numbers = 2 if kind.endswith("_1") else 1
    blocks = stored.reshape(n, -1, 2 * numbers + BLOCK * bits // 8)  # [n, groups, bytes]
    head = numpy.ascontiguousarray(blocks[:, :, : 2 * numbers]).view("<f2")
    body = blocks[:, :, 2 * numbers :]
    codes: Any
    if bits == 8:
        codes = body ^ 128  # signed, plus 128
    else:
        low = body[:, :, -BLOCK // 2 :]
        codes = numpy.concatenate((low & 15, low >> 4), axis=2)
    if bits == 5:
        codes |= numpy.unpackbits(body[:, :, : BLOCK // 8], axis=2, bitorder="little") << 4
    minimum = head[:, :, 1].copy() if numbers == 2 else None
    return Blocks(codes.reshape(n, -1), head[:, :, 0].copy(), minimum, bits)


def _read_sharing(stored: NDArray[numpy.uint8], bits: int) -> Blocks:
    """Rows of Q4_K or Q5_K."""
    n = len(stored)
    shared = stored.reshape(n, -1, K_HEAD + SHARING * BLOCK * bits // 8)  # [n, k / 256, bytes]
    unit = numpy.ascontiguousarray(shared[:, :, :4]).view("<f2").astype(numpy.float32)
    scale, minimum = (
        (unit[:, :, i : i + 1] * times).reshape(n, -1)
        for i, times in enumerate(_times(shared[:, :, 4:K_HEAD]))
    )
    low = shared[:, :, -SHARING * BLOCK // 2 :].reshape(n, -1, SHARING // 2, BLOCK)
    codes = numpy.stack((low & 15, low >> 4), axis=3).reshape(n, -1, SHARING, BLOCK)
    if bits == 5:
        high = shared[:, :, K_HEAD : K_HEAD + BLOCK][:, :, None]  # [n, k / 256, 1, 32]
        codes |= (high >> numpy.arange(SHARING, dtype=numpy.uint8)[:, None] & 1) << 4
    return Blocks(codes.reshape(n, -1), scale, -minimum, bits)


def _times(packed: NDArray[numpy.uint8]) -> tuple[NDArray[numpy.uint8], NDArray[numpy.uint8]]:
    """The integers [n, k / 256, 8] of scales and of minima in 12 bytes: the first four of each fill
    six bits of a byte; the last four have their low bits in bytes 8 to 11, and their high bits
    beside the first four."""
    scales, minima, last = packed[:, :, :4], packed[:, :, 4:8], packed[:, :, 8:]
    high = (scales >> 2 & 48, minima >> 2 & 48)
    return (
        numpy.concatenate((scales & 63, last & 15 | high[0]), axis=2),
        numpy.concatenate((minima & 63, last >> 4 | high[1]), axis=2),
    )


def write_blocks(blocks: Blocks) -> tuple[str, NDArray[numpy.uint8]]:
    """The storage's name, and the rows of blocks [n, bytes], of codes of 4 or 8 bits."""
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
