"""KV cache indexed by token position; truncating only lowers a length."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from gateskip.model.families import Rope, final_norm, rope_at


@dataclass(frozen=True)
class Place:
    """Where the tokens [B, S] of a pass stand in a cache."""

    slots: Tensor  # [B, S], ascending
    rows: tuple[int, ...] | None  # the cache's row of each row here; None for all, in order
    together: slice | None  # the slots, where all rows of the cache have the same
    used: int  # slots up to the last one

    @property
    def row_index(self) -> Tensor:
        """Cache rows [B, 1], to index with beside `slots`."""
        rows = range(len(self.slots)) if self.rows is None else self.rows
        return torch.tensor(list(rows), device=self.slots.device).unsqueeze(1)


@dataclass
class KVCache:
    """Keys and values of every layer, [B, kv_heads, capacity, D] each, and the rope table."""

    keys: list[Tensor]
    values: list[Tensor]
    rope: Rope  # two of [capacity, D] a kind of layer
    drift: Tensor | None = None  # see governor.Tracked

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
    def batch(self) -> int:
        """Rows."""
        return self.keys[0].shape[0]

    @property
    def capacity(self) -> int:
        """Slots a row has."""
        return self.keys[0].shape[2]

    def write(self, layer: int, place: Place, keys: Tensor, values: Tensor) -> None:
        """Store keys and values [B, S, kv_heads, D] of a layer at a place."""
        stores = zip((self.keys[layer], self.values[layer]), (keys, values), strict=True)
        for store, part in stores:
            part = part.to(store.dtype)
            if place.together is not None:
                store[:, :, place.together] = part.transpose(1, 2)
            else:
                store[place.row_index, :, place.slots] = part

    def copy_below(self, layer: int, place: Place) -> None:
        """KV rule `copy`: a layer shows its predecessor's entries at a place."""
        for store in (self.keys, self.values):
            if place.together is not None:
                store[layer][:, :, place.together] = store[layer - 1][:, :, place.together]
            else:
                index = (place.row_index, slice(None), place.slots)
                store[layer][index] = store[layer - 1][index]

    def rows(self, numbers: Sequence[int]) -> KVCache:
        """Copies of rows, in the given order; a row may come more than once."""
        chosen = list(numbers)
        keys, values = ([x[chosen] for x in part] for part in (self.keys, self.values))
        drift = None if self.drift is None else self.drift[chosen]
        return KVCache(keys, values, self.rope, drift)

    def nbytes(self) -> int:
        """Memory held, in bytes."""
        parts = (*self.keys, *self.values, *(() if self.drift is None else (self.drift,)))
        return sum(x.numel() * x.element_size() for x in parts)
