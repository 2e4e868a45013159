"""Times a turn of a cell: prompts in one shape are prefilled and continued once.

Also measures the size of a model folder (bytes on disk and in memory, multiply-adds) and the
machine's roofline: memory bandwidth bounds decoding, arithmetic bounds prefill.
"""

from __future__ import annotations

import hashlib
import json
import time
from collections.abc import Callable, Iterable, Mapping
from functools import lru_cache, partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from compose.bench.generate import stop_token_ids
from compose.bench.quality.scored import added
from compose.bench.speed.workloads import Rows, TurnText, TurnTexts
from compose.capacity import usable_cores
from compose.memory import peak_bytes, reset_peak, resident_bytes
from gateskip.decoding.decoder import Decoder, Mode
from gateskip.decoding.phases import Phase
from gateskip.decoding.prefill import cache_capacity
from gateskip.decoding.sampling import GREEDY, Sampler
from gateskip.decoding.stats import Generation, Stats
from gateskip.model.compute import Saving, Usage, Work

WARM_TOKENS = 16  # of the prompt: they bring weights into memory before its use is measured


class SpeedTurns:
    """The turns of one cell; the runner alternates them with those of other cells.

    Only `new tokens - rows` count as decoded: the first token of each row comes from prefill.
    """

    def __init__(
        self,
        decoder: Decoder,
        mode: Mode,
        settings: Mapping[str, Any],
        saving: Callable[[Usage], Saving],
        speed: Mapping[str, Any],
        threads: int | None,
        asset_cache: Path,
    ) -> None:
        """`settings` are arguments of `Decoder.generate`; `saving` counts the compute that a
        `Usage` saved; `speed` is the benchmark's speed section."""
        self.decoder, self.mode, self.settings = decoder, mode, dict(settings)
        self.saving, self.speed = saving, speed
        self.threads = threads
        self.texts = TurnTexts(decoder.tokenizer, speed, asset_cache)
        sampling = speed.get("sampling")
        self.sampler = Sampler(**sampling) if sampling else GREEDY
        self._seed = 0  # of the next prompts' samples: each time others
        self._timed = False
        self._held = 0
        """Bytes that the process used before the shape that is measured now."""

    def warm(self, which: TurnText, threads: int) -> dict[str, Any]:
        """Run a whole turn of a shape without counting it, so that everything made on first use
        exists.

        The peak memory of the process counts from here, with the weights in memory.
        """
        if not self._timed:
            self._timed = True
            torch.set_num_threads(self.threads or threads)
            self.decoder.forget_draft_costs()  # measured with other threads
        first = self.texts[which][0]
        self._generate([first[0][:WARM_TOKENS]], 2)
        reset_peak()
        self._held = resident_bytes()
        return self.measure(which)

    def measure(self, which: TurnText) -> dict[str, Any]:
        """One turn: tokens and seconds of prefill and decoding, seconds to the first token, bytes,
        and the counts of skipping or speculation. `speed.turns` adds turns up."""
        batches = self.texts[which]
        usage, before = self.decoder.skipping.usage, self._engine_seconds()
        usage.clear()
        stats, first_tokens, decoded = Stats(), list[float](), 0
        used: dict[Phase, Usage] = {}
        digest = hashlib.sha256()
        for rows in batches:
            generation = self._generate(rows, self.speed["new_tokens"], which.category)
            stats.add(generation.stats)
            used = added(used, generation.usage)
            first_tokens.append(generation.stats.ttft_s)
            decoded += generation.stats.new_tokens - len(rows)
            digest.update(json.dumps(generation.tokens).encode())
        cache = max(self._cache_bytes(rows) for rows in batches)
        turn: dict[str, Any] = {
            "prompt_tokens": stats.prompt_tokens,
            "prefill_s": stats.prefill_s,
            "tokens": decoded,
            "decode_s": stats.decode_s,
            "ttft_s": sum(first_tokens) / len(first_tokens),
            "digest": digest.hexdigest()[:16] if self.sampler == GREEDY else None,
            "resident_bytes": held_bytes(self.decoder.tensors()),
            "peak_bytes": peak_bytes(),
            "cache_bytes": cache,
            "beside_bytes": max(0, peak_bytes() - self._held - cache),
            "threads": torch.get_num_threads(),
            "affinity": len(usable_cores()),
        }
        if spent := self._engine_seconds():
            turn["spent"] = {part: spent[part] - before.get(part, 0.0) for part in spent}
        if self.mode == "skip":
            turn["compute"] = {"saved_net_while_timed": self.saving(usage).net} | {
                f"{phase}_saved_while_timed": self.saving(phase_usage).net
                for phase, phase_usage in used.items()
                if phase_usage.seen
            }
        if self.mode == "speculate":
            turn["speculation"] = speculation_counts(stats)
        return turn

    def _generate(self, rows: Rows, new_tokens: int, category: str = "") -> Generation:
        """Continue prompts. Those of a category stop where an answer ends; running text does
        not."""
        self._seed += 1
        drawn: dict[str, Any] = {"sampler": self.sampler, "seed": self._seed}
        stop = stop_token_ids(self.decoder) if category else ()
        return self.decoder.generate(
            rows, new_tokens, self.mode, eos=stop, **drawn, **self.settings
        )

    def _cache_bytes(self, rows: Rows) -> int:
        longest = max(map(len, rows))
        capacity = cache_capacity(longest, self.speed["new_tokens"])
        return self.decoder.skipping.cache_bytes(len(rows), capacity)

    def _engine_seconds(self) -> dict[str, float]:
        """Seconds that native code has used so far, by part, drafts included; empty for other
        backends."""
        total: dict[str, float] = {}
        for model in self.decoder.models():
            if model.engine is not None:
                for part, seconds in model.engine.spent().items():
                    total[part] = total.get(part, 0.0) + seconds
        return total


