"""The backend `reference`: torch, whole sequences, no KV cache.

Every call computes all tokens of its rows from the first one on, through the differentiable pass of
model/reference.py. It is slow and simple: what the other backends are held to.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Self

import torch
from torch import Tensor

from gateskip.gates.base import Gates
from gateskip.model.compute import Usage
from gateskip.model.families import Branch, UnsupportedModel, final_norm, find_branches, head
from gateskip.model.gating import ANCHORS
from gateskip.model.reference import masked_forward
from gateskip.quantization.formats import weight_format
from gateskip.runtime.backend import Arithmetic, BackendName, Thresholds, dtype_name
from gateskip.runtime.kv_cache import KVFormat

TOKEN_BYTES = 8


@dataclass
class TokenCache:
    """The tokens of every row so far: all that recomputing needs."""

    tokens: list[list[int]]
    capacity: int

    def rows(self, numbers: Sequence[int]) -> Self:
        """Copies of rows, in the given order; a row may come more than once."""
        return type(self)([list(self.tokens[number]) for number in numbers], self.capacity)

    def nbytes(self) -> int:
        """Memory that the tokens take at most, in bytes."""
        return TOKEN_BYTES * self.capacity * len(self.tokens)


class ReferenceBackend:
    """See `Backend`."""

    name: BackendName = "reference"

    def __init__(self, model: Any, gates: Gates | None = None, kv_rule: str = "project") -> None:
        self.model, self.gates, self.kv_rule = model, gates, kv_rule
        weight = final_norm(model).weight
        self.dtype: torch.dtype = weight.dtype
        self.device: torch.device = weight.device
        self.branches = find_branches(model)
        self.usage = Usage.of(model)
        self.gated = True
        self.kv_cache: KVFormat = "model"

    def arithmetic(self, scoring: bool = False) -> Arithmetic:
        """The same for decoding and scoring."""
        return Arithmetic(self.name, weight_format(self.model), dtype_name(self.dtype), "float32")

    def new_cache(self, batch: int, capacity: int) -> TokenCache:
        """No tokens yet.

        Raises ValueError where the model has fewer positions, UnsupportedModel for keys and values
        in 8 bits: there are none.
        """
        if self.kv_cache != "model":
            raise UnsupportedModel(
                "the reference backend keeps no keys and values: kv_cache: model"
            )
        limit = self.model.config.max_position_embeddings
        if capacity > limit:
            raise ValueError(f"{capacity} tokens do not fit: the model has {limit} positions")
        return TokenCache([[] for _ in range(batch)], capacity)

    def cache_bytes(self, batch: int, capacity: int) -> int:
        """What `new_cache` takes, in bytes."""
        return TOKEN_BYTES * batch * capacity

    def prompt(
        self,
        input_ids: Tensor,
        cache: TokenCache,
        starts: Sequence[int],
        thresholds: Thresholds = None,
        lengths: Sequence[int] | None = None,
    ) -> Tensor:
        """See `Backend.prompt`."""
        columns = input_ids.shape[1]
        lengths = [columns] * len(input_ids) if lengths is None else lengths
        tokens = [ids[:n].tolist() for ids, n in zip(input_ids, lengths, strict=True)]
        found = [
            self._row(own, cache, row, start, thresholds)
            for row, (own, start) in enumerate(zip(tokens, starts, strict=True))
        ]
        rows = [torch.cat((own, own.new_zeros(columns - len(own), own.shape[1]))) for own in found]
        return torch.stack(rows)

    def decode(
        self,
        tokens: Sequence[Sequence[int]],
        cache: TokenCache,
        rows: Sequence[int],
        starts: Sequence[int],
        thresholds: Thresholds = None,
    ) -> Tensor:
        """See `Backend.decode`."""
        each = zip(tokens, rows, starts, strict=True)
        return torch.cat([self._row(ids, cache, r, s, thresholds) for ids, r, s in each])

    def logits(self, hidden: Tensor) -> Tensor:
        """See `Backend.logits`."""
        return self.scores(hidden)

    def scores(self, hidden: Tensor) -> Tensor:
        """See `Backend.scores`."""
        return head(self.model, hidden)

    def _row(
        self,
        tokens: Sequence[int],
        cache: TokenCache,
        row: int,
        start: int,
        thresholds: Thresholds,
    ) -> Tensor:
        """States [n, H] of a row's tokens at positions from `start` on."""
        cache.tokens[row][start:] = tokens
        count = len(tokens)
        if not count:
            width: int = self.model.config.hidden_size
            return torch.zeros(0, width, dtype=self.dtype, device=self.device)
        ids = torch.tensor([cache.tokens[row]], device=self.device)
        self.usage.saw(start, count)
        gates = self.gates if thresholds is not None or self.gated else None
        if thresholds is None:
            self.usage.kept = [kept + count for kept in self.usage.kept]
            return masked_forward(self.model, ids, gates, None, self.kv_rule)[0, start:]

        def rule(branch: Branch, logits: Tensor) -> Tensor:
            keep = logits >= thresholds[branch.index]
            entered = keep | (torch.arange(keep.shape[1], device=keep.device) < ANCHORS)
            self.usage.kept[branch.index] += int(entered[:, start:].sum())
            return keep.to(logits.dtype)

        return masked_forward(self.model, ids, gates, rule, self.kv_rule)[0, start:]
