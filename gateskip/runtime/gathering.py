"""One pass over the tokens of a prompt, or the next ones of some rows, branch by branch.

A branch is computed for the tokens that enter it; a skipped token gets a shortcut where the gates
have them, otherwise nothing. The tokens that enter are gathered, run, and added back. Rows of
different lengths share a batch without a padding mask, since a cache is indexed by position, and a
prompt may come in chunks. Each backend computes norms, products and attention in its own way:
`Operations`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from functools import cached_property
from typing import Any, Protocol

import torch
from torch import Tensor

from gateskip.gates.base import Gates
from gateskip.kernels.abi import Entering
from gateskip.model.compute import Usage
from gateskip.model.families import Branch, embed, final_norm, find_branches, head, to_device
from gateskip.model.gating import ANCHORS, NEVER_SKIP
from gateskip.model.projections import (
    AttentionShape,
    Steps,
    attention_shape,
    project_inputs,
    project_keys_values,
    project_out,
    project_queries,
)
from gateskip.quantization.gpu_linear import used_rows
from gateskip.runtime.backend import PassThresholds
from gateskip.runtime.budget_control import RowThresholds
from gateskip.runtime.kv_cache import EVEN, KVCache, KVFormat, KVLayout, Place, Visible
from gateskip.runtime.on_device import DeviceUsage, attend_all, chosen_outputs

Attend = Callable[[Tensor, Sequence[int], Tensor], Tensor]
"""(queries [N, heads, D], number of queries in each row, their slots [N]) -> [N, heads * D]."""
TOGETHER = 1024  # tokens that enter a branch at once


class Operations(Protocol):
    """The operations that a backend computes in its own way."""

    @property
    def fp32_activations(self) -> bool:
        """Whether prompts pass in float32 although the weights are bfloat16."""
        ...

    @property
    def even(self) -> int:
        """The number of gathered rows is a multiple of this."""
        ...

    def sizes(self, count: int) -> list[int]:
        """Sizes of the parts in which `count` tokens enter a branch."""
        ...

    @property
    def shapes(self) -> Mapping[int, AttentionShape]:
        """The sizes of every attention branch, by its index."""
        ...

    @property
    def steps(self) -> Steps:
        """How an attention branch's projections are computed."""
        ...

    def add_branch(
        self,
        branch: Branch,
        hidden: Tensor,
        ropes: Mapping[str, tuple[Tensor, Tensor]],
        cache: KVCache,
        batch: Batch,
        threshold: float | Tensor | None,
    ) -> int | Tensor | None:
        """hidden [B, S, H] += a branch, in place: norms, gate, cache and shortcuts in one call.
        Returns how many tokens entered, or with separate thresholds for rows which, bool [B, S];
        None where nothing was done."""
        ...

    def entering(self, branch: Branch, tokens: int) -> AbstractContextManager[None]:
        """A context around a branch that some of `tokens` enter."""
        ...

    def read(self, branch: Branch, hidden: Tensor) -> tuple[Tensor, Tensor | None]:
        """The norm before a branch, and its gate's logits where they come at no further cost."""
        ...

    def final(self, hidden: Tensor) -> Tensor:
        """The norm before the LM head."""
        ...

    def mlp(self, branch: Branch, x: Tensor) -> Tensor:
        """The output of an MLP branch for tokens x [N, H]."""
        ...

    def leave(self, branch: Branch, output: Tensor) -> Tensor:
        """The term that a branch adds, from its module's output [..., H]: the norm after it, if
        any."""
        ...

    def attention(self, branch: Branch, seen: Visible, batch: Batch, whole: bool) -> Attend:
        """Attention of a branch over the visible keys of its tokens; `whole` says that every token
        of the batch enters."""
        ...

    def add_rows(self, hidden: Tensor, places: Tensor, added: Tensor) -> None:
        """hidden [B, S, H] at flat places [N] += added [N, H], in place."""
        ...

    def add_shortcuts(self, branch: Branch, hidden: Tensor, x: Tensor, skip: Tensor) -> None:
        """hidden [B, S, H] where `skip` [B, S] is set, including padding, += the branch's shortcut
        of x [B, S, H], in place."""
        ...


