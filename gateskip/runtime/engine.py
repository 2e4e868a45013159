"""The native engine: a whole pass over a few tokens in one call of the compiled kernels.

It takes over decoding and verifying on a CPU, where a step in torch spends most of its time between
operators. What it does not know (other devices, formats or architectures) stays with torch. So do
the matrix products of a prefill; what lies between those is native. Its weights are the torch
modules' own, float32, bfloat16 or packed; 4-bit ones are multiplied with activations rounded to 8
bits when `rounded` asks for it. Between branches all is float32, so that bfloat16 models lose less
here than in torch.
"""

from __future__ import annotations

import ctypes
import math
import time
import weakref
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from gateskip.gates.base import Gates
from gateskip.gates.learned import ScalarGates
from gateskip.kernels import abi, build, ops
from gateskip.kernels.abi import BLOCK, PARTS, Kind, Matrix
from gateskip.model.families import FAMILIES, PRE_NORM, UnsupportedModel, backbone, final_norm
from gateskip.model.gating import ANCHORS
from gateskip.model.projections import AttentionShape, attention_shape, rotate
from gateskip.quantization.grid_linear import SharedHead
from gateskip.quantization.head import RoundedHead, to_bytes
from gateskip.quantization.packed_linear import DenseLinear, PackedLinear
from gateskip.quantization.tiles import pack_codes, tiles
from gateskip.runtime.kv_cache import KVCache

MOST_ROWS = 64  # of one pass over the weights, as MAX_ROWS in simd.h; `step` takes any number
DENSE_KINDS = {torch.float32: Kind.FP32, torch.bfloat16: Kind.BF16}
CHANNELS = 8  # what divides hidden states and heads
KEYS = 16  # of a vector of attention.cpp: what divides its packed keys, and its heads' channels
ZERO_POINT = 128  # what makes signed bytes unsigned; the kernels take it off again


