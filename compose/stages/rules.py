"""Order rules: which stage may not follow which, written in roles, and the sentence for each."""

from __future__ import annotations

from typing import Literal

Role = Literal["prune", "heal", "gate", "quantize", "head", "draft", "decode"]
"""What a stage is to the order rules."""

RULES: dict[str, str] = {
    "decode-needs-gates": "what is skipped is decided by gates, so a gate stage must come before.",
    "draft-of-packed": "a draft copy has fewer bits than the weights that it is made of.",
    "original-is-gone": "a backbone that learned beside the gates is the original no more.",
    "head-last": "the LM head is packed when all other weights are finished.",
    "draft-last": "a draft network learns what finished weights say; none may change after it.",
    "two-networks": "a model carries one draft network: one such stage a chain.",
    "learned-needs-network": "a learned draft is a network that the stage draft-network trained.",
    "decode-last": "a decode stage only sets how the model is run; no weight stage may follow it.",
    "two-decoders": "a model is decoded in one way: one decode stage a chain.",
    "two-gates": "a model carries one set of gates: one gate stage a chain.",
    "two-quantizers": "a model carries one quantization config: one quantizer a chain.",
    "prune-after-quantize": "packed weights cannot be cut: prune before quantizing.",
    "heal-after-quantize": "packed weights learn by `backbone: scales` or `codes`: heal first.",
    "scales-are-packing": "scales belong to packed weights: quantize first, in another way.",
    "codes-are-grids": "codes are learned on integer grids: quantize with int4 and its kin.",
    "gate-after-quantize": "packed weights cannot be trained beside the gates: gate first.",
    "prune-after-gate": "thresholds hold for the branches they were calibrated on: prune first.",
    "heal-after-gate": "thresholds hold for the weights they were calibrated on: heal first.",
    "group-divides": "a quantization group must divide the inputs of every linear layer.",
    "whole-tiles": "kernels for packed weights take them in tiles of one size.",
    "branches-need-gates": "which branches tokens do without is what gates learn: gate first.",
    "budget-calibrated": "gates can be asked only at budgets that they are calibrated for.",
    "layout-known": "weights are cut by their names, which differ from family to family.",
    "heads-fit": "every KV group must keep as many heads, in a number that the config takes.",
    "head-is-tied": "an LM head that shares the embedding's weights cannot be packed.",
    "head-packed-twice": "an LM head is packed once, by its quantizer or by pack-head.",
    "width-fits": "a pruned width must be a multiple of round_to, above zero, and narrower.",
    "hidden-fits": "what is left of the hidden size must fit its rounding and the number of heads.",
    "layers-fit": "dropped layers must exist, and at least one layer must stay.",
    "exclude": "the pipeline file excludes this combination.",
}
"""Why a stage may not stand where it stands, or a cell is left out: name and sentence."""

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
"""(a stage's role, the role of one before it) -> the rule that this breaks."""
