"""How fine-tunes run: their settings, and the published recipe. Imports no torch."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

Backbone = Literal["frozen", "lora", "full", "scales", "codes"]
"""The model's own weights that learn: none; low-rank updates, merged at the end; all but the
embeddings and the LM head; of a packed model its scales and norms, or these and the codes of its
integer grids."""


PACKED: tuple[Backbone, ...] = ("scales", "codes")
"""Settings with which a packed model learns and stays packed."""

WHOLE: tuple[Backbone, ...] = ("full", "codes")
"""Settings with which every weight of the layers has a number that learns."""


Divergence = Literal["forward", "reverse", "mixed"]
"""The student's distance from its teacher: KL(teacher || student), KL(student || teacher), or the
mean of both."""


@dataclass(frozen=True, kw_only=True)
class OnPolicy:
    """A second phase of a fine-tune, in which the student writes some of the text itself
    (generalized knowledge distillation, arXiv 2306.13649)."""

    after: float = 0.5
    """Share of the steps that come before it."""
    share: float = 0.5
    """Share of its passes that read what the student wrote."""
    every: int = 50
    """Steps between two times that the student writes."""
    tokens: int = 100
    """Tokens that it writes at the end of a block; what comes before them is training text."""
    temperature: float = 0.8
    """Of its sampling; 0 is greedy."""
    divergence: Divergence = "forward"
    """Between teacher and student on such text."""
    top_k: int = 0
    """Of each distribution on such text only the teacher's most likely tokens count, and all others
    together as one; 0 is the whole vocabulary."""


@dataclass(frozen=True, kw_only=True)
class LoopConfig:
    """How long, in which steps and how exactly a fine-tune goes on, whatever it trains."""

    steps: int = 300
    """Optimizer steps."""
    batch: int = 1
    """Blocks in one pass, a process."""
    accumulate: int = 1
    """Passes in one step."""
    backbone: Backbone = "full"
    """What of the model's own weights trains along."""
    lora_rank: int = 16
    """Rank of the low-rank updates."""
    decay: Literal["linear", "cosine"] = "linear"
    """How the learning rates fall, to a tenth."""
    warmup: float = 0.1
    """Share of the steps over which the learning rates rise."""
    weight_decay: float = 0.0
    """Of AdamW, on the backbone; gates have none."""
    clip: float = 1.0
    """Gradient norm bound."""
    checkpointing: bool = False
    """Recompute branches in the backward pass instead of keeping their activations."""
    precision: Literal["auto", "no", "bf16", "fp16"] = "auto"
    """Mixed precision, as accelerate names it; `auto` is bf16 where the device is fast at it."""
    validate_every: int = 0
    """Steps between validations on the blocks given for that; 0 is never."""
    seed: int = 0
    """Order of the blocks, and what is drawn."""
    checkpoint_every: int = 50
    """Steps between resumable checkpoints, when a folder for them is given."""
    on_policy: OnPolicy | None = None
    """The phase in which the student writes text for itself; none when left out."""


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
    """Pull on the gates themselves; budgets alone already make them rank."""
    sparsity_weight: float = 0.1
    """Weight of that pull (lambda in the paper)."""
    masks: Literal["straight-through", "soft", "hard"] = "straight-through"
    """How a threshold becomes a mask while training."""
    mask_temperature: float = 1.0
    """Temperature of the sigmoid whose gradient the mask gets."""
    ranking: Literal["global", "uniform", "rows"] = "global"
    """Whether all branches share one threshold, or each keeps the budget's share of its tokens; or
    all share one in every row of a batch, which keeps the budget by itself (a pass more a step)."""
    branches: Literal["both", "attention", "mlp"] = "both"
    """Which branches may be skipped."""
    reading: bool = False
    """Whether each block is cut into a prompt, which skips, and an answer at full compute, which
    alone counts. The gates then have a measured prompt sensitivity: see calibration/reading.py."""
    schedule: Literal["sampled", "linear", "cosine"] = "sampled"
    """How the budget runs from 1 to `budget`."""
    budget: float = 0.7
    """Lowest share of multiply-adds that training visits."""
    lr: float = 1e-3
    """Learning rate of the gates and their shortcuts."""
    backbone_lr: float = 3e-5
    """Learning rate of the backbone or its updates, when it trains."""
    kv_rule: str = "project"
    """Whose keys and values a skipped token shows; the same as at inference."""
    validate_budgets: tuple[float, ...] = (0.85, 0.75)
    """Budgets at which validation skips."""


@dataclass(frozen=True, kw_only=True)
class HealConfig(LoopConfig):
    """How a model that lost parts is distilled back from the dense one."""

    steps: int = 200
    lr: float = 1e-4
    """Learning rate of the weights, or of their low-rank updates, at its peak."""
    temperature: float = 1.0
    """Softens both distributions before they are compared."""
    decay: Literal["linear", "cosine"] = "cosine"
    warmup: float = 0.05
    validate_every: int = 50
    patience: int = 3
    """Validations in a row that may bring nothing before the loop stops; 0 never stops it."""


@dataclass(frozen=True, kw_only=True)
class DraftConfig(LoopConfig):
    """How a draft network is trained."""

    steps: int = 500
    batch: int = 8
    lr: float = 2e-3
    """Learning rate at its peak."""
    unroll: int = 3
    """Tokens that it is unrolled over."""
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
gates that scale, cross-entropy and an L2 pull, a quantile a branch, one learning rate, 1000 warm-up
steps of 6800. Whatever a pipeline file says itself comes before its preset."""
