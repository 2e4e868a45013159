"""The backend `gathered`: torch on any device, each branch computed for the tokens that enter
it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from copy import deepcopy
from functools import partial
from typing import Any

import torch
from torch import Tensor

from gateskip.gates.base import Gates
from gateskip.model.families import Branch, final_norm, to_device
from gateskip.model.projections import BY_TORCH, Steps
from gateskip.quantization.formats import has_packed, weight_format
from gateskip.quantization.packed_linear import streaming
from gateskip.runtime.attention import attend_padded, attend_rows
from gateskip.runtime.backend import (
    Arithmetic,
    Backend,
    BackendName,
    PassThresholds,
    dtype_name,
)
from gateskip.runtime.gathering import (
    TOGETHER,
    Attend,
    Batch,
    GatheredPass,
    attention_shapes,
    filled,
    parts_of,
    rows_at,
)
from gateskip.runtime.kv_cache import EVEN, KVCache, Visible


class TorchOperations:
    """See `Operations`: everything by torch."""

    fp32_activations = False
    steps: Steps = BY_TORCH

    def __init__(self, model: Any, gates: Gates | None) -> None:
        self.norm, self.shapes = final_norm(model), attention_shapes(model)
        self.device: torch.device = self.norm.weight.device
        self.shortcuts = None if gates is None else gates.shortcuts
        if self.shortcuts is not None:  # in the model's type once, not at every branch
            self.shortcuts = deepcopy(self.shortcuts).to(self.norm.weight.dtype)

    @property
    def even(self) -> int:
        """oneDNN compiles a bfloat16 product for each number of rows, so their number is rounded up
        on a CPU."""
        return EVEN if self.device.type == "cpu" else 1

    def sizes(self, count: int) -> list[int]:
        """See `few_sizes`."""
        return few_sizes(count)

    def add_branch(
        self,
        branch: Branch,
        hidden: Tensor,
        ropes: Mapping[str, tuple[Tensor, Tensor]],
        cache: KVCache,
        batch: Batch,
        threshold: float | Tensor | None,
    ) -> int | Tensor | None:
        """None: no branch is one call."""
        return None

    def entering(self, branch: Branch, tokens: int) -> AbstractContextManager[None]:
        """Nothing to prepare."""
        return nullcontext()

    def read(self, branch: Branch, hidden: Tensor) -> tuple[Tensor, Tensor | None]:
        """The norm before a branch."""
        return branch.enter(hidden), None

    def final(self, hidden: Tensor) -> Tensor:
        """The norm before the LM head."""
        return self.norm(hidden)  # type: ignore[no-any-return]

    def mlp(self, branch: Branch, x: Tensor) -> Tensor:
        """The output of an MLP branch for tokens x [N, H]."""
        return self.leave(branch, branch.module(x))

    def leave(self, branch: Branch, output: Tensor) -> Tensor:
        """The norm after a branch, if any."""
        return branch.leave(output)

    def attention(self, branch: Branch, seen: Visible, batch: Batch, whole: bool) -> Attend:
        """Attention of a branch: on a CPU only over pairs of tokens that may see each other,
        elsewhere torch's attention under a mask."""
        kv, rows, shape = seen.kv, seen.rows, self.shapes[branch.index]
        if self.device.type == "cpu":
            return partial(attend_rows, kv=kv, shape=shape, rows=rows)
        from_zero = whole and batch.from_zero and shape.window is None
        how: dict[str, Any] = {"rows": rows, "used": seen.used, "from_zero": from_zero}
        return partial(attend_padded, kv=kv, shape=shape, **how)

    def add_rows(self, hidden: Tensor, places: Tensor, added: Tensor) -> None:
        """hidden [B, S, H] at flat places [N] += added [N, H], in place."""
        hidden.view(-1, hidden.shape[-1]).index_add_(0, places, added.to(hidden.dtype))

    def add_shortcuts(self, branch: Branch, hidden: Tensor, x: Tensor, skip: Tensor) -> None:
        """See `Operations`; in parts, as for tokens that enter."""
        assert self.shortcuts is not None
        for places in parts_of(skip, self.sizes):
            chosen = filled(places, self.even) if len(places) >= self.even else places
            instead = self.shortcuts(branch.index, rows_at(x, chosen))
            self.add_rows(hidden, places, instead[: len(places)])


class GatheredBackend(GatheredPass, Backend[KVCache]):
    """A causal LM of a supported architecture, `gates` its gates or None: see `Backend`."""

    name: BackendName = "gathered"
    operations: TorchOperations

    def __init__(self, model: Any, gates: Gates | None = None, kv_rule: str = "project") -> None:
        super().__init__(model, gates, kv_rule, TorchOperations(model, gates))

    def arithmetic(self, scoring: bool = False) -> Arithmetic:
        """torch multiplies with activations of the model's own type; packed weights are unpacked
        for prompts and meet activations in float32 in decoding."""
        packed = has_packed(self.model) and not scoring
        activations = "float32" if packed else dtype_name(self.dtype)
        return Arithmetic(self.name, weight_format(self.model), activations, "float32")

    def decode(
        self,
        tokens: Sequence[Sequence[int]],
        cache: KVCache,
        rows: Sequence[int],
        starts: Sequence[int],
        thresholds: PassThresholds = None,
    ) -> Tensor:
        """See `Backend.decode`: all rows in one pass, padded to the one with most tokens."""
        lengths = [len(row) for row in tokens]
        columns = max(lengths)
        padded = [[*row, *[0] * (columns - len(row))] for row in tokens]
        ids = to_device(padded, self.operations.device)
        hidden = self.step(ids, cache, rows, starts, thresholds, lengths).flatten(0, 1)
        if min(lengths) == columns:
            return hidden
        real = [i * columns + j for i, length in enumerate(lengths) for j in range(length)]
        return hidden.index_select(0, to_device(real, hidden.device))

    def step(
        self,
        ids: Tensor,
        cache: KVCache,
        rows: Sequence[int],
        starts: Sequence[int],
        thresholds: PassThresholds = None,
        lengths: Sequence[int] | None = None,
    ) -> Tensor:
        """As `decode`, with ids [B, S] on the model's device -> final states [B, S, H]; of
        right-padded rows `lengths` gives the real tokens."""
        some = None if list(rows) == list(range(cache.batch)) else tuple(rows)
        batch = Batch.of(ids, starts, lengths, some, decoding=True)
        with streaming():
            return self.run(ids, cache, batch, thresholds)

    def logits(self, hidden: Tensor) -> Tensor:
        """See `Backend.logits`."""
        with streaming():
            return self.scores(hidden)


def few_sizes(count: int) -> list[int]:
    """Sizes of the parts in which `count` tokens enter: TOGETHER or half of it, except for the last
    part, which is at most that half.

    oneDNN compiles a bfloat16 product for each new size, which takes milliseconds, and keeps half a
    megabyte of code. Gates leave another number of tokens at every branch of every prompt.
    """
    whole, rest = divmod(count, TOGETHER)
    half = TOGETHER // 2
    return [TOGETHER] * whole + ([half, rest - half] if rest > half else [rest])