def speculation_counts(stats: Stats) -> dict[str, Any]:
    """The draft's name, and counts of the drafts' outcomes, which can be added up."""
    return {
        "draft_length_histogram": {str(n): times for n, times in stats.draft_lengths.items()},
        "drafted": stats.drafted,
        "accepted": stats.accepted,
        "passes": stats.passes,
        "positions": [list(pair) for pair in stats.positions],
        "looked_up": stats.looked_up,
        "draft_weights": stats.draft_weights,
        "draft_s": stats.draft_s,
        "verify_s": stats.verify_s,
    }


def disk_bytes(folder: Path) -> int:
    """Bytes of a folder's weight files, gates included."""
    return sum(file.stat().st_size for file in folder.glob("*.safetensors"))


def held_bytes(tensors: Iterable[Tensor]) -> int:
    """Bytes of tensors, each storage counted once."""
    storages = (tensor.untyped_storage() for tensor in tensors)
    return sum({storage.data_ptr(): storage.nbytes() for storage in storages}.values())


@lru_cache
def dense_work(folder: Path) -> Work:
    """Multiply-adds of the model in a folder, without reading its weights."""
    from transformers import AutoConfig, AutoModelForCausalLM

    config = AutoConfig.from_pretrained(folder)
    with torch.device("meta"):
        return Work.of(AutoModelForCausalLM.from_config(config))


READ_BYTES, GEMM_SIZE = 1 << 28, 1024


def roofline(device: str = "cpu") -> dict[str, float]:
    """Bytes read from a device's memory (GB/s) and multiply-adds of a GEMM (GFLOP/s), best of a few
    tries."""
    data = torch.ones(READ_BYTES // 4, device=device)
    read = min(_seconds(data.sum) for _ in range(5))
    limits = {"memory_gb_per_s": READ_BYTES / read / 1e9}
    for name, dtype in (("float32", torch.float32), ("bfloat16", torch.bfloat16)):
        a = torch.ones(GEMM_SIZE, GEMM_SIZE, dtype=dtype, device=device)
        spent = min(_seconds(partial(torch.matmul, a, a)) for _ in range(3))
        limits[f"gemm_{name}_gflop_per_s"] = 2 * GEMM_SIZE**3 / spent / 1e9
    return limits


def _seconds(work: Callable[[], Tensor]) -> float:
    started = time.perf_counter()
    if work().is_cuda:
        torch.cuda.synchronize()
    return time.perf_counter() - started
