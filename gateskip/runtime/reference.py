"""The backend `reference`: torch, whole sequences, no KV cache.

Every call computes all tokens of its rows from the first one on, through the differentiable pass of
model/reference.py. It is slow and simple: tests compare the other backends with it.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, Self

import torch
from torch import Tensor

from gateskip.gates.base import Gates
from gateskip.model.compute import Usage
from gateskip.model.families import (
    Branch,
    UnsupportedModel,
    final_norm,
    find_branches,
    head,
    to_device,
)
from gateskip.model.gating import ANCHORS, NEVER_SKIP
from gateskip.model.reference import masked_forward
from gateskip.quantization.formats import weight_format
from gateskip.runtime.backend import (
    Arithmetic,
    Backend,
    BackendName,
    PassThresholds,
    dtype_name,
)
from gateskip.runtime.budget_control import RowThresholds
from gateskip.runtime.kv_cache import KVFormat
from gateskip.runtime.on_device import DeviceUsage

TOKEN_BYTES = 8


@dataclass
class TokenCache:
    """The tokens of every row so far, and the thresholds at which each was computed: all that
    recomputing needs."""

    tokens: list[list[int]]
    capacity: int
    thresholds: list[list[Tensor | None]] = field(default_factory=list)
    """Thresholds [branches] of each token of each row; None is full compute."""
    drift: Tensor | None = None
    """See `budget_control.Tracked`."""

    def __post_init__(self) -> None:
        self.thresholds = self.thresholds or [[None] * len(row) for row in self.tokens]

    @property
    def batch(self) -> int:
        """Rows."""
        return len(self.tokens)

    def rows(self, numbers: Sequence[int]) -> Self:
        """Copies of rows, in the given order; a row may come more than once."""
        tokens = [list(self.tokens[number]) for number in numbers]
        thresholds = [list(self.thresholds[number]) for number in numbers]
        drift = None if self.drift is None else self.drift[list(numbers)]
        return type(self)(tokens, self.capacity, thresholds, drift)

    def nbytes(self) -> int:
        """Most memory that the tokens take, in bytes."""
        return TOKEN_BYTES * self.capacity * len(self.tokens)


class ReferenceBackend(Backend[TokenCache]):
    """See `Backend`."""

    name: BackendName = "reference"

    def __init__(self, model: Any, gates: Gates | None = None, kv_rule: str = "project") -> None:
        self.model, self.gates, self.kv_rule = model, gates, kv_rule
        weight = final_norm(model).weight
        self.dtype: torch.dtype = weight.dtype
        self.device: torch.device = weight.device
        self.branches = find_branches(model)
        self.usage = (Usage if self.device.type == "cpu" else DeviceUsage).of(model)
        self.gated = True
        self.kv_cache: KVFormat = "model"

    def arithmetic(self, scoring: bool = False) -> Arithmetic:
        """The same for decoding and scoring."""
        return Arithmetic(self.name, weight_format(self.model), dtype_name(self.dtype), "float32")

    def new_cache(self, batch: int, capacity: int) -> TokenCache:
        """A cache without tokens.

        Raises ValueError where the model has fewer positions, UnsupportedModel for keys and values
        in 8 bits: this backend stores none.
        """
        if self.kv_cache != "model":
            raise UnsupportedModel(
                "the reference backend stores no keys and values: use kv_cache: model"
            )
        limit = self.model.config.max_position_embeddings
        if capacity > limit:
            raise ValueError(f"{capacity} tokens do not fit: the model has {limit} positions")
        return TokenCache([[] for _ in range(batch)], capacity)

    def cache_bytes(self, batch: int, capacity: int) -> int:
        """The size of `new_cache`'s result, in bytes."""
        return TOKEN_BYTES * batch * capacity

    def prefill(
        self,
        input_ids: Tensor,
        cache: TokenCache,
        starts: Sequence[int],
        thresholds: PassThresholds = None,
        lengths: Sequence[int] | None = None,
        rows: Sequence[int] | None = None,
        full_from: Sequence[int] | None = None,
    ) -> Tensor:
        """See `Backend.prefill`."""
        columns = input_ids.shape[1]
        lengths = [columns] * len(input_ids) if lengths is None else lengths
        tokens = [ids[:n].tolist() for ids, n in zip(input_ids, lengths, strict=True)]
        rows = range(len(tokens)) if rows is None else rows
        states = self._rows(tokens, cache, rows, starts, thresholds, full_from)
        return torch.stack(
            [torch.cat((row, row.new_zeros(columns - len(row), row.shape[1]))) for row in states]
        )

    def decode(
        self,
        tokens: Sequence[Sequence[int]],
        cache: TokenCache,
        rows: Sequence[int],
        starts: Sequence[int],
        thresholds: PassThresholds = None,
    ) -> Tensor:
        """See `Backend.decode`."""
        return torch.cat(self._rows(tokens, cache, rows, starts, thresholds))

    def logits(self, hidden: Tensor) -> Tensor:
        """See `Backend.logits`."""
        return self.scores(hidden)

    def scores(self, hidden: Tensor) -> Tensor:
        """See `Backend.scores`."""
        return head(self.model, hidden)

    def _rows(
        self,
        tokens: Sequence[Sequence[int]],
        cache: TokenCache,
        rows: Sequence[int],
        starts: Sequence[int],
        thresholds: PassThresholds,
        full_from: Sequence[int] | None = None,
    ) -> list[Tensor]:
        """States [n, H] of each row's tokens at positions from its start on."""
        states_of_rows = []
        for number, (ids, row, start) in enumerate(zip(tokens, rows, starts, strict=True)):
            limits: Tensor | None = None
            if isinstance(thresholds, RowThresholds):
                limits = thresholds.values[number]
            elif thresholds is not None:
                limits = to_device(list(thresholds), self.device)
            cache.tokens[row][start:] = ids
            skipping = len(ids) if full_from is None else min(max(full_from[number], 0), len(ids))
            never = None if limits is None else torch.full_like(limits, NEVER_SKIP)
            cache.thresholds[row][start:] = [limits] * skipping + [never] * (len(ids) - skipping)
            states, entered = self._row(cache, row, start)
            if isinstance(thresholds, RowThresholds):
                thresholds.entered[number] += (entered.long() * thresholds.weights[number]).sum(1)
            states_of_rows.append(states)
        return states_of_rows

    def _row(self, cache: TokenCache, row: int, start: int) -> tuple[Tensor, Tensor]:
        """States [n, H] of a row's tokens from position `start` on, and the branches that they
        entered, bool [n, branches]."""
        ids, limits = cache.tokens[row], cache.thresholds[row]
        count, branches = len(ids) - start, len(self.branches)
        entered = torch.ones(len(ids), branches, dtype=torch.bool, device=self.device)
        if not count:
            width: int = self.model.config.hidden_size
            return torch.zeros(0, width, dtype=self.dtype, device=self.device), entered[start:]
        batch = to_device([ids], self.device)
        self.usage.saw(start, count)
        skipping = [row is not None for row in limits]
        gates = self.gates if skipping[-1] or self.gated else None
        rule = None
        if any(skipping) and gates is not None:
            full = torch.full((branches,), NEVER_SKIP, device=self.device)
            thresholds = torch.stack([full if row is None else row for row in limits])

            def rule(branch: Branch, logits: Tensor) -> Tensor:
                keep = logits >= thresholds[:, branch.index]
                entered[:, branch.index] = keep[0]
                return keep.to(logits.dtype)

        states = masked_forward(self.model, batch, gates, rule, self.kv_rule)[0, start:]
        entered[:ANCHORS] = True
        for branch, count in enumerate(entered[start:].sum(0)):
            self.usage.enter(branch, count)
        return states, entered[start:]
