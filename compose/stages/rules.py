"""Order rules: which stage may not follow which, by role, and one sentence for each rule."""

from __future__ import annotations

from typing import Literal

Role = Literal["prune", "heal", "gate", "quantize", "head", "draft", "decode"]
"""The role of a stage in the order rules."""

RULES: dict[str, str] = {
    "decode-needs-gates": "gates decide what is skipped: a gate stage must come before.",
    "draft-of-packed": "a draft copy needs fewer bits than the weights that it is made from.",
    "original-is-gone": "a backbone trained together with gates is not the original model.",
    "head-last": "pack-head comes after all other stages that change weights.",
    "draft-last": "a draft network is trained on the final weights: none may change after it.",
    "two-networks": "a model carries one draft network: one such stage a chain.",
    "learned-needs-network": "draft_weights: learned needs a network from the stage draft-network.",
    "decode-last": "a decode stage only sets how the model is run; no weight stage may follow it.",
    "two-decoders": "a chain has at most one decode stage, because a model is decoded in one way.",
    "two-gates": "a model carries one set of gates: one gate stage a chain.",
    "two-quantizers": "a model carries one quantization config: one quantizer a chain.",
    "prune-after-quantize": "packed weights cannot be cut: prune before quantizing.",
    "heal-after-quantize": "packed weights are healed only by `backbone: scales` or `codes`.",
    "scales-are-packing": "`backbone: scales` needs packed weights whose scales are not packed.",
    "codes-are-grids": "`backbone: codes` needs integer grids: int8, int6, int4, int3 or int2.",
    "gate-after-quantize": "packed weights cannot be trained together with gates: gate first.",
    "prune-after-gate": "thresholds are calibrated for the branches of one model: prune first.",
    "heal-after-gate": "thresholds are calibrated for the weights of one model: heal first.",
    "group-divides": "a quantization group must divide the inputs of every linear layer.",
    "whole-tiles": "kernels read packed weights in whole tiles: sizes must be multiples of these.",
    "branches-need-gates": "gates say which branches are skipped: a gate stage must come before.",
    "budget-calibrated": "gates work only at budgets that they are calibrated for.",
    "layout-known": "weights are found by name: the stage must know the model's family.",
    "heads-fit": "KV groups must keep equal numbers of heads, and the config must allow them.",
    "head-is-tied": "an LM head that shares the embedding's weights cannot be packed.",
    "head-packed-twice": "an LM head is packed once, by its quantizer or by pack-head.",
    "width-fits": "a pruned width must be a multiple of round_to, above zero, and narrower.",
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
