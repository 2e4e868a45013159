"""Attention over gathered tokens is attention under a mask."""

from __future__ import annotations

import pytest
import torch

from gateskip.branches import AttentionShape
from gateskip.masked import attend, causal
from gateskip.prefill import EVEN, attend_rows, filled

HEADS, KV_HEADS, WIDTH = 6, 2, 16


@pytest.mark.parametrize("window", [None, 50])
@pytest.mark.parametrize("softcap", [None, 20.0])
@pytest.mark.parametrize("share", [1.0, 0.4])
@pytest.mark.parametrize("capacity", [300, 320])
def test_rows_attend_as_under_a_mask(
    window: int | None, softcap: float | None, share: float, capacity: int
) -> None:
    torch.manual_seed(0)
    shape = AttentionShape(HEADS, KV_HEADS, WIDTH, WIDTH**-0.5, softcap, window)
    used, lengths = 300, [300, 7, 141]
    keys, values = (torch.randn(3, KV_HEADS, capacity, WIDTH) for _ in range(2))
    queries = torch.randn(3, HEADS, used, WIDTH)
    slots = torch.arange(used).expand(3, -1)
    keep = (torch.rand(3, used) < share) & (slots < torch.tensor(lengths).unsqueeze(1))
    visible = causal(slots, torch.arange(used), window)
    wanted = attend(queries, keys[:, :, :used], values[:, :, :used], shape, visible)
    gathered = queries.transpose(1, 2)[keep]
    counts = keep.sum(1).tolist()
    for more in (0, 5):  # rows that only fill up come last and are left out
        given = torch.cat((gathered, gathered[:more]))
        found = attend_rows(given, counts, slots[keep], (keys, values), shape)
        expected = wanted.transpose(1, 2).flatten(-2)[keep]
        torch.testing.assert_close(found[: len(gathered)], expected)


@pytest.mark.parametrize("count", [1, 63, 64, 65])
def test_rows_are_filled_up_with_the_last(count: int) -> None:
    kept = torch.arange(count) * 3
    found = filled(kept)
    assert len(found) % EVEN == 0 and len(found) - count < EVEN
    assert torch.equal(found[:count], kept) and (found[count:] == kept[-1]).all()
