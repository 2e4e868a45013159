"""`gateskip bench`: ways of decoding one folder, timed against each other in one process.

All systems get the same prompts, and each repeat runs every system once: repeats are interleaved
against drift. A roofline of the machine is reported beside the throughput.
"""

from __future__ import annotations

import statistics
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

import gateskip
from compose import memory
from compose.artifacts.gguf import KINDS as GGUF_KINDS
from compose.artifacts.gguf import write_gguf
from compose.bench.footprint import module_bytes
from compose.bench.generate import stop_token_ids
from compose.bench.measurement import Measurement, Rows, Run, Runner, Workloads
from compose.bench.peers.llama_cpp import LlamaCpp
from compose.bench.peers.transformers import Transformers
from compose.bench.roofline import roofline
from compose.bench.systems import System, parse_system
from compose.bench.workloads import prompts_by_category, running_text
from compose.errors import UserError
from compose.units import Progress
from gateskip.decoding.decoder import Decoder, cache_capacity
from gateskip.runtime.backend import BackendName

WARM_TOKENS = 16  # they bring weights into memory before the memory that a text adds is measured


def race(
    folder: Path,
    systems: Sequence[str],
    batches: Sequence[int],
    contexts: Sequence[int],
    new_tokens: int,
    repeats: int,
    prompts: str | None = None,
    limit: int | None = None,
    progress: Progress | None = None,
    cache: Path | None = None,
) -> dict[str, Any]:
    """Time systems on running text of each batch and context, or on `prompts` by category.

    Returns `measurements`, the machine's `roofline`, and in bytes the folder's weights
    (`weight_bytes`), the largest KV cache (`cache_bytes`), and the memory beside both at its peak
    (`other_bytes`). The latter is None where a peer or a second backend, which take memory of
    their own, run in the same process.

    Raises:
        UserError: a system is not known, or the folder cannot decode so.
    """
    decoder: Decoder = gateskip.load(folder)
    workloads = (
        prompts_by_category(decoder, prompts, limit, cache)
        if prompts
        else running_text(decoder, batches, contexts, cache)
    )
    runners = runners_of(decoder, folder, systems, workloads, new_tokens)
    every_batch = [rows for groups in workloads.values() for rows in groups]
    cache_bytes = max(
        decoder.skipping.cache_bytes(len(rows), cache_capacity(max(map(len, rows)), new_tokens))
        for rows in every_batch
    )
    alone = not any(system.is_peer or system.backend for system in map(parse_system, systems))
    if alone:
        for run in runners.values():
            run([every_batch[0][0][:WARM_TOKENS]], 2)
    memory.reset_peak()
    held = memory.resident_bytes()
    measurements = measure(runners, workloads, new_tokens, repeats, progress)
    return {
        "cache_bytes": cache_bytes,
        "other_bytes": memory.peak_bytes() - held - cache_bytes if alone else None,
        "measurements": [each.to_json() for each in measurements],
        "roofline": roofline(),
        "weight_bytes": module_bytes(decoder.skipping.model),
        "threads": torch.get_num_threads(),
        "new_tokens": new_tokens,
    }


def runners_of(
    decoder: Decoder, folder: Path, names: Sequence[str], workloads: Workloads, new_tokens: int
) -> dict[str, Runner]:
    """Name of a system -> what runs it on texts as long as those of the workloads.

    Raises UserError for a system that is not known, or that the folder cannot run.
    """
    longest = max(len(row) for groups in workloads.values() for rows in groups for row in rows)
    systems = [parse_system(name) for name in names]
    decoders: dict[BackendName | None, Decoder] = {None: decoder, decoder.backend: decoder}
    for backend in {system.backend for system in systems} - decoders.keys():
        decoders[backend] = _load_backend(folder, backend)
    return {
        system.name: _runner(decoders[system.backend], folder, system, longest + new_tokens)
        for system in systems
    }


def _load_backend(folder: Path, backend: BackendName | None) -> Decoder:
    assert backend is not None, "the folder's own backend is loaded already"
    try:
        decoder: Decoder = gateskip.load(folder, backend=backend)
    except ValueError as error:
        raise UserError(f"system {backend}: {error}", fix="choose another backend") from error
    return decoder


