"""Attention of many gathered tokens on a CPU: only the pairs that may see each other are computed.

torch's fused attention takes a mask, and computes under it too; a prompt's tokens, or those of
them that entered a branch, see on average half of the cache. In bfloat16, attention.cpp does it in
one call where the processor has the instructions. Elsewhere some queries at a time meet the keys up
to the last one's own slot, as two matrix products with a softmax between them that stays in the
processor's cache: in bfloat16 2.3 times as fast (docs/experiments.md).
"""

from __future__ import annotations

import torch
from torch import Tensor

from gateskip.model.projections import AttentionShape
from gateskip.runtime.native import Engine

QUERIES = 128  # that meet their keys at once; half as many where the keys are
LONG = 4096
EVEN = 64  # gathered rows, and keys, come in multiples of this
FILL = 32  # and queries that meet their keys at once, of this
TOGETHER = 1024  # tokens that enter a branch at once


def filled(kept: Tensor, even: int = EVEN) -> Tensor:
    """Indices [N] of gathered rows, the last one repeated until `even` divides their number.

    Every new size of a matrix product costs oneDNN milliseconds of compiling and half a megabyte of
    code that it keeps, and gates leave another number of tokens at every branch of every prompt.
    """
    room = -len(kept) % even
    return torch.cat((kept, kept[-1:].expand(room))) if room else kept


def few_sizes(count: int) -> list[int]:
    """Sizes of the parts in which `count` tokens enter: TOGETHER or half of it but for the last,
    which is no larger than that half. So products come in few sizes, of which each has its code."""
    whole, rest = divmod(count, TOGETHER)
    half = TOGETHER // 2
    return [TOGETHER] * whole + ([half, rest - half] if rest > half else [rest])


def equal_sizes(count: int) -> list[int]:
    """The same where no size has code of its own: as many equal parts as keep what lies between an
    MLP's products small."""
    parts = max(1, -(-count // (TOGETHER + TOGETHER // 2)))
    return [count // parts + (i < count % parts) for i in range(parts)]


def attend_rows(
    queries: Tensor,
    counts: list[int],
    slots: Tensor,
    kv: tuple[Tensor, Tensor],
    shape: AttentionShape,
    engine: Engine | None = None,
    packed: Tensor | None = None,
) -> Tensor:
    """Softmax attention of queries [N, heads, D], `counts` of them a row -> [N, heads * D].

    slots [N] ascend within a row; keys and values [B, kv_heads, T, D] hold slot t at place t. An
    engine does all of it natively where it can, else the softmax; `packed` is what it made of the
    keys and values before, where queries come in parts.
    """
    if engine is not None and len(slots) and engine.attends(queries, shape):
        packed = engine.pack(kv, int(slots.max()) + 1) if packed is None else packed
        return engine.attend(queries, counts, slots, packed, shape)
    total, group = len(queries), shape.heads // shape.kv_heads
    turned = queries.new_zeros(shape.kv_heads, total + FILL, group, shape.head_dim)
    turned[:, :total] = queries.unflatten(1, (shape.kv_heads, group)).transpose(0, 1)
    out = torch.empty_like(turned)
    room = queries.new_empty(_most_scores(slots, shape))
    done = 0
    for row, count in enumerate(counts):
        keys, values = (part[row] for part in kv)
        end = done + count
        while done < end:
            furthest = int(slots[min(done + QUERIES, end) - 1])
            stop = min(done + _together(furthest), end)
            # What fills up are the queries that follow; their own answers overwrite these.
            part = slice(done, done - (done - stop) // FILL * FILL)
            out[:, part] = _attend(
                turned[:, part], slots[done:stop], (keys, values), shape, room, engine
            )
            done = stop
    out[:, done:] = 0  # rows that only fill up: LLM.int8 looks at all rows for outliers
    return out[:, :total].transpose(0, 1).flatten(1)


def _together(furthest: int) -> int:
    """Queries that meet their keys at once, the last one standing at slot `furthest`."""
    return QUERIES if furthest < LONG else QUERIES // 2


def _most_scores(slots: Tensor, shape: AttentionShape) -> int:
    """Scores that the queries at `slots` have at once at most: memory to be taken once, since the
    system clears every page that it gives anew."""
    furthest = int(slots.max()) if len(slots) else 0
    short = QUERIES * _evened(min(furthest, LONG - 1) + 1)
    return shape.heads * max(short, _together(furthest) * _evened(furthest + 1))


def _attend(
    queries: Tensor,
    slots: Tensor,
    kv: tuple[Tensor, Tensor],
    shape: AttentionShape,
    room: Tensor,
    engine: Engine | None,
) -> Tensor:
    """queries [kv_heads, Q, group, D], those at `slots` and what fills up, over keys and values
    [kv_heads, T, D] -> as queries."""
    keys, values = kv
    end = min(_evened(int(slots[-1]) + 1), keys.shape[1])
    begin = 0 if shape.window is None else max(0, int(slots[0]) + 1 - shape.window) // EVEN * EVEN
    keys, values = keys[:, begin:end], values[:, begin:end]
    flat = queries.flatten(1, 2)  # [kv_heads, Q * group, D]
    scores = room[: flat.shape[0] * flat.shape[1] * keys.shape[1]].view(*flat.shape[:2], -1)
    torch.bmm(flat, keys.transpose(1, 2), out=scores)
    if engine is not None and scores.shape[2] % 8 == 0:
        engine.soften(scores, slots, begin, shape)
    else:
        scores = _soften(scores, slots, begin, shape)
    return torch.bmm(scores, values).view(queries.shape)


def _evened(count: int) -> int:
    """Keys to compute with for `count` in sight: a number out of few, at most an eighth more.

    Each size that a product has is compiled once and kept, half a megabyte of code.
    """
    step = EVEN
    while 8 * step < count:
        step *= 2
    return -(-count // step) * step


def _soften(scores: Tensor, slots: Tensor, begin: int, shape: AttentionShape) -> Tensor:
    """What Engine.soften does, and a soft cap, for scores [kv_heads, Q * group, T]."""
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
