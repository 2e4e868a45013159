"""The backend `gathered`: torch on any device; a branch is computed for the tokens that enter it.

What a skipped token gets instead is nothing, or a shortcut where the gates have them. The tokens
that enter are gathered, run, and added back. Rows of different lengths share a batch without a
padding mask, since a cache is indexed by position, and a prompt may come in chunks.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from copy import deepcopy
from dataclasses import dataclass
from functools import cached_property, partial
from typing import Any

import torch
from torch import Tensor

from gateskip.gates.base import Gates
from gateskip.kernels.abi import Entering
from gateskip.model.compute import Usage
from gateskip.model.families import Branch, embed, final_norm, find_branches, head
from gateskip.model.gating import ANCHORS, NEVER_SKIP
from gateskip.model.projections import (
    BY_TORCH,
    Steps,
    attention_shape,
    project_inputs,
    project_keys_values,
    project_out,
    project_queries,
)
from gateskip.quantization.formats import has_packed, weight_format
from gateskip.quantization.packed_linear import streaming
from gateskip.runtime.attention import attend_padded, attend_rows
from gateskip.runtime.backend import Arithmetic, BackendName, PassThresholds, dtype_name
from gateskip.runtime.budget_control import RowThresholds
from gateskip.runtime.kv_cache import SCALE_BYTES, KVCache, KVFormat, Place, Visible, slots_of
from gateskip.runtime.sizes import EVEN, few_sizes, filled

Attend = Callable[[Tensor, Sequence[int], Tensor], Tensor]
"""(queries [N, heads, D], how many a row, their slots [N]) -> [N, heads * D]."""


class GatheredBackend:
    """A causal LM of a supported architecture, `gates` its gates or None: see `Backend`."""

    name: BackendName = "gathered"
    fp32_activations = False  # whether prompts pass in float32 though the weights are bfloat16

    def __init__(self, model: Any, gates: Gates | None = None, kv_rule: str = "project") -> None:
        self.model, self.gates, self.kv_rule = model, gates, kv_rule
        self.norm = final_norm(model)
        self.dtype: torch.dtype = self.norm.weight.dtype
        self.device: torch.device = self.norm.weight.device
        self.shortcuts = None if gates is None else gates.shortcuts
        if self.shortcuts is not None:  # in the model's type once, not at every branch
            self.shortcuts = deepcopy(self.shortcuts).to(self.dtype)
        self.branches = find_branches(model)
        self.shapes = {
            b.index: attention_shape(model, b) for b in self.branches if b.kind == "attention"
        }
        self.usage = Usage.of(model)
        self.gated = True
        self.kv_cache: KVFormat = "model"

    def arithmetic(self, scoring: bool = False) -> Arithmetic:
        """torch multiplies with activations of the model's own type; packed weights are unpacked
        for prompts and meet activations in float32 in decoding."""
        packed = has_packed(self.model) and not scoring
        activations = "float32" if packed else dtype_name(self.dtype)
        return Arithmetic(self.name, weight_format(self.model), activations, "float32")

    # -- the cache ------------------------------------------------------------------------------

    def new_cache(self, batch: int, capacity: int) -> KVCache:
        """An empty KV cache. Raises ValueError where the model has fewer positions."""
        limit = self.model.config.max_position_embeddings
        if capacity > limit:
            raise ValueError(f"{capacity} tokens do not fit: the model has {limit} positions")
        sizes = self._cache_sizes(batch, capacity)
        windows = [shape.window for shape in self.shapes.values()]
        positions = self._positions(capacity)
        return KVCache.empty(self.model, sizes, positions, windows, self.kv_cache)

    def cache_bytes(self, batch: int, capacity: int) -> int:
        """What `new_cache` takes, in bytes."""
        sizes = self._cache_sizes(batch, capacity)
        if self.kv_cache == "model":
            return sum(map(math.prod, sizes)) * self.dtype.itemsize
        return sum(math.prod(size) + SCALE_BYTES * math.prod(size[:3]) for size in sizes)

    def _cache_sizes(self, batch: int, capacity: int) -> list[tuple[int, ...]]:
        """[B, kv_heads, slots, D] of every layer's keys, then of its values. Under the KV rule
        `copy` a layer's slots are those of the one below."""
        positions = self._positions(capacity)
        windowed = self.kv_rule != "copy"
        return [
            (batch, s.kv_heads, slots_of(s.window if windowed else None, positions), s.head_dim)
            for s in self.shapes.values()
            for _ in range(2)
        ]

    def _positions(self, capacity: int) -> int:
        """Positions of a cache for `capacity` tokens: aligned, where the model has as many."""
        limit: int = self.model.config.max_position_embeddings
        return max(capacity, min(capacity + -capacity % EVEN, limit))

    # -- the two phases -------------------------------------------------------------------------

    def prompt(
        self,
        input_ids: Tensor,
        cache: KVCache,
        starts: Sequence[int],
        thresholds: PassThresholds = None,
        lengths: Sequence[int] | None = None,
        rows: Sequence[int] | None = None,
        full_from: Sequence[int] | None = None,
    ) -> Tensor:
        """See `Backend.prompt`."""
        some = None if rows is None else tuple(rows)
        batch = Batch.of(input_ids, starts, lengths, some, full_from=full_from)
        return self.final(self._run(input_ids, cache, batch, thresholds))

    def decode(
        self,
        tokens: Sequence[Sequence[int]],
        cache: KVCache,
        rows: Sequence[int],
        starts: Sequence[int],
        thresholds: PassThresholds = None,
    ) -> Tensor:
        """See `Backend.decode`: all rows in one pass, padded to the one with most tokens."""
        lengths = [len(own) for own in tokens]
        ids = torch.zeros(len(tokens), max(lengths), dtype=torch.long)
        for number, own in enumerate(tokens):
            ids[number, : len(own)] = torch.tensor(list(own))
        ids = ids.to(self.device)
        some = None if list(rows) == list(range(cache.batch)) else tuple(rows)
        batch = Batch.of(ids, starts, lengths, some, decoding=True)
        with streaming():
            hidden = self.final(self._run(ids, cache, batch, thresholds))
        return hidden.flatten(0, 1) if batch.real is None else hidden[batch.real]

    def logits(self, hidden: Tensor) -> Tensor:
        """See `Backend.logits`."""
        with streaming():
            return self.scores(hidden)

    def scores(self, hidden: Tensor) -> Tensor:
        """See `Backend.scores`."""
        return head(self.model, hidden.to(self.dtype))

    # -- one pass -------------------------------------------------------------------------------

    def _run(
        self, input_ids: Tensor, cache: KVCache, batch: Batch, thresholds: PassThresholds
    ) -> Tensor:
        """Token ids [B, S] -> the last layer's states [B, S, H], to which branches add in place."""
        cache.begin(batch.place.row_numbers, *zip(*batch.spans, strict=True))
        hidden = embed(self.model, input_ids)
        hidden = hidden.float() if self.fp32_activations else hidden
        ropes = {  # two of [B, S, D] a kind of layer
            key: (cos[batch.slots].to(hidden.dtype), sin[batch.slots].to(hidden.dtype))
            for key, (cos, sin) in cache.rope.items()
        }
        for start, length in batch.spans:
            self.usage.saw(start, length)
        parallel = any(branch.parallel for branch in self.branches)
        source = hidden
        for branch in self.branches:
            if not branch.parallel:
                source = hidden.clone() if parallel else hidden
            least = limits_of(thresholds, branch.index)
            args = (branch, hidden, ropes, cache, batch, least)
            count = None if parallel else self.add_branch(*args)
            if count is not None:
                self._note(branch, thresholds, count, None)
                continue
            x, logits = self.read(branch, source)  # [B, S, H], [B, S]
            keep = self._kept(branch, x, logits, batch, least)  # [B, S] or None for all
            self._note(branch, thresholds, batch.tokens if keep is None else int(keep.sum()), keep)
            entered, scale = self._scaled(branch, x, thresholds)
            with self.entering(branch, batch.slots.numel()):
                if branch.kind == "mlp":
                    self._add_mlp(branch, hidden, entered, batch, keep, scale)
                else:
                    rope = ropes[branch.rope]
                    self._add_attention(branch, hidden, entered, rope, cache, batch, keep, scale)
            if keep is not None and self.shortcuts is not None:
                self.add_shortcuts(branch, hidden, x, ~keep)
        return hidden

    def _kept(
        self,
        branch: Branch,
        x: Tensor,
        logits: Tensor | None,
        batch: Batch,
        least: float | Tensor | None,
    ) -> Tensor | None:
        """Which tokens enter: bool [B, S], or None where all do."""
        if least is None:
            return batch.real
        assert self.gates is not None, "thresholds without gates"
        if logits is None:
            logits = self.gates.logit(branch.index, x)
        keep = logits >= least
        keep |= batch.always
        return keep if batch.real is None else keep & batch.real

    def _note(
        self, branch: Branch, thresholds: PassThresholds, count: int, keep: Tensor | None
    ) -> None:
        """Count that so many tokens enter a branch: those of keep [B, S], or all."""
        self.usage.kept[branch.index] += count
        if isinstance(thresholds, RowThresholds):
            thresholds.count(branch.index, keep)

    def _scaled(
        self, branch: Branch, x: Tensor, thresholds: PassThresholds
    ) -> tuple[Tensor, Tensor | None]:
        """What the branch reads, and what multiplies its output: gates that scale do either."""
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
            parts = flat.split(self.sizes(len(flat)))
            output = torch.cat([self.mlp(branch, part) for part in parts]).view_as(x)
            hidden += output if scale is None else output * scale
            return
        for kept in self._parts(keep):
            output = self.mlp(branch, rows_at(x, self._filled(kept, batch)))[: len(kept)]
            output = output if scale is None else output * rows_at(scale, kept)
            self.add_rows(hidden, kept, output)

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
        count = batch.slots.numel()
        if keep is None and self.sizes(count) == [count] and not count % self.even:
            self._add_whole_attention(branch, hidden, x, rope, cache, batch, scale)
            return
        seen = self._store(branch, x, rope, cache, batch, keep)
        attend = self.attention(branch, seen, batch, whole=keep is None)
        keep = torch.ones_like(batch.slots, dtype=torch.bool) if keep is None else keep
        slots = seen.slots.flatten()
        for kept in self._parts(keep):
            own, at = self._gathered(x, rope, kept, batch)
            queries = project_queries(branch, own, at, self.steps)[0].to(self.dtype)
            counts = torch.bincount(kept // keep.shape[1], minlength=len(keep)).tolist()
            mixed = attend(queries, counts, slots[kept]).to(x.dtype).unsqueeze(0)
            output = self.leave(branch, project_out(branch, mixed, self.steps))[0, : len(kept)]
            output = output if scale is None else output * rows_at(scale, kept)
            self.add_rows(hidden, kept, output)

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
        queries, keys, values = project_inputs(branch, x, rope, self.steps)
        seen = cache.store(branch.layer, batch.place, keys, values)
        attend = self.attention(branch, seen, batch, whole=True)
        queries = queries.flatten(0, 1).to(self.dtype)
        mixed = attend(queries, batch.place.lengths, seen.slots.flatten()).to(x.dtype)
        mixed = mixed.view(*x.shape[:2], -1)
        output = self.leave(branch, project_out(branch, mixed, self.steps))
        hidden += output if scale is None else output * scale

    def _store(
        self,
        branch: Branch,
        x: Tensor,
        rope: tuple[Tensor, Tensor],
        cache: KVCache,
        batch: Batch,
        keep: Tensor | None,
    ) -> Visible:
        """Keep keys and values of all tokens, by the KV rule: what they see then."""
        if keep is None or self.kv_rule == "project" or branch.layer == 0:
            keys, values = project_keys_values(branch, x, rope, self.steps)
            return cache.store(branch.layer, batch.place, keys, values)
        cache.copy_below(branch.layer, batch.place)
        kept = keep.flatten().nonzero().squeeze(1)  # [N]
        if not len(kept):
            return cache.visible(branch.layer, batch.place)
        own, at = self._gathered(x, rope, kept, batch)
        keys, values = project_keys_values(branch, own, at, self.steps)
        rows = batch.place.row_index.squeeze(1)[kept // keep.shape[1]]
        slots = batch.slots.flatten()[kept]
        index = (rows, slice(None), slots)
        cache.put(branch.layer, index, keys[0, : len(kept)], values[0, : len(kept)])
        return cache.visible(branch.layer, batch.place)

    # -- gathering ------------------------------------------------------------------------------

    def _parts(self, keep: Tensor) -> Iterator[Tensor]:
        """Flat places [N] of the tokens that keep [B, S] marks, a part at a time."""
        places = keep.flatten().nonzero().squeeze(1)
        return (part for part in places.split(self.sizes(len(places))) if len(part))

    def _filled(self, kept: Tensor, batch: Batch) -> Tensor:
        """The same places, filled up to a size that products know; decoding takes any."""
        return kept if batch.decoding else filled(kept, self.even)

    def _gathered(
        self, x: Tensor, rope: tuple[Tensor, Tensor], kept: Tensor, batch: Batch
    ) -> tuple[Tensor, tuple[Tensor, Tensor]]:
        """x [1, N, H] and the rope, two of [1, N, D], of the tokens at flat places."""
        chosen = self._filled(kept, batch)
        cos, sin = (rows_at(part, chosen).unsqueeze(0) for part in rope)
        return rows_at(x, chosen).unsqueeze(0), (cos, sin)

    # -- what another backend does in its own way -----------------------------------------------

    @property
    def even(self) -> int:
        """What divides gathered rows: oneDNN compiles bfloat16's products for each size."""
        return EVEN if self.device.type == "cpu" else 1

    def sizes(self, count: int) -> list[int]:
        """Sizes of the parts in which `count` tokens enter a branch."""
        return few_sizes(count)

    def add_branch(
        self,
        branch: Branch,
        hidden: Tensor,
        ropes: Mapping[str, tuple[Tensor, Tensor]],
        cache: KVCache,
        batch: Batch,
        least: float | Tensor | None,
    ) -> int | None:
        """hidden [B, S, H] += a branch, in place: norms, gate, cache and shortcuts in one. How many
        tokens entered, or None where that was not done; rows with thresholds of their own have
        every token enter a branch that is."""
        return None

    def entering(self, branch: Branch, tokens: int) -> AbstractContextManager[None]:
        """A context around a branch that some of `tokens` enter."""
        return nullcontext()

    @property
    def steps(self) -> Steps:
        """How an attention branch's projections are computed."""
        return BY_TORCH

    def read(self, branch: Branch, hidden: Tensor) -> tuple[Tensor, Tensor | None]:
        """What a branch reads, and its gate's logits where they come for nothing with it."""
        return branch.enter(hidden), None

    def final(self, hidden: Tensor) -> Tensor:
        """The norm before the LM head."""
        return self.norm(hidden)  # type: ignore[no-any-return]

    def mlp(self, branch: Branch, x: Tensor) -> Tensor:
        """What an MLP branch adds to tokens x [N, H]."""
        return self.leave(branch, branch.module(x))

    def leave(self, branch: Branch, output: Tensor) -> Tensor:
        """What a branch adds, of its module's output [..., H]: the norm after it, if any."""
        return branch.leave(output)

    def attention(self, branch: Branch, seen: Visible, batch: Batch, whole: bool) -> Attend:
        """Attention of a branch over what its tokens see; `whole` says that every token of the
        batch enters."""
        kv, rows, shape = seen.kv, seen.rows, self.shapes[branch.index]
        if self.device.type == "cpu":
            return partial(attend_rows, kv=kv, shape=shape, rows=rows)
        from_zero = whole and batch.from_zero and shape.window is None
        return partial(attend_padded, kv=kv, shape=shape, rows=rows, from_zero=from_zero)

    def add_rows(self, hidden: Tensor, places: Tensor, added: Tensor) -> None:
        """hidden [B, S, H] at flat places [N] += added [N, H], in place."""
        hidden.view(-1, hidden.shape[-1]).index_add_(0, places, added.to(hidden.dtype))

    def add_shortcuts(self, branch: Branch, hidden: Tensor, x: Tensor, skip: Tensor) -> None:
        """hidden [B, S, H] where `skip` [B, S], padding among it, += what the branch's shortcut
        makes of x [B, S, H], in place."""
        assert self.shortcuts is not None
        for places in self._parts(skip):
            chosen = filled(places, self.even) if len(places) >= self.even else places
            instead = self.shortcuts(branch.index, rows_at(x, chosen))
            self.add_rows(hidden, places, instead[: len(places)])


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
        """Of each token an Entering, uint8 [B, S]."""
        found = self.always.to(torch.uint8) + Entering.BY_GATE
        return found if self.real is None else found * self.real

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
        steps = torch.arange(columns, device=input_ids.device)
        first = torch.tensor(list(starts), device=input_ids.device).unsqueeze(1)
        padded = min(lengths) < columns
        real = steps < torch.tensor(list(lengths), device=input_ids.device).unsqueeze(1)
        same = rows is None and len(set(starts)) == 1
        always = first + steps < ANCHORS
        if full_from is not None:
            always |= steps >= torch.tensor(list(full_from), device=always.device).unsqueeze(1)
        return cls(
            place=Place(
                slots=first + steps,
                rows=rows,
                together=slice(starts[0], starts[0] + columns) if same else None,
                used=max(starts) + columns,
                lengths=tuple(lengths),
            ),
            real=real if padded else None,
            always=always,
            tokens=sum(lengths),
            spans=tuple(zip(starts, lengths, strict=True)),
            from_zero=not any(starts) and not padded,
            decoding=decoding,
        )


def limits_of(thresholds: PassThresholds, branch: int) -> float | Tensor | None:
    """What a gate's logits must reach: a number, or [rows, 1]; None where every token enters."""
    if thresholds is None:
        return None
    if isinstance(thresholds, RowThresholds):
        own = thresholds.values[:, branch : branch + 1]
        return None if bool((own == NEVER_SKIP).all()) else own
    return None if thresholds[branch] == NEVER_SKIP else thresholds[branch]


def rows_at(x: Tensor, places: Tensor) -> Tensor:
    """Rows of x [B, S, N] at flat places [K] -> [K, N]; ten times as fast as x[places]."""
    return x.flatten(0, 1).index_select(0, places)
