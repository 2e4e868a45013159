"""How a gate fine-tune runs: its settings, and the published recipe. Imports no torch."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal


@dataclass(frozen=True, kw_only=True)
class TrainConfig:
    """How gates (and, if asked, the backbone) are fine-tuned."""

    steps: int = 300
    """Optimizer steps."""
    batch: int = 1
    """Blocks in one pass, a process."""
    accumulate: int = 1
    """Passes in one step."""
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
    """Temperature of the softened mask's slope."""
    ranking: Literal["global", "uniform"] = "global"
    """Whether all branches share one threshold, or each keeps the budget's share of its tokens."""
    branches: Literal["both", "attention", "mlp"] = "both"
    """Which branches may be skipped."""
    schedule: Literal["sampled", "linear", "cosine"] = "sampled"
    """How the budget runs from 1 to `budget`."""
    budget: float = 0.7
    """Lowest share of multiply-adds that training visits."""
    lr: float = 2e-3
    """Learning rate of the gates and their shortcuts."""
    backbone: Literal["frozen", "lora", "full"] = "full"
    """What of the model's own weights trains along: nothing, low-rank updates, all but the
    embeddings and the LM head."""
    backbone_lr: float = 3e-5
    """Learning rate of the backbone or its updates, when it trains."""
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
    kv_rule: str = "project"
    """Whose keys and values a skipped token shows; the same as at inference."""
    checkpointing: bool = False
    """Recompute branches in the backward pass instead of keeping their activations."""
    precision: Literal["auto", "no", "bf16", "fp16"] = "auto"
    """Mixed precision, as accelerate names it; `auto` is bf16 where the device is fast at it."""
    validate_every: int = 0
    """Steps between validations on the blocks given for that; 0 is never."""
    validate_budgets: tuple[float, ...] = (0.85, 0.75)
    """Budgets at which validation skips."""
    seed: int = 0
    """Order of the blocks and the drawn budgets."""
    checkpoint_every: int = 50
    """Steps between resumable checkpoints, when a folder for them is given."""


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
