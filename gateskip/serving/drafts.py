"""Drafts of rows that decode together: who drafts for which rows, and whether it pays."""

from __future__ import annotations

from collections.abc import Sequence

from gateskip.decoding.config import DraftConfig
from gateskip.decoding.decoder import Decoder
from gateskip.decoding.rows import Row
from gateskip.decoding.sampling import GREEDY
from gateskip.decoding.speculation import Draft, Drafting
from gateskip.serving.answers import Answer
from gateskip.serving.slots import Slots

CAUGHT_UP = 256  # tokens of a text that another model reads at once before it drafts
Drafted = tuple[Drafting, list[int]]
"""A drafting, and the places of the rows for which it drafted."""


class Drafts:
    """Makes drafts for rows of a cache, as a decoder does."""

    def __init__(self, decoder: Decoder, slots: Slots) -> None:
        self._decoder, self._slots = decoder, slots
        self._draftings: dict[tuple[DraftConfig, int], Drafting | None] = {}

    def of(self, config: DraftConfig, rows: int) -> Drafting | None:
        """The drafting of a pass of some rows; None where no draft is faster. Passes of similar
        numbers of rows share their measured costs."""
        key = (config, 1 << (rows - 1).bit_length())
        if key not in self._draftings:
            drafting = self._draftings[key] = self._decoder.drafting(*key)
            if drafting is not None and drafting.weights == "model":
                drafting.own_cache = self._slots.draft_cache
        return self._draftings[key]

    def make(self, answers: Sequence[Answer]) -> tuple[list[Draft], list[Drafted]]:
        """A draft for each row, and who drafted for which rows. Rows that may draft do so where
        they are at least half of the pass: a longer pass delays the others, too."""
        drafts, groups = [Draft(0) for _ in answers], dict[DraftConfig, list[int]]()
        for i, answer in enumerate(answers):
            if answer.drafts:
                groups.setdefault(answer.draft, []).append(i)
        if 2 * sum(map(len, groups.values())) < len(answers):
            return drafts, []
        drafted = list[Drafted]()
        for config, places in groups.items():
            try:
                drafted += self._make(config, places, answers, drafts)
            except Exception as error:  # the others of the pass go on
                for i in places:
                    answers[i].row.fail(error)
        return drafts, drafted

    def _make(
        self,
        config: DraftConfig,
        places: Sequence[int],
        answers: Sequence[Answer],
        drafts: list[Draft],
    ) -> list[Drafted]:
        """Fill in the drafts of the rows at some places."""
        drafting = self.of(config, len(answers))
        if drafting is None:
            return []
        some = [i for i in places if ready(drafting, answers[i].row)]
        if not some:
            return []
        made = drafting.make([answers[i].row for i in some], GREEDY, self._slots.cache)
        for i, draft in zip(some, made, strict=True):
            drafts[i] = draft
        return [(drafting, some)]


def ready(drafting: Drafting, row: Row) -> bool:
    """Whether drafting can go on with a row. Another model first reads the row's text, a piece a
    call."""
    return drafting.own_cache is None or drafting.own_cache.prefill(row, CAUGHT_UP)


def steps_before(drafting: Drafting) -> int:
    """Plain steps until a draft is tried again; 0 where one is made now."""
    drafted, looked_up, rounds, _ = drafting.lengths()
    return 0 if drafted or looked_up else rounds
