"""Steps on a device other than the CPU, in which the host waits for nothing.

A step of few tokens runs every branch for every token, and `torch.where` takes the branch's output
for the tokens that enter and the shortcut's, or nothing, for the others. Where no token enters, the
kernels of packed integers read that from a flag and return without reading their weights, which is
most of what a step of few tokens costs. Other weights are read whatever the thresholds say: there a
step skips and saves no time. Conditional nodes of CUDA graphs would be another way: which one costs
less has to be measured, and gateskip was never run on a GPU. In prompts the tokens that enter are
gathered, and the host asks once a branch how many they are.
"""

from __future__ import annotations

import torch
from torch import Tensor

from gateskip.gates.base import Gates
from gateskip.model.compute import Usage
from gateskip.model.families import Branch, to_device, to_host
from gateskip.model.projections import AttentionShape
from gateskip.model.reference import attend, causal
from gateskip.runtime.kv_cache import Visible


class DeviceUsage(Usage):
    """A `Usage` that counts tokens on the device; reading `kept` transfers the counts."""

    _waiting: Tensor | None = None  # int64 [branches], not yet part of `_kept`
    _kept: list[int]

    @property
    def kept(self) -> list[int]:
        """The number of tokens that entered each branch."""
        if self._waiting is not None:
            counts, self._waiting = to_host(self._waiting), None
            self._kept = [a + b for a, b in zip(self._kept, counts, strict=True)]
        return self._kept

    @kept.setter
    def kept(self, value: list[int]) -> None:
        self._kept, self._waiting = value, None

    def enter(self, branch: int, tokens: int | Tensor) -> None:
        """See `Usage`; a number on the device stays there."""
        if isinstance(tokens, int):
            self._kept[branch] += tokens
            return
        if self._waiting is None:
            sizes = (len(self._kept),)
            self._waiting = torch.zeros(sizes, dtype=torch.long, device=tokens.device)
        self._waiting[branch] += tokens


def chosen_outputs(
    gates: Gates | None, branch: Branch, x: Tensor, output: Tensor, keep: Tensor
) -> Tensor:
    """What a branch adds [B, S, H]: its output where `keep` [B, S] is set, elsewhere the shortcut
    of its input x [B, S, H], or 0."""
    keep = keep.unsqueeze(-1)
    if gates is None or gates.shortcuts is None:
        return output.masked_fill(~keep, 0)
    return torch.where(keep, output, gates.shortcuts(branch.index, x).to(output.dtype))


def attend_all(queries: Tensor, seen: Visible, shape: AttentionShape) -> Tensor:
    """Softmax attention of all tokens of a pass: queries [B, S, heads, D] -> [B, S, heads * D].

    Rows that are padded have undefined results at padding.
    """
    keys, values = seen.kv
    if seen.rows is not None:
        index = to_device(seen.rows, queries.device)
        keys, values = keys.index_select(0, index), values.index_select(0, index)
    places = torch.arange(seen.used, device=queries.device)
    visible = causal(seen.slots, places, shape.window)
    keys, values = keys[:, :, : seen.used], values[:, :, : seen.used]
    return attend(queries.transpose(1, 2), keys, values, shape, visible).transpose(1, 2).flatten(2)
