"""Gate fine-tuning by distillation from the dense model, with masks that are hard in both passes.

The paper trains with cross-entropy and an L2 pull on the gates (arXiv 2510.13876, equation 3).
Here the dense model's own distribution is the target: a denser signal, it needs no labels, and it
is what raises draft acceptance. The mask is 0 or 1 as at inference, and a straight-through
estimator lets gradients reach the gates. The budget of each step is drawn between 1 and a bound
that falls linearly from 1 to `budget`, so the ranking is learned before it is used.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import set_seed
from torch import Tensor, nn
from torch.nn import functional as F

from gateskip.branches import Branch, head
from gateskip.compute import branch_costs
from gateskip.gates import ANCHORS, ScalarGates
from gateskip.masked import masked_forward

Progress = Callable[[int, int, str], None]


@dataclass(frozen=True, kw_only=True)
class TrainConfig:
    """How gates (and, if asked, the backbone) are fine-tuned."""

    steps: int = 300
    """Optimizer steps."""
    batch: int = 1
    """Blocks in one step, a process."""
    budget: float = 0.7
    """Lowest share of multiply-adds that training visits."""
    lr: float = 3e-3
    """Learning rate of the gates."""
    backbone_lr: float = 3e-5
    """Learning rate of the backbone, when it trains."""
    train_backbone: bool = True
    """Whether the backbone's weights train along."""
    kv_rule: str = "project"
    """Whose keys and values a skipped token shows; the same as at inference."""
    temperature: float = 1.0
    """Temperature of the softened mask's slope."""
    warmup: float = 0.1
    """Share of the steps over which the learning rates rise."""
    clip: float = 1.0
    """Gradient norm bound."""
    seed: int = 0
    """Order of the blocks and the drawn budgets."""
    checkpoint_every: int = 50
    """Steps between resumable checkpoints, when a folder for them is given."""


class StraightThrough:
    """Mask rule of one training step: enter where the gate logit reaches one common threshold."""

    def __init__(self, costs: Tensor, threshold: float, temperature: float, first_free: int):
        self.costs = costs
        self.threshold = threshold
        self.temperature = temperature
        self.first_free = first_free
        self.logits: list[Tensor] = []
        self.share = torch.zeros(())

    def __call__(self, branch: Branch, z: Tensor) -> Tensor:
        """Gate logits [B, S] -> mask [B, S] of 0 and 1, differentiable through its sigmoid."""
        self.logits.append(z.detach()[:, ANCHORS:].flatten())
        if branch.index < self.first_free:
            return torch.ones_like(z)
        soft = torch.sigmoid((z - self.threshold) / self.temperature)
        hard = (z >= self.threshold).to(z.dtype)
        mask = hard + soft - soft.detach()
        self.share = self.share + self.costs[branch.index] * mask.mean()
        return mask


def distill_loss(student: Tensor, teacher: Tensor) -> Tensor:
    """Mean KL(teacher || student) over tokens. Logits [B, S, V] -> scalar."""
    log_p = F.log_softmax(student.float(), dim=-1)
    target = F.log_softmax(teacher.float(), dim=-1)
    return F.kl_div(log_p, target, reduction="sum", log_target=True) / log_p[..., 0].numel()


def train_gates(
    model: Any,
    gates: ScalarGates,
    blocks: Tensor,
    config: TrainConfig,
    teacher: Any | None = None,
    work: Path | None = None,
    progress: Progress | None = None,
) -> list[dict[str, float]]:
    """Fine-tune in place on blocks [N, S] of token ids; returns the curve, one row a step.

    `teacher` is the dense model whose logits are matched; without one the model itself at full
    compute is the teacher, which asks for a frozen backbone. With `work`, a killed run goes on from
    its last checkpoint there and ends with the same gates as an unbroken one.
    """
    if teacher is None and config.train_backbone:
        raise ValueError("a trained backbone needs the dense model as a teacher of its own")
    accelerator = Accelerator(cpu=not torch.cuda.is_available())
    set_seed(config.seed)
    session = _Session(model, gates, blocks, config, teacher or model, accelerator)
    session.resume(work)
    while session.step < config.steps:
        row = session.advance()
        if progress is not None:
            progress(session.step, config.steps, f"KL {row['loss']:.3f} at {row['kept']:.2f}")
        if work is not None and session.step % config.checkpoint_every == 0:
            session.save(work)
    model.requires_grad_(True)
    model.eval()
    return session.curve


