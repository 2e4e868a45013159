"""Residual gates: a small module that tells, token by token, which branches may be skipped."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, ClassVar, Literal

from pydantic import Field, ValidationInfo, field_validator

from compose.stages.base import Role, Split, Stage

GateKind = Literal["scalar", "vector", "low-rank", "shared", "mlp"]
Budget = Annotated[float, Field(gt=0, le=1)]
WARM = "warm"


class Gate(Stage):
    """Attach gates to every attention and MLP branch, fine-tune them, calibrate thresholds."""

    role: ClassVar[Role] = "gate"
    reads_data: ClassVar[tuple[Split, ...]] = ("train", "calibration")

    use: Literal["gate"] = "gate"
    """The stage's name."""

    kind: GateKind = "scalar"
    """What a gate computes from a branch's input; `scalar` is one number a token and branch."""

    steps: int = Field(default=300, ge=0)
    """Optimizer steps of the fine-tune; 0 leaves the gates as `init` made them."""

    budget: Budget = 0.8
    """The share of branches computed that the fine-tune ends at: the lowest one it trains for."""

    init: str = Field(default=WARM, min_length=1)
    """`warm` (from measured contributions), or the path of a gates.safetensors to go on from."""

    train_backbone: bool = True
    """Whether the model's own weights learn beside the gates."""

    lr: float = Field(default=3e-3, gt=0)
    """Learning rate of the gates."""

    backbone_lr: float = Field(default=3e-5, gt=0)
    """Learning rate of the model's own weights; unused when `train_backbone` is false."""

    length: int = Field(default=256, ge=8)
    """Tokens in one training sequence."""

    batch: int = Field(default=1, ge=1)
    """Sequences in one optimizer step."""

    kv: Literal["project", "copy"] = "project"
    """Keys and values of a skipped token: projected by its own layer, or the layer below's."""

    allocation: Literal["global", "uniform", "sensitivity"] = "global"
    """How a budget is shared out: one threshold for all, the same for each, or by measured harm."""

    budgets: tuple[Budget, ...] = Field(
        default=(0.95, 0.9, 0.85, 0.8, 0.75, 0.7, 0.6, 0.5, 0.4), min_length=1
    )
    """The budgets for which thresholds are calibrated and stored."""

    @field_validator("kind")
    @classmethod
    def _implemented(cls, kind: GateKind) -> GateKind:
        if kind != "scalar":
            raise ValueError(f"gate kind {kind!r} cannot be trained yet: take 'scalar'")
        return kind

    @field_validator("budgets")
    @classmethod
    def _distinct(cls, budgets: tuple[float, ...], info: ValidationInfo) -> tuple[float, ...]:
        if len(set(budgets)) < len(budgets):
            raise ValueError(f"{info.field_name} names a budget twice")
        return budgets

    def tolerates(self, rule: str) -> bool:
        """Gates alone can learn on packed weights: their gradients do not pass into them."""
        return rule == "gate-after-quantize" and not self.train_backbone

    def files(self) -> dict[str, Path]:
        """The gates file to start from, unless the start is warm."""
        return {} if self.init == WARM else {"init": Path(self.init)}
