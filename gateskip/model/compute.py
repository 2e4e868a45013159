"""Multiply-adds: what a token costs at each branch, and what skipping saved, gross and net."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from gateskip.model.families import find_branches
from gateskip.model.gating import TokenGates
from gateskip.model.projections import attention_shape


@dataclass(frozen=True)
class BranchCost:
    """Multiply-adds of one token at one branch."""

    linear: int
    kv: int  # the part of `linear` that makes keys and values; 0 for an MLP
    per_slot: int  # per attended slot; 0 for an MLP

    def at(self, context: float) -> float:
        """Cost with `context` slots attended to."""
        return self.linear + self.per_slot * context

    def saved(self, kv_rule: str) -> int:
        """What skipping saves of `linear` under a KV rule."""
        return self.linear - (self.kv if kv_rule == "project" else 0)


def branch_costs(model: Any) -> list[BranchCost]:
    """One cost a branch, in execution order."""
    hidden = model.config.hidden_size
    costs = []
    for branch in find_branches(model):
        module: Any = branch.module
        if branch.kind == "mlp":
            linears = (x for x in module.children() if hasattr(x, "in_features"))
            costs.append(BranchCost(sum(_linear_macs(x) for x in linears), 0, 0))
            continue
        shape = attention_shape(model, module)
        width = shape.heads * shape.head_dim
        kv = 2 * hidden * shape.kv_heads * shape.head_dim
        costs.append(BranchCost(2 * hidden * width + kv, kv, 2 * width))
    return costs


def _linear_macs(linear: Any) -> int:
    return int(linear.in_features * linear.out_features)


@dataclass
class Usage:
    """How many tokens entered each branch, out of how many that came by."""

    kept: list[int]
    seen: int = 0
    context: int = field(default=0)  # sum over tokens of the slots each could attend to

    @classmethod
    def empty(cls, branches: int) -> Usage:
        """A count from zero."""
        return cls([0] * branches)

    def clear(self) -> None:
        """Count from zero again."""
        self.kept = [0] * len(self.kept)
        self.seen = self.context = 0

    def shares(self) -> list[float]:
        """Kept share of each branch, 1.0 where nothing was counted."""
        return [kept / self.seen if self.seen else 1.0 for kept in self.kept]


@dataclass(frozen=True)
class Work:
    """Multiply-adds of a token that enters everything: at each branch, and at the LM head."""

    branches: tuple[BranchCost, ...]
    head: int

    @classmethod
    def of(cls, model: Any) -> Work:
        """That of a causal LM."""
        return cls(tuple(branch_costs(model)), model.config.hidden_size * model.config.vocab_size)

    def of_branches(self, usage: Usage) -> float:
        """Multiply-adds at the branches, had every token that `usage` counted entered all."""
        context = usage.context / usage.seen
        return usage.seen * sum(cost.at(context) for cost in self.branches)


@dataclass(frozen=True)
class Saving:
    """Shares of a dense model's multiply-adds that were not spent, 0 when nothing was left out.

    `gross` and `net` are shares of the branches' cost; net pays for the gates, for shortcuts, and
    for keys and values still computed of skipped tokens. `model` is the net saving over the whole
    model, its LM head included, which no skipping touches.
    """

    gross: float
    net: float
    model: float


def saving(
    model: Any,
    usage: Usage,
    gates: TokenGates | None,
    kv_rule: str,
    gated: Sequence[bool],
    dense: Work | None = None,
) -> Saving:
    """What was saved over the tokens that `usage` counted.

    `gated[i]` says whether branch i's gate was evaluated. `dense` is the work of the model that
    this one was cut from: what is not there any more was saved, too. Without it the model's own.

    Raises:
        ValueError: no token was counted.
    """
    if not usage.seen:
        raise ValueError("no token was counted")
    own = Work.of(model)
    dense = own if dense is None else dense
    context, before = usage.context / usage.seen, dense.of_branches(usage)
    cut = before - own.of_branches(usage)
    skipped = [usage.seen - kept for kept in usage.kept]
    gross = cut + sum(n * cost.at(context) for n, cost in zip(skipped, own.branches, strict=True))
    projecting = len(skipped) if kv_rule == "project" else 1  # branches that go on making keys
    extra = sum(n * c.kv for n, c in zip(skipped[:projecting], own.branches, strict=False))
    if gates is not None:
        extra += gates.macs() * usage.seen * sum(gated)
        if gates.shortcuts is not None:
            extra += gates.shortcuts.macs() * sum(skipped)
    net, narrower = gross - extra, usage.seen * (dense.head - own.head)
    return Saving(
        gross=gross / before,
        net=net / before,
        model=(net + narrower) / (before + usage.seen * dense.head),
    )