class GatheredPass:
    """Passes over a causal LM of a supported architecture, `gates` its gates or None: the part that
    the backends `gathered` and `native` share.

    `usage` counts the tokens that entered each branch; `gated` says whether gates that scale do so
    at full compute, too.
    """

    def __init__(self, model: Any, gates: Gates | None, kv_rule: str, operations: Operations):
        self.model, self.gates, self.kv_rule = model, gates, kv_rule
        self.operations = operations
        self.dtype: torch.dtype = final_norm(model).weight.dtype
        self.branches = find_branches(model)
        self.layout = KVLayout(model, tuple(operations.shapes.values()), kv_rule)
        self.kv_cache: KVFormat = "model"
        self.on_cpu = final_norm(model).weight.device.type == "cpu"
        self.usage = (Usage if self.on_cpu else DeviceUsage).of(model)
        self.gated = True

    def new_cache(self, batch: int, capacity: int) -> KVCache:
        """An empty KV cache. Raises ValueError where the model has fewer positions."""
        return self.layout.empty(batch, capacity, self.kv_cache)

    def cache_bytes(self, batch: int, capacity: int) -> int:
        """The size of `new_cache`'s result, in bytes."""
        return self.layout.nbytes(batch, capacity, self.kv_cache)

    def prefill(
        self,
        input_ids: Tensor,
        cache: KVCache,
        starts: Sequence[int],
        thresholds: PassThresholds = None,
        lengths: Sequence[int] | None = None,
        rows: Sequence[int] | None = None,
        full_from: Sequence[int] | None = None,
    ) -> Tensor:
        """See `Backend.prefill`."""
        some = None if rows is None else tuple(rows)
        batch = Batch.of(input_ids, starts, lengths, some, full_from=full_from)
        return self.run(input_ids, cache, batch, thresholds)

    def scores(self, hidden: Tensor) -> Tensor:
        """See `Backend.scores`."""
        return head(self.model, hidden.to(self.dtype))

    def run(
        self, input_ids: Tensor, cache: KVCache, batch: Batch, thresholds: PassThresholds
    ) -> Tensor:
        """Token ids [B, S] -> final normed states [B, S, H]; branches add in place."""
        cache.begin(batch.place.row_numbers, *zip(*batch.spans, strict=True))
        hidden = embed(self.model, input_ids)
        hidden = hidden.float() if self.operations.fp32_activations else hidden
        ropes = {  # two of [B, S, D] per kind of layer
            key: (cos[batch.slots].to(hidden.dtype), sin[batch.slots].to(hidden.dtype))
            for key, (cos, sin) in cache.rope.items()
        }
        for start, length in batch.spans:
            self.usage.saw(start, length)
        operations = self.operations
        parallel = any(branch.parallel for branch in self.branches)
        source = hidden
        for branch in self.branches:
            if not branch.parallel:
                source = hidden.clone() if parallel else hidden
            threshold = thresholds_at(thresholds, branch.index)
            args = (branch, hidden, ropes, cache, batch, threshold)
            done = None if parallel else operations.add_branch(*args)
            if isinstance(done, Tensor):
                self._note(branch, thresholds, done.sum(), done)
                continue
            if done is not None:
                self._note(branch, thresholds, done, None)
                continue
            x, logits = operations.read(branch, source)  # [B, S, H], [B, S]
            keep = self._entering(branch, x, logits, batch, threshold)  # [B, S] or None for all
            entering = batch.tokens if keep is None else keep.sum()
            self._note(branch, thresholds, entering, keep)
            entered, scale = self._scaled(branch, x, thresholds)
            if self._on_device(batch):
                self._add_to_all(branch, hidden, x, entered, ropes, cache, batch, keep, scale)
                continue
            with operations.entering(branch, batch.slots.numel()):
                if branch.kind == "mlp":
                    self._add_mlp(branch, hidden, entered, batch, keep, scale)
                else:
                    rope = ropes[branch.rope]
                    self._add_attention(branch, hidden, entered, rope, cache, batch, keep, scale)
            if keep is not None and self.gates is not None and self.gates.shortcuts is not None:
                operations.add_shortcuts(branch, hidden, x, ~keep)
        return operations.final(hidden)

    def _on_device(self, batch: Batch) -> bool:
        """Whether this is a step in which the host does not ask which tokens enter."""
        return batch.decoding and not self.on_cpu

    def _entering(
        self,
        branch: Branch,
        x: Tensor,
        logits: Tensor | None,
        batch: Batch,
        threshold: float | Tensor | None,
    ) -> Tensor | None:
        """Which tokens enter: bool [B, S], or None where all do."""
        if threshold is None:
            return batch.real
        assert self.gates is not None, "thresholds without gates"
        if logits is None:
            logits = self.gates.logit(branch.index, x)
        keep = logits >= threshold
        keep |= batch.always
        return keep if batch.real is None else keep & batch.real

    def _note(
        self, branch: Branch, thresholds: PassThresholds, count: int | Tensor, keep: Tensor | None
    ) -> None:
        """Add `count` tokens to a branch's usage: those of keep [B, S], or all."""
        self.usage.enter(branch.index, count)
        if isinstance(thresholds, RowThresholds):
            thresholds.count(branch.index, keep)

    def _scaled(
        self, branch: Branch, x: Tensor, thresholds: PassThresholds
    ) -> tuple[Tensor, Tensor | None]:
        """The branch's input, and the factor of its output: gates that scale change one of them."""
        if self.gates is None or not self.gates.scales:
            return x, None
        if thresholds is None and not self.gated:
            return x, None
        scale = self.gates.gate(branch.index, x).to(x.dtype)
        return (x * scale, None) if self.gates.place == "before" else (x, scale)

    def _add_mlp(
        self,
        branch: Branch,
        hidden: Tensor,
        x: Tensor,
        batch: Batch,
        keep: Tensor | None,
        scale: Tensor | None,
    ) -> None:
        if keep is None:
            flat = x.flatten(0, -2)
            parts = flat.split(self.operations.sizes(len(flat)))
            output = torch.cat([self.operations.mlp(branch, part) for part in parts]).view_as(x)
            hidden += output if scale is None else output * scale
            return
        for places in parts_of(keep, self.operations.sizes):
            output = self.operations.mlp(branch, rows_at(x, self._filled(places, batch)))[
                : len(places)
            ]
            output = output if scale is None else output * rows_at(scale, places)
            self.operations.add_rows(hidden, places, output)

    def _add_attention(
        self,
        branch: Branch,
        hidden: Tensor,
        x: Tensor,
        rope: tuple[Tensor, Tensor],
        cache: KVCache,
        batch: Batch,
        keep: Tensor | None,
        scale: Tensor | None,
    ) -> None:
        operations, count = self.operations, batch.slots.numel()
        if keep is None and operations.sizes(count) == [count] and not count % operations.even:
            self._add_whole_attention(branch, hidden, x, rope, cache, batch, scale)
            return
        seen = self._store(branch, x, rope, cache, batch, keep)
        attend = operations.attention(branch, seen, batch, whole=keep is None)
        keep = torch.ones_like(batch.slots, dtype=torch.bool) if keep is None else keep
        slots = seen.slots.flatten()
        for places in parts_of(keep, operations.sizes):
            gathered, at = self._gathered(x, rope, places, batch)
            queries = project_queries(branch, gathered, at, operations.steps)[0].to(self.dtype)
            counts = torch.bincount(places // keep.shape[1], minlength=len(keep)).tolist()
            mixed = attend(queries, counts, slots[places]).to(x.dtype).unsqueeze(0)
            output = operations.leave(branch, project_out(branch, mixed, operations.steps))
            output = output[0, : len(places)]
            output = output if scale is None else output * rows_at(scale, places)
            operations.add_rows(hidden, places, output)

    def _add_whole_attention(
        self,
        branch: Branch,
        hidden: Tensor,
        x: Tensor,
        rope: tuple[Tensor, Tensor],
        cache: KVCache,
        batch: Batch,
        scale: Tensor | None,
    ) -> None:
        """The same for all tokens at once: nothing is gathered, and all projections of x are one
        product where the backend has one."""
        queries, keys, values = project_inputs(branch, x, rope, self.operations.steps)
        seen = cache.store(branch.layer, batch.place, keys, values)
        attend = self.operations.attention(branch, seen, batch, whole=True)
        queries = queries.flatten(0, 1).to(self.dtype)
        mixed = attend(queries, batch.place.lengths, seen.slots.flatten()).to(x.dtype)
        mixed = mixed.view(*x.shape[:2], -1)
        output = self.operations.leave(branch, project_out(branch, mixed, self.operations.steps))
        hidden += output if scale is None else output * scale

    def _add_to_all(
        self,
        branch: Branch,
        hidden: Tensor,
        x: Tensor,
        entered: Tensor,
        ropes: Mapping[str, tuple[Tensor, Tensor]],
        cache: KVCache,
        batch: Batch,
        keep: Tensor | None,
        scale: Tensor | None,
    ) -> None:
        """A branch in a step on a device, computed for all tokens: see on_device.py. x [B, S, H] is
        its input, `entered` the same after gates that scale inputs."""
        operations = self.operations
        if branch.kind == "mlp":
            with used_rows(keep):
                output = operations.mlp(branch, entered.flatten(0, 1)).view_as(x)
        else:
            rope, shape = ropes[branch.rope], operations.shapes[branch.index]
            seen = self._store(branch, entered, rope, cache, batch, keep)
            with used_rows(keep):
                queries = project_queries(branch, entered, rope, operations.steps)
                mixed = attend_all(queries.to(self.dtype), seen, shape).to(x.dtype)
                output = operations.leave(branch, project_out(branch, mixed, operations.steps))
        output = output if scale is None else output * scale
        hidden += output if keep is None else chosen_outputs(self.gates, branch, x, output, keep)

    def _store(
        self,
        branch: Branch,
        x: Tensor,
        rope: tuple[Tensor, Tensor],
        cache: KVCache,
        batch: Batch,
        keep: Tensor | None,
    ) -> Visible:
        """Store keys and values of all tokens by the KV rule; returns the keys and values that they
        see."""
        if keep is None or self.kv_rule == "project" or branch.layer == 0:
            keys, values = project_keys_values(branch, x, rope, self.operations.steps)
            return cache.store(branch.layer, batch.place, keys, values)
        cache.copy_below(branch.layer, batch.place)
        if self._on_device(batch):
            with used_rows(keep):
                keys, values = project_keys_values(branch, x, rope, self.operations.steps)
            cache.put_where(branch.layer, batch.place, keep, keys, values)
            return cache.visible(branch.layer, batch.place)
        places = keep.flatten().nonzero().squeeze(1)  # [N]
        if not len(places):
            return cache.visible(branch.layer, batch.place)
        gathered, at = self._gathered(x, rope, places, batch)
        keys, values = project_keys_values(branch, gathered, at, self.operations.steps)
        rows = batch.place.row_index.squeeze(1)[places // keep.shape[1]]
        slots = batch.slots.flatten()[places]
        index = (rows, slice(None), slots)
        cache.put(branch.layer, index, keys[0, : len(places)], values[0, : len(places)])
        return cache.visible(branch.layer, batch.place)

    # -- gathering ------------------------------------------------------------------------------

    def _filled(self, places: Tensor, batch: Batch) -> Tensor:
        """The same places, filled up to a size that products know; decoding takes any size."""
        return places if batch.decoding else filled(places, self.operations.even)

    def _gathered(
        self, x: Tensor, rope: tuple[Tensor, Tensor], places: Tensor, batch: Batch
    ) -> tuple[Tensor, tuple[Tensor, Tensor]]:
        """x [1, N, H] and the rope, two of [1, N, D], of the tokens at flat places."""
        chosen = self._filled(places, batch)
        cos, sin = (rows_at(part, chosen).unsqueeze(0) for part in rope)
        return rows_at(x, chosen).unsqueeze(0), (cos, sin)


@dataclass(frozen=True)
class Batch:
    """The tokens [B, S] of one pass."""

    place: Place
    real: Tensor | None  # [B, S], None when nothing is padding
    always: Tensor  # [B, S]: the tokens that enter every branch
    tokens: int
    spans: tuple[tuple[int, int], ...]  # of each row: its first position, and its real tokens
    from_zero: bool
    decoding: bool

    @property
    def slots(self) -> Tensor:
        """Positions [B, S]."""
        return self.place.slots

    @cached_property
    def entering(self) -> Tensor:
        """For each token an Entering, uint8 [B, S]."""
        entering = self.always.to(torch.uint8) + Entering.BY_GATE
        return entering if self.real is None else entering * self.real

    @classmethod
    def of(
        cls,
        input_ids: Tensor,
        starts: Sequence[int],
        lengths: Sequence[int] | None = None,
        rows: tuple[int, ...] | None = None,
        decoding: bool = False,
        full_from: Sequence[int] | None = None,
    ) -> Batch:
        """Rows of input_ids [B, S] begin at `starts` and have `lengths` real tokens, which enter
        every branch from column `full_from` on."""
        count, columns = input_ids.shape
        lengths = [columns] * count if lengths is None else lengths
        device = input_ids.device
        steps = torch.arange(columns, device=device)
        first = to_device(starts, device).unsqueeze(1)
        padded = min(lengths) < columns
        real = steps < to_device(lengths, device).unsqueeze(1)
        same = rows is None and len(set(starts)) == 1
        always = first + steps < ANCHORS
        if full_from is not None:
            always |= steps >= to_device(full_from, device).unsqueeze(1)
        return cls(
            place=Place(
                slots=first + steps,
                rows=rows,
                together=slice(starts[0], starts[0] + columns) if same else None,
                used=max(starts) + columns,
                lengths=tuple(lengths),
                starts=tuple(starts),
            ),
            real=real if padded else None,
            always=always,
            tokens=sum(lengths),
            spans=tuple(zip(starts, lengths, strict=True)),
            from_zero=not any(starts) and not padded,
            decoding=decoding,
        )


def thresholds_at(thresholds: PassThresholds, branch: int) -> float | Tensor | None:
    """The threshold of a branch's gate logits: a number, or [rows, 1]; None where every token
    enters."""
    if thresholds is None:
        return None
    if isinstance(thresholds, RowThresholds):
        by_row = thresholds.values[:, branch : branch + 1]
        if by_row.device.type != "cpu":  # the host does not ask
            return by_row
        return None if bool((by_row == NEVER_SKIP).all()) else by_row
    return None if thresholds[branch] == NEVER_SKIP else thresholds[branch]


def rows_at(x: Tensor, places: Tensor) -> Tensor:
    """Rows of x [B, S, N] at flat places [K] -> [K, N]; ten times as fast as x[places]."""
    return x.flatten(0, 1).index_select(0, places)


def attention_shapes(model: Any) -> dict[int, AttentionShape]:
    """The sizes of every attention branch, by its index."""
    return {
        b.index: attention_shape(model, b) for b in find_branches(model) if b.kind == "attention"
    }


def parts_of(keep: Tensor, sizes: Callable[[int], list[int]]) -> Iterator[Tensor]:
    """Flat places [N] of the tokens that keep [B, S] marks, a part at a time."""
    places = keep.flatten().nonzero().squeeze(1)
    return (part for part in places.split(sizes(len(places))) if len(part))


def filled(places: Tensor, even: int = EVEN) -> Tensor:
    """Indices [N] of gathered rows, the last one repeated until `even` divides their number."""
    missing = -len(places) % even
    return torch.cat((places, places[-1:].expand(missing))) if missing else places
