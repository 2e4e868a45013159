"""The compiled kernels as typed functions of tensors, one for each function of src/api.h.

Tensors are on the CPU and contiguous, unless a function says otherwise; shapes are as in the
header. Each function needs `build.library()`, and those from `step` on a processor with AVX2 or
NEON.
"""

from __future__ import annotations

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


def _run(name: str, *arguments: Any) -> Any:
    """Call a kernel with all of torch's threads; their number is its last argument."""
    return getattr(_library(), name)(*arguments, torch.get_num_threads())


def _bf16(tensor: Tensor) -> int:
    return int(tensor.dtype == torch.bfloat16)


# -- linear layers one by one -----------------------------------------------------------------


def dense(weight: Tensor, x: Tensor) -> Tensor:
    """x [m, k] times weight [n, k] transposed, both float32."""
    (n, k), rows = weight.shape, len(x)
    out = torch.empty(rows, n)
    _run("gateskip_dense", weight, n, k, x, rows, out)
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
    weights = (codes, scale, offset, table, bits, n, k, k // groups)
    _run("gateskip_packed", *weights, x, rows, out, scratch)
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
    """The weights [n, k] of packed ones of 2, 3, 4, 6 or 8 bits, in float32 or rounded to
    bfloat16."""
    k = 8 * codes[0].numel() // (bits * abi.ROWS_PER_TILE)
    out = torch.empty(n, k, dtype=dtype)
    weights = (codes, scale, offset, table, bits, n, k, k // scale.shape[1])
    _run("gateskip_unpack", *weights, _bf16(out), out)
    return out


def embed(embedding: abi.Embedding, tokens: Tensor) -> Tensor:
    """Rows [m, H], float32, of tokens int32 [m] as a model reads them."""
    out = torch.empty(len(tokens), embedding.table.k)
    _library().gateskip_embed(embedding, tokens, len(tokens), out)
    return out


@cache
def prefill_units() -> abi.PrefillUnits:
    """The units with which `prefill_products` and the functions after it multiply; none without
    AVX-512 with VNNI."""
    return abi.PrefillUnits(_library().gateskip_prefill_units())


def prefill_products(first: abi.Matrix, widths: Sequence[int], x: Tensor) -> list[Tensor]:
    """x [m, k], bfloat16, times each of the matrices [n, k] transposed that lie one after the other
    from `first` on, plus its bias: one [m, n] for each of the widths n. They are packed or
    bfloat16, and k is a multiple of 32.

    Packed weights are rounded to bfloat16; or, in vectors, the activations to 8 bits where a
    matrix's kind says so. Each product is summed up in float32.
    """
    rows = len(x)
    out = torch.empty(rows * sum(widths), dtype=torch.bfloat16)
    _run("gateskip_prefill_products", first, len(widths), x, rows, out)
    parts = out.split([rows * width for width in widths])
    return [part.view(rows, width) for part, width in zip(parts, widths, strict=True)]


def prefill_mlp(layer: abi.Layer, x: Tensor) -> Tensor:
    """The output of a layer's MLP for x [m, H], bfloat16 -> [m, H]."""
    out = torch.empty(len(x), layer.down.n, dtype=torch.bfloat16)
    _run("gateskip_prefill_mlp", layer, x, len(x), out)
    return out


def prefill_mlp_branch(layer: abi.Layer, entry: abi.Entry | None, hidden: Tensor) -> int:
    """hidden [..., H], bfloat16, += the output of a layer's MLP branch, in place; returns how many
    tokens entered, by `entry`, or all."""
    rows = hidden.numel() // hidden.shape[-1]
    return int(_run("gateskip_prefill_mlp_branch", layer, entry, hidden, rows))


def prefill_attention_branch(
    model: abi.Model,
    layer: abi.Layer,
    at: abi.PrefillRows,
    entry: abi.Entry | None,
    hidden: Tensor,
) -> int:
    """The same for a layer's attention branch, for tokens at the places `at`."""
    return int(_run("gateskip_prefill_attention_branch", model, layer, at, entry, hidden))


# -- rounding to integers ---------------------------------------------------------------------


def round_columns(
    steps: abi.GroupSteps, upper: Tensor, left: Tensor, codes: Tensor, errors: Tensor
) -> None:
    """Nearest codes, uint8 [group, n], of columns left [group, n], one after the other, into
    `codes`, and their errors into `errors`: see the header."""
    _library().gateskip_round_columns(steps, upper, left, codes, errors)


def descend_block(block: abi.DescentBlock) -> None:
    """Scales, lowest values and codes of less error, in place: see the header."""
    _library().gateskip_descend_block(block)


def search_ranges(search: abi.RangeSearch) -> None:
    """Codes, scales and lowest values of a weight's groups: see the header."""
    _library().gateskip_search_ranges(search)


# -- whole tokens -----------------------------------------------------------------------------


def has_decoder() -> bool:
    """Whether there is a library, and the processor can run the functions below."""
    library = build.library()
    return library is not None and bool(library.gateskip_has_decoder())


def sample(logits: Tensor, sampling: abi.Sampling, uniform: float, shares: Tensor) -> int:
    """A token of logits [V], float32, drawn by a number from 0 to 1; `shares` has room for V
    numbers, rounded up to 8."""
    return int(_library().gateskip_sample(logits, len(logits), sampling, uniform, shares))


def distribution(logits: Tensor, sampling: abi.Sampling) -> Tensor:
    """The probabilities [V] from which `sample` draws a token of logits [V], float32."""
    shares = torch.empty(len(logits) + -len(logits) % 8)
    _library().gateskip_distribution(logits, len(logits), sampling, shares)
    return shares[: len(logits)]


class Arena:
    """Memory that one model's calls use again and again, so that the system need not clear new
    pages for each. It grows to the size that the largest call needs, and is freed with this object.
    """

    def __init__(self) -> None:
        library = _library()
        self.address: int = library.gateskip_arena_new()
        weakref.finalize(self, library.gateskip_arena_free, self.address)


def step(model: abi.Model, cache: abi.CacheView, tokens: abi.Step, arena: Arena) -> None:
    """A forward pass over any number of rows; `tokens.hidden` becomes final states."""
    _run("gateskip_step", model, cache, tokens, arena.address)


def decode(
    model: abi.Model,
    cache: abi.CacheView,
    tokens: abi.Step,
    request: abi.DecodeRequest,
    arena: Arena,
) -> None:
    """Tokens of one row, of its text or of a draft; `request.count` becomes their number."""
    _run("gateskip_decode", model, cache, tokens, request, arena.address)


def decode_by_network(
    network: abi.DraftNetwork, state: Tensor, request: abi.DecodeRequest, arena: Arena
) -> None:
    """The same by a small network from a state [H], float32, which becomes the last token's."""
    _run("gateskip_decode_by_network", network, state, request, arena.address)


def argmax(
    model: abi.Model,
    cache: abi.CacheView,
    step: abi.Step,
    inputs: tuple[abi.Embedding, Tensor],
    head: abi.Matrix,
    arena: Arena,
) -> Tensor:
    """The argmax token after each of a step's rows, int32 [rows], by an LM head; `inputs` are an
    embedding and the rows' tokens, int32 [rows]. `step.hidden` becomes final states."""
    out = torch.empty_like(inputs[1])
    _run("gateskip_argmax", model, cache, step, *inputs, head, out, None, arena.address)
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
    _run("gateskip_speculate", model, cache, step, head, rounds, arena.address)


def multiply(matrix: abi.Matrix, x: Tensor, arena: Arena) -> Tensor:
    """Rows x [rows, k], float32, times a matrix [n, k] transposed -> [rows, n]."""
    out = torch.empty(len(x), matrix.n)
    _run("gateskip_multiply", matrix, x, len(x), out, arena.address)
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
    """x [..., width], normed, into out; with a gate, returns its logits [...] of the result.

    `gate` is the address of float32 numbers [width].
    """
    width = x.shape[-1]
    rows = x.numel() // width
    _run("gateskip_norm", x, how, rows, width, _bf16(x), out, gate, bias, logits)


def add_rows(hidden: Tensor, places: Tensor, added: Tensor) -> None:
    """hidden [..., H] at distinct flat places [N] += added [N, H], in place."""
    width = hidden.shape[-1]
    _run("gateskip_add_rows", hidden, places, len(places), width, _bf16(hidden), added)


def add_shortcut(
    hidden: Tensor, x: Tensor, places: Tensor, down: Tensor, up: Tensor, bias: Tensor
) -> None:
    """hidden [..., H] at flat places [N] += up (down x) + bias, in place; down [H, r], up [r, H],
    r and H multiples of 8, both float16, bias [H] float32."""
    rows, width = len(places), hidden.shape[-1]
    weights = (down, up, bias, len(up))
    _run("gateskip_shortcut", hidden, x, _bf16(hidden), places, rows, width, *weights)


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> None:
    """Rotary positions of x [..., heads, D] in place, by cos and sin [..., turned] of its type."""
    heads, width = x.shape[-2:]
    rows = x.numel() // (heads * width)
    _run("gateskip_rotate", x, _bf16(x), rows, heads, width, cos.shape[-1], cos, sin)


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

    The query at slots[q] sees keys up to that slot; the first key is at slot `begin`.
    """
    blocks, rows, width = scores.shape
    assert width % 8 == 0, f"{width} keys: a multiple of 8 is needed"
    shape = (blocks, rows, len(slots), group, width)
    mask = (slots, begin, window or 0, scaling, softcap or 0.0)
    _run("gateskip_softmax", scores, _bf16(scores), *shape, *mask)


def activate(gate: Tensor, up: Tensor | None, how: abi.Activation) -> None:
    """gate = activation(gate), times up if given, in place."""
    _run("gateskip_activate", gate, up, gate.numel(), how, _bf16(gate))


# -- attention over a bfloat16 cache ----------------------------------------------------------


def attends() -> bool:
    """Whether the processor has the instructions that `pack` and `attend` need: AVX-512, VNNI."""
    return prefill_units() != abi.PrefillUnits.NO_UNITS


def pack(keys: Tensor, values: Tensor, used: int, packed: Tensor) -> None:
    """The first `used` slots of keys and values [B, kv_heads, T, D] into packed
    [B * kv_heads, 2, used, D] as `attend` reads them; `used` is a multiple of 32, D
    of 16."""
    shape = (*keys.shape[:2], keys.shape[3], *keys.stride()[:2], keys.shape[2])
    _run("gateskip_pack", keys, values, *shape, used, packed)


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
    the result of `pack` -> [N, heads, D]; rows beyond the counts are zero."""
    out = torch.zeros_like(queries, memory_format=torch.contiguous_format)
    rows, shape = torch.tensor(counts), (len(counts), queries.shape[1], kv_heads, queries.shape[2])
    mask = (window or 0, scaling, softcap or 0.0)
    _run("gateskip_attend", queries, slots, rows, *shape, *mask, packed.shape[2], packed, out)
    return out
