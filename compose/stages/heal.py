"""The stage `heal`: distil the dense model into one that pruning or quantizing has damaged."""

from __future__ import annotations

from dataclasses import fields
from typing import TYPE_CHECKING, Any, ClassVar, Literal

from pydantic import Field

from compose.artifacts.folder import GRID_METHOD
from compose.errors import RuleBroken, UserError
from compose.stages.base import (
    AS_STORED,
    IN_FLOAT32,
    TRAINED,
    ModelShape,
    Role,
    Split,
    Stage,
    StageJob,
    training_bytes,
)
from compose.stages.gate_transfer import carry_gates
from compose.stages.on_policy import OnPolicyText, as_settings, require_room
from gateskip.training.recipe import PACKED, HealConfig

if TYPE_CHECKING:
    from torch import Tensor

HEAL = HealConfig()  # each default stands there, once
HELD_OUT = 4  # blocks that healing is stopped by


class Heal(Stage):
    """Train the weights of a compressed model towards the predictions of the original (dense) model
    (distillation)."""

    role: ClassVar[Role] = "heal"
    on_gpu: ClassVar[bool] = True
    version: ClassVar[int] = 4
    reads_data: ClassVar[tuple[Split, ...]] = ("train",)

    use: Literal["heal"] = "heal"
    """The stage's name."""

    steps: int = Field(default=HEAL.steps, ge=1)
    """Maximum number of optimizer steps."""

    backbone: Literal["full", "lora", "scales", "codes"] = "full"
    """Which weights are trained: all weights except the embeddings (`full`), low-rank updates of
    the linear layers that are merged at the end (`lora`), the scales and norms of a quantized model
    (`scales`), or its scales, norms and integer codes (`codes`; after `int8`, `int6`, `int4`,
    `int3` or `int2`). `backbone: codes` recovers more quality than `backbone: scales` and takes
    longer. Training scales or codes changes neither the file format nor the size or speed of the
    model."""

    lora_rank: int = Field(default=HEAL.lora_rank, ge=1)
    """Rank of the low-rank weight updates with `backbone: lora`."""

    lr: float = Field(default=HEAL.lr, gt=0)
    """Maximum learning rate. `backbone: lora` and `backbone: scales` need about ten times the
    learning rate of `backbone: full`."""

    weight_decay: float = Field(default=HEAL.weight_decay, ge=0)
    """Weight decay of the optimizer AdamW."""

    warmup: float = Field(default=HEAL.warmup, ge=0, le=1)
    """Length of the warm-up, in which the learning rate rises, as a share of the training steps."""

    decay: Literal["linear", "cosine"] = HEAL.decay
    """How the learning rate falls to a tenth of its maximum after the warm-up: linearly or along a
    cosine."""

    batch: int = Field(default=HEAL.batch, ge=1)
    """Number of training sequences in one forward and backward pass."""

    accumulate: int = Field(default=HEAL.accumulate, ge=1)
    """Number of passes whose gradients are added up for one optimizer step (gradient accumulation).
    """

    length: int | None = Field(default=None, ge=8)
    """Length of one training sequence, in tokens; by default, the value of `data.train.length`."""

    temperature: float = Field(default=HEAL.temperature, gt=0)
    """Temperature of the distillation loss."""

    on_policy: OnPolicyText | None = None
    """Settings of a second training phase, in which the model writes part of the training text
    itself and learns the dense model's predictions on this text (on-policy distillation).
    `on_policy: {}` turns this phase on with default settings."""

    checkpointing: bool = HEAL.checkpointing
    """Whether the backward pass computes layers again instead of keeping their activations
    (gradient checkpointing), which saves memory and takes more time."""

    precision: Literal["auto", "no", "bf16", "fp16"] = HEAL.precision
    """Mixed precision in training, named as in the library accelerate. `auto` means bf16 if the
    device computes fast in bf16."""

    validate_every: int = Field(default=HEAL.validate_every, ge=0)
    """Number of training steps between two validations, each on four held-out blocks of the
    training text. The stage `heal` saves the weights that had the best validation. With
    `validate_every: 0`, there is no validation, and the weights after the last training step are
    saved."""

    patience: int = Field(default=HEAL.patience, ge=0)
    """Number of validations without improvement after which training stops. With `patience: 0`,
    training never stops early."""

    def tolerates(self, rule: str) -> bool:
        """Packed weights learn by their scales and codes. Gates tolerate that as they tolerate
        quantization."""
        return self.backbone in PACKED and rule in ("heal-after-quantize", "heal-after-gate")

    def check(self, shape: ModelShape | None, before: tuple[Stage, ...]) -> None:
        """Order rules, and `scales-are-packing`: the weights have scales, and the scales are not
        packed."""
        super().check(shape, before)
        if self.backbone not in PACKED:
            return
        quantizer = next((stage for stage in before if stage.role == "quantize"), None)
        if quantizer is None and not (shape and shape.quantized):
            raise RuleBroken(
                "scales-are-packing",
                f"backbone: {self.backbone} needs packed weights, and these are not packed",
                fix="put a quantizer before it, or set backbone: full or lora",
            )
        format_ = shape.quantized if shape else None
        if self.backbone == "codes" and format_ not in (None, GRID_METHOD):
            raise RuleBroken(
                "codes-are-grids",
                f"backbone: codes needs integer grids, and these are {format_} weights",
                fix="quantize with int8, int6, int4, int3 or int2 (offset: real), or heal scales",
            )
        if getattr(quantizer, "double_quant", False):
            raise RuleBroken(
                "scales-are-packing",
                "double_quant packs the scales, so they cannot be trained",
                fix="set double_quant: false",
            )

    def held(self) -> float:
        """The model, its trained part in float32, and its teacher as a mapped file."""
        if self._computes_as_stored():
            return 2 * AS_STORED
        return TRAINED[self.backbone] - IN_FLOAT32 + AS_STORED

    def worked_on(self, shape: ModelShape, length: int) -> float:
        """A training step, the logits of a few tokens, and an LM head converted to float32."""
        saved = training_bytes(shape, self.batch * (self.length or length))
        head = IN_FLOAT32 * shape.vocab_size * shape.hidden_size
        return head + (saved / shape.num_layers if self.checkpointing else saved)

    def run(self, job: StageJob) -> dict[str, Any]:
        """Distil on the training text; resumes from its own checkpoint after a kill."""
        from transformers import AutoTokenizer

        from compose.artifacts.packed_folder import load_as_stored
        from compose.stages.text.split_text import split_blocks
        from gateskip.training.heal import best_row, heal

        assert job.train is not None, "heal reads the training split"
        length = self.length or job.train.length
        require_room(self.on_policy, length)
        sequences = self.steps * self.accumulate * self.batch
        held = HELD_OUT if self.validate_every else 0
        tokenizer = AutoTokenizer.from_pretrained(job.source)
        blocks = split_blocks(job, "train", tokenizer, length, sequences + held)
        train, held_out = hold_out(blocks, held)
        model = load_as_stored(job.source, widen=not self._computes_as_stored())
        shared = {field.name for field in fields(HealConfig)} & set(type(self).model_fields)
        chosen = {name: getattr(self, name) for name in shared - {"on_policy"}}
        config = HealConfig(**chosen, seed=job.seed, on_policy=as_settings(self.on_policy))
        curve = heal(
            model, load_as_stored(job.dense), train, config, held_out, job.work, job.progress
        )
        self._save(job, model)
        done = int(curve[-1]["step"])
        record: dict[str, Any] = {"training": curve, "steps_done": done}
        record["train_tokens"] = done * self.accumulate * self.batch * length
        best = best_row(curve)
        if best is not None:
            record["held_out"] = {"before": curve[0]["valid"], "after": best["valid"]}
            record["held_out"]["best_step"] = int(best["step"])
        return record

    def _computes_as_stored(self) -> bool:
        """Whether the model keeps its stored type. Decoding differs between bfloat16 and float32,
        so text that the model writes needs the stored type."""
        return self.backbone == "lora" and self.on_policy is None

    def _save(self, job: StageJob, model: Any) -> None:
        """Save the healed weights. Packed weights stay packed, and gates are copied."""
        import torch

        from gateskip.training.scales import save_scales

        if self.backbone in PACKED:
            save_scales(model, job.source, job.target)
            carry_gates(job)
        else:
            model.to(getattr(torch, job.dtype)).save_pretrained(job.target)


def hold_out(blocks: Tensor, count: int) -> tuple[Tensor, Tensor | None]:
    """Blocks [N, S] to train on, and the last `count` of them, at most a quarter, to validate on.

    Raises:
        UserError: there are too few blocks to hold one out.
    """
    if count == 0:
        return blocks, None
    count = min(count, len(blocks) // 4)
    if count == 0:
        raise UserError(
            f"the training text makes {len(blocks)} blocks, too few to hold one out",
            fix="give more text or a shorter length, or set validate_every: 0",
        )
    return blocks[:-count], blocks[-count:]
