"""Healing: distillation of the dense model into one that pruning or quantization has damaged."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import set_seed
from torch import Tensor

from gateskip.model.families import backbone, head
from gateskip.model.progress import Progress
from gateskip.quantization.as_stored import heads_in_float32
from gateskip.training.cast_once import cast_once
from gateskip.training.grids import PLACE_RATE
from gateskip.training.loop import Loop, Row, adapt, precision, training_device
from gateskip.training.objectives import CHUNK, distill_loss, in_chunks
from gateskip.training.recipe import PACKED, HealConfig
from gateskip.training.rollouts import Write, rollout_writer
from gateskip.training.scales import places
from gateskip.training.sharding import fsdp_requested, whole


def heal(
    model: Any,
    teacher: Any,
    blocks: Tensor,
    config: HealConfig,
    held_out: Tensor | None = None,
    work: Path | None = None,
    progress: Progress | None = None,
) -> list[Row]:
    """Train `model` in place on blocks [N, S] of token ids; returns the curve, one row a step.

    With `held_out` [M, S], rows of the curve carry `valid`, the mean KL to the teacher there, at
    step 0, every `validate_every` steps and at the end. The loop stops after `patience` validations
    in a row without a better one, and keeps the weights of the best: the model never ends further
    from the teacher than it began. With `work`, a killed run resumes from its last checkpoint
    there.
    """
    fsdp_requested()  # before accelerate looks
    accelerator = Accelerator(
        cpu=training_device().type == "cpu",
        mixed_precision=precision(config.precision),
        gradient_accumulation_steps=config.accumulate,
    )
    set_seed(config.seed)
    adapted = adapt(model, config, teacher)
    if config.checkpointing:
        model.gradient_checkpointing_enable({"use_reentrant": False})
    model.train(config.checkpointing)  # transformers recomputes in training mode alone
    healing = _Healing(model, teacher, blocks, config, accelerator, held_out)
    curve = healing.run(work, progress)
    healing.keep_best()
    healing.collect()
    if config.checkpointing:
        model.gradient_checkpointing_disable()
    if adapted is not None:
        adapted.merge_and_unload()
    model.requires_grad_(config.backbone not in PACKED)
    model.eval()
    return curve


def best_row(curve: Iterable[Row]) -> Row | None:
    """The validated row with the lowest loss, the first of equals; None where none was
    validated."""
    return min((row for row in curve if "valid" in row), key=lambda row: row["valid"], default=None)


def worn_out(curve: Iterable[Row], patience: int) -> bool:
    """Whether the last `patience` validations all failed to beat the best one before them.

    >>> worn_out([{"valid": 3.0}, {"valid": 2.0}, {"loss": 1.0}, {"valid": 2.5}], 1)
    True
    """
    losses = [row["valid"] for row in curve if "valid" in row]
    since_best = len(losses) - 1 - losses.index(min(losses)) if losses else 0
    return bool(patience and losses) and since_best >= patience


class _Healing(Loop):
    """A distillation: its teacher, and the best weights so far."""

    config: HealConfig

    def __init__(
        self,
        model: Any,
        teacher: Any,
        blocks: Tensor,
        config: HealConfig,
        accelerator: Accelerator,
        held_out: Tensor | None,
    ) -> None:
        super().__init__(model, blocks, config, accelerator)
        self.teacher = cast_once(teacher, accelerator)
        self.held_out, self.best = held_out, dict[str, Tensor]()
        body = self.shard(backbone(model))
        placed = places(model)
        others = [p for p in self.trained.values() if id(p) not in placed]
        groups: list[dict[str, Any]] = [{"params": others, "lr": config.lr}]
        if placed:
            groups.append({"params": list(placed.values()), "lr": PLACE_RATE * config.lr})
        optimizer, self.schedule = self.optimizer_of(groups)
        self.body, self.optimizer = self.prepare(body, optimizer)
        model.to(accelerator.device)  # the LM head, too

    def begin(self) -> None:
        """Validate at step 0, before anything is trained."""
        if self.held_out is not None:
            self.curve.append(self._validated({"step": 0.0}, self.held_out))

    def finished(self) -> bool:
        """Whether all steps are done, or `patience` validations brought no improvement."""
        return super().finished() or worn_out(self.curve, self.config.patience)

    def advance(self) -> Row:
        """One optimizer step: `accumulate` passes over a batch a process."""
        losses = []
        for part in range(self.config.accumulate):
            with self.accelerator.accumulate(self.body):
                loss = self._loss(self._block(part), self.on_policy(part))
                self.accelerator.backward(loss)
                if self.accelerator.sync_gradients:
                    self.accelerator.clip_grad_norm_(self.trained.values(), self.config.clip)
                self.optimizer.step()
                if self.accelerator.sync_gradients:
                    self.step_rates()
                self.optimizer.zero_grad()
            losses.append(float(loss.detach()))
        self.step += 1
        (mean_loss,) = self.mean(sum(losses) / len(losses))
        row = {"step": float(self.step), "loss": mean_loss}
        due = self.config.validate_every and self.step % self.config.validate_every == 0
        if self.held_out is not None and (due or self.step == self.config.steps):
            row = self._validated(row, self.held_out)
        return row

    def _hidden(self, body: Any, block: Tensor) -> Tensor:
        """Final normed hidden states [B, S, H] of block [B, S]."""
        with self.accelerator.autocast():
            hidden: Tensor = body(input_ids=block, use_cache=False).last_hidden_state
        return hidden

    def writer(self, draw: float) -> Write:
        """A function that continues prompts with the model in training."""
        return rollout_writer(self.model)

    def _loss(self, block: Tensor, on_policy: bool) -> Tensor:
        """Mean divergence from the teacher over the tokens of block [B, S]; with `on_policy` the
        student wrote the block."""
        hidden = self._hidden(self.body, block).flatten(0, 1)
        with torch.no_grad():
            dense = self._hidden(backbone(self.teacher), block).flatten(0, 1)

        def loss_of(part: Tensor, rows: slice) -> Tensor:
            with torch.no_grad():
                target = head(self.teacher, dense[rows])
            logits = head(self.model, part)
            near = self.distance(logits, target, self.config.temperature, on_policy)
            return near * (len(part) / block.numel())

        with self.accelerator.autocast(), heads_in_float32(self.model, self.teacher):
            return in_chunks(hidden, loss_of)

    def _validated(self, row: Row, blocks: Tensor) -> Row:
        """The row with the mean KL on held-out blocks [M, S]; keeps a copy of the best weights."""
        total = 0.0
        with (
            torch.no_grad(),
            self.accelerator.autocast(),
            heads_in_float32(self.model, self.teacher),
        ):
            for part in blocks.to(self.accelerator.device).split(1):
                hidden = self._hidden(self.body, part).flatten(0, 1).split(CHUNK)
                dense = self._hidden(backbone(self.teacher), part).flatten(0, 1).split(CHUNK)
                for near, far in zip(hidden, dense, strict=True):
                    loss = distill_loss(head(self.model, near), head(self.teacher, far))
                    total += float(loss) * len(near) / part.numel()
        row = row | {"valid": total / len(blocks)}
        best = best_row(self.curve)
        if best is None or row["valid"] < best["valid"]:
            self.best = {name: p.detach().clone() for name, p in self.trained.items()}
        return row

    def keep_best(self) -> None:
        """Restore the weights of the best validation."""
        if self.best:
            self.put_back(self.best)

    def state(self) -> dict[str, Any]:
        """The loop's state and the best weights."""
        return super().state() | {"best": whole(self.best)}

    def restore(self, state: dict[str, Any]) -> None:
        """Restore the result of `state`."""
        super().restore(state)
        self.best = state["best"]
