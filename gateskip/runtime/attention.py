"""Attention of gathered tokens: on a CPU, only the pairs that may see each other are computed.

torch's fused attention takes a mask, but computes masked pairs too; a prompt's tokens, or those
that entered a branch, see on average half of the cache. In bfloat16, attention.cpp does it in one
call where the processor has the instructions. Otherwise some queries at a time are multiplied with
the keys up to the last query's slot, as two matrix products with a softmax between them that stays
in the processor's cache: 2.3 times as fast in bfloat16 (docs/experiments.md).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from gateskip.model.families import to_device
from gateskip.model.projections import AttentionShape
from gateskip.model.reference import attend, causal
from gateskip.runtime.kv_cache import EVEN

QUERIES = 128  # that meet their keys at once; half as many where the keys are
LONG = 4096
FILL = 32  # and queries that meet their keys at once, of this


Softmax = Callable[[Tensor, Tensor, int, AttentionShape], Tensor]
"""(scores [kv_heads, Q * group, T], slots [Q], slot of the first key, shape) -> attention weights;
the query at slots[q] sees the keys up to there."""


def attend_rows(
    queries: Tensor,
    counts: Sequence[int],
    slots: Tensor,
    kv: tuple[Tensor, Tensor],
    shape: AttentionShape,
    rows: Sequence[int] | None = None,
    softmax: Softmax | None = None,
) -> Tensor:
    """Softmax attention of queries [N, heads, D], `counts` of them a row -> [N, heads * D].

    slots [N] ascend within a row; keys and values [B, kv_heads, T, D] hold slot t at place t.
    `rows` are the cache's rows that the counts belong to, by default all in order. `softmax` may
    replace torch's.
    """
    softmax = softmax or causal_softmax
    total, group = len(queries), shape.heads // shape.kv_heads
    fill = FILL if total >= FILL else 1
    turned = queries.new_zeros(shape.kv_heads, total + fill, group, shape.head_dim)
    turned[:, :total] = queries.unflatten(1, (shape.kv_heads, group)).transpose(0, 1)
    out = torch.empty_like(turned)
    scratch = queries.new_empty(_most_scores(slots, shape, fill))
    done = 0
    for number, count in enumerate(counts):
        row = number if rows is None else rows[number]
        keys, values = (part[row] for part in kv)
        end = done + count
        while done < end:
            furthest = int(slots[min(done + QUERIES, end) - 1])
            stop = min(done + _together(furthest), end)
            # What fills up are the queries that follow; their own answers overwrite these.
            part = slice(done, done - (done - stop) // fill * fill)
            out[:, part] = _attend(
                turned[:, part], slots[done:stop], (keys, values), shape, scratch, softmax
            )
            done = stop
    out[:, done:] = 0  # rows that only fill up: LLM.int8 looks at all rows for outliers
    return out[:, :total].transpose(0, 1).flatten(1)


def attend_padded(
    queries: Tensor,
    counts: Sequence[int],
    slots: Tensor,
    kv: tuple[Tensor, Tensor],
    shape: AttentionShape,
    rows: Sequence[int] | None = None,
    from_zero: bool = False,
    used: int | None = None,
) -> Tensor:
    """The result of `attend_rows`, by torch's fused attention under a mask: for accelerators.

    `used` is the number of keys to look at, by default up to the last slot. `from_zero` says that
    every row brings its tokens from slot 0 on without a gap, so that no mask is needed.
    """
    device, most, total = queries.device, max(counts), sum(counts)
    count = to_device(counts, device)
    row = torch.arange(len(counts), device=device).repeat_interleave(count, output_size=total)
    column = torch.arange(len(row), device=device) - (count.cumsum(0) - count)[row]
    padded = queries.new_zeros(len(counts), most, *queries.shape[1:])
    padded[row, column] = queries[: len(row)]
    used = int(slots.max()) + 1 if used is None else used
    keys, values = kv
    if rows is not None:
        index = to_device(rows, device)
        keys, values = keys.index_select(0, index), values.index_select(0, index)
    visible = None
    if not from_zero:
        places = slots.new_zeros(len(counts), most)
        places[row, column] = slots[: len(row)]
        visible = causal(places, torch.arange(used, device=device), shape.window)
    keys, values = keys[:, :, :used], values[:, :, :used]
    mixed = attend(padded.transpose(1, 2), keys, values, shape, visible)
    out = queries.new_zeros(len(queries), shape.heads * shape.head_dim)
    out[: len(row)] = mixed.transpose(1, 2)[row, column].flatten(1)
    return out


def evened(count: int) -> int:
    """Keys to compute with for `count` visible ones: one of few sizes, at most an eighth more."""
    step = EVEN
    while 8 * step < count:
        step *= 2
    return -(-count // step) * step


def _together(furthest: int) -> int:
    """Number of queries that are multiplied with their keys at once, the last one at slot
    `furthest`."""
    return QUERIES if furthest < LONG else QUERIES // 2


def _most_scores(slots: Tensor, shape: AttentionShape, fill: int) -> int:
    """Most scores that the queries at `slots` have at once: memory to allocate once, since the
    system clears every new page."""
    furthest = int(slots.max()) if len(slots) else 0
    at_once = -(-len(slots) // fill) * fill
    short = min(QUERIES, at_once) * evened(min(furthest, LONG - 1) + 1)
    return shape.heads * max(short, min(_together(furthest), at_once) * evened(furthest + 1))


def _attend(
    queries: Tensor,
    slots: Tensor,
    kv: tuple[Tensor, Tensor],
    shape: AttentionShape,
    scratch: Tensor,
    softmax: Softmax,
) -> Tensor:
    """queries [kv_heads, Q, group, D], at `slots` and padding, over keys and values [kv_heads, T,
    D] -> as queries."""
    keys, values = kv
    end = min(evened(int(slots[-1]) + 1), keys.shape[1])
    begin = 0 if shape.window is None else max(0, int(slots[0]) + 1 - shape.window) // EVEN * EVEN
    keys, values = keys[:, begin:end], values[:, begin:end]
    flat = queries.flatten(1, 2)  # [kv_heads, Q * group, D]
    scores = scratch[: flat.shape[0] * flat.shape[1] * keys.shape[1]].view(*flat.shape[:2], -1)
    torch.bmm(flat, keys.transpose(1, 2), out=scores)
    return torch.bmm(softmax(scores, slots, begin, shape), values).view(queries.shape)


def causal_softmax(scores: Tensor, slots: Tensor, begin: int, shape: AttentionShape) -> Tensor:
    """Scores [kv_heads, Q * group, T] -> attention weights, scaled and soft-capped first.

    The heads of a group follow each other within a query; the first key is at slot `begin`.
    """
    kind, scores = scores.dtype, scores.float() * shape.scaling
    if shape.softcap is not None:
        scores = torch.tanh(scores / shape.softcap) * shape.softcap
    scores = scores.unflatten(1, (-1, shape.heads // shape.kv_heads))  # [kv_heads, Q, group, T]
    seen = torch.arange(begin, begin + scores.shape[3], device=slots.device)
    later = int(slots[0]) + 1 - begin if shape.window is None else 0  # where a mask is needed
    hidden = seen[later:] > slots.unsqueeze(1)
    if shape.window is not None:
        hidden |= seen <= slots.unsqueeze(1) - shape.window
    scores[:, : len(slots), :, later:].masked_fill_(hidden.unsqueeze(1), -torch.inf)
    return scores.softmax(-1).to(kind).flatten(1, 2)
