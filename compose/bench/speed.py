"""What a speed round measures: one repeat of prefill and decoding at one batch size."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch

from compose.assets import load_texts, token_blocks
from compose.memory import peak_bytes, reset_peak
from gateskip.decoding.decoder import Decoder, Mode
from gateskip.decoding.stats import Generation
from gateskip.model.compute import Saving, Usage

WARM_TOKENS = 16  # decoded once at each batch size before anything is timed


class SpeedRounds:
    """The speed rounds of one cell; the runner interleaves them with those of other cells."""

    def __init__(
        self,
        decoder: Decoder,
        mode: Mode,
        settings: Mapping[str, Any],
        saving: Callable[[Usage], Saving],
        threads: int | None,
        asset_cache: Path,
    ) -> None:
        """`settings` are arguments of `Decoder.generate`; `saving` counts what `Usage` saved."""
        self.decoder, self.mode, self.settings = decoder, mode, dict(settings)
        self.saving, self.threads, self.asset_cache = saving, threads, asset_cache
        self._warm: set[int] = set()  # batch sizes that were run before
        self._timed = False

    def measure(
        self, batch: int, threads: int, prompt_tokens: int, new_tokens: int
    ) -> dict[str, Any]:
        """One repeat at a batch size; the first at each batch size warms up before it measures.

        Gives tokens a second of prefill and decoding, seconds to the first token, the process's
        peak in bytes, and what skipping or speculation did while it was timed.
        """
        if not self._timed:
            self._timed = True
            torch.set_num_threads(self.threads or threads)
            self.decoder.forget_draft_costs()  # measured with other threads
            reset_peak()
        prompts = self._prompts(batch, prompt_tokens)
        if batch not in self._warm:
            self._warm.add(batch)
            self._generate(prompts, WARM_TOKENS)
        usage = self.decoder.skipping.usage
        usage.clear()
        stats = self._generate(prompts, new_tokens).stats
        decoded = stats.new_tokens - batch  # the first token of each row comes out of prefill
        numbers: dict[str, Any] = {
            "prefill_tokens_per_s": stats.prompt_tokens / stats.prefill_s,
            "decode_tokens_per_s": decoded / stats.decode_s if decoded else None,
            "ttft_s": stats.ttft_s,
            "peak_bytes": peak_bytes(),
        }
        if self.mode == "skip":
            numbers["compute"] = {"saved_net_while_timed": self.saving(usage).net}
        if self.mode == "speculate":
            numbers["speculation"] = {
                "draft_s": stats.draft_s,
                "verify_s": stats.verify_s,
                "timed_draft_lengths": stats.draft_lengths,
            }
        return numbers

    def _generate(self, prompts: list[list[int]], new_tokens: int) -> Generation:
        return self.decoder.generate(prompts, new_tokens, self.mode, **self.settings)

    def _prompts(self, batch: int, length: int) -> list[list[int]]:
        """Running text of an exact length, so that the time does not depend on how prompts end."""
        texts = load_texts("heldout-text", None, self.asset_cache)
        rows: list[list[int]] = token_blocks(texts, self.decoder.tokenizer, length, batch).tolist()
        return rows