class Engine:
    """A model of a supported architecture, ready for `step`.

    `rounded` tells whether any of its products are of activations rounded to 8 bits. `draft_head`
    ranks the tokens of a draft: the LM head, or a cheaper one; `rerank_head`, if any, chooses among
    the best. Not for two threads at a time: calls share memory.
    """

    def __init__(
        self, model: Any, gates: Gates | None, kv_rule: str = "project", rounded: bool = False
    ) -> None:
        """Raises UnsupportedModel when the kernels cannot run this model here."""
        if not ops.has_decoder():
            raise UnsupportedModel(build.problem() or "the processor has no AVX2")
        if FAMILIES.get(model.config.model_type) is not PRE_NORM:
            raise UnsupportedModel(f"architecture {model.config.model_type} runs in torch")
        if gates is not None and (type(gates) is not ScalarGates or gates.scales):
            raise UnsupportedModel("only scalar gates that do not scale run natively")
        self.held: list[Any] = []  # tensors that the structures point into
        # A branch's shortcut for many rows: down [H, r], up [r, H], bias [H]
        self.around: dict[int, tuple[Tensor, Tensor, Tensor]] = {}
        packed = any(isinstance(part, PackedLinear | SharedHead) for part in model.modules())
        self.rounded = rounded and packed
        self.rounded |= isinstance(model.get_output_embeddings(), RoundedHead)
        self.model = self._model(model, gates)
        self.head = self.draft_head = self._head(model)
        self.rerank_head: Matrix | None = None
        self.embedding = model.get_input_embeddings().weight
        self.copies = int(kv_rule == "copy")
        self.kept = torch.zeros(2 * self.model.layers, dtype=torch.int64)
        self._spent = torch.zeros(len(PARTS), dtype=torch.float64)
        self._arena = ops.Arena()
        self._buffers: dict[tuple[str, torch.dtype], Tensor] = {}
        self._thresholds: tuple[Any, Tensor] | None = None
        self._cache: tuple[weakref.ref[KVCache], abi.CacheView] | None = None

    def step(
        self,
        hidden: Tensor,
        cache: KVCache,
        cache_rows: Sequence[int],
        slots: Sequence[int],
        thresholds: Sequence[float] | None,
    ) -> Tensor:
        """Embeddings [rows, H] at `slots` of `cache_rows` -> final normed hidden states [rows, H],
        float32 whatever the weights are.

        Any number of rows, whose bits do not depend on each other; of a cache row, later slots come
        after earlier ones. `kept` then counts, branch by branch, how many rows entered.
        """
        out = hidden.to(torch.float32, copy=True, memory_format=torch.contiguous_format)
        where = torch.tensor([[*cache_rows], [*slots]], dtype=torch.int32)
        ops.step(self.model, self._view(cache), self._step(out, where, thresholds), self._arena)
        return out

    def draft(
        self,
        token: int,
        count: int,
        wanted: tuple[float, Sequence[float]],
        place: tuple[KVCache, int, int],
        thresholds: Sequence[float] | None,
    ) -> tuple[list[int], list[float]]:
        """Up to `count` tokens that greedily follow `token`, and the draft's probability of each.

        `place` is token's: a cache, the row in it, and the slot. `wanted` ends a draft early: the
        least probability that it is accepted as a whole, and how likely a token is accepted by its
        probability, in equal steps from 0 to 1. `kept` then counts over all steps.
        """
        cache, cache_row, slot = place
        least, accepted = wanted[0], torch.tensor(list(wanted[1]))
        where = torch.tensor([[cache_row], [slot]], dtype=torch.int32)
        tokens, chances = torch.empty(count, dtype=torch.int32), torch.empty(count)
        hidden = torch.empty(1, self.model.hidden)
        order = abi.Draft(
            token=token,
            count=count,
            least=least,
            accepted=accepted.data_ptr(),
            levels=len(accepted),
            embedding=self.embedding.data_ptr(),
            bf16=int(self.embedding.dtype == torch.bfloat16),
            draft_head=ctypes.pointer(self.draft_head),
            rerank_head=self.rerank_head and ctypes.pointer(self.rerank_head),
            tokens=tokens.data_ptr(),
            chances=chances.data_ptr(),
        )
        step = self._step(hidden, where, thresholds)
        ops.draft(self.model, self._view(cache), step, order, self._arena)
        drafted = int(order.count)
        return tokens[:drafted].tolist(), chances[:drafted].tolist()

    def use_draft_head(self, draft_head: PackedLinear | None, rerank_head: Matrix) -> None:
        """Rank a draft's tokens by an LM head in 4 bits, and choose among the best by another one;
        without the first the model's own head does both."""
        if draft_head is not None:
            self.draft_head = self._packed(draft_head, rounded=True)
            self.rerank_head = rerank_head

    def logits(self, hidden: Tensor) -> Tensor:
        """Final hidden states [rows, H] -> logits [rows, V]."""
        started = time.perf_counter()
        out = self._multiply(self.head, hidden)
        self._spent[PARTS.index("lm head")] += time.perf_counter() - started
        return out

    def multiplier(self, layer: PackedLinear) -> Callable[[Tensor], Tensor]:
        """What the engine does with rows x [rows, in] at such a layer: a call that can be timed."""
        matrix = self._packed(layer, self.rounded)
        return lambda x: self._multiply(matrix, x)

    def _multiply(self, matrix: Matrix, x: Tensor) -> Tensor:
        """Rows x [rows, k] -> [rows, n]."""
        return ops.multiply(matrix, x.float().contiguous(), self._arena)

    def _step(self, hidden: Tensor, where: Tensor, thresholds: Sequence[float] | None) -> abi.Step:
        """A pass over hidden [rows, H], cache rows and slots `where` [2, rows]."""
        self.kept.zero_()
        return abi.Step(
            rows=len(hidden),
            copies=self.copies,
            cache_row=where[0].data_ptr(),
            slot=where[1].data_ptr(),
            hidden=hidden.data_ptr(),
            thresholds=None if thresholds is None else self._tensor(thresholds).data_ptr(),
            kept=self.kept.data_ptr(),
            spent=self._spent.data_ptr(),
        )

    # -- between a prompt's matrix products -----------------------------------------------------

    def normed(self, branch: int, x: Tensor) -> tuple[Tensor, Tensor | None]:
        """What a branch reads, its norm of hidden states x [..., H] in their own type, and its
        gate's logits [...], if it has a gate. The next call writes over the first."""
        layer, mlp = self.model.layer[branch // 2], branch % 2
        weight, gate, bias = (
            (layer.norm_mlp, layer.weight_mlp, layer.bias_mlp)
            if mlp
            else (layer.norm_attention, layer.weight_attention, layer.bias_attention)
        )
        x, out = x.contiguous(), self._buffer("normed", x.shape, x.dtype)
        logits = torch.empty(x.shape[:-1]) if gate else None
        ops.norm(x, weight, self.model.epsilon, out, gate, bias, logits)
        return out, logits

    def final(self, x: Tensor) -> Tensor:
        """The norm before the LM head, of hidden states x [..., H] in their own type."""
        x, out = x.contiguous(), torch.empty(x.shape, dtype=x.dtype)
        ops.norm(x, self.model.norm_final, self.model.epsilon, out)
        return out

    def add_rows(self, hidden: Tensor, places: Tensor, added: Tensor) -> None:
        """hidden [..., H] at flat places [N], none twice, += added [N, H], in place."""
        ops.add_rows(hidden, places, added.contiguous())

    def add_shortcuts(self, branch: int, hidden: Tensor, x: Tensor, places: Tensor) -> None:
        """hidden [..., H] at flat places [N] += what tokens get that skip a branch which reads x
        [..., H], in place."""
        ops.add_shortcut(hidden, x, places, *self.around[branch])

    def rotate(self, x: Tensor, rope: tuple[Tensor, Tensor]) -> Tensor:
        """families.rotate of x [..., heads, head_dim], rope two of [..., D], in one native pass."""
        if rope[0].dtype != x.dtype:
            return rotate(x, rope)
        x = x.contiguous()
        ops.rotate(x, *(part.contiguous() for part in rope))
        return x

    def attends(self, queries: Tensor, shape: AttentionShape) -> bool:
        """Whether `attend` can do it: in bfloat16, where the processor multiplies pairs of it."""
        known = queries.dtype == torch.bfloat16 and ops.attends()
        return known and shape.head_dim % KEYS == 0 and shape.softcap is None

    def pack(self, kv: tuple[Tensor, Tensor], used: int) -> Tensor:
        """Keys and values [B, kv_heads, T, D] of the first `used` slots as `attend` reads them. The
        next call writes over it."""
        batch, kv_heads, _, width = kv[0].shape
        used += -used % KEYS
        packed = self._buffer("packed", (batch * kv_heads, 2, used, width), kv[0].dtype)
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
        sizes = (shape.kv_heads, shape.window, shape.scaling)
        return ops.attend(queries.contiguous(), counts, slots, packed, *sizes).flatten(1)

    def soften(self, scores: Tensor, slots: Tensor, begin: int, shape: AttentionShape) -> None:
        """Scores [kv_heads, Q * group, T] become shares of attention, in place.

        All heads of a group follow each other at a query's place; the query at slots[q] sees the
        keys up to there, the first key stands at slot `begin`. T is a multiple of 8. Rows without a
        slot stay as they are.
        """
        group = shape.heads // shape.kv_heads
        ops.softmax(scores, slots, group, begin, shape.window, shape.scaling)

    def mlp(self, module: Any, x: Tensor) -> Tensor:
        """An MLP's output for x [..., H]; what lies between its products is one native pass."""
        gate, up = module.gate_proj(x).contiguous(), module.up_proj(x).contiguous()
        ops.swiglu(gate, up)
        out: Tensor = module.down_proj(gate)
        return out

    def _buffer(self, name: str, shape: Sequence[int], dtype: torch.dtype) -> Tensor:
        """Memory of a shape that is used again under its name: what the system gives anew it has to
        clear first, page by page, at every branch of a prompt."""
        size, held = math.prod(shape), self._buffers.get((name, dtype))
        if held is None or len(held) < size:
            with torch.inference_mode(False):
                held = self._buffers[name, dtype] = torch.empty(size, dtype=dtype)
        return held[:size].view(*shape)

    def spent(self) -> dict[str, float]:
        """Seconds in each part of the native work since the engine was made."""
        return dict(zip(PARTS, self._spent.tolist(), strict=True))

    # -- what a call points to ------------------------------------------------------------------

    def _tensor(self, thresholds: Sequence[float]) -> Tensor:
        if self._thresholds is None or self._thresholds[0] is not thresholds:
            self._thresholds = (thresholds, torch.tensor(list(thresholds), dtype=torch.float32))
        return self._thresholds[1]

    def _view(self, cache: KVCache) -> abi.CacheView:
        if self._cache is None or self._cache[0]() is not cache:
            (rope,) = cache.rope.values()
            stores = [
                (abi.Pointer * len(part))(*(x.data_ptr() for x in part))
                for part in (cache.keys, cache.values)
            ]
            tables = [x.float().contiguous() for x in rope]
            addresses = [ctypes.addressof(x) for x in stores] + [x.data_ptr() for x in tables]
            bf16 = int(cache.keys[0].dtype == torch.bfloat16)
            view = abi.CacheView(*addresses, cache.capacity, bf16)
            view.held = (stores, tables)
            self._cache = (weakref.ref(cache), view)  # its memory goes when its text is done
        return self._cache[1]

    # -- the model as structures ----------------------------------------------------------------

    def _model(self, model: Any, gates: Gates | None) -> abi.Model:
        config, body = model.config, backbone(model)
        shape = attention_shape(model, body.layers[0].self_attn)
        norm = final_norm(model)
        if config.hidden_act not in ("silu", "swish"):
            raise UnsupportedModel(f"activation {config.hidden_act} runs in torch")
        if shape.softcap is not None:
            raise UnsupportedModel("softcapped attention runs in torch")
        for name, width in (("hidden_size", config.hidden_size), ("head_dim", shape.head_dim)):
            if width % CHANNELS:
                raise UnsupportedModel(f"{name} {width} runs in torch: no multiple of {CHANNELS}")
        rotary = int(body.rotary_emb.inv_freq.shape[0]) * 2
        layers = (abi.Layer * len(body.layers))(
            *(self._layer(model, layer, number, gates) for number, layer in enumerate(body.layers))
        )
        return abi.Model(
            len(body.layers),
            config.hidden_size,
            shape.heads,
            shape.kv_heads,
            shape.head_dim,
            layers[0].gate.n,
            rotary,
            ANCHORS,
            max(max(x.short_attention.rank, x.short_mlp.rank) for x in layers),
            _epsilon(norm),
            shape.scaling,
            self._floats(norm.weight),
            layers,
        )

    def _layer(self, model: Any, layer: Any, number: int, gates: Gates | None) -> abi.Layer:
        attention, mlp = layer.self_attn, layer.mlp
        if not hasattr(attention, "q_proj") or not hasattr(mlp, "up_proj"):
            raise UnsupportedModel("fused projections run in torch")
        shape = attention_shape(model, attention)
        parts = (attention.q_proj, attention.k_proj, attention.v_proj, attention.o_proj)
        matrices = [self._matrix(x) for x in (*parts, mlp.gate_proj, mlp.up_proj, mlp.down_proj)]
        norms = (layer.input_layernorm, layer.post_attention_layernorm)
        heads = [getattr(attention, name, None) for name in ("q_norm", "k_norm")]
        weights: list[Any] = [None, None]
        biases = [0.0, 0.0]
        around = [self._shortcut(gates, 2 * number + i) for i in range(2)]
        if gates is not None:
            rows = [gates.weight[2 * number + i] for i in range(2)]  # type: ignore[index]
            weights = [self._floats(row) for row in rows]
            biases = [float(gates.bias[2 * number + i].detach()) for i in range(2)]  # type: ignore[index]
        return abi.Layer(
            *matrices,
            *(self._floats(x.weight) for x in norms),
            *(None if x is None else self._floats(x.weight) for x in heads),
            *weights,
            *around,
            *biases,
            int(bool(getattr(attention, "use_rope", True))),
            shape.window or 0,
        )

    def _shortcut(self, gates: Gates | None, branch: int) -> abi.Shortcut:
        """A branch's shortcut, its rank filled up with zeros to a multiple of 8."""
        if gates is None or gates.shortcuts is None:
            return abi.Shortcut()
        own = gates.shortcuts
        padding = -own.rank % 8
        down = nn.functional.pad(own.down[branch], (0, 0, 0, padding))
        up = nn.functional.pad(own.up[branch], (0, padding))
        bias = own.bias[branch].float()
        self.around[branch] = (down.T.float().contiguous(), up.T.float().contiguous(), bias)
        return abi.Shortcut(*(self._floats(part) for part in (down, up, bias)), own.rank + padding)

    def _matrix(self, module: Any) -> Matrix:
        if isinstance(module, PackedLinear):
            return self._packed(module, self.rounded)
        weight = getattr(module, "weight", None)
        dense = isinstance(module, nn.Linear | DenseLinear | SharedHead)
        if not dense or not isinstance(weight, Tensor):
            raise UnsupportedModel(f"{type(module).__name__} layers run in torch")
        if weight.dtype not in DENSE_KINDS or weight.device.type != "cpu":
            raise UnsupportedModel(f"{weight.dtype} weights on {weight.device.type} run in torch")
        n, k = weight.shape
        kind, bias = DENSE_KINDS[weight.dtype], module.bias
        parts = (self._at(weight), None, None, None, None if bias is None else self._floats(bias))
        return Matrix(kind, n, k, k, 0, *parts)

    def _head(self, model: Any) -> Matrix:
        """The LM head: as it is where it is packed or on a grid, in 8 bits where the layers are
        packed, since it would cost more than they do."""
        module = model.get_output_embeddings()
        grid = module.grid() if isinstance(module, SharedHead) else None
        if grid is not None and not grid.group % BLOCK:
            return self._packed(PackedLinear.of(grid), self.rounded)
        packed = isinstance(module, PackedLinear)
        if packed or not self.rounded or module.weight.shape[1] % BLOCK:
            return self._matrix(module)
        codes, scale = to_bytes(module.weight)
        n, k = module.weight.shape
        stored = pack_codes(codes + ZERO_POINT, 8)
        parts = (stored, tiles(scale).bfloat16(), None, None, module.bias)
        return Matrix(Kind.INT8_A8, n, k, BLOCK, ZERO_POINT, *(self._maybe(x) for x in parts))

    def _packed(self, module: PackedLinear, rounded: bool) -> Matrix:
        n, k = module.out_features, module.in_features
        scale, offset, table, zero = module.scale, module.offset, module.book, module.middle
        if rounded:
            scale, offset, table, zero = _rounded_parts(module)
        kind = f"INT{module.bits}{'' if table is None else '_TABLE'}{'_A8' if rounded else ''}"
        parts = (module.codes, scale, offset, table, module.bias)
        whole = (self._maybe(part) for part in parts)
        return Matrix(Kind[kind], n, k, k // scale.shape[1], zero, *whole)

    def _floats(self, tensor: Tensor) -> int:
        return self._at(tensor.float())

    def _maybe(self, tensor: Tensor | None) -> int | None:
        return None if tensor is None else self._at(tensor)

    def _at(self, tensor: Tensor) -> int:
        """The address of a tensor, which is held from now on."""
        whole = tensor.detach().contiguous()
        self.held.append(whole)
        return whole.data_ptr()


def _rounded_parts(module: PackedLinear) -> tuple[Tensor, Tensor | None, Tensor | None, int]:
    """Scale, offset, table and zero point as kernels of 8-bit activations read them.

    Scale and offset are bfloat16. The offset is what code 0 stands for, or the middle code where
    bfloat16 holds that better: a grid's minima are exact, a GPTQ layer's are not.
    """
    scale, offset, book = module.scale.bfloat16(), module.offset, module.book
    if book is not None:
        largest = book.abs().max()
        table = ((book / largest * 127).round() + ZERO_POINT).to(torch.uint8)
        return (module.scale * (largest / 127)).bfloat16(), None, table, ZERO_POINT
    if offset is None:
        return scale, None, None, module.middle
    choices = ((offset - module.middle * scale.float(), 0), (offset, module.middle))
    best, zero = min(choices, key=lambda each: float((each[0].bfloat16() - each[0]).abs().sum()))
    return scale, best.bfloat16(), None, zero


def _epsilon(norm: Any) -> float:
    found = getattr(norm, "variance_epsilon", None)
    return float(norm.eps if found is None else found)
