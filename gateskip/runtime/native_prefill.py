"""Prompts: what lies between matrix products, each one native pass, and products of packed
weights."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from gateskip.kernels import ops
from gateskip.kernels.abi import BLOCK, Entry, Kind, Layer, Matrix, PromptRows, PromptUnits
from gateskip.model.families import Branch
from gateskip.model.projections import AttentionShape, mlp_parts, rotate
from gateskip.runtime.buffers import Buffers
from gateskip.runtime.descriptors import Descriptors
from gateskip.runtime.kv_cache import KVCache, Place

FIELDS = {"queries": "q", "keys": "k", "values": "v", "output": "o"}  # of abi.Layer
SLOTS_TOGETHER = 32  # of keys and values that attention packs, as in simd.h
CHANNELS = 16  # what divides those of a head that it knows


class PromptKernels:
    """Norms, gates, rope, attention and activations of prompts, of any number of tokens."""

    def __init__(self, parts: Descriptors, buffers: Buffers) -> None:
        self.model, self._parts, self._buffers = parts.model, parts, buffers
        units = ops.prompt_units()
        self._known = [
            _multiplies(layer, mlp, units)
            for layer in parts.model.layer[: parts.model.layers]
            for mlp in (False, True)
        ]

    def normed(self, branch: int, x: Tensor) -> tuple[Tensor, Tensor | None]:
        """What a branch reads, its norm of hidden states x [..., H] in their own type, and its
        gate's logits [...], if it has a gate. The next call writes over the first."""
        layer, mlp = self.model.layer[branch // 2], branch % 2
        norm, gate, bias = (
            (layer.norm_mlp, layer.weight_mlp, layer.bias_mlp)
            if mlp
            else (layer.norm_attention, layer.weight_attention, layer.bias_attention)
        )
        x, out = x.contiguous(), self._buffers.take("normed", x.shape, x.dtype)
        logits = torch.empty(x.shape[:-1]) if gate else None
        ops.norm(x, norm, out, gate, bias, logits)
        return out, logits

    def left(self, branch: int, x: Tensor) -> Tensor:
        """What a branch adds, of its output x [..., H]: the norm after it, if there is one."""
        layer = self.model.layer[branch // 2]
        norm = layer.after_mlp if branch % 2 else layer.after_attention
        if not norm.weight:
            return x
        x, out = x.contiguous(), torch.empty(x.shape, dtype=x.dtype)
        ops.norm(x, norm, out)
        return out

    def final(self, x: Tensor) -> Tensor:
        """The norm before the LM head, of hidden states x [..., H] in their own type."""
        x, out = x.contiguous(), torch.empty(x.shape, dtype=x.dtype)
        ops.norm(x, self.model.norm_final, out)
        return out

    def add_rows(self, hidden: Tensor, places: Tensor, added: Tensor) -> None:
        """hidden [..., H] at flat places [N], none twice, += added [N, H], in place."""
        ops.add_rows(hidden, places, added.contiguous())

    def add_shortcuts(self, branch: int, hidden: Tensor, x: Tensor, places: Tensor) -> None:
        """hidden [..., H] at flat places [N] += what tokens get that skip a branch which reads x
        [..., H], in place."""
        ops.add_shortcut(hidden, x, places, *self._parts.around[branch])

    def norm_heads(self, branch: Branch, name: str, x: Tensor) -> Tensor:
        """projections.norm_heads of x [..., heads * D] in one native pass."""
        layer = self.model.layer[branch.layer]
        norm = layer.norm_q if name == "q_norm" else layer.norm_k
        if not norm.weight:
            return x
        x = x.contiguous()
        ops.norm(x.view(-1, norm.width), norm, x)
        return x

    def rotate(self, x: Tensor, rope: tuple[Tensor, Tensor]) -> Tensor:
        """projections.rotate of x [..., heads, head_dim], rope two of [..., D], in one pass."""
        if rope[0].dtype != x.dtype:
            return rotate(x, rope)
        x = x.contiguous()
        ops.rotate(x, *(part.contiguous() for part in rope))
        return x

    def attends(self, queries: Tensor, shape: AttentionShape) -> bool:
        """Whether `attend` can do it: in bfloat16, where the processor has AVX-512 with VNNI."""
        known = queries.dtype == torch.bfloat16 and ops.attends()
        return known and shape.head_dim % CHANNELS == 0

    def pack(self, kv: tuple[Tensor, Tensor], used: int) -> Tensor:
        """Keys and values [B, kv_heads, T, D] of the first `used` slots as `attend` reads them. The
        next call writes over it."""
        batch, kv_heads, _, width = kv[0].shape
        used += -used % SLOTS_TOGETHER
        packed = self._buffers.take("packed", (batch * kv_heads, 2, used, width), kv[0].dtype)
        ops.pack(*kv, used, packed)
        return packed

    def attend(
        self,
        queries: Tensor,
        counts: Sequence[int],
        slots: Tensor,
        packed: Tensor,
        shape: AttentionShape,
    ) -> Tensor:
        """What attention.attend_rows gives, in one call that computes scores in registers.

        `packed` is what `pack` made of keys and values, up to the last of the slots at least.
        """
        sizes = (shape.kv_heads, shape.window, shape.scaling, shape.softcap)
        return ops.attend(queries.contiguous(), counts, slots, packed, *sizes).flatten(1)

    def soften(self, scores: Tensor, slots: Tensor, begin: int, shape: AttentionShape) -> None:
        """Scores [kv_heads, Q * group, T] become shares of attention, in place.

        All heads of a group follow each other at a query's place; the query at slots[q] sees the
        keys up to there, the first key stands at slot `begin`. T is a multiple of 8. Rows without a
        slot stay as they are.
        """
        group = shape.heads // shape.kv_heads
        how = (shape.window, shape.scaling, shape.softcap)
        ops.softmax(scores, slots, group, begin, *how)

    def multiplies(self, branch: int) -> bool:
        """Whether `project`, `packed_mlp` and `add_branch` know a branch."""
        return self._known[branch]

    def project(self, branch: int, names: Sequence[str], x: Tensor) -> list[Tensor]:
        """Some projections of x [..., in], bfloat16, that follow each other in FIELDS -> [..., n]
        each, in one native call."""
        layer = self.model.layer[branch // 2]
        matrices = [getattr(layer, FIELDS[name]) for name in names]
        flat = x.flatten(0, -2).contiguous()
        found = ops.prompt_products(matrices[0], [each.n for each in matrices], flat)
        return [each.view(*x.shape[:-1], -1) for each in found]

    def packed_mlp(self, branch: int, x: Tensor) -> Tensor:
        """An MLP's output for x [N, H], bfloat16, in one native call."""
        return ops.prompt_mlp(self.model.layer[branch // 2], x.contiguous())

    def entry(self, branch: int, tokens: Tensor, least: float) -> Entry:
        """Which tokens enter a branch: those of `tokens` [B, S], an Entering each, whose gate
        reaches `least`, and those that always do. Valid as long as `tokens`."""
        found = Entry(tokens.data_ptr(), least)
        if branch in self._parts.around:
            parts = self._parts.around[branch]
            found.rank = len(parts[1])
            found.down, found.up, found.bias = (part.data_ptr() for part in parts)
        return found

    def add_mlp(self, branch: int, hidden: Tensor, entry: Entry | None) -> int:
        """hidden [B, S, H], bfloat16, += an MLP branch, norms and shortcuts included, in one native
        call; how many tokens entered, all without an `entry`."""
        return ops.prompt_mlp_branch(self.model.layer[branch // 2], entry, hidden)

    def add_attention(
        self,
        branch: int,
        hidden: Tensor,
        rope: tuple[Tensor, Tensor],
        cache: KVCache,
        place: Place,
        entry: Entry | None,
    ) -> int | None:
        """The same of an attention branch, whose keys and values [B, kv_heads, T, D] of all tokens
        go into the cache. None where that is not one call: the cache is in 8 bits, or comes
        around."""
        layer, number = self.model.layer[branch // 2], branch // 2
        slots, kept = cache.slots[number], (cache.keys[number], cache.values[number])
        whole = place.together is not None and place.rows is None and place.used <= slots
        plain = all(part.dtype == torch.bfloat16 and part.is_contiguous() for part in kept)
        if not whole or not plain or not ops.attends():
            return None
        if self.model.head_dim % CHANNELS:
            return None
        batch, count = hidden.shape[:2]
        parts = [part.contiguous() for part in (place.slots, *rope)]
        at = PromptRows(
            *(batch, count, place.used - count, slots),
            *(part.data_ptr() for part in (*parts, *kept)),
        )
        return ops.prompt_attention_branch(self.model, layer, at, entry, hidden)

    def mlp(self, branch: Branch, x: Tensor) -> Tensor:
        """An MLP's output for x [..., H]; what lies between its products is one native pass."""
        gate, up, down = mlp_parts(branch)
        inner = (up if gate is None else gate)(x).contiguous()
        times = None if gate is None else up(x).contiguous()
        ops.activate(inner, times, self._parts.activation)
        return down(inner)


def _multiplies(layer: Layer, mlp: bool, units: PromptUnits) -> bool:
    """Whether some units multiply all weights of a layer's branch: those of whole matrices packed
    ones and whole blocks of bfloat16, vectors what meets activations of 8 bits."""
    names = ("gate", "up", "down") if mlp else FIELDS.values()
    matrices = [getattr(layer, name) for name in names]

    def known(matrix: Matrix) -> bool:
        kind = Kind(matrix.kind)
        if units == PromptUnits.TILE_UNITS:
            return kind != Kind.FP32 and matrix.k % BLOCK == 0
        return units == PromptUnits.VECTORS and kind.rounded

    return all(known(each) for each in matrices if each.n)
