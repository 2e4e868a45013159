"""Order rules: which stage may not follow which, by role, and one sentence for each rule."""

from __future__ import annotations

from typing import Literal

Role = Literal["prune", "heal", "gate", "quantize", "head", "draft", "decode"]
"""The role of a stage in the order rules."""

RULES: dict[str, str] = {
    "decode-needs-gates": "gates decide which branches are skipped: add a gate stage first.",
    "draft-of-packed": "a quantized copy for drafts must have fewer bits than the weights.",
    "original-is-gone": "after training together with gates, the original weights no longer exist.",
    "head-last": "the stage `pack-head` must come after all other stages that change weights.",
    "draft-last": "the stage `draft-network` must come after all stages that change weights.",
    "two-networks": "a pipeline must not have two `draft-network` stages.",
    "learned-needs-network": "`draft_weights: learned` needs the stage `draft-network`.",
    "decode-last": "the stage `plain`, `skip` or `speculate` must be the last of its pipeline.",
    "two-decoders": "a pipeline has at most one of the stages `plain`, `skip` and `speculate`.",
    "two-gates": "a pipeline must not have two gate stages.",
    "two-quantizers": "a pipeline must not have two stages that quantize weights.",
    "prune-after-quantize": "prune before quantizing, because quantized weights cannot be pruned.",
    "heal-after-quantize": "to heal quantized weights, set `backbone: scales` or `codes`.",
    "scales-are-packing": "`backbone: scales` needs packed weights whose scales are not packed.",
    "codes-are-grids": "`backbone: codes` needs integer grids: int8, int6, int4, int3 or int2.",
    "gate-after-quantize": "quantized weights cannot be trained: put the gate stage first.",
    "prune-after-gate": "prune before the gate stage, because gates are made for one model shape.",
    "heal-after-gate": "heal (train) before the gate stage, because gates need fixed weights.",
    "group-divides": "a quantization group must divide the inputs of every linear layer.",
    "whole-tiles": "sizes of packed weights must be multiples of the tiles that kernels read.",
    "branches-need-gates": "gates decide which branches are removed: add a gate stage first.",
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
"""Rule -> why a stage may not come here, or why a variant is left out."""

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
