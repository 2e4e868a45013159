"""Multiply-adds: the cost of a token at each branch, and the saving by skipping, gross and net."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from gateskip.model.families import find_branches
from gateskip.model.gating import BranchShortcuts, TokenGates
from gateskip.model.projections import attention_shape


@dataclass(frozen=True)
class BranchCost:
    """Multiply-adds of one token at one branch."""

    linear: int
    kv: int  # the part of `linear` that makes keys and values; 0 for an MLP
    per_slot: int  # per attended slot; 0 for an MLP
    window: int | None = None  # slots attended to at most; None for all

    def at(self, context: float) -> float:
        """Cost with `context` slots attended to."""
        return self.linear + self.per_slot * context

    def over(self, length: int) -> float:
        """Mean cost of the tokens of a text of `length` tokens."""
        return self.at(attended(0, length, self.window) / length)

    def saved(self, kv_rule: str) -> int:
        """The part of `linear` that skipping saves under a KV rule."""
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
        shape = attention_shape(model, branch)
        width = shape.heads * shape.head_dim
        kv = 2 * hidden * shape.kv_heads * shape.head_dim
        costs.append(BranchCost(2 * hidden * width + kv, kv, 2 * width, shape.window))
    return costs


def saved_by_skipping(model: Any, shortcuts: BranchShortcuts | None, kv_rule: str) -> list[int]:
    """Multiply-adds of each branch's linear layers that a skipping token saves, one per branch,
    minus those of its shortcut but not those of its gate."""
    return [
        cost.saved(kv_rule) - (0 if shortcuts is None else shortcuts.macs(branch))
        for branch, cost in enumerate(branch_costs(model))
    ]


def attended(start: int, count: int, window: int | None) -> int:
    """Slots that `count` tokens from position `start` on attend to, including their own.

    The token at position p sees p + 1 slots, of which a sliding layer attends to `window`.
    """
    growing = count if window is None else max(0, min(count, window - start))
    seen = growing * start + growing * (growing + 1) // 2
    return seen + (count - growing) * (window or 0)


def _linear_macs(linear: Any) -> int:
    return int(linear.in_features * linear.out_features)


@dataclass
class Usage:
    """The number of tokens that entered each branch, and of all tokens."""

    kept: list[int]
    seen: int = 0
    context: int = 0  # sum over tokens of the slots that each could attend to
    windowed: dict[int, int] = field(default_factory=dict)
    """The same sum for layers that attend to a window: by the window's size."""
    ungated: int = 0
    """Tokens that ran at full compute, for which no gate was evaluated."""

    @classmethod
    def of(cls, model: Any) -> Usage:
        """A new count, of zero, for a model's branches."""
        costs = branch_costs(model)
        windows = {cost.window for cost in costs if cost.window is not None}
        return cls([0] * len(costs), windowed=dict.fromkeys(sorted(windows), 0))

    def saw(self, start: int, count: int = 1) -> None:
        """Count `count` tokens of a row, at positions from `start` on."""
        self.seen += count
        self.context += attended(start, count, None)
        for window in self.windowed:
            self.windowed[window] += attended(start, count, window)

    def enter(self, branch: int, tokens: Any) -> None:
        """Count tokens that entered a branch: a number, or a tensor of one."""
        self.kept[branch] += int(tokens)

    def mean_context(self, window: int | None) -> float:
        """Slots that a token attended to on average, in layers of a window."""
        return (self.context if window is None else self.windowed[window]) / self.seen

    def clear(self) -> None:
        """Count from zero again."""
        self.kept = [0] * len(self.kept)
        self.seen = self.context = self.ungated = 0
        self.windowed = dict.fromkeys(self.windowed, 0)

    def copy(self) -> Usage:
        """A copy of the count."""
        return replace(self, kept=list(self.kept), windowed=dict(self.windowed))

    def since(self, earlier: Usage) -> Usage:
        """The count since `earlier`, a copy of this count."""
        return self._with(earlier, -1)

    def plus(self, other: Usage) -> Usage:
        """The sum of both counts."""
        return self._with(other, 1)

    def _with(self, other: Usage, sign: int) -> Usage:
        entered = [a + sign * b for a, b in zip(self.kept, other.kept, strict=True)]
        windowed = {size: n + sign * other.windowed[size] for size, n in self.windowed.items()}
        sums = (a + sign * b for a, b in zip(self._sums(), other._sums(), strict=True))
        seen, context, ungated = sums
        return Usage(entered, seen, context, windowed, ungated)

    def _sums(self) -> tuple[int, int, int]:
        return self.seen, self.context, self.ungated

    def shares(self) -> list[float]:
        """Kept share of each branch, 1.0 where nothing was counted."""
        return [count / self.seen if self.seen else 1.0 for count in self.kept]


