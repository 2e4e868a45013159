"""The native engine: a whole pass over a few tokens in one call of engine.cpp.

It takes over decoding and verifying on a CPU, where a step in torch spends most of its time between
operators. What it does not know (other devices, formats or architectures) stays with torch. So do
the matrix products of a prefill; what lies between those is native. Its weights are the torch
modules' own, float32, bfloat16 or packed; 4-bit ones are multiplied with activations rounded to 8
bits when `rounded` asks for it. Between branches all is float32, so that bfloat16 models lose less
here than in torch.
"""

from __future__ import annotations

import ctypes
import time
import weakref
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from gateskip.gates.base import Gates
from gateskip.gates.learned import ScalarGates
from gateskip.kernels import build as native
from gateskip.model.families import FAMILIES, PRE_NORM, UnsupportedModel, backbone, final_norm
from gateskip.model.gating import ANCHORS
from gateskip.model.projections import AttentionShape, attention_shape, rotate
from gateskip.quantization.head import RoundedHead, to_bytes
from gateskip.quantization.packed_linear import DenseLinear, PackedLinear, pack_bytes, tiles

MOST_ROWS = 32  # of one pass; engine.cpp has the same number
DENSE, HALF, FOUR_BIT, FOUR_BIT_BOOK, EIGHT_BIT = range(5)
ROUNDED_CODES, ROUNDED_BOOK, ROUNDED_BYTES = range(5, 8)
PARTS = ("linear", "attention", "gates", "lm head")  # as in engine.cpp
DENSE_KINDS = {torch.float32: DENSE, torch.bfloat16: HALF}
LANES = 16  # of attention.cpp: slots of its packed keys, channels of its values
LIFT = 128  # what makes signed bytes unsigned; kernels.h takes it off again
BLOCK = native.BLOCK
Pointer, Int, Float = ctypes.c_void_p, ctypes.c_int32, ctypes.c_float


class Unsuited(UnsupportedModel):
    """The engine does not know this model; the message says what it lacks."""


class Matrix(ctypes.Structure):
    """As in engine.cpp."""

    _fields_ = (
        *((name, Int) for name in ("kind", "n", "k", "group")),
        *((name, Pointer) for name in ("weights", "scale", "shift", "book", "bias")),
    )


class Shortcut(ctypes.Structure):
    """As in engine.cpp."""

    _fields_ = (*((name, Pointer) for name in ("down", "up", "bias")), ("rank", Int))


class Layer(ctypes.Structure):
    """As in engine.cpp."""

    _fields_ = (
        *((name, Matrix) for name in ("q", "k", "v", "o", "gate", "up", "down")),
        *((name, Pointer) for name in ("norm_attention", "norm_mlp", "norm_q", "norm_k")),
        *((name, Pointer) for name in ("weight_attention", "weight_mlp")),
        *((name, Shortcut) for name in ("short_attention", "short_mlp")),
        *((name, Float) for name in ("bias_attention", "bias_mlp")),
        *((name, Int) for name in ("rotates", "window")),
    )


class Model(ctypes.Structure):
    """As in engine.cpp."""

    _fields_ = (
        *((name, Int) for name in ("layers", "hidden", "heads", "kv_heads", "head_dim")),
        *((name, Int) for name in ("inner", "rotary_dim", "anchors", "widest_shortcut")),
        *((name, Float) for name in ("epsilon", "scaling")),
        ("norm_final", Pointer),
        ("layer", ctypes.POINTER(Layer)),
    )


class CacheView(ctypes.Structure):
    """As in engine.cpp."""

    _fields_ = (
        *((name, Pointer) for name in ("keys", "values", "cos", "sin")),
        *((name, Int) for name in ("capacity", "half")),
    )


class DraftOrder(ctypes.Structure):
    """Draft of engine.cpp."""

    _fields_ = (
        *((name, Int) for name in ("token", "count")),
        ("least", Float),
        ("stands", Pointer),
        ("levels", Int),
        ("embedding", Pointer),
        ("half", Int),
        *((name, ctypes.POINTER(Matrix)) for name in ("head", "exact")),
        *((name, Pointer) for name in ("tokens", "chances")),
    )


