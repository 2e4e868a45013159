"""Training as TensorBoard files: each number that a fine-tune reports is a curve over its steps."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from compose.units import Progress

if TYPE_CHECKING:
    from torch.utils.tensorboard.writer import SummaryWriter

TRAINING = "training"
"""The phase whose numbers are written."""


def written(progress: Progress, folder: Path) -> Progress:
    """`progress`, with the numbers of training also written into `folder` as they come.

    Tags are the names of the numbers: loss, valid, lr, backbone_lr, budget, kept, tokens_per_s and
    what else the curve has. A resumed run hides what a killed one wrote beyond its checkpoint.
    """
    writers: list[SummaryWriter] = []

    def report(done: int, total: int, phase: str, /, *, detail: str = "", **numbers: float) -> None:
        if phase == TRAINING and numbers:
            if not writers:
                writers.append(_writer(folder, done))
            for name, value in numbers.items():
                writers[0].add_scalar(name, value, done)
            if done >= total:
                writers[0].flush()
        progress(done, total, phase, detail=detail, **numbers)

    return report


def _writer(folder: Path, first_step: int) -> SummaryWriter:
    from torch.utils.tensorboard.writer import SummaryWriter

    return SummaryWriter(str(folder), purge_step=first_step, flush_secs=10)
