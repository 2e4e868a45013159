"""The rows of one KV cache that many requests share, and the prompts that they still have.

A finished row's keys and values stay until another request needs the row. A prompt that begins
alike reuses them, if they have the bits that reading it would give: they were read as a prompt, in
the same pieces where the bits depend on pieces, and skipped alike. Keys and values of answers are
read anew, since decoding computes them in another arithmetic than prefill. If asked, prompts are
also kept on disk, and what no row has comes from there.
"""

from __future__ import annotations

from collections.abc import Hashable, Sequence
from pathlib import Path

from gateskip.decoding.config import MAX_DRAFT
from gateskip.decoding.decoder import Decoder
from gateskip.decoding.draft_cache import DraftCache
from gateskip.decoding.prefill import PIECE, cache_capacity
from gateskip.runtime.budget_control import DRIFT_BYTES, empty_drift
from gateskip.runtime.kv_cache import EVEN, KVCache
from gateskip.runtime.skipping import SkippingModel
from gateskip.serving.prefix_files import PrefixFiles
from gateskip.serving.requests import ServeLimits
from gateskip.serving.slot import Slot
from gateskip.serving.stored_prefixes import StoredPrefixes


class Slots:
    """The rows of a cache: see above."""

    def __init__(
        self, model: SkippingModel, limits: ServeLimits, draft_model: SkippingModel | None = None
    ) -> None:
        """A draft model has a cache of its own. Raises ValueError where the memory is too small
        for one row."""
        capacity = limits.context + MAX_DRAFT
        self._prefixes = limits.prefixes
        self._any_pieces = model.any_pieces
        rows = rows_that_fit(model, limits, capacity, draft_model)
        cache = model.new_cache(rows, capacity)
        self.draft_cache: DraftCache | None = None
        if draft_model is not None:
            self.draft_cache = DraftCache(draft_model, rows, capacity, model.kv_cache)
        assert isinstance(cache, KVCache), "rows of other caches cannot be shared"
        self.cache = cache
        if model.gates is not None:  # budget control of any row writes here
            cache.drift = empty_drift(rows, cache.capacity, model.device)
        self._slots = [Slot(number) for number in range(rows)]
        self._released = 0
        self._disk: StoredPrefixes | None = None

    def use_disk(self, decoder: Decoder, folder: Path) -> None:
        """Keep prompts in a folder, too. Raises OSError where that cannot be made."""
        tokens = EVEN if self._any_pieces else PIECE
        self._disk = StoredPrefixes(decoder, self.cache, PrefixFiles(folder), tokens)

    def close(self) -> None:
        """End the work in the background."""
        if self._disk is not None:
            self._disk.close()

    @property
    def free(self) -> bool:
        """Whether a row is free."""
        return not all(slot.busy for slot in self._slots)

    def piece(self, read: int, most: int) -> int:
        """Tokens of the next piece of a prompt; `most` is a wish where bits depend on pieces."""
        return most if self._any_pieces else PIECE - read % PIECE

    def take(self, prompt: tuple[int, ...], settings: Hashable) -> Slot:
        """A free row for a prompt; `read` tells how many of its tokens the row has already. At
        least the last token is read anew: an answer begins with its final state."""
        free = [slot for slot in self._slots if not slot.busy]
        sources = [(self._shared(slot, prompt, settings), slot) for slot in self._slots]
        shared, source = max(sources, key=lambda pair: (pair[0], not pair[1].busy))
        ends_there = shared == self._reusable(source)
        if shared and source in free and (ends_there or len(free) == 1):
            slot = source
        else:
            others = [slot for slot in free if slot is not source] or free
            slot = min(others, key=lambda slot: (slot.read > 0, slot.released))
        slot.taken += 1
        if shared and slot is not source:
            self.cache.copy_row(source.number, slot.number, shared)
        self.cache.reached[slot.number] = shared
        if self.draft_cache is not None:
            self.draft_cache.begin(slot.number, source.number, shared)
        if self.cache.drift is not None:
            self.cache.drift[slot.number, shared:] = 0
        slot.prompt, slot.settings, slot.read, slot.busy = prompt, settings, shared, True
        if self._disk is not None:
            slot.blocks, slot.looks = self._disk.names(prompt, settings), True
        return slot

    def load(self, slot: Slot, most: int, end: int) -> int:
        """About `most` further tokens of a prompt, up to `end` at most, from disk; how many."""
        return 0 if self._disk is None else self._disk.load(slot, most, end)

    def keep(self, slot: Slot, new_tokens: int) -> None:
        """Keep the prompt that a row has read, and that an answer of up to `new_tokens` follows, on
        disk. Returns at once."""
        if self._disk is not None:
            self._disk.keep(slot, cache_capacity(len(slot.prompt), new_tokens))

    def release(self, slot: Slot, forget: bool = False) -> None:
        """Free a row; its prompt stays, unless something went wrong while it was read."""
        self._released += 1
        slot.busy, slot.released, slot.taken = False, self._released, slot.taken + forget
        kept = sorted((s for s in self._slots if not s.busy), key=lambda s: -s.released)
        for old in [slot] * forget + [s for s in kept if s.read][self._prefixes :]:
            old.prompt, old.read = (), 0

    def nbytes(self) -> int:
        """Memory of the caches, in bytes."""
        drafts = 0 if self.draft_cache is None else self.draft_cache.cache.nbytes()
        return self.cache.nbytes() + drafts

    def cached_tokens(self) -> int:
        """Tokens whose keys and values are kept."""
        slots = self._slots
        return sum(self.cache.reached[s.number] if s.busy else s.read for s in slots)

    def _reusable(self, slot: Slot) -> int:
        """Tokens at the beginning of a row's prompt that another prompt may reuse."""
        return slot.read if self._any_pieces else slot.read // PIECE * PIECE

    def _shared(self, slot: Slot, prompt: Sequence[int], settings: Hashable) -> int:
        """Tokens that a prompt can reuse from a row."""
        most = min(self._reusable(slot), len(prompt) - 1)
        if slot.settings != settings or not self.cache.remembers(slot.number, most):
            return 0
        shared = common(slot.prompt, prompt, most)
        return shared if self._any_pieces else shared // PIECE * PIECE


def rows_that_fit(
    model: SkippingModel, limits: ServeLimits, capacity: int, draft_model: SkippingModel | None
) -> int:
    """Rows of a cache that keeps the limits.

    Raises ValueError where the memory is too small for one.
    """
    if limits.cache_bytes is None:
        return limits.rows
    tracked = 0 if model.gates is None else DRIFT_BYTES * -(-capacity // EVEN) * EVEN
    each = model.cache_bytes(1, capacity) + tracked
    if draft_model is not None:
        with draft_model.keeping(model.kv_cache):
            each += draft_model.cache_bytes(1, capacity)
    if each > limits.cache_bytes:
        raise ValueError(
            f"cache_bytes {limits.cache_bytes}: one row of {limits.context} tokens needs {each}"
            " bytes; raise cache_bytes or lower context"
        )
    return min(limits.rows, limits.cache_bytes // each)


def common(one: Sequence[int], other: Sequence[int], most: int) -> int:
    """Tokens that both begin with, up to `most`, by bisection over equal slices."""
    least = 0
    while least < most:
        middle = (least + most + 1) // 2
        if tuple(one[least:middle]) == tuple(other[least:middle]):
            least = middle
        else:
            most = middle - 1
    return least
