"""A peer under measurement: another engine on the baseline's folder, in a process of its own.

It is asked for what `CellBench` is asked for, on the same text and the same prompts, so that no
speed of another engine stands without its quality.
"""

from __future__ import annotations

import hashlib
import json
import tempfile
from collections.abc import Sequence
from contextlib import ExitStack
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from compose.assets import first_available, token_blocks
from compose.bench.cell import BLOCK, CellJob
from compose.bench.peers.prepare import PreparedPeer, prepare
from compose.bench.peers.process import PeerProcess
from compose.bench.speed import usable_cores
from compose.bench.text import load_head, load_reference, score_blocks
from compose.bench.workloads import Rows, rows_of
from compose.memory import peak_of_children
from compose.store import read_json
from compose.units import Progress

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

MARGIN = 1  # positions beside prompt and answer, for engines that count the end token


class PeerBench:
    """Measures the peer that `job` names; the commands are those of `CellBench`."""

    def __init__(self, job: CellJob, peer: str, progress: Progress | None = None) -> None:
        self.job, self.peer, self.progress = job, peer, progress
        self._stack = ExitStack()
        self._process: PeerProcess | None = None
        self._loaded: tuple[int, int] | None = None
        """Positions and rows for which the process has loaded the model."""
        self._rows: dict[tuple[int, int, str], list[Rows]] = {}

    @cached_property
    def prepared(self) -> PreparedPeer:
        """Its environment and the model in its format, made on first use."""
        return prepare(self.peer, self.job.folder, self.job.asset_cache, self.progress)

    @cached_property
    def tokenizer(self) -> PreTrainedTokenizerBase:
        """The folder's tokenizer: every engine gets the same token ids."""
        from transformers import AutoTokenizer

        tokenizer: PreTrainedTokenizerBase = AutoTokenizer.from_pretrained(self.job.folder)
        return tokenizer

    def load(self) -> dict[str, Any]:
        """Bytes on disk and in memory, and what it is: versions, build flags, how it is run."""
        process = self._start(self.job.threads or torch.get_num_threads())
        loaded = process.load(BLOCK + MARGIN, 1)
        self._loaded = (BLOCK + MARGIN, 1)
        prepared = self.prepared
        return {
            "size": {
                "disk_bytes": prepared.disk_bytes,
                "resident_bytes": loaded["resident_bytes"] or None,
            },
            "peer": {
                "engine": prepared.engine,
                "option": prepared.option,
                "versions": loaded["versions"],
                "flags": loaded["flags"],
                "settings": prepared.settings,
                "threads": process.threads,
            },
        }

    def _start(self, threads: int) -> PeerProcess:
        """Its process with so many threads; one with another number is replaced."""
        if self._process is None or self._process.threads != threads:
            self._stack.close()
            self._process = self._stack.enter_context(PeerProcess(self.prepared, threads))
            self._loaded = None
        return self._process

    def _ready(self, context: int, batch: int) -> PeerProcess:
        """Its process, loaded for rows of `context` tokens with what follows."""
        assert self._process is not None, "a peer is loaded before it is asked for more"
        if self._loaded != (context, batch):
            self._process.load(context, batch)
            self._loaded = (context, batch)
        return self._process

    def close(self) -> None:
        """End its process; it also ends with ours."""
        self._stack.close()
        self._process, self._loaded = None, None

    # -- quality -------------------------------------------------------------------------------

    def quality(self, reference: Path) -> dict[str, Any]:
        """Perplexity and the distance to the baseline from its own logits; tasks that it writes."""
        wanted = self.job.benchmark["quality"]
        record: dict[str, Any] = {}
        model = _Logits(self)
        if wanted["perplexity"]:
            texts = first_available(wanted["perplexity"], None, self.job.asset_cache)
            count = max(1, wanted["perplexity_tokens"] // BLOCK)
            blocks = token_blocks(texts, self.tokenizer, BLOCK, count)
            dense = load_reference(reference, blocks), load_head(self.job.baseline_folder)
            scores = score_blocks(model, blocks, dense, progress=self.progress)
            record["perplexity"] = {
                "dataset": texts.name,
                "value": scores.perplexity,
                "tokens": scores.tokens,
                "origin": texts.origin,
            }
            record |= {"kl_to_baseline": scores.kl, "greedy_agreement": scores.agreement}
        return record

    def lossless(self) -> dict[str, Any]:
        """Never asked of a peer: nothing of ours speculates in it."""
        raise AssertionError("a peer has no lossless check")

    def logits(self, ids: Tensor) -> Tensor:
        """Logits [B, S, V] after every token of ids [B, S], as the engine computes them."""
        process = self._ready(ids.shape[1] + MARGIN, 1)
        with tempfile.TemporaryDirectory(prefix="gateskip-") as scratch:
            written = process.logits(ids.tolist(), Path(scratch) / "logits.npy")
            return torch.from_numpy(written.copy())

    def generate(
        self, prompts: Sequence[list[int]], new_tokens: int, stop_tokens: Sequence[int]
    ) -> list[list[int]]:
        """Greedy continuations, through the engine's own batching."""
        longest = max(map(len, prompts))
        process = self._ready(_rounded(longest + new_tokens + MARGIN), len(prompts))
        tokens: list[list[int]] = process.generate(prompts, new_tokens, list(stop_tokens))["tokens"]
        return tokens

    # -- speed ---------------------------------------------------------------------------------

    def warm(self, batch: int, context: int, category: str, threads: int) -> dict[str, Any]:
        """Load for a shape and run a whole turn that is not counted: nothing is compiled later."""
        self._start(self.job.threads or threads)
        return self.speed(batch, context, category)

    def speed(self, batch: int, context: int, category: str) -> dict[str, Any]:
        """One turn; the fields of `SpeedTurns.measure`, as far as an engine tells them."""
        new_tokens = self.job.benchmark["speed"]["new_tokens"]
        batches = self._batches(batch, context, category)
        longest = max(len(row) for rows in batches for row in rows)
        process = self._ready(longest + new_tokens + MARGIN, batch)
        stop = stop_ids(self.job.folder, self.tokenizer) if category else []
        turn: dict[str, Any] = {"prompt_tokens": 0, "prefill_s": 0.0, "tokens": 0, "decode_s": 0.0}
        first_tokens, digest = [], hashlib.sha256()
        for rows in batches:
            answer = process.generate(rows, new_tokens, stop, ignore_stop=not category)
            turn["prompt_tokens"] += sum(map(len, rows))
            turn["tokens"] += sum(map(len, answer["tokens"])) - answer["first_tokens"]
            turn["prefill_s"] += answer["prefill_s"]
            turn["decode_s"] += answer["decode_s"]
            first_tokens.append(answer["ttft_s"])
            digest.update(json.dumps(answer["tokens"]).encode())
        return turn | {
            "ttft_s": sum(first_tokens) / len(first_tokens),
            "digest": digest.hexdigest()[:16],
            "peak_bytes": peak_of_children(),
            "threads": process.threads,
            "affinity": usable_cores(),
        }

    def _batches(self, batch: int, context: int, category: str) -> list[Rows]:
        shape, wanted = (batch, context, category), self.job.benchmark["speed"]
        if shape not in self._rows:
            cache = self.job.asset_cache
            self._rows[shape] = rows_of(self.tokenizer, batch, context, category, wanted, cache)
        return self._rows[shape]


class _Logits:
    """A peer as a scored model: what it calls hidden states are its logits already."""

    def __init__(self, bench: PeerBench) -> None:
        self.bench, self.tokenizer, self.device = bench, bench.tokenizer, torch.device("cpu")
        self.generate = bench.generate

    def hidden(self, input_ids: Tensor, lengths: Tensor | None) -> Tensor:
        """Token ids [B, S] -> logits [B, S, V]; rows are not padded."""
        assert lengths is None, "a peer scores running text alone"
        return self.bench.logits(input_ids)

    def head(self, hidden: Tensor) -> Tensor:
        """Logits as they are."""
        return hidden


def stop_ids(folder: Path, tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """Ids that end an answer: the tokenizer's, and those of the folder's configs."""
    stated = [tokenizer.eos_token_id]
    for name in ("generation_config.json", "config.json"):
        ends = (read_json(folder / name) or {}).get("eos_token_id")
        if ends is not None:
            stated += ends if isinstance(ends, list) else [ends]
            break
    return sorted({each for each in stated if each is not None})


def _rounded(positions: int, step: int = 256) -> int:
    """Positions up to a multiple of `step`, so that batches of like lengths share one loading."""
    return -(-positions // step) * step
