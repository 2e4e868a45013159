"""The peer `llama.cpp`, through the C functions of llama-cpp-python.

Its high-level class evaluates one sequence and copies logits. Here a step is one `llama_decode`
with one sequence a row, as in llama.cpp's own `llama-batched-bench`.
"""

from __future__ import annotations

import ctypes
import time
from typing import Any

from serve import held_bytes, serve, timed, write_logits

MOST_TOKENS = 2048  # of a prompt in one batch, llama.cpp's own n_batch
LEAST_TOKENS = 512  # its own n_ubatch


class LlamaCpp:
    """One model, and one context with a sequence for each row."""

    def __init__(self) -> None:
        self.api: Any = None
        self.model: Any = None
        self.context: Any = None
        self.batch: Any = None
        self.view: Any = None

    def convert(self, source: str, target: str, option: str, threads: int) -> dict[str, Any]:
        """Quantize a GGUF file as `llama-quantize` does, without an importance matrix."""
        import llama_cpp

        params = llama_cpp.llama_model_quantize_default_params()
        params.ftype = getattr(llama_cpp, f"LLAMA_FTYPE_MOSTLY_{option.upper()}")
        params.nthread = threads
        failed = llama_cpp.llama_model_quantize(source.encode(), target.encode(), params)
        if failed:
            raise RuntimeError(f"llama_model_quantize returned {failed}")
        return {}

    def load(
        self, model: str, threads: int, context: int, batch: int, flash: bool, **_: Any
    ) -> dict[str, Any]:
        """Map the file, make a context of `batch` sequences of `context` tokens, run one step."""
        import llama_cpp

        self.api = llama_cpp
        if self.model is None:
            llama_cpp.llama_backend_init()
            params = llama_cpp.llama_model_default_params()
            params.n_gpu_layers = 0
            self.model = llama_cpp.llama_model_load_from_file(model.encode(), params)
            if not self.model:
                raise RuntimeError(f"llama.cpp cannot load {model}")
            vocabulary = llama_cpp.llama_model_get_vocab(self.model)
            self.vocabulary = llama_cpp.llama_vocab_n_tokens(vocabulary)
        self._make_context(threads, context, batch, flash)
        self.generate([[0] * min(8, context // 2)] * batch, 2, [], True)
        return {
            "flags": llama_cpp.llama_print_system_info().decode().strip(),
            "resident_bytes": held_bytes(),
        }

    def _make_context(self, threads: int, context: int, batch: int, flash: bool) -> None:
        api = self.api
        if self.context is not None:
            api.llama_batch_free(self.batch)
            api.llama_free(self.context)
        self.most = max(LEAST_TOKENS, min(MOST_TOKENS, context * batch))
        params = api.llama_context_default_params()
        params.n_ctx = context * batch
        params.n_seq_max = batch
        params.n_batch = params.n_ubatch = self.most
        params.n_threads = params.n_threads_batch = threads
        params.flash_attn_type = (
            api.LLAMA_FLASH_ATTN_TYPE_ENABLED if flash else api.LLAMA_FLASH_ATTN_TYPE_DISABLED
        )
        params.offload_kqv = False
        params.no_perf = True
        self.context = api.llama_init_from_model(self.model, params)
        if not self.context:
            raise RuntimeError(f"llama.cpp has no context of {batch} times {context} tokens")
        self.rows, self.length = batch, context
        self.batch = api.llama_batch_init(self.most, 0, 1)
        self.address, self.view = 0, None

    def generate(
        self, prompts: list[list[int]], new_tokens: int, stop: list[int], ignore_stop: bool
    ) -> dict[str, Any]:
        """Continue all prompts, one sequence each; rows that stop leave the batch.

        The clock runs over whole steps: `llama_decode` and the greedy choice. `python_s` is the
        part of `decode_s` that is spent outside llama.cpp.
        """
        if len(prompts) > self.rows or max(map(len, prompts)) + new_tokens > self.length + 1:
            raise ValueError(
                f"{len(prompts)} rows of {max(map(len, prompts))} + {new_tokens} tokens do not fit"
                f" into {self.rows} rows of {self.length}"
            )
        ends = set() if ignore_stop else set(stop)
        self.api.llama_memory_clear(self.api.llama_get_memory(self.context), True)
        self.inside = 0.0
        started = time.perf_counter()
        tokens = [[token] for token in self._prefill(prompts)]
        first, self.inside = time.perf_counter(), 0.0
        lengths = [len(row) for row in prompts]
        live = [row for row in range(len(prompts)) if tokens[row][-1] not in ends]
        for _ in range(new_tokens - 1):
            if not live:
                break
            step = [(tokens[row][-1], lengths[row], row, True) for row in live]
            for row, token in zip(live, self._decode(step), strict=True):
                tokens[row].append(token)
                lengths[row] += 1
            if ends:
                live = [row for row in live if tokens[row][-1] not in ends]
        ended = time.perf_counter()
        answer = timed(tokens, started, first, ended, len(prompts))
        return {**answer, "python_s": ended - first - self.inside}

    def _prefill(self, prompts: list[list[int]]) -> list[int]:
        """The argmax token after each prompt; tokens of all rows share batches."""
        flat = [
            (token, position, row, position == len(prompt) - 1)
            for row, prompt in enumerate(prompts)
            for position, token in enumerate(prompt)
        ]
        first: list[int] = []
        for start in range(0, len(flat), self.most):
            first += self._decode(flat[start : start + self.most])
        return first

    def _decode(self, step: list[tuple[int, int, int, bool]]) -> list[int]:
        """Run (token, position, sequence, needs logits) in one call; the argmax of each row of
        logits."""
        rows = self._fill(step)
        began = time.perf_counter()
        failed = self.api.llama_decode(self.context, self.batch)
        self.inside += time.perf_counter() - began
        if failed:
            raise RuntimeError(f"llama_decode returned {failed}")
        best: list[int] = self._logits(rows).argmax(-1).tolist() if rows else []
        return best

    def _fill(self, step: list[tuple[int, int, int, bool]]) -> int:
        """Write a step into the batch; returns the number of rows of logits that it computes."""
        batch, rows = self.batch, 0
        token, pos, seq, logits = batch.token, batch.pos, batch.seq_id, batch.logits
        count = batch.n_seq_id
        for index, (token_id, position, sequence, needs_logits) in enumerate(step):
            token[index] = token_id
            pos[index] = position
            count[index] = 1
            seq[index][0] = sequence
            logits[index] = needs_logits
            rows += needs_logits
        batch.n_tokens = len(step)
        return rows

    def _logits(self, rows: int) -> Any:
        """llama.cpp's own logits of the last step, [rows, V], in the order of the batch."""
        import numpy

        pointer = self.api.llama_get_logits(self.context)
        address = ctypes.addressof(pointer.contents)
        if address != self.address or len(self.view) < rows:
            self.view = numpy.ctypeslib.as_array(pointer, shape=(rows, self.vocabulary))
            self.address = address
        return self.view[:rows]

    def logits(self, blocks: list[list[int]], path: str, vocabulary: int) -> dict[str, Any]:
        """Write float32 logits [N, S, V] of the blocks as .npy, each block from an empty cache."""
        if len(blocks[0]) > self.length:
            raise ValueError(f"blocks of {len(blocks[0])} tokens, a context of {self.length}")
        answer: dict[str, Any] = write_logits(path, blocks, vocabulary, self._forward)
        return answer

    def _forward(self, block: list[int], row: Any) -> None:
        """Set `row` to the logits [S, V] of one block."""
        self.api.llama_memory_clear(self.api.llama_get_memory(self.context), True)
        for start in range(0, len(block), self.most):
            part = block[start : start + self.most]
            self._fill([(token, start + at, 0, True) for at, token in enumerate(part)])
            if self.api.llama_decode(self.context, self.batch):
                raise RuntimeError("llama_decode failed")
            row[start : start + len(part)] = self._logits(len(part))[:, : row.shape[1]]


if __name__ == "__main__":
    serve(LlamaCpp())
