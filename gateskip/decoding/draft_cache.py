"""The KV cache of a draft model that shares none with the model it drafts for."""

from __future__ import annotations

from collections.abc import Sequence

from gateskip.decoding.phases import FULL
from gateskip.decoding.prefill import cache_capacity, fill
from gateskip.decoding.rows import Row, Tokens
from gateskip.runtime.kv_cache import KVFormat
from gateskip.runtime.skipping import SkippingModel


class DraftCache:
    """A draft model's cache; it has the first tokens of each row's text.

    Tokens that the draft model did not read are missing at the end: looked up, decoded without a
    draft, or the last token of a draft that was accepted whole. The next draft reads them first.
    Rejected tokens are overwritten.
    """

    def __init__(self, model: SkippingModel, rows: Sequence[Row], kv_cache: KVFormat) -> None:
        """Prefills the prompts. Raises ValueError where the draft model has fewer positions."""
        self.model = model
        longest = max(len(row.prompt) for row in rows)
        try:
            with model.keeping(kv_cache):
                capacity = cache_capacity(longest, rows[0].stops.limit)
                self.cache = model.new_cache(len(rows), capacity)
        except ValueError as error:
            raise ValueError(f"the draft model: {error}") from error
        fill(model, rows, self.cache, FULL)
        self._read = [len(row.prompt) for row in rows]  # tokens of each row's text in the cache

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
