"""Quantization: packed weights by bitsandbytes or GPTQ."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import ClassVar, Literal

from pydantic import Field

from compose.errors import RuleBroken
from compose.stages.base import ModelShape, Role, Split, Stage

GROUP_SIZES = (16, 32, 64, 128, 256, 512, 1024)  # the ones that GPTQ kernels are written for
WHOLE_ROW = -1


class Bnb(Stage):
    """Round the weights of the linear layers with bitsandbytes; needs no calibration."""

    role: ClassVar[Role] = "quantize"

    use: Literal["bnb"] = "bnb"
    """The stage's name."""

    format: Literal["nf4", "int8"]
    """`nf4`: 4 bits in blocks of 64; `int8`: 8 bits with outlier columns kept apart."""

    def reshape(self, shape: ModelShape) -> ModelShape:
        """The same sizes, packed."""
        return replace(shape, quantized="bitsandbytes")


class Gptq(Stage):
    """Quantize the linear layers one by one, making up for each rounding in the next weights."""

    role: ClassVar[Role] = "quantize"
    reads_data: ClassVar[tuple[Split, ...]] = ("calibration",)

    use: Literal["gptq"] = "gptq"
    """The stage's name."""

    bits: Literal[2, 3, 4, 8] = 4
    """Bits of one weight."""

    group_size: Literal[-1, 16, 32, 64, 128, 256, 512, 1024] = 64
    """Weights that share a scale; it must divide every linear layer's inputs. -1: a whole row."""

    sym: bool = True
    """Whether the grid is symmetric around zero, which more kernels can read."""

    act_order: bool = False
    """Whether columns are quantized by falling activation; more exact, slower to decode."""

    damp: float = Field(default=0.01, gt=0, lt=1)
    """Share of the Hessian's mean diagonal that is added to its diagonal."""

    def check(self, shape: ModelShape | None, before: tuple[Stage, ...]) -> None:
        """Order rules, and `group-divides`: whole groups in every linear layer."""
        super().check(shape, before)
        if shape is None or self.group_size == WHOLE_ROW:
            return
        widths = shape.linear_in_features()
        cut = {name: width for name, width in widths.items() if width % self.group_size}
        if cut:
            name, width = next(iter(cut.items()))
            raise RuleBroken(
                "group-divides",
                f"group_size {self.group_size} does not divide the {width} inputs of {name}",
                fix=f"set group_size: {_nearest_group(self.group_size, widths)}",
            )

    def reshape(self, shape: ModelShape) -> ModelShape:
        """The same sizes, packed."""
        return replace(shape, quantized="gptq")


def _nearest_group(wanted: int, widths: dict[str, int]) -> int:
    """The group size nearest to `wanted` that divides all `widths`; a whole row when none does."""
    common = math.gcd(*widths.values())
    fitting = [size for size in GROUP_SIZES if common % size == 0]
    return min(fitting, key=lambda size: abs(size - wanted), default=WHOLE_ROW)
