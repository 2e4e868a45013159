"""What fine-tunes minimize, and its gradients, held to what autograd makes of the formula."""

from __future__ import annotations

import pytest
import torch
from torch.nn import functional as F

from gateskip.gates.kinds import make_gates
from gateskip.gates.shortcuts import Shortcuts
from gateskip.training import objectives
from gateskip.training.objectives import distill_loss

H = 16


@pytest.mark.parametrize("temperature", [1.0, 2.0])
@pytest.mark.parametrize("kind", [torch.float32, torch.bfloat16])
def test_divergence_and_its_slope(temperature: float, kind: torch.dtype) -> None:
    torch.manual_seed(0)
    teacher = torch.randn(2, objectives.SLICE + 3, 50, dtype=kind)
    student = torch.randn_like(teacher).requires_grad_()
    found = distill_loss(student, teacher, temperature)
    (gradient,) = torch.autograd.grad(3 * found, student)
    log_q = F.log_softmax(student.float() / temperature, -1)
    log_p = F.log_softmax(teacher.float() / temperature, -1)
    wanted = (log_p.exp() * (log_p - log_q)).sum(-1).mean() * temperature**2
    torch.testing.assert_close(found, wanted)
    torch.testing.assert_close(gradient, torch.autograd.grad(3 * wanted, student)[0])
    assert float(distill_loss(teacher, teacher)) == pytest.approx(0, abs=1e-6)


@pytest.mark.parametrize("kind", ["scalar", "vector", "low-rank", "shared", "mlp"])
def test_parts_from_one_cut_have_the_same_slopes(kind: str) -> None:
    torch.manual_seed(0)
    gates, x = make_gates(kind, 6, H), torch.randn(5, H)
    gates.shortcuts = Shortcuts(6, H, 4)
    torch.nn.init.normal_(gates.shortcuts.down)

    def gradients() -> list[torch.Tensor]:
        total = torch.zeros(())
        for branch in (0, 3, 5):
            total = total + gates.logit(branch, x).sum() * (branch + 1)
            total = total + gates.shortcuts(branch, x).square().sum()
        return list(torch.autograd.grad(total, list(gates.parameters())))

    apart = gradients()
    with gates.opened():
        together = gradients()
    for one, other in zip(apart, together, strict=True):
        torch.testing.assert_close(one, other)