class _Session:
    """The state of one fine-tune: what a checkpoint holds, and what one step does."""

    def __init__(
        self,
        model: Any,
        gates: ScalarGates,
        blocks: Tensor,
        config: TrainConfig,
        teacher: Any,
        accelerator: Accelerator,
    ) -> None:
        self.config, self.accelerator, self.blocks = config, accelerator, blocks
        self.step, self.curve = 0, list[dict[str, float]]()
        model.requires_grad_(config.train_backbone)
        teacher.requires_grad_(config.train_backbone and teacher is model)
        self.backbone = [p for p in model.parameters() if p.requires_grad]
        groups = [{"params": list(gates.parameters()), "lr": config.lr}]
        if self.backbone:
            groups.append({"params": self.backbone, "lr": config.backbone_lr})
        optimizer = torch.optim.AdamW(groups, betas=(0.9, 0.95), weight_decay=0.0)
        schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, self._rate)
        self.student = _Student(model, gates)
        self.student, self.optimizer, self.schedule = accelerator.prepare(
            self.student, optimizer, schedule
        )
        self.gates, self.model, self.teacher = gates, model, teacher
        costs = torch.tensor([c.at(blocks.shape[1] / 2) for c in branch_costs(model)])
        self.costs = costs / costs.sum()
        self.window: list[Tensor] = []  # gate logits [branches, tokens] of the last steps

    def _rate(self, step: int) -> float:
        rise = max(1, round(self.config.warmup * self.config.steps))
        left = max(0.0, (self.config.steps - step) / max(1, self.config.steps - rise))
        return min(1.0, (step + 1) / rise) * min(1.0, left * 0.9 + 0.1)

    def advance(self) -> dict[str, float]:
        """One optimizer step on one block a process."""
        config, accelerator = self.config, self.accelerator
        draw = torch.Generator().manual_seed(config.seed * 1_000_003 + self.step)
        block = self._block(accelerator.process_index, accelerator.num_processes)
        budget = self._budget(draw)
        with torch.no_grad():
            target = head(self.teacher, masked_forward(self.teacher, block))
        if not self.window:
            self._rank(block)
        rule = StraightThrough(
            self.costs, self._threshold(budget), config.temperature, int(config.kv_rule == "copy")
        )
        logits = self.student(block, rule, config.kv_rule)
        loss = distill_loss(logits, target)
        accelerator.backward(loss)
        if accelerator.sync_gradients:
            accelerator.clip_grad_norm_(self.gates.parameters(), config.clip)
            if self.backbone:
                accelerator.clip_grad_norm_(self.backbone, config.clip)
        self.optimizer.step()
        self.schedule.step()
        self.optimizer.zero_grad()
        self.window = [*self.window[-3:], torch.stack(rule.logits)]
        self.step += 1
        row = {
            "step": float(self.step),
            "loss": float(loss.detach()),
            "budget": budget,
            "kept": float(rule.share.detach()),
        }
        self.curve.append(row)
        return row

    def _block(self, rank: int, world: int) -> Tensor:
        """This step's blocks [batch, S] of this process; each pass over the text is reordered."""
        size, count = self.config.batch * world, len(self.blocks)
        first = self.step * size + rank * self.config.batch
        rows = []
        for number in range(first, first + self.config.batch):
            order = torch.Generator().manual_seed(self.config.seed * 7_919 + number // count)
            rows.append(torch.randperm(count, generator=order)[number % count])
        return self.blocks[torch.stack(rows)].to(self.accelerator.device)

    def _budget(self, draw: torch.Generator) -> float:
        fallen = min(1.0, 0.3 + 1.4 * self.step / self.config.steps)
        lowest = 1.0 - (1.0 - self.config.budget) * fallen
        drawn = torch.rand((), generator=draw).item()
        return float(lowest + (1.0 - lowest) * drawn**1.5)

    def _threshold(self, budget: float) -> float:
        """The logit that keeps `budget` of the cost over the last steps' tokens."""
        logits = torch.cat(self.window, 1)
        order = torch.argsort(logits.flatten())
        spent = torch.cumsum(self.costs.unsqueeze(1).expand_as(logits).flatten()[order], 0)
        cut = int(torch.searchsorted(spent, (1 - budget) * float(spent[-1])))
        found: float = logits.flatten()[order[min(cut, len(order) - 1)]].item()
        return found

    def _rank(self, block: Tensor) -> None:
        logits: list[Tensor] = []

        def rule(branch: Branch, z: Tensor) -> Tensor:
            logits.append(z[:, ANCHORS:].flatten())
            return torch.ones_like(z)

        with torch.no_grad():
            masked_forward(self.model, block, self.gates, rule, self.config.kv_rule)
        self.window = [torch.stack(logits)]

    def save(self, work: Path) -> None:
        """Write all that the next step depends on; the old checkpoint stays until it is whole."""
        if not self.accelerator.is_main_process:
            return
        state = {
            "step": self.step,
            "curve": self.curve,
            "window": self.window,
            "gates": self.gates.state_dict(),
            "model": self.model.state_dict() if self.backbone else None,
            "optimizer": self.optimizer.state_dict(),
            "schedule": self.schedule.state_dict(),
        }
        work.mkdir(parents=True, exist_ok=True)
        torch.save(state, work / "training.tmp")
        (work / "training.tmp").replace(work / "training.pt")

    def resume(self, work: Path | None) -> None:
        """Go on from a checkpoint in `work`, if there is one."""
        if work is None or not (work / "training.pt").exists():
            return
        state = torch.load(work / "training.pt", weights_only=True)
        self.step, self.curve, self.window = state["step"], state["curve"], state["window"]
        self.gates.load_state_dict(state["gates"])
        if state["model"] is not None:
            self.model.load_state_dict(state["model"])
        self.optimizer.load_state_dict(state["optimizer"])
        self.schedule.load_state_dict(state["schedule"])


class _Student(nn.Module):
    """Model and gates as one module, so that one wrapper (DDP, FSDP) holds both."""

    def __init__(self, model: Any, gates: ScalarGates) -> None:
        super().__init__()
        self.model = model
        self.gates = gates

    def forward(self, block: Tensor, rule: StraightThrough, kv_rule: str) -> Tensor:
        """Logits [B, S, V] of block [B, S] under the masks of `rule`."""
        return head(self.model, masked_forward(self.model, block, self.gates, rule, kv_rule))
