"""Prompts in the backend `native`: the parts of a pass that compiled kernels compute.

A branch is one native call, or a few: with packed weights, which meet the same activations as in
decoding, and with all weights in bfloat16 where the processor has units for whole matrices (AMX).
Torch multiplies by all other weights, as in `gathered`; each operation between its products is one
native pass.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from functools import cached_property
from typing import Any, Literal

import torch
from torch import Tensor, nn

from gateskip.kernels import ops
from gateskip.kernels.abi import (
    BLOCK,
    SLOTS_PER_PACK,
    Entry,
    Kind,
    Layer,
    Matrix,
    PrefillRows,
    PrefillUnits,
)
from gateskip.kernels.autotune import bfloat16_is_faster
from gateskip.model.families import Branch, final_norm, find_branches
from gateskip.model.gating import NEVER_SKIP
from gateskip.model.projections import AttentionShape, Steps, by_modules, mlp_parts, rotate
from gateskip.quantization.packed_linear import DenseLinear, PackedLinear, prompt_kernel
from gateskip.runtime.attention import attend_rows, causal_softmax
from gateskip.runtime.descriptors import Buffers, Descriptors
from gateskip.runtime.gathered import few_sizes
from gateskip.runtime.gathering import TOGETHER, Attend, Batch, attention_shapes
from gateskip.runtime.kv_cache import EVEN, KVCache, Place, Visible

FIELDS = {"queries": "q", "keys": "k", "values": "v", "output": "o"}  # of abi.Layer
CHANNELS = 16  # what divides those of a head that it knows


class NativeOperations:
    """See `Operations`: norms, gates, rope, attention and activations of prompts of any number of
    tokens, and products where the kernels have them."""

    def __init__(self, model: Any, parts: Descriptors, kv_rule: str) -> None:
        self.model, self.kv_rule, self._parts = parts.model, kv_rule, parts
        self._buffers = Buffers()
        self.shapes = attention_shapes(model)
        self.dtype: torch.dtype = final_norm(model).weight.dtype
        modules = (part for branch in find_branches(model) for part in branch.module.modules())
        self._linears: list[nn.Module] = [part for part in modules if hasattr(part, "in_features")]
        units = ops.prefill_units()
        self._has_products = [
            _multiplies(layer, mlp, units)
            for layer in parts.model.layer[: parts.model.layers]
            for mlp in (False, True)
        ]
        # One native pass each; projections of one input one call, where it has all of a branch
        self.steps = Steps(self._project, self.norm_heads, self.rotate)

    # -- which products are native ---------------------------------------------------------------

    @cached_property
    def native_products(self) -> bool:
        """Whether the kernels multiply prompts: those of a bfloat16 model in units for whole
        matrices, or those by packed weights with 8-bit activations, as decoding does. Other weights
        of the model must be multiplied fast in bfloat16."""
        units = ops.prefill_units()
        if self.dtype != torch.bfloat16 or units != PrefillUnits.VECTORS:
            return self.dtype == torch.bfloat16 and units == PrefillUnits.TILE_UNITS
        packed = self._packed == "all" or (self._packed == "some" and bfloat16_is_faster())
        return self._parts.rounded and packed

    @cached_property
    def int8_activations(self) -> bool:
        """Whether packed weights meet 8-bit activations in prompts, too."""
        return self.native_products and ops.prefill_units() == PrefillUnits.VECTORS

    @cached_property
    def any_pieces(self) -> bool:
        """Whether a prompt has the same bits in pieces of any sizes: its products are the kernels',
        by 8-bit activations, and so is its attention. Products of other libraries may add up in
        another order for another number of rows."""
        products = self.int8_activations and all(
            map(self._multiplies, range(len(self._has_products)))
        )
        return products and ops.attends() and not self.model.head_dim % CHANNELS

    @cached_property
    def _packed(self) -> Literal["all", "some", "none"]:
        """How many of the branches' weights are packed."""
        packed = [isinstance(part, PackedLinear) for part in self._linears]
        return "all" if all(packed) else "some" if any(packed) else "none"

    @cached_property
    def fp32_activations(self) -> bool:
        """Whether prompts pass in float32 although the weights are bfloat16: where that is
        multiplied faster. Decoding always does so."""
        if self.dtype != torch.bfloat16 or bfloat16_is_faster() or self.native_products:
            return False
        return not any(type(part) is nn.Linear for part in self._linears)

    @cached_property
    def _any_size(self) -> bool:
        """Whether a prompt's products take any number of rows: in float32, and where all are our
        kernels."""
        branches = range(len(self._has_products))
        if self.fp32_activations or all(map(self._multiplies, branches)):
            return True
        return prompt_kernel() and self._packed == "all"

    @property
    def even(self) -> int:
        """1 where products take any number of rows."""
        return 1 if self._any_size else EVEN

    def sizes(self, count: int) -> list[int]:
        """Equal parts where products take any number of rows, otherwise few sizes."""
        return equal_sizes(count) if self._any_size else few_sizes(count)

    def _multiplies(self, branch: int) -> bool:
        """Whether a branch's products are native calls, each of several matrices."""
        return self.native_products and self._has_products[branch]

    # -- a whole branch --------------------------------------------------------------------------

    def add_branch(
        self,
        branch: Branch,
        hidden: Tensor,
        ropes: Mapping[str, tuple[Tensor, Tensor]],
        cache: KVCache,
        batch: Batch,
        threshold: float | Tensor | None,
    ) -> int | Tensor | None:
        """One native call, where the kernels have all products, and skipped tokens get projected
        keys and values."""
        if hidden.dtype != torch.bfloat16 or not self._multiplies(branch.index):
            return None
        count = batch.slots.numel()
        if self.sizes(count) != [count]:
            return None
        if branch.kind == "attention" and self.kv_rule != "project" and threshold is not None:
            return None
        entry, entered, limits = None, None, torch.empty(0)
        if threshold is not None or batch.real is not None:
            if isinstance(threshold, Tensor):  # [B, 1]
                limits, entered = threshold.contiguous(), torch.empty_like(batch.entering)
            else:
                limits = torch.tensor([NEVER_SKIP if threshold is None else threshold])
            entry = self._entry(branch.index, batch.entering, limits, entered)
        if branch.kind == "mlp":
            done: int | None = ops.prefill_mlp_branch(self.model.layer[branch.layer], entry, hidden)
        else:
            rope = ropes[branch.rope]
            done = self._add_attention(branch, hidden, rope, cache, batch.place, entry)
        return done if done is None or entered is None else entered.bool()

    def _entry(self, branch: int, tokens: Tensor, limits: Tensor, entered: Tensor | None) -> Entry:
        """Which tokens enter a branch: those of `tokens` [B, S], an Entering each, whose gate
        reaches the threshold of `limits`, one for all or one for each row, and those that always
        do. The kernel marks them in `entered`, uint8 [B, S]. Valid as long as the tensors."""
        entry = Entry(tokens.data_ptr(), limits.data_ptr())
        entry.entered = None if entered is None else entered.data_ptr()
        entry.alike = tokens.numel() // limits.numel()
        if branch in self._parts.around:
            shortcut = self._parts.around[branch]
            entry.rank = len(shortcut[1])
            entry.down, entry.up, entry.bias = (part.data_ptr() for part in shortcut)
        return entry

    def _add_attention(
        self,
        branch: Branch,
        hidden: Tensor,
        rope: tuple[Tensor, Tensor],
        cache: KVCache,
        place: Place,
        entry: Entry | None,
    ) -> int | None:
        """hidden [B, S, H], bfloat16, += an attention branch, whose keys and values [B, kv_heads,
        T, D] of all tokens go into the cache. None where that cannot be one call: the cache is in 8
        bits, or reuses slots."""
        layer, number = self.model.layer[branch.layer], branch.layer
        slots, stores = cache.slots[number], (cache.keys[number], cache.values[number])
        whole = place.together is not None and place.rows is None and place.used <= slots
        plain = all(part.dtype == torch.bfloat16 and part.is_contiguous() for part in stores)
        if not whole or not plain or not ops.attends():
            return None
        if self.model.head_dim % CHANNELS:
            return None
        batch, count = hidden.shape[:2]
        parts = [part.contiguous() for part in (place.slots, *rope)]
        at = PrefillRows(
            *(batch, count, place.used - count, slots),
            *(part.data_ptr() for part in (*parts, *stores)),
        )
        return ops.prefill_attention_branch(self.model, layer, at, entry, hidden)

    @contextmanager
    def entering(self, branch: Branch, tokens: int) -> Iterator[None]:
        """Where several parts of `tokens` enter in float32, convert the weights once."""
        with ExitStack() as stack:
            again = self.fp32_activations and len(equal_sizes(tokens)) > 1
            for part in branch.module.modules() if again else ():
                if isinstance(part, DenseLinear):
                    stack.enter_context(part.fp32_weight())
            yield

    # -- norms, products, activations ------------------------------------------------------------

    def read(self, branch: Branch, hidden: Tensor) -> tuple[Tensor, Tensor | None]:
        """The norm of hidden states [..., H] in their own type, and the gate's logits [...], if
        there is a gate, in one native pass. The next call overwrites the first."""
        layer = self.model.layer[branch.layer]
        norm, gate, bias = (
            (layer.norm_mlp, layer.weight_mlp, layer.bias_mlp)
            if branch.kind == "mlp"
            else (layer.norm_attention, layer.weight_attention, layer.bias_attention)
        )
        x, out = hidden.contiguous(), self._buffers.take("normed", hidden.shape, hidden.dtype)
        logits = torch.empty(x.shape[:-1]) if gate else None
        ops.norm(x, norm, out, gate, bias, logits)
        return out, logits

    def leave(self, branch: Branch, output: Tensor) -> Tensor:
        """The term that a branch adds, from its output [..., H]: the norm after it, if there is
        one."""
        layer = self.model.layer[branch.layer]
        norm = layer.after_mlp if branch.kind == "mlp" else layer.after_attention
        if not norm.weight:
            return output
        x, out = output.contiguous(), torch.empty(output.shape, dtype=output.dtype)
        ops.norm(x, norm, out)
        return out

    def final(self, hidden: Tensor) -> Tensor:
        """The norm before the LM head, of hidden states [..., H] in their own type."""
        x, out = hidden.contiguous(), torch.empty(hidden.shape, dtype=hidden.dtype)
        ops.norm(x, self.model.norm_final, out)
        return out

    def _project(self, branch: Branch, names: Sequence[str], x: Tensor) -> Sequence[Tensor]:
        """Some projections of x [..., in] that follow each other in FIELDS -> [..., n] each, in one
        native call where it has them."""
        if not self._multiplies(branch.index):
            return by_modules(branch, names, x)
        layer = self.model.layer[branch.layer]
        matrices = [getattr(layer, FIELDS[name]) for name in names]
        flat = x.flatten(0, -2).contiguous()
        outputs = ops.prefill_products(matrices[0], [matrix.n for matrix in matrices], flat)
        return [output.view(*x.shape[:-1], -1) for output in outputs]

    def mlp(self, branch: Branch, x: Tensor) -> Tensor:
        """An MLP's output for x [N, H]: one native call where the kernels have all products;
        otherwise torch's with a native activation between them."""
        if self._multiplies(branch.index):
            layer = self.model.layer[branch.layer]
            return self.leave(branch, ops.prefill_mlp(layer, x.contiguous()))
        gate, up, down = mlp_parts(branch)
        inner = (up if gate is None else gate)(x).contiguous()
        times = None if gate is None else up(x).contiguous()
        ops.activate(inner, times, self._parts.activation)
        return self.leave(branch, down(inner))

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

    # -- attention -------------------------------------------------------------------------------

    def attention(self, branch: Branch, seen: Visible, batch: Batch, whole: bool) -> Attend:
        """In bfloat16 one native call; otherwise torch's products with a native softmax between
        them."""
        shape, kv, rows = self.shapes[branch.index], seen.kv, seen.rows
        packed: list[Tensor] = []  # keys and values as the kernel reads them, made once per branch

        def attend(queries: Tensor, counts: Sequence[int], slots: Tensor) -> Tensor:
            if rows is not None or not self.attends(queries, shape):
                return attend_rows(queries, counts, slots, kv, shape, rows, self._softmax)
            if not packed:
                packed.append(self.pack(kv, seen.used))
            return self.attend(queries, counts, slots, packed[0], shape)

        return attend

    def attends(self, queries: Tensor, shape: AttentionShape) -> bool:
        """Whether `attend` can do it: in bfloat16, where the processor has AVX-512 with VNNI."""
        fits = queries.dtype == torch.bfloat16 and ops.attends()
        return fits and shape.head_dim % CHANNELS == 0

    def pack(self, kv: tuple[Tensor, Tensor], used: int) -> Tensor:
        """Keys and values [B, kv_heads, T, D] of the first `used` slots in the layout that `attend`
        reads. The next call overwrites it."""
        batch, kv_heads, _, width = kv[0].shape
        used += -used % SLOTS_PER_PACK
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
        """The result of attention.attend_rows, in one call that computes scores in registers.

        `packed` is the result of `pack` for keys and values, up to the last of the slots at least.
        """
        sizes = (shape.kv_heads, shape.window, shape.scaling, shape.softcap)
        return ops.attend(queries.contiguous(), counts, slots, packed, *sizes).flatten(1)

    def _softmax(self, scores: Tensor, slots: Tensor, begin: int, shape: AttentionShape) -> Tensor:
        """attention.causal_softmax, in place where the kernel takes that number of keys."""
        if scores.shape[2] % 8:
            return causal_softmax(scores, slots, begin, shape)
        group = shape.heads // shape.kv_heads
        how = (shape.window, shape.scaling, shape.softcap)
        ops.softmax(scores, slots, group, begin, *how)
        return scores

    # -- adding to hidden states -----------------------------------------------------------------

    def add_rows(self, hidden: Tensor, places: Tensor, added: Tensor) -> None:
        """hidden [..., H] at distinct flat places [N] += added [N, H], in place."""
        ops.add_rows(hidden, places, added.to(hidden.dtype).contiguous())

    def add_shortcuts(self, branch: Branch, hidden: Tensor, x: Tensor, skip: Tensor) -> None:
        """One native pass over the rows that skip."""
        places = skip.flatten().nonzero().squeeze(1)
        ops.add_shortcut(hidden, x, places, *self._parts.around[branch.index])


def equal_sizes(count: int) -> list[int]:
    """Equal parts, as many as keep the intermediate results of an MLP small."""
    parts = max(1, -(-count // (TOGETHER + TOGETHER // 2)))
    return [count // parts + (i < count % parts) for i in range(parts)]


def _multiplies(layer: Layer, mlp: bool, units: PrefillUnits) -> bool:
    """Whether some units multiply all weights of a layer's branch: those for whole matrices take
    packed ones and whole blocks of bfloat16, vectors those with 8-bit activations."""
    names = ("gate", "up", "down") if mlp else FIELDS.values()
    matrices = [getattr(layer, name) for name in names]

    def fits(matrix: Matrix) -> bool:
        kind = Kind(matrix.kind)
        if units == PrefillUnits.TILE_UNITS:
            return kind != Kind.FP32 and matrix.k % BLOCK == 0
        return units == PrefillUnits.VECTORS and kind.rounded

    return all(fits(matrix) for matrix in matrices if matrix.n)
