"""What the GPTQ format requires of a model's shape, because of the kernels that read it."""

from __future__ import annotations

import math
from collections.abc import Mapping

from compose.errors import RuleBroken
from compose.stages.base import ModelShape

TILE_OUTPUTS = 32  # of a GPTQ layer, that a kernel takes at a time
GROUP_SIZES = (32, 64, 128, 256, 512, 1024)  # the ones that GPTQ kernels are written for
WHOLE_ROW = -1


def refuse_odd_tiles(shape: ModelShape) -> None:
    """Raises RuleBroken (`whole-tiles`) where keys and values are not whole tiles of a kernel."""
    if (width := shape.num_kv_heads * shape.head_dim) % TILE_OUTPUTS:
        raise RuleBroken(
            "whole-tiles",
            f"keys and values are {width} wide, not a multiple of {TILE_OUTPUTS}",
            fix="keep more KV heads, or use bnb",
        )


def refuse_cut_groups(group: int, widths: Mapping[str, int]) -> None:
    """Raises RuleBroken (`group-divides`) where groups of that size do not divide a layer's inputs.

    `widths` are the inputs of each layer that is packed, by its name.
    """
    if group == WHOLE_ROW:
        return
    for name, width in widths.items():
        if width % group:
            raise RuleBroken(
                "group-divides",
                f"group_size {group} does not divide the {width} inputs of {name}",
                fix=_fitting_group(group, widths),
            )


def _fitting_group(requested: int, widths: Mapping[str, int]) -> str:
    """The group size nearest to `requested` that divides all `widths`, as a setting; else whole
    rows."""
    common = math.gcd(*widths.values())
    fitting = [size for size in GROUP_SIZES if common % size == 0]
    if not fitting:
        return f"set group_size: {WHOLE_ROW} and sym: true"
    return f"set group_size: {min(fitting, key=lambda size: abs(size - requested))}"
