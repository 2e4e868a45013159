"""The text of one split as token blocks: read from sources, mixed, or written by the model."""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from compose.assets import SELF_WRITTEN, load_texts, token_blocks
from compose.stages.text.own_text import OwnText

if TYPE_CHECKING:
    from torch import Tensor
    from transformers import PreTrainedTokenizerBase

    from compose.contract import DataSpec, Split, StageJob
    from compose.units import Progress as Shown

GIVEN = 4  # one part in so many of a block is given, where the untouched model goes on


@dataclass(frozen=True, kw_only=True)
class SplitText:
    """The text of a split, for blocks of `length` tokens."""

    spec: DataSpec
    split: Split
    tokenizer: PreTrainedTokenizerBase
    length: int
    dense: Path
    """The folder of the dense model, which writes text."""
    cache: Path
    """The cache folder for downloaded data and for text that the model wrote."""
    seed: int
    progress: Shown

    def blocks(self, count: int) -> Tensor:
        """Token blocks [N, length], N at most `count`.

        Of a mix there are `count` blocks: each source gives its share, repeated where it has less,
        and any first part of the blocks has about the proportions of the whole.
        """
        weights = self.spec.weights
        if len(weights) == 1:
            return self._of(next(iter(weights)), count)
        total = sum(weights.values())
        parts = []
        for source, weight in weights.items():
            share = math.ceil(count * weight / total)
            part = self._of(source, share)
            parts.append(part.repeat(math.ceil(share / len(part)), 1)[:share])
        return interleaved(parts)[:count]

    def _of(self, source: str, count: int) -> Tensor:
        """Blocks of one source, at most `count`."""
        limit = self.spec.limit
        if source == SELF_WRITTEN:
            return self._own("writing").written(min(count, limit))
        texts = load_texts(source, limit, self.cache)
        if source not in self.spec.answered:
            return token_blocks(texts, self.tokenizer, self.length, count)
        own_text = self._own("answering")
        if texts.prompts is not None:
            return own_text.answered(texts.prompts, count)
        prefixes = token_blocks(texts, self.tokenizer, self.length, count)
        return own_text.continued(prefixes[:, : self.length // GIVEN])

    def _own(self, doing: str) -> OwnText:
        return OwnText(
            dense=self.dense,
            cache=self.cache,
            length=self.length,
            seed=self.seed,
            progress=lambda done, total: self.progress(done, total, f"{doing} {self.split} text"),
        )


def split_blocks(
    job: StageJob,
    split: Split,
    tokenizer: PreTrainedTokenizerBase,
    length: int | None = None,
    limit: int | None = None,
) -> Tensor:
    """Token blocks [N, length] of a split of a stage's job, with the split's own length and row
    limit where none is given."""
    spec = job.train if split == "train" else job.calibration
    assert spec is not None, f"a stage names {split} in reads_data to be given it"
    text = SplitText(
        spec=spec,
        split=split,
        tokenizer=tokenizer,
        length=length or spec.length,
        dense=job.dense,
        cache=job.asset_cache,
        seed=2 * job.seed + (split == "train"),
        progress=job.progress,
    )
    return text.blocks(limit or spec.limit)


def interleaved(parts: list[Tensor]) -> Tensor:
    """Blocks [N_i, S] of several sources as one [sum N_i, S], evenly mixed; each source keeps its
    order."""
    places = torch.cat([(torch.arange(len(part)) + 0.5) / len(part) for part in parts])
    return torch.cat(parts)[torch.argsort(places, stable=True)]
