"""What tokens of a prompt may skip: all that no answer needs.

A prompt's token is only read: nothing is predicted from it, and a branch matters there by the keys
and values that later tokens find. How much is measured. Each block of text is cut into a prompt and
an answer, all tokens of the prompt skip one branch, and the KL of that to the full model's
predictions in the answer is the branch's harm. In late layers it falls to nothing, as few layers
are left to read what they change.

Gates rank the tokens within a branch. Between branches the rank is harm for each multiply-add that
skipping saves: logits are shifted so that their mean in a branch is the logarithm of that, and one
threshold for all then keeps a budget. Most branches are then entered by all tokens or by none,
which no gate has to be asked for.
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

SHORTEST, LONGEST = 0.25, 0.875  # of a block: its prompt
SURE = 0.02  # share of tokens that are not worth asking a gate for: whole branches are faster
LEAST = 1e-6  # nats: harm below it is as good as none
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

    By `harm`, the gates know that of their branches; `settings` are those of `calibrate`. A
    prompt's tokens see nothing but other tokens of the prompt, so whole blocks stand for prompts.
    """
    by = {"harm": shifts_by_harm, "depth": shifts_by_depth}[order]
    shifts = by(model, gates, blocks, kv_rule)
    return calibrate_everywhere(
        model, gates, blocks, budgets, kv_rule, gone, shifts=shifts, sure=SURE, **settings
    )


@torch.no_grad()
def answer_harm(
    model: Any,
    gates: Gates,
    blocks: Tensor,
    kv_rule: str = "project",
    seed: int = 0,
    progress: Progress | None = None,
) -> Tensor:
    """KL in nats that each branch's absence from a prompt costs a token of the answer [branches],
    on blocks [N, S] that are cut at random places."""
    generator = torch.Generator().manual_seed(seed)
    total, count = torch.zeros(gates.branches), 0
    for done, block in enumerate(blocks.split(1)):
        cut = drawn_cut(block.shape[1], generator)
        total += _summed_harm(model, gates, block, cut, kv_rule)
        count += block.shape[1] - cut
        if progress is not None:
            progress(done + 1, len(blocks), "measuring what answers need of prompts")
    return total / count


def drawn_cut(length: int, generator: torch.Generator) -> int:
    """Tokens of a block that are only read; the next one predicts the answer's first."""
    least, most = max(ANCHORS + 1, round(SHORTEST * length)), round(LONGEST * length)
    return int(torch.randint(least, max(least, most) + 1, (), generator=generator))


def _summed_harm(model: Any, gates: Gates, block: Tensor, cut: int, kv_rule: str) -> Tensor:
    """Harm [branches], summed over the answer of one block [1, S] after `cut` tokens."""
    branches, outputs = find_branches(model), list[Tensor]()

    def observe(branch: Branch, x: Tensor, output: Tensor) -> None:
        outputs.append(output)

    dense = _log_probs(model, masked_forward(model, block, observe=observe), cut)
    arriving = [embed(model, block.to(dense.device))]  # the residual stream before each branch
    for output in outputs:
        arriving.append(arriving[-1] + output)
    below = 2 if kv_rule == "copy" else 0  # whose keys and values a skipping token shows
    harm = []
    for skipped in branches:

        def rule(branch: Branch, z: Tensor, skipped: Branch = skipped) -> Tensor:
            mask = torch.ones_like(z)
            if branch.index == skipped.index:
                mask[:, ANCHORS:cut] = 0
            return mask

        first = max(0, skipped.index // 2 * 2 - below)
        start = (first, arriving[first])
        hidden = masked_forward(model, block, gates, rule, kv_rule, start=start)
        own = _log_probs(model, hidden, cut)
        harm.append(F.kl_div(own, dense, log_target=True, reduction="sum").cpu())
    return torch.stack(harm)


def _log_probs(model: Any, hidden: Tensor, cut: int) -> Tensor:
    """What final states [1, S, H] predict after `cut` tokens [S - cut, V]."""
    return F.log_softmax(head(model, hidden[0, cut:]).float(), dim=-1)


def shifts_by_harm(model: Any, gates: Gates, blocks: Tensor, kv_rule: str) -> Tensor:
    """What is added to each branch's logits, so that all are in one unit [branches]: nats of the
    answer for each multiply-add, on blocks [N, S]. The harm is that of the gates."""
    assert gates.harm is not None, "measured before"
    saved = saved_by_skipping(model, gates.shortcuts, kv_rule)
    each = torch.tensor(saved, dtype=torch.float32).clamp_min(1.0)
    means = mean_logits(model, gates, blocks, kv_rule)
    return gates.harm.clamp_min(LEAST).log().to(means) - each.log().to(means) - means


def shifts_by_depth(model: Any, gates: Gates, blocks: Tensor, kv_rule: str) -> Tensor:
    """What is added to each branch's logits, so that tokens skip the last branches whole before any
    token skips an earlier one [branches]; gates decide in the one between."""
    means = mean_logits(model, gates, blocks, kv_rule)
    return -APART * torch.arange(gates.branches).to(means) - means
