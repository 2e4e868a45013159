"""The KV cache of a draft model that shares none with the model it drafts for."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from gateskip.decoding.phases import FULL
from gateskip.decoding.prefill import cache_capacity, fill
from gateskip.decoding.rows import Row, Tokens
from gateskip.runtime.kv_cache import KVCache, KVFormat
from gateskip.runtime.skipping import SkippingModel

FEW = 16  # missing tokens that pass with the next draft step


class DraftCache:
    """A draft model's cache; it has the first tokens of each row's text.

    Tokens that the draft model did not read are missing at the end: looked up, decoded without a
    draft, or the last token of a draft that was accepted whole. The next draft reads them first.
    Rejected tokens are overwritten.
    """

    def __init__(self, model: SkippingModel, batch: int, capacity: int, kv_cache: KVFormat) -> None:
        """Empty, for that many rows and positions. Raises ValueError where the draft model has
        fewer positions."""
        self.model = model
        try:
            with model.keeping(kv_cache):
                self.cache = model.new_cache(batch, capacity)
        except ValueError as error:
            raise ValueError(f"the draft model: {error}") from error
        self._read = [0] * batch  # tokens of each row's text in the cache

    @classmethod
    def of(cls, model: SkippingModel, rows: Sequence[Row], kv_cache: KVFormat) -> DraftCache:
        """A cache that has the prompts of rows."""
        longest = max(len(row.prompt) for row in rows)
        cache = cls(model, len(rows), cache_capacity(longest, rows[0].stops.limit), kv_cache)
        fill(model, rows, cache.cache, FULL)
        cache._read = [len(row.prompt) for row in rows]
        return cache

    def begin(self, row: int, source: int, count: int) -> None:
        """Let a row have no more than the first `count` tokens that another row, or itself, has."""
        cache = self.cache
        assert isinstance(cache, KVCache), "rows of other caches cannot be shared"
        count = min(count, self._read[source])
        count = count if cache.remembers(source, count) else 0
        if row != source:
            cache.copy_row(source, row, count)
        self._read[row] = cache.reached[row] = count

    def prefill(self, row: Row, most: int) -> bool:
        """Read up to `most` of a row's missing tokens; whether a draft can read what is left."""
        first, missing = self._read[row.number], self.missing(row)[:-1]
        if len(missing) <= FEW:
            return True
        cache, part = self.cache, missing[:most]
        assert isinstance(cache, KVCache), "rows of other caches cannot be read alone"
        with cache.alone(row.number) as alone:
            ids = torch.tensor([part], device=self.model.device)
            self.model.forward(ids, alone, [first])
        self._read[row.number] += len(part)
        return len(part) == len(missing)

    def missing(self, row: Row) -> Tokens:
        """The tokens of a row that the cache lacks, and the last one, which is in no cache yet."""
        return row.text[self._read[row.number] :]

    def catch_up(self, row: Row) -> None:
        """Let the draft model read a row's missing tokens before the last one."""
        first, missing = self._read[row.number], self.missing(row)[:-1]
        if missing:
            self.model.decode([missing], self.cache, [row.number], [first])
            self._read[row.number] = row.slot

    def drafted(self, row: int, slot: int, drafted: int, accepted: int) -> None:
        """Note a verified draft of a row, whose last token was at position `slot`: the model read
        this token and all of the draft but its end."""
        self._read[row] = slot + min(drafted, accepted + 1)
