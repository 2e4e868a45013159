"""Gate fine-tuning: gates, and optionally the backbone, learn under masks as at inference.

The paper trains gates that scale, with cross-entropy and an L2 penalty (arXiv 2510.13876, equation
3). Here the default target is the dense model's distribution: the signal is denser, needs no
labels, and raises draft acceptance. The mask is 0 or 1 as at inference. A straight-through
estimator lets gradients reach the gates. The budget of each step is drawn between 1 and a falling
bound, so the ranking is learned before it is used.
"""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator, DistributedDataParallelKwargs
from accelerate.utils import set_seed
from torch import Tensor, nn

from gateskip.calibration.allocation import global_thresholds, quantiles
from gateskip.calibration.reading import draw_cut, shifts_by_sensitivity
from gateskip.gates.base import Gates
from gateskip.model.compute import branch_costs, saved_by_skipping
from gateskip.model.families import find_branches, head
from gateskip.model.gating import ANCHORS
from gateskip.model.progress import Progress
from gateskip.model.reference import masked_forward
from gateskip.quantization.as_stored import heads_in_float32
from gateskip.training.budget_price import BudgetPrice
from gateskip.training.cast_once import cast_once
from gateskip.training.loop import Loop, adapt, precision, training_device
from gateskip.training.masks import TrainMask, scheduled_budget
from gateskip.training.objectives import (
    SPARSITY,
    distill_loss,
    hidden_loss,
    in_chunks,
    next_token_loss,
)
from gateskip.training.recipe import TrainConfig
from gateskip.training.rollouts import Write, rollout_writer
from gateskip.training.sharding import fsdp_requested

SHIFT_BLOCKS = 8  # of the text, on which branches get their first ranks for reading
WINDOW = 8  # steps whose gate logits set the thresholds: a mix of texts needs more than a few
GAIN = 0.2  # of the feedback on the skipped share: part of the log error that a step corrects
MAX_DRIFT = 1.5  # of that feedback: the log factor's bound


def train_gates(
    model: Any,
    gates: Gates,
    blocks: Tensor,
    config: TrainConfig,
    teacher: Any | None = None,
    work: Path | None = None,
    progress: Progress | None = None,
    validation: Tensor | None = None,
) -> list[dict[str, float]]:
    """Fine-tune in place on blocks [N, S] of token ids; returns the curve, one row a step.

    `teacher` is the dense model whose logits are matched. Without one, the model itself at full
    compute is the teacher, which needs a frozen backbone. With `work`, a killed run resumes from
    its last checkpoint there and ends with the same gates as an unbroken one. `validation` [M, S]
    is scored every `validate_every` steps; those rows of the curve carry `kl@BUDGET` for each of
    `validate_budgets`, and their mean `valid`.

    Raises ValueError for settings that do not go together, and for `reading` with gates that have
    no measured sensitivity.
    """
    if config.on_policy is not None and config.loss == "cross-entropy":
        raise ValueError("on_policy learns from a teacher: it needs loss: distill or both")
    if config.reading and config.on_policy is not None:
        raise ValueError("reading trains on answers of the text: leave on_policy out")
    if config.reading and gates.prompt_sensitivity is None:
        raise ValueError("reading needs gates.prompt_sensitivity: see calibration.reading")
    if teacher is None and config.backbone != "frozen" and config.loss != "cross-entropy":
        raise ValueError("a trained backbone needs the dense model as teacher")
    fsdp_requested()  # before accelerate looks
    accelerator = Accelerator(
        cpu=training_device().type == "cpu",
        mixed_precision=precision(config.precision),
        gradient_accumulation_steps=config.accumulate,
        kwargs_handlers=[DistributedDataParallelKwargs(find_unused_parameters=True)],
    )
    set_seed(config.seed)
    adapted = adapt(model, config)
    session = _Session(model, gates, blocks, config, teacher or model, accelerator, validation)
    curve = session.run(work, progress)
    session.collect()
    if adapted is not None:
        adapted.merge_and_unload()
    model.requires_grad_(True)
    model.eval()
    return curve


