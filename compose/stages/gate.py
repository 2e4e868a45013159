"""Residual gates: a small module that tells, token by token, which branches may be skipped."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, ClassVar, Literal

from pydantic import Field, ValidationInfo, field_validator

from compose.errors import UserError
from compose.stages.base import Role, Split, Stage, StageJob

if TYPE_CHECKING:
    from torch import Tensor

    from gateskip.gates import ScalarGates

GateKind = Literal["scalar", "vector", "low-rank", "shared", "mlp"]
Budget = Annotated[float, Field(gt=0, le=1)]
WARM = "warm"
WARM_BLOCKS = 24  # of the training text: about ten tokens for each weight of a gate of 576
SENSITIVITY_BLOCKS = 4


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
    """Share of the branches' multiply-adds that the fine-tune ends at: its lowest."""

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

    calibration_blocks: int = Field(default=16, ge=1)
    """Sequences of `length` tokens on which thresholds are calibrated."""

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

    def run(self, job: StageJob) -> dict[str, Any]:
        """Gates beside the model: attach, fine-tune, calibrate; the backbone moves if asked."""
        from gateskip.checkpoint import GateFile, grid_of, load_model, save_gates
        from gateskip.linears import accelerate_linears

        model = load_model(job.source, "float32")
        train, calibration = self._blocks(job)
        if not self.train_backbone:
            model.requires_grad_(False)
            accelerate_linears(model)  # unpacks 4-bit weights faster than their own modules do
        gates, sensitivity = self._start(job, model, train)
        curve = self._train(job, model, gates, train)
        found = self._calibrate(job, model, gates, calibration, sensitivity)
        grid, kept = grid_of(found)
        self._save_backbone(job, model)
        record: dict[str, Any] = {
            "training": curve,
            "kept": {str(budget): round(share, 4) for budget, share in kept.items()},
            "train_tokens": self.steps * self.batch * self.length,
        }
        training = {"parameters": self.model_dump(mode="json") | {"init": Path(self.init).name}}
        save_gates(job.target, GateFile(gates, self.kv, grid, kept, sensitivity, training))
        return record

    def _blocks(self, job: StageJob) -> tuple[Tensor, Tensor]:
        """Token blocks [N, length] to train on, and to calibrate on."""
        from transformers import AutoTokenizer

        from compose.assets import load_texts, token_blocks

        assert job.train is not None and job.calibration is not None, "gate reads both splits"
        tokenizer = AutoTokenizer.from_pretrained(job.source)
        wanted = max(self.steps * self.batch, WARM_BLOCKS)
        train = load_texts(job.train.source, job.train.limit, job.asset_cache)
        calibration = load_texts(job.calibration.source, job.calibration.limit, job.asset_cache)
        return (
            token_blocks(train, tokenizer, self.length, wanted),
            token_blocks(calibration, tokenizer, self.length, self.calibration_blocks),
        )

    def _start(
        self, job: StageJob, model: Any, train: Tensor
    ) -> tuple[ScalarGates, list[float] | None]:
        """Gates to begin with, and the branches' sensitivities where they are needed."""
        from gateskip.checkpoint import read_gates
        from gateskip.warmstart import sensitivities, warm_start

        if self.init == WARM:
            blocks = train[:WARM_BLOCKS]
            return warm_start(
                model,
                blocks,
                kv_rule=self.kv,
                progress=lambda done, total: job.progress(done, total, "warm start"),
            )
        gates = read_gates(Path(self.init))
        wanted = (2 * model.config.num_hidden_layers, model.config.hidden_size)
        if tuple(gates.weight.shape) != wanted:
            raise UserError(
                f"the gates in {Path(self.init).name} are for {gates.weight.shape[0]} branches of"
                f" {gates.weight.shape[1]} inputs, but the model has {wanted[0]} of {wanted[1]}",
                fix="set init: warm, or name gates that were made for this model",
            )
        if self.allocation != "sensitivity":
            return gates, None
        return gates, sensitivities(model, train[:SENSITIVITY_BLOCKS])

    def _train(
        self, job: StageJob, model: Any, gates: ScalarGates, train: Tensor
    ) -> list[dict[str, float]]:
        from gateskip.checkpoint import load_model
        from gateskip.train import TrainConfig, train_gates

        if self.steps == 0:
            return []
        config = TrainConfig(
            steps=self.steps,
            batch=self.batch,
            budget=self.budget,
            lr=self.lr,
            backbone_lr=self.backbone_lr,
            train_backbone=self.train_backbone,
            kv_rule=self.kv,
            seed=job.seed,
        )
        teacher = load_model(job.dense, "float32") if self.train_backbone else None
        return train_gates(model, gates, train, config, teacher, job.work, job.progress)

    def _calibrate(
        self,
        job: StageJob,
        model: Any,
        gates: ScalarGates,
        blocks: Tensor,
        sensitivity: list[float] | None,
    ) -> Any:
        from gateskip.budget import calibrate

        return calibrate(
            model,
            gates.requires_grad_(False),
            blocks,
            self.budgets,
            self.allocation,
            self.kv,
            sensitivity,
            progress=lambda done, total: job.progress(done, total, "calibrating budgets"),
        )

    def _save_backbone(self, job: StageJob, model: Any) -> None:
        """A trained backbone is written; a frozen one is the source's files, untouched."""
        import torch

        from compose.artifact import copy_source

        if self.train_backbone:
            model.to(getattr(torch, job.dtype)).save_pretrained(job.target)
        else:
            copy_source(job.source, job.target, job.dtype, link=True)
