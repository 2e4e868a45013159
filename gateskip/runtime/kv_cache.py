"""KV cache indexed by token position; truncating only lowers a length.

A layer with a sliding window stores only the positions that the window reaches and some more. A
position's slot is its remainder by the layer's number of slots, and overwrites a position that the
window has left.

In the format `int8` keys and values are bytes times a scale for each token and head; prompts and
decoding attend to the same dequantized values.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from typing import Any, Literal, get_args

import torch
from torch import Tensor

from gateskip.model.families import Rope, final_norm, rope_at, to_device
from gateskip.model.projections import AttentionShape
from gateskip.runtime.huge_pages import prefer

EVEN = 64  # keys, and gathered rows, come in multiples of this
SLACK = 64
"""Positions that a layer keeps beyond its window. A pass of the kernels writes that many rows
before the first one attends (MAX_ROWS in api.h), and a row may go back that far: a rejected draft
has overwritten no position that the tokens after it see."""
TOGETHER = 256  # keys that kernels take at once begin at multiples of it: KEYS in attention.cpp

KVFormat = Literal["model", "int8"]
"""Format of keys and values: the model's float type, or 8 bits."""
KV_FORMATS: tuple[KVFormat, ...] = get_args(KVFormat)
SCALE_BYTES = 4  # of a token and head
Scales = list[Tensor] | None
"""One tensor [B, kv_heads, slots] per layer, float32; None for formats without scales."""


