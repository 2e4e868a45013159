"""KV cache indexed by token position; truncating only lowers a length.

A layer with a sliding window keeps the positions that the window reaches and some more: a position
lies at its remainder by the layer's slots, over the one that the window has left.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from gateskip.model.families import Rope, final_norm, rope_at
from gateskip.runtime.sizes import EVEN

SLACK = 64
"""Positions that a layer keeps beyond its window. A pass of the kernels writes so many rows before
the first one attends (MAX_ROWS in simd.h), and so far a row may go back: a rejected draft has
overwritten no position that the tokens after it see."""
TOGETHER = (
    256  # keys that kernels take in at once begin at multiples of this: KEYS in attention.cpp
)


def slots_of(window: int | None, capacity: int) -> int:
    """Slots that a layer needs of a row of `capacity` positions."""
    return capacity if window is None else min(capacity, -(-(window + SLACK) // EVEN) * EVEN)


@dataclass(frozen=True)
class Place:
    """Where the tokens [B, S] of a pass stand in a cache."""

    slots: Tensor  # positions [B, S], ascending
    rows: tuple[int, ...] | None  # the cache's row of each row here; None for all, in order
    together: slice | None  # the positions, where all rows of the cache have the same
    used: int  # positions up to the last one
    lengths: tuple[int, ...]  # real tokens of each row, padding on the right

    @property
    def row_index(self) -> Tensor:
        """Cache rows [B, 1], to index with beside `slots`."""
        return torch.tensor(self.row_numbers, device=self.slots.device).unsqueeze(1)

    @property
    def row_numbers(self) -> list[int]:
        """Cache rows, one a row here."""
        return list(range(len(self.slots)) if self.rows is None else self.rows)


@dataclass(frozen=True)
class Visible:
    """What the tokens [B, S] of a pass attend to in one layer."""

    kv: tuple[Tensor, Tensor]  # two of [rows, kv_heads, T, D]
    rows: tuple[int, ...] | None  # the row of each row here; None for all, in order
    slots: Tensor  # [B, S]: where in T each token's own key stands
    used: int  # of T, up to the last one


@dataclass
class KVCache:
    """Keys and values of every layer, [B, kv_heads, slots, D] each, and the rope table."""

    keys: list[Tensor]
    values: list[Tensor]
    rope: Rope  # two of [capacity, D] a kind of layer
    windows: tuple[int | None, ...] = ()  # of each layer
    reached: list[int] = field(default_factory=list)  # positions that each row was written up to

    @classmethod
    def empty(
        cls,
        model: Any,
        sizes: Sequence[tuple[int, ...]],
        capacity: int,
        windows: Sequence[int | None],
    ) -> KVCache:
        """Zeros of `sizes` [B, kv_heads, slots, D], those of keys and of values by turns, for
        `capacity` positions a row.

        In one piece, which goes back to the system whole.
        """
        weight = final_norm(model).weight
        counts = [math.prod(size) for size in sizes]
        store = torch.zeros(sum(counts), dtype=weight.dtype, device=weight.device)
        cut = zip(store.split(counts), sizes, strict=True)
        parts = [part.view(size) for part, size in cut]
        positions = torch.arange(capacity, device=weight.device).unsqueeze(0)
        rope = {
            key: (c[0], s[0]) for key, (c, s) in rope_at(model, positions, weight.dtype).items()
        }
        return cls(parts[0::2], parts[1::2], rope, tuple(windows), [0] * sizes[0][0])

    @property
    def batch(self) -> int:
        """Rows."""
        return self.keys[0].shape[0]

    @property
    def capacity(self) -> int:
        """Positions a row has."""
        return len(next(iter(self.rope.values()))[0])

    @property
    def slots(self) -> list[int]:
        """Slots that each layer has of a row."""
        return [keys.shape[2] for keys in self.keys]

    def begin(self, rows: Sequence[int], starts: Sequence[int], counts: Sequence[int]) -> None:
        """Take note of `counts` tokens from position `starts` on, which rows are about to hold.

        Raises ValueError where a row goes back further than layers with a window remember.
        """
        least = min(self.slots)
        for row, start, count in zip(rows, starts, counts, strict=True):
            back = self.reached[row] - start
            if start and back > SLACK and self.reached[row] > least:
                raise ValueError(
                    f"row {row} goes back {back} positions to {start}, but layers with a sliding"
                    f" window keep {SLACK} beyond it: run the row again from position 0"
                )
            self.reached[row] = max(self.reached[row] if start else 0, start + count)

    def store(self, layer: int, place: Place, keys: Tensor, values: Tensor) -> Visible:
        """Keep keys and values [B, S, kv_heads, D] of a layer at a place: what its tokens see."""
        if place.used > self.keys[layer].shape[2]:
            return self._store_around(layer, place, keys, values)
        stores = zip((self.keys[layer], self.values[layer]), (keys, values), strict=True)
        for store, part in stores:
            part = part.to(store.dtype)
            if place.together is not None:
                store[:, :, place.together] = part.transpose(1, 2)
            else:
                store[place.row_index, :, place.slots] = part
        return self.visible(layer, place)

    def visible(self, layer: int, place: Place) -> Visible:
        """What tokens see of a layer that holds every position at its own slot."""
        return Visible((self.keys[layer], self.values[layer]), place.rows, place.slots, place.used)

    def copy_below(self, layer: int, place: Place) -> None:
        """KV rule `copy`: a layer shows its predecessor's entries at a place."""
        for store in (self.keys, self.values):
            if place.together is not None:
                store[layer][:, :, place.together] = store[layer - 1][:, :, place.together]
            else:
                index = (place.row_index, slice(None), place.slots)
                store[layer][index] = store[layer - 1][index]

    def _store_around(self, layer: int, place: Place, keys: Tensor, values: Tensor) -> Visible:
        """The same where positions come around: what is seen is put in order, beside the cache,
        before the last tokens overwrite what their window has left."""
        window, slots = self.windows[layer], self.keys[layer].shape[2]
        assert window is not None, "only layers with a window have fewer slots than positions"
        starts = place.slots[:, :1]
        first = (starts + 1 - window).clamp_min(0) // TOGETHER * TOGETHER  # [B, 1]
        before, count = starts - first, place.slots.shape[1]
        most = int(before.max())
        width = -(-(most + count) // EVEN) * EVEN
        earlier = (first + torch.arange(most, device=first.device)) % slots  # [B, most]
        shifted = place.slots - first
        row, column = _last(place, slots)
        at = place.slots[row, column] % slots
        seen = []
        for store, part in (
            (self.keys[layer], keys.to(self.keys[layer].dtype)),
            (self.values[layer], values.to(self.values[layer].dtype)),
        ):
            whole = store.new_zeros(len(part), part.shape[2], width, part.shape[3])
            whole[:, :, :most] = store[place.row_index, :, earlier].transpose(1, 2)
            each = torch.arange(len(part), device=first.device).unsqueeze(1)
            whole[each, :, shifted] = part
            store[place.row_index.squeeze(1)[row], :, at] = part[row, column]
            seen.append(whole)
        return Visible((seen[0], seen[1]), None, shifted, most + count)

    def rows(self, numbers: Sequence[int]) -> KVCache:
        """Copies of rows, in the given order; a row may come more than once."""
        chosen = list(numbers)
        stores = ([part[chosen] for part in store] for store in (self.keys, self.values))
        return KVCache(*stores, self.rope, self.windows, [self.reached[row] for row in chosen])

    def nbytes(self) -> int:
        """Memory held, in bytes."""
        return sum(x.numel() * x.element_size() for x in (*self.keys, *self.values))


def _last(place: Place, slots: int) -> tuple[Tensor, Tensor]:
    """Rows and columns [N] of the last real tokens of a pass, `slots` of each row at most."""
    column = torch.arange(place.slots.shape[1], device=place.slots.device)
    length = torch.tensor(place.lengths, device=place.slots.device).unsqueeze(1)
    row, last = ((column < length) & (column >= length - slots)).nonzero(as_tuple=True)
    return row, last
