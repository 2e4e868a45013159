"""Attention of many gathered tokens on a CPU: only the pairs that may see each other are computed.

torch's fused attention takes a mask, and computes under it too; a prompt's tokens, or those of
them that entered a branch, see on average half of the cache. Here some queries at a time meet the
keys up to the last one's own slot, as two matrix products with a softmax between them that stays in
the processor's cache: in bfloat16 2.3 times as fast (docs/experiments.md).
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from gateskip.branches import AttentionShape

QUERIES = 128  # that meet their keys at once
EVEN = 64  # gathered rows, and keys, come in multiples of this


def filled(kept: Tensor) -> Tensor:
    """Indices [N] of gathered rows, the last one repeated until their number is even enough.

    Every new size of a matrix product costs oneDNN milliseconds of compiling, and gates leave
    another number of tokens at every branch of every prompt.
    """
    room = -len(kept) % EVEN
    return torch.cat((kept, kept[-1:].expand(room))) if room else kept


def attend_rows(
    queries: Tensor,
    counts: list[int],
    slots: Tensor,
    kv: tuple[Tensor, Tensor],
    shape: AttentionShape,
) -> Tensor:
    """Softmax attention of queries [N, heads, D], `counts` of them a row -> [N, heads * D].

    slots [N] ascend within a row; keys and values [B, kv_heads, T, D] hold slot t at place t.
    """
    out = torch.empty_like(queries)  # beyond the last real row undefined
    done = 0
    for row, count in enumerate(counts):
        keys, values = (part[row] for part in kv)
        for first in range(done, done + count, QUERIES):
            part = slice(first, min(first + QUERIES, done + count))
            out[part] = _attend(queries[part], slots[part], keys, values, shape)
        done += count
    return out.flatten(1)


def _attend(
    queries: Tensor, slots: Tensor, keys: Tensor, values: Tensor, shape: AttentionShape
) -> Tensor:
    """queries [Q, heads, D] over keys, values [kv_heads, T, D] -> as queries."""
    count, earliest = len(slots), int(slots[0])
    end = min(int(slots[-1]) // EVEN * EVEN + EVEN, keys.shape[1])
    begin = 0 if shape.window is None else max(0, earliest + 1 - shape.window) // EVEN * EVEN
    keys, values = keys[:, begin:end], values[:, begin:end]
    queries = F.pad(queries, (0, 0, 0, 0, 0, -count % EVEN))
    group = shape.heads // shape.kv_heads
    grouped = queries.unflatten(1, (shape.kv_heads, group)).permute(1, 2, 0, 3)
    scores = torch.bmm(grouped.flatten(1, 2) * shape.scaling, keys.transpose(1, 2)).float()
    if shape.softcap is not None:
        scores = torch.tanh(scores / shape.softcap) * shape.softcap
    scores = scores.unflatten(1, (group, -1))  # [kv_heads, group, Q, T]
    seen = torch.arange(begin, end, device=slots.device)
    later = earliest + 1 - begin if shape.window is None else 0  # where a mask is needed at all
    hidden = seen[later:] > slots.unsqueeze(1)
    if shape.window is not None:
        hidden |= seen <= slots.unsqueeze(1) - shape.window
    scores[:, :, :count, later:].masked_fill_(hidden, -torch.inf)
    shares = scores.softmax(-1).to(values.dtype).flatten(1, 2)
    mixed: Tensor = torch.bmm(shares, values).unflatten(1, (group, -1))
    return mixed[:, :, :count].permute(2, 0, 1, 3).flatten(1, 2)
