"""The quality of a cell: text, tasks and written answers, each compared with the baseline.

All cells score the same tokens and answer the same questions and prompts. The result keeps the
score of each block, question and answer; `compose.analysis.intervals` computes intervals from them.
The baseline comes first and stores the reference of the others.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

import gateskip
from compose.assets import TASKS, TextData, contamination, first_available, load_texts, token_blocks
from compose.bench.generate import prompt_ids, prompt_texts, stop_token_ids
from compose.bench.quality.own_answers import (
    SHOWN,
    DenseAnswers,
    dense_record,
    score_answers,
    write_answers,
)
from compose.bench.quality.scored import Scored, added, text_compute
from compose.bench.quality.text import (
    BLOCK,
    BlockScores,
    Head,
    load_blocks,
    load_head,
    load_stored,
    score_blocks,
    score_reference,
    store,
)
from compose.contract import CellJob
from compose.units import Progress
from gateskip.calibration.insight import inspect_text, summarize
from gateskip.decoding.decoder import Decoder, Mode
from gateskip.decoding.phases import Phase
from gateskip.model.compute import Saving, Usage

ROUNDING_TOKENS = 129  # on which the engine's rounding is compared
INSIGHT_BLOCKS = 2  # of the perplexity's text, on which the gates are inspected
OTHER_TYPE = {"float32": "bfloat16", "bfloat16": "float32", "float16": "float32"}
"""Float type of a pipeline -> the type in which the dense model is scored again for the noise
floor."""


class QualityBench:
    """Measures the quality of a cell's `decoder`."""

    def __init__(
        self,
        job: CellJob,
        decoder: Decoder,
        mode: Mode,
        settings: Mapping[str, Any],
        saving: Callable[[Usage], Saving],
        progress: Progress | None = None,
    ) -> None:
        """`mode` and `settings` are its decode settings; `saving` counts compute that was saved."""
        self.job, self.decoder, self.mode, self.saving = job, decoder, mode, saving
        self.progress = progress
        self.quality: Mapping[str, Any] = job.benchmark["quality"]
        self.model = Scored(decoder, **settings) if mode == "skip" else Scored(decoder, None)
        self.is_baseline = job.is_baseline
        self.stored: dict[str, Tensor] = {}
        """Tensors that the baseline stores for the other cells."""
        self.scored: dict[str, list[str]] = {}
        """Name of the text that was scored -> its rows."""

    def measure(self, reference: Path) -> dict[str, Any]:
        """The cell's `quality`, and the `compute`, `insight` and `notes` that belong to it.

        The baseline writes the file `reference`; the other cells read it.

        Raises:
            StepError: the baseline's file is absent, or was made from other text.
            AssetError: a text, a task or the prompts are not available.
        """
        record: dict[str, Any] = {}
        if self.quality["perplexity"] or self.quality["own_answers"]:
            if not self.is_baseline:
                self.stored = load_stored(reference)
            if self.quality["perplexity"]:
                record |= self._on_text()
            if self.quality["own_answers"]:
                record["own_answers"] = self._own_answers(self.quality["own_answers"])
            if self.is_baseline:
                store(self.stored, reference)
        if self.quality["tasks"]:
            record["tasks"] = self._tasks()
        if self.job.learns_from:
            self._add_contamination(record)
        return record

    def _dense_head(self) -> Head:
        return load_head(self.job.baseline_folder, self.job.device)

    # -- running text --------------------------------------------------------------------------

    def _on_text(self) -> dict[str, Any]:
        quality, model = self.quality, self.model
        texts = first_available(quality["perplexity"], None, self.job.asset_cache)
        count = max(1, quality["perplexity_tokens"] // BLOCK)
        blocks = token_blocks(texts, self.decoder.tokenizer, BLOCK, count)
        self.scored[texts.name] = texts.rows
        usage = self.decoder.skipping.usage
        usage.clear()
        record: dict[str, Any] = {}
        if self.is_baseline:
            scores, tensors = score_reference(model, blocks, progress=self.progress)
            self.stored |= tensors
            record |= self._noise_floor(blocks, tensors["hidden"], scores)
        else:
            scores = score_blocks(
                model,
                blocks,
                (load_blocks(self.stored, blocks), self._dense_head()),
                progress=self.progress,
                after=model.read_of(BLOCK),
            )
        record |= text_record(texts, scores)
        notes = []
        if read := model.read_of(BLOCK):
            record["perplexity"]["after_prompt"] = read
            notes.append(
                "perplexity, KL and agreement are measured on the last"
                f" {BLOCK - read} tokens of each block, after a prompt of {read} tokens"
            )
        if texts.name != quality["perplexity"][0]:
            notes.append(
                f"perplexity: {quality['perplexity'][0]} was not available, "
                f"so {texts.name} was used"
            )
        if notes:
            record["notes"] = notes
        if self.mode != "speculate":  # which saves time, not work
            record["compute"] = self._saved(usage)
        if (rounding := self._rounding(blocks[:1, :ROUNDING_TOKENS])) is not None:
            record["kl_of_rounding"] = rounding
        if model.thresholds is not None:
            record["insight"] = self._insight(blocks[:INSIGHT_BLOCKS], model.thresholds)
        return record

    def _noise_floor(self, blocks: Tensor, hidden: Tensor, base: BlockScores) -> dict[str, Any]:
        """Scores of the same model in the other float type: smaller differences are rounding noise.

        None for packed weights, which have no other type.
        """
        other = OTHER_TYPE.get(self.job.dtype)
        if other is None or self.decoder.arithmetic.weights != self.job.dtype:
            return {}
        job = self.job
        model = Scored(gateskip.load(job.folder, other, job.backend, device=job.device), None)
        scores = score_blocks(model, blocks, (hidden, self._dense_head()))
        floor = {
            "dtype": other,
            "kl": scores.kl,
            "ratio": scores.perplexity / base.perplexity,
            "greedy_agreement": scores.agreement,
        }
        return {"noise_floor": floor}

    def _rounding(self, ids: Tensor) -> float | None:
        """KL on ids [1, S] between the model as it is scored and the same model as it decodes.

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
        """The compute of each token, on a few blocks [N, S] of the same text."""
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
        saved = self.saving(usage)
        record: dict[str, Any] = {
            "saved_gross": saved.gross,
            "saved_net": saved.net,
            "saved_model": saved.model,
        }
        if self.mode == "skip":
            record["kept"] = round(self.decoder.kept_of(usage), 4)
            record["kept_shares"] = [round(share, 4) for share in usage.shares()]
        return record

    # -- written answers -----------------------------------------------------------------------

    def _own_answers(self, settings: Mapping[str, Any]) -> dict[str, Any]:
        """The cell's answers to prompts, compared with the dense model's: see `own_answers`."""
        tokenizer, new_tokens = self.decoder.tokenizer, settings["new_tokens"]
        texts = prompt_texts(settings["source"], settings["prompts"], self.job.asset_cache)
        prompts = [prompt_ids(tokenizer, text) for text in texts]
        stops = stop_token_ids(self.decoder)
        if self.is_baseline:
            dense = write_answers(self.model, prompts, new_tokens, stops)
            self.stored |= dense.tensors()
            return {**dense_record(dense, new_tokens, tokenizer), "questions": texts[:SHOWN]}
        dense = DenseAnswers.of(self.stored, prompts)
        self.model.clear_used()
        record = score_answers(
            self.model, dense, self._dense_head(), new_tokens, stops, tokenizer, self.progress
        )
        if self.mode == "skip":
            spent = text_compute(self.model.used, self.decoder, self.saving)
            return record if spent is None else {**record, "compute": spent}
        return record

    def _tasks(self) -> dict[str, Any]:
        from compose.bench.quality.tasks import run_tasks  # loads lm-eval

        used: dict[str, dict[Phase, Usage]] = {}

        def written(task: str) -> None:
            """Count the text written since the last call under this task."""
            used[task] = added(used.get(task, {}), self.model.used)
            self.model.clear_used()

        self.model.clear_used()
        scores = run_tasks(
            self.model,
            self.quality["tasks"],
            limit=self.quality["limit"],
            batch_size=self.quality["batch_size"],
            cache=self.job.asset_cache,
            progress=self.progress,
            written=written,
        )
        records = {name: asdict(score) for name, score in scores.items()}
        for name, usage in used.items():
            if self.mode == "skip" and name in records:
                records[name]["compute"] = text_compute(usage, self.decoder, self.saving)
        return records

    # -- contamination -------------------------------------------------------------------------

    def _add_contamination(self, record: dict[str, Any]) -> None:
        """Add the 13-gram contamination of all scored text, and a note for each text that has
        any."""
        quality = self.quality
        texts = dict(self.scored)
        if answers := quality["own_answers"]:
            prompts = load_texts(answers["source"], answers["prompts"], self.job.asset_cache)
            texts.setdefault(prompts.name, prompts.rows)
        tasks = [name for name in quality["tasks"] if name in TASKS]
        shares = contamination(
            self.job.learns_from, texts, tasks, quality["limit"], self.job.asset_cache
        )
        notes = [
            f"{text['contaminated']} of {text['rows']} rows of {name} share 13 consecutive words"
            " with a text that stages learn from"
            for name, text in shares.items()
            if text["contaminated"]
        ]
        record["contamination"] = shares
        if notes:
            record["notes"] = [*record.get("notes", ()), *notes]


def text_record(texts: TextData, scores: BlockScores) -> dict[str, Any]:
    """Scores on a text under the result's names, with the distance to the baseline where given."""
    perplexity = {
        "dataset": texts.name,
        "value": scores.perplexity,
        "tokens": scores.tokens,
        "block_nll": _rounded(scores.block_nll),
        "dense_nll": _rounded(scores.dense_nll) or None,
        "origin": texts.origin,
    }
    if scores.kl is None:
        return {"perplexity": perplexity}
    return {
        "perplexity": perplexity,
        "kl_to_baseline": scores.kl,
        "kl_median": scores.kl_median,
        "kl_p90": scores.kl_p90,
        "block_kl": _rounded(scores.block_kl),
        "greedy_agreement": scores.agreement,
    }


def _rounded(values: Sequence[float]) -> list[float]:
    return [round(value, 6) for value in values]
