"""The compiled kernels as typed functions of tensors: one a function of src/api.h.

Tensors are on the CPU and contiguous, unless a function says otherwise; shapes are as in the
header. Each function needs `build.library()`, and those from `step` on a processor with AVX2.
"""

from __future__ import annotations

import ctypes
import weakref
from collections.abc import Sequence
from functools import cache
from typing import Any

import torch
from torch import Tensor

from gateskip.kernels import abi, build


@cache
def _library() -> Any:
    library = build.library()
    assert library is not None, "callers ask build.library() first"
    return library


def _at(tensor: Tensor | None) -> int | None:
    """A tensor's address, null for None."""
    return None if tensor is None else tensor.data_ptr()


def _bf16(tensor: Tensor) -> int:
    return int(tensor.dtype == torch.bfloat16)


# -- linear layers one by one -----------------------------------------------------------------


def dense(weight: Tensor, x: Tensor) -> Tensor:
    """x [m, k] times weight [n, k] transposed, both float32."""
    (n, k), rows = weight.shape, len(x)
    out = torch.empty(rows, n)
    threads = torch.get_num_threads()
    _library().gateskip_dense(_at(weight), n, k, _at(x), rows, _at(out), threads)
    return out


def packed(
    codes: Tensor,
    scale: Tensor,
    offset: Tensor | None,
    table: Tensor | None,
    bits: int,
    n: int,
    x: Tensor,
) -> Tensor:
    """x [m, k], float32, times w [n, k] transposed, w of 2, 3, 4, 6 or 8 bits and laid out as in
    PackedLinear."""
    (rows, k), groups = x.shape, scale.shape[1]
    out, scratch = torch.empty(rows, n), torch.empty(rows, groups)
    _library().gateskip_packed(
        *map(_at, (codes, scale, offset, table)),
        *(bits, n, k, k // groups),
        *(_at(x), rows, _at(out), _at(scratch), torch.get_num_threads()),
    )
    return out


def unpack(
    codes: Tensor,
    scale: Tensor,
    offset: Tensor | None,
    table: Tensor | None,
    bits: int,
    n: int,
    dtype: torch.dtype = torch.float32,
) -> Tensor:
    """The weights [n, k] that packed ones of 2, 3, 4, 6 or 8 bits stand for, in float32 or rounded
    to bfloat16."""
    k = 8 * codes[0].numel() // (bits * abi.ROWS_PER_TILE)
    out = torch.empty(n, k, dtype=dtype)
    _library().gateskip_unpack(
        *map(_at, (codes, scale, offset, table)),
        *(bits, n, k, k // scale.shape[1], _bf16(out), _at(out), torch.get_num_threads()),
    )
    return out


def embed(embedding: abi.Embedding, tokens: Tensor) -> Tensor:
    """Rows [m, H], float32, of tokens int32 [m] as a model reads them."""
    out = torch.empty(len(tokens), embedding.table.k)
    _library().gateskip_embed(ctypes.byref(embedding), _at(tokens), len(tokens), _at(out))
    return out


@cache
def prompt_units() -> abi.PromptUnits:
    """What `prompt_products` and the functions after it multiply with: there are none without
    AVX-512 with VNNI."""
    return abi.PromptUnits(_library().gateskip_prompt_units())


def prompt_products(first: abi.Matrix, widths: Sequence[int], x: Tensor) -> list[Tensor]:
    """x [m, k], bfloat16, times each of the matrices [n, k] transposed that lie one after the other
    from `first` on, plus its bias: one [m, n] for each of the widths n. They are packed or
    bfloat16, and k is a multiple of 32.

    Packed weights are rounded to bfloat16, or in vectors the activations to 8 bits where a matrix's
    kind says so; each product is summed up in float32.
    """
    rows, threads = len(x), torch.get_num_threads()
    out = torch.empty(rows * sum(widths), dtype=torch.bfloat16)
    at = ctypes.byref(first)
    _library().gateskip_prompt_products(at, len(widths), _at(x), rows, _at(out), threads)
    parts = out.split([rows * width for width in widths])
    return [part.view(rows, width) for part, width in zip(parts, widths, strict=True)]


def prompt_mlp(layer: abi.Layer, x: Tensor) -> Tensor:
    """What the MLP of a layer makes of x [m, H], bfloat16 -> [m, H]."""
    out, threads = torch.empty(len(x), layer.down.n, dtype=torch.bfloat16), torch.get_num_threads()
    _library().gateskip_prompt_mlp(ctypes.byref(layer), _at(x), len(x), _at(out), threads)
    return out


def prompt_mlp_branch(layer: abi.Layer, entry: abi.Entry | None, hidden: Tensor) -> int:
    """hidden [..., H], bfloat16, += what a layer's MLP branch adds, in place; how many tokens
    entered: as `entry` says, or all."""
    rows, threads = hidden.numel() // hidden.shape[-1], torch.get_num_threads()
    how = entry and ctypes.byref(entry)
    found: int = _library().gateskip_prompt_mlp_branch(
        ctypes.byref(layer), how, _at(hidden), rows, threads
    )
    return found


def prompt_attention_branch(
    model: abi.Model,
    layer: abi.Layer,
    at: abi.PromptRows,
    entry: abi.Entry | None,
    hidden: Tensor,
) -> int:
    """The same of a layer's attention branch, for tokens that stand `at` some place."""
    model_at, layer_at, rows_at = map(ctypes.byref, (model, layer, at))
    how, threads = entry and ctypes.byref(entry), torch.get_num_threads()
    found: int = _library().gateskip_prompt_attention_branch(
        model_at, layer_at, rows_at, how, _at(hidden), threads
    )
    return found


# -- rounding a group of columns --------------------------------------------------------------


def round_columns(
    steps: abi.GroupSteps, upper: Tensor, left: Tensor, codes: Tensor, errors: Tensor
) -> None:
    """Nearest codes, uint8 [group, n], of columns left [group, n] one after the other, into `codes`
    and what they lose into `errors`: see the header."""
    at = map(_at, (upper, left, codes, errors))
    _library().gateskip_round_columns(ctypes.byref(steps), *at)


def descend_columns(
    steps: abi.GroupSteps,
    moments: Tensor,
    curves: Tensor,
    want: Tensor,
    codes: Tensor,
    values: Tensor,
) -> None:
    """Better codes, uint8 [group, n], and their values [group, n], in place: see the header."""
    at = map(_at, (moments, curves, want, codes, values))
    _library().gateskip_descend_columns(ctypes.byref(steps), *at)


# -- whole tokens -----------------------------------------------------------------------------


def has_decoder() -> bool:
    """Whether there is a library, and the processor runs what stands below."""
    library = build.library()
    return library is not None and bool(library.gateskip_has_decoder())


def choose(logits: Tensor, sampling: abi.Sampling, uniform: float, shares: Tensor) -> int:
    """A token of logits [V], float32, drawn by a number from 0 to 1; `shares` has room for V
    numbers, rounded up to 8."""
    return int(
        _library().gateskip_choose(
            _at(logits), len(logits), ctypes.byref(sampling), uniform, _at(shares)
        )
    )


def distribution(logits: Tensor, sampling: abi.Sampling) -> Tensor:
    """The probabilities [V] from which `choose` draws a token of logits [V], float32."""
    shares = torch.empty(len(logits) + -len(logits) % 8)
    _library().gateskip_distribution(_at(logits), len(logits), ctypes.byref(sampling), _at(shares))
    return shares[: len(logits)]


class Arena:
    """Memory that one model's calls use again and again, so that the system need not clear new
    pages for each. It grows to what the largest call needs, and goes with this object."""

    def __init__(self) -> None:
        library = _library()
        self.address: int = library.gateskip_arena_new()
        weakref.finalize(self, library.gateskip_arena_free, self.address)


def step(model: abi.Model, cache: abi.CacheView, tokens: abi.Step, arena: Arena) -> None:
    """A forward pass over any number of rows; `tokens.hidden` becomes final states."""
    _library().gateskip_step(
        ctypes.byref(model),
        ctypes.byref(cache),
        ctypes.byref(tokens),
        arena.address,
        torch.get_num_threads(),
    )


def draft(
    model: abi.Model, cache: abi.CacheView, tokens: abi.Step, order: abi.Draft, arena: Arena
) -> None:
    """Drafted tokens of one row; `order.count` becomes their number."""
    _library().gateskip_draft(
        ctypes.byref(model),
        ctypes.byref(cache),
        ctypes.byref(tokens),
        ctypes.byref(order),
        arena.address,
        torch.get_num_threads(),
    )


def draft_by_network(
    network: abi.DraftNetwork, state: Tensor, order: abi.Draft, arena: Arena
) -> None:
    """The same by a small network from a state [H], float32, which becomes the last token's."""
    _library().gateskip_draft_by_network(
        *(ctypes.byref(network), _at(state), ctypes.byref(order)),
        *(arena.address, torch.get_num_threads()),
    )


def likeliest(
    model: abi.Model,
    cache: abi.CacheView,
    step: abi.Step,
    inputs: tuple[abi.Embedding, Tensor],
    head: abi.Matrix,
    arena: Arena,
) -> Tensor:
    """The likeliest token after each of a step's rows, int32 [rows], by an LM head; `inputs` are an
    embedding and the rows' tokens, int32 [rows]. `step.hidden` becomes final states."""
    embedding, tokens = inputs
    out = torch.empty_like(tokens)
    _library().gateskip_likeliest(
        *(ctypes.byref(model), ctypes.byref(cache), ctypes.byref(step), ctypes.byref(embedding)),
        *(_at(tokens), ctypes.byref(head), _at(out), None, arena.address, torch.get_num_threads()),
    )
    return out


def speculate(
    model: abi.Model,
    cache: abi.CacheView,
    step: abi.Step,
    head: abi.Matrix,
    rounds: abi.Speculation,
    arena: Arena,
) -> None:
    """Rounds of speculation of one row; `rounds.rounds` becomes their number."""
    _library().gateskip_speculate(
        *(ctypes.byref(model), ctypes.byref(cache), ctypes.byref(step), ctypes.byref(head)),
        *(ctypes.byref(rounds), arena.address, torch.get_num_threads()),
    )


def multiply(matrix: abi.Matrix, x: Tensor, arena: Arena) -> Tensor:
    """Rows x [rows, k], float32, times a matrix [n, k] transposed -> [rows, n]."""
    out = torch.empty(len(x), matrix.n)
    threads = torch.get_num_threads()
    _library().gateskip_multiply(
        ctypes.byref(matrix), _at(x), len(x), _at(out), arena.address, threads
    )
    return out


# -- between a prompt's matrix products -------------------------------------------------------


def norm(
    x: Tensor,
    how: abi.Norm,
    out: Tensor,
    gate: int | None = None,
    bias: float = 0.0,
    logits: Tensor | None = None,
) -> None:
    """x [..., width], normed, into out; with a gate, its logits [...] of what comes out.

    `gate` is the address of float32 numbers [width].
    """
    width = x.shape[-1]
    _library().gateskip_norm(
        *(_at(x), ctypes.byref(how), x.numel() // width, width, _bf16(x), _at(out)),
        *(gate, bias, _at(logits), torch.get_num_threads()),
    )


def add_rows(hidden: Tensor, places: Tensor, added: Tensor) -> None:
    """hidden [..., H] at flat places [N], none twice, += added [N, H], in place."""
    _library().gateskip_add_rows(
        *(_at(hidden), _at(places), len(places), hidden.shape[-1], _bf16(hidden)),
        *(_at(added), torch.get_num_threads()),
    )


def add_shortcut(
    hidden: Tensor, x: Tensor, places: Tensor, down: Tensor, up: Tensor, bias: Tensor
) -> None:
    """hidden [..., H] at flat places [N] += up (down x) + bias, in place; down [H, r], up [r, H],
    r and H multiples of 8, all three float32."""
    _library().gateskip_shortcut(
        *(_at(hidden), _at(x), _bf16(hidden), _at(places), len(places), hidden.shape[-1]),
        *(_at(down), _at(up), _at(bias), len(up), torch.get_num_threads()),
    )


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> None:
    """Rotary positions of x [..., heads, D] in place, by cos and sin [..., turned] of its type."""
    heads, width = x.shape[-2:]
    rows = x.numel() // (heads * width)
    _library().gateskip_rotate(
        *(_at(x), _bf16(x), rows, heads, width, cos.shape[-1]),
        *(_at(cos), _at(sin), torch.get_num_threads()),
    )


def softmax(
    scores: Tensor,
    slots: Tensor,
    group: int,
    begin: int,
    window: int | None,
    scaling: float,
    softcap: float | None = None,
) -> None:
    """Causal softmax in place of scores [blocks, Q * group, T], T a multiple of 8.

    The query at slots[q] sees keys up to there; the first key stands at slot `begin`.
    """
    blocks, rows, width = scores.shape
    assert width % 8 == 0, f"{width} keys: a multiple of 8 is needed"
    _library().gateskip_softmax(
        *(_at(scores), _bf16(scores), blocks, rows, len(slots), group, width),
        *(_at(slots), begin, window or 0, scaling, softcap or 0.0, torch.get_num_threads()),
    )


def activate(gate: Tensor, up: Tensor | None, how: abi.Activation) -> None:
    """gate = activation(gate), times up where there is one, in place."""
    threads = torch.get_num_threads()
    _library().gateskip_activate(_at(gate), _at(up), gate.numel(), how, _bf16(gate), threads)


# -- attention over a bfloat16 cache ----------------------------------------------------------


@cache
def attends() -> bool:
    """Whether the processor has the instructions that `pack` and `attend` need: AVX-512, VNNI."""
    return bool(_library().gateskip_attends())


def pack(keys: Tensor, values: Tensor, used: int, packed: Tensor) -> None:
    """The first `used` slots of keys and values [B, kv_heads, T, D] into packed
    [B * kv_heads, 2, used, D] as `attend` reads them; `used` is a multiple of 32, D
    of 16."""
    batch, kv_heads, capacity, width = keys.shape
    _library().gateskip_pack(
        *(_at(keys), _at(values), batch, kv_heads, width),
        *(keys.stride(0), keys.stride(1), capacity, used, _at(packed), torch.get_num_threads()),
    )


def attend(
    queries: Tensor,
    counts: Sequence[int],
    slots: Tensor,
    packed: Tensor,
    kv_heads: int,
    window: int | None,
    scaling: float,
    softcap: float | None = None,
) -> Tensor:
    """Attention of queries [N, heads, D], counts[b] of them in row b, at ascending slots [N], over
    what `pack` made -> [N, heads, D]; rows beyond the counts are zero."""
    out = torch.zeros_like(queries, memory_format=torch.contiguous_format)
    heads, width = queries.shape[-2:]
    rows = torch.tensor(counts)
    _library().gateskip_attend(
        *(_at(queries), _at(slots), _at(rows), len(counts), heads, kv_heads, width),
        *(window or 0, scaling, softcap or 0.0, packed.shape[2], _at(packed), _at(out)),
        torch.get_num_threads(),
    )
    return out
