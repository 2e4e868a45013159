"""Gates without training: a linear read-out of each branch's measured effect.

Two measurements make a gate. Within a branch, tokens are ranked by the size of the branch's output,
predicted from its input: the ridge regression of log ||o|| on x. Between branches, the offset is
the cost of dropping one: with a mask m on the branch, moving m from 1 to 0 changes the model's
predictions by KL = E[(d log p(y) / dm)^2] / 2 to second order, y drawn from the model (the Fisher
information of the mask). One backward pass gives that for every branch at once, including effects
on later tokens through keys and values. All branches then have the same unit, loss per
multiply-add, and one threshold can serve them all.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from gateskip.calibration.fit_shortcuts import ridge_solution
from gateskip.gates.base import Gates
from gateskip.gates.learned import ScalarGates
from gateskip.gates.shortcuts import Shortcuts
from gateskip.kernels.autotune import fast_products
from gateskip.model.compute import branch_costs
from gateskip.model.families import Branch, device_of, find_branches, head
from gateskip.model.progress import Progress
from gateskip.model.reference import masked_forward


def warm_start(
    model: Any,
    blocks: Tensor,
    ridge: float = 0.03,
    seed: int = 0,
    kv_rule: str = "project",
    progress: Progress | None = None,
    gates: Gates | None = None,
    checkpointing: bool = False,
) -> tuple[Gates, list[float]]:
    """Gates, and each branch's sensitivity, from blocks [N, S] of token ids.

    `gates` of any kind are set in place; without them new scalar gates are made. `checkpointing`
    runs branches again for gradients instead of keeping their activations.

    The sensitivity is the KL that dropping the whole branch would cause, to second order. `ridge`
    is relative to the mean variance of the gate's input. Where the gates have shortcuts, a branch's
    output counts without its shortcut's.
    """
    branches = find_branches(model)
    width = model.config.hidden_size
    device = device_of(model)
    solver = _Ridge(len(branches), width, device)
    fisher, square = (torch.zeros(len(branches), device=device) for _ in range(2))
    generator = torch.Generator().manual_seed(seed)
    shortcuts = None if gates is None else gates.shortcuts
    for done, block in enumerate(blocks.split(1)):
        measured = measure(model, block, generator, kv_rule, shortcuts, checkpointing)
        fisher += measured.scores.mean(1)
        square += measured.norms.square().mean(1)
        solver.add(measured.inputs, measured.norms.clamp_min(1e-12).log())
        if progress is not None:
            progress(done + 1, len(blocks), "warm start")
    weight, bias, mean = solver.solve(ridge)
    fisher, square = fisher / len(blocks), square / len(blocks)
    costs = torch.tensor([float(c.saved(kv_rule)) for c in branch_costs(model)], device=device)
    gates = ScalarGates(len(branches), width) if gates is None else gates
    offset = (fisher / costs * costs.mean()).log() - square.sqrt().log()
    gates.start(weight, bias + offset, mean)
    return gates, fisher.tolist()


def sensitivities(
    model: Any, blocks: Tensor, seed: int = 0, checkpointing: bool = False
) -> list[float]:
    """Each branch's mean score on blocks [N, S]: the KL of dropping it whole, to second order."""
    generator = torch.Generator().manual_seed(seed)
    scores = [
        measure(model, block, generator, checkpointing=checkpointing).scores.mean(1)
        for block in blocks.split(1)
    ]
    means: list[float] = torch.stack(scores).mean(0).tolist()
    return means


@dataclass(frozen=True)
class Measured:
    """Every branch's inputs and effects on the tokens of one block."""

    inputs: list[Tensor]  # [S, H] per branch: the inputs of its gate
    norms: Tensor  # [branches, S]: ||o|| of its output o, less the shortcut's where there is one
    scores: Tensor  # [branches, S]: half the squared gradient of log p(y) in the branch's mask


def measure(
    model: Any,
    block: Tensor,
    generator: torch.Generator,
    kv_rule: str = "project",
    shortcuts: Shortcuts | None = None,
    checkpointing: bool = False,
) -> Measured:
    """Run one block [1, S] forward and backward. `generator` is a CPU generator, for any device."""
    masks: list[Tensor] = []
    inputs: list[Tensor] = []
    norms: list[Tensor] = []
    every = ScalarGates(len(find_branches(model)), model.config.hidden_size).to(device_of(model))
    every.shortcuts = shortcuts

    def rule(branch: Branch, z: Tensor) -> Tensor:
        masks.append(torch.ones_like(z, requires_grad=True))
        return masks[-1]

    def observe(branch: Branch, x: Tensor, output: Tensor) -> None:
        x, output = x.detach(), output.detach()
        with torch.no_grad():  # shortcuts learn later: a graph would keep all text alive
            instead = 0 if shortcuts is None else shortcuts(branch.index, x)
        inputs.append(x[0].float())
        norms.append((output - instead)[0].float().norm(dim=-1))

    with torch.enable_grad(), frozen(model), fast_products(device_of(model).type):
        hidden = masked_forward(
            model, block, every, rule, kv_rule, observe, checkpointing=checkpointing
        )
        log_p = F.log_softmax(head(model, hidden)[0].float(), dim=-1)  # [S, V]
        probs = log_p.detach().exp().cpu()  # a seed draws the same tokens on every device
        drawn = torch.multinomial(probs, 1, generator=generator).to(log_p.device)
        likelihood = log_p.gather(1, drawn).sum()
        gradients = torch.autograd.grad(likelihood, masks)
    scores = torch.cat(gradients).detach().float().square() / 2
    return Measured(inputs, torch.stack(norms), scores)


class frozen:
    """Within this context no parameter of the model requires a gradient."""

    def __init__(self, model: Any) -> None:
        self.trained = [p for p in model.parameters() if p.requires_grad]

    def __enter__(self) -> None:
        for parameter in self.trained:
            parameter.requires_grad_(False)

    def __exit__(self, *_: object) -> None:
        for parameter in self.trained:
            parameter.requires_grad_(True)


class _Ridge:
    """Normal equations of one regression a branch, gathered block by block."""

    def __init__(self, branches: int, width: int, device: torch.device) -> None:
        self.count = 0
        self.gram = torch.zeros(branches, width, width, device=device)
        self.cross = torch.zeros(branches, width, device=device)
        self.sum_x = torch.zeros(branches, width, device=device)
        self.sum_y = torch.zeros(branches, device=device)

    def add(self, inputs: list[Tensor], targets: Tensor) -> None:
        """inputs: [S, H] per branch; targets [branches, S]."""
        self.count += targets.shape[1]
        for i, x in enumerate(inputs):
            self.gram[i] += x.T @ x
            self.cross[i] += x.T @ targets[i]
            self.sum_x[i] += x.sum(0)
        self.sum_y += targets.sum(1)

    def solve(self, ridge: float) -> tuple[Tensor, Tensor, Tensor]:
        """Weights [branches, H], biases [branches], and the inputs' mean [branches, H]."""
        mean_x, mean_y = self.sum_x / self.count, self.sum_y / self.count
        cross = self.cross / self.count - mean_x * mean_y.unsqueeze(1)
        weight = torch.empty_like(cross)
        for i, mean in enumerate(mean_x):  # one after another: each takes several copies
            gram = self.gram[i] / self.count - torch.outer(mean, mean)
            weight[i] = ridge_solution(gram, cross[i].unsqueeze(1), ridge).squeeze(1)
        return weight, mean_y - (weight * mean_x).sum(1), mean_x
