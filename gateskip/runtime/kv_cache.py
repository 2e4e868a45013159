"""Keys and values of the tokens so far: slot number is position, so forgetting is a number, too."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from gateskip.model.families import Rope, final_norm, rope_at


@dataclass
class KVCache:
    """Keys and values of every layer, [B, kv_heads, capacity, D] each, and the rope table."""

    keys: list[Tensor]
    values: list[Tensor]
    rope: Rope  # two of [capacity, D] a kind of layer

    @classmethod
    def empty(cls, model: Any, sizes: Sequence[tuple[int, ...]]) -> KVCache:
        """Zeros of `sizes` [B, kv_heads, slots, D], those of keys and of values by turns.

        In one piece, which goes back to the system whole.
        """
        weight = final_norm(model).weight
        counts = [math.prod(size) for size in sizes]
        store = torch.zeros(sum(counts), dtype=weight.dtype, device=weight.device)
        cut = zip(store.split(counts), sizes, strict=True)
        parts = [part.view(size) for part, size in cut]
        positions = torch.arange(sizes[0][2], device=weight.device).unsqueeze(0)
        rope = rope_at(model, positions, weight.dtype)
        return cls(parts[0::2], parts[1::2], {key: (c[0], s[0]) for key, (c, s) in rope.items()})

    @property
    def capacity(self) -> int:
        """Slots a row has."""
        return self.keys[0].shape[2]

    def write(
        self, layer: int, slots: Tensor, begin: int | None, keys: Tensor, values: Tensor
    ) -> None:
        """Store keys and values [B, S, kv_heads, D] at slots [B, S], which follow each other.

        `begin` is the first slot where all rows have the same.
        """
        keys, values = (part.to(self.keys[layer].dtype) for part in (keys, values))
        if begin is not None:
            part = slice(begin, begin + slots.shape[1])
            self.keys[layer][:, :, part] = keys.transpose(1, 2)
            self.values[layer][:, :, part] = values.transpose(1, 2)
            return
        rows = torch.arange(slots.shape[0], device=slots.device).unsqueeze(1)
        self.keys[layer][rows, :, slots] = keys
        self.values[layer][rows, :, slots] = values

    def copy_below(self, layer: int, slots: Tensor, begin: int | None) -> None:
        """KV rule `copy`: a layer shows its predecessor's entries at slots [B, S]; see `write`."""
        for store in (self.keys, self.values):
            if begin is not None:
                part = slice(begin, begin + slots.shape[1])
                store[layer][:, :, part] = store[layer - 1][:, :, part]
                continue
            rows = torch.arange(slots.shape[0], device=slots.device).unsqueeze(1)
            store[layer][rows, :, slots] = store[layer - 1][rows, :, slots]

    def row(self, number: int) -> KVCache:
        """One row as a cache of its own, in the same memory."""
        one = slice(number, number + 1)
        return KVCache([k[one] for k in self.keys], [v[one] for v in self.values], self.rope)

    def rows(self, numbers: Sequence[int]) -> KVCache:
        """Copies of rows, in the given order; a row may come more than once."""
        chosen = list(numbers)
        return KVCache([k[chosen] for k in self.keys], [v[chosen] for v in self.values], self.rope)

    def nbytes(self) -> int:
        """Memory held, in bytes."""
        return sum(x.numel() * x.element_size() for x in (*self.keys, *self.values))
