"""Other decoders of the same model, to be timed beside ours: transformers' and llama.cpp's.

Each gets token ids and gives token ids, greedily, and is asked for nothing that it would not do for
its own users: transformers runs its `generate` on a model of its own, as `from_pretrained` gives
it; llama.cpp evaluates the prompt, then one token at a time.
"""

from __future__ import annotations

import importlib
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

import torch

from compose.errors import UserError, suggest

WAYS = ("", "compiled", "lookup", "early-exit")
LOOKED_UP = 10  # tokens that transformers proposes from the prompt, as its documentation has it
Rows = list[list[int]]


@dataclass(frozen=True)
class Run:
    """What one batch of prompts gave, and what it took."""

    tokens: Rows
    prompt_tokens: int
    prefill_s: float
    decoded: int
    """New tokens but the first of each row, which comes out of prefill."""
    decode_s: float
    drafted: int = 0
    accepted: int = 0
    spent: dict[str, float] = field(default_factory=dict)
    """Seconds in parts of the native work, where it tells."""
    saved: float = 0.0
    """Share of the model's multiply-adds that skipping saved, gates and shortcuts paid for."""
    skipped: float = 0.0
    """Share of the branches that tokens passed by, all branches and tokens counted alike."""


class Rival(Protocol):
    """A decoder: prompts as token ids in, greedy text out."""

    def __call__(self, rows: Rows, new_tokens: int) -> Run:
        """Continue `rows` by up to `new_tokens` each."""


class Transformers:
    """`generate` of transformers: plain, compiled over a static cache, or one of its own drafts."""

    def __init__(self, folder: Path, dtype: torch.dtype, way: str, ends: Sequence[int]) -> None:
        """`way` is empty, `compiled`, `lookup`, or `early-exit-LAYERS`.

        Raises UserError for another.
        """
        from gateskip.model.folders import load_model

        name, layer = (way[:10], way[11:]) if way.startswith("early-exit") else (way, "")
        if name not in WAYS or bool(layer) != (name == "early-exit") or not f"{layer}0".isdigit():
            raise UserError(
                f"contender transformers:{way}: {suggest(name, WAYS[1:])}",
                fix="name compiled, lookup, early-exit-10, or none",
            )
        self.model, self.ends = load_model(folder, dtype), list(ends)
        self.more: dict[str, Any] = {}
        if name == "compiled":
            self.more = {"cache_implementation": "static", "compile_config": _everywhere()}
        elif name == "lookup":
            self.more = {"prompt_lookup_num_tokens": LOOKED_UP}
        elif name == "early-exit":
            self.more = {"assistant_early_exit": int(layer)}

    def __call__(self, rows: Rows, new_tokens: int) -> Run:
        """What one new token takes is called prefill."""
        longest = max(map(len, rows))
        ids = torch.tensor([[0] * (longest - len(row)) + row for row in rows])
        mask = torch.tensor([[0] * (longest - len(row)) + [1] * len(row) for row in rows])
        took = []
        for count in (1, new_tokens):
            started = time.perf_counter()
            text = self.model.generate(
                ids,
                attention_mask=mask,
                max_new_tokens=count,
                do_sample=False,
                eos_token_id=self.ends,
                pad_token_id=self.ends[0],
                **self.more,
            )
            took.append(time.perf_counter() - started)
        tokens = [_cut(row[longest:].tolist(), self.ends) for row in text]
        decoded = sum(map(len, tokens)) - len(rows)
        return Run(tokens, sum(map(len, rows)), took[0], decoded, took[1] - took[0])


class LlamaCpp:
    """llama.cpp through llama-cpp-python, on a GGUF file of the same model."""

    def __init__(self, file: Path, context: int, ends: Sequence[int]) -> None:
        """Raises UserError where the file or the package is missing."""
        if not file.is_file():
            raise UserError(f"contender llama.cpp: there is no file {file}", fix="name a .gguf")
        try:
            package: Any = importlib.import_module("llama_cpp")
        except ImportError as error:
            raise UserError(
                "contender llama.cpp: llama-cpp-python is not installed",
                fix="pip install 'gateskip-compose[peers]', which builds it",
            ) from error
        threads = torch.get_num_threads()
        self.ends = set(ends)
        self.model = package.Llama(
            str(file), n_ctx=context, n_threads=threads, n_threads_batch=threads, verbose=False
        )

    def __call__(self, rows: Rows, new_tokens: int) -> Run:
        """One row after the other: its Python interface has no batches."""
        tokens, prefill, decode = [], 0.0, 0.0
        for row in rows:
            self.model.reset()
            started = time.perf_counter()
            self.model.eval(row)
            text = [self._best()]
            prefill += time.perf_counter() - started
            started = time.perf_counter()
            while len(text) < new_tokens and text[-1] not in self.ends:
                self.model.eval(text[-1:])
                text.append(self._best())
            decode += time.perf_counter() - started
            tokens.append(text)
        decoded = sum(map(len, tokens)) - len(rows)
        return Run(tokens, sum(map(len, rows)), prefill, decoded, decode)

    def _best(self) -> int:
        """The likeliest token after the last one evaluated."""
        import numpy

        logits = self.model._ctx.get_logits_ith(-1)
        size = self.model.n_vocab()
        return int(numpy.ctypeslib.as_array(logits, shape=(size,)).argmax())


def _everywhere() -> Any:
    """transformers' own settings to compile decoding, which it leaves off where there is no GPU."""
    from transformers.generation.configuration_utils import CompileConfig

    config: Any = CompileConfig()
    config._compile_all_devices = True
    return config


def _cut(tokens: list[int], ends: Sequence[int]) -> list[int]:
    stop = next((i for i, token in enumerate(tokens) if token in ends), len(tokens))
    return tokens[: stop + 1]