def measure(
    runners: Mapping[str, Runner],
    workloads: Workloads,
    new_tokens: int,
    repeats: int,
    progress: Progress | None = None,
) -> list[Measurement]:
    """Each repeat runs every system on every batch of every workload once.

    Systems alternate on each batch, since drift of the machine lasts for seconds. Tokens are
    compared with those of the first system.
    """
    measurements = {
        (name, workload): Measurement(name, workload, run.arithmetic, run.prefill_arithmetic)
        for name, run in runners.items()
        for workload in workloads
    }
    done, total = 0, repeats * sum(map(len, workloads.values()))
    for run in runners.values():  # what is built on first use is built before anything is timed
        run(next(iter(workloads.values()))[0], new_tokens)
    for _ in range(repeats):
        for workload, groups in workloads.items():
            runs: dict[str, list[Run]] = {name: [] for name in runners}
            for rows in groups:
                for name, run in runners.items():
                    runs[name].append(run(rows, new_tokens))
                done += 1
                if progress is not None:
                    progress(done, total, workload)
            first = [each.tokens for each in next(iter(runs.values()))]
            for name, own in runs.items():
                measurements[name, workload].add(own, first == [each.tokens for each in own])
    return list(measurements.values())


def _runner(decoder: Decoder, folder: Path, system: System, context: int) -> Runner:
    """What runs a system, for texts of at most `context` tokens."""
    stop_tokens = stop_token_ids(decoder)
    if system.name.startswith("transformers"):
        return Transformers(folder, decoder.skipping.dtype, system.peer_option, stop_tokens)
    if system.name.startswith("llama.cpp"):
        return _llama_cpp(folder, system.peer_option, context, stop_tokens)
    _require_settings(decoder, system)
    return DecoderRunner(decoder, system)


def _llama_cpp(folder: Path, option: str, context: int, stop_tokens: Sequence[int]) -> LlamaCpp:
    """llama.cpp on a file, or on the folder itself where `option` is a GGUF type."""
    if option not in GGUF_KINDS:
        return LlamaCpp(Path(option).expanduser(), context, stop_tokens)
    # The file is mapped into memory, so it can be read after its name is gone.
    with tempfile.TemporaryDirectory(prefix="gateskip-") as scratch:
        file = Path(scratch) / f"{option}.gguf"
        write_gguf(folder, file, option)
        return LlamaCpp(file, context, stop_tokens)


def _require_settings(decoder: Decoder, system: System) -> None:
    """Raise UserError where the folder has no such thresholds or no such draft."""
    budget = system.settings.get("budget", system.settings.get("draft_budget", 1.0))
    try:
        decoder.thresholds(budget)
        decoder.drafter(system.settings.get("draft_weights", "own"))
    except ValueError as error:
        raise UserError(f"system {system.name}: {error}", fix="choose another system") from error


class DecoderRunner:
    """Our decoder under a system's settings."""

    def __init__(self, decoder: Decoder, system: System) -> None:
        self.decoder, self.system = decoder, system
        self.arithmetic, self.prefill_arithmetic = decoder.arithmetic, decoder.scoring_arithmetic

    def __call__(self, rows: Rows, new_tokens: int) -> Run:
        """Continue `rows` by up to `new_tokens` each."""
        engines = [each.engine for each in self.decoder.models() if each.engine is not None]
        before = [engine.spent() for engine in engines]
        usage, saved, skipped = self.decoder.skipping.usage, 0.0, 0.0
        usage.clear()
        generation = self.decoder.generate(
            rows, new_tokens, eos=stop_token_ids(self.decoder), **self.system.settings
        )
        stats = generation.stats
        spent: dict[str, float] = {}
        for engine, earlier in zip(engines, before, strict=True):
            for name, seconds in engine.spent().items():
                spent[name] = spent.get(name, 0.0) + seconds - earlier[name]
        if self.system.settings.get("mode") == "skip":
            saved = self.decoder.saved(usage, self.system.settings["budget"]).model
            skipped = 1 - statistics.mean(usage.shares())
        return Run(
            tokens=generation.tokens,
            prompt_tokens=stats.prompt_tokens,
            prefill_s=stats.prefill_s,
            decoded=stats.new_tokens - len(rows),
            decode_s=stats.decode_s,
            drafted=stats.drafted,
            accepted=stats.accepted,
            spent=spent,
            saved=saved,
            skipped=skipped,
        )
