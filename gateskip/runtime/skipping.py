"""Physical skipping: a branch a token does not enter is not computed for it.

What it gets instead is nothing, or a shortcut where the gates have them. With many tokens the kept
ones are gathered, run, and added back; with one token a skipped branch is not entered at all. Both
write one cache, in which the slot number is the token's position. So rows of different lengths
share a batch without a padding mask, a prefill may come in chunks, and cutting rejected drafts is
forgetting a number.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from copy import deepcopy
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from torch import Tensor, nn

from gateskip.gates.base import Gates
from gateskip.kernels.autotune import bfloat16_is_faster
from gateskip.model.compute import Usage
from gateskip.model.families import (
    AttentionShape,
    Branch,
    Turn,
    attention_shape,
    embed,
    final_norm,
    find_branches,
    head,
    project_keys_values,
    project_out,
    project_queries,
)
from gateskip.model.gating import ANCHORS, NEVER_SKIP
from gateskip.model.reference import attend, causal
from gateskip.quantization.packed_linear import DenseLinear
from gateskip.runtime.gathered import EVEN, attend_rows, equal_sizes, few_sizes, filled
from gateskip.runtime.kv_cache import KVCache
from gateskip.runtime.native import MOST_ROWS, Engine

Thresholds = Sequence[float] | None
KV_RULES = ("project", "copy")
VERIFY_ROWS = 17  # longest verify pass: sixteen drafted tokens and the one before them


class SkippingModel:
    """A causal LM whose branches can be skipped, with a KV cache.

    `model` is a transformers causal LM of a supported architecture, `gates` its gates or None.
    Thresholds are one number a branch: a token enters where its gate logit reaches it. Without
    thresholds every token enters every branch, unscaled, so the result is the model's own.
    """

    def __init__(self, model: Any, gates: Gates | None = None, kv_rule: str = "project"):
        if kv_rule not in KV_RULES:
            raise ValueError(f"kv_rule {kv_rule!r}: one of {', '.join(KV_RULES)}")
        self.model = model
        self.gates = gates
        self.shortcuts = None if gates is None else gates.shortcuts
        if self.shortcuts is not None:  # in the model's type once, not at every branch
            kind = final_norm(model).weight.dtype
            self.shortcuts = deepcopy(self.shortcuts).to(kind)
        self.kv_rule = kv_rule
        if gates is not None:
            gates.attach(model)
        self.branches = find_branches(model)
        self.shapes = {
            b.index: attention_shape(model, b.module)
            for b in self.branches
            if b.kind == "attention"
        }
        self.usage = Usage.empty(len(self.branches))
        self.engine: Engine | None = None
        self.gated = True  # whether gates that scale do so at full compute, too
        self.norm = final_norm(model)
        self.dtype: torch.dtype = self.norm.weight.dtype
        self.device: torch.device = self.norm.weight.device

    @cached_property
    def wide(self) -> bool:
        """Whether prompts pass through in float32 though the weights are bfloat16: where that is
        multiplied faster. Decoding by the engine does so anyway."""
        if self.engine is None or self.dtype != torch.bfloat16 or bfloat16_is_faster():
            return False
        return not any(
            type(part) is nn.Linear for b in self.branches for part in b.module.modules()
        )

    @contextmanager
    def _widened(self, branch: Branch, tokens: int) -> Iterator[None]:
        """Within this context a branch that several parts of `tokens` enter has its weights in
        float32, if the model is `wide`."""
        with ExitStack() as stack:
            again = self.wide and len(equal_sizes(tokens)) > 1
            for part in branch.module.modules() if again else ():
                if isinstance(part, DenseLinear):
                    stack.enter_context(part.widened())
            yield

    def new_cache(self, batch: int, capacity: int) -> KVCache:
        """An empty cache for `batch` rows of at most `capacity` tokens."""
        limit = self.model.config.max_position_embeddings
        if capacity > limit:
            raise ValueError(f"{capacity} tokens do not fit: the model has {limit} positions")
        return KVCache.empty(self.model, self._cache_sizes(batch, capacity))

    def cache_bytes(self, batch: int, capacity: int) -> int:
        """What `new_cache` takes, in bytes."""
        return sum(map(math.prod, self._cache_sizes(batch, capacity))) * self.dtype.itemsize

    def _cache_sizes(self, batch: int, capacity: int) -> list[tuple[int, ...]]:
        """[B, kv_heads, slots, D] of every layer's keys, then of its values; aligned rows."""
        limit: int = self.model.config.max_position_embeddings
        slots = max(capacity, min(capacity + -capacity % EVEN, limit))
        shapes = self.shapes.values()
        return [(batch, s.kv_heads, slots, s.head_dim) for s in shapes for _ in range(2)]

    def head(self, hidden: Tensor) -> Tensor:
        """Final hidden states [..., H] -> logits [..., V]."""
        flat = hidden.flatten(0, -2)
        if self.engine is not None and len(flat) <= MOST_ROWS:
            return self.engine.logits(flat).view(*hidden.shape[:-1], -1)
        return head(self.model, hidden.to(self.dtype))

    @torch.inference_mode()
    def forward(
        self,
        input_ids: Tensor,
        cache: KVCache,
        starts: Sequence[int],
        thresholds: Thresholds = None,
        lengths: Sequence[int] | None = None,
    ) -> Tensor:
        """Run input_ids [B, S] whose rows begin at positions `starts` -> final hidden [B, S, H].

        `lengths` gives the real tokens of right-padded rows; outputs at pads are undefined.
        """
        hidden = embed(self.model, input_ids)
        rows, columns = input_ids.shape
        few = rows * columns <= MOST_ROWS and 1 in (rows, columns)
        if self.engine is not None and few and min(starts) > 0 and lengths is None:
            return self._natively(hidden, cache, starts, thresholds)
        if input_ids.numel() == 1:
            hidden = self._one_token(hidden, cache, starts[0], thresholds)
        else:
            batch = _Batch.of(input_ids, starts, lengths)
            hidden = self._many_tokens(hidden, cache, batch, thresholds)
        return self._final(hidden)

    def _final(self, hidden: Tensor) -> Tensor:
        """The norm before the LM head."""
        engine = self._engine_for(hidden)
        return self.norm(hidden) if engine is None else engine.final(hidden)

    def _engine_for(self, hidden: Tensor) -> Engine | None:
        """The engine, if there is one that knows states of this type."""
        return self.engine if hidden.dtype in (self.dtype, torch.float32) else None

    def _natively(
        self,
        hidden: Tensor,
        cache: KVCache,
        starts: Sequence[int],
        thresholds: Thresholds,
    ) -> Tensor:
        """Embeddings [B, S, H] with B or S 1, in one call of the engine."""
        rows, columns = hidden.shape[:2]
        cache_rows = [row for row in range(rows) for _ in range(columns)]
        slots = [start + step for start in starts for step in range(columns)]
        out = self._engine_step(hidden.flatten(0, 1), cache, cache_rows, slots, thresholds)
        return out.view_as(hidden)

    def _engine_step(
        self,
        hidden: Tensor,
        cache: KVCache,
        cache_rows: Sequence[int],
        slots: Sequence[int],
        thresholds: Thresholds,
    ) -> Tensor:
        """Embeddings [N, H] of tokens at `slots` of `cache_rows` -> final states [N, H]."""
        assert self.engine is not None
        out = self.engine.step(hidden, cache, cache_rows, slots, thresholds)
        self._count(slots, self.engine.kept.tolist())
        return out

    def _count(self, slots: Sequence[int], kept: list[int]) -> None:
        self.usage.seen += len(slots)
        self.usage.context += sum(slots) + len(slots)
        self.usage.kept = [a + b for a, b in zip(self.usage.kept, kept, strict=True)]

    @torch.inference_mode()
    def draft(
        self,
        token: int,
        count: int,
        wanted: tuple[float, Sequence[float]],
        place: tuple[KVCache, int, int],
        thresholds: Thresholds,
    ) -> tuple[list[int], list[float]]:
        """Tokens that greedily follow `token`, in one call of the engine: see Engine.draft."""
        assert self.engine is not None
        found = self.engine.draft(token, count, wanted, place, thresholds)
        slot = place[-1]
        self._count(range(slot, slot + len(found[0])), self.engine.kept.tolist())
        return found

    @torch.inference_mode()
    def ragged(
        self,
        tokens: Sequence[Sequence[int]],
        cache: KVCache,
        rows: Sequence[int],
        starts: Sequence[int],
        thresholds: Thresholds = None,
    ) -> list[Tensor]:
        """Continue some `rows` of a cache, each by tokens of its own -> final hidden [n, H] each.

        Row i's tokens stand at positions `starts[i]` and on; every row has begun before.
        """
        if self.engine is None or min(starts) == 0:
            parts = zip(tokens, rows, starts, strict=True)
            return [
                self.forward(
                    torch.tensor([list(ids)], device=self.device),
                    cache.row(row),
                    [start],
                    thresholds,
                )[0]
                for ids, row, start in parts
            ]
        counts = [len(ids) for ids in tokens]
        flat = torch.tensor([token for ids in tokens for token in ids])
        cache_rows = [row for row, n in zip(rows, counts, strict=True) for _ in range(n)]
        slots = [start + i for start, n in zip(starts, counts, strict=True) for i in range(n)]
        hidden = embed(self.model, flat)
        done = []
        for first in range(0, len(flat), MOST_ROWS):
            part = slice(first, first + MOST_ROWS)
            done.append(
                self._engine_step(hidden[part], cache, cache_rows[part], slots[part], thresholds)
            )
        return list(torch.cat(done).split(counts))

    # -- one token: enter the branch or do not ------------------------------------------------

    def _one_token(
        self, hidden: Tensor, cache: KVCache, slot: int, thresholds: Thresholds
    ) -> Tensor:
        ropes = {
            key: (cos[slot : slot + 1], sin[slot : slot + 1])  # [1, D]
            for key, (cos, sin) in cache.rope.items()
        }
        self.usage.seen += 1
        self.usage.context += slot + 1
        source = hidden
        for branch in self.branches:
            source = source if branch.parallel else hidden
            x = branch.enter(source)  # [1, 1, H]
            entered, scale = self._scaled(branch, x, thresholds)
            if slot >= ANCHORS and not self._enters(branch, x, thresholds):
                if branch.kind == "attention":
                    self._skip_attention_once(branch, entered, ropes[branch.rope], cache, slot)
                if self.shortcuts is not None:
                    hidden = hidden + self.shortcuts(branch.index, x)
                continue
            self.usage.kept[branch.index] += 1
            if branch.kind == "mlp":
                output = branch.leave(branch.module(entered))
            else:
                output = self._enter_attention_once(
                    branch, entered, ropes[branch.rope], cache, slot
                )
            hidden = hidden + (output if scale is None else output * scale)
        return hidden

    def _scaled(
        self, branch: Branch, x: Tensor, thresholds: Thresholds
    ) -> tuple[Tensor, Tensor | None]:
        """What the branch reads, and what multiplies its output: gates that scale do either."""
        if self.gates is None or not self.gates.scales:
            return x, None
        if thresholds is None and not self.gated:
            return x, None
        scale = self.gates.gate(branch.index, x).to(x.dtype)
        return (x * scale, None) if self.gates.place == "before" else (x, scale)

    def _enter_attention_once(
        self, branch: Branch, x: Tensor, rope: tuple[Tensor, Tensor], cache: KVCache, slot: int
    ) -> Tensor:
        self._store_once(branch, x, rope, cache, slot)
        queries = project_queries(branch.module, x, rope)[0, 0]
        mixed = self._attend_one(branch, queries, cache, slot).view(1, 1, -1)
        return branch.leave(project_out(branch.module, mixed))

    def _enters(self, branch: Branch, x: Tensor, thresholds: Thresholds) -> bool:
        if thresholds is None or thresholds[branch.index] == NEVER_SKIP:
            return True
        assert self.gates is not None, "thresholds without gates"
        return self.gates.logit(branch.index, x).item() >= thresholds[branch.index]

    def _skip_attention_once(
        self, branch: Branch, x: Tensor, rope: tuple[Tensor, Tensor], cache: KVCache, slot: int
    ) -> None:
        if self.kv_rule == "project" or branch.layer == 0:
            self._store_once(branch, x, rope, cache, slot)
            return
        for store in (cache.keys, cache.values):
            store[branch.layer][0, :, slot] = store[branch.layer - 1][0, :, slot]

    def _store_once(
        self, branch: Branch, x: Tensor, rope: tuple[Tensor, Tensor], cache: KVCache, slot: int
    ) -> None:
        keys, values = project_keys_values(branch.module, x, rope)  # [1, 1, kv_heads, D]
        cache.keys[branch.layer][0, :, slot] = keys[0, 0]
        cache.values[branch.layer][0, :, slot] = values[0, 0]

    def _attend_one(self, branch: Branch, queries: Tensor, cache: KVCache, slot: int) -> Tensor:
        """Attention of one token, queries [heads, D], over slots up to its own -> [heads * D]."""
        shape = self.shapes[branch.index]
        first = 0 if shape.window is None else max(0, slot + 1 - shape.window)
        keys = cache.keys[branch.layer][0, :, first : slot + 1]  # [kv_heads, T, D]
        values = cache.values[branch.layer][0, :, first : slot + 1]
        grouped = queries.view(shape.kv_heads, -1, shape.head_dim) * shape.scaling
        scores = torch.bmm(grouped, keys.transpose(1, 2))  # [kv_heads, group, T]
        if shape.softcap is not None:
            scores = torch.tanh(scores / shape.softcap) * shape.softcap
        weights = scores.float().softmax(-1).to(values.dtype)
        return torch.bmm(weights, values).flatten()

    # -- many tokens: gather, run, add back ---------------------------------------------------

    def _many_tokens(
        self, hidden: Tensor, cache: KVCache, batch: _Batch, thresholds: Thresholds
    ) -> Tensor:
        """Embeddings [B, S, H], to which branches add in place -> the last layer's states."""
        hidden = hidden.float() if self.wide else hidden
        ropes = {  # two of [B, S, D] a kind of layer
            key: (cos[batch.slots].to(hidden.dtype), sin[batch.slots].to(hidden.dtype))
            for key, (cos, sin) in cache.rope.items()
        }
        self.usage.seen += batch.tokens
        self.usage.context += batch.context
        parallel = any(branch.parallel for branch in self.branches)
        source = hidden
        for branch in self.branches:
            if not branch.parallel:
                source = hidden.clone() if parallel else hidden
            x, logits = self._read(branch, source)  # [B, S, H], [B, S]
            keep = self._kept(branch, x, logits, batch, thresholds)  # [B, S] or None for all
            self.usage.kept[branch.index] += batch.tokens if keep is None else int(keep.sum())
            entered, scale = self._scaled(branch, x, thresholds)
            with self._widened(branch, batch.slots.numel()):
                if branch.kind == "mlp":
                    self._add_mlp(branch, hidden, entered, keep, scale)
                else:
                    rope = ropes[branch.rope]
                    self._add_attention(branch, hidden, entered, rope, cache, batch, keep, scale)
            if keep is not None:
                self._add_shortcuts(branch, hidden, x, ~keep)
        return hidden

    def _add_shortcuts(self, branch: Branch, hidden: Tensor, x: Tensor, skip: Tensor) -> None:
        """hidden [B, S, H] where `skip` [B, S], padding among it, += what the branch's shortcut
        makes of x [B, S, H], in place."""
        if self.shortcuts is None:
            return
        engine = self._engine_for(hidden)
        if engine is not None:
            places = skip.flatten().nonzero().squeeze(1)
            engine.add_shortcuts(branch.index, hidden, x, places)
            return
        for places in self._parts(skip):
            instead = self.shortcuts(branch.index, _rows(x, filled(places)))
            self._add_rows(hidden, places, instead[: len(places)])

    def _read(self, branch: Branch, hidden: Tensor) -> tuple[Tensor, Tensor | None]:
        """What a branch reads, and its gate's logits where they come for nothing with it."""
        engine = self._engine_for(hidden)
        return (
            (branch.enter(hidden), None) if engine is None else engine.normed(branch.index, hidden)
        )

    def _parts(self, keep: Tensor) -> Iterator[Tensor]:
        """Flat places [N] of the tokens that keep [B, S] marks, a part at a time."""
        places = keep.flatten().nonzero().squeeze(1)
        return (part for part in places.split(self._sizes(len(places))) if len(part))

    def _sizes(self, count: int) -> list[int]:
        return equal_sizes(count) if self.wide else few_sizes(count)

    @property
    def _even(self) -> int:
        """What divides gathered rows: oneDNN compiles bfloat16's products for each size."""
        return 1 if self.wide else EVEN

    def _add_rows(self, hidden: Tensor, places: Tensor, added: Tensor) -> None:
        """hidden [B, S, H] at flat places [N] += added [N, H], in place."""
        if self.engine is None or hidden.dtype != added.dtype:
            hidden.view(-1, hidden.shape[-1]).index_add_(0, places, added)
        else:
            self.engine.add_rows(hidden, places, added)

    def _turn(self) -> Turn | None:
        return None if self.engine is None else self.engine.rotate

    def _mlp(self, branch: Branch, x: Tensor) -> Tensor:
        if self.engine is None:
            return branch.leave(branch.module(x))
        return self.engine.mlp(branch.module, x)

    def _add_mlp(
        self, branch: Branch, hidden: Tensor, x: Tensor, keep: Tensor | None, scale: Tensor | None
    ) -> None:
        if keep is None:
            flat = x.flatten(0, -2)
            parts = flat.split(self._sizes(len(flat)))
            output = torch.cat([self._mlp(branch, part) for part in parts]).view_as(x)
            hidden += output if scale is None else output * scale
            return
        for kept in self._parts(keep):
            output = self._mlp(branch, _rows(x, filled(kept, self._even)))[: len(kept)]
            output = output if scale is None else output * _rows(scale, kept)
            self._add_rows(hidden, kept, output)

    def _kept(
        self,
        branch: Branch,
        x: Tensor,
        logits: Tensor | None,
        batch: _Batch,
        thresholds: Thresholds,
    ) -> Tensor | None:
        if thresholds is None or thresholds[branch.index] == NEVER_SKIP:
            return batch.real
        assert self.gates is not None, "thresholds without gates"
        if logits is None:
            logits = self.gates.logit(branch.index, x)
        keep = logits >= thresholds[branch.index]
        keep |= batch.slots < ANCHORS
        return keep if batch.real is None else keep & batch.real

    def _add_attention(
        self,
        branch: Branch,
        hidden: Tensor,
        x: Tensor,
        rope: tuple[Tensor, Tensor],
        cache: KVCache,
        batch: _Batch,
        keep: Tensor | None,
        scale: Tensor | None,
    ) -> None:
        self._store(branch, x, rope, cache, batch, keep)
        shape: AttentionShape = self.shapes[branch.index]
        attention: Any = branch.module
        if keep is None and batch.few:
            queries = project_queries(attention, x, rope)[0].to(self.dtype)  # [S, heads, D]
            first = batch.last_slot + 1 - len(queries)
            mixed = torch.stack(
                [self._attend_one(branch, q, cache, first + i) for i, q in enumerate(queries)]
            )
            output = branch.leave(project_out(attention, mixed.to(x.dtype).unsqueeze(0)))
            hidden += output if scale is None else output * scale
            return
        if self.device.type == "cpu":
            self._attend_gathered(branch, hidden, x, rope, cache, batch, keep, scale)
            return
        used = batch.last_slot + 1
        keys = cache.keys[branch.layer][:, :, :used]
        values = cache.values[branch.layer][:, :, :used]
        if keep is None:
            queries = project_queries(attention, x, rope).transpose(1, 2)
            visible = None if batch.from_zero else batch.visible(batch.slots, shape.window)
            mixed = attend(queries, keys, values, shape, visible).transpose(1, 2).flatten(-2)
            output = branch.leave(project_out(attention, mixed))
            hidden += output if scale is None else output * scale
            return
        chosen, count = _gather_index(keep)  # [B, most kept], kept a row [B]
        if chosen.shape[1] == 0:
            return
        rows = torch.arange(chosen.shape[0], device=chosen.device).unsqueeze(1)
        queries = project_queries(
            attention, x[rows, chosen], (rope[0][rows, chosen], rope[1][rows, chosen])
        )
        visible = batch.visible(batch.slots[rows, chosen], shape.window)
        mixed = attend(queries.transpose(1, 2), keys, values, shape, visible)
        real = torch.arange(chosen.shape[1], device=chosen.device) < count.unsqueeze(1)
        output = branch.leave(project_out(attention, mixed.transpose(1, 2).flatten(-2)[real]))
        hidden[keep] += output if scale is None else output * scale[keep]

    def _attend_gathered(
        self,
        branch: Branch,
        hidden: Tensor,
        x: Tensor,
        rope: tuple[Tensor, Tensor],
        cache: KVCache,
        batch: _Batch,
        keep: Tensor | None,
        scale: Tensor | None,
    ) -> None:
        """The tokens that enter, all rows' one after the other, and no pair that is masked."""
        keep = torch.ones_like(batch.slots, dtype=torch.bool) if keep is None else keep
        kv = (cache.keys[branch.layer], cache.values[branch.layer])
        shape, slots, packed = self.shapes[branch.index], batch.slots.flatten(), None
        for kept in self._parts(keep):
            chosen = filled(kept, self._even)
            cos, sin = (_rows(part, chosen).unsqueeze(0) for part in rope)
            own = _rows(x, chosen).unsqueeze(0)
            queries = project_queries(branch.module, own, (cos, sin), self._turn())[0]
            queries = queries.to(self.dtype)
            counts = torch.bincount(kept // keep.shape[1], minlength=len(keep)).tolist()
            if packed is None and self.engine is not None and self.engine.attends(queries, shape):
                packed = self.engine.pack(kv, batch.last_slot + 1)
            mixed = attend_rows(queries, counts, slots[kept], kv, shape, self.engine, packed)
            mixed = mixed.to(x.dtype).unsqueeze(0)
            output = branch.leave(project_out(branch.module, mixed))[0, : len(kept)]
            output = output if scale is None else output * _rows(scale, kept)
            self._add_rows(hidden, kept, output)

    def _store(
        self,
        branch: Branch,
        x: Tensor,
        rope: tuple[Tensor, Tensor],
        cache: KVCache,
        batch: _Batch,
        keep: Tensor | None,
    ) -> None:
        if keep is None or self.kv_rule == "project" or branch.layer == 0:
            keys, values = project_keys_values(branch.module, x, rope, self._turn())
            cache.write(branch.layer, batch.slots, batch.begin, keys, values)
            return
        cache.copy_below(branch.layer, batch.slots, batch.begin)
        kept = keep.flatten().nonzero().squeeze(1)  # [N]
        if not len(kept):
            return
        chosen = filled(kept, self._even)
        cos, sin = (_rows(part, chosen).unsqueeze(0) for part in rope)
        own = _rows(x, chosen).unsqueeze(0)
        keys, values = project_keys_values(branch.module, own, (cos, sin), self._turn())
        rows, slots = kept // keep.shape[1], batch.slots.flatten()[kept]
        cache.keys[branch.layer][rows, :, slots] = keys[0, : len(kept)].to(self.dtype)
        cache.values[branch.layer][rows, :, slots] = values[0, : len(kept)].to(self.dtype)


@dataclass(frozen=True)
class _Batch:
    """Where the tokens of one forward call stand."""

    slots: Tensor  # [B, S]
    real: Tensor | None  # [B, S], None when nothing is padding
    tokens: int
    context: int
    begin: int | None  # where all rows begin, if they begin together
    last_slot: int
    from_zero: bool
    few: bool  # a verify pass: its tokens attend one by one, as they would when decoded so

    @classmethod
    def of(cls, input_ids: Tensor, starts: Sequence[int], lengths: Sequence[int] | None) -> _Batch:
        rows, columns = input_ids.shape
        lengths = [columns] * rows if lengths is None else lengths
        steps = torch.arange(columns, device=input_ids.device)
        first = torch.tensor(starts, device=input_ids.device).unsqueeze(1)
        padded = min(lengths) < columns
        count = torch.tensor(lengths, device=input_ids.device).unsqueeze(1)
        return cls(
            slots=first + steps,
            real=steps < count if padded else None,
            tokens=sum(lengths),
            context=sum(n * s + n * (n + 1) // 2 for s, n in zip(starts, lengths, strict=True)),
            begin=starts[0] if len(set(starts)) == 1 else None,
            last_slot=max(starts) + columns - 1,
            from_zero=not any(starts) and not padded,
            few=rows == 1 and columns <= VERIFY_ROWS and starts[0] > 0,
        )

    def visible(self, queries: Tensor, window: int | None) -> Tensor:
        """Mask [B, 1, Q, T] of query positions [B, Q] over all slots in use."""
        return causal(queries, torch.arange(self.last_slot + 1, device=queries.device), window)


def _rows(x: Tensor, places: Tensor) -> Tensor:
    """Rows of x [B, S, N] at flat places [K] -> [K, N]; ten times as fast as x[places]."""
    return x.flatten(0, 1).index_select(0, places)


def _gather_index(keep: Tensor) -> tuple[Tensor, Tensor]:
    """Columns of the kept tokens, row by row, padded to the row that keeps most. keep [B, S]."""
    count = keep.sum(1)
    order = torch.argsort(~keep, dim=1, stable=True)  # kept first, in their order
    return order[:, : int(count.max())], count