class _Session(Loop):
    """A fine-tune of gates: its state, and one step."""

    config: TrainConfig

    def __init__(
        self,
        model: Any,
        gates: Gates,
        blocks: Tensor,
        config: TrainConfig,
        teacher: Any,
        accelerator: Accelerator,
        validation: Tensor | None,
    ) -> None:
        super().__init__(model, blocks, config, accelerator)
        self.validation = validation
        frozen = config.backbone == "frozen"
        self.running = cast_once(model, accelerator) if frozen else model  # in all passes
        self.teacher = self.running if teacher is model else cast_once(teacher, accelerator)
        student = self.shard(_Student(self.running, gates, config), gates.parameters())
        self.backbone = list(self.trained.values())
        groups = [{"params": list(gates.parameters()), "lr": config.lr, "weight_decay": 0.0}]
        if self.backbone:
            groups.append({"params": self.backbone, "lr": config.backbone_lr})
        optimizer, self.schedule = self.optimizer_of(groups)
        self.student, self.optimizer = self.prepare(student, optimizer)
        self.gates = gates
        costs = torch.tensor([c.over(blocks.shape[1]) for c in branch_costs(model)])
        self.costs = (costs / costs.sum()).to(accelerator.device)
        self.prices = self._prices().to(accelerator.device)
        kinds = [branch.kind for branch in find_branches(model)]
        skippable = ("attention", "mlp") if config.branches == "both" else (config.branches,)
        # On the CPU, as the window of logits is where thresholds are read off it
        self.free = torch.tensor([kind in skippable for kind in kinds], device="cpu")  # [branches]
        self.free[0] &= config.kv_rule != "copy"
        self.shifts = self._shifts()  # of gate logits before branches are compared [branches]
        self.window: list[Tensor] = []  # gate logits [branches, tokens] of the last steps
        self.drift = 0.0  # log of the factor by which the skipped share is corrected

    def _prices(self) -> Tensor:
        """Net saving of a skipping token at each branch [branches], a share of all branches."""
        length, costs = self.blocks.shape[1], branch_costs(self.model)
        linear = saved_by_skipping(self.model, self.gates.shortcuts, self.config.kv_rule)
        saved = [
            cost.over(length) - cost.linear + saved_linear
            for cost, saved_linear in zip(costs, linear, strict=True)
        ]
        return torch.tensor(saved) / sum(c.over(length) for c in costs)

    def _shifts(self) -> Tensor:
        """Shifts of gate logits [branches]: by sensitivity with `reading`, else zero."""
        if not self.config.reading:
            return torch.zeros(self.gates.branches, device="cpu")
        some = self.blocks[:SHIFT_BLOCKS]
        return shifts_by_sensitivity(self.model, self.gates, some, self.config.kv_rule).cpu()

    def _cut(self, part: int) -> int | None:
        """Tokens of this step's blocks that form the prompt; None without `reading`."""
        if not self.config.reading:
            return None
        seed = (self.config.seed * 1_000_003 + self.step) * self.config.accumulate + part
        return draw_cut(self.blocks.shape[1], torch.Generator().manual_seed(seed))

    def advance(self) -> dict[str, float]:
        """One optimizer step: `accumulate` passes over a batch a process."""
        config, accelerator = self.config, self.accelerator
        budget = self._budget()
        if not self.window:
            self._rank(self._block(0))
        common = self._thresholds(budget)
        losses, shares, logits = [], [], []
        learned = [p for p in self.gates.parameters() if p.requires_grad]
        price = BudgetPrice(learned, config.accumulate)
        for part in range(config.accumulate):
            with accelerator.accumulate(self.student):
                block, cut = self._block(part), self._cut(part)
                rule = self._mask(self._of_rows(block, common, budget, cut), cut)
                loss = self._loss(block, rule, budget, self.on_policy(part))
                price.add_cost(rule)
                accelerator.backward(loss)
                price.add_loss(rule)
                if accelerator.sync_gradients:
                    self.average(self.gates.parameters())
                    price.apply(accelerator)
                    accelerator.clip_grad_norm_(self.gates.parameters(), config.clip)
                    if self.backbone:
                        accelerator.clip_grad_norm_(self.backbone, config.clip)
                self.optimizer.step()
                if accelerator.sync_gradients:
                    self.step_rates()
                self.optimizer.zero_grad()
            losses.append(float(loss.detach()))
            shares.append(float(rule.share))
            logits.append(torch.stack(rule.logits))
        self._remember(torch.cat(logits, 1))
        self.step += 1
        mean_loss, kept_share = self.mean(sum(losses) / len(losses), sum(shares) / len(shares))
        self._correct(budget, kept_share)
        row = {"step": float(self.step), "loss": mean_loss, "budget": budget, "kept": kept_share}
        due = config.validate_every and self.step % config.validate_every == 0
        if self.validation is not None and (due or self.step == config.steps):
            row |= self._validate(self.validation)
        return row

    def _mask(self, thresholds: Tensor, cut: int | None = None) -> TrainMask:
        config = self.config
        return TrainMask(
            self.costs,
            thresholds,
            config.masks,
            config.mask_temperature,
            self.free.tolist(),
            self.prices,
            cut,
        )

    def _loss(
        self, block: Tensor, rule: TrainMask, budget: float, on_policy: bool = False
    ) -> Tensor:
        """The step's loss on one block [B, S]; with `on_policy` the student wrote the block."""
        config = self.config
        hidden, gates = self.student(block, rule)
        dense = None
        if config.loss != "cross-entropy" or config.hidden_weight:
            with torch.no_grad(), self.accelerator.autocast():
                dense = masked_forward(self.teacher, block)
        answer = slice(rule.cut or 0, None)
        with self.accelerator.autocast():
            dense = None if dense is None else dense[:, answer]
            loss = self._head_loss(hidden[:, answer], dense, block[:, answer], on_policy)
        if config.hidden_weight and dense is not None:
            loss = loss + config.hidden_weight * hidden_loss(hidden[:, answer], dense)
        if config.sparsity != "none":
            pull = SPARSITY[config.sparsity](gates, budget)
            loss = loss + config.sparsity_weight * pull
        return loss

    def _head_loss(
        self, hidden: Tensor, dense: Tensor | None, block: Tensor, on_policy: bool
    ) -> Tensor:
        """Loss of the logits of hidden [B, S, H] against the teacher's logits and the next tokens.

        `dense` [B, S, H] is the teacher's final state, needed to distil; block [B, S]. Text that
        the student wrote has no right next tokens, so only the teacher counts there.
        """
        config, count = self.config, block.numel()
        following = torch.cat((block[:, 1:], torch.full_like(block[:, :1], -100)), 1).flatten()

        def loss_of(part: Tensor, rows: slice) -> Tensor:
            logits = head(self.running, part)
            loss = torch.zeros((), device=part.device)
            if config.loss != "distill" and not on_policy:
                followed = int((following[rows] >= 0).sum())
                share = followed / (count - len(block))
                loss = loss + share * next_token_loss(logits, following[rows])
            if config.loss != "cross-entropy":
                assert dense is not None, "distillation has a teacher"
                with torch.no_grad():
                    target = head(self.teacher, dense.flatten(0, 1)[rows])
                near = self.distance(logits, target, config.loss_temperature, on_policy)
                loss = loss + near * (len(part) / count)
            return loss

        with heads_in_float32(self.running, self.teacher):
            return in_chunks(hidden.flatten(0, 1), loss_of)

    def writer(self, draw: float) -> Write:
        """A function that continues prompts with the gated model, at a budget of the training."""
        budget = self._drawn_budget(draw)
        thresholds = self._thresholds(budget).tolist()
        return rollout_writer(self.model, self.gates, self.config.kv_rule, thresholds)

    def _budget(self) -> float:
        seeded = torch.Generator().manual_seed(self.config.seed * 1_000_003 + self.step)
        return self._drawn_budget(torch.rand((), generator=seeded).item())

    def _drawn_budget(self, draw: float) -> float:
        config = self.config
        return scheduled_budget(config.schedule, config.budget, self.step, config.steps, draw)

    def _thresholds(self, budget: float) -> Tensor:
        """Thresholds [branches] that keep `budget` of the cost over the last steps' tokens."""
        return self._ranked(torch.cat(self.window, 1), budget)

    def _of_rows(
        self, block: Tensor, common: Tensor, budget: float, cut: int | None = None
    ) -> Tensor:
        """Thresholds of a pass over block [B, S]: the `common` ones [branches]; or, with a ranking
        by rows, [branches, B], each row's from the logits of an earlier pass under the common ones.
        """
        if self.config.ranking != "rows":
            return common
        of_rows = self._logits(block, common, cut).view(len(common), len(block), -1)
        return torch.stack([self._ranked(row, budget) for row in of_rows.unbind(1)], 1)

    def _logits(self, block: Tensor, thresholds: Tensor, cut: int | None = None) -> Tensor:
        """Gate logits [branches, tokens] of a pass over block [B, S] without gradients."""
        rule = self._mask(thresholds, cut)
        with torch.no_grad(), self.accelerator.autocast():
            self.student(block, rule)
        return torch.stack(rule.logits)

    def _ranked(self, logits: Tensor, budget: float) -> Tensor:
        """Thresholds [branches] at which tokens of logits [branches, tokens] keep the budget."""
        logits, costs = logits.cpu(), self.costs.cpu()
        budget = 1 - min(1.0, (1 - budget) * math.exp(self.drift))
        if self.config.ranking == "uniform":
            share = 1 - (1 - budget) * float(costs.sum() / costs[self.free].sum())
            thresholds = quantiles(logits, torch.full((len(logits),), share))
        else:
            shifts = self.shifts.unsqueeze(1)
            thresholds = global_thresholds(logits + shifts, budget, costs, self.free) - self.shifts
        return thresholds.to(self.costs.device)

    def _correct(self, budget: float, kept_share: float) -> None:
        """Feedback on the kept share. The window's logits come from other budgets, and gates move,
        so a threshold read off them keeps another share than the budget. The next steps correct the
        error."""
        if budget < 0.97 and kept_share < 1.0:
            self.drift += GAIN * (math.log(1 - budget) - math.log(1 - kept_share))
            self.drift = min(MAX_DRIFT, max(-MAX_DRIFT, self.drift))

    def _remember(self, logits: Tensor) -> None:
        """Keep the gate logits [branches, tokens] of a step, those of all processes."""
        gathered: Tensor = self.accelerator.gather(logits.unsqueeze(0)) if _many(self) else logits
        flat = gathered.transpose(0, 1).flatten(1) if gathered.ndim == 3 else gathered
        self.window = [*self.window[1 - WINDOW :], flat]

    def _rank(self, block: Tensor) -> None:
        """Fill the window by a pass without skipping."""
        self._remember(self._logits(block, torch.full((self.gates.branches,), -torch.inf)))

    def _validate(self, blocks: Tensor) -> dict[str, float]:
        """KL to the teacher on held-out blocks, at each of `validate_budgets`."""
        row = {}
        with torch.no_grad(), self.accelerator.autocast():
            for budget in self.config.validate_budgets:
                common, total, kept_share = self._thresholds(budget), 0.0, 0.0
                cut = blocks.shape[1] // 2 if self.config.reading else None
                for part in blocks.to(self.accelerator.device).split(1):
                    dense = masked_forward(self.teacher, part)[:, cut or 0 :]
                    rule = self._mask(self._of_rows(part, common, budget, cut), cut)
                    rule.form = "hard"
                    hidden = self.student(part, rule)[0][:, cut or 0 :]
                    target = head(self.teacher, dense)
                    total += float(distill_loss(head(self.running, hidden), target))
                    kept_share += float(rule.share)
                row[f"kl@{budget}"] = total / len(blocks)
                row[f"kept@{budget}"] = kept_share / len(blocks)
        distances = [value for name, value in row.items() if name.startswith("kl@")]
        return row | {"valid": sum(distances) / len(distances)}

    def state(self) -> dict[str, Any]:
        """The loop's state, the gates, and all that the next step's thresholds depend on."""
        return super().state() | {
            "window": self.window,
            "drift": self.drift,
            "gates": self.gates.state_dict(),
            "shifts": self.shifts,
        }

    def restore(self, state: dict[str, Any]) -> None:
        """Set all that `state` returned."""
        super().restore(state)
        self.window, self.drift = state["window"], state["drift"]
        self.shifts = state["shifts"]
        self.gates.load_state_dict(state["gates"])


def _many(session: _Session) -> bool:
    return bool(session.accelerator.num_processes > 1)


class _Student(nn.Module):
    """Model and gates as one module, so that one wrapper (DDP, FSDP) holds both."""

    def __init__(self, model: Any, gates: Gates, config: TrainConfig) -> None:
        super().__init__()
        self.model, self.gates, self.config = model, gates, config

    def forward(self, block: Tensor, rule: TrainMask) -> tuple[Tensor, Tensor]:
        """Final hidden states [B, S, H] and gate values of block [B, S]."""
        values: list[Tensor] = []
        watch = values.append if self.config.sparsity != "none" else None
        hidden = masked_forward(
            self.model,
            block,
            self.gates,
            rule,
            self.config.kv_rule,
            watch=watch,
            checkpointing=self.config.checkpointing,
        )
        seen = [value[:, ANCHORS:] for value in values]
        return hidden, torch.stack(seen) if seen else block.new_zeros(1)
