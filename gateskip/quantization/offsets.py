"""Beside the codes of a group of weights: its kind of offset, and the bits that it and the scale
take.

Planning reads this module, so it does not import torch.
"""

from __future__ import annotations

from typing import Literal

Offset = Literal["real", "integer", "none"]
"""A group's offset beside its scale: a minimum, a zero point (the integer code of the value zero),
or none."""

SYMMETRIC_FROM = 6  # bits, from which on groups have a scale alone
STEPS_BELOW = 8  # bits, in which the error of scales in steps would be felt


def has_steps(bits: int, offset: Offset) -> bool:
    """Whether scales and minima are whole numbers of a step for each row (grid.py)."""
    return bits < STEPS_BELOW and offset != "integer"


def bits_beside(bits: int, offset: Offset) -> int:
    """Bits that a group's scale and offset take in a file, beside codes of `bits` bits."""
    if has_steps(bits, offset):
        return 8 if offset == "none" else 16
    return {"none": 16, "real": 32, "integer": 16 + bits}[offset]
