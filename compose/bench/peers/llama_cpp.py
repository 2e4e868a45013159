"""The peer `llama.cpp`, through llama-cpp-python: its `eval` on the prompt, then token by token."""

from __future__ import annotations

import importlib
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from compose.bench.measurement import Rows, Run
from compose.errors import UserError


class LlamaCpp:
    """llama.cpp on a GGUF file of the same model."""

    arithmetic = prefill_arithmetic = None

    def __init__(self, file: Path, context: int, stop_tokens: Sequence[int]) -> None:
        """Raises UserError where the file or the package is missing."""
        if not file.is_file():
            raise UserError(f"system llama.cpp: there is no file {file}", fix="name a .gguf")
        try:
            package: Any = importlib.import_module("llama_cpp")
        except ImportError as error:
            raise UserError(
                "system llama.cpp: llama-cpp-python is not installed",
                fix="pip install 'gateskip-compose[peers]', which builds it",
            ) from error
        threads = torch.get_num_threads()
        self.stop_tokens = set(stop_tokens)
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
            while len(text) < new_tokens and text[-1] not in self.stop_tokens:
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
