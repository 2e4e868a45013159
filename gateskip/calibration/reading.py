"""Skipping in prompts: their tokens skip the branches to which answers are least sensitive.

The model predicts nothing from a prompt's tokens except the last one. So there a branch matters
only through the keys and values that later tokens read. `prompt_sensitivity` measures this effect:
each block of text is cut into a prompt and an answer, all tokens of the prompt skip one branch, and
the KL of the answer's predictions from the full model's is the branch's sensitivity. It falls
towards 0 in late layers, because few layers after them read the change.

Gates rank the tokens within a branch. Branches are ranked by sensitivity for each multiply-add that
skipping saves: logits are shifted so that their mean in a branch is the logarithm of that, and one
threshold for all then keeps a budget. All tokens or none then enter most branches, and no gate has
to be evaluated there.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from gateskip.calibration.budgets import CalibratedBudgets
from gateskip.calibration.settings import PromptOrder
from gateskip.calibration.thresholds import calibrate_everywhere, mean_logits
from gateskip.gates.base import Gates
from gateskip.model.compute import saved_by_skipping
from gateskip.model.families import Branch, embed, find_branches, head
from gateskip.model.gating import ANCHORS
from gateskip.model.progress import Progress
from gateskip.model.reference import masked_forward
from gateskip.quantization.as_stored import heads_in_float32

SHORTEST, LONGEST = 0.25, 0.875  # of a block: its prompt
SURE = 0.02  # share of tokens for which no gate is evaluated: whole branches are faster
AT_ONCE = 8  # branches whose skips are measured in one batch; layers have two
MIN_SENSITIVITY = 1e-6  # nats: smaller ones count as this
APART = 100.0  # between the mean logits of two branches, more than tokens of one branch differ


def calibrate_prompts(
    model: Any,
    gates: Gates,
    blocks: Tensor,
    budgets: Sequence[float],
    kv_rule: str = "project",
    gone: frozenset[int] = frozenset(),
    order: PromptOrder = "harm",
    **settings: Any,
) -> CalibratedBudgets:
    """Thresholds for tokens of prompts, for every budget, on blocks [N, S].

    Order `harm` uses the gates' `prompt_sensitivity`, which must have been measured. `settings` are
    those of `calibrate`. A prompt's tokens see only other tokens of the prompt, so whole blocks can
    serve as prompts.
    """
    by = {"harm": shifts_by_sensitivity, "depth": shifts_by_depth}[order]
    shifts = by(model, gates, blocks, kv_rule)
    return calibrate_everywhere(
        model, gates, blocks, budgets, kv_rule, gone, shifts=shifts, sure=SURE, **settings
    )


@torch.no_grad()
def prompt_sensitivity(
    model: Any,
    gates: Gates,
    blocks: Tensor,
    kv_rule: str = "project",
    seed: int = 0,
    progress: Progress | None = None,
) -> Tensor:
    """The KL in nats, for each token of the answer, that skipping a branch in the whole prompt
    causes [branches]; on blocks [N, S] that are cut at random places.

    Products are in float32: their rounding in bfloat16 alone causes 1e-4 to 3e-4 nats, more than
    skipping the last branches does.
    """
    generator = torch.Generator().manual_seed(seed)
    total, count = torch.zeros(gates.branches), 0
    with heads_in_float32(model):
        for done, block in enumerate(blocks.split(1)):
            cut = draw_cut(block.shape[1], generator)
            total += _summed_kl(model, gates, block, cut, kv_rule)
            count += block.shape[1] - cut
            if progress is not None:
                progress(done + 1, len(blocks), "measuring prompt sensitivity")
    return total / count


def draw_cut(length: int, generator: torch.Generator) -> int:
    """The number of tokens of a block that form its prompt."""
    low, high = max(ANCHORS + 1, round(SHORTEST * length)), round(LONGEST * length)
    return int(torch.randint(low, max(low, high) + 1, (), generator=generator))


def _summed_kl(model: Any, gates: Gates, block: Tensor, cut: int, kv_rule: str) -> Tensor:
    """KL [branches] of skipping each branch, summed over a block's answer: [1, S] from `cut` on."""
    branches, outputs = find_branches(model), list[Tensor]()

    def observe(branch: Branch, x: Tensor, output: Tensor) -> None:
        outputs.append(output)

    dense = _log_probs(model, masked_forward(model, block, observe=observe)[0], cut)
    arriving = [embed(model, block.to(dense.device))]  # the residual stream before each branch
    for output in outputs:
        arriving.append(arriving[-1] + output)
    below = 2 if kv_rule == "copy" else 0  # whose keys and values a skipping token shows
    divergences = []
    for first in range(0, len(branches), AT_ONCE):
        rows = len(branches[first : first + AT_ONCE])  # each skips another branch

        def rule(branch: Branch, z: Tensor, first: int = first) -> Tensor:
            mask = torch.ones_like(z)
            if 0 <= branch.index - first < len(mask):
                mask[branch.index - first, ANCHORS:cut] = 0
            return mask

        begin = max(0, first - below)
        start = (begin, arriving[begin].expand(rows, -1, -1))
        hidden = masked_forward(model, block.expand(rows, -1), gates, rule, kv_rule, start=start)
        for states in hidden:
            log_probs = _log_probs(model, states, cut)
            kl = F.kl_div(log_probs, dense, log_target=True, reduction="sum")
            divergences.append(kl.cpu())
    return torch.stack(divergences)


def _log_probs(model: Any, states: Tensor, cut: int) -> Tensor:
    """Log probabilities [S - cut, V] at final states [S, H] after `cut` tokens."""
    return F.log_softmax(head(model, states[cut:]).float(), dim=-1)


def shifts_by_sensitivity(model: Any, gates: Gates, blocks: Tensor, kv_rule: str) -> Tensor:
    """Shifts of each branch's logits [branches] that bring all to one unit, nats of the answer for
    each saved multiply-add. Means of logits are taken on blocks [N, S]."""
    assert gates.prompt_sensitivity is not None, "measured before"
    saved = saved_by_skipping(model, gates.shortcuts, kv_rule)
    costs = torch.tensor(saved, dtype=torch.float32).clamp_min(1.0)
    means = mean_logits(model, gates, blocks, kv_rule)
    sensitivity = gates.prompt_sensitivity.clamp_min(MIN_SENSITIVITY)
    return sensitivity.log().to(means) - costs.log().to(means) - means


def shifts_by_depth(model: Any, gates: Gates, blocks: Tensor, kv_rule: str) -> Tensor:
    """Shifts of each branch's logits [branches] with which tokens skip the last branches completely
    before any token skips an earlier one. Gates decide only in the branch where the budget ends."""
    means = mean_logits(model, gates, blocks, kv_rule)
    return -APART * torch.arange(gates.branches).to(means) - means
