"""Order rules: which stage may not follow which, by role, and one sentence for each rule."""

from __future__ import annotations

from typing import Literal

Role = Literal["prune", "heal", "gate", "quantize", "head", "draft", "decode"]
"""The role of a stage in the order rules."""

RULES: dict[str, str] = {
    "decode-needs-gates": "skipping needs gates: add a gate stage before this stage.",
    "draft-of-packed": "a draft copy needs fewer bits than the weights that it is made from.",
    "original-is-gone": "weights that were trained with gates differ from the original model.",
    "head-last": "pack-head comes after all other stages that change weights.",
    "draft-last": "the stage draft-network comes after all stages that change weights.",
    "two-networks": "a chain has at most one draft-network stage.",
    "learned-needs-network": "draft_weights: learned needs a network from the stage draft-network.",
    "decode-last": "a decode stage (plain, skip, speculate) must be the last stage of its chain.",
    "two-decoders": "a chain has at most one decode stage (plain, skip, speculate).",
    "two-gates": "a chain has at most one gate stage.",
    "two-quantizers": "a chain has at most one quantizer.",
    "prune-after-quantize": "prune before quantizing, because quantized weights cannot be pruned.",
    "heal-after-quantize": "after a quantizer, heal needs `backbone: scales` or `backbone: codes`.",
    "scales-are-packing": "`backbone: scales` needs quantized weights with unquantized scales.",
    "codes-are-grids": "`backbone: codes` needs weights from int8, int6, int4, int3 or int2.",
    "gate-after-quantize": "a gate stage cannot train quantized weights: put it first.",
    "prune-after-gate": "prune first, because gates are calibrated for the pruned model.",
    "heal-after-gate": "heal first, because gates are calibrated for the healed model.",
    "group-divides": "the group size must divide the number of inputs of every linear layer.",
    "whole-tiles": "sizes of quantized weights must be multiples of the blocks that kernels read.",
    "branches-need-gates": "gates decide which branches are removed: add a gate stage before.",
    "budget-calibrated": "a budget must be at least the lowest budget of the gate stage.",
    "layout-known": "the stage finds weights by name, so it must support the model's family.",
    "heads-fit": "every KV group must keep the same number of heads, and the config must allow it.",
    "head-is-tied": "an LM head that shares its weights with the embedding cannot be quantized.",
    "head-packed-twice": "either the quantizer or pack-head quantizes the LM head, not both.",
    "width-fits": "a pruned width must be a multiple of round_to, above 0 and below the old width.",
    "hidden-fits": "the remaining hidden size must be a multiple of round_to and fit the heads.",
    "layers-fit": "dropped layers must exist, and at least one layer must stay.",
    "exclude": "the pipeline file excludes this combination.",
}
"""Rule -> the sentence that says why a stage may not come here, or why a cell is left out."""

FORBIDDEN: dict[tuple[Role, Role], str] = {
    ("decode", "decode"): "two-decoders",
    ("gate", "gate"): "two-gates",
    ("quantize", "quantize"): "two-quantizers",
    ("prune", "quantize"): "prune-after-quantize",
    ("heal", "quantize"): "heal-after-quantize",
    ("gate", "quantize"): "gate-after-quantize",
    ("prune", "gate"): "prune-after-gate",
    ("heal", "gate"): "heal-after-gate",
    ("head", "head"): "head-last",
    ("prune", "head"): "head-last",
    ("heal", "head"): "head-last",
    ("gate", "head"): "head-last",
    ("quantize", "head"): "head-last",
    ("draft", "draft"): "two-networks",
    ("prune", "draft"): "draft-last",
    ("heal", "draft"): "draft-last",
    ("gate", "draft"): "draft-last",
    ("quantize", "draft"): "draft-last",
    ("head", "draft"): "draft-last",
    ("draft", "decode"): "decode-last",
    ("head", "decode"): "decode-last",
    ("prune", "decode"): "decode-last",
    ("heal", "decode"): "decode-last",
    ("gate", "decode"): "decode-last",
    ("quantize", "decode"): "decode-last",
}
"""(a stage's role, the role of an earlier stage) -> the rule that this order breaks."""
