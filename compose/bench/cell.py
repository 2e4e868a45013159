"""Measures one cell: a model folder with its decode settings, in one process.

The runner calls `load`, then `quality` or `lossless`, then `warm` and `speed` turn by turn. Each
answer is a part of the cell's result, by the names of `compose.results`.
"""

from __future__ import annotations

from functools import cached_property
from pathlib import Path
from typing import Any

import torch

import gateskip
from compose.assets import resolve_model
from compose.bench.generate import load_prompts
from compose.bench.quality.lossless import check_lossless
from compose.bench.quality.measure import QualityBench
from compose.bench.speed.measure import SpeedTurns, dense_work, disk_bytes, held_bytes
from compose.bench.speed.workloads import TurnText
from compose.contract import CellJob
from compose.errors import StepError
from compose.units import Progress
from gateskip.decoding.decoder import Decoder, Mode
from gateskip.kernels import autotune
from gateskip.model.compute import Saving, Usage
from gateskip.model.families import UnsupportedModel
from gateskip.runtime.kv_cache import KVFormat


class CellBench:
    """Measures the cell that `job` describes."""

    def __init__(self, job: CellJob, progress: Progress | None = None) -> None:
        self.job, self.progress = job, progress
        self.settings = dict(job.decode or {"use": "plain"})
        self.mode: Mode = self.settings.pop("use")
        self.kv_cache: KVFormat = self.settings.pop("kv_cache", "model")
        self.draft_model: str | None = self.settings.pop("draft_model", None)
        if job.threads is not None:
            torch.set_num_threads(job.threads)

    @cached_property
    def decoder(self) -> Decoder:
        """The cell's model, ready to decode."""
        decoder = self._load()
        budget = self.settings.get("draft_budget")
        weights = self.settings.get("draft_weights", "auto")
        try:
            if self.mode == "skip":
                decoder.phases(**self.settings)
            elif budget is not None:
                decoder.thresholds(budget)
                verified = self.settings.get("verify_budget", 1.0)
                decoder.phases(verified, prompt_budget=self.settings.get("prompt_budget"))
            if weights != "auto":  # which is chosen while nothing else runs
                decoder.prepare_drafts(weights)
        except ValueError as error:
            raise StepError(f"{self.mode}: {error}") from error
        return decoder

    def _load(self) -> Decoder:
        job = self.job
        try:
            decoder = self._open(job.folder)
        except UnsupportedModel as error:
            raise StepError(f"{job.backend}: {error}") from error
        if self.draft_model is not None:
            draft = resolve_model(self.draft_model, job.asset_cache).path
            try:
                decoder.draft_by(self._open(draft))
            except ValueError as error:
                raise StepError(f"draft_model {self.draft_model}: {error}") from error
        decoder.skipping.kv_cache = self.kv_cache  # of what is scored, too
        return decoder

    def _open(self, folder: Path) -> Decoder:
        job = self.job
        decoder: Decoder = gateskip.load(folder, job.dtype, job.backend, device=job.device)
        return decoder

    def load(self) -> dict[str, Any]:
        """Bytes on disk and in memory, the chosen kernels, and the arithmetic of prefill and
        decoding."""
        decoder = self.decoder
        sizes = {
            "disk_bytes": disk_bytes(self.job.folder),
            "resident_bytes": held_bytes(decoder.tensors()),
        }
        return {
            "size": sizes,
            "kernels": decoder.kernels,
            "kernel_times_us": decoder.kernel_times,
            "arithmetic": decoder.arithmetic.to_dict(),
            "scoring_arithmetic": decoder.scoring_arithmetic.to_dict(),
            "backend_fallback": decoder.fallback,
            "choices": autotune.made(),
        }

    # -- quality -------------------------------------------------------------------------------

    def quality(self, reference: Path) -> dict[str, Any]:
        """Perplexity, distance to the baseline, tasks, answers: see `bench.quality.measure`."""
        bench = QualityBench(
            self.job, self.decoder, self.mode, self.settings, self._saving, self.progress
        )
        return bench.measure(reference)

    def _saving(self, usage: Usage) -> Saving:
        """Of the dense model's multiply-adds, those that the cell saved."""
        budget = self.settings["budget"] if self.mode == "skip" else 1.0
        dense = dense_work(self.job.baseline_folder)
        return self.decoder.saved(usage, budget, dense, self.settings.get("prompt_budget"))

    # -- losslessness and speed ----------------------------------------------------------------

    def lossless(self) -> dict[str, Any]:
        """Compare speculation with plain decoding, token by token, one prompt at a time."""
        settings = self.job.benchmark["lossless"]
        prompts = load_prompts(
            self.decoder.tokenizer, settings["source"], settings["prompts"], self.job.asset_cache
        )
        return check_lossless(
            self.decoder, self.settings, prompts, settings["new_tokens"], self.progress
        )

    @cached_property
    def _turns(self) -> SpeedTurns:
        job, speed = self.job, self.job.benchmark["speed"]
        return SpeedTurns(
            self.decoder,
            self.mode,
            self.settings,
            self._saving,
            speed,
            job.threads,
            job.asset_cache,
        )

    def warm(self, which: TurnText, threads: int) -> dict[str, Any]:
        """A turn that does not count; see `SpeedTurns.warm`."""
        return self._turns.warm(which, threads)

    def speed(self, which: TurnText) -> dict[str, Any]:
        """One turn of a shape after its warm-up; see `SpeedTurns.measure`."""
        return self._turns.measure(which)
