"""The stage `prune-branches`: removes branches that gates (almost) always skip.

A layer that loses both branches is dropped: the config says so, and file, memory, cache and time
shrink everywhere. A plain config cannot say that a layer lacks one of its branches. Such a branch
stays in the file with an output of zero and a threshold that no token reaches. gateskip never
enters it, so its weights are not read (except those of keys and values under the KV rule
`project`). Plain transformers multiplies by the zeros.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, ClassVar, Literal

from pydantic import Field

from compose.errors import RuleBroken, UserError
from compose.stages.base import ModelShape, Stage, StageJob
from compose.stages.gate import Gate
from compose.stages.gate_transfer import keep_gates, require_gates_that_move
from compose.stages.prune.edit import (
    RANK_BLOCKS,
    Pruning,
    keep_layers,
    last_linear,
    model_and_blocks,
    save_pruned,
    text_loss,
)
from compose.stages.rules import RULES

if TYPE_CHECKING:
    from torch import Tensor

Unit = tuple[int, ...]
"""Branches that are removed together."""


class PruneBranches(Pruning):
    """Remove the attention and MLP branches that gates skip for almost all tokens."""

    version: ClassVar[int] = 2
    example: ClassVar[Mapping[str, Any]] = {"budget": 0.8}

    use: Literal["prune-branches"] = "prune-branches"
    """The stage's name."""

    budget: float = Field(default=0.8, gt=0, lt=1)
    """Share of the attention and MLP multiply-adds that the gates compute (the budget) when the
    stage counts how often each branch is skipped."""

    share: float = Field(default=0.02, ge=0, lt=1)
    """An attention or MLP branch can be removed if it is computed for at most this share of tokens.
    """

    rise: float = Field(default=0.05, gt=0)
    """Maximum rise of the loss on calibration text, in nats per token, that the removal of one
    branch may cause. If removing a branch raises the loss more than `rise` allows, the branch
    stays. A branch that almost all tokens skip can still be needed for the first token of a text,
    because the first token skips nothing."""

    single: Literal["zero", "keep"] = "zero"
    """What happens if one branch of a layer can be removed and the other branch stays: the output
    of the branch becomes zero and is never computed (`zero`), or the branch is not removed
    (`keep`). With `single: keep`, only whole layers are removed."""

    def tolerates(self, rule: str) -> bool:
        """It may come after gates, because it uses their decisions."""
        return rule == "prune-after-gate"

    def check(self, shape: ModelShape | None, before: tuple[Stage, ...]) -> None:
        """Order rules, `branches-need-gates`, `budget-calibrated`, and gates that can move."""
        super().check(shape, before)
        require_gates_that_move(self, before)
        gates = next((stage for stage in before if isinstance(stage, Gate)), None)
        if gates is None:
            raise RuleBroken("branches-need-gates", f"{self.use}: {RULES['branches-need-gates']}")
        if self.budget < min(gates.budgets):
            raise RuleBroken(
                "budget-calibrated",
                f"prune-branches uses the gates at budget {self.budget}, but the lowest that they"
                f" are calibrated for is {min(gates.budgets)}",
                fix=f"set budget: {min(gates.budgets)}, or add {self.budget} to the gates' budgets",
            )
        if self.single == "keep" and gates.branches != "both":
            raise RuleBroken(
                "layers-fit",
                f"gates that skip only {gates.branches} branches never skip a whole layer, so"
                " single: keep removes nothing",
                fix="set single: zero, or let the gates skip both",
            )

    def reshape(self, shape: ModelShape) -> ModelShape:
        """The same shape: how many layers are removed depends on the gates, and a removal can only
        shrink it."""
        return shape

    def run(self, job: StageJob) -> dict[str, Any]:
        """Evaluate the gates, zero branches while the loss permits, drop whole layers,
        recalibrate."""
        from gateskip.model.families import backbone, find_branches

        model, blocks = model_and_blocks(job, RANK_BLOCKS)
        shares = entered_shares(job, model, blocks, self.budget)
        before, whole_size = text_loss(model, blocks), model.num_parameters()
        gone, spared = self._silence(job, model, blocks, self._units(shares), before)
        if not gone:
            raise self._nothing(shares, spared)
        count = len(backbone(model).layers)
        layers = [i for i in range(count) if not {2 * i, 2 * i + 1} <= gone]
        if not layers:
            raise RuleBroken("layers-fit", f"the gates skip all {count} layers; one must stay")
        zeroed = [(new, old % 2) for new, old in _places(layers, gone)]
        keep_layers(model, layers)
        branches = find_branches(model)
        never_read = sum(
            parameter.numel()
            for layer, part in zeroed
            for parameter in branches[2 * layer + part].module.parameters()
        )
        keep_gates(job, model, layers, frozenset(2 * layer + part for layer, part in zeroed))
        loss = {"before": before, "after": text_loss(model, blocks)}
        removed = whole_size - model.num_parameters()
        save_pruned(model, job)
        return {
            "entered": {_name(i): round(share, 4) for i, share in enumerate(shares)},
            "dropped": [layer for layer in range(count) if layer not in layers],
            "zeroed": [_name(old) for _, old in _places(layers, gone)],
            "spared": {"+".join(map(_name, unit)): rise for unit, rise in spared.items()},
            "parameters": {
                "removed": round(removed / whole_size, 4),
                "never_read_where_skipping": round(never_read / whole_size, 4),
            },
            "loss": loss,
        }

    def _units(self, shares: list[float]) -> list[Unit]:
        """Units that may be removed, the least used first: branches, or layers where single
        branches are kept."""
        rare = [unit for unit in self._all_units(shares) if _most(shares, unit) <= self.share]
        return sorted(rare, key=lambda unit: _most(shares, unit))

    def _all_units(self, shares: list[float]) -> list[Unit]:
        size = 1 if self.single == "zero" else 2
        return [tuple(range(i, i + size)) for i in range(0, len(shares), size)]

    def _silence(
        self, job: StageJob, model: Any, blocks: Tensor, units: list[Unit], loss: float
    ) -> tuple[set[int], dict[Unit, float]]:
        """Zero the units one after another; undo where the loss rises too far.

        Returns the removed branches, and the loss that each unit would have cost that stayed.
        """
        gone: set[int] = set()
        spared: dict[Unit, float] = {}
        for done, unit in enumerate(units):
            outputs = _outputs(model, unit)
            weights = [parameter.detach().clone() for parameter in outputs]
            _set(outputs, [0.0] * len(weights))
            without = text_loss(model, blocks)
            if without - loss > self.rise:
                _set(outputs, weights)
                spared[unit] = round(without - loss, 4)
            else:
                gone, loss = gone | set(unit), without
            job.progress(
                done + 1,
                len(units),
                "leaving out branches",
                detail=_name(unit[0]),
                loss=without,
            )
        return gone, spared

    def _nothing(self, shares: list[float], spared: dict[Unit, float]) -> UserError:
        what = "branch" if self.single == "zero" else "layer with both branches"
        if spared:
            unit = min(spared, key=spared.__getitem__)
            return UserError(
                f"removing any {what} that tokens skip at budget {self.budget} raises the loss by "
                f"more than rise: {' and '.join(map(_name, unit))} raises it least, by "
                f"{spared[unit]:.3g} nats",
                fix=f"set rise: {_above(spared[unit])}, or use skip, which decides token by token",
            )
        unit = min(self._all_units(shares), key=lambda candidate: _most(shares, candidate))
        nearest = _most(shares, unit)
        return UserError(
            f"more than {self.share:.3g} of the tokens enter each {what} at budget "
            f"{self.budget}; the smallest share, {nearest:.3g}, enters"
            f" {' and '.join(map(_name, unit))}",
            fix=f"set share: {_above(nearest)}, or a lower budget",
        )


