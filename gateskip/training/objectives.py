"""Losses of the fine-tunes: distillation, cross-entropy, hidden states, and penalties on the gates.

All are plain functions of tensors. Logits are computed a few rows at a time.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from gateskip.training.recipe import Divergence

ChunkLoss = Callable[[Tensor, slice], Tensor]
CHUNK = 128  # tokens whose logits exist at once
SLICE = 8  # tokens whose distributions exist at once
MIN_REST = 1e-6  # probability of all tokens outside the top k together

# -- losses -----------------------------------------------------------------------------------


class _InChunks(torch.autograd.Function):
    """Sum of a loss over chunks of rows; the forward pass computes each chunk's gradient, too."""

    @staticmethod
    def forward(ctx: Any, hidden: Tensor, loss_of: ChunkLoss) -> Tensor:
        total = hidden.new_zeros((), dtype=torch.float32)
        gradients = []
        for start in range(0, len(hidden), CHUNK):
            rows = slice(start, min(start + CHUNK, len(hidden)))
            part = hidden[rows].detach().requires_grad_()
            with torch.enable_grad():
                loss = loss_of(part, rows)
            gradients.append(torch.autograd.grad(loss, part)[0])
            total += loss.detach().float()
        ctx.save_for_backward(torch.cat(gradients))
        return total

    @staticmethod
    def backward(ctx: Any, *upstream: Tensor) -> tuple[Tensor, None]:
        (gradient,) = upstream
        return ctx.saved_tensors[0] * gradient, None


def in_chunks(hidden: Tensor, loss_of: ChunkLoss) -> Tensor:
    """`loss_of` summed over hidden states [N, H], in chunks of rows -> scalar.

    `loss_of(part [C, H], rows)` gives the loss of those rows. A vocabulary's logits are by far the
    largest tensor of a small model's training step; a chunk of them stays in the processor's cache.
    Gradients reach `hidden` only: the LM head gets none.
    """
    loss: Tensor = _InChunks.apply(hidden, loss_of)  # type: ignore[no-untyped-call]
    return loss


class _Divergence(torch.autograd.Function):
    """Sum of KL(teacher || student) over rows. Its gradient in the student's logits is q - p. Rows
    are taken a few at a time, so that intermediate tensors stay in the processor's cache."""

    @staticmethod
    def forward(ctx: Any, student: Tensor, teacher: Tensor, temperature: float) -> Tensor:
        total = torch.zeros((), device=student.device)
        gradient = torch.empty_like(student) if ctx.needs_input_grad[0] else None
        for start in range(0, len(student), SLICE):
            rows = slice(start, start + SLICE)
            log_q, log_p = (
                F.log_softmax(_softened(part[rows], temperature), dim=-1)
                for part in (student, teacher)
            )
            p = log_p.exp()
            total += log_p.sub_(log_q).mul_(p).sum()
            if gradient is not None:
                gradient[rows] = log_q.exp_().sub_(p)
        if gradient is not None:
            ctx.save_for_backward(gradient)
        ctx.temperature = temperature
        return total

    @staticmethod
    def backward(ctx: Any, *upstream: Tensor) -> tuple[Tensor, None, None]:
        return ctx.saved_tensors[0] * (upstream[0] / ctx.temperature), None, None


def _softened(logits: Tensor, temperature: float) -> Tensor:
    return logits.float() if temperature == 1 else logits.float() / temperature


def distill_loss(student: Tensor, teacher: Tensor, temperature: float = 1.0) -> Tensor:
    """Mean KL(teacher || student) over tokens. Logits [..., V] -> scalar, in nats.

    Both are softened by `temperature`, whose square keeps the gradient's size (arXiv 1503.02531).
    The teacher gets no gradient.
    """
    student, teacher = student.flatten(0, -2), teacher.flatten(0, -2)  # [N, V]
    total: Tensor = _Divergence.apply(student, teacher, temperature)  # type: ignore[no-untyped-call]
    return total * (temperature**2 / len(student))


def divergence(student: Tensor, teacher: Tensor, kind: Divergence, top_k: int = 0) -> Tensor:
    """Mean divergence over tokens, in nats. Logits [N, V] of both -> scalar.

    With `top_k`, distributions are over the teacher's `top_k` most likely tokens and one entry for
    all others. The teacher gets no gradient.
    """
    if kind == "forward" and not top_k:
        return distill_loss(student, teacher)
    log_q, log_p = (F.log_softmax(logits.float(), dim=-1) for logits in (student, teacher))
    if top_k:
        top = log_p.topk(min(top_k, log_p.shape[-1] - 1), dim=-1).indices
        log_q, log_p = _with_rest(log_q, top), _with_rest(log_p, top)
    loss = torch.zeros((), device=student.device)
    if kind != "reverse":
        loss = loss + F.kl_div(log_q, log_p, log_target=True, reduction="batchmean")
    if kind != "forward":
        loss = loss + F.kl_div(log_p, log_q, log_target=True, reduction="batchmean")
    return loss / 2 if kind == "mixed" else loss


def _with_rest(log_probs: Tensor, top: Tensor) -> Tensor:
    """Log probabilities [N, V] at tokens `top` [N, K], and that of all others -> [N, K + 1]."""
    selected = log_probs.gather(-1, top)
    rest = torch.log1p(-selected.exp().sum(-1, keepdim=True).clamp(max=1 - MIN_REST))
    return torch.cat((selected, rest), -1)


def next_token_loss(logits: Tensor, following: Tensor) -> Tensor:
    """Mean cross-entropy of logits [N, V] at the next tokens [N], in nats a token.

    A next token of -100 does not count.
    """
    return F.cross_entropy(logits.float(), following)


def hidden_loss(student: Tensor, teacher: Tensor) -> Tensor:
    """Mean squared distance of final hidden states [B, S, H], relative to the teacher's size."""
    distance = (student.float() - teacher.float()).square().mean()
    return distance / teacher.float().square().mean()


# -- sparsity ---------------------------------------------------------------------------------


def l1(gates: Tensor, budget: float) -> Tensor:
    """Mean gate [...] -> scalar; the budget has no effect."""
    return gates.mean()


def l2(gates: Tensor, budget: float) -> Tensor:
    """Mean squared gate: the published term (arXiv 2510.13876, equation 3)."""
    return gates.square().mean()


def bernoulli_kl(gates: Tensor, budget: float) -> Tensor:
    """KL between two Bernoulli distributions, one with the budget as mean, the other with the mean
    gate."""
    share = torch.tensor(budget, device=gates.device).clamp(1e-4, 1 - 1e-4)
    mean = gates.mean().clamp(1e-6, 1 - 1e-6)
    return share * (share / mean).log() + (1 - share) * ((1 - share) / (1 - mean)).log()


SPARSITY: dict[str, Callable[[Tensor, float], Tensor]] = {"l1": l1, "l2": l2, "kl": bernoulli_kl}
"""(gates of all branches and tokens [...], this step's budget) -> scalar."""
