"""Healing: distil the dense model back into one that pruning has damaged."""

from __future__ import annotations

from pathlib import Path
from typing import Any, ClassVar, Literal

from pydantic import Field

from compose.stages.base import Role, Split, Stage, StageJob

CHECKPOINT_EVERY = 50


class Heal(Stage):
    """Train all weights on the dense model's own predictions."""

    role: ClassVar[Role] = "heal"
    reads_data: ClassVar[tuple[Split, ...]] = ("train",)

    use: Literal["heal"] = "heal"
    """The stage's name."""

    steps: int = Field(default=200, ge=1)
    """Optimizer steps."""

    lr: float = Field(default=1e-4, gt=0)
    """Learning rate at its peak."""

    batch: int = Field(default=1, ge=1)
    """Sequences in one optimizer step."""

    length: int | None = Field(default=None, ge=8)
    """Tokens in one sequence; when left out, `data.train.length`."""

    temperature: float = Field(default=1.0, gt=0)
    """Softens the teacher's and the student's distributions before they are compared."""

    def run(self, job: StageJob) -> dict[str, Any]:
        """Distil all weights on the training text; resumes from its own checkpoint after a kill."""
        import torch
        from transformers import AutoModelForCausalLM, AutoTokenizer

        assert job.train is not None, "heal reads the training split"
        model = AutoModelForCausalLM.from_pretrained(job.source, dtype="float32")
        teacher = AutoModelForCausalLM.from_pretrained(job.dense, dtype="float32").eval()
        tokenizer = AutoTokenizer.from_pretrained(job.source)
        length = self.length or job.train.length
        blocks = job.blocks("train", tokenizer, length, self.steps * self.batch)
        curve = self._distil(job, model, teacher, blocks)
        model.to(getattr(torch, job.dtype)).save_pretrained(job.target)
        return {"training": curve, "train_tokens": self.steps * self.batch * length}

    def _distil(self, job: StageJob, model: Any, teacher: Any, blocks: Any) -> list[dict[str, Any]]:
        """AdamW with a cosine schedule on KL(teacher || model), one row of the curve a step."""
        import torch
        from accelerate import Accelerator
        from torch.nn import functional as F
        from transformers import get_cosine_schedule_with_warmup

        accelerator = Accelerator(cpu=not torch.cuda.is_available())
        optimizer = torch.optim.AdamW(model.parameters(), lr=self.lr, weight_decay=0.0)
        schedule = get_cosine_schedule_with_warmup(optimizer, max(1, self.steps // 20), self.steps)
        model, optimizer, schedule = accelerator.prepare(model.train(), optimizer, schedule)
        teacher = teacher.to(accelerator.device)
        saved = job.work / "healing.pt"
        curve: list[dict[str, Any]] = []
        if saved.exists():
            curve = _restore(saved, model, optimizer, schedule)
        for step in range(len(curve), self.steps):
            rows = torch.arange(step * self.batch, (step + 1) * self.batch) % len(blocks)
            block = blocks[rows].to(accelerator.device)  # [batch, length]
            with torch.no_grad():
                target = F.log_softmax(teacher(block).logits.float() / self.temperature, -1)
            found = F.log_softmax(model(block).logits.float() / self.temperature, -1)
            loss = F.kl_div(found, target, reduction="sum", log_target=True) / block.numel()
            accelerator.backward(loss)
            accelerator.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            schedule.step()
            optimizer.zero_grad()
            curve.append({"step": step + 1, "loss": float(loss.detach())})
            job.progress(step + 1, self.steps, f"KL {curve[-1]['loss']:.3f}")
            if (step + 1) % CHECKPOINT_EVERY == 0:
                _store(saved, model, optimizer, schedule, curve)
        model.eval()
        return curve


def _store(path: Path, model: Any, optimizer: Any, schedule: Any, curve: list[Any]) -> None:
    """Everything the next step depends on; it replaces the last checkpoint when it is whole."""
    import torch

    state = {
        "model": model.state_dict(),
        "optimizer": optimizer.state_dict(),
        "schedule": schedule.state_dict(),
        "curve": curve,
    }
    path.parent.mkdir(parents=True, exist_ok=True)
    torch.save(state, path.with_suffix(".tmp"))
    path.with_suffix(".tmp").replace(path)


def _restore(path: Path, model: Any, optimizer: Any, schedule: Any) -> list[dict[str, Any]]:
    import torch

    state = torch.load(path, weights_only=True)
    model.load_state_dict(state["model"])
    optimizer.load_state_dict(state["optimizer"])
    schedule.load_state_dict(state["schedule"])
    curve: list[dict[str, Any]] = state["curve"]
    return curve
