"""Settings of fine-tunes, and the published recipe. Imports no torch."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

Backbone = Literal["frozen", "lora", "full", "scales", "codes"]
"""Which of the model's own weights learn: none; low-rank updates, merged at the end; all except the
embeddings and the LM head; in a packed model its scales and norms, or these and the codes of its
integer grids."""


PACKED: tuple[Backbone, ...] = ("scales", "codes")
"""Settings with which a packed model learns and stays packed."""

WHOLE: tuple[Backbone, ...] = ("full", "codes")
"""Settings with which every weight of the layers has a trained number."""


Divergence = Literal["forward", "reverse", "mixed"]
"""The student's distance from its teacher: KL(teacher || student), KL(student || teacher), or the
mean of both."""


@dataclass(frozen=True, kw_only=True)
class OnPolicy:
    """A second phase of a fine-tune, in which the student writes part of the text itself
    (generalized knowledge distillation, arXiv 2306.13649)."""

    after: float = 0.5
    """Share of the steps before this phase begins."""
    share: float = 0.5
    """Share of this phase's passes that use text written by the student."""
    every: int = 50
    """Steps between two times that the student writes."""
    tokens: int = 100
    """Tokens that it writes at the end of a block, after training text."""
    temperature: float = 0.8
    """Temperature of its sampling; 0 is greedy."""
    divergence: Divergence = "forward"
    """Divergence from the teacher on text that the student wrote."""
    top_k: int = 0
    """Number of the teacher's most likely tokens that count one by one in the divergence; all
    others count as one. 0 is the whole vocabulary."""


@dataclass(frozen=True, kw_only=True)
class LoopConfig:
    """Length, steps and precision of a fine-tune, whatever it trains."""

    steps: int = 300
    """Optimizer steps."""
    batch: int = 1
    """Blocks in one pass, for each process."""
    accumulate: int = 1
    """Passes in one step."""
    backbone: Backbone = "full"
    """Which of the model's own weights train."""
    lora_rank: int = 16
    """Rank of the low-rank updates."""
    decay: Literal["linear", "cosine"] = "linear"
    """How the learning rates fall, to a tenth."""
    warmup: float = 0.1
    """Share of the steps over which the learning rates rise."""
    weight_decay: float = 0.0
    """Weight decay of AdamW on the backbone; gates have none."""
    clip: float = 1.0
    """Bound of the gradient norm."""
    checkpointing: bool = False
    """Recompute branches in the backward pass instead of keeping their activations."""
    precision: Literal["auto", "no", "bf16", "fp16"] = "auto"
    """Mixed precision, by accelerate's names; `auto` is bf16 where the device computes it fast."""
    validate_every: int = 0
    """Steps between validations on the validation blocks; 0 never validates."""
    seed: int = 0
    """Seed of the blocks' order and of all random numbers."""
    checkpoint_every: int = 50
    """Steps between resumable checkpoints, when a folder for them is given."""
    on_policy: OnPolicy | None = None
    """The phase in which the student writes text; none when left out."""


@dataclass(frozen=True, kw_only=True)
class TrainConfig(LoopConfig):
    """How gates, and optionally the backbone, are fine-tuned."""

    loss: Literal["distill", "cross-entropy", "both"] = "distill"
    """Match the dense model's logits, predict the text, or the sum of both."""
    loss_temperature: float = 1.0
    """Temperature of the distillation."""
    hidden_weight: float = 0.0
    """Weight of the distance between final hidden states, where there is a teacher."""
    sparsity: Literal["none", "l1", "l2", "kl"] = "none"
    """Penalty on the gates' outputs; without it budgets alone make gates rank tokens."""
    sparsity_weight: float = 0.1
    """Weight of that penalty (lambda in the paper)."""
    masks: Literal["straight-through", "soft", "hard"] = "straight-through"
    """How a threshold becomes a mask while training."""
    mask_temperature: float = 1.0
    """Temperature of the sigmoid that gives the mask its gradient."""
    ranking: Literal["global", "uniform", "rows"] = "global"
    """Which tokens are kept: by one threshold for all branches, by the same share in each branch,
    or by one threshold in each row of a batch, which then keeps the budget by itself (a second pass
    a step)."""
    branches: Literal["both", "attention", "mlp"] = "both"
    """Which branches may be skipped."""
    reading: bool = False
    """Whether each block is cut into a prompt, which skips, and an answer at full compute, the only
    part that counts. The gates must then have a measured prompt sensitivity: see
    calibration/reading.py."""
    schedule: Literal["sampled", "linear", "cosine"] = "sampled"
    """How the budget moves from 1 to `budget`."""
    budget: float = 0.7
    """Lowest share of multiply-adds in training."""
    lr: float = 1e-3
    """Learning rate of the gates and their shortcuts."""
    backbone_lr: float = 3e-5
    """Learning rate of the backbone or its updates, when it trains."""
    kv_rule: str = "project"
    """KV rule for skipped tokens; the same as at inference."""
    validate_budgets: tuple[float, ...] = (0.85, 0.75)
    """Budgets at which validation skips."""


@dataclass(frozen=True, kw_only=True)
class HealConfig(LoopConfig):
    """How a damaged model is distilled from the dense one."""

    steps: int = 200
    lr: float = 1e-4
    """Peak learning rate of the weights, or of their low-rank updates."""
    temperature: float = 1.0
    """Softens both distributions before they are compared."""
    decay: Literal["linear", "cosine"] = "cosine"
    warmup: float = 0.05
    validate_every: int = 50
    patience: int = 3
    """Validations in a row without improvement before the loop stops; 0 never stops it."""


@dataclass(frozen=True, kw_only=True)
class DraftConfig(LoopConfig):
    """How a draft network is trained."""

    steps: int = 500
    batch: int = 8
    lr: float = 2e-3
    """Peak learning rate."""
    unroll: int = 3
    """Tokens over which the network is unrolled."""
    warmup: float = 0.05


RECIPES: dict[str, dict[str, Any]] = {
    "ours": {},
    "paper": {
        "kind": "vector",
        "scales": True,
        "init": "open",
        "loss": "cross-entropy",
        "sparsity": "l2",
        "sparsity_weight": 0.1,
        "masks": "hard",
        "ranking": "uniform",
        "allocation": "uniform",
        "schedule": "linear",
        "backbone": "full",
        "lr": 3e-6,
        "backbone_lr": 3e-6,
        "weight_decay": 0.001,
        "decay": "cosine",
        "warmup": 0.15,
        "kv": "copy",
        "shortcut": 0,
    },
}
"""Presets of the gate stage. `paper` is arXiv 2510.13876, section 4 and the official code: vector
gates that scale, cross-entropy and an L2 penalty, a quantile for each branch, one learning rate,
1000 warm-up steps of 6800. Settings in a pipeline file take precedence over its preset."""
