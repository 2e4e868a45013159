"""One cell under measurement: a model folder, decoded in one way, in one process.

The runner asks for `load`, then `quality` or `lossless`, then `warm` and `speed` turn by turn. Each
answer is a part of the cell's result, as `compose.results` names it.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor

import gateskip
from compose.assets import TASKS, contamination, first_available, load_texts, token_blocks
from compose.bench.footprint import dense_work, disk_bytes, module_bytes
from compose.bench.generate import prompt_ids
from compose.bench.lossless import check_lossless
from compose.bench.scored import Scored
from compose.bench.speed import SpeedTurns
from compose.bench.text import load_head, load_reference, save_reference, score_blocks
from compose.errors import AssetError, StepError
from gateskip.calibration.insight import inspect_text, summarize
from gateskip.decoding.decoder import Decoder, Mode
from gateskip.model.compute import Saving, Usage
from gateskip.model.families import UnsupportedModel
from gateskip.runtime.backend import BackendName

BLOCK = 512  # tokens of a block on which perplexity is measured
ROUNDING_TOKENS = 129  # on which the engine's rounding is compared
INSIGHT_BLOCKS = 2  # of the perplexity's text, on which the gates are inspected


@dataclass(frozen=True)
class CellJob:
    """What a cell's process is to measure."""

    name: str
    folder: Path
    baseline_folder: Path
    decode: Mapping[str, Any] | None
    """Parameters of the decode stage, None for plain decoding."""
    benchmark: Mapping[str, Any]
    """The pipeline's benchmark section."""
    seed: int
    dtype: str
    asset_cache: Path
    reference: Path
    """Where the baseline's hidden states are, or are to be put."""
    threads: int | None
    backend: BackendName | Literal["auto"] = "auto"
    """What runs the model."""
    learns_from: Sequence[tuple[str, int | None]] = ()
    """Of the baseline only: source and row limit of each text that a stage of the plan reads."""


