"""Measures a peer: another engine on the baseline's folder, in a separate process.

It answers the same calls as `CellBench`, on the same text and the same prompts, so that every speed
of another engine comes with its quality.
"""

from __future__ import annotations

import hashlib
import json
import tempfile
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import asdict
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from compose.assets import TASKS, first_available, token_blocks
from compose.bench.generate import load_prompts
from compose.bench.peers.prepare import CalibrationText, PreparedPeer, prepare
from compose.bench.peers.process import PeerProcess
from compose.bench.quality.measure import text_record
from compose.bench.quality.own_answers import DenseAnswers, score_answers
from compose.bench.quality.text import BLOCK, load_blocks, load_head, load_stored, score_blocks
from compose.bench.speed.workloads import Rows, TurnText, TurnTexts
from compose.capacity import usable_cores
from compose.contract import CellJob
from compose.errors import StepError
from compose.memory import peak_of_children
from compose.store import read_json
from compose.units import Progress

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

MARGIN = 1  # positions beside prompt and answer, for engines that count the end token


class PeerBench:
    """Measures the peer that `job` names; the commands are those of `CellBench`."""

    def __init__(
        self,
        job: CellJob,
        peer: str,
        progress: Progress | None = None,
        calibration: Callable[[], list[list[int]]] | None = None,
    ) -> None:
        """`calibration` gives the token ids [N][S] of the job's calibration text."""
        self.job, self.peer, self.progress = job, peer, progress
        self._calibration = calibration
        self._stack = ExitStack()
        self._process: PeerProcess | None = None
        self._loaded: tuple[int, int] | None = None
        """Positions and rows for which the process has loaded the model."""

    @cached_property
    def prepared(self) -> PreparedPeer:
        """Its environment and the model in its format, made on first use."""
        job, text = self.job, None
        if job.calibration is not None and self._calibration is not None:
            text = CalibrationText(tuple(job.calibration.weights), self._calibration())
        return prepare(self.peer, job.folder, job.asset_cache, self.progress, text)

    @cached_property
    def tokenizer(self) -> PreTrainedTokenizerBase:
        """The folder's tokenizer: every engine gets the same token ids."""
        from transformers import AutoTokenizer

        tokenizer: PreTrainedTokenizerBase = AutoTokenizer.from_pretrained(self.job.folder)
        return tokenizer

    @cached_property
    def _stops(self) -> list[int]:
        return stop_ids(self.job.folder, self.tokenizer)

    def load(self) -> dict[str, Any]:
        """Bytes on disk and in memory, versions, build flags, and settings."""
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
        """The peer's process with that many threads; a process with another number is replaced."""
        if self._process is None or self._process.threads != threads:
            self._stack.close()
            self._process = self._stack.enter_context(PeerProcess(self.prepared, threads))
            self._loaded = None
        return self._process

    def _ready(self, context: int, batch: int, *, exactly: bool = False) -> PeerProcess:
        """The peer's process, loaded for `batch` rows of `context` tokens and the answer; unless
        `exactly` is set, a process loaded for longer rows also serves."""
        assert self._process is not None, "a peer is loaded before it is asked for more"
        positions, rows = self._loaded or (0, 0)
        if rows != batch or positions < context or (exactly and positions != context):
            self._process.load(context, batch)
            self._loaded = (context, batch)
        return self._process

    def close(self) -> None:
        """End its process; it also ends with ours."""
        self._stack.close()
        self._process, self._loaded = None, None

    # -- quality -------------------------------------------------------------------------------

    def quality(self, reference: Path) -> dict[str, Any]:
        """The quality that `QualityBench` measures, as far as an engine shows it: text and answers
        from its logits, and the tasks with written answers."""
        settings, cache = self.job.benchmark["quality"], self.job.asset_cache
        record: dict[str, Any] = {}
        own_answers = settings["own_answers"]
        if settings["perplexity"] or own_answers:
            stored, head = load_stored(reference), load_head(self.job.baseline_folder)
        if settings["perplexity"]:
            texts = first_available(settings["perplexity"], None, cache)
            count = max(1, settings["perplexity_tokens"] // BLOCK)
            blocks = token_blocks(texts, self.tokenizer, BLOCK, count)
            dense = load_blocks(stored, blocks), head
            record |= text_record(texts, score_blocks(self, blocks, dense, progress=self.progress))
        if own_answers:
            prompts = load_prompts(
                self.tokenizer, own_answers["source"], own_answers["prompts"], cache
            )
            answers = DenseAnswers.of(stored, prompts)
            record["own_answers"] = score_answers(
                *(self, answers, head, own_answers["new_tokens"], self._stops),
                *(self.tokenizer, self.progress),
            )
        written = [name for name in settings["tasks"] if name in TASKS and TASKS[name].writes]
        if written:
            from compose.bench.quality.tasks import run_tasks  # loads lm-eval

            limit, batch = settings["limit"], settings["batch_size"]
            scores = run_tasks(
                self, written, limit=limit, batch_size=batch, cache=cache, progress=self.progress
            )
            record["tasks"] = {name: asdict(score) for name, score in scores.items()}
        return record

    def lossless(self) -> dict[str, Any]:
        """Never called: peers have no lossless check."""
        raise AssertionError("a peer has no lossless check")

    @property
    def device(self) -> torch.device:
        """The device of the logits."""
        return torch.device("cpu")

    def hidden(self, input_ids: Tensor, lengths: Tensor | None) -> Tensor:
        """Token ids [B, S] -> logits [B, S, V] of the engine, which `head` returns unchanged."""
        assert lengths is None, "rows of one length"
        process = self._ready(input_ids.shape[1] + MARGIN, 1)
        with tempfile.TemporaryDirectory(prefix="gateskip-") as scratch:
            written = process.logits(input_ids.tolist(), Path(scratch) / "logits.npy")
            return torch.from_numpy(written.copy())

    def head(self, hidden: Tensor) -> Tensor:
        """The logits unchanged."""
        return hidden

    def generate(
        self, prompts: Sequence[list[int]], new_tokens: int, stop_tokens: Sequence[int]
    ) -> list[list[int]]:
        """Greedy continuations by the engine's batching."""
        longest = max(map(len, prompts))
        process = self._ready(longest + new_tokens + MARGIN, len(prompts))
        tokens: list[list[int]] = process.generate(prompts, new_tokens, list(stop_tokens))["tokens"]
        return tokens

    def answer_logits(self, prompts: Rows, answers: Rows) -> list[Tensor]:
        """For each answer, the logits [T, V] that predict its T tokens, from one prefill."""
        led = []
        for prompt, answer in zip(prompts, answers, strict=True):
            ids = torch.tensor([[*prompt, *answer[:-1]]])
            led.append(self.hidden(ids, None)[0, len(prompt) - 1 :])
        return led

    # -- speed ---------------------------------------------------------------------------------

    def warm(self, which: TurnText, threads: int) -> dict[str, Any]:
        """Load for a shape and run one turn that does not count, so that nothing is compiled
        later."""
        self._start(self.job.threads or threads)
        return self._turn(which)

    def speed(self, which: TurnText) -> dict[str, Any]:
        """One turn; the fields of `SpeedTurns.measure`, as far as an engine reports them.

        Raises:
            StepError: the engine compiled something while it was timed.
        """
        turn = self._turn(which)
        if turn["compiled_graphs"]:
            raise StepError(
                f"{self.peer} compiled {turn['compiled_graphs']} graphs in a timed turn"
            )
        return turn

    def _turn(self, which: TurnText) -> dict[str, Any]:
        new_tokens = self.job.benchmark["speed"]["new_tokens"]
        batches = self._texts[which]
        longest = max(len(row) for rows in batches for row in rows)
        process = self._ready(longest + new_tokens + MARGIN, which.batch, exactly=True)
        stop = self._stops if which.category else []
        turn: dict[str, Any] = {"prompt_tokens": 0, "prefill_s": 0.0, "tokens": 0, "decode_s": 0.0}
        turn["compiled_graphs"] = 0
        first_tokens, digest = [], hashlib.sha256()
        for rows in batches:
            answer = process.generate(rows, new_tokens, stop, ignore_stop=not which.category)
            turn["prompt_tokens"] += sum(map(len, rows))
            turn["tokens"] += sum(map(len, answer["tokens"])) - answer["first_tokens"]
            turn["prefill_s"] += answer["prefill_s"]
            turn["decode_s"] += answer["decode_s"]
            turn["compiled_graphs"] += answer.get("compiled_graphs", 0)
            first_tokens.append(answer["ttft_s"])
            digest.update(json.dumps(answer["tokens"]).encode())
        return turn | {
            "ttft_s": sum(first_tokens) / len(first_tokens),
            "digest": digest.hexdigest()[:16],
            "peak_bytes": peak_of_children(),
            "threads": process.threads,
            "affinity": len(usable_cores()),
        }

    @cached_property
    def _texts(self) -> TurnTexts:
        return TurnTexts(self.tokenizer, self.job.benchmark["speed"], self.job.asset_cache)


def stop_ids(folder: Path, tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """Ids that end an answer: those of the tokenizer and of the folder's configs."""
    stated = [tokenizer.eos_token_id]
    for name in ("generation_config.json", "config.json"):
        ends = (read_json(folder / name) or {}).get("eos_token_id")
        if ends is not None:
            stated += ends if isinstance(ends, list) else [ends]
            break
    return sorted({token for token in stated if token is not None})