def slots_of(window: int | None, capacity: int) -> int:
    """Slots that a layer needs for a row of `capacity` positions."""
    return capacity if window is None else min(capacity, -(-(window + SLACK) // EVEN) * EVEN)


@dataclass(frozen=True)
class KVLayout:
    """The memory layout of a model's caches."""

    model: Any
    shapes: tuple[AttentionShape, ...]  # of each layer
    kv_rule: str

    def empty(self, batch: int, capacity: int, kind: KVFormat) -> KVCache:
        """A cache for `batch` rows of at most `capacity` tokens.

        Raises ValueError where the model has fewer positions.
        """
        limit = self.model.config.max_position_embeddings
        if capacity > limit:
            raise ValueError(f"{capacity} tokens do not fit: the model has {limit} positions")
        sizes, positions = self._sizes(batch, capacity), self._positions(capacity)
        windows = [shape.window for shape in self.shapes]
        return KVCache.empty(self.model, sizes, positions, windows, kind)

    def nbytes(self, batch: int, capacity: int, kind: KVFormat) -> int:
        """The size of `empty`'s result, in bytes."""
        sizes = self._sizes(batch, capacity)
        if kind == "model":
            itemsize: int = final_norm(self.model).weight.dtype.itemsize
            return sum(map(math.prod, sizes)) * itemsize
        return sum(math.prod(size) + SCALE_BYTES * math.prod(size[:3]) for size in sizes)

    def _sizes(self, batch: int, capacity: int) -> list[tuple[int, ...]]:
        """[B, kv_heads, slots, D] of every layer's keys, then of its values. Under the KV rule
        `copy` a layer has the slots of the layer below."""
        positions = self._positions(capacity)
        windowed = self.kv_rule != "copy"
        return [
            (batch, s.kv_heads, slots_of(s.window if windowed else None, positions), s.head_dim)
            for s in self.shapes
            for _ in range(2)
        ]

    def _positions(self, capacity: int) -> int:
        """Positions of a cache for `capacity` tokens: rounded up to a multiple, where the model has
        as many."""
        limit: int = self.model.config.max_position_embeddings
        return max(capacity, min(capacity + -capacity % EVEN, limit))


@dataclass(frozen=True)
class Place:
    """The place of the tokens [B, S] of a pass in a cache."""

    slots: Tensor  # positions [B, S], ascending
    rows: tuple[int, ...] | None  # the cache's row of each row here; None for all, in order
    together: slice | None  # the positions, where all rows of the cache have the same
    used: int  # positions up to the last one
    lengths: tuple[int, ...]  # real tokens of each row, padding on the right
    starts: tuple[int, ...]  # the first position of each row

    @cached_property
    def row_index(self) -> Tensor:
        """Cache rows [B, 1], to index with beside `slots`."""
        return to_device(self.row_numbers, self.slots.device).unsqueeze(1)

    @property
    def row_numbers(self) -> list[int]:
        """Cache rows, one per row here."""
        return list(range(len(self.slots)) if self.rows is None else self.rows)


@dataclass(frozen=True)
class Visible:
    """The keys and values that the tokens [B, S] of a pass attend to in one layer."""

    kv: tuple[Tensor, Tensor]  # two of [rows, kv_heads, T, D]
    rows: tuple[int, ...] | None  # the row of each row here; None for all, in order
    slots: Tensor  # [B, S]: where in T each token's own key stands
    used: int  # of T, up to the last one


@dataclass
class KVCache:
    """Keys and values of every layer, [B, kv_heads, slots, D] each, and the rope table."""

    keys: list[Tensor]
    values: list[Tensor]
    rope: Rope  # two of [capacity, D] per kind of layer
    windows: tuple[int | None, ...]  # of each layer
    reached: list[int]  # positions that each row was written up to
    scales: tuple[Scales, Scales]  # of keys, and of values
    dtype: torch.dtype  # of what is attended to
    drift: Tensor | None = None  # see budget_control.Tracked

    @classmethod
    def empty(
        cls,
        model: Any,
        sizes: Sequence[tuple[int, ...]],
        capacity: int,
        windows: Sequence[int | None],
        kind: KVFormat = "model",
    ) -> KVCache:
        """Zeros of `sizes` [B, kv_heads, slots, D], those of keys and of values by turns, for
        `capacity` positions a row.

        They are one allocation, which goes back to the system whole.
        """
        weight = final_norm(model).weight
        counts = [math.prod(size) for size in sizes]
        stored = torch.int8 if kind == "int8" else weight.dtype
        store = torch.zeros(sum(counts), dtype=stored, device=weight.device)
        prefer(store)
        cut = zip(store.split(counts), sizes, strict=True)
        parts = [part.view(size) for part, size in cut]
        positions = torch.arange(capacity, device=weight.device).unsqueeze(0)
        rope = {
            key: (c[0], s[0]) for key, (c, s) in rope_at(model, positions, weight.dtype).items()
        }
        scales: list[Scales] = [None, None]
        if kind == "int8":
            every = [torch.zeros(size[:3], device=weight.device) for size in sizes]
            scales = [every[0::2], every[1::2]]
        return cls(
            parts[0::2],
            parts[1::2],
            rope,
            tuple(windows),
            [0] * sizes[0][0],
            (scales[0], scales[1]),
            weight.dtype,
        )

    @property
    def batch(self) -> int:
        """Rows."""
        return self.keys[0].shape[0]

    @property
    def capacity(self) -> int:
        """Positions of a row."""
        return len(next(iter(self.rope.values()))[0])

    @cached_property
    def slots(self) -> list[int]:
        """Slots of a row in each layer."""
        return [keys.shape[2] for keys in self.keys]

    def begin(self, rows: Sequence[int], starts: Sequence[int], counts: Sequence[int]) -> None:
        """Note that rows are about to store `counts` tokens from positions `starts` on.

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
        """Store keys and values [B, S, kv_heads, D] of a layer at a place; returns what its tokens
        see."""
        if place.used > self.slots[layer]:
            return self._store_around(layer, place, keys, values)
        if place.together is not None:
            index = (slice(None), slice(None), place.together)
            self.put(layer, index, keys.transpose(1, 2), values.transpose(1, 2))
        else:
            self.put(layer, (place.row_index, slice(None), place.slots), keys, values)
        return self.visible(layer, place)

    def put(self, layer: int, index: tuple[Any, ...], keys: Tensor, values: Tensor) -> None:
        """Keys and values [..., D] into a layer's [B, kv_heads, slots] at an index."""
        for store, scales, part in self._stores(layer, keys, values):
            if scales is None:
                store[index] = part.to(store.dtype)
            else:
                store[index], scales[index] = to_int8(part)

    def put_where(
        self, layer: int, place: Place, keep: Tensor, keys: Tensor, values: Tensor
    ) -> None:
        """Keys and values [B, S, kv_heads, D] at the tokens that keep [B, S] marks; the layer has a
        slot for every position."""
        index, marked = (place.row_index, slice(None), place.slots), keep.unsqueeze(-1)
        for store, scales, part in self._stores(layer, keys, values):
            new, new_scales = (part.to(store.dtype), None) if scales is None else to_int8(part)
            store[index] = torch.where(marked.unsqueeze(-1), new, store[index])
            if scales is not None and new_scales is not None:
                scales[index] = torch.where(marked, new_scales, scales[index])

    def visible(self, layer: int, place: Place) -> Visible:
        """The visible keys and values of a layer that has a slot for every position."""
        keys, values = self.keys[layer], self.values[layer]
        if self.scales[0] is not None:
            used = slice(0, min(place.used + -place.used % EVEN, self.slots[layer]))
            keys, values = (
                from_int8(store[:, :, used], scales[:, :, used], self.dtype)
                for store, scales, _ in self._stores(layer, keys, values)
                if scales is not None
            )
        return Visible((keys, values), place.rows, place.slots, place.used)

    def _stores(
        self, layer: int, keys: Tensor, values: Tensor
    ) -> Iterator[tuple[Tensor, Tensor | None, Tensor]]:
        """For keys, then for values: the layer's tensor, its scales, and the new numbers."""
        parts = zip((self.keys, self.values), self.scales, (keys, values), strict=True)
        for store, scales, part in parts:
            yield store[layer], None if scales is None else scales[layer], part

    def copy_below(self, layer: int, place: Place) -> None:
        """KV rule `copy`: a layer takes its predecessor's entries at a place."""
        for store in (self.keys, self.values, *self.scales):
            if store is None:
                continue
            if place.together is not None:
                store[layer][:, :, place.together] = store[layer - 1][:, :, place.together]
            else:
                index = (place.row_index, slice(None), place.slots)
                store[layer][index] = store[layer - 1][index]

    def _store_around(self, layer: int, place: Place, keys: Tensor, values: Tensor) -> Visible:
        """The same where a window's slots are reused: visible entries are put in order, outside the
        cache, before the last tokens overwrite those that their window has left."""
        seen = self._in_order(layer, place, keys, values)
        slots = self.slots[layer]
        row, column = _last(place, slots)
        at = place.slots[row, column] % slots
        index = (place.row_index.squeeze(1)[row], slice(None), at)
        self.put(layer, index, keys[row, column], values[row, column])
        return seen

    def _in_order(self, layer: int, place: Place, keys: Tensor, values: Tensor) -> Visible:
        """The positions before a place that a window reaches, followed by the keys and values [B,
        S, kv_heads, D] of the place."""
        window = self.windows[layer]
        assert window is not None, "only layers with a window have fewer slots than positions"
        count = place.slots.shape[1]
        firsts = [max(start + 1 - window, 0) // TOGETHER * TOGETHER for start in place.starts]
        most = max(start - of_row for start, of_row in zip(place.starts, firsts, strict=True))
        first = to_device(firsts, place.slots.device).unsqueeze(1)  # [B, 1]
        shifted = place.slots - first
        earlier = (first + torch.arange(most, device=first.device)) % self.slots[layer]
        old = (place.row_index, slice(None), earlier)  # [B, most]
        new = (torch.arange(len(keys), device=first.device).unsqueeze(1), slice(None), shifted)
        width, seen = -(-(most + count) // EVEN) * EVEN, []
        for store, scales, part in self._stores(layer, keys, values):
            before = store[old]  # [B, most, kv_heads, D]
            if scales is not None:
                before = from_int8(before, scales[old], self.dtype)
                part = from_int8(*to_int8(part), self.dtype)
            sizes = (len(part), part.shape[2], width, part.shape[3])
            whole = torch.zeros(sizes, dtype=self.dtype, device=first.device)
            whole[:, :, :most] = before.transpose(1, 2)
            whole[new] = part.to(self.dtype)
            seen.append(whole)
        return Visible((seen[0], seen[1]), None, shifted, most + count)

    def rows(self, numbers: Sequence[int]) -> KVCache:
        """Copies of rows, in the given order; a row may come more than once."""
        chosen = list(numbers)
        keys, values, *scales = (
            None if store is None else [part[chosen] for part in store]
            for store in (self.keys, self.values, *self.scales)
        )
        assert keys is not None and values is not None
        reached = [self.reached[row] for row in chosen]
        both = (scales[0], scales[1])
        drift = None if self.drift is None else self.drift[chosen]
        return KVCache(keys, values, self.rope, self.windows, reached, both, self.dtype, drift)

    @contextmanager
    def alone(self, row: int) -> Iterator[KVCache]:
        """A cache of one row, which shares this one's memory."""
        one = slice(row, row + 1)
        keys, values = ([part[one] for part in store] for store in (self.keys, self.values))
        key_scales, value_scales = (
            None if scales is None else [part[one] for part in scales] for scales in self.scales
        )
        scales, drift = (key_scales, value_scales), None if self.drift is None else self.drift[one]
        reached = [self.reached[row]]
        cache = KVCache(keys, values, self.rope, self.windows, reached, scales, self.dtype, drift)
        yield cache
        self.reached[row] = cache.reached[0]

    def copy_row(self, source: int, target: int, count: int) -> None:
        """Copy a row's first `count` positions, of which no layer has overwritten any."""
        for old, new in zip(self.span(source, 0, count), self.span(target, 0, count), strict=True):
            new.copy_(old)
        self.reached[target] = count

    def span(self, row: int, first: int, count: int) -> Iterator[Tensor]:
        """What a row has of `count` positions from `first` on, of which no layer has overwritten
        any: views of keys [kv_heads, count, D] layer by layer, of values, of both scales [kv_heads,
        count], and of the drift [count, 2]."""
        part = slice(first, first + count)
        for store in (self.keys, self.values, *self.scales):
            for of_layer in store or ():
                yield of_layer[row, :, part]
        if self.drift is not None:
            yield self.drift[row, part]

    def remembers(self, row: int, count: int) -> bool:
        """Whether all layers still have a row's first `count` positions."""
        return max(self.reached[row], count) <= min(self.slots)

    def nbytes(self) -> int:
        """Memory held, in bytes."""
        stores = (self.keys, self.values, *(scales or [] for scales in self.scales))
        parts = [part for store in stores for part in store]
        parts += [] if self.drift is None else [self.drift]
        return sum(x.numel() * x.element_size() for x in parts)


def to_int8(x: Tensor) -> tuple[Tensor, Tensor]:
    """Numbers [..., D] as bytes with a largest absolute value of 127, and scales [...], as the
    kernels do it."""
    x = x.float()
    most = x.abs().amax(-1)
    inverse = torch.where(most > 0, 127 / most, torch.zeros_like(most))
    return (x * inverse.unsqueeze(-1)).round().to(torch.int8), most / 127


def from_int8(codes: Tensor, scales: Tensor, dtype: torch.dtype) -> Tensor:
    """The values of bytes [..., D] and scales [...]."""
    return (codes.float() * scales.unsqueeze(-1)).to(dtype)


def _last(place: Place, slots: int) -> tuple[Tensor, Tensor]:
    """Rows and columns [N] of the last real tokens of a pass, at most `slots` of each row."""
    column = torch.arange(place.slots.shape[1])
    length = torch.tensor(place.lengths).unsqueeze(1)
    last = ((column < length) & (column >= length - slots)).nonzero()
    row, column = to_device(last.T, place.slots.device)
    return row, column