def entered_shares(job: StageJob, model: Any, blocks: Tensor, budget: float) -> list[float]:
    """Share of the tokens in blocks [N, S] that enter each branch at a budget, without the anchors,
    which enter all of them.

    Raises:
        UserError: the job's source has no gates.
    """
    import torch

    from gateskip.checkpoint import load_gates
    from gateskip.model.gating import ANCHORS
    from gateskip.model.reference import masked_forward

    file = load_gates(job.source)
    if file is None:
        raise UserError(f"{job.source} has no gates", fix="put a gate stage before")
    try:
        thresholds = file.budgets.at(budget)
    except ValueError as error:
        raise UserError(str(error), fix="use a calibrated budget") from error
    assert thresholds is not None, "budgets are below 1"
    gates = file.gates.to(blocks.device)
    gates.attach(model)
    entered = torch.zeros(gates.branches, device=blocks.device)

    def rule(branch: Any, logits: Tensor) -> Tensor:
        entered_tokens: Tensor = (logits >= thresholds[branch.index]).to(logits.dtype)
        entered[branch.index] += entered_tokens[:, ANCHORS:].mean()
        return entered_tokens

    with torch.inference_mode():
        for done, block in enumerate(blocks.split(1)):
            masked_forward(model, block, gates, rule, file.kv_rule)
            job.progress(done + 1, len(blocks), "evaluating the gates")
    shares: list[float] = (entered / len(blocks)).tolist()
    return shares


def _outputs(model: Any, unit: Unit) -> list[Tensor]:
    """Weights and biases of the linear layers that these branches end in."""
    from gateskip.model.families import find_branches

    branches = find_branches(model)
    outputs = [last_linear(branches[index].module) for index in unit]
    return [parameter for output in outputs for parameter in output.parameters()]


def _set(parameters: list[Tensor], values: list[Any]) -> None:
    import torch

    with torch.no_grad():
        for parameter, value in zip(parameters, values, strict=True):
            parameter.copy_(torch.as_tensor(value, device=parameter.device))


def _places(layers: list[int], gone: set[int]) -> list[tuple[int, int]]:
    """(new number of its layer, old number) of each branch that goes from a layer that stays."""
    return [(layers.index(index // 2), index) for index in sorted(gone) if index // 2 in layers]


def _name(branch: int) -> str:
    return f"{('attention', 'mlp')[branch % 2]} {branch // 2}"


def _most(shares: list[float], unit: Unit) -> float:
    return max(shares[index] for index in unit)


def _above(value: float) -> float:
    """The next number of two decimals."""
    return math.floor(value * 100 + 1) / 100
