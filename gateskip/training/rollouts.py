"""Rollouts: text that the student writes and its teacher corrects.

A student that only reads other text never sees the consequences of its own mistakes. A teacher's
distribution on the student's text teaches it to continue from there (arXiv 2306.13649). A rollout
is a block of training text whose last tokens the student has written. Blocks are written in groups,
which are shared out over processes; all processes get all blocks.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

import torch
from accelerate import Accelerator
from accelerate.utils import gather_object
from torch import Tensor

from gateskip.decoding.decoder import Decoder, Mode
from gateskip.decoding.sampling import GREEDY, Sampler
from gateskip.gates.base import Gates
from gateskip.model.families import UnsupportedModel
from gateskip.runtime.skipping import SkippingModel

if TYPE_CHECKING:
    from gateskip.training.recipe import LoopConfig, OnPolicy

TOGETHER = 16  # blocks that are written at a time
BUDGET = 0.5  # a label for the thresholds of one group, whatever share they keep

Write = Callable[[list[list[int]], int, Sampler, int], list[list[int]]]
"""(prompts, new tokens, sampler, seed) -> the tokens that follow each prompt."""


class Rollouts:
    """The blocks that the student wrote for one stretch of steps, and the passes that read them."""

    def __init__(
        self, policy: OnPolicy, passes: LoopConfig, blocks: Tensor, accelerator: Accelerator
    ) -> None:
        """Blocks [N, S] of training text.

        Raises ValueError where a block is not longer than the tokens to be written at its end.
        """
        if policy.tokens >= blocks.shape[1]:
            raise ValueError(
                f"on_policy writes {policy.tokens} tokens at the end of blocks of"
                f" {blocks.shape[1]}: no text is left before them"
            )
        self.policy, self.passes, self.accelerator = policy, passes, accelerator
        self.texts = blocks
        self.first = math.ceil(policy.after * passes.steps)
        self.blocks = blocks[:0]

    def due(self, step: int) -> bool:
        """Whether the student writes new text before this step."""
        return step >= self.first and (step - self.first) % self.policy.every == 0

    def reads(self, step: int, part: int) -> bool:
        """Whether a pass of a step reads the student's text; the same in all processes."""
        if step < self.first:
            return False
        number = step * self.passes.accumulate + part
        return self._draw(number, 1) < self.policy.share

    def renew(self, step: int, writer: Callable[[float], Write]) -> None:
        """Let the student write all blocks that are read before it writes again.

        `writer` returns the writing function for a number in [0, 1), drawn for each group.
        """
        world, rank = self.accelerator.num_processes, self.accelerator.process_index
        steps = min(self.policy.every, self.passes.steps - step)
        reads = steps * self.passes.accumulate * self.passes.batch * world * self.policy.share
        count = max(1, math.ceil(reads))
        order = torch.Generator().manual_seed(self.passes.seed * 6_151 + step)
        chosen = torch.randperm(len(self.texts), generator=order)[:count]
        prefixes = self.texts[chosen, : -self.policy.tokens]  # [count, S - tokens]
        written: list[tuple[int, list[list[int]]]] = []  # (group, its blocks)
        for group, prompts in enumerate(prefixes.split(TOGETHER)):
            if group % world == rank:
                write = writer(self._draw(step * 1_000 + group, 2))
                seed = self.passes.seed * 1_000_003 + step * 1_000 + group
                written.append((group, self._write(write, prompts, seed)))
        groups = sorted(gather_object(written)) if world > 1 else written
        self.blocks = torch.tensor([row for _, rows in groups for row in rows])

    def _write(self, write: Write, prompts: Tensor, seed: int) -> list[list[int]]:
        """Blocks of prompts [B, P], each followed by the student's continuation."""
        policy, rows = self.policy, prompts.tolist()
        sampler = Sampler(temperature=policy.temperature) if policy.temperature else GREEDY
        written = write(rows, policy.tokens, sampler, seed)
        return [[*prompt, *answer] for prompt, answer in zip(rows, written, strict=True)]

    def _draw(self, number: int, stream: int) -> float:
        seeded = torch.Generator().manual_seed((self.passes.seed * 4 + stream) * 999_983 + number)
        return torch.rand((), generator=seeded).item()


def rollout_writer(
    model: Any,
    gates: Gates | None = None,
    kv_rule: str = "project",
    thresholds: Sequence[float] | None = None,
) -> Write:
    """A function that continues prompts with a model in training, under thresholds [branches]."""
    grid = {} if thresholds is None else {BUDGET: thresholds}
    decoder = Decoder(runnable(model, gates, kv_rule), None, grid)
    mode: Mode = "plain" if thresholds is None else "skip"

    def write(
        prompts: list[list[int]], new_tokens: int, sampler: Sampler, seed: int
    ) -> list[list[int]]:
        generation = decoder.generate(
            prompts, new_tokens, mode=mode, budget=BUDGET, sampler=sampler, seed=seed
        )
        return generation.tokens

    return write


def runnable(model: Any, gates: Gates | None, kv_rule: str) -> SkippingModel:
    """The model with its current weights, on compiled kernels where they can run it."""
    try:
        return SkippingModel(model, gates, kv_rule, "native")
    except UnsupportedModel:  # another device, or layers that only torch runs
        return SkippingModel(model, gates, kv_rule, "gathered")