@dataclass(frozen=True)
class Work:
    """Multiply-adds of a token that enters every branch: at each branch, and at the LM head."""

    branches: tuple[BranchCost, ...]
    head: int

    @classmethod
    def of(cls, model: Any) -> Work:
        """The work of a causal LM."""
        return cls(tuple(branch_costs(model)), model.config.hidden_size * model.config.vocab_size)

    def of_branches(self, usage: Usage) -> float:
        """Multiply-adds at the branches if every token that `usage` counted had entered all."""
        return usage.seen * sum(_token_cost(cost, usage) for cost in self.branches)


def _token_cost(cost: BranchCost, usage: Usage) -> float:
    """A branch's mean cost of a token, at the contexts that `usage` counted."""
    return cost.at(usage.mean_context(cost.window))


def kept_share(model: Any, usage: Usage) -> float:
    """Share of the branches' multiply-adds that the tokens of `usage` computed, without the cost of
    gates, shortcuts, and keys and values of skipped tokens.

    Raises:
        ValueError: no token was counted.
    """
    if not usage.seen:
        raise ValueError("no token was counted")
    costs = [_token_cost(cost, usage) for cost in branch_costs(model)]
    entered = sum(n * cost for n, cost in zip(usage.kept, costs, strict=True))
    return entered / (usage.seen * sum(costs))


@dataclass(frozen=True)
class Saving:
    """Saved shares of a dense model's multiply-adds, 0 when nothing was left out.

    `gross` and `net` are shares of the branches' cost. Net subtracts the cost of gates, of
    shortcuts, and of skipped tokens' keys and values that are still computed. `model` is the net
    saving over the whole model, including its LM head, which skipping does not change.
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
    """The saving over the tokens that `usage` counted.

    `gated[i]` says whether branch i's gate was evaluated, of tokens that were not at full compute.
    `dense` is the work of the model that this one was pruned from: the pruned parts count as saved,
    too. Without it, the model's own work counts.

    Raises:
        ValueError: no token was counted.
    """
    if not usage.seen:
        raise ValueError("no token was counted")
    current = Work.of(model)
    dense = current if dense is None else dense
    before = dense.of_branches(usage)
    cut = before - current.of_branches(usage)
    skipped = [usage.seen - count for count in usage.kept]
    costs = [_token_cost(cost, usage) for cost in current.branches]
    gross = cut + sum(n * cost for n, cost in zip(skipped, costs, strict=True))
    projecting = len(skipped) if kv_rule == "project" else 1  # branches that go on making keys
    extra = sum(n * c.kv for n, c in zip(skipped[:projecting], current.branches, strict=False))
    if gates is not None:
        extra += gates.macs() * (usage.seen - usage.ungated) * sum(gated)
        if gates.shortcuts is not None:
            instead = map(gates.shortcuts.macs, range(len(skipped)))
            extra += sum(n * macs for n, macs in zip(skipped, instead, strict=True))
    net, narrower = gross - extra, usage.seen * (dense.head - current.head)
    return Saving(
        gross=gross / before,
        net=net / before,
        model=(net + narrower) / (before + usage.seen * dense.head),
    )
