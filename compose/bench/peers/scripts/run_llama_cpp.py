"""The peer `llama.cpp`, through the C functions of llama-cpp-python.

Its high-level class evaluates one sequence and copies logits. Here a step is one `llama_decode`
with one sequence a row, as in llama.cpp's own `llama-batched-bench`. An importance matrix is
collected as `llama-imatrix` does it, by llama.cpp's callback after each product of a layer.
"""

from __future__ import annotations

import ctypes
import time
from collections.abc import Iterator
from typing import Any

from serve import held_bytes, serve, timed, write_logits

MOST_TOKENS = 2048  # of a prompt in one batch, llama.cpp's own n_batch
LEAST_TOKENS = 512  # its own n_ubatch


class Tensor(ctypes.Structure):
    """`struct ggml_tensor` of ggml.h, without its last two fields."""


Tensor._fields_ = [
    ("type", ctypes.c_int),
    ("buffer", ctypes.c_void_p),
    ("ne", ctypes.c_int64 * 4),  # sizes, the innermost first
    ("nb", ctypes.c_size_t * 4),  # strides in bytes
    ("op", ctypes.c_int),
    ("op_params", ctypes.c_int32 * 16),
    ("flags", ctypes.c_int32),
    ("src", ctypes.POINTER(Tensor) * 10),
    ("view_src", ctypes.c_void_p),
    ("view_offs", ctypes.c_size_t),
    ("data", ctypes.c_void_p),
    ("name", ctypes.c_char * 64),
]


class Importance:
    """Mean square of every input of each layer's linear maps, over all tokens seen."""

    def __init__(self) -> None:
        self.sums: dict[str, Any] = {}  # weight -> sum of squares [k]
        self.tokens: dict[str, int] = {}
        self.odd: list[str] = []
        """Weights whose inputs are no rows of float32; an error in a callback would be lost."""

    def see(self, address: int, ask: bool, _: Any) -> bool:
        """llama.cpp's callback: asked before each operation, called again after those of layers."""
        result = ctypes.cast(address, ctypes.POINTER(Tensor)).contents
        if not (result.src[0] and result.src[1]):
            return not ask
        weight, inputs = result.src[0].contents, result.src[1].contents
        name = weight.name.decode("utf-8", "replace")
        if not (name.startswith("blk.") and name.endswith(".weight")):
            return not ask
        if not ask:
            self._add(name, inputs)
        return True

    def _add(self, name: str, inputs: Tensor) -> None:
        import numpy

        width, rows = inputs.ne[0], inputs.ne[1] * inputs.ne[2] * inputs.ne[3]
        if inputs.type or inputs.nb[1] != 4 * width:  # type 0 is float32
            self.odd.append(name)
            return
        numbers = (ctypes.c_float * (rows * width)).from_address(inputs.data)
        squares = numpy.square(numpy.ctypeslib.as_array(numbers).reshape(rows, width))
        self.sums[name] = self.sums.get(name, 0.0) + squares.sum(0, dtype=numpy.float64)
        self.tokens[name] = self.tokens.get(name, 0) + rows

    def means(self) -> dict[str, Any]:
        """Weight -> float32 [k]."""
        return {name: (s / self.tokens[name]).astype("float32") for name, s in self.sums.items()}


class LlamaCpp:
    """One model, and one context with a sequence for each row."""

    def __init__(self) -> None:
        self.api: Any = None
        self.model: Any = None
        self.context: Any = None
        self.batch: Any = None
        self.view: Any = None
        self.watch: Any = None
        """llama.cpp's callback for operations."""

    def convert(
        self, source: str, target: str, option: str, threads: int, importance: str = ""
    ) -> dict[str, Any]:
        """Quantize a GGUF file as `llama-quantize` does; `importance` is a file of the method of
        that name."""
        import llama_cpp
        import numpy

        kind = option.partition("+")[0].upper()
        params = llama_cpp.llama_model_quantize_default_params()
        params.ftype = getattr(llama_cpp, f"LLAMA_FTYPE_MOSTLY_{kind}")
        params.nthread = threads
        means = dict(numpy.load(importance)) if importance else {}  # kept until the call ends
        if means:
            params.imatrix = _entries(means)
        failed = llama_cpp.llama_model_quantize(source.encode(), target.encode(), params)
        if failed:
            raise RuntimeError(f"llama_model_quantize returned {failed}")
        return {}

    def importance(
        self, source: str, target: str, rows: list[list[int]], threads: int
    ) -> dict[str, Any]:
        """Run the file over rows of token ids, one length, and write each weight's mean squares."""
        import llama_cpp
        import numpy

        seen = Importance()
        self.watch = llama_cpp.ggml_backend_sched_eval_callback(seen.see)
        self.load(source, threads, len(rows[0]), 1, False)
        seen.sums.clear()  # of the warm-up
        seen.tokens.clear()
        for row in rows:
            for _ in self._passes(row):
                pass
        if seen.odd or not seen.sums:
            raise RuntimeError(f"this llama.cpp has other tensors: {seen.odd[:1] or 'none known'}")
        numpy.savez(target, **seen.means())
        return {"weights": len(seen.sums)}

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
        if self.watch is not None:
            params.cb_eval = self.watch
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
        for start, end in self._passes(block):
            row[start:end] = self._logits(end - start)[:, : row.shape[1]]

    def _passes(self, block: list[int]) -> Iterator[tuple[int, int]]:
        """Run one block from an empty cache; yields the first and last place of each pass."""
        self.api.llama_memory_clear(self.api.llama_get_memory(self.context), True)
        for start in range(0, len(block), self.most):
            part = block[start : start + self.most]
            self._fill([(token, start + at, 0, True) for at, token in enumerate(part)])
            if self.api.llama_decode(self.context, self.batch):
                raise RuntimeError("llama_decode failed")
            yield start, start + len(part)


def _entries(means: dict[str, Any]) -> Any:
    """An importance matrix as llama_model_quantize takes it: an array that ends with no name. It
    points into the arrays of `means`."""
    import llama_cpp

    floats = ctypes.POINTER(ctypes.c_float)
    entries = [
        llama_cpp.llama_model_imatrix_data(name.encode(), mean.ctypes.data_as(floats), len(mean))
        for name, mean in means.items()
    ]
    return (llama_cpp.llama_model_imatrix_data * (len(entries) + 1))(*entries)


if __name__ == "__main__":
    serve(LlamaCpp())