class Step(ctypes.Structure):
    """As in engine.cpp."""

    _fields_ = (
        *((name, Int) for name in ("rows", "copies")),
        *((name, Pointer) for name in ("cache_row", "slot", "hidden", "thresholds", "kept")),
        *((name, Pointer) for name in ("spent", "scratch")),
    )


class Engine:
    """A model of a supported architecture, ready for `step`.

    `rounded` tells whether any of its products are of activations rounded to 8 bits. `sketch` is a
    cheaper LM head that ranks the tokens of a draft, `exact`, if any, chooses from the best.
    """

    def __init__(
        self, model: Any, gates: Gates | None, kv_rule: str = "project", rounded: bool = False
    ) -> None:
        """Raises Unsuited when engine.cpp cannot run this model here."""
        library = native.library()
        if library is None or not hasattr(library, "gateskip_step"):
            raise Unsuited("the kernels could not be built, or the processor has no AVX2")
        self.library: Any = library
        library.gateskip_keep_memory()
        if FAMILIES.get(model.config.model_type) is not PRE_NORM:
            raise Unsuited(f"architecture {model.config.model_type} runs in torch")
        if gates is not None and (type(gates) is not ScalarGates or gates.scales):
            raise Unsuited("only scalar gates that do not scale run natively")
        self.held: list[Any] = []  # tensors that the structures point into
        # A branch's shortcut for many rows: down [H, r], up [r, H], bias [H]
        self.around: dict[int, tuple[Tensor, Tensor, Tensor]] = {}
        self.rounded = rounded and any(isinstance(part, PackedLinear) for part in model.modules())
        self.rounded |= isinstance(model.get_output_embeddings(), RoundedHead)
        self.model = self._model(model, gates)
        self.head = self.sketch = self._head(model)
        self.exact: Matrix | None = None
        self.embedding = model.get_input_embeddings().weight
        self.copies = int(kv_rule == "copy")
        self.kept = torch.zeros(2 * self.model.layers, dtype=torch.int64)
        self._spent = torch.zeros(len(PARTS), dtype=torch.float64)
        size = self.library.gateskip_scratch
        size.restype = ctypes.c_int64
        self.scratch = torch.empty(size(ctypes.byref(self.model), MOST_ROWS))
        self._levels: tuple[Any, Tensor] | None = None
        self._cache: tuple[weakref.ref[Any], CacheView] | None = None

    def step(
        self,
        hidden: Tensor,
        cache: Any,
        cache_rows: Sequence[int],
        slots: Sequence[int],
        thresholds: Sequence[float] | None,
    ) -> Tensor:
        """Embeddings [rows, H] at `slots` of `cache_rows` -> final normed hidden states [rows, H],
        float32 whatever the weights are.

        At most MOST_ROWS rows. `kept` then counts, branch by branch, how many rows entered.
        """
        out = hidden.to(torch.float32, copy=True, memory_format=torch.contiguous_format)
        where = torch.tensor([[*cache_rows], [*slots]], dtype=torch.int32)
        step = self._step(out, where, thresholds)
        self.library.gateskip_step(
            ctypes.byref(self.model),
            ctypes.byref(self._view(cache)),
            ctypes.byref(step),
            torch.get_num_threads(),
        )
        return out

    def draft(
        self,
        token: int,
        count: int,
        wanted: tuple[float, Sequence[float]],
        place: tuple[Any, int, int],
        thresholds: Sequence[float] | None,
    ) -> tuple[list[int], list[float]]:
        """Up to `count` tokens that greedily follow `token`; their chances, as the draft sees them.

        `place` is token's: a cache, the row in it, and the slot. `wanted` ends a draft early: a
        least likelihood that it stands as a whole, and how likely a token stands by its chance, in
        equal levels from 0 to 1. `kept` then counts over all steps.
        """
        cache, cache_row, slot = place
        least, stands = wanted[0], torch.tensor(list(wanted[1]))
        hidden = torch.empty(1, self.model.hidden)
        where = torch.tensor([[cache_row], [slot]], dtype=torch.int32)
        tokens, chances = torch.empty(count, dtype=torch.int32), torch.empty(count)
        step = self._step(hidden, where, thresholds)
        order = DraftOrder(
            token,
            count,
            least,
            stands.data_ptr(),
            len(stands),
            self.embedding.data_ptr(),
            int(self.embedding.dtype == torch.bfloat16),
            ctypes.pointer(self.sketch),
            None if self.exact is None else ctypes.pointer(self.exact),
            tokens.data_ptr(),
            chances.data_ptr(),
        )
        self.library.gateskip_draft(
            ctypes.byref(self.model),
            ctypes.byref(self._view(cache)),
            ctypes.byref(step),
            ctypes.byref(order),
            torch.get_num_threads(),
        )
        made = int(order.count)
        return tokens[:made].tolist(), chances[:made].tolist()

    def use_sketch(self, sketch: PackedLinear, exact: Matrix) -> None:
        """Rank a draft's tokens by an LM head in 4 bits; the dense one `exact` chooses."""
        self.sketch, self.exact = self._packed(sketch, rounded=True), exact

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
        flat = x.float().contiguous()
        out = torch.empty(len(flat), matrix.n)
        self.library.gateskip_multiply(
            ctypes.byref(matrix),
            ctypes.c_void_p(flat.data_ptr()),
            len(flat),
            ctypes.c_void_p(out.data_ptr()),
            torch.get_num_threads(),
        )
        return out

    def _step(self, hidden: Tensor, where: Tensor, thresholds: Sequence[float] | None) -> Step:
        """A pass over hidden [rows, H], cache rows and slots `where` [2, rows]."""
        self.kept.zero_()
        return Step(
            len(hidden),
            self.copies,
            where[0].data_ptr(),
            where[1].data_ptr(),
            hidden.data_ptr(),
            None if thresholds is None else self._thresholds(thresholds).data_ptr(),
            self.kept.data_ptr(),
            self._spent.data_ptr(),
            self.scratch.data_ptr(),
        )

    def normed(self, branch: int, x: Tensor) -> tuple[Tensor, Tensor | None]:
        """What a branch reads, its norm of hidden states x [..., H] in their own type, and its
        gate's logits [...], if it has a gate."""
        layer = self.model.layer[branch // 2]
        weight = layer.norm_mlp if branch % 2 else layer.norm_attention
        gate = layer.weight_mlp if branch % 2 else layer.weight_attention
        return self._norm(x, weight, gate, layer.bias_mlp if branch % 2 else layer.bias_attention)

    def final(self, x: Tensor) -> Tensor:
        """The norm before the LM head, of hidden states x [..., H] in their own type."""
        return self._norm(x, self.model.norm_final)[0]

    def _norm(
        self, x: Tensor, weight: Any, gate: Any = None, bias: float = 0.0
    ) -> tuple[Tensor, Tensor | None]:
        """The norm of x [..., H], and a gate's logits of it [...]; both weights are addresses."""
        x, out = x.contiguous(), torch.empty(x.shape, dtype=x.dtype)
        logits = torch.empty(x.shape[:-1]) if gate else None
        self.library.gateskip_norm(
            Pointer(x.data_ptr()),
            Pointer(weight),
            Float(self.model.epsilon),
            ctypes.c_int64(x.numel() // self.model.hidden),
            self.model.hidden,
            int(x.dtype == torch.bfloat16),
            Pointer(out.data_ptr()),
            Pointer(gate),
            Float(bias),
            Pointer(None if logits is None else logits.data_ptr()),
            torch.get_num_threads(),
        )
        return out, logits

    def add_rows(self, hidden: Tensor, places: Tensor, added: Tensor) -> None:
        """hidden [..., H] at flat places [N], none twice, += added [N, H], in place."""
        added = added.contiguous()
        self.library.gateskip_add_rows(
            Pointer(hidden.data_ptr()),
            Pointer(places.data_ptr()),
            ctypes.c_int64(len(places)),
            hidden.shape[-1],
            int(hidden.dtype == torch.bfloat16),
            Pointer(added.data_ptr()),
            torch.get_num_threads(),
        )

    def add_shortcuts(self, branch: int, hidden: Tensor, x: Tensor, places: Tensor) -> None:
        """hidden [..., H] at flat places [N] += what tokens get that skip a branch which reads x
        [..., H], in place."""
        down, up, bias = self.around[branch]
        self.library.gateskip_shortcut(
            Pointer(hidden.data_ptr()),
            Pointer(x.data_ptr()),
            int(hidden.dtype == torch.bfloat16),
            Pointer(places.data_ptr()),
            ctypes.c_int64(len(places)),
            hidden.shape[-1],
            *(Pointer(part.data_ptr()) for part in (down, up, bias)),
            up.shape[0],
            torch.get_num_threads(),
        )

    def rotate(self, x: Tensor, rope: tuple[Tensor, Tensor]) -> Tensor:
        """branches.rotate of x [..., heads, head_dim], rope two of [..., D], in one native pass."""
        turned = rope[0].shape[-1]
        if turned % 16 or rope[0].dtype != x.dtype:
            return rotate(x, rope)
        x, (cos, sin) = x.contiguous(), (part.contiguous() for part in rope)
        heads, width = x.shape[-2:]
        self.library.gateskip_rotate(
            Pointer(x.data_ptr()),
            int(x.dtype == torch.bfloat16),
            ctypes.c_int64(x.numel() // (heads * width)),
            *(heads, width, turned),
            Pointer(cos.data_ptr()),
            Pointer(sin.data_ptr()),
            torch.get_num_threads(),
        )
        return x

    def attends(self, queries: Tensor, shape: AttentionShape) -> bool:
        """Whether `attend` can do it: in bfloat16, where the processor multiplies pairs of it."""
        known = queries.dtype == torch.bfloat16 and bool(self.library.gateskip_attends())
        return known and shape.head_dim % LANES == 0 and shape.softcap is None

    def pack(self, kv: tuple[Tensor, Tensor], used: int) -> Tensor:
        """Keys and values [B, kv_heads, T, D] of the first `used` slots as `attend` reads them."""
        keys, values = kv
        batch, kv_heads, capacity, width = keys.shape
        used += -used % LANES
        packed = torch.empty(batch * kv_heads, 2, used, width, dtype=keys.dtype)
        sizes = (batch, kv_heads, width, keys.stride(0), keys.stride(1), capacity, used)
        self.library.gateskip_pack(
            Pointer(keys.data_ptr()),
            Pointer(values.data_ptr()),
            *map(ctypes.c_int64, sizes),
            Pointer(packed.data_ptr()),
            torch.get_num_threads(),
        )
        return packed

    def attend(
        self,
        queries: Tensor,
        counts: Sequence[int],
        slots: Tensor,
        packed: Tensor,
        shape: AttentionShape,
    ) -> Tensor:
        """What prefill.attend_rows gives, in one call that computes scores in registers.

        `packed` is what `pack` made of keys and values, up to the last of the slots at least.
        """
        out = torch.zeros_like(queries, memory_format=torch.contiguous_format)
        given, rows = queries.contiguous(), torch.tensor(counts)
        sizes = (len(counts), shape.heads, shape.kv_heads, shape.head_dim, shape.window or 0)
        self.library.gateskip_attend(
            *(Pointer(part.data_ptr()) for part in (given, slots, rows)),
            *map(ctypes.c_int64, sizes),
            Float(shape.scaling),
            ctypes.c_int64(packed.shape[2]),
            Pointer(packed.data_ptr()),
            Pointer(out.data_ptr()),
            torch.get_num_threads(),
        )
        return out.flatten(1)

    def soften(self, scores: Tensor, slots: Tensor, begin: int, shape: AttentionShape) -> None:
        """Scores [kv_heads, Q * group, T] become shares of attention, in place.

        All heads of a group follow each other at a query's place; the query at slots[q] sees the
        keys up to there, the first key stands at slot `begin`. T is a multiple of 8. Rows without a
        slot stay as they are.
        """
        blocks, rows, width = scores.shape
        group = shape.heads // shape.kv_heads
        self.library.gateskip_softmax(
            Pointer(scores.data_ptr()),
            int(scores.dtype == torch.bfloat16),
            ctypes.c_int64(blocks),
            *(rows, len(slots), group, width),
            Pointer(slots.data_ptr()),
            ctypes.c_int64(begin),
            shape.window or 0,
            Float(shape.scaling),
            torch.get_num_threads(),
        )

    def mlp(self, module: Any, x: Tensor) -> Tensor:
        """An MLP's output for x [..., H]; what lies between its products is one native pass."""
        gate, up = module.gate_proj(x).contiguous(), module.up_proj(x).contiguous()
        self.library.gateskip_swiglu(
            Pointer(gate.data_ptr()),
            Pointer(up.data_ptr()),
            ctypes.c_int64(gate.numel()),
            int(gate.dtype == torch.bfloat16),
            torch.get_num_threads(),
        )
        found: Tensor = module.down_proj(gate)
        return found

    def spent(self) -> dict[str, float]:
        """Seconds in each part of the native work since the engine was made."""
        return dict(zip(PARTS, self._spent.tolist(), strict=True))

    # -- what a call points to ------------------------------------------------------------------

    def _thresholds(self, levels: Sequence[float]) -> Tensor:
        if self._levels is None or self._levels[0] is not levels:
            self._levels = (levels, torch.tensor(list(levels), dtype=torch.float32))
        return self._levels[1]

    def _view(self, cache: Any) -> CacheView:
        if self._cache is None or self._cache[0]() is not cache:
            (rope,) = cache.rope.values()
            stores = [
                (Pointer * len(part))(*(x.data_ptr() for x in part))
                for part in (cache.keys, cache.values)
            ]
            tables = [x.float().contiguous() for x in rope]
            addresses = [ctypes.addressof(x) for x in stores] + [x.data_ptr() for x in tables]
            half = int(cache.keys[0].dtype == torch.bfloat16)
            view = CacheView(*addresses, cache.capacity, half)
            view.held = (stores, tables)
            self._cache = (weakref.ref(cache), view)  # its memory goes when its text is done
        return self._cache[1]

    # -- the model as structures ----------------------------------------------------------------

    def _model(self, model: Any, gates: Gates | None) -> Model:
        config, body = model.config, backbone(model)
        shape = attention_shape(model, body.layers[0].self_attn)
        norm = final_norm(model)
        if config.hidden_act not in ("silu", "swish"):
            raise Unsuited(f"activation {config.hidden_act} runs in torch")
        if shape.softcap is not None or shape.head_dim % 8 or config.hidden_size % 8:
            raise Unsuited("odd sizes and softcapped attention run in torch")
        rotary = int(body.rotary_emb.inv_freq.shape[0]) * 2
        layers = (Layer * len(body.layers))(
            *(self._layer(model, layer, number, gates) for number, layer in enumerate(body.layers))
        )
        return Model(
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

    def _layer(self, model: Any, layer: Any, number: int, gates: Gates | None) -> Layer:
        attention, mlp = layer.self_attn, layer.mlp
        if not hasattr(attention, "q_proj") or not hasattr(mlp, "up_proj"):
            raise Unsuited("fused projections run in torch")
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
            biases = [float(gates.bias[2 * number + i]) for i in range(2)]  # type: ignore[index]
        return Layer(
            *matrices,
            *(self._floats(x.weight) for x in norms),
            *(None if x is None else self._floats(x.weight) for x in heads),
            *weights,
            *around,
            *biases,
            int(bool(getattr(attention, "use_rope", True))),
            shape.window or 0,
        )

    def _shortcut(self, gates: Gates | None, branch: int) -> Shortcut:
        """A branch's shortcut, its rank filled up with zeros to a multiple of 8."""
        if gates is None or gates.shortcuts is None:
            return Shortcut()
        own = gates.shortcuts
        room = -own.rank % 8
        down = nn.functional.pad(own.down[branch], (0, 0, 0, room))
        up = nn.functional.pad(own.up[branch], (0, room))
        bias = own.bias[branch].float()
        self.around[branch] = (down.T.float().contiguous(), up.T.float().contiguous(), bias)
        return Shortcut(*(self._floats(part) for part in (down, up, bias)), own.rank + room)

    def _matrix(self, module: Any) -> Matrix:
        if isinstance(module, PackedLinear):
            return self._packed(module, self.rounded)
        weight = getattr(module, "weight", None)
        if not isinstance(module, nn.Linear | DenseLinear) or not isinstance(weight, Tensor):
            raise Unsuited(f"{type(module).__name__} layers run in torch")
        if weight.dtype not in DENSE_KINDS or weight.device.type != "cpu":
            raise Unsuited(f"{weight.dtype} weights on {weight.device.type} run in torch")
        n, k = weight.shape
        kind, bias = DENSE_KINDS[weight.dtype], module.bias
        parts = (self._at(weight), None, None, None, None if bias is None else self._floats(bias))
        return Matrix(kind, n, k, k, *parts)

    def _head(self, model: Any) -> Matrix:
        """The LM head: in 8 bits where the layers have 4, else it would cost more than they do."""
        module = model.get_output_embeddings()
        packed = isinstance(module, PackedLinear)
        if packed or not self.rounded or module.weight.shape[1] % BLOCK:
            return self._matrix(module)
        codes, scale = to_bytes(module.weight)
        n, k = module.weight.shape
        stored = pack_bytes((codes + LIFT).to(torch.uint8))
        parts = (stored, tiles(scale).bfloat16(), None, None, module.bias)
        return Matrix(ROUNDED_BYTES, n, k, BLOCK, *(self._maybe(x) for x in parts))

    def _packed(self, module: PackedLinear, rounded: bool) -> Matrix:
        n, k = module.out_features, module.in_features
        scale, offset, book = module.scale, module.offset, module.book
        group = k // scale.shape[1]
        if not rounded:
            four = FOUR_BIT if book is None else FOUR_BIT_BOOK
            kind, table = EIGHT_BIT if module.bits == 8 else four, book
        elif module.bits == 8:
            kind, table = ROUNDED_BYTES, None
        elif book is None:  # codes 0..15 stand for code - 8: a shift takes the 8 away as well
            kind, table = ROUNDED_CODES, None
            offset = None if offset is None else offset - 8 * scale
        else:
            kind, largest = ROUNDED_BOOK, book.abs().max()
            table = ((book / largest * 127).round() + LIFT).to(torch.uint8)
            scale = scale * (largest / 127)
        if rounded:
            scale, offset = scale.bfloat16(), None if offset is None else offset.bfloat16()
        parts = (module.codes, scale, offset, table, module.bias)
        return Matrix(kind, n, k, group, *(self._maybe(x) for x in parts))

    def _floats(self, tensor: Tensor) -> int:
        return self._at(tensor.float())

    def _maybe(self, tensor: Tensor | None) -> int | None:
        return None if tensor is None else self._at(tensor)

    def _at(self, tensor: Tensor) -> int:
        """The address of a tensor, which is held from now on."""
        whole = tensor.detach().contiguous()
        self.held.append(whole)
        return whole.data_ptr()


def _epsilon(norm: Any) -> float:
    found = getattr(norm, "variance_epsilon", None)
    return float(norm.eps if found is None else found)