class CellBench:
    """Measures the cell that `job` describes."""

    def __init__(self, job: CellJob) -> None:
        self.job = job
        self.settings = dict(job.decode or {"use": "plain"})
        self.mode: Mode = self.settings.pop("use")
        if job.threads is not None:
            torch.set_num_threads(job.threads)

    @cached_property
    def decoder(self) -> Decoder:
        """The cell's model, ready to decode."""
        decoder = self._load()
        budget = self.settings.get("budget", self.settings.get("draft_budget"))
        if budget is not None:
            try:
                decoder.thresholds(budget)
            except ValueError as error:
                raise StepError(f"{self.mode}: {error}") from error
        return decoder

    def _load(self) -> Decoder:
        try:
            decoder: Decoder = gateskip.load(self.job.folder, self.job.dtype, self.job.backend)
        except UnsupportedModel as error:
            raise StepError(f"{self.job.backend}: {error}") from error
        return decoder

    def load(self) -> dict[str, Any]:
        """Bytes on disk and in memory, the kernels chosen, and the arithmetic of both phases."""
        decoder = self.decoder
        sizes = {
            "disk_bytes": disk_bytes(self.job.folder),
            "resident_bytes": module_bytes(decoder.skipping.model, decoder.skipping.gates),
        }
        return {
            "size": sizes,
            "kernels": decoder.kernels,
            "kernel_times_us": decoder.kernel_times,
            "arithmetic": decoder.arithmetic.to_dict(),
            "scoring_arithmetic": decoder.scoring_arithmetic.to_dict(),
            "backend_fallback": decoder.fallback,
        }

    # -- quality -------------------------------------------------------------------------------

    def quality(self, reference: Path) -> dict[str, Any]:
        """Perplexity, distance to the baseline, tasks, and compute saved on the same text."""
        wanted = self.job.benchmark["quality"]
        model = Scored(self.decoder, self.settings["budget"] if self.mode == "skip" else None)
        record: dict[str, Any] = {}
        if wanted["perplexity"]:
            record |= self._on_text(model, wanted, reference)
        if wanted["tasks"]:
            from compose.bench.tasks import run_tasks  # loads lm-eval

            scores = run_tasks(
                model,
                wanted["tasks"],
                limit=wanted["limit"],
                batch_size=wanted["batch_size"],
                cache=self.job.asset_cache,
            )
            record["tasks"] = {name: asdict(score) for name, score in scores.items()}
        if self.job.learns_from:
            record |= self._contamination(record, wanted)
        return record

    def _contamination(
        self, record: Mapping[str, Any], wanted: Mapping[str, Any]
    ) -> dict[str, Any]:
        """13-gram contamination of what is scored, and a note for each text that has any."""
        texts = [record["perplexity"]["dataset"]] if "perplexity" in record else []
        tasks = [name for name in wanted["tasks"] if name in TASKS]
        cache = self.job.asset_cache
        shares = contamination(self.job.learns_from, texts, tasks, wanted["limit"], cache)
        notes = [
            f"{each['contaminated']} of {each['rows']} rows of {name} share thirteen words in a row"
            " with a text that stages learn from"
            for name, each in shares.items()
            if each["contaminated"]
        ]
        notes = [*record.get("notes", ()), *notes]
        return {"contamination": shares} | ({"notes": notes} if notes else {})

    def _on_text(self, model: Scored, wanted: Mapping[str, Any], reference: Path) -> dict[str, Any]:
        texts = first_available(wanted["perplexity"], None, self.job.asset_cache)
        count = max(1, wanted["perplexity_tokens"] // BLOCK)
        blocks = token_blocks(texts, self.decoder.tokenizer, BLOCK, count)
        usage = self.decoder.skipping.usage
        usage.clear()
        if self.job.folder == self.job.baseline_folder and self.mode == "plain":
            scores, distance = save_reference(model, blocks, reference), {}
        else:
            dense = load_reference(reference, blocks), load_head(self.job.baseline_folder)
            scores = score_blocks(model, blocks, dense)
            distance = {"kl_to_baseline": scores.kl, "greedy_agreement": scores.agreement}
        perplexity = {
            "dataset": texts.name,
            "value": scores.perplexity,
            "tokens": scores.tokens,
            "origin": texts.origin,
        }
        record: dict[str, Any] = {"perplexity": perplexity, **distance}
        if texts.name != wanted["perplexity"][0]:
            record["notes"] = [
                f"perplexity: {wanted['perplexity'][0]} could not be had here, "
                f"so {texts.name} stands in"
            ]
        if self.mode != "speculate":  # which saves time, not work
            record["compute"] = self._saved(usage)
        if (rounding := self._rounding(blocks[:1, :ROUNDING_TOKENS])) is not None:
            record["kl_of_rounding"] = rounding
        if model.thresholds is not None:
            record["insight"] = self._insight(blocks[:INSIGHT_BLOCKS], model.thresholds)
        return record

    def _rounding(self, ids: Tensor) -> float | None:
        """KL from these weights as they are scored to the same as they are decoded, on ids [1, S].

        None where decoding does not round activations.
        """
        skipping, engine = self.decoder.skipping, self.decoder.skipping.engine
        if engine is None or not engine.rounded:
            return None
        with torch.inference_mode():
            cache = skipping.new_cache(1, ids.shape[1])
            states = skipping.decode([ids[0].tolist()], cache, [0], [0])  # [S, H]
            decoded = skipping.head(states).log_softmax(-1)
            states = skipping.forward(ids, cache, [0])[0]
            scored = skipping.scores(states).log_softmax(-1)
        return float((scored.exp() * (scored - decoded)).sum(-1).mean())

    def _insight(self, blocks: Tensor, thresholds: Sequence[float]) -> dict[str, Any]:
        """Which tokens get how much compute, on a few blocks [N, S] of the same text."""
        skipping, tokenizer = self.decoder.skipping, self.decoder.tokenizer
        assert skipping.gates is not None, "thresholds come with gates"
        rows = [row.tolist() for row in blocks]
        return summarize(
            [
                inspect_text(
                    skipping.model, skipping.gates, tokenizer, row, thresholds, skipping.kv_rule
                )
                for row in rows
            ]
        )

    def _saved(self, usage: Usage) -> dict[str, Any]:
        saved = self._saving(usage)
        record: dict[str, Any] = {
            "saved_gross": saved.gross,
            "saved_net": saved.net,
            "saved_model": saved.model,
        }
        if self.mode == "skip":
            record["kept_shares"] = [round(share, 4) for share in usage.shares()]
        return record

    def _saving(self, usage: Usage) -> Saving:
        """Of the dense model's multiply-adds, those that the cell did not spend."""
        budget = self.settings["budget"] if self.mode == "skip" else 1.0
        return self.decoder.saved(usage, budget, dense_work(self.job.baseline_folder))

    # -- losslessness and speed ----------------------------------------------------------------

    def lossless(self) -> dict[str, Any]:
        """Speculation against plain decoding, token for token, one prompt at a time."""
        wanted = self.job.benchmark["lossless"]
        prompts = self._prompts(wanted["source"], wanted["prompts"])
        return check_lossless(self.decoder, self.settings, prompts, wanted["new_tokens"])

    def _prompts(self, source: str, count: int) -> list[list[int]]:
        """Prompts as token ids, through the chat template where there is one."""
        data = load_texts(source, count, self.job.asset_cache)
        texts = data.prompts or data.rows
        if len(texts) < count:
            raise AssetError(f"{source} has {len(texts)} prompts, but {count} are asked for")
        return [prompt_ids(self.decoder.tokenizer, text) for text in texts[:count]]

    @cached_property
    def _turns(self) -> SpeedTurns:
        job, wanted = self.job, self.job.benchmark["speed"]
        return SpeedTurns(
            self.decoder,
            self.mode,
            self.settings,
            self._saving,
            wanted,
            job.threads,
            job.asset_cache,
        )

    def warm(self, batch: int, context: int, category: str, threads: int) -> dict[str, Any]:
        """A turn that is not counted; see `SpeedTurns.warm`."""
        return self._turns.warm(batch, context, category, threads)

    def speed(self, batch: int, context: int, category: str) -> dict[str, Any]:
        """One turn of a shape that was warmed; see `SpeedTurns.measure`."""
        return self._turns.measure(batch, context, category)
